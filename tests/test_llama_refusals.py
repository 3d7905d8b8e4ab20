"""test_llama_refusals.py - what cannot work is refused with one line that says what; the context goes on as before.

SPDX-License-Identifier: MIT
"""

import random
from typing import NamedTuple

import pytest

session = pytest.importorskip("llama_session", exc_type=ImportError)
state_hash = pytest.importorskip("kvarn.depth", exc_type=ImportError).state_hash

pytestmark = pytest.mark.llama

KVARN = ("kvarn4", "kvarn2")
N_TOKENS = 300      # two sealed tiles and an open one
WRONG = 1e-7        # NMSE: other chunks of tiles round p against other maxima, 6e-9; a wrong row in 700 makes 1e-3


@pytest.fixture(autouse=True)
def real_tiles(monkeypatch):
    for name in ("KVARN_TEST_EXACT", "KVARN_STRICT", "LLAMA_ATTN_ROT_DISABLE"):
        monkeypatch.delenv(name, raising=False)


def tokens(n: int, seed: int = 1) -> "list[int]":
    rng = random.Random(seed)
    return [rng.randrange(3, 120) for _ in range(n)]


def refusal(path: str, keys: str, values: str, **settings) -> str:
    """The one error line of a context that is not created."""
    with pytest.raises(session.Refused) as refused:
        session.Context(path, keys, values, **settings)
    assert len(refused.value.errors) == 1, refused.value.errors
    with session.Context(path, "f16", "f16", flash=settings.get("flash", True)) as context:
        context.feed(tokens(10))   # the process goes on, and so does the model
    return refused.value.errors[0]


# -------------------------------------------------------------------------------------------------- creating a context


def test_flash_attention_off_with_kvarn_keys(tiny):
    for values in ("f16", "kvarn2"):
        line = refusal(tiny(), "kvarn4", values, flash=False)
        assert "flash" in line


def test_flash_attention_off_with_kvarn_values(tiny):
    assert "requires flash_attn" in refusal(tiny(), "f16", "kvarn2", flash=False)


@pytest.mark.parametrize("keys, values", [("kvarn2", "f16"), ("f16", "kvarn2"), ("kvarn4", "kvarn2")])
def test_flash_attention_left_to_the_library_works(tiny, keys, values):
    with session.Context(tiny(), keys, values, flash=None) as context:
        context.greedy(tokens(N_TOKENS), 3)


@pytest.mark.parametrize("head_dim", [24, 40, 528])
def test_unsupported_head_size(tiny, head_dim):
    path = tiny(head_dim=head_dim)
    for keys, values in (KVARN, ("kvarn2", "f16"), ("f16", "kvarn2")):
        line = refusal(path, keys, values)
        assert str(head_dim) in line and ("block size 16 does not divide" in line or "is not a multiple of 16 up to 512" in line)


@pytest.mark.parametrize("head_dim", [64, 80, 96, 112, 128, 192, 256, 512])
def test_supported_head_sizes(tiny, head_dim):
    with session.Context(tiny(head_dim=head_dim), "kvarn4", "kvarn4") as context, session.Context(tiny(head_dim=head_dim)) as f16:
        prompt = tokens(N_TOKENS)
        context.feed(prompt)
        f16.feed(prompt)
        assert session.nmse(f16.feed([5], N_TOKENS), context.feed([5], N_TOKENS)) < 0.5


def test_model_that_compresses_keys_and_values(generated):
    assert "(MLA); use cache type f16 or q8_0" in refusal(generated("deepseek2"), "kvarn2", "kvarn2")
    assert "different K (kvarn2) and V (f16) cache types" in refusal(generated("deepseek2"), "kvarn2", "f16")


def test_models_with_sparse_attention(generated):
    for arch in ("minimax-m3", "qwen4exp"):
        assert "reads its cache row by row; use cache type f16 or q8_0" in refusal(generated(arch), "kvarn2", "kvarn2")


def test_rotation_cannot_be_switched_off(tiny, monkeypatch):
    """LLAMA_ATTN_ROT_DISABLE is for upstream's types; tiles are made of rotated values, whatever it says."""
    logits = []
    for value in ("0", "1"):
        monkeypatch.setenv("LLAMA_ATTN_ROT_DISABLE", value)
        with session.Context(tiny(), "kvarn4", "kvarn4") as context:
            context.feed(tokens(N_TOKENS))
            logits.append(context.feed([5], N_TOKENS))
    assert (logits[0] == logits[1]).all()


# --------------------------------------------------------------------------------------------------- a context in use


class Live:
    """A context with a sequence 0 whose next logits are known."""

    def __init__(self, path: str, keys: str = KVARN[0], values: str = KVARN[1], **settings):
        self.context = session.Context(path, keys, values, n_seq=2, **settings)
        self.context.feed(tokens(N_TOKENS))
        self.wanted = self.probe()

    def __enter__(self) -> "Live":
        return self

    def __exit__(self, *details) -> None:
        self.context.__exit__()

    def probe(self):
        logits = self.context.feed([5], N_TOKENS)
        self.context.remove(0, N_TOKENS)
        return logits

    def check(self) -> None:
        assert session.nmse(self.wanted, self.probe()) < WRONG

    def restart(self) -> None:
        self.context.clear()
        self.context.feed(tokens(N_TOKENS))
        self.check()


def test_more_tokens_than_the_context_holds(tiny):
    with Live(tiny(), n_ctx=512) as live:
        for _ in range(3):
            rows = [(5, N_TOKENS + i, 0) for i in range(512 - N_TOKENS + 1)]
            assert live.context.try_decode(rows) == 1
            live.check()
        rows.pop()
        live.context.decode(rows)   # exactly n_ctx tokens fit
        assert live.context.try_decode([(5, 512, 0)]) == 1
        live.context.remove(0, N_TOKENS)
        live.check()


