"""test_cuda.py - the CUDA kernels compile for every architecture without warnings, and are right where the CPU runs them.

No device is needed: tests/cuda/on-cpu.h runs the kernels' own source with a fiber per thread. What only a device can say (speed,
races, the PTX in kvarn-mma.cuh) is said by cuda/bench on one.

SPDX-License-Identifier: MIT
"""

import os
import re
import shutil
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path

import pytest

from kernel_requests import patched_tree

ROOT = Path(__file__).resolve().parent.parent
CUDA = ROOT / "cuda"
KERNELS = sorted(path for path in CUDA.glob("*.cu") if not path.name.endswith("-ggml.cu"))
GLUE = sorted(CUDA.glob("*-ggml.cu"))
ARCHITECTURES = (75, 86, 90, 120)
WHEELS = [f"nvidia-{name}==13.0.*" for name in ("cuda-nvcc", "cuda-crt", "nvvm", "cuda-runtime", "cuda-cccl")]

# Bytes of registers that a kernel may keep in local memory. What is spilled lies outside of the loops over codes.
SPILLED_MAX = 192
FLAGS = ["-std=c++17", "-O3", "-use_fast_math", f"-I{ROOT}/ggml-kvarn", f"-I{CUDA}", "-Werror", "all-warnings"]

pytestmark = pytest.mark.slow


@cache
def toolkit() -> Path:
    """Folder of the CUDA toolkit, bin/nvcc and include: PATH, CUDA_PATH, the usual place or wheels, which CI installs."""
    nvcc = shutil.which("nvcc")
    folders = [Path(nvcc).resolve().parent.parent] if nvcc else []
    folders += [Path(os.environ["CUDA_PATH"])] if os.environ.get("CUDA_PATH") else []
    folders += [Path("/usr/local/cuda"), Path(sysconfig.get_path("purelib")) / "nvidia/cu13"]
    found = [folder for folder in folders if (folder / "bin/nvcc").exists() and (folder / "include/cuda_fp16.h").exists()]
    if not found and os.environ.get("CI"):
        wheels = ROOT / "build/cuda"
        run(sys.executable, "-m", "pip", "install", "-q", "--upgrade", "--target", wheels, *WHEELS)
        found = [wheels / "nvidia/cu13"]
    if not found:
        pytest.skip(f"no CUDA compiler: install the toolkit, or pip install {' '.join(WHEELS)}")
    return found[0]


def run(*command, **settings) -> str:
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True, **settings)
    assert done.returncode == 0, f"{' '.join(str(word) for word in command[-4:])}:\n{(done.stdout + done.stderr)[-3000:]}"
    return done.stdout + done.stderr


def compile_for(nvcc: Path, arch: int, source: Path, folder: Path) -> "list[str]":
    """Compiles one file; returns what its kernels spill beyond the bound."""
    log = run(nvcc, *FLAGS, f"-gencode=arch=compute_{arch},code=sm_{arch}", "-Xptxas", "-v", "-c", source,
              "-o", folder / f"{source.stem}-{arch}.o")
    found = re.findall(r"Compiling entry function '(\w+)'.*?(\d+) bytes spill stores", log, re.DOTALL)
    assert "__global__" not in source.read_text() or found, f"{source.name}: the compiler names no kernel"
    return [f"sm_{arch} {source.name}: {name} spills {size} bytes" for name, size in found if int(size) > SPILLED_MAX]


def test_kernels_compile_without_warnings_and_hardly_spill(tmp_path):
    nvcc = toolkit() / "bin/nvcc"
    with ThreadPoolExecutor(2) as pool:
        jobs = [pool.submit(compile_for, nvcc, arch, source, tmp_path) for source in KERNELS for arch in ARCHITECTURES]
        spilled = [line for job in jobs for line in job.result()]
    assert not spilled, "\n".join(spilled)


@pytest.mark.parametrize("glue", GLUE, ids=lambda path: path.stem)
def test_glue_compiles_in_the_patched_tree(glue, tmp_path):
    tree = patched_tree() / "ggml"
    run(toolkit() / "bin/nvcc", "-std=c++17", "-use_fast_math", "-extended-lambda", "-gencode=arch=compute_90,code=sm_90",
        f"-I{tree}/include", f"-I{tree}/src", f"-I{tree}/src/ggml-cuda", f"-I{ROOT}/ggml-kvarn", "-Xcompiler", "-Wall",
        "-c", glue, "-o", tmp_path / "glue.o")


def compile_for_cpu(sources: "list[Path]", folder: Path, *flags) -> "list[Path]":
    """Objects of CUDA sources, for the CPU."""
    flags = ["-std=c++17", "-O2", "-fPIC", "-U_FORTIFY_SOURCE", "-ffp-contract=off", "-fno-strict-aliasing",
             "-Wno-unknown-pragmas", "-include", ROOT / "tests/cuda/on-cpu.h", f"-I{toolkit()}/include", f"-I{ROOT}/ggml-kvarn",
             f"-I{CUDA}", *flags, "-c"]
    objects = [folder / f"{path.stem}.o" for path in sources]
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda pair: run("g++", *flags, "-x", "c++", pair[0], "-o", pair[1]), zip(sources, objects)))
    return objects


