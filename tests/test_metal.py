"""test_metal.py - the Metal kernels, their real source run on the CPU, give what float64 gives, in every build and order.

The harness is in metal/; its README says how it works and what it cannot see. First it is tested itself: seeded mistakes.
SPDX-License-Identifier: MIT
"""

import os
import re
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from metal import cases, harness
from metal.cases import EXACT, SIDE, Attn, Tiles
from metal.harness import MODES, SCHEDULES, Builds, Failed, Job

ERROR = 1e-5  # of the largest number of the output; the kernels compute in f32

if harness.why_not():
    if os.environ.get("CI"):
        raise pytest.UsageError(f"CI skips nothing: {harness.why_not()}")
    pytest.skip(harness.why_not(), allow_module_level=True)


@pytest.fixture(scope="module")
def builds(tmp_path_factory):
    return Builds(tmp_path_factory.mktemp("metal"))


@pytest.fixture(scope="module")
def results(builds, attn_jobs, tile_jobs):
    """results[op, mode]() -> what all jobs of an op wrote in a build; builds and runs go on in the background, two at a time."""
    jobs = {}
    for mode in MODES:
        few = mode in ("spaces", "tsan", "msan")
        jobs["attn", mode], jobs["seal", mode], jobs["get", mode] = attn_jobs[few], tile_jobs["seal", few], tile_jobs["get", few]
    pool = ThreadPoolExecutor(2)
    futures = {(op, mode): pool.submit(builds.run, mode, [job for _, job, _ in chosen], SCHEDULES, op)
               for (op, mode), chosen in jobs.items()}
    yield {key: lambda key=key: list(zip(jobs[key], futures[key].result())) for key in jobs}
    pool.shutdown(cancel_futures=True)


# ---------------------------------------------------------------------------------------------- the harness itself


@pytest.fixture(scope="module")
def mistakes(tmp_path_factory):
    return Builds(tmp_path_factory.mktemp("mistakes"), [harness.HERE / "mistakes.metal"])


CONTROLS = ["control_threadgroup", "control_simdgroup", "control_collectives"]
ORDER = r"differs from|wrong"
CAUGHT = {  # mistake -> build: what it must say; "wrong": the numbers are
    "missing_threadgroup_barrier": {"plain": ORDER, "tsan": "data race", "msan": "uninitialized|not written"},
    "simdgroup_barrier_too_weak": {"plain": ORDER, "tsan": "data race"},
    "barrier_without_memory": {"tsan": "data race"},
    "missing_simdgroup_barrier": {"plain": ORDER, "tsan": "data race"},
    "missing_barrier_before_overwrite": {"plain": ORDER, "tsan": "data race"},
    "collective_as_barrier": {"tsan": "data race"},
    "two_groups_one_word": {"tsan": "data race"},
    "two_groups_one_word_after_barriers": {"tsan": "data race"},
    "reads_before_writing": {"plain": "wrong", "msan": "not written"},
    "reads_before_writing_hidden": {"msan": "uninitialized|not written"},
    "leaves_a_hole": {"plain": "wrong", "msan": "at byte 168"},
    "reads_past_a_buffer": {"plain": "exit status -11", "asan": "SEGV|overflow|poison"},
    "writes_past_memory": {"plain": "exit status -11", "asan": "SEGV|overflow|poison"},
    "writes_its_input": {"plain": "was written to"},
    "misaligned_vector": {"ubsan": "misaligned"},
    "shifts_by_32": {"ubsan": "shift exponent"},
    "barrier_in_divergent_flow": {"plain": "have returned|not all threads|divergent"},
    "barrier_after_return": {"plain": "have returned"},
    "collective_in_divergent_flow": {"plain": "divergent flow"},
    "infinity_as_a_sign": {"fast-math": "wrong"},
}


