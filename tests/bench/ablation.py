"""ablation.py - what each part of the encoder is worth: every recipe on three models and several seeds, one CSV row each.

    python tests/bench/ablation.py --out tests/bench/results/ablation.csv
    python tests/bench/ablation.py --models tasks --seeds 1 --n 1 --only kvarn2 paper2      # a look, minutes on a CPU

Models: tasks = the embedded model on its nine families of look-up chains (n fresh problems a family and seed, head size 128);
text = a llama-architecture GGUF given with --text-model, on --texts (byte-level, head size 64); outliers = random weights with
planted outlier channels and tokens (head size 128). Errors compound: see blockwise.py. With cupy it runs on the GPU.

SPDX-License-Identifier: MIT
"""

import argparse
import csv
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT/"python"), str(ROOT/"tests"), str(Path(__file__).parent)]

from blockwise import BLOCK, Blockwise  # noqa: E402
from recipes import Recipe, xp  # noqa: E402

import tiny_model  # noqa: E402
from kvarn.embedded import tasks  # noqa: E402

EXACT = Recipe(16, "exact")
PROBED = 4  # sequences of each seed whose attention outputs are compared
FIELDS = ("model", "recipe", "seed", "bpv", "tokens", "kld_mean", "kld_median", "kld_999", "same_top", "dnll", "wrong_tokens",
          "sequences", "exact", "k_error", "v_error", "drift_quarter1", "drift_quarter4")


def recipes(varied) -> "dict[str, dict]":
    """Name -> arguments of Blockwise.run; varied: names of those that are also taken apart."""
    table = {}

    def add(name, keys, values=None, **more):
        table[name] = dict(keys=keys, values=values or keys, **more)

    def paper(bits):
        return Recipe(bits, "paper", iterations=16), replace(Recipe(bits, "paper", iterations=16), axis="token")

    add("q8_0", Recipe(8, "q8_0"))
    add("q4_0", Recipe(4, "q4_0"))
    add("q4_0-plain", Recipe(4, "q4_0", rotate=False))
    for bits in (2, 3, 4):
        add(f"kvarn{bits}", Recipe(bits))
        add(f"paper{bits}", *paper(bits))
    for k, v in ((4, 2), (3, 2), (4, 3)):
        add(f"kvarn{k}/{v}", Recipe(k), Recipe(v))
        add(f"paper{k}/{v}", paper(k)[0], paper(v)[1])
    for name in ("kvarn2", "paper2", "kvarn4/2", "paper4/2", "kvarn3", "paper3", "kvarn4", "paper4", "q4_0"):
        table[f"{name} tail 128"] = {**table[name], "tail": 128}
    for name in ("kvarn2", "paper2", "q4_0"):
        for what, run in (("sink 4", dict(sink=4)), ("sink 128", dict(sink=128)), ("tail 896", dict(tail=896))):
            table[f"{name} {what}"] = {**table[name], **run}
    for name in varied:
        both = table[name]

        def vary(what, name=name, both=both, sides="kv", run=None, **change):
            changed = {side: replace(r, **change) if side[0] in sides else r for side, r in both.items()}
            table[f"{name} {what}"] = {**changed, **(run or {})}

        vary("no rotation", rotate=False)
        vary("no normalization", normalize="none")
        vary("token axis only", normalize="token")
        for n in (2, 4, 8, 16):
            vary(f"iterations {n}", iterations=n)
        vary("min/max rounding", search="minmax", rounds=0)
        vary("from min/max", search="minmax")
        vary("best of 3 ranges, rounds 2", search="three", rounds=2)
        vary("best of 13 ranges, rounds 0", search="thirteen", rounds=0)
        for n in (1, 2, 3, 6):
            vary(f"rounds {n}", rounds=n)
        vary("rounds without weights", weighted=False)
        vary("least squares throughout", token="least", channel="least")
        vary("channels by least squares", channel="least")
        vary("key channels by spread", channel="spread", sides="k")
        vary("value channels by least squares", channel="least", sides="v")
        vary("no token refit", token="none")
        vary("keys by least squares", token="least", sides="k")
        vary("keys by length", token="length", sides="k")
        vary("values by least squares", token="least", sides="v")
        vary("values unbiased", token="unbiased", sides="v")
        vary("values per token", axis="token", sides="v")
        for G in (32, 64, 256):
            vary(f"G {G}", G=G)
        vary("scales of 8 bits", meta="e8")
        vary("centre stored", centre=True)
    return table


