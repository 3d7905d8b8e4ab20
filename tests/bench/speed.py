"""speed.py - what the results of all benchmarks of speed say: tables and figures of the documents.

SPDX-License-Identifier: MIT
"""

import csv
import sys
from pathlib import Path

import marked
import quality

ROOT = Path(__file__).resolve().parents[2]
sys.path.append(str(ROOT/"python"))

from kvarn import cache_size  # noqa: E402

CPU = ROOT/"tests/bench/results"
CUDA = ROOT/"cuda/bench/results"
KERNELS = ("kernels-zen3-avx2.csv", "kernels-xeon-avx512.csv")
RUNS = ("9",)               # of h200-llama.csv: kernels as they are
CACHES = ("f16", "q8_0", "q4_0", "kvarn4/kvarn2", "kvarn2")
CPU_DEEP, CUDA_DEEP = 16384, 131072   # of the table on the first screen

# colours that differ for everyone (Okabe and Ito), and a mark for each
LOOK = {"f16": ("#000000", "o"), "q8_0": ("#0072B2", "s"), "q4_0": ("#009E73", "^"), "kvarn4/kvarn2": ("#D55E00", "D"),
        "kvarn2": ("#E69F00", "v"), "kvarn": ("#D55E00", "D"), "paper": ("#CC79A7", "P")}
PLACES = {"kvarn4/2": (-7, -2), "kvarn3": (-7, -12), "q8_0": (-7, -3), "paper4": (-7, -9)}    # of labels, where others are close


# --- what was measured ---


def read(path) -> "list[dict]":
    """Rows of a CSV whose first lines are comments; numbers as numbers, empty cells left out."""
    with open(path, newline="", encoding="utf-8") as file:
        rows = csv.DictReader(line for line in file if not line.startswith("#"))
        return [{name: number(text) for name, text in row.items() if text} for row in rows]


def number(text: str) -> "float | str":
    try:
        return float(text)
    except ValueError:
        return text


def decoding(*names: str, threads: int = 2) -> "dict[tuple[str, int], dict]":
    """(cache, depth) -> row of kvarn bench; where two files have the same, the first counts."""
    found: "dict[tuple[str, int], dict]" = {}
    for name in names:
        for row in read(CPU/name):
            if row["threads"] == threads:
                found.setdefault((row["cache"], int(row["depth"])), row)
    return found


def label(row: dict) -> str:
    return row["keys"] if row["keys"] == row["values"] else f"{row['keys']}/{row['values']}"


def cuda(model: str = "kv", test: str = "tg64") -> "dict[tuple[str, int], list[float]]":
    """(cache, depth) -> tok/s of each run of llama-bench on the H200."""
    found: "dict[tuple[str, int], list[float]]" = {}
    for row in read(CUDA/"h200-llama.csv"):
        if f"{row['run']:g}" in RUNS and (row["model"], row["test"]) == (model, test):
            found.setdefault((label(row), int(row["depth"])), []).append(row["tok_s"])
    return found


# --- tables ---


def speed(value: "float | None") -> str:
    return "" if value is None else f"{value:.0f}" if value >= 100 else f"{value:.1f}"


def times(value: "float | None", of: "float | None") -> str:
    return "" if value is None or not of else f"{value/of:.2f}x" if value < 10*of else f"{value/of:.1f}x"


def average(values: "list[float] | None") -> "float | None":
    return sum(values)/len(values) if values else None


def cache_gib(cache: str, n_tokens: int, n_layer: int = 32, heads: int = 8, D: int = 128) -> float:
    """What the tokens of a model take: rows or tiles, no tail."""
    total = 0.0
    for name in (cache.split("/")*2)[:2]:
        per_token = cache_size.tile_bytes(D, int(name[5:]))/cache_size.G if name.startswith("kvarn") \
            else D*cache_size.bits_of(name)/8
        total += per_token*heads*n_layer*n_tokens
    return total/2**30