def seeded(name: str) -> "tuple[Job, np.ndarray]":
    x = np.arange(1, 66, dtype=np.float32)
    if name == "reads_past_a_buffer":
        x = x[:64]
    if name == "infinity_as_a_sign":
        x[:] = -np.inf
    job = Job("kernel", name)
    groups = 2 if name.startswith("two_groups") else 1
    for key, value in (("groups", groups), ("threads", 64 // groups), ("memory", 256)):
        job.value(key, value)
    job.give("b1", x)
    job.take("b2", np.float32, (64,))
    return job, np.zeros(64) if name == "infinity_as_a_sign" else x[:64]


def verdict(builds: Builds, mode: str, job: Job, expected: np.ndarray) -> str:
    try:
        out = builds.run(mode, [job], SCHEDULES)[0]["b2"]
    except Failed as failed:
        return str(failed)
    return "" if np.array_equal(out, expected) else "wrong"


@pytest.mark.parametrize("mode", ["plain", "fast-math", "tsan", "msan", "asan", "ubsan", "spaces"])
def test_controls_pass(mistakes, mode):
    for name in CONTROLS:
        assert verdict(mistakes, mode, *seeded(name)) == "", f"{name} is correct, but {mode} says otherwise"


@pytest.mark.parametrize("name", CAUGHT)
def test_mistake_is_caught(mistakes, name):
    for mode, expected in CAUGHT[name].items():
        said = verdict(mistakes, mode, *seeded(name))
        assert re.search(expected, said), f"{name}: {mode} says '{said[:500]}', not '{expected}'"


def test_too_much_threadgroup_memory_is_caught(mistakes):
    job, expected = seeded("control_threadgroup")
    job.value("memory", 32 * 1024 + 16)
    assert "32768 at most" in verdict(mistakes, "plain", job, expected)


KERNEL = "#include <metal_stdlib>\nusing namespace metal;\nkernel void k(device float * out [[buffer(1)]], "\
         "threadgroup float * smem [[threadgroup(0)]], constant int & n [[buffer(2)]]%s) {{ {} }}\n" % ""
REFUSED = {  # what a compiler for another language would take
    "a pointer of another address space": ("device float * p = smem; p[0] = 1.0f;", "spaces"),
    "a write to constant memory": ("n = 1;", "plain"),
    "an implicit conversion of a vector": ("half4 h = float4(1.0f); out[0] = h.x;", "plain"),
    "double": ("double x = out[0]; out[0] = x;", "plain"),
    "C++17": ("if constexpr (sizeof(int) == 4) { out[0] = 1.0f; }", "C++14"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_foreign_code_is_refused(tmp_path, what):
    body, mode = REFUSED[what]
    for line, is_fine in ((body, False), ("out[0] = smem[0] + float(n);", True)):
        source = tmp_path / f"{'good' if is_fine else 'bad'}.metal"
        source.write_text(KERNEL.format(line))
        one = Builds(tmp_path / source.stem, [source])
        try:
            one.syntax(mode)
            assert is_fine, f"{what} compiles"
        except Failed as failed:
            assert not is_fine, failed


@pytest.mark.parametrize("text", ["kernel void k(device float * p [[buffer(1)]], uint x [[dispatch_threads]]) {}",
                                  "kernel void k(device float * p) {}",
                                  "kernel void k(device float * p [[buffer(1)]]) {\n    threadgroup float x[4];\n}"])
def test_prepass_drops_nothing_silently(tmp_path, text):
    source = tmp_path / "k.metal"
    source.write_text(text)
    with pytest.raises(Failed, match="unknown|no attribute|threadgroup arrays"):
        Builds(tmp_path / "out", [source])


# ---------------------------------------------------------------------------------------------- ATTN and REDUCE

BITS = [(2, 2), (3, 3), (4, 4), (4, 2), (3, 2), (0, 2), (0, 3), (0, 4), (2, 0), (3, 0), (4, 0)]
HEADS = [*((D, D) for D in (16, 32, 48, 64, 80, 96, 112, 192, 256, 512)), (192, 128), (128, 64)]
GROUPS = [(1, 1), (3, 1), (5, 1), (7, 2), (16, 1), (1, 16), (2, 3), (71, 1)]  # heads per KV head, query rows
PARTS = [(1, 5), (2, 1), (7, 7), (8, 1), (9, 3), (9, 7), (40, 20), (40, 44)]  # tiles, partial results that there is room for
MASKS = ("window", "sparse", "nothing", "all", "none")
ATTN = [
    *(Attn(bits=bits, gqa=2) for bits in BITS),
    *(Attn(bits=bits, D=(64, 48), gqa=3, tiny=True) for bits in BITS),
    *(Attn(bits=((2, 3, 4)[i % 3], (3, 4, 2)[i % 3]), D=D, H=1, gqa=(2, 1, 4)[i % 3], tiles=3)
      for i, D in enumerate(HEADS)),
    *(Attn(bits=(2, 2), D=(64, D), H=1, gqa=gqa, tiles=3) for D in (128, 256, 512) for gqa in (1, 2, 4, 8)),
    *(Attn(bits=(0, 0), D=D, H=1, gqa=3, tiles=3) for D in ((64, 64), (80, 80), (256, 256))),
    *(Attn(D=(64, 64), H=1, gqa=gqa, rows=rows, tiles=3) for gqa, rows in GROUPS),
    *(Attn(bits=(4, 3), D=(64, 64), H=2, tiles=tiles, parts=parts) for tiles, parts in PARTS),
    *(Attn(bits=(3, 2), D=(32, 64), rows=3, mask=mask, tiles=6, parts=3) for mask in MASKS),
    *(Attn(bits=(0, 4), D=(64, 32), rows=2, mask=mask, tiles=4) for mask in MASKS),
    Attn(D=(512, 64), H=1, gqa=8, tiles=2, parts=1),  # the most threadgroup memory: one simdgroup
    Attn(D=(64, 64), rows=2, streams=(3, 1, 2)),
    Attn(D=(64, 64), rows=2, streams=(3, 0, 3), one_mask=True, mask="all"),
    Attn(D=(64, 64), gqa=3, rows=2, sinks=True),
    Attn(D=(64, 64), gqa=3, rows=2, bias=8.0),
    Attn(D=(64, 64), gqa=3, rows=2, softcap=10.0),
    Attn(D=(64, 64), gqa=3, rows=2, sinks=True, bias=4.0, softcap=5.0, mask="nothing"),
    Attn(D=(64, 64), sharp=60.0),
]
# some builds take their time: the instances, widths and paths once, small
ATTN_FEW = [
    *(Attn(bits=bits, D=(32, 32), H=1, gqa=2, tiles=4, parts=1, tiny=tiny) for bits in BITS for tiny in (False, True)),
    *(Attn(bits=(2, 2), D=(16, D), H=1, gqa=gqa, tiles=2, parts=1) for D in (64, 256, 512) for gqa in (1, 2, 4, 8)),
    Attn(bits=(3, 3), D=(80, 80), H=1, gqa=3, rows=2, tiles=3, parts=34, sinks=True, bias=4.0, softcap=5.0, mask="sparse"),
    Attn(bits=(4, 4), D=(48, 48), H=2, gqa=2, rows=2, tiles=3, mask="nothing", streams=(2, 1, 1)),
    Attn(bits=(3, 2), D=(16, 16), H=1, gqa=2, tiles=3, mask="none"),
]


@pytest.fixture(scope="module")
def attn_jobs():
    """is it the short list -> case, job, what it writes"""
    return {few: [(case, *cases.attn(case, seed)) for seed, case in enumerate(chosen)]
            for few, chosen in ((False, ATTN), (True, ATTN_FEW))}


@pytest.mark.parametrize("mode", MODES)
def test_attention_is_float64s(results, mode):
    for (case, _, expected), written in results["attn", mode]():
        out, reference = written["out"], expected["out"]
        assert np.isfinite(out).all(), f"{case}: {mode}: not finite at {np.argwhere(~np.isfinite(out))[0]}"
        error = np.abs(out - reference)
        worst = np.unravel_index(error.argmax(), error.shape)
        limit = ERROR * np.abs(reference).max()
        assert error.max() <= limit, f"{case}: {mode}: {out[worst]} instead of {reference[worst]} at {worst}, limit {limit}"


# ---------------------------------------------------------------------------------------------- SEAL and GET

SEAL = [
    *(Tiles(side, bits, D, 1 + (D < 80), data) for side in range(2) for bits in (2, 3, 4)
      for D, data in ((16, "gaussian"), (32, "wild"), (80, "gaussian"))),
    Tiles(0, 2, 128, 1), Tiles(1, 4, 128, 1), Tiles(1, 3, 272, 1, "wild"), Tiles(0, EXACT, 32), Tiles(1, EXACT, 48),
]
SEAL_FEW = [*(Tiles(side, bits, 16, 1) for side in range(2) for bits in (2, 3, 4)), Tiles(1, 2, 32, 1, "wild"),
            Tiles(1, EXACT, 16)]
GET, GET_FEW = ([Tiles(side, bits, D, H) for side in range(2) for bits in (2, 3, 4, EXACT) for D, H in sizes]
                for sizes in (((16, 3), (80, 2), (128, 1), (512, 1)), ((16, 1), (48, 2))))


@pytest.fixture(scope="module")
def tile_jobs():
    """(op, is it the short list) -> cases, jobs, what they write"""
    return {(op, few): [(case, *cases.tiles(case, op, seed)) for seed, case in enumerate(chosen)]
            for op, few, chosen in (("seal", False, SEAL), ("seal", True, SEAL_FEW), ("get", False, GET), ("get", True, GET_FEW))}


def difference(case: Tiles, got: np.ndarray, expected: np.ndarray) -> str:
    """"" if two lists of tiles are equal; else which tile, code or factor differs first."""
    for at in np.argwhere((got != expected).any(-1)):
        one, other = got[tuple(at)], expected[tuple(at)]
        where = f"tile {at[0]}, head {at[1]}"
        if case.bits == EXACT or (other == 0xA5).all():
            return f"{where}: byte {np.argwhere(one != other)[0][0]}"
        parts = (cases.reference.unpack(tile, SIDE[case.side], case.bits, case.D) for tile in (one, other))
        for name, a, b in zip(("code", "scale", "zero", "token"), *parts):
            if (a != b).any():
                place = tuple(np.argwhere(a != b)[0])
                return f"{where}: {name} {place} is {a[place]} instead of {b[place]}, {(a != b).sum()} of {a.size} differ"
    return ""


@pytest.mark.parametrize("mode", MODES)
def test_sealed_tiles_have_the_reference_bytes(results, mode):
    for (case, _, expected), written in results["seal", mode]():
        if mode != "fast-math":
            assert not difference(case, written["tiles"], expected["tiles"]), f"{case}: {mode}"
            continue
        # what a Mac without Metal 3.2 may do: a rounding here and there, and a code on the border of two. Not a worse tile.
        differs = (written["tiles"] != expected["tiles"]).mean()
        assert differs <= 0.01, f"{case}: {differs:.1%} of the bytes differ"


@pytest.mark.parametrize("mode", MODES)
def test_rows_of_tiles_are_unseals(results, mode):
    for (case, _, expected), written in results["get", mode]():
        wrong = np.argwhere(written["out"].view(np.uint16) != expected["out"].view(np.uint16))
        assert not len(wrong), f"{case}: {mode}: {len(wrong)} numbers differ, the first at {wrong[0]}"


# ---------------------------------------------------------------------------------------------- the source


def test_no_barrier_is_too_many(builds):
    """Without any one of its barriers the source must show a race: none is useless, and none could get lost unnoticed."""
    attn = [cases.attn(Attn(bits=bits, D=(16, 16), H=1, gqa=1, tiles=3, parts=1), 1)[0] for bits in ((2, 3), (0, 2))]
    seal = [cases.tiles(Tiles(0, 2, 16, 1), "seal")[0]]
    for path, jobs in zip(harness.KERNELS, (attn, seal)):
        assert builds.run("tsan", jobs, ["forward 0"])
        for number, line in enumerate(path.read_text().splitlines(), 1):
            if re.match(r"\s*(simdgroup|threadgroup)_barrier\(", line):
                with pytest.raises(Failed, match="data race"):
                    builds.run("tsan", jobs, ["forward 0"], MSL_WITHOUT_BARRIER=str(number))
                    pytest.fail(f"{path.name}:{number}: no race without this barrier")


def test_every_kernel_runs(builds, attn_jobs, tile_jobs):
    """The plans of the jobs reach every instance in the source, in the short lists too: none is only compiled."""
    for few in (False, True):
        builds.launched.clear()
        for jobs in (attn_jobs[few], tile_jobs["seal", few][:1], tile_jobs["get", few][:1]):
            builds.run("plain", [job for _, job, _ in jobs], ["forward 0"])
        assert builds.launched == set(harness.call([builds.runner("plain")]).split())


def test_source_is_metal_of_its_time(builds):
    builds.syntax()


# ---------------------------------------------------------------------------------------------- the glue in ggml's Metal backend


@pytest.fixture(scope="module")
def tree():
    """The patched llama.cpp: KVARN_TEST_TREE, or what the last build made."""
    build, wanted = harness.ROOT / "build", "llama.cpp/ggml/src/ggml-metal"
    found = [path.parents[2] for path in [*build.glob(wanted), *build.glob(f"*/{wanted}")]]
    if os.environ.get("KVARN_TEST_TREE"):
        found = [Path(os.environ["KVARN_TEST_TREE"])]
    if not found and os.environ.get("CI"):
        pytest.fail("CI skips nothing: there is no patched llama.cpp under build/")
    if not found:
        pytest.skip("there is no patched llama.cpp under build/: `make test` makes one, or KVARN_TEST_TREE names one")
    return max(found, key=lambda path: path.stat().st_mtime)


# of kvarn-backend-ops.h: one head size in full, an f16 cache beside tiles, sinks, ALiBi, soft cap
UPSTREAM_CASES = "D=64,|D_k=64,D_v=64,gqa=[1237],.*n_used=[125],|bits_[kv]=0|bits_k=3.*(sinks=1|max_bias=8|softcap=1)"
GLUE = {
    "ggml-metal-device.m": ["-x", "objective-c", "-fblocks", "-fobjc-runtime=macosx", "-Werror=implicit-function-declaration",
                            "-DGGML_METAL_EMBED_LIBRARY=1", "-isystem", harness.HERE / "stubs"],
    "ggml-metal-ops.cpp": ["-std=c++17"],
}


@pytest.mark.parametrize("name", GLUE)
def test_glue_compiles(tree, name):
    """Upstream's files with our call sites, for the syntax: on a Mac the same files see Apple's headers instead of stubs."""
    metal = tree / "ggml" / "src" / "ggml-metal"
    harness.call([harness.compiler(), "-fsyntax-only", "-Wno-everything", *GLUE[name], f"-I{tree}/ggml/include",
                  f"-I{tree}/ggml/src", f"-I{metal}", metal / name])


@pytest.fixture(scope="module")
def backend(builds, tree):
    return builds.backend(tree)


@pytest.mark.upstream
@pytest.mark.parametrize("is_usual", [True, False], ids=["as a Mac does", "tiny, few threads"])
def test_glue_passes_upstreams_test(backend, test_bin_dir, is_usual):
    """GGML_OP_KVARN on the backend that is made of our glue and kernels, against the CPU: tensors, strides, slots, streams."""
    cases, changes = (UPSTREAM_CASES, {}) if is_usual else ("D=64,|D=256,", {"KVARN_METAL_TINY": "1", "MSL_THREADS": "80"})
    done = subprocess.run([test_bin_dir/"test-backend-ops", "test", "-b", "MSL", "-o", "KVARN", "-p", cases], text=True,
                          capture_output=True,
                          env={**os.environ, "GGML_BACKEND_PATH": str(backend), "KVARN_CPU": "portable", **changes})
    said = done.stdout + done.stderr
    assert done.returncode == 0 and "not supported" not in said, \
        "\n".join([line for line in said.splitlines() if "FAIL" in line or "not supported" in line][:20]) or said[-2000:]
    assert said.count("KVARN(") >= (30 if is_usual else 6), said[-2000:]


EMBED = """cmake_minimum_required(VERSION 3.14)
project(embed C)
set(GGML_METAL_EMBED_LIBRARY ON)
function(ggml_add_backend_library name)
    file(WRITE ${{CMAKE_BINARY_DIR}}/empty.c "")
    add_library(${{name}} STATIC ${{CMAKE_BINARY_DIR}}/empty.c)
endfunction()
add_subdirectory({metal} metal)
"""


@pytest.mark.parametrize("kernels", [path.stem for path in harness.KERNELS])
def test_cmake_embeds_the_kernels(tree, tmp_path, kernels):
    """The text that a Mac compiles at run time, as the patched CMake rules make it: upstream's headers, ours, the kernels."""
    if not shutil.which("cmake") or not shutil.which("make"):
        (pytest.fail if os.environ.get("CI") else pytest.skip)("cmake and make embed the kernels: apt-get install cmake make")
    (tmp_path / "CMakeLists.txt").write_text(EMBED.format(metal=tree / "ggml" / "src" / "ggml-metal"))
    build, text = tmp_path / "build", f"metal/autogenerated/ggml-metal-embed-{kernels}"
    frameworks = [f"-D{name}=m" for name in ("FOUNDATION_LIBRARY", "METAL_FRAMEWORK", "METALKIT_FRAMEWORK")]
    harness.call(["cmake", "-S", tmp_path, "-B", build, "-G", "Unix Makefiles", *frameworks])
    harness.call(["make", "-s", "-C", build, "-f", "metal/CMakeFiles/ggml-metal.dir/build.make", f"{text}.s"])
    for symbol in (f"_ggml_metallib_{kernels}_start:", f".incbin \"{build / text}.metal\"", f"_ggml_metallib_{kernels}_end:"):
        assert symbol in (build / f"{text}.s").read_text()
    embedded = Builds(tmp_path / "out", [build / f"{text}.metal"])
    embedded.syntax(includes=[])  # no folder to include anything from


def test_kernels_are_in_upstreams_lists(tree):
    """A library that CMake builds and the list of libraries in ggml-metal-device.m must name the same files."""
    metal = tree / "ggml" / "src" / "ggml-metal"
    lists = (metal / "CMakeLists.txt").read_text(), (metal / "ggml-metal-device.m").read_text()
    for path in harness.KERNELS:
        assert f"kernels/{path.name}\n" in lists[0] and re.search(rf"X\(\w+, +{path.stem}\)", lists[1])
        assert (metal / "kernels" / path.name).is_file()
        for header in re.findall(r"#include \"(.*)\"", path.read_text()):
            assert f"kernels/{header}\n" in lists[0] and (metal / "kernels" / header).is_file()
