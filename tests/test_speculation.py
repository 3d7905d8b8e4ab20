"""test_speculation.py - drafts that are rejected leave no trace, to the bit, and do not change the text.

The logits after a rollback are those of a context that never saw the drafts: within the tail, which is any number of tokens up to
a tile's, also when the drafts filled and sealed a tile. Then the server's own kinds of speculation on problems of known answer.

SPDX-License-Identifier: MIT
"""

import random

import numpy as np
import pytest

from llama_server import Server

session = pytest.importorskip("llama_session", exc_type=ImportError)

G = 128
PAIRS = [("kvarn4", "kvarn2"), ("kvarn2", "kvarn2"), ("kvarn3", "f16"), ("f16", "kvarn2")]


def draw(seed: str, n: int) -> "list[int]":
    rng = random.Random(seed)
    return [rng.randrange(3, 259) for _ in range(n)]


# ------------------------------------------------------------------------------------------------ one sequence or some


@pytest.mark.llama
@pytest.mark.parametrize("arch", ["llama", "gemma3"])
@pytest.mark.parametrize("keys, values", PAIRS)
def test_rejected_drafts_leave_no_trace(tiny, monkeypatch, keys, values, arch):
    """Drafts of 1 to 128 tokens, before, on and behind the border of a tile, removed again before the next token."""
    monkeypatch.delenv("KVARN_TEST_EXACT", raising=False)
    text = draw("text", 700)
    path = tiny(arch, 64, window=1024)
    with session.Context(path, keys, values, n_ctx=1024) as plain, session.Context(path, keys, values, n_ctx=1024) as drafting:
        at = 0
        for stop, n_draft in [(100, 1), (101, 27), (102, 128), (127, 1), (128, 1), (129, 127), (130, 128), (250, 5), (255, 16),
                              (256, 128), (300, 84), (384, 1), (400, 128), (511, 128), (640, 16), (641, 64)]:
            assert (plain.feed(text[at:stop], at) == drafting.feed(text[at:stop], at)).all(), f"before position {stop}"
            drafting.feed(draw(f"draft {stop}", n_draft), stop)
            drafting.remove(0, stop)
            at = stop
        assert (plain.feed(text[at:], at) == drafting.feed(text[at:], at)).all()


@pytest.mark.llama
@pytest.mark.parametrize("unified", [True, False], ids=["unified", "streams"])
@pytest.mark.parametrize("keys, values", PAIRS[:2])
def test_partly_accepted_drafts(tiny, monkeypatch, keys, values, unified):
    """As a server checks them: one batch with a few tokens of every sequence, some of which are kept."""
    monkeypatch.delenv("KVARN_TEST_EXACT", raising=False)
    n_seq, rng = 4, random.Random(1)
    texts = [draw(f"text {s}", 900) for s in range(n_seq)]
    path = tiny(head_dim=64)
    contexts = [session.Context(path, keys, values, n_ctx=1024*n_seq, n_seq=n_seq, unified=unified) for _ in range(2)]
    try:
        for context in contexts:
            for s in range(n_seq):
                context.feed(texts[s][:90 + 12*s], 0, s)
        position = [90 + 12*s for s in range(n_seq)]
        for step in range(30):
            n_draft, kept = rng.choice([1, 8, 16, 60, 127]), [rng.randint(1, 20) for _ in range(n_seq)]
            logits = []
            for number, context in enumerate(contexts):
                rows = []
                for s in range(n_seq):
                    n_right = min(kept[s], n_draft + 1)
                    tokens = texts[s][position[s]:position[s] + n_right]
                    tokens += draw(f"wrong {number} {step} {s}", n_draft + 1 - n_right)
                    rows += [(token, position[s] + i, s) for i, token in enumerate(tokens)]
                wanted = {s*(n_draft + 1) + i for s in range(n_seq) for i in range(min(kept[s], n_draft + 1))}
                context.decode(rows, wanted)
                logits.append(np.stack([context.logits(row) for row in sorted(wanted)]))
                for s in range(n_seq):
                    context.remove(s, position[s] + min(kept[s], n_draft + 1))
            assert (logits[0] == logits[1]).all(), f"step {step}: the rejected tokens of the step before show"
            position = [p + min(k, n_draft + 1) for p, k in zip(position, kept)]
        assert min(position) > 2*G, "no tile was sealed on the way"
    finally:
        for context in contexts:
            context.__exit__()