def first(data) -> str:
    """The table on README's first screen."""
    cpu, gpu = decoding("decode-zen3-2threads.csv"), cuda()
    recipes = {"kvarn4/kvarn2": "kvarn4/2", "KVarN as published, 2 bits": "paper2"}
    body = []
    for cache in (*CACHES, "KVarN as published, 2 bits"):
        tasks, text = (data[model, recipes.get(cache, cache)] for model in ("tasks", "text"))
        size = cache_gib("kvarn2" if "KVarN" in cache else cache, 131072)
        speeds = [speed(cpu.get((cache, CPU_DEEP), {}).get("decode_tok_s")), speed(average(gpu.get((cache, CUDA_DEEP))))]
        body.append([f"**{cache}**" if cache.startswith("kvarn") else cache, f"{tasks[0]['bpv']:g}", f"{size:.1f} GiB",
                     f"{quality.mean(text, 'kld_mean'):.6f}" if cache != "f16" else "0",
                     quality.total(tasks, "wrong_tokens"), *speeds])
    wrong = f"wrong tokens of {quality.total(data['tasks', 'f16'], 'tokens')}"
    return quality.table(["keys/values", "bits per value", "128k tokens, 8B model", "KLD to f16, text", wrong,
                          "tok/s, CPU, 16k deep", "tok/s, H200, 128k deep"], body)


def cpu_table(*names: str, threads: int, depths: "tuple[int, ...]", prompts: "tuple[int, ...]") -> str:
    """Decoding with its spread and its ratio to f16; prompts beside it."""
    rows = decoding(*names, threads=threads)
    caches = list(dict.fromkeys(cache for cache, _ in rows))
    asked = {(row["cache"], row["depth"]): row["prefill_tok_s"] for name in reversed(names) for row in read(CPU/name)
             if row["threads"] == threads and "prefill_tok_s" in row}
    body = []
    for cache in sorted(caches, key=lambda cache: (CACHES + (cache,)).index(cache)):
        line = [cache]
        for depth in depths:
            row, base = rows.get((cache, depth), {}), rows[("f16", depth)]
            ratio = times(row.get("decode_tok_s"), base["decode_tok_s"]) if cache != "f16" else ""
            line.append(f"{speed(row.get('decode_tok_s'))} {f'({ratio})' if ratio else ''}".strip())
        body.append(line + [speed(asked.get((cache, depth))) for depth in prompts])
    return quality.table(["keys/values", *(f"{depth}" for depth in depths), *(f"prompt at {depth}" for depth in prompts)], body)


def runs_at(depth: int, *names: str) -> str:
    """The same depth in several runs, two threads: how far a shared host moves figures and ratios."""
    runs = [decoding(name) for name in names]
    body = []
    for cache in ("f16", "q4_0", "kvarn4/kvarn2", "kvarn2"):
        line = [cache]
        for rows in runs:
            value, base = rows[cache, depth]["decode_tok_s"], rows["f16", depth]["decode_tok_s"]
            line.append(speed(value) + ("" if cache == "f16" else f" ({times(value, base)})"))
        body.append(line)
    return quality.table([f"keys/values, depth {depth}", *(f"run {i}" for i in range(1, len(runs) + 1))], body)


def spread(*names: str) -> str:
    """How far turns lie from their median, most of all rows, by depth."""
    def most(rows) -> str:
        off = [max(row["decode_max"]/row["decode_tok_s"] - 1, 1 - row["decode_min"]/row["decode_tok_s"]) for row in rows]
        return f"{100*max(off):.0f} %"

    rows = [row for name in names for row in read(CPU/name)]
    deep, flat = ([row for row in rows if bool(row["depth"]) is is_deep] for is_deep in (True, False))
    return f"Turns lie within {most(deep)} of their median" + (f", {most(flat)} at depth 0." if flat else ".")


def kernels(name: str) -> str:
    """Attention over one pair of tiles for four query heads, tiles from memory, and the share of both bounds."""
    body = []
    for row in read(CPU/name):
        if row["op"] == "attend" and row.get("heads") == 4 and row["where"] == "cold":
            bits = f"kvarn{row['bits_k']:.0f}/kvarn{row['bits_v']:.0f}"
            body.append([row["set"], bits, f"{row['best_ns']:.0f}", f"{row['gcodes']:.1f}", f"{100*row['stream']:.0f} %",
                         f"{100*row['multiply']:.0f} %", f"{100*row['error']:.2f} %"])
    return quality.table(["kernels", "keys/values", "ns, best", "G codes/s", "of the bandwidth", "of the multiplies",
                          "error, rms"], body)


