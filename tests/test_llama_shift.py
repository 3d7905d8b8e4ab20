"""test_llama_shift.py - positions that change after the fact (context shift, self-extend), and sinks.

Moving every token of a sequence by the same distance changes nothing that attention sees, so the reference is a fresh f16 context
that is fed at the new positions; where only some move, an f16 cache that goes through the same steps.

SPDX-License-Identifier: MIT
"""

import random

import numpy as np
import pytest

session = pytest.importorskip("llama_session", exc_type=ImportError)

pytestmark = pytest.mark.llama

EXACT = 2e-4           # NMSE between f16 caches that sum in another order: 1e-7 to 7e-5
PAIRS = [("kvarn4", "kvarn4"), ("kvarn2", "f16"), ("f16", "kvarn2"), ("q8_0", "kvarn4")]


def lossless(name: str) -> str:
    return "f16" if name.startswith("kvarn") else name


@pytest.fixture
def exact(monkeypatch):
    monkeypatch.setenv("KVARN_TEST_EXACT", "1")
    monkeypatch.delenv("KVARN_SINK", raising=False)


def tokens(n: int, seed: int = 1) -> "list[int]":
    rng = random.Random(seed)
    return [rng.randrange(3, 259) for _ in range(n)]


# ------------------------------------------------------------------------------------------------------------- K-shift


@pytest.mark.parametrize("arch", ["llama", "qwen3", "gemma3"])  # NORMAL and NEOX order of channels; two caches
def test_moved_as_a_whole(tiny, exact, arch):
    path, text = tiny(arch, head_dim=64), tokens(700)
    settings = dict(swa_full=True) if arch == "gemma3" else {}
    with session.Context(path, **settings) as fresh:
        wanted = fresh.feed(text, 300)
    with session.Context(path, "kvarn4", "kvarn4", **settings) as context:
        assert context.can_shift()
        context.feed(text[:-1])
        context.add(0, 0, -1, 500)
        context.add(0, 0, -1, -200)                       # shifts add up until the next batch
        assert context.last_position() == 998
        assert session.nmse(wanted, context.feed(text[-1:], 999)) < EXACT


def test_a_part_of_the_channels(tiny, exact):
    """The first 32 of 64 channels turn, the others do not: as an f16 cache that is moved the same way."""
    path, text = tiny("mimo2", head_dim=64, rope_dim=32), tokens(500)
    logits = []
    for types in (("f16", "f16"), ("kvarn4", "kvarn4")):
        with session.Context(path, *types, swa_full=True) as context:
            context.feed(text[:-1])
            context.add(0, 120, -1, 100)
            logits.append(context.feed(text[-1:], 599))
    with session.Context(path, swa_full=True) as context:
        context.feed(text[:-1])
        assert session.nmse(logits[0], context.feed(text[-1:], 499)) > 10*EXACT   # the model does look at positions
    assert session.nmse(*logits) < EXACT


@pytest.mark.parametrize("arch", ["llama", "qwen3"])
def test_a_context_stretched_by_yarn(tiny, exact, arch):
    """YaRN scales what it turns, when a key is made, and not once more when it is moved (upstream's f16 cache does)."""
    path, text = tiny(arch, head_dim=64, yarn=4.0), tokens(500)
    with session.Context(path) as fresh:
        wanted = fresh.feed(text, 200)
    with session.Context(path, "kvarn4", "kvarn4") as context:
        context.feed(text[:-1])
        context.add(0, 0, -1, 200)
        assert session.nmse(wanted, context.feed(text[-1:], 699)) < EXACT


@pytest.mark.parametrize("keys, values", PAIRS)
@pytest.mark.parametrize("unified", [True, False], ids=["unified", "streams"])
def test_context_shift(tiny, exact, keys, values, unified):
    """What llama-server does when a slot is full, several times, with a second sequence in the cache."""
    path, text, other = tiny(head_dim=64), tokens(2000), tokens(300, seed=2)
    results = []
    for pair in ((lossless(keys), lossless(values)), (keys, values)):
        with session.Context(path, *pair, n_ctx=1024*(1 if unified else 2), n_seq=2, unified=unified) as context:
            logits, end = [context.feed(other, 0, 1)], 0
            for start in range(0, len(text), 250):
                if end + 250 > 650:                       # keep 40, drop half of the rest
                    drop = (end - 40)//2
                    context.remove(0, 40, 40 + drop)
                    context.add(0, 40 + drop, end, -drop)
                    end -= drop
                logits.append(context.feed(text[start:start + 250], end))
                end += 250
                assert context.last_position() == end - 1
            logits.append(context.feed([5], len(other), 1))
            results.append(np.stack(logits))
    worst = max(session.nmse(f16, ours) for f16, ours in zip(*results))
    assert worst < EXACT


