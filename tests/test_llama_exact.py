"""test_llama_exact.py - all but the quantizer is lossless: with exact tiles a kvarn cache computes what an f16 one does.

KVARN_TEST_EXACT=1 keeps f16 rows in the tiles, scrambled, and switches the rotation off. A token that is read from the wrong
place, too early or from a tile of another sequence then changes the numbers, and nothing else does.

SPDX-License-Identifier: MIT
"""

import os
import random
import re
import subprocess

import numpy as np
import pytest

session = pytest.importorskip("llama_session", exc_type=ImportError)

pytestmark = pytest.mark.llama

MODELS = ["llama", "qwen3", "gemma3", "qwen35"]   # dense, with QK-norm, sliding windows, hybrid with a recurrent part
PAIRS = [("kvarn2", "kvarn2"), ("kvarn4", "kvarn2"), ("kvarn3", "f16"), ("f16", "kvarn2"), ("kvarn2", "q8_0"), ("q8_0", "kvarn4")]
N_PROMPT, N_TEXT = 300, 100                       # two tiles in the prompt, one more sealed while text is made


@pytest.fixture(autouse=True)
def exact(monkeypatch):
    monkeypatch.setenv("KVARN_TEST_EXACT", "1")
    monkeypatch.delenv("KVARN_STRICT", raising=False)


def lossless(name: str) -> str:
    """What a cache of this type equals in exact mode."""
    return "f16" if name.startswith("kvarn") else name


def prompt(n_vocab: int, n: int, seed: int = 1) -> "list[int]":
    return np.random.default_rng(seed).integers(3, n_vocab - 1, n).tolist()


# --------------------------------------------------------------------------------------------- text, logits, graphs


def run(path: str, keys: str, values: str, n_text: int = N_TEXT, **settings):
    with session.Context(path, keys, values, **settings) as context:
        text, logits = context.greedy(prompt(context.n_vocab, N_PROMPT), n_text)
        return text, logits, context.n_reused()


def check_same(path: str, keys: str, values: str, n_text: int = N_TEXT, **settings) -> None:
    text, logits, n_reused = run(path, lossless(keys), lossless(values), n_text, **settings)
    ours, our_logits, our_reused = run(path, keys, values, n_text, **settings)
    assert ours == text
    differing = (our_logits != logits).any(axis=1).nonzero()[0]
    assert not differing.size, \
        f"{len(differing)} of {len(logits)} rows of logits differ, first after token {N_PROMPT + differing[0]}"
    assert our_reused == n_reused > n_text/2


@pytest.mark.parametrize("n_ubatch", [128, 512])
@pytest.mark.parametrize("arch", MODELS)
def test_text_and_reused_graphs(generated, arch, n_ubatch):
    check_same(generated(arch), "kvarn4", "kvarn2", n_ubatch=n_ubatch)


def test_text_with_two_threads(tiny):
    check_same(tiny(), "kvarn4", "kvarn2", n_text=2, n_threads=2)


@pytest.mark.parametrize("keys, values", PAIRS)
def test_text_of_every_pair(tiny, keys, values):
    check_same(tiny(), keys, values)


@pytest.mark.parametrize("arch", MODELS)
def test_text_when_sealed_tiles_are_read_at_once(generated, monkeypatch, arch):
    monkeypatch.setenv("KVARN_STRICT", "1")
    check_same(generated(arch), "kvarn2", "kvarn2", n_ubatch=200)


def test_text_with_full_size_windows(generated):
    check_same(generated("gemma3"), "kvarn2", "kvarn4", swa_full=True)


@pytest.mark.parametrize("arch", MODELS)
def test_text_of_streams(generated, arch):
    """Three sequences of different length, each in a stream of its own, one batch for all."""
    rows, reused = [], []
    for keys, values in (("f16", "f16"), ("kvarn3", "kvarn2")):
        with session.Context(generated(arch), keys, values, n_ctx=3*512, n_seq=3, unified=False) as context:
            lengths = [300, 130, 257]
            last = [context.feed(prompt(context.n_vocab, n, s), 0, s) for s, n in enumerate(lengths)]
            logits = [np.stack(last)]
            for step in range(40):
                tokens = [int(row.argmax()) for row in logits[-1]]
                context.decode([(tokens[s], lengths[s] + step, s) for s in range(3)], {0, 1, 2})
                logits.append(np.stack([context.logits(s) for s in range(3)]))
            rows.append(np.stack(logits))
            reused.append(context.n_reused())
    assert (rows[0] == rows[1]).all()
    assert reused[0] == reused[1] > 20


def test_exact_mode_is_what_makes_them_equal(tiny, monkeypatch):
    exact_logits = run(tiny(), "kvarn2", "kvarn2")[1]
    monkeypatch.delenv("KVARN_TEST_EXACT")
    assert session.nmse(exact_logits, run(tiny(), "kvarn2", "kvarn2")[1]) > 1e-3


# --------------------------------------------------------------------------------------------------- perplexity


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    rng = random.Random(1)
    words = ["".join(rng.choices("abcdefghijklmno", k=rng.randint(2, 6))) for _ in range(200)]
    path = tmp_path_factory.mktemp("text")/"text.txt"
    path.write_text(" ".join(rng.choices(words, k=3000)))
    return path


@pytest.fixture(scope="module")
def perplexity(bin_dir, text, whole_log):
    """perplexity(model, keys, values, options) -> the last line of llama-perplexity: mean and error, as printed."""
    def run(path: str, keys: str, values: str, options: str) -> str:
        command = [str(bin_dir/"llama-perplexity"), "-m", path, "-f", str(text), "-fa", "on", "-t", "1", "--chunks", "5",
                   "-ctk", keys, "-ctv", values, *options.split()]
        done = subprocess.run(command, env={**os.environ, **whole_log}, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
        found = re.search(r"Final estimate: (PPL = .*)", done.stdout + done.stderr)
        assert found, f"llama-perplexity printed no result: {done.stdout[-300:]}{done.stderr[-300:]}"
        return found.group(1).strip()

    return run


@pytest.mark.tools
@pytest.mark.parametrize("options", ["-c 512 -b 512 -ub 128", "-c 768 -b 500 -ub 77", "-c 256 -b 1024 -ub 128"],
                         ids=["tiles of one ubatch", "odd batches", "four streams"])
@pytest.mark.parametrize("arch", MODELS)
def test_perplexity(generated, perplexity, arch, options):
    wanted = perplexity(generated(arch), "f16", "f16", options)
    assert perplexity(generated(arch), "kvarn4", "kvarn2", options) == wanted


@pytest.mark.tools
@pytest.mark.parametrize("keys, values", PAIRS)
def test_perplexity_of_every_pair(tiny, perplexity, keys, values):
    options = "-c 256 -b 512 -ub 128"
    wanted = perplexity(tiny(), lossless(keys), lossless(values), options)
    assert perplexity(tiny(), keys, values, options) == wanted


@pytest.mark.tools
def test_perplexity_with_full_size_windows(generated, perplexity):
    options = "-c 512 -b 1024 -ub 128 --swa-full"
    wanted = perplexity(generated("gemma3"), "f16", "f16", options)
    assert perplexity(generated("gemma3"), "kvarn2", "kvarn2", options) == wanted
