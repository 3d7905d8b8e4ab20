"""Console scripts: `kvarn` with its subcommands, and llama-cli, llama-server, ... of this install.

    kvarn demo [--quick] [--model FILE]    the same problems with four caches, side by side
    kvarn bench [--model FILE]             decode and prefill speed at depth
    kvarn eval [MODEL]                     perplexity, KLD to f16 and long decodes with each cache type, as tables and plots
    kvarn run TOOL ARGS...                 a bundled tool by name, where another llama.cpp is on PATH too
    kvarn env                              two exports that make any llama-cpp-python use these libraries

Nothing here needs llama-cpp-python, except demo, bench and eval. SPDX-License-Identifier: MIT
"""

import argparse
import os
import shlex
import subprocess
import sys
from pathlib import Path

import kvarn

TOOLS = ("llama-cli", "llama-server", "llama-bench", "llama-perplexity", "llama-completion", "llama-batched-bench")


def fail(text: str) -> int:
    print(f"kvarn: {text}", file=sys.stderr)
    return 1


def execute(name: str, arguments: "list[str]") -> int:
    """Replaces this process by a bundled tool; returns only on failure."""
    try:
        folder = kvarn.bin_path()
    except ImportError as error:
        return fail(str(error))
    program = folder / (name + (".exe" if os.name == "nt" else ""))
    if not program.is_file():
        return fail(f"{folder} has no {name}; the tools of this install are {', '.join(TOOLS)}")
    if os.name == "nt":
        return subprocess.call([str(program), *arguments])
    try:
        os.execv(program, [name, *arguments])
    except OSError as error:
        return fail(f"cannot run {program}: {error.strerror}")


def tool() -> int:
    """Entry point of llama-cli and its kin: which one is decided by the name it was called by."""
    return execute(Path(sys.argv[0]).stem, sys.argv[1:])


def print_env() -> int:
    try:
        folder = shlex.quote(str(kvarn.lib_path().resolve()))
    except ImportError as error:
        return fail(str(error))
    print(f"export LLAMA_CPP_LIB_PATH={folder}\nexport MTMD_CPP_LIB={folder}")
    return 0


def main(argv: "list[str] | None" = None) -> int:
    parser = argparse.ArgumentParser(prog="kvarn", description="KVarN key-value caches for llama.cpp.")
    parser.add_argument("--version", action="version", version=f"kvarn {kvarn.__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    demo = commands.add_parser("demo", help="decode the same problems with f16, q4_0 and kvarn caches, and compare")
    run = commands.add_parser("run", help="run a bundled tool: " + ", ".join(TOOLS), add_help=False)
    run.add_argument("tool", choices=TOOLS, metavar="TOOL")
    run.add_argument("arguments", nargs=argparse.REMAINDER)
    commands.add_parser("env", help="print the exports that make llama-cpp-python use these libraries: eval \"$(kvarn env)\"")
    bench = commands.add_parser("bench", help="decode and prefill speed at depth, cache types side by side")
    evaluation = commands.add_parser("eval", help="how far each cache type takes a model away from f16")
    from . import bench as bench_module
    from . import demo as demo_module
    from . import evaluation as evaluation_module
    demo_module.add_arguments(demo)
    bench_module.add_arguments(bench)
    evaluation_module.add_arguments(evaluation)
    args = parser.parse_args(argv)
    if args.command == "run":
        return execute(args.tool, args.arguments)
    if args.command == "env":
        return print_env()
    if args.command == "bench":
        args.words = (sys.argv[1:] if argv is None else argv)[1:]
        return bench_module.run(args)
    return (evaluation_module if args.command == "eval" else demo_module).run(args)


if __name__ == "__main__":
    sys.exit(main())
