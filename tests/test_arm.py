"""test_arm.py - codec and kernels on 64-bit ARM, run by qemu: the host's bytes, and the error bounds of every set of kernels.

Speed is not tested: nothing here runs on ARM hardware. SPDX-License-Identifier: MIT
"""

import os
import re
import shutil
import subprocess

import numpy as np
import pytest

from kernel_requests import (
    CASES,
    ROOT,
    SIDE,
    Attend,
    Build,
    ask,
    check_attention,
    found,
    patched_tree,
    run_op,
    seal_request,
    unseal_request,
)
from kvarn import codec
from test_codec import HEAD_DIMS, TILES, differences, golden, planted

pytestmark = pytest.mark.slow

BITS = (2, 3, 4)
PACKAGE = {"aarch64-linux-gnu-gcc": "g++-aarch64-linux-gnu", "aarch64-linux-gnu-g++": "g++-aarch64-linux-gnu",
           "qemu-aarch64": "qemu-user"}  # of Debian

CPUS = {"cortex-a53": "neon", "neoverse-n1": "dotprod", "max": "i8mm"}  # qemu's name -> the best kernels there
SETS = ("neon", "dotprod", "i8mm")

# What is allowed: rms error over rms of the float64 output. q*scale and p*token are rounded to 15 bits and sign: each errs by
# 1/32512/sqrt(12) of the largest of its tile. Usual is 5e-5; planted outliers with sharp attention make it 3e-4.
# The fast mode rounds to 7 bits and sign: 2e-2 is usual, 1e-1 was the largest.
ARM_ERROR = 5e-4
FAST_ERROR = 0.15
LIMITS = {"portable": 1e-5, **{name: ARM_ERROR for name in SETS}, **{f"{name}-fast": FAST_ERROR for name in SETS}}


def require(program: str) -> str:
    """Path of a program. Where CI can install it, it must be there."""
    path = shutil.which(program)
    if path is None and os.environ.get("CI"):
        pytest.fail(f"{program} is missing: .ci/run installs {PACKAGE[program]}")
    if path is None:
        pytest.skip(f"{program} is not installed (Debian: apt-get install {PACKAGE[program]})")
    return path


def clang() -> str:
    """The newest clang that can make ARM code."""
    require("aarch64-linux-gnu-gcc")  # has the C library
    for name in ("clang", *(f"clang-{version}" for version in range(24, 15, -1))):
        if shutil.which(name):
            text = subprocess.run([name, "--version"], capture_output=True, text=True).stdout
            if int(re.search(r"version (\d+)", text)[1]) >= 16:
                return name
    reason = "no clang from 16 on, which has SDOT and SMMLA in functions by attribute (Debian: apt-get install clang-19)"
    pytest.fail(reason) if os.environ.get("CI") else pytest.skip(reason)


def compiler_of(name: str) -> "list[str]":
    if name == "gcc":
        return [require("aarch64-linux-gnu-gcc"), "-O3"]
    if name == "gcc for a newer processor":  # whose instructions the kernels of older ones must not get
        return [require("aarch64-linux-gnu-gcc"), "-O3", "-march=armv8.6-a+sve+i8mm+bf16"]
    if name == "gcc -O0, undefined":  # with the sanitizer for what C leaves undefined
        return [require("aarch64-linux-gnu-gcc"), "-O0", "-g1", "-fsanitize=undefined", "-fno-sanitize-recover=all"]
    return [clang(), "--target=aarch64-linux-gnu", "-O3"]


COMPILERS = ("gcc", "clang")


@pytest.fixture(scope="module")
def driver(tmp_path_factory):
    """driver("gcc", "cortex-a53") -> the command that runs it; compiled once per compiler."""
    made = {}

    def make(compiler: str, cpu: str) -> "list[str]":
        qemu = require("qemu-aarch64")
        if compiler not in made:
            made[compiler] = Build(tmp_path_factory.mktemp("arm"), [*compiler_of(compiler), "-static"]).kernel_driver()
        return [qemu, "-cpu", cpu, str(made[compiler]), "0"]

    return make


@pytest.mark.parametrize("cpu", CPUS)
@pytest.mark.parametrize("compiler", COMPILERS)
def test_kernels_are_chosen_at_run_time(driver, compiler, cpu):
    """The build is for any armv8-a; what the processor has decides."""
    command = driver(compiler, cpu)
    available = SETS[: SETS.index(CPUS[cpu]) + 1]
    expected = [CPUS[cpu], f"{CPUS[cpu]}-fast", "portable", *(name if name in available else "none" for name in SETS), "none"]
    assert found(command, "best", "fast", "portable", *SETS, "avx2") == expected


@pytest.mark.parametrize("compiler", COMPILERS)
def test_attention(driver, compiler):
    """Every case with every set of kernels."""
    names = ["portable", *SETS, *(f"{name}-fast" for name in SETS)] if compiler == "gcc" else list(SETS)
    check_attention(driver(compiler, "max"), {name: LIMITS[name] for name in names})


