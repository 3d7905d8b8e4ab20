"""test_determinism.py - what one sequence computes does not depend on what the others hold.

Tiles have one owner, so a neighbour's text never reaches the scales of somebody else's tile. With batches of the same shape the
logits are the same bits, whatever the others say; with other lengths beside it only the order of summation differs.

SPDX-License-Identifier: MIT
"""

import random

import numpy as np
import pytest

session = pytest.importorskip("llama_session", exc_type=ImportError)

pytestmark = pytest.mark.llama

N_PROMPT, N_STEPS = 290, 12       # two sealed tiles and a piece, with the prompt cut into ubatches anywhere
PAIRS = [("kvarn4", "kvarn2"), ("kvarn2", "kvarn2"), ("kvarn3", "f16"), ("q8_0", "kvarn2")]
OF_TYPE_ERROR = 1e-4              # of the error of the type itself; measured: below 1e-6


def texts(seed: str, n_seq: int, lengths) -> "list[list[int]]":
    rng = random.Random(seed)
    return [[rng.randrange(3, 259) for _ in range(n)] for n, _ in zip(lengths, range(n_seq))]


def decode_together(path, keys, values, prompts, watched: int, unified: bool, interleaved: bool = True, n_threads: int = 1,
                    n_ctx_seq: int = 512) -> np.ndarray:
    """Logits of the watched sequence: after the prompt and after each of N_STEPS tokens that follow in all sequences."""
    n_seq = len(prompts)
    steps = [texts(f"steps of {sum(prompt)}", 1, [N_STEPS])[0] for prompt in prompts]   # follow from the sequence's own text
    with session.Context(path, keys, values, n_ctx=n_ctx_seq*n_seq, n_batch=512, n_ubatch=128, n_seq=n_seq, unified=unified,
                         n_threads=n_threads) as context:
        logits = []
        if interleaved:
            rows = sorted(((token, i, s) for s, prompt in enumerate(prompts) for i, token in enumerate(prompt)),
                          key=lambda row: (row[1], row[2]))
            size = 480 // n_seq*n_seq
            for start in range(0, len(rows), size):
                context.decode(rows[start:start + size])
        else:
            for s, prompt in enumerate(prompts):
                context.feed(prompt, 0, s)
        for step in range(N_STEPS):
            rows = [(steps[s][step], len(prompts[s]) + step, s) for s in range(n_seq)]
            context.decode(rows, {watched})
            logits.append(context.logits(watched))
    return np.stack(logits)


def others_differ(n_seq: int, watched: int) -> "tuple[list[list[int]], list[list[int]]]":
    """Two sets of prompts of equal lengths that have only the watched one in common."""
    one, two = (texts(seed, n_seq, [N_PROMPT]*n_seq) for seed in "ab")
    two[watched] = one[watched]
    return one, two


@pytest.mark.parametrize("unified", [True, False], ids=["unified", "streams"])
@pytest.mark.parametrize("n_seq", [2, 8, 32])
@pytest.mark.parametrize("keys, values", PAIRS[:2])
def test_same_bits_whatever_the_others_say(tiny, monkeypatch, keys, values, n_seq, unified):
    monkeypatch.delenv("KVARN_TEST_EXACT", raising=False)
    for watched in {0, n_seq - 1}:
        one, two = (decode_together(tiny(head_dim=64), keys, values, prompts, watched, unified)
                    for prompts in others_differ(n_seq, watched))
        assert (one == two).all(), f"sequence {watched} of {n_seq}: NMSE {session.nmse(one, two):.1e}, must be 0"


@pytest.mark.parametrize("unified", [True, False], ids=["unified", "streams"])
@pytest.mark.parametrize("keys, values", PAIRS[2:])
def test_same_bits_beside_another_type(tiny, monkeypatch, keys, values, unified):
    monkeypatch.delenv("KVARN_TEST_EXACT", raising=False)
    one, two = (decode_together(tiny(head_dim=64), keys, values, prompts, 1, unified) for prompts in others_differ(3, 1))
    assert (one == two).all()


@pytest.mark.slow
def test_same_bits_with_several_threads(tiny, monkeypatch):
    monkeypatch.delenv("KVARN_TEST_EXACT", raising=False)
    one, two = (decode_together(tiny(head_dim=64), "kvarn4", "kvarn2", prompts, 1, True, n_threads=3)
                for prompts in others_differ(4, 1))
    assert (one == two).all()


@pytest.mark.parametrize("unified", [True, False], ids=["unified", "streams"])
@pytest.mark.parametrize("keys, values", PAIRS[:3])
def test_lengths_of_the_others_do_not_matter(tiny, monkeypatch, keys, values, unified):
    """Alone, beside short texts and beside longer ones: the same tiles, so that nothing but rounding differs."""
    monkeypatch.delenv("KVARN_TEST_EXACT", raising=False)
    path, own = tiny(head_dim=64), texts("own", 1, [N_PROMPT])[0]
    beside = [[], texts("c", 3, [5, 40, 127]), texts("d", 5, [300, 128, 256, 1, 129])]
    results = [decode_together(path, keys, values, [*others, own], len(others), unified, interleaved=False) for others in beside]
    exact = decode_together(path, "f16", "f16", [own], 0, unified, interleaved=False)
    type_error = session.nmse(exact, results[0])
    for others, logits in zip(beside[1:], results[1:]):
        error = session.nmse(results[0], logits)
        print(f"beside {len(others)} others: NMSE {error:.1e}, of the type {type_error:.1e}")
        assert error < OF_TYPE_ERROR*type_error, f"beside {len(others)} others: NMSE {error:.1e}, of the type {type_error:.1e}"