def cuda_table(depths: "tuple[int, ...]" = (0, 4096, 32768, 131072)) -> str:
    rows = cuda()
    body = []
    for cache in CACHES:
        line = [cache]
        for depth in depths:
            values, base = rows.get((cache, depth)), average(rows[("f16", depth)])
            text = ", ".join(f"{value:.0f}" for value in values or ())
            line.append(f"{text} ({times(average(values), base)})" if values and cache != "f16" else text)
        body.append(line)
    return quality.table(["keys/values", *(f"depth {depth}" for depth in depths)], body)


def attention(tokens: int = 131072) -> str:
    """Share of the copy bandwidth that ATTN + REDUCE reach on the H200."""
    wanted = (tokens, 1, 1, "behind")
    rows = {(f"kvarn{row['bits_k']:.0f}/kvarn{row['bits_v']:.0f}", row["D"], row["heads"], row["gqa"]): row
            for row in read(CUDA/"h200.csv")
            if (row["tokens"], row["streams"], row["rows"], row["launch"]) == wanted and row["bits_k"] and row["bits_v"]}
    body = []
    for cache in dict.fromkeys(key[0] for key in rows):
        line = [cache]
        for D, heads, gqa in ((128, 8, 4), (128, 8, 8), (64, 8, 4), (256, 4, 4)):
            row = rows.get((cache, D, heads, gqa))
            line.append(f"{row['us']:.1f} us, {row['% of copy']:.0f} %" if row else "")
        body.append(line)
    return quality.table(["keys/values", "heads of 128, GQA 4", "GQA 8", "heads of 64, GQA 4", "heads of 256, GQA 4"], body)


def soak() -> str:
    rows = read(CPU/"soak-30min.csv")
    total = {name: sum(row[name] for row in rows) for name in ("answers_checked", "wrong_or_failed", "tokens")}
    growth = max(row["growth_after_first_third_mib"] for row in rows)
    return (f"{len(rows)} setups, {total['tokens']:.0f} tokens, {total['answers_checked']:.0f} answers checked byte by byte, "
            f"{total['wrong_or_failed']:.0f} wrong; memory grew by {growth:.1f} MiB at most.")


def texts() -> "dict[str, str]":
    idle = ("decode-zen3-2threads.csv", "decode-zen3-deep.csv")
    two = cpu_table(*idle, threads=2, depths=(0, 512, 4096, 16384, 65536), prompts=(0, 4096, 16384))
    return {
        "first": first(quality.load()),
        "cpu_two": f"{two}\n\n{spread(idle[0])}",
        "cpu_one": cpu_table("decode-zen3-1thread.csv", "decode-zen3-deep.csv", threads=1, depths=(0, 4096, 16384, 65536),
                             prompts=(16384,)),
        "cpu_again": runs_at(16384, "decode-zen3-2threads-earlier.csv", "decode-zen3-deep.csv", "decode-zen3-2threads-16384.csv",
                             idle[0]),
        "cpu_avx512_one": cpu_table("decode-xeon-avx512-1thread.csv", threads=1, depths=(0, 4096, 16384), prompts=()),
        "cpu_avx512": cpu_table("decode-xeon-avx512-2threads.csv", "decode-xeon-avx512.csv", threads=2, depths=(0, 4096, 16384),
                                prompts=(4096,)),
        "kernels_avx2": kernels(KERNELS[0]), "kernels_avx512": kernels(KERNELS[1]),
        "cuda": cuda_table(), "attention": attention(), "soak": soak(),
    }


# --- figures ---


def first_data(data=None) -> dict:
    """Points and lines of the figure on README's first screen."""
    data = data or quality.load()
    points = []
    for recipe in quality.HEAD:
        rows = data["text", recipe]
        values = [row["kld_mean"] for row in rows]
        points.append([recipe, data["tasks", recipe][0]["bpv"], quality.mean(rows, "kld_mean"), min(values), max(values)])
    cpu = decoding("decode-zen3-2threads.csv", "decode-zen3-deep.csv")
    lines = {"CPU": {}, "H200": {}}
    for cache in CACHES:
        lines["CPU"][cache] = sorted([depth, row["decode_tok_s"]] for (name, depth), row in cpu.items() if name == cache)
        lines["H200"][cache] = sorted([depth, average(values)] for (name, depth), values in cuda().items() if name == cache)
    return {"points": points, "lines": lines}


