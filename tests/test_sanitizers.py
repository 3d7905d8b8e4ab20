"""test_sanitizers.py - codec, kernels and the threaded op are clean for the address, undefined-behaviour and thread sanitizers.

SPDX-License-Identifier: MIT
"""

import os
import re
import shutil

import pytest

from kernel_requests import (
    CASES,
    ROOT,
    SIDE,
    Build,
    ask,
    check_attention,
    found,
    patched_tree,
    run_op,
    seal_request,
    unseal_request,
)
from kvarn import reference
from test_codec import HEAD_DIMS, TILES

pytestmark = pytest.mark.slow

FLAGS = {
    "address, undefined": ["-O1", "-g1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-fno-omit-frame-pointer"],
    "thread": ["-O1", "-g1", "-fsanitize=thread"],
}
OPTIONS = {"ASAN_OPTIONS": "detect_leaks=1", "UBSAN_OPTIONS": "print_stacktrace=1", "TSAN_OPTIONS": "halt_on_error=1"}

# rms error over rms of the output; the bounds proper are those of test_attend_op.py and test_arm.py
PORTABLE_ERROR = 1e-5
DEFAULT_ERROR = 5e-3
FAST_ERROR = 0.2


def compilers() -> "tuple[str, str]":
    if not shutil.which("gcc") or not shutil.which("g++"):
        if os.environ.get("CI"):
            pytest.fail("gcc and g++ are missing: .ci/run installs them")
        pytest.skip("gcc and g++ are not installed (Debian: apt-get install g++)")
    return "gcc", "g++"


def environment(**more: str) -> dict:
    return {**os.environ, **OPTIONS, **more}


def sets(command: "list[str]") -> "dict[str, float]":
    """The kernels of this processor, by the names in the sources, and what they may err."""
    text = "".join(path.read_text() for path in ROOT.glob("ggml-kvarn/kvarn-*.c"))
    names = ["portable", *dict.fromkeys(re.findall(r'"((?!portable")[a-z0-9]+(?:-fast)?)",', text))]
    have = [name for name, kernels in zip(names, found(command, *names)) if kernels == name]
    assert "portable" in have
    limits = {"portable": PORTABLE_ERROR}
    return {name: limits.get(name, FAST_ERROR if name.endswith("-fast") else DEFAULT_ERROR) for name in have}


@pytest.fixture(scope="module")
def build(tmp_path_factory):
    """build("thread") -> what is compiled with this sanitizer; build("") without one."""
    made = {}

    def make(sanitizer: str, tree=None) -> Build:
        if sanitizer not in made:
            flags = FLAGS[sanitizer] if sanitizer else ["-O1"]
            made[sanitizer] = Build(tmp_path_factory.mktemp("build"), *([compiler, *flags] for compiler in compilers()))
        made[sanitizer].tree = tree
        return made[sanitizer]

    return make


def codec_requests() -> list:
    """Every kind of tile and every head size once, with the bits and the side taking turns."""
    requests = []
    tiles = [(name, D) for name in TILES for D in (16, 48)] + [("planted outliers", D) for D in HEAD_DIMS[1:]]
    for n, (name, D) in enumerate(tiles):
        for bits in (2, 3, 4):
            x, side = TILES[name](D), (n + bits) % 2
            requests += [seal_request(x, side, bits), unseal_request(reference.seal(x, SIDE[side], bits), side, bits, D)]
    return requests


@pytest.mark.parametrize(("sanitizer", "n_threads"), [("address, undefined", 1), ("thread", 3)])
def test_codec(build, sanitizer, n_threads):
    """With threads: each request is answered by all of them at once, and all answers are the same."""
    requests = codec_requests() if n_threads == 1 else codec_requests()[::3]
    ask([str(build(sanitizer).kernel_driver()), str(n_threads)], requests, environment())


@pytest.mark.parametrize(("sanitizer", "n_threads"), [("address, undefined", 1), ("thread", 3)])
def test_kernels(build, sanitizer, n_threads):
    command = [str(build(sanitizer).kernel_driver()), str(n_threads)]
    limits = sets(command)
    check_attention(command, limits, CASES if n_threads == 1 else CASES[::4], environment())


@pytest.mark.parametrize("sanitizer", FLAGS)
def test_op(build, sanitizer):
    """kvarn-cpu-ggml.cpp and kvarn-graph.c with 1 to 8 threads: no race, no byte too far, the same bits."""
    tree = patched_tree()
    path = build(sanitizer, tree).op_driver(build("", tree).ggml())
    assert max(run_op([str(path)], environment())) <= DEFAULT_ERROR
    assert max(run_op([str(path)], environment(KVARN_CPU="portable"))) == 0