@pytest.fixture(scope="module")
def kernels_on_cpu(tmp_path_factory) -> "list[Path]":
    return compile_for_cpu([*KERNELS, ROOT / "tests/cuda/on-cpu.cpp"], tmp_path_factory.mktemp("kernels"))


@pytest.fixture(scope="module")
def on_cpu(kernels_on_cpu, tmp_path_factory) -> "dict[str, Path]":
    """The standalone checks of cuda/bench, compiled for the CPU."""
    folder = tmp_path_factory.mktemp("cuda")
    compile_for_cpu(sorted((CUDA / "bench").glob("*.cu")), folder)
    run("gcc", "-O2", "-ffp-contract=off", f"-I{ROOT}/ggml-kvarn", "-c", ROOT / "ggml-kvarn/kvarn-ref.c", "-o", folder / "ref.o")
    drivers = {name: folder / name for name in ("bench-attn", "bench-seal", "bench-step")}
    for name, program in drivers.items():
        run("g++", "-o", program, folder / f"{name}.o", *kernels_on_cpu, folder / "ref.o")
    return drivers


@pytest.mark.parametrize("backend", ["HIP", "MUSA"])
def test_other_vendors_get_a_refusal_and_no_kernels(backend, tmp_path):
    """Their builds compile the same files, found by upstream's glob: the glue says no, which the cache turns into its line."""
    tree = patched_tree() / "ggml"
    objects = compile_for_cpu(sorted(CUDA.glob("*.cu")), tmp_path, f"-DGGML_USE_{backend}", f"-I{ROOT}/tests/cuda/stubs",
                              f"-I{tree}/include", f"-I{tree}/src", "-include", "ggml-impl.h")
    defined = {line.split()[2] for line in run("nm", "-C", "--defined-only", *objects).splitlines() if " T " in line}
    assert {name.split("(")[0] for name in defined} == {f"ggml_cuda_{name}" for name in
            ("kvarn_supported", "op_kvarn", "kvarn_keep", "kvarn_fuse")}


def test_attention_on_the_cpu_agrees_with_float64(on_cpu):
    assert " 0 failed" in run(on_cpu["bench-attn"], "check", timeout=600)


def test_seal_and_get_on_the_cpu_give_the_bytes_of_the_reference(on_cpu):
    assert " 0 failed" in run(on_cpu["bench-seal"], "check", timeout=600)


def test_launches_behind_each_other_on_the_cpu_give_the_bits_of_ordinary_ones(on_cpu):
    assert " 0 failed" in run(on_cpu["bench-step"], "check", timeout=600)


# of kvarn-backend-ops.h: a head size in full, group sizes, rows, an f16 cache beside tiles, sinks, ALiBi, soft cap, fused steps
UPSTREAM_CASES = ("D=64,|step,.*(D_k=(64|80)|rows=5|bits_k=3|rope=[12])|D_k=64,D_v=64,gqa=[1237],.*n_used=[125],|bits_[kv]=0|"
                  "bits_k=3.*(sinks=1|max_bias=8|softcap=1)|rows=[25]")


@pytest.mark.upstream
def test_glue_passes_upstreams_test(kernels_on_cpu, tmp_path, test_bin_dir):
    """GGML_OP_KVARN on a backend made of our glue and kernels, against the CPU backend: tensors, strides, slots, streams."""
    tree = patched_tree() / "ggml"
    glue = compile_for_cpu([*GLUE, ROOT / "tests/cuda/backend-ggml.cpp"], tmp_path,
                           f"-I{ROOT}/tests/cuda/stubs", f"-I{tree}/include", f"-I{tree}/src", "-include", "ggml-impl.h")
    library = tmp_path / "libptx.so"
    run("g++", "-shared", "-o", library, *glue, *kernels_on_cpu)
    said = run(test_bin_dir / "test-backend-ops", "test", "-b", "PTX", "-o", "KVARN", "-p", UPSTREAM_CASES,
               env={**os.environ, "GGML_BACKEND_PATH": str(library), "KVARN_CPU": "portable"})
    assert "not supported" not in said and said.count("KVARN(") >= 30, said[-2000:]


@pytest.mark.upstream
def test_a_prompt_gives_the_bits_of_get_and_one_flash_attention(kernels_on_cpu, tmp_path, test_bin_dir):
    """kvarn-prompt-ggml.cu on the CPU: GET of some heads, flash attention of each window, where it goes; all behind PREP."""
    tree = patched_tree() / "ggml"
    sources = [*GLUE, ROOT / "tests/cuda/backend-ggml.cpp", ROOT / "tests/cuda/prompt-ggml.cpp"]
    objects = compile_for_cpu(sources, tmp_path, f"-I{ROOT}/tests/cuda/stubs", f"-I{tree}/include", f"-I{tree}/src", "-include",
                              "ggml-impl.h")
    run("g++", "-o", tmp_path / "prompt", *objects, *kernels_on_cpu, f"-L{test_bin_dir}", "-lggml", "-lggml-base",
        f"-Wl,-rpath,{test_bin_dir},-rpath-link,{test_bin_dir}")
    assert " 0 failed" in run(tmp_path / "prompt", timeout=600)