def bits_per_value(run, D) -> float:
    return (run["keys"].bits_per_value(D) + run["values"].bits_per_value(D))/2


# --- data: tokens [B, T], what is judged [B, T] (a prediction of the next token), and whether wrong tokens are counted ---

def padded(sequences, judged, fill):
    T = -(-max(map(len, sequences))//(2*BLOCK))*2*BLOCK
    tokens, mask = np.full((len(sequences), T), fill, np.int32), np.zeros((len(sequences), T), bool)
    for i, (s, first) in enumerate(zip(sequences, judged)):
        tokens[i, :len(s)] = s
        mask[i, first - 1:len(s) - 1] = True
    return tokens, mask


def tasks_data(seed, n):
    bos, eos, sequences, judged = 256, 257, [], []
    for family in tasks.FAMILIES:
        for p in tasks.problems(family, n, seed=1000 + seed, smallest=1000, largest=3000):
            sequences.append([bos, *p.prompt.encode(), *p.answer.encode(), eos])
            judged.append(1 + len(p.prompt.encode()))
    return padded(sequences, judged, eos)


def text_data(seed, n, texts, size):
    """n windows of each text; a token is a byte + 4, after the three control tokens and one unused (the tokens of the model)."""
    rng, rows = np.random.default_rng(seed), []
    for text in texts:
        data = np.frombuffer(Path(text).read_bytes(), np.uint8)
        for start in rng.integers(0, len(data) - size, n):
            rows.append([1, *(data[start:start + size - 1].astype(np.int32) + 3)])
    return padded(rows, [256]*len(rows), 2)


def outliers_data(seed, n, size):
    rng = np.random.default_rng(seed)
    rows = [[1, *rng.integers(3, 259, size - 1)] for _ in range(n)]
    return padded(rows, [256]*n, 2)


# --- figures ---

def log_softmax(a):
    a = a - a.max(-1, keepdims=True)
    return a - xp.log(xp.exp(a).sum(-1, keepdims=True))


def judge(exact, other, tokens, mask) -> dict:
    at = xp.asarray(mask)
    a, b = log_softmax(exact[at]), log_softmax(other[at])
    kld = (xp.exp(a)*(a - b)).sum(-1)
    following = xp.asarray(np.roll(tokens, -1, 1))[at]
    pick = xp.arange(len(following)), following
    wrong = xp.zeros(mask.shape, bool)
    wrong[at] = b.argmax(-1) != following
    return {
        "tokens": int(mask.sum()), "kld_mean": float(kld.mean()), "kld_median": float(xp.median(kld)),
        "kld_999": float(xp.percentile(kld, 99.9)), "same_top": float((a.argmax(-1) == b.argmax(-1)).mean()),
        "dnll": float((a[pick] - b[pick]).mean()), "wrong_tokens": int(wrong.sum()), "sequences": len(tokens),
        "exact": int((~wrong.any(1)).sum()),
    }


def quarter(drift, which):
    """Mean of the first (0) or last (3) quarter of the blocks."""
    n = len(drift)
    return float(drift[which*n//4:(which + 1)*n//4].mean()) if n >= 4 else float(drift.mean())


def load(name, args):
    """The model and its data for one seed: (Blockwise, function of the seed)."""
    if name == "tasks":
        return Blockwise(ROOT/"python/kvarn/embedded/kvarn-tasks.gguf"), lambda seed: tasks_data(seed, args.n)
    if name == "text":
        return Blockwise(args.text_model), lambda seed: text_data(seed, args.n, args.texts, args.size)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder)/"outliers.gguf"
        tiny_model.write(path, n_layer=4, n_head=8, n_embd=256, n_ff=512, gain=0.8, loud=8.0, loud_tokens=3)
        return Blockwise(path), lambda seed: outliers_data(seed, args.n, args.size)


def study(name, args, chosen, write):
    """All recipes on one model; the sequences of all seeds go through it together."""
    model, data = load(name, args)
    parts = [data(seed) for seed in range(1, args.seeds + 1)]
    T = max(tokens.shape[1] for tokens, _ in parts)
    tokens, mask = (np.concatenate([np.pad(part[i], ((0, 0), (0, T - part[i].shape[1]))) for part in parts]) for i in (0, 1))
    rows = len(parts[0][0])
    probe = [seed*rows + i for seed in range(args.seeds) for i in range(0, rows, max(1, rows//PROBED))][:PROBED*args.seeds]
    exact = model.run(tokens, probe=probe)
    for number, (recipe, run) in enumerate({"f16": dict(keys=EXACT, values=EXACT), **chosen}.items()):
        began = time.monotonic()
        outcome = model.run(tokens, **run, like=exact, probe=probe)
        drift = xp.stack(outcome.drift)
        results = []
        for seed in range(args.seeds):
            part = slice(seed*rows, (seed + 1)*rows)
            row = {"model": name, "recipe": recipe, "seed": seed + 1, "bpv": round(bits_per_value(run, model.D), 4)}
            row.update(judge(exact.logits[part], outcome.logits[part], tokens[part], mask[part]))
            row.update({f"{side}_error": e[0]/e[1] if e[1] else 0.0 for side, e in outcome.error.items()})
            own = drift[:, seed*len(probe)//args.seeds:(seed + 1)*len(probe)//args.seeds]
            row.update(drift_quarter1=quarter(own, 0), drift_quarter4=quarter(own, 3))
            results.append(row)
            write({k: f"{v:.6g}" if isinstance(v, float) else v for k, v in row.items()})
        print(f"{name} {number}/{len(chosen)} {recipe:34s} {time.monotonic() - began:5.1f} s   KLD "
              + " ".join(f"{r['kld_mean']:.5f}" for r in results)
              + "   wrong " + " ".join(str(r["wrong_tokens"]) for r in results) + f" of {results[0]['tokens']}", flush=True)


def main():
    ap = argparse.ArgumentParser(description=__doc__.partition("\n")[0], formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("--out", default="ablation.csv")
    ap.add_argument("--models", nargs="+", choices=("tasks", "text", "outliers"), default=["tasks", "text", "outliers"])
    ap.add_argument("--text-model", help="llama-architecture GGUF with one token per byte")
    ap.add_argument("--texts", nargs="+", default=[], help="text files for it")
    ap.add_argument("--seeds", type=int, default=3)
    ap.add_argument("--n", type=int, default=8, help="problems a family, windows a text")
    ap.add_argument("--size", type=int, default=2048, help="tokens of a window of text")
    ap.add_argument("--only", nargs="+", help="recipes, by name")
    ap.add_argument("--vary", nargs="*", default=["kvarn2", "kvarn3"], choices=("kvarn2", "kvarn3"),
                    help="whose parts are varied")
    ap.add_argument("--list", action="store_true", help="print the recipes and stop")
    args = ap.parse_args()
    chosen = {name: run for name, run in recipes(args.vary).items() if not args.only or name in args.only}
    if args.list:
        print("\n".join(chosen))
        return
    if "text" in args.models and not (args.text_model and args.texts):
        ap.error("the text model needs --text-model FILE and --texts FILE ..; or leave it out with --models")
    with open(args.out, "w", newline="") as file:
        rows = csv.DictWriter(file, FIELDS)
        rows.writeheader()

        def write(row):
            rows.writerow(row)
            file.flush()

        for name in args.models:
            study(name, args, chosen, write)


if __name__ == "__main__":
    main()