# ------------------------------------------------------------------------------------------------------- llama-server

KINDS = {
    "draft model": ("--spec-type", "draft-simple", "--spec-draft-n-max", 8),
    "draft model, streams": ("--spec-type", "draft-simple", "--spec-draft-n-max", 16, "--no-kv-unified"),
    "ngram-simple": ("--spec-type", "ngram-simple", "--spec-ngram-simple-size-n", 4, "--spec-ngram-simple-size-m", 24),
    "ngram-map-k": ("--spec-type", "ngram-map-k", "--spec-ngram-map-k-size-n", 4, "--spec-ngram-map-k-size-m", 24),
    "ngram-mod": ("--spec-type", "ngram-mod", "--spec-ngram-mod-n-match", 4, "--spec-ngram-mod-n-min", 2),
    "ngram-cache": ("--spec-type", "ngram-cache"),
}


@pytest.mark.tools
@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("keys, values", [("kvarn4", "kvarn2")])
def test_text_is_that_without_speculation(bin_dir, tmp_path, kind, keys, values):
    pytest.importorskip("gguf", reason="gguf writes the draft model; `make test` installs it")
    import soak
    from kvarn import embedded

    options = ["-c", 4096, "-np", 2, "-t", 1, "-ctk", keys, "-ctv", values, *KINDS[kind]]
    if kind.startswith("draft"):
        options += ["-md", soak.shortened(embedded.path(), tmp_path/"draft.gguf"), "-ctkd", keys, "-ctvd", values]
    n_drafted = n_accepted = 0
    with Server(bin_dir/"llama-server", embedded.path(), *options) as server:
        for family in ("sort", "bfs"):
            problem = next(embedded.problems(family, 1, soak.SEED, 300, 450))
            answer = server.complete(soak.prompt_of(problem), n=len(problem.answer) + 20, ignore_eos=False)
            assert answer["content"] == problem.answer
            n_drafted += answer["timings"].get("draft_n", 0)
            n_accepted += answer["timings"].get("draft_n_accepted", 0)
    print(f"{kind}: {n_accepted} of {n_drafted} drafted tokens accepted")
    assert 0 < n_accepted < n_drafted, "nothing was drafted, accepted or rejected: this shows nothing"


@pytest.mark.tools
@pytest.mark.parametrize("pool", ["--kv-unified", "--no-kv-unified"])
def test_next_token_heads(bin_dir, tiny, monkeypatch, pool):
    """A model that drafts for itself (MTP), on a kvarn cache of its own; lossless tiles, so that the text is the same."""
    monkeypatch.setenv("KVARN_TEST_EXACT", "1")
    path, texts = tiny("mimo2", 64, nextn=1, window=1024), []
    types = ["-ctk", "kvarn4", "-ctv", "kvarn2"]
    for more in ([], ["--spec-type", "draft-mtp", "--spec-draft-n-max", 4, "-ctkd", "kvarn4", "-ctvd", "kvarn4"]):
        with Server(bin_dir/"llama-server", path, "-c", 4096, "-np", 2, "-t", 1, pool, *types, *more) as server:
            answers = [server.complete(prompt, n=300) for prompt in ("hello there", "The quick brown fox " * 20)]
            texts.append([answer["content"] for answer in answers])
    timings = answers[-1]["timings"]
    assert 0 < timings["draft_n_accepted"] < timings["draft_n"]
    assert texts[0] == texts[1]