@pytest.mark.parametrize("keys, values", PAIRS)
def test_self_extend(tiny, exact, keys, values):
    """Groups of positions divided, the rest moved up, as llama-completion's --grp-attn-n does."""
    path, text = tiny(head_dim=64), tokens(900)
    results = []
    for pair in ((lossless(keys), lossless(values)), (keys, values)):
        with session.Context(path, *pair) as context:
            logits, end, done = [], 0, 0
            for start in range(0, len(text), 100):
                while end >= done + 128:
                    context.add(0, done, end, 64)
                    context.divide(0, done + 64, done + 192, 2)
                    context.add(0, done + 192, end + 64, -64)
                    end, done = end - 32, done + 96
                logits.append(context.feed(text[start:start + 100], context.last_position() + 1))
                end = context.last_position() + 1
            results.append(np.stack(logits))
    assert max(session.nmse(f16, ours) for f16, ours in zip(*results)) < EXACT


@pytest.mark.parametrize("keys", ["f16", "kvarn4"])
def test_dividing_turns_the_way_adding_does(tiny, exact, keys):
    """Position 200 divided by two is position 200 moved by -100; upstream's sign was the other one."""
    logits = []
    for change in (lambda context: context.divide(0, 200, 201, 2), lambda context: context.add(0, 200, 201, -100)):
        with session.Context(tiny(head_dim=64), keys, "f16") as context:
            context.feed(tokens(300))
            change(context)
            logits.append(context.feed([5], 300))
    assert (logits[0] == logits[1]).all()


def test_neighbours_do_not_notice(tiny, monkeypatch):
    """Moving one sequence leaves every bit of another: only tiles and rows of moved tokens are touched."""
    monkeypatch.delenv("KVARN_TEST_EXACT", raising=False)
    logits = []
    for moved in (False, True):
        with session.Context(tiny(head_dim=64), "kvarn4", "kvarn2", n_seq=2) as context:
            for s in range(2):
                context.feed(tokens(400, seed=s), 0, s)
            if moved:
                context.remove(0, 10, 150)
                context.add(0, 150, -1, -140)
            logits.append(context.feed([5], 400, 1))
    assert (logits[0] == logits[1]).all()