def plot_first(path, drawn) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9.6, 4.3), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(1, 1.12))
    names = {"paper": "as published ", "kvarn": "kvarn", "q": "q"}
    for recipe, bits, middle, low, high in drawn["points"]:
        kind = next(kind for kind in names if recipe.startswith(kind))
        color, mark = LOOK[recipe if kind == "q" else kind]
        left.errorbar(bits, middle, [[middle - low], [high - middle]], fmt=mark, color=color, ms=5.5)
        ours = kind == "kvarn"
        text = recipe.replace("paper", "") if kind == "paper" else recipe
        offset = PLACES.get(recipe, (-6, -4) if ours else (7, 1))
        left.annotate(text, (bits, middle), xytext=offset, textcoords="offset points", ha="right" if offset[0] < 0 else "left",
                      fontsize=9.5, color=color, fontweight="bold" if ours else "normal")
    left.annotate("KVarN as published", (2.375, drawn["points"][-1][2]), xytext=(22, 1), textcoords="offset points",
                  fontsize=9.5, color=LOOK["paper"][0])
    left.set_xscale("log", base=2)
    left.set_xlim(1.75, 9.6)
    left.set_xticks((2, 3, 4, 6, 8), ("2", "3", "4", "6", "8"))
    left.set_yscale("log")
    left.set_title("how far from f16 (text, no tail)", fontsize=11)
    left.set_xlabel("bits per value")
    left.set_ylabel("mean KL divergence, nats")

    def place(depth):               # depth 0 has a place on a logarithmic axis, two steps before 512
        return depth or 128

    for where, style in (("H200", "-"), ("CPU", "--")):
        for cache, line in drawn["lines"][where].items():
            color, mark = LOOK[cache]
            right.plot([place(depth) for depth, _ in line], [value for _, value in line], style, color=color, marker=mark, ms=4.5)
    ends = [(where, cache, *line[-1]) for where, lines in drawn["lines"].items() for cache, line in lines.items()]
    shift = {("H200", "q8_0"): 4, ("H200", "q4_0"): -5, ("H200", "kvarn4/kvarn2"): -5, ("H200", "kvarn2"): 5,
             ("CPU", "kvarn4/kvarn2"): -5, ("CPU", "kvarn2"): 5, ("CPU", "f16"): -5, ("CPU", "q4_0"): 5}
    for where, cache, depth, value in ends:
        right.annotate(cache, (place(depth), value), xytext=(7, shift.get((where, cache), 0)), textcoords="offset points",
                       va="center", fontsize=9.5, color=LOOK[cache][0], fontweight="bold" if "kvarn" in cache else "normal")
    right.set_xscale("log", base=2)
    right.set_xlim(100, 2000000)
    right.set_ylim(1, 9000)
    right.set_xticks((128, 512, 4096, 16384, 32768, 65536, 131072), ("0", "512", "4k", "16k", "", "64k", "128k"))
    for tick, side in zip(right.get_xticklabels()[-2:], ("right", "left")):
        tick.set_ha(side)
    right.set_yscale("log")
    right.annotate("one H200 (solid)", (128, 5900), fontsize=9.5, va="bottom")
    right.annotate("two Zen 3\ncores (dashed)", (128, 90), fontsize=9.5, va="top")
    right.set_title("decoding with a long context", fontsize=11)
    right.set_xlabel("tokens in the cache")
    right.set_ylabel("tokens per second")
    for axes in (left, right):
        axes.grid(alpha=0.25, which="major")
        axes.minorticks_off()
    marked.save(figure, path, marked.mark_of(drawn))


def draw(folder: Path) -> None:
    plot_first(folder/"first.png", first_data())


def marks() -> "dict[str, str]":
    return {"first.png": marked.mark_of(first_data())}