def test_state_cut_short(tiny):
    with Live(tiny()) as live:
        for sequence in (1, None):
            state = live.context.save(0 if sequence == 1 else None)
            assert live.context.load(state, sequence) == []
            live.check()
            places = [*range(0, 400, 7), *range(400, len(state), len(state)//40), len(state) - 1]
            for n in places:
                errors = live.context.load(state[:n], sequence)
                assert len(errors) == 1, f"{n} of {len(state)} bytes: {errors}"
                if sequence is None:
                    live.restart()
                else:
                    live.check()
            assert live.context.load(state, sequence) == []
            live.check()


@pytest.mark.parametrize("arch", ["gemma3", "qwen35"])
def test_state_cut_short_of_models_with_two_memories(generated, arch):
    with session.Context(generated(arch), *KVARN, n_seq=2) as context:
        wanted = context.feed(tokens(N_TOKENS))
        for sequence in (0, None):
            state = context.save(sequence)
            for n in range(20, len(state), len(state)//15):
                assert len(context.load(state[:n], sequence)) == 1
                context.clear()
            assert context.load(state, sequence) == []
            context.clear()
            assert session.nmse(wanted, context.feed(tokens(N_TOKENS))) < WRONG


class Layout(NamedTuple):
    """Where a state describes its data: magic, text, number of streams, then the record (size, hash, bytes) of its stream."""

    start: int
    record: int
    stop: int

    @classmethod
    def of(cls, state: bytes) -> "Layout":
        start = state.index(b"KVRN")
        record = start + 12 + int.from_bytes(state[start + 4:start + 8], "little")
        return cls(start, record, record + 16 + int.from_bytes(state[record:record + 8], "little"))

    def with_hash(self, state: bytes) -> bytes:
        """The state with the hash that fits its record, whatever that says."""
        value = state_hash([state[self.record + 16:self.stop]])
        return state[:self.record + 8] + value.to_bytes(8, "little") + state[self.record + 16:]


@pytest.mark.parametrize("sequence", [1, None], ids=["sequence", "everything"])
def test_state_with_flipped_bits(tiny, sequence):
    """Every bit counts, of what describes the data and of the data: its damage is refused, and the context goes on."""
    with Live(tiny()) as live:
        state = live.context.save(0 if sequence == 1 else None)
        rng, layout = random.Random(3), Layout.of(state)
        places = range(layout.start, len(state))
        for place in [*places[:300], *rng.sample(places[:layout.stop], 100), *rng.sample(places, 100), places[-1]]:
            damaged = bytearray(state)
            damaged[place] ^= 1 << rng.randrange(8)
            errors = live.context.load(bytes(damaged), sequence)
            assert len(errors) == 1, f"byte {place} of {places}: {errors}"
            if place % 10 == 0:
                live.restart() if sequence is None else live.check()
        for place in range(places.start):   # upstream's own: refused or not
            damaged = bytearray(state)
            damaged[place] ^= 0x80
            assert len(live.context.load(bytes(damaged), sequence)) <= 1
        assert live.context.load(state, sequence) == []
        live.check()


@pytest.mark.parametrize("word", [b"\0\0\0\0", b"\x7f\xff\xff\xff", b"\xff\xff\xff\x7f", b"\0\0\0\x80", b"\xff\xff\xff\xff"])
def test_state_with_extreme_words(tiny, word):
    """Sizes and numbers far out of range take no memory and end nothing, even where the hash fits."""
    with Live(tiny()) as live:
        state = live.context.save(0)
        layout = Layout.of(state)
        assert layout.with_hash(state) == state
        for place in range(layout.start, layout.record + 600, 4):
            damaged = state[:place] + word + state[place + 4:]
            if place >= layout.record + 16:
                damaged = layout.with_hash(damaged)
            assert len(live.context.load(damaged, 1)) <= 1
            live.context.remove(1)
        live.check()


def test_foreign_states(tiny):
    """Of another type, another model, another number of streams, a longer context."""
    with Live(tiny()) as live:
        def refused(text: str, *source, path: str = tiny(), n: int = N_TOKENS, **settings) -> None:
            with session.Context(path, *source, n_seq=2, **settings) as other:
                other.feed(tokens(n))
                states = [(other.save(0), 1), (other.save(), None)]
            for state, sequence in states:
                errors = live.context.load(state, sequence)
                assert len(errors) == 1 and text in errors[0], errors
                if sequence == 1:
                    live.check()
            live.restart()

        refused("it was not saved from a kvarn cache", "f16", "f16")
        refused("it was not saved from a kvarn cache", "q8_0", "q8_0")
        refused("it was saved as [", "kvarn2", "kvarn4")
        refused("it was saved as [", "kvarn4", "f16")
        refused("it was saved as [", *KVARN, path=tiny(head_dim=64))
        refused("it was saved as [", *KVARN, path=tiny(n_layer=3))
        refused("", *KVARN, path=tiny("qwen3", n_layer=3))
        refused("use a larger n_ctx", *KVARN, n=1500, n_ctx=2048)

        with session.Context(tiny(), *KVARN, n_ctx=2048, n_seq=2, unified=False) as streams:
            streams.feed(tokens(N_TOKENS))
            errors = live.context.load(streams.save())
            assert len(errors) == 1 and "it holds 2 streams, this cache has 1" in errors[0], errors
        live.restart()

        with session.Context(tiny(), "f16", "f16", n_seq=2) as f16:
            wanted = f16.feed(tokens(N_TOKENS))
            assert len(f16.load(live.context.save(0), 1)) >= 1
            assert len(f16.load(live.context.save())) >= 1
            f16.clear()
            assert session.nmse(wanted, f16.feed(tokens(N_TOKENS))) < WRONG