@pytest.mark.parametrize("keys, limit", [("kvarn4", 2), ("kvarn3", 2), ("kvarn2", 2)])
def test_loss(tiny, monkeypatch, keys, limit):
    """Sealed keys are rounded once more per shift: the error against f16, over that of keys that were never moved."""
    monkeypatch.delenv("KVARN_TEST_EXACT", raising=False)
    path, errors = tiny(head_dim=64), []
    for seed in range(8):
        text = tokens(700, seed)
        with session.Context(path) as fresh:
            wanted = fresh.feed(text, 64)
        for n_shifts in (0, 1, 2, 4):
            with session.Context(path, keys, "f16") as context:
                context.feed(text[:-1], 64 if n_shifts == 0 else 0)
                for _ in range(n_shifts):
                    context.add(0, 0, -1, 64//n_shifts)
                    context.remove(0, context.last_position() + 1, -1)
                    context.feed([5], context.last_position() + 1)
                    context.remove(0, context.last_position(), -1)
                errors.append(session.nmse(wanted, context.feed(text[-1:], 64 + 699)))
    errors = np.array(errors).reshape(8, 4).mean(axis=0)
    print(f"{keys}: NMSE without a shift {errors[0]:.2e}, after 1, 2, 4 shifts {errors[1:]/errors[0]} times that")
    assert errors[1] < limit*errors[0]


def test_a_state_keeps_a_pending_shift(tiny, exact):
    path, text = tiny(head_dim=64), tokens(400)
    for sequence in (None, 0):
        logits = []
        for save in (False, True):
            with session.Context(path, "kvarn4", "kvarn4") as context:
                context.feed(text)
                context.remove(0, 20, 170)
                context.add(0, 170, -1, -150)
                if save:
                    state = context.save(sequence)
                    context.clear()
                    assert context.load(state, sequence) == []
                logits.append(context.feed([5], 250))
        assert session.nmse(*logits) < EXACT


def test_abort_cannot_stop_a_shift_half_way(tiny, exact):
    path, text = tiny(head_dim=64), tokens(700)
    with session.Context(path) as fresh:
        wanted = fresh.feed(text, 100)
    with session.Context(path, "kvarn4", "kvarn4") as context:
        context.feed(text[:-1])
        context.add(0, 0, -1, 100)
        assert context.try_decode_and_abort([(text[-1], 799, 0)], 3) == 2
        assert session.nmse(wanted, context.feed(text[-1:], 799)) < EXACT


def test_a_model_that_cannot_shift_says_so(generated):
    path = generated("qwen2vl")                           # M-RoPE: several positions per token
    with session.Context(path, "kvarn4", "kvarn4", n_ctx=512) as context:
        context.feed([5, 6, 7, 8])
        assert not context.can_shift()
        for change in (lambda: context.add(0, 1, -1, 10), lambda: context.divide(0, 1, -1, 2)):
            change()
            assert len(context.log) == 1 and "nothing was done" in context.log[0]
        assert context.last_position() == 3
        context.feed([5], 4)


# --------------------------------------------------------------------------------------------------------------- sinks


SINK_ERROR = 1e-4      # NMSE against f16 of a cache whose tokens are all exact: rotated rows round differently


@pytest.fixture
def sink(monkeypatch):
    monkeypatch.delenv("KVARN_TEST_EXACT", raising=False)
    monkeypatch.setenv("KVARN_SINK", "100")


@pytest.mark.parametrize("unified", [True, False], ids=["unified", "streams"])
def test_every_sequence_has_its_own_sink(tiny, sink, unified):
    """Prompts of 160 tokens: a sealed tile each, which is read exactly because it is a sink."""
    path, texts = tiny(head_dim=64), [tokens(160, seed) for seed in range(3)]
    with session.Context(path, "kvarn2", "kvarn2", n_ctx=3072, n_seq=3, unified=unified) as context:
        assert any("128 tokens of every sequence stay in the tail" in line for line in context.creation_log)
        for s, text in enumerate(texts):
            for start in (0, 128):
                context.feed(text[start:start + 128], start, s)
        context.feed(tokens(400, seed=5), 160, 2)         # takes the slots that are not sinks

        def check(s, where):
            with session.Context(path) as fresh:
                wanted = fresh.feed(texts[s] + [5])
            error = session.nmse(wanted, context.feed([5], 160, s))
            context.remove(s, 160, -1)
            assert error < SINK_ERROR, f"sequence {s} {where}"

        check(0, "at first")
        check(1, "at first")
        context.remove(1, 40, -1)                         # into the sink, which opens and is sealed again
        context.feed(texts[1][40:], 40, 1)
        check(1, "after a cut")
        state = context.save(1)
        context.remove(1)
        assert context.load(state, 1) == []
        check(1, "restored")
        context.remove(1)
        context.copy(0, 1)
        texts[1] = texts[0]
        check(1, "as a copy")


def test_without_a_sink_the_tile_is_rounded(tiny, monkeypatch):
    monkeypatch.delenv("KVARN_TEST_EXACT", raising=False)
    monkeypatch.delenv("KVARN_SINK", raising=False)
    path, text = tiny(head_dim=64), tokens(160)
    with session.Context(path) as fresh:
        wanted = fresh.feed(text + [5])
    with session.Context(path, "kvarn2", "kvarn2") as context:
        context.feed(text[:128])
        assert session.nmse(wanted, context.feed(text[128:] + [5], 128)) > 10*SINK_ERROR


@pytest.mark.parametrize("value", ["x", "-1", "12k"])
def test_a_sink_that_is_no_number_is_refused(tiny, monkeypatch, value):
    monkeypatch.setenv("KVARN_SINK", value)
    with pytest.raises(session.Refused, match=f"KVARN_SINK={value} is not a number of tokens"):
        session.Context(tiny(head_dim=64), "kvarn4", "kvarn4")
