"""harness.py - compiles kvarn.metal for the CPU in every build mode and hands jobs to the runner.

A build is the kernels (prepass.py, then clang with the shim) plus the runner and the executor, which are compiled once without
sanitizers. See README.md of this folder for what each mode catches.
SPDX-License-Identifier: MIT
"""

import os
import shutil
import subprocess
import sys
import threading
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
KERNELS = [ROOT / "metal" / name for name in ("kvarn.metal", "kvarn_tiles.metal")]
INCLUDES = [f"-I{HERE}", f"-I{ROOT / 'metal'}", f"-I{ROOT / 'ggml-kvarn'}"]

# every mode compiles this way: half arithmetic rounds after each operation, nothing is contracted unless the mode says so
COMMON = ["-x", "c++", "-fdeclspec", "-fno-strict-aliasing", "-ffp-contract=off", "-Xclang", "-ffloat16-excess-precision=none",
          "-Wno-everything", "-g1", "-fPIC", "-isystem", str(HERE / "shim"), "-include", "metal_stdlib"]
MODES = {  # name -> flags of the kernels, flags of the link
    "plain": (["-std=c++17", "-O1"], []),
    "fast-math": (["-std=c++17", "-O2", "-ffast-math"], []),
    "spaces": (["-std=c++23", "-O1", "-DMSL_AS"], []),
    "tsan": (["-std=c++17", "-O1", "-fsanitize=thread"], ["-fsanitize=thread"]),
    "msan": (["-std=c++17", "-O1", "-fsanitize=memory"], ["-fsanitize=memory"]),
    "asan": (["-std=c++17", "-O1", "-fsanitize=address"], ["-fsanitize=address"]),
    "ubsan": (["-std=c++17", "-O1", "-fsanitize=undefined,float-divide-by-zero", "-fno-sanitize-recover=all"],
              ["-fsanitize=undefined"]),
}
SYNTAX = ["-std=c++14", "-Werror=c++17-extensions"]  # the language is C++14
HOST, LOCK = {}, threading.Lock()
SYMBOLIZER = f":external_symbolizer_path={shutil.which('llvm-symbolizer-19') or shutil.which('addr2line') or ''}"
ENVIRONMENT = {
    "TSAN_OPTIONS": "halt_on_error=1:atexit_sleep_ms=0:report_bugs=1" + SYMBOLIZER,
    "MSAN_OPTIONS": "poison_in_malloc=0:poison_in_free=0:halt_on_error=1" + SYMBOLIZER,
    "ASAN_OPTIONS": "detect_leaks=0:detect_stack_use_after_return=0" + SYMBOLIZER,
    "UBSAN_OPTIONS": "print_stacktrace=0:halt_on_error=1",
}
SEEDS = range(1, 6)
SCHEDULES = ["forward 0", "reverse 0", *(f"{kind} {seed}" for kind in ("random", "depth") for seed in SEEDS)]


def compiler() -> "str | None":
    """clang that has _Float16 without excess precision and C++23's explicit object parameters: 18 or newer."""
    return next((name for name in ("clang++-19", "clang++-18", "clang++-20", "clang++-21") if shutil.which(name)), None)


def why_not() -> str:
    """"" if the kernels can be compiled and run here with every sanitizer."""
    wanted = "apt-get install clang-19 libclang-rt-19-dev"
    if compiler() is None:
        return f"the Metal kernels are run by clang 18 or newer, which is missing: {wanted}"
    test = [compiler(), "-x", "c++", "-fsanitize=thread", "-", "-o", os.devnull]
    done = subprocess.run(test, input="int main() {}", capture_output=True, text=True)
    return f"{compiler()} has no sanitizers: {wanted}" if done.returncode else ""


def machine_flags() -> "list[str]":
    return ["-mf16c"] if os.uname().machine in ("x86_64", "AMD64") else []


class Failed(Exception):
    """A compiler, a runner or a sanitizer said no."""


def call(command: "list[str]", environment: "dict | None" = None) -> str:
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True, errors="replace",
                          env={**os.environ, **(environment or {})})
    if done.returncode:
        text = done.stderr.strip() or done.stdout.strip() or f"exit status {done.returncode}"
        raise Failed(f"{Path(command[0]).name}: {text[:3000]}")
    return done.stdout


