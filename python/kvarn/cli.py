"""Console scripts: `kvarn` with its commands, and llama-cli, llama-server, ... of this install.

A command is a module with HELP, EXAMPLE, add_arguments(parser) and run(args); only the module of the command at hand is imported,
so that `kvarn --help` is instant. What a command raises becomes one line and an exit status. SPDX-License-Identifier: MIT
"""

import argparse
import importlib
import os
import sys
from pathlib import Path
from typing import Any

import kvarn

TOOLS = ("llama-cli", "llama-server", "llama-bench", "llama-perplexity", "llama-completion", "llama-batched-bench")

# command -> (module, what it is for)
COMMANDS = {
    "chat": ("chat", "talk to a model in the terminal"),
    "run": ("chat", "answer one prompt, from the command line or from a pipe"),
    "serve": ("serve", "an OpenAI-compatible server"),
    "plan": ("plan", "the largest context that fits into a GPU's or the main memory, for every cache type"),
    "demo": ("demo", "decode the same problems with f16, q4_0 and kvarn caches, and compare"),
    "bench": ("bench", "decode and prefill speed at depth, cache types side by side"),
    "eval": ("evaluation", "how far each cache type takes a model away from f16"),
    "doctor": ("doctor", "which libraries, devices and kernels are in use, and what makes them slow"),
    "patch": ("patch", "put KVarN into a llama.cpp checkout of your own, and take it out again"),
    "tool": ("", "run a bundled tool: " + ", ".join(TOOLS)),
    "env": ("", "print the exports that make any llama-cpp-python use these libraries: eval \"$(kvarn env)\""),
    "completion": ("completion", "print a completion script for bash, zsh or fish"),
}

EPILOG = """examples:
  kvarn plan model.gguf --vram 24G        which cache type leaves room for how much context
  kvarn chat model.gguf --kv kvarn        keys in 4 bits, values in 2
  kvarn chat --help                       every command explains itself

exit status: 0 done, 1 refused or failed (one line says why), 2 wrong usage, 130 interrupted
"""

EXAMPLES = {
    "demo": "example:\n  kvarn demo --quick\n  kvarn demo --model model.gguf --caches f16,kvarn",
    "bench": "example:\n  kvarn bench --model model.gguf --depths 0,4096 --caches f16,q8_0,kvarn",
    "eval": "example:\n  kvarn eval model.gguf --caches q8_0,kvarn4/kvarn2 --out report",
    "tool": "example:\n  kvarn tool llama-bench -m model.gguf -ctk kvarn4 -ctv kvarn2 -fa 1",
    "env": "example:\n  eval \"$(kvarn env)\" && python my_llama_cpp_program.py",
}


class Version(argparse.Action):
    """--version; finding out takes longer than everything else that --help needs."""

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> None:
        print(f"kvarn {kvarn.__version__}")
        parser.exit()


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
        import subprocess

        return subprocess.call([str(program), *arguments])
    try:
        os.execv(program, [name, *arguments])
    except OSError as error:
        return fail(f"cannot run {program}: {error.strerror}")


def tool() -> int:
    """Entry point of llama-cli and its kin: which one is decided by the name it was called by."""
    return execute(Path(sys.argv[0]).stem, sys.argv[1:])


def print_env() -> int:
    import shlex

    folder = shlex.quote(str(kvarn.lib_path().resolve()))
    print(f"export LLAMA_CPP_LIB_PATH={folder}\nexport MTMD_CPP_LIB={folder}")
    return 0


def command_module(name: str) -> Any:
    """The module of a command; None for the ones that live here."""
    module = COMMANDS[name][0]
    return importlib.import_module(f"kvarn.{module}") if module else None


def fill(command: argparse.ArgumentParser, name: str) -> None:
    """Arguments and examples of one command."""
    module = command_module(name)
    command.epilog = getattr(module, "EXAMPLE", EXAMPLES.get(name, ""))
    if name == "tool":
        command.add_argument("tool", choices=TOOLS, metavar="TOOL", help="one of " + ", ".join(TOOLS))
        command.add_argument("arguments", nargs=argparse.REMAINDER, metavar="...", help="of the tool")
    elif module is not None:
        module.add_arguments(command)


def build_parser(wanted: "set[str] | None" = None) -> argparse.ArgumentParser:
    """The parser; only the wanted commands get their arguments (None: all)."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(prog="kvarn", epilog=EPILOG, formatter_class=raw,
                                     description="KVarN key-value caches for llama.cpp: a context in a quarter of the memory.")
    parser.add_argument("--version", action=Version, nargs=0, help="show the version and exit")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, (_, text) in COMMANDS.items():
        command = commands.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".", formatter_class=raw)
        if wanted is None or name in wanted:
            fill(command, name)
    return parser


def main(argv: "list[str] | None" = None) -> int:
    words = sys.argv[1:] if argv is None else argv
    name = next((word for word in words if not word.startswith("-")), "")
    if name == "patch":          # its options may stand between its positional arguments, which subcommands cannot parse
        return int(command_module(name).main(words[words.index(name) + 1:], "kvarn patch"))
    rest: "list[str]" = []
    if name == "serve" and "--" in words:
        words, rest = words[:words.index("--")], words[words.index("--") + 1:]
    parser = build_parser({name})
    args, late = parser.parse_known_args(words)
    if late and (name != "run" or any(word.startswith("-") for word in late)):
        parser.error(f"unrecognized arguments: {' '.join(late)}; kvarn {name} --help lists what it takes")
    args.words, args.rest = words[words.index(name) + 1:] if name else [], rest
    args.late = late             # of a prompt, what stands after options
    try:
        if args.command == "tool":
            return execute(args.tool, args.arguments)
        if args.command == "env":
            return print_env()
        return int(command_module(args.command).run(args))
    except KeyboardInterrupt:
        print("\nkvarn: stopped", file=sys.stderr)
        return 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())   # python flushes once more when it ends
        return 1
    except (ImportError, OSError, RuntimeError, ValueError) as error:
        return fail(str(error).strip() or type(error).__name__)


if __name__ == "__main__":
    sys.exit(main())
