"""test_fuzz_sanitizers.py - the programs of test_fuzz.py under sanitizers, and states of any bytes.

Our files and those of llama.cpp that they work with are compiled with a sanitizer and linked into the fuzzer, where they take the
place of the library's. Nothing of upstream is suppressed. fuzz/states.cpp is a libFuzzer target; what it found is in fuzz/corpus.

SPDX-License-Identifier: MIT
"""

import os
import shutil
import subprocess

import pytest

import fuzz_program
from fuzz_program import FUZZ
from kernel_requests import patched_tree

pytestmark = [pytest.mark.llama, pytest.mark.slow]

FLAGS = {
    "address": ["-O1", "-g1", "-fsanitize=address,undefined", "-fno-sanitize=vptr", "-fno-sanitize-recover=all",
                "-fno-omit-frame-pointer"],
    "thread": ["-O1", "-g1", "-fsanitize=thread", "-fno-omit-frame-pointer"],
}
OPTIONS = {"ASAN_OPTIONS": "detect_leaks=1", "UBSAN_OPTIONS": "print_stacktrace=1",
           "TSAN_OPTIONS": "halt_on_error=1 history_size=4"}


@pytest.fixture(scope="module")
def model(tiny):
    return tiny("llama", 16, n_layer=1, n_head=4, n_head_kv=2, n_embd=32, n_ff=32)


@pytest.fixture(scope="module")
def sanitized(tmp_path_factory, lib_dir):
    """sanitized("thread") -> a fuzzer; built once."""
    made = {}

    def make(name: str) -> fuzz_program.Fuzzer:
        if name not in made:
            folder = tmp_path_factory.mktemp(name)
            objects = fuzz_program.instrumented(folder, patched_tree(), FLAGS[name], with_threads=name == "thread")
            made[name] = fuzz_program.Fuzzer(folder, patched_tree(), lib_dir, ["g++", *FLAGS[name]], objects)
        return made[name]

    return make


def check(fuzzer, model: str, n_ops: int, **settings: int) -> None:
    agreed, output = fuzzer.run(model, n_ops, seed=fuzz_program.SEED + 5000000, env=OPTIONS, **settings)
    print(output)
    assert agreed, output


def test_addresses_and_undefined_behaviour(sanitized, model):
    check(sanitized("address"), model, 4000, shift=1)


def test_addresses_with_real_tiles(sanitized, model):
    check(sanitized("address"), model, 2000, shift=1, exact=0)


def test_addresses_when_allocations_fail(sanitized, model):
    check(sanitized("address"), model, 2000, faults=1)


def test_races_of_two_contexts(sanitized, model):
    """Two threads with contexts of their own on one model."""
    check(sanitized("thread"), model, 600, shift=1, twice=1)


def test_races_of_the_threads_of_a_context(sanitized, model):
    check(sanitized("thread"), model, 100, length=60, shift=1, threads=2)


@pytest.fixture(scope="module")
def states(tmp_path_factory, lib_dir):
    """The libFuzzer target."""
    clang = shutil.which("clang++-19") or shutil.which("clang++")
    if not clang:
        reason = "clang++ is not installed (Debian: apt-get install clang-19 libclang-rt-19-dev)"
        pytest.fail(reason) if os.environ.get("CI") else pytest.skip(reason)
    folder, tree = tmp_path_factory.mktemp("states"), patched_tree()
    near = [tree/"src"/name for name in ("kvarn-cache.cpp", "kvarn-cache-host.cpp")]
    objects = fuzz_program.instrumented(folder, tree, FLAGS["address"], False, cxx=clang, sources=near)
    objects += fuzz_program.instrumented(folder, tree, [*FLAGS["address"], "-fsanitize=fuzzer-no-link"], False, cxx=clang,
                                         sources=[FUZZ/"states.cpp"])
    path = folder/"states"
    fuzz_program.run([clang, *FLAGS["address"], "-fsanitize=fuzzer", *objects, "-o", str(path), *fuzz_program.link(lib_dir)])
    return path


def run_states(states, model: str, *arguments: str, **environment: str) -> str:
    limits = ["-malloc_limit_mb=6000", "-rss_limit_mb=6000"]   # upstream may take 4 GB for a length before it looks at it
    done = subprocess.run([str(states), "-max_len=16384", *limits, *arguments], capture_output=True, text=True, cwd=states.parent,
                          env={**os.environ, **OPTIONS, "KVARN_FUZZ_MODEL": model, **environment})
    assert done.returncode == 0, done.stderr[-6000:]
    return done.stderr


def test_corpus_of_states(states, model):
    """States that reached something new, from 10 CPU minutes; the context decodes as before after each that is refused."""
    corpus = sorted((FUZZ/"corpus").iterdir())
    assert corpus and sum(path.stat().st_size for path in corpus) <= 100*1024
    run_states(states, model, *map(str, corpus))


def test_mutated_states(states, model, tmp_path):
    """Starts from proper states of this version; hashes are put right after most mutations."""
    (tmp_path/"seeds").mkdir()
    (tmp_path/"new").mkdir()
    run_states(states, model, "-runs=0", KVARN_FUZZ_SEEDS=str(tmp_path/"seeds"))
    assert len(list((tmp_path/"seeds").iterdir())) == 3
    said = run_states(states, model, "-runs=4000", "-seed=1", str(tmp_path/"new"), str(tmp_path/"seeds"))
    assert "Done" in said
