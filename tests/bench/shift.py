"""shift.py - what a context shift costs: keys are moved to other positions and, where they are codes, rounded once more.

    python tests/bench/shift.py MODEL.gguf TEXT [--csv FILE]

A text is read; then, seven times, what a chat does when its context is full: 256 tokens after the first 64 are dropped, the rest
moves up, and 256 more are read. Judged is the KLD to an f16 cache that goes through the same, over the tokens read since the
shift; beside it the same without moving (the gap stays in the positions, no key is touched). No tail: every type reads what it
rounded.

SPDX-License-Identifier: MIT
"""

import argparse
import csv
from pathlib import Path

import numpy as np

from kvarn.context import Context, Model, api
from kvarn.evaluation import BLOCK, log_probabilities

CACHES = "q8_0,q4_0,kvarn4,kvarn4/kvarn2,kvarn3,kvarn2"
COLUMNS = ["cache", "shifts", "kld_still", "kld_moved", "ratio"]
KEEP, DROP, READ, N_SHIFTS = 64, 256, 2048, 7


def mean_kld(exact: np.ndarray, other: np.ndarray) -> float:
    return (np.exp(exact)*(exact - other)).sum(1).mean()


def predictions(context: Context, tokens: "list[int]", is_moved: bool) -> "list[np.ndarray]":
    """Log-probabilities of the tokens that are read after each shift."""
    memory = api.llama_get_memory(context.handle)
    context.clear()
    for start in range(0, READ, BLOCK):
        context.decode(tokens[start:start + BLOCK], all_logits=False)
    start, first, results = READ, KEEP, []
    for _ in range(N_SHIFTS):
        assert api.llama_memory_seq_rm(memory, 0, first, first + DROP)
        if is_moved:
            api.llama_memory_seq_add(memory, 0, KEEP + DROP, -1, -DROP)
            context.n_tokens -= DROP
        else:
            first += DROP
        blocks = range(start, start + DROP, BLOCK)
        results.append(np.concatenate([log_probabilities(context.decode(tokens[i:i + BLOCK])) for i in blocks]))
        start += DROP
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("text", type=Path)
    parser.add_argument("--csv", type=Path, help="append the rows to this file")
    parser.add_argument("--caches", default=CACHES)
    parser.add_argument("--chunks", type=int, default=2)
    parser.add_argument("--threads", type=int, default=0)
    arguments = parser.parse_args()

    model = Model(arguments.model)
    need = READ + DROP*N_SHIFTS
    tokens = model.tokenize(arguments.text.read_bytes())
    chunks = [tokens[i*need:(i + 1)*need] for i in range(arguments.chunks)]
    assert len(chunks[-1]) == need, f"{arguments.text} has {len(tokens)} tokens, {arguments.chunks*need} are needed"

    f16 = Context(model, "f16", need, threads=arguments.threads)
    steps = [(chunk, is_moved) for is_moved in (False, True) for chunk in chunks]
    exact = [predictions(f16, *step) for step in steps]
    rows = []
    print("mean KLD to f16 without moving -> moved, after 1, 2, 4, 7 shifts")
    for cache in arguments.caches.split(","):
        context = Context(model, cache, need, threads=arguments.threads, strict=True)
        ours = [predictions(context, *step) for step in steps]
        kld = np.array([[mean_kld(*pair) for pair in zip(*both)] for both in zip(exact, ours)])
        kld = kld.reshape(2, len(chunks), N_SHIFTS).mean(1)
        context.close()
        rows += [[cache, n + 1, f"{kld[0, n]:.6f}", f"{kld[1, n]:.6f}", f"{kld[1, n]/kld[0, n]:.2f}"] for n in range(N_SHIFTS)]
        print(f"{cache:16}" + "".join(f"{kld[0, n - 1]:9.5f} -> {kld[1, n - 1]:.5f} x{kld[1, n - 1]/kld[0, n - 1]:4.2f}"
                                      for n in (1, 2, 4, 7)), flush=True)
    if arguments.csv:
        is_new = not arguments.csv.exists()
        with arguments.csv.open("a", newline="") as file:
            csv.writer(file).writerows([COLUMNS]*is_new + rows)


if __name__ == "__main__":
    main()
