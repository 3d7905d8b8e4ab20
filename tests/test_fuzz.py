"""test_fuzz.py - random programs of calls, each made on a kvarn cache and on an f16 one; what they return and hold must agree.

fuzz/program.h lists the calls. With exact tiles and one layer all rows of the two caches have the same bits; with real tiles a
row must be nearer to the f16 row than an empty row or that of another token. A failure comes with the shortest program found.
KVARN_FUZZ_SEED starts elsewhere; fuzz/main.cpp says how to replay a program.

SPDX-License-Identifier: MIT
"""

from concurrent.futures import ThreadPoolExecutor

import pytest

import fuzz_program
from fuzz.mistakes import MISTAKES
from kernel_requests import patched_tree

pytestmark = [pytest.mark.llama, pytest.mark.slow]

# mean squared error over energy, all kinds of tiles together, many tokens still in f16: twice what was measured
REAL_ROWS = 0.03
REAL_LOGITS = 0.06

SMALL = dict(n_head=4, n_head_kv=2, n_embd=32, n_ff=32)


@pytest.fixture(scope="module")
def fuzzer(tmp_path_factory, lib_dir):
    return fuzz_program.Fuzzer(tmp_path_factory.mktemp("fuzz"), patched_tree(), lib_dir)


@pytest.fixture(scope="module")
def one_layer(tiny):
    return tiny("llama", 16, n_layer=1, **SMALL)


@pytest.fixture(scope="module")
def two_layers(tiny):
    return tiny("llama", 32, n_layer=2, **SMALL)


HAPPENS = ("decode", "bad", "cut", "rm", "cp", "keep", "clear", "add", "div", "save", "load", "snap", "back", "alien",
           "check", "full")


def check(fuzzer, model: str, n_ops: int, happens=(*HAPPENS, "fresh", "aborted", "refused"), **settings) -> "dict[str, float]":
    """Two processes; what both counted."""
    with ThreadPoolExecutor(2) as pool:
        halves = [pool.submit(fuzzer.run, model, n_ops//2, seed=fuzz_program.SEED + 1000000*half, shift=1, **settings)
                  for half in range(2)]
    sums = {}
    for half in halves:
        agreed, output = half.result()
        print(output)
        assert agreed, output
        for name, value in fuzz_program.numbers(output).items():
            sums[name] = max(sums.get(name, 0), value) if name.endswith(("worst", "mean")) else sums.get(name, 0) + value
    never = [name for name in happens if not sums[name]]
    assert not never, f"never happened: {never}"
    assert sums["operations"] >= n_ops
    return sums


def test_exact_tiles_of_one_layer(fuzzer, one_layer):
    check(fuzzer, one_layer, 60000)


def test_exact_tiles_of_two_layers(fuzzer, two_layers):
    check(fuzzer, two_layers, 16000)


def test_exact_tiles_of_two_caches(fuzzer, tiny):
    """With sliding windows, too wide to hide anything: what no window reaches f16 forgets."""
    check(fuzzer, tiny("mimo2", 32, n_layer=2, window=200000, value_dim=16, **SMALL), 4000)


@pytest.mark.upstream
def test_exact_tiles_of_a_hybrid(fuzzer, generated):
    """A model with a recurrent part: its sequences are only removed as a whole."""
    check(fuzzer, generated("granitehybrid"), 3000, happens=HAPPENS)


def test_real_tiles(fuzzer, one_layer):
    """A tile never shows a row that was removed, and never loses one: rows of the f16 twin tell."""
    sums = check(fuzzer, one_layer, 30000, exact=0)
    assert sums["rows_mean"] < REAL_ROWS and sums["logits_mean"] < REAL_LOGITS


@pytest.mark.parametrize("mistake", MISTAKES, ids=lambda mistake: mistake.name)
def test_mistakes_are_noticed(fuzzer, mistaken, one_layer, mistake):
    library = mistaken.library(mistake, patched_tree()/"src"/mistake.file)
    agreed, output = fuzzer.run(one_layer, 6000, seed=1, shift=1, preload=library)
    assert not agreed, f"6000 operations and nothing differs: {output}"
    assert "FAILED" in output, output


@pytest.fixture(scope="module")
def mistaken(tmp_path_factory):
    return fuzz_program.Mistaken(tmp_path_factory.mktemp("mistakes"), patched_tree())