class Builds:
    """Runners of some .metal sources, made when first asked for."""

    def __init__(self, folder: Path, sources: "list[Path]" = KERNELS):
        self.folder, self.translated, self.made, self.objects, self.launched = Path(folder), [], {}, {}, set()
        self.locks = {mode: threading.Lock() for mode in MODES}
        self.folder.mkdir(parents=True, exist_ok=True)
        for source in sources:
            self.translated.append(self.folder / f"{source.stem}.cpp")
            call([sys.executable, HERE / "prepass.py", source, self.translated[-1]])

    def syntax(self, mode: str = "C++14", includes: "list[str]" = INCLUDES) -> None:
        flags = MODES[mode][0] if mode in MODES else SYNTAX
        call([compiler(), *COMMON, *machine_flags(), *includes, *flags, "-fsyntax-only", *self.translated])

    def host(self) -> "list[Path]":
        """The runner and the executor, without sanitizers: the same objects for every build of every source."""
        with LOCK:
            for name in ("executor", "runner"):
                if name not in HOST:
                    target = self.folder / f"{name}.o"
                    call([compiler(), "-std=c++17", "-O2", "-Wall", "-Wextra", "-Werror", "-fPIC", *INCLUDES,
                          "-c", HERE / f"{name}.cpp", "-o", target])
                    HOST[name] = target
        return list(HOST.values())

    def runner(self, mode: str) -> Path:
        with self.locks[mode]:
            return self.made.get(mode) or self.make(mode)

    def make(self, mode: str) -> Path:
        compile_flags, link_flags = MODES[mode]
        kernels, self.made[mode] = [], self.folder / f"runner-{mode}"
        for translated in self.translated:
            kernels.append(translated.with_name(f"{translated.stem}-{mode}.o"))
            call([compiler(), *COMMON, *machine_flags(), *INCLUDES, *compile_flags, "-c", translated, "-o", kernels[-1]])
        call([compiler(), *link_flags, *kernels, *self.host(), "-o", self.made[mode]])
        self.objects[mode] = kernels
        return self.made[mode]

    def backend(self, tree: Path) -> Path:
        """backend-ggml.cpp and the kernels as a library that ggml loads."""
        metal, library = tree / "ggml" / "src" / "ggml-metal", self.folder / "libmsl.so"
        folders = [f"-I{folder}" for folder in (HERE, metal, metal / "kernels", metal.parent, metal.parent.parent / "include")]
        backend = self.folder / "backend-ggml.o"
        call([compiler(), "-std=c++17", "-O1", "-fPIC", *folders, "-c", HERE / "backend-ggml.cpp", "-o", backend])
        self.runner("plain")
        call([compiler(), "-shared", backend, *self.objects["plain"], self.host()[0], "-o", library])
        return library

    def run(self, mode: str, jobs: "list[Job]", schedules: "list[str]", label: str = "", **environment: str) -> "list[dict]":
        """What each job wrote: arrays by name. Runs at the same time need a label each."""
        runner, base = self.runner(mode), self.folder / f"jobs-{mode}-{label}"
        text, data, offset = [], [], 0
        for job in jobs:
            text += [f"op {job.op}", f"case {job.name}", *job.facts]
            for name, array, is_written in job.inputs:
                text.append(f"{'inout' if is_written else 'in'} {name} {offset} {array.nbytes}")
                data.append(array.tobytes())
                offset += array.nbytes
            text += [f"out {name} {np.dtype(dtype).itemsize * int(np.prod(shape))}" for name, dtype, shape in job.outputs]
            text += [f"scratch {name} {size}" for name, size in job.scratch]
            text += [f"schedule {schedule}" for schedule in schedules] + ["run"]
        paths = [base.with_suffix(suffix) for suffix in (".txt", ".in", ".out")]
        paths[0].write_text("\n".join(text) + "\n")
        paths[1].write_bytes(b"".join(data))
        paths[2].unlink(missing_ok=True)
        self.launched.update(call([runner, *paths], {**ENVIRONMENT, **environment}).split())
        raw, at, results = paths[2].read_bytes(), 0, []
        for job in jobs:
            written = [(name, a.dtype, a.shape) for name, a, is_written in job.inputs if is_written] + job.outputs
            arrays = {}
            for name, dtype, shape in sorted(written):
                count = int(np.prod(shape))
                arrays[name] = np.frombuffer(raw, dtype, count, at).reshape(shape)
                at += count * np.dtype(dtype).itemsize
            results.append(arrays)
        assert at == len(raw), "the runner wrote more than the jobs say"
        return results


@dataclass
class Job:
    op: str
    name: str
    facts: "list[str]" = field(default_factory=list)
    inputs: "list[tuple]" = field(default_factory=list)   # name, array, is it written
    outputs: "list[tuple]" = field(default_factory=list)  # name, dtype, shape
    scratch: "list[tuple]" = field(default_factory=list)  # name, bytes

    def value(self, name: str, value) -> None:
        self.facts.append(f"{'int' if isinstance(value, (int, np.integer)) else 'float'} {name} {value}")

    def tensor(self, name: str, ne, nb) -> None:
        pad = 4 - len(ne)
        ne, nb = [*ne, *[1] * pad], [*nb, *[nb[-1] * ne[-1]] * pad]
        self.facts.append(f"tensor {name} {' '.join(map(str, ne))} {' '.join(map(str, nb))}")

    def give(self, name: str, array: np.ndarray, is_written: bool = False) -> None:
        self.inputs.append((name, np.ascontiguousarray(array), is_written))

    def take(self, name: str, dtype, shape) -> None:
        self.outputs.append((name, dtype, tuple(shape)))