@pytest.mark.parametrize(("compiler", "cpu"), [("gcc", "cortex-a53"), ("gcc", "neoverse-n1"),
                                               ("gcc for a newer processor", "max"), ("gcc -O0, undefined", "max")])
def test_attention_with_what_the_processor_has(driver, compiler, cpu):
    """No instruction that it lacks is executed, and a compiler's other settings change nothing."""
    cases = [case for case in CASES if case.D[0] in (16, 80, 128) and case.rows < 3]
    check_attention(driver(compiler, cpu), {"best": ARM_ERROR}, cases)


def test_all_sets_give_the_same_bits(driver):
    """Their sums of products are whole numbers, the rest is one code."""
    requests = []
    for case in (Attend(bits=(2, 3), gqa=7), Attend(bits=(3, 4), D=(80, 48), gqa=3), Attend(bits=(4, 2), D=(16, 16))):
        text, want = case.make()
        requests += [(f"attend {name} ".encode() + text, 4 * want.size) for name in SETS]
    answers = ask(driver("gcc", "max"), requests)
    for i in range(0, len(answers), len(SETS)):
        assert answers[i] == answers[i + 1] == answers[i + 2]


def test_op(tmp_path):
    """SEAL, GET, ATTN and REDUCE with 1 to 8 threads, each picking the kernels of its processor."""
    compilers = [require(f"aarch64-linux-gnu-{name}") for name in ("gcc", "g++")]
    build = Build(tmp_path, *([compiler, "-O1", "-static"] for compiler in compilers), patched_tree())
    path = str(build.op_driver(build.ggml()))
    for cpu in CPUS:
        assert max(run_op([require("qemu-aarch64"), "-cpu", cpu, path])) <= ARM_ERROR


# --- codec ---


def check_bytes(command, tiles: "dict[str, np.ndarray]") -> None:
    """ARM seals and unseals each of these tiles as the installed library does."""
    jobs = [(name, x, side, bits) for name, x in tiles.items() for side in (0, 1) for bits in BITS]
    sealed = [codec.seal(x, SIDE[side], bits) for _, x, side, bits in jobs]
    requests = [seal_request(x, side, bits) for _, x, side, bits in jobs]
    requests += [unseal_request(tile, side, bits, x.shape[1]) for tile, (_, x, side, bits) in zip(sealed, jobs)]
    answers = ask(command, requests)
    for (name, x, side, bits), tile, mine, back in zip(jobs, sealed, answers, answers[len(jobs) :]):
        D = x.shape[1]
        what = f"{name}, D = {D}, {SIDE[side]}, {bits} bits"
        wrong = differences(np.frombuffer(mine, np.uint8), tile, SIDE[side], bits, D)
        assert not wrong, f"{what}: (C is ARM, numpy is this machine) {wrong}"
        assert back == codec.unseal(tile, SIDE[side], bits).tobytes(), f"{what}: unseal differs"


@pytest.mark.parametrize("compiler", ["gcc", "gcc for a newer processor", "clang"])
def test_codec_gives_the_same_bytes(driver, compiler):
    tiles = {name: TILES[name](48) for name in TILES}
    tiles |= {f"golden {D}": golden(D) for D in (64, 80, 128, 256)}
    tiles |= {f"planted {D}": planted(D, D) for D in HEAD_DIMS}
    rng = np.random.default_rng(5)
    for n in range(12):
        D = int(rng.choice((32, 64)))
        x = rng.standard_normal((128, D)) * np.exp(rng.uniform(-9, 9)) + rng.uniform(0, 3) * rng.standard_normal(D)
        tiles[f"random {n}"] = (x * np.exp(rng.uniform(0, 1.5) * rng.standard_normal((128, 1)))).astype(np.float32)
    check_bytes(driver(compiler, "max"), tiles)


@pytest.mark.parametrize("compiler", ["gcc", "gcc for a newer processor", "clang"])
def test_no_fused_multiply_add_in_the_reference(tmp_path, compiler):
    """gcc and clang fuse a*b + c on ARM unless they are told not to; kvarn-ref.c tells them."""
    path = tmp_path / "ref.o"
    subprocess.run([*compiler_of(compiler), "-c", str(ROOT / "ggml-kvarn/kvarn-ref.c"), "-o", str(path)], check=True)
    objdump = ["aarch64-linux-gnu-objdump", "-d", "--no-show-raw-insn", str(path)]
    text = subprocess.run(objdump, check=True, capture_output=True, text=True).stdout
    assert "fmul" in text
    fused = re.findall(r"\sf(?:n?m(?:add|sub|ad|sb)|n?ml[as]\w*)\s.*", text)
    assert not fused, fused[:3]
