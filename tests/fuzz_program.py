"""fuzz_program.py - compiles tests/fuzz against the libraries under test and runs it.

SPDX-License-Identifier: MIT
"""

import os
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

FUZZ = Path(__file__).resolve().parent/"fuzz"
SOURCES = ("program", "faults", "contents", "twins", "main")
SEED = int(os.environ.get("KVARN_FUZZ_SEED", "1"))  # another one for another night


def run(command: "list[str]", **settings) -> None:
    done = subprocess.run(command, capture_output=True, text=True, **settings)
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stderr[-4000:]}"


def run_all(commands: "list[list[str]]") -> None:
    """Two at a time."""
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(run, commands))


def includes(tree: Path) -> "list[str]":
    return [f"-I{tree/part}" for part in ("include", "ggml/include", "src", "ggml/src", "ggml/src/ggml-cpu")]


def link(lib_dir: Path) -> "list[str]":
    return [f"-L{lib_dir}", "-lllama", "-lggml", "-lggml-base", "-lggml-cpu", "-ldl", "-pthread", "-rdynamic",
            f"-Wl,-rpath,{lib_dir}"]


class Fuzzer:
    def __init__(self, folder: Path, tree: Path, lib_dir: Path, compiler: "list[str]" = ("g++", "-O1", "-g1"),
                 more: "list[str]" = ()):
        """more: objects and options to link in; what they define takes the place of what the libraries define."""
        self.path, self.compiler = folder/"fuzz", [*compiler, "-std=c++17", "-Wall", "-Wextra", "-Werror"]
        objects = [str(folder/f"{name}.o") for name in SOURCES]
        run_all([[*self.compiler, *includes(tree), "-c", str(FUZZ/f"{name}.cpp"), "-o", path]
                 for name, path in zip(SOURCES, objects)])
        run([*self.compiler, *objects, *more, "-o", str(self.path), *link(lib_dir)])

    def run(self, model: str, n_ops: int, length: int = 150, seed: int = SEED, env: "dict | None" = None,
            preload: "Path | None" = None, **settings: int) -> "tuple[bool, str]":
        """Random programs of `length` operations, n_ops in all; whether all agreed, and what was printed."""
        environment = {**os.environ, **(env or {}), **({"LD_PRELOAD": str(preload)} if preload else {})}
        command = [str(self.path), "run", model, str(n_ops), str(seed), str(length), *(f"{k}={v}" for k, v in settings.items())]
        done = subprocess.run(command, capture_output=True, text=True, env=environment)
        return done.returncode == 0, f"{' '.join(command)}\n{done.stdout[-6000:]}{done.stderr[-6000:]}"

    def replay(self, model: str, program: Path, mode: str = "replay") -> "dict[str, float]":
        """One program; what was counted."""
        done = subprocess.run([str(self.path), mode, model, str(program)], capture_output=True, text=True)
        assert done.returncode == 0, f"{done.args}\n{program.read_text()[:3000]}\n{done.stdout[-6000:]}{done.stderr[-6000:]}"
        return numbers(done.stdout)


def numbers(output: str) -> "dict[str, float]":
    """What a run counted."""
    pairs = [line.split() for line in output.splitlines()]
    return {pair[0]: float(pair[1]) for pair in pairs if len(pair) == 2 and pair[1][0].isdigit()}


# what a sanitizer watches besides our own files; ggml's threads (with its own pool: OpenMP's is not instrumented) only for races
NEAR = ("src/llama-kv-cache.cpp", "src/llama-kv-cache-iswa.cpp", "src/llama-context.cpp", "src/llama-batch.cpp",
        "src/llama-graph.cpp")
THREADS = ("ggml/src/ggml-cpu/ggml-cpu.c", "ggml/src/ggml-cpu/ops.cpp")


def instrumented(folder: Path, tree: Path, flags: "list[str]", with_threads: bool, c: str = "gcc", cxx: str = "g++",
                 sources: "list[Path] | None" = None) -> "list[str]":
    """Objects to link in, where they take the place of what the libraries have: a whole build would take half an hour."""
    if sources is None:
        sources = [path for pattern in ("src/kvarn-*.cpp", "ggml/src/kvarn-*.c", "ggml/src/ggml-cpu/kvarn-*.c*")
                   for path in sorted(tree.glob(pattern))]
        sources += [tree/name for name in NEAR + (THREADS if with_threads else ())]
    defines = ["-DNDEBUG", "-D_GNU_SOURCE", "-DLLAMA_SHARED", "-DGGML_SHARED", "-DGGML_USE_CPU", "-DGGML_USE_CPU_REPACK",
               "-DGGML_USE_LLAMAFILE", "-DGGML_SCHED_MAX_COPIES=4", '-DGGML_VERSION="test"', '-DGGML_COMMIT="test"']
    objects = [str(folder/f"{path.name}.o") for path in sources]
    run_all([[*([c, "-std=gnu11"] if path.suffix == ".c" else [cxx, "-std=c++17"]), *flags, "-w", "-march=native", *defines,
              *includes(tree), "-c", str(path), "-o", out] for path, out in zip(sources, objects)])
    return objects


class Mistaken:
    """Libraries to preload, each with one of the mistakes of fuzz/mistakes.py in it."""

    HEADERS = ("kvarn-cache.h", "llama-context.h", "llama-cparams.h", "llama-hparams.h", "llama-impl.h", "llama-io.h",
               "llama-model.h")

    def __init__(self, folder: Path, tree: Path):
        self.folder = folder
        self.flags = ["-std=c++17", "-O1", "-fPIC", "-DNDEBUG", "-DLLAMA_SHARED", "-DGGML_SHARED", "-w", *includes(tree)]
        header = folder/"all.h"
        header.write_text("".join(f'#include "{name}"\n' for name in self.HEADERS))
        run(["g++", *self.flags, "-x", "c++-header", str(header), "-o", f"{header}.gch"])

    def library(self, mistake, source: Path) -> Path:
        text = source.read_text()
        n_found = text.count(mistake.statement)
        assert n_found == 1, f"fuzz/mistakes.py is stale: '{mistake.name}' replaces what {mistake.file} has {n_found} times"
        stem = mistake.name.replace(" ", "-")
        changed, path = self.folder/f"{stem}.cpp", self.folder/f"{stem}.so"
        changed.write_text(text.replace(mistake.statement, mistake.instead))
        run(["g++", *self.flags, "-include", str(self.folder/"all.h"), "-shared", str(changed), "-o", str(path)])
        return path
