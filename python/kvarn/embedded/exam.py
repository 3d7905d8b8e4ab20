"""exam.py - how many fresh problems does the embedded model answer without one wrong byte, with a given KV cache?

    python -m kvarn.embedded.exam                                   # f16, 40 problems of each family
    python -m kvarn.embedded.exam --kv kvarn4/kvarn2 --n 10 --families hop bank

Greedy decoding, one problem per context, one thread per process. The f16 run takes about an hour of one core.

SPDX-License-Identifier: MIT
"""
import argparse
import multiprocessing as mp
import os
import time
from typing import NamedTuple

from kvarn.progress import Bar

from . import Problem, Score, check, families, path, problems

STATE: dict = {}  # the Llama of this worker process


class Outcome(NamedTuple):
    family: str
    answer_size: int
    score: Score


def start_worker(kv: str) -> None:
    from kvarn import Llama

    STATE["llama"] = Llama(str(path()), kv_type=kv, n_ctx=8192, n_threads=1, n_threads_batch=1, flash_attn=True, verbose=False)


def answer(problem: Problem) -> Outcome:
    """Decode greedily until the model stops, or has written a little more than the right answer holds."""
    llama = STATE["llama"]
    prompt = llama.tokenize(problem.prompt.encode(), special=False)
    llama.reset()
    written = []
    for token in llama.generate(prompt, temp=0.0, top_k=1):
        if token == llama.token_eos() or len(written) > len(problem.answer) + 50:
            break
        written.append(token)
    text = llama.detokenize(written).decode(errors="replace")
    return Outcome(problem.family, len(problem.answer), check(problem, text))


def table(outcomes: "list[Outcome]") -> str:
    lines = ["| family | exact | steps right | answer tokens |", "|---|---|---|---|"]
    for family in families:
        mine = [o for o in outcomes if o.family == family]
        if mine:
            right, total = (sum(getattr(o.score, field) for o in mine) for field in ("steps_right", "steps_total"))
            exact, sizes = sum(o.score.exact for o in mine), [o.answer_size for o in mine]
            lines.append(f"| {family} | {exact}/{len(mine)} | {right}/{total} | {min(sizes)} to {max(sizes)} |")
    return "\n".join(lines)


def main() -> None:
    ap = argparse.ArgumentParser(prog="python -m kvarn.embedded.exam", description="Exact answers of the embedded model.")
    ap.add_argument("--kv", default="f16", help="cache type, as in Llama(kv_type=...)")
    ap.add_argument("--n", type=int, default=40, help="problems per family")
    ap.add_argument("--seed", type=int, default=20)
    ap.add_argument("--families", nargs="+", choices=families, default=families)
    ap.add_argument("--smallest", type=int, default=300, help="bytes of the shortest answer")
    ap.add_argument("--largest", type=int, default=4000, help="bytes of the longest answer")
    ap.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    args = ap.parse_args()
    work = [p for f in args.families for p in problems(f, args.n, args.seed, args.smallest, args.largest)]
    outcomes, start, bar = [], time.monotonic(), Bar(f"exam {args.kv}")
    with mp.get_context("spawn").Pool(args.jobs, start_worker, (args.kv,)) as pool:
        for outcome in pool.imap_unordered(answer, work):
            outcomes.append(outcome)
            tokens, seconds = sum(o.answer_size for o in outcomes), time.monotonic() - start
            left = seconds * (len(work) - len(outcomes)) / len(outcomes)
            bar.show(len(outcomes) / len(work), f"{len(outcomes)}/{len(work)}  {tokens / seconds:.0f} tok/s  {left:.0f} s to go")
    bar.close(f"{len(outcomes)} problems in {time.monotonic() - start:.0f} s")
    print(table(outcomes))


if __name__ == "__main__":
    main()
