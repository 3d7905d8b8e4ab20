"""kvarn completion: a script that completes commands and options in bash, zsh or fish, made from the commands' own parsers.

SPDX-License-Identifier: MIT
"""

import argparse
from typing import Iterator, Sequence

EXAMPLE = """examples:
  kvarn completion bash >> ~/.bashrc
  kvarn completion zsh >> ~/.zshrc
  kvarn completion fish > ~/.config/fish/completions/kvarn.fish
"""
SHELLS = ("bash", "zsh", "fish")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("shell", choices=SHELLS)


def options(parser: argparse.ArgumentParser) -> "Iterator[tuple[str, str, Sequence[str]]]":
    """(option, help, values it takes) of a command."""
    for action in parser._actions:
        for name in action.option_strings:
            if name.startswith("--"):
                yield name, (action.help or "").split(":")[0].split(" (")[0], [str(choice) for choice in action.choices or ()]
        if not action.option_strings and action.choices:
            for choice in action.choices:
                yield str(choice), "", ()


def commands() -> "dict[str, argparse.ArgumentParser]":
    from .cli import build_parser

    for action in build_parser()._actions:
        if isinstance(action, argparse._SubParsersAction):
            return dict(action.choices)
    return {}


def bash() -> str:
    cases = "\n".join(f"        {name}) words=\"{' '.join(option for option, _, _ in options(parser))}\" ;;"
                      for name, parser in commands().items())
    return ("_kvarn() {\n"
            "    local words current=\"${COMP_WORDS[COMP_CWORD]}\"\n"
            "    case \"${COMP_CWORD}:${COMP_WORDS[1]}\" in\n"
            f"        1:*) words=\"{' '.join(commands())} --help --version\" ;;\n"
            "    esac\n"
            "    [ \"$COMP_CWORD\" -gt 1 ] && case \"${COMP_WORDS[1]}\" in\n"
            f"{cases}\n"
            "    esac\n"
            "    COMPREPLY=($(compgen -W \"$words\" -- \"$current\"))\n"
            "}\n"
            "complete -o default -F _kvarn kvarn\n")


def zsh() -> str:
    return "autoload -U +X bashcompinit && bashcompinit\n" + bash()


def fish() -> str:
    from .cli import COMMANDS

    out = ["complete -c kvarn -n __fish_use_subcommand -f -l help", "complete -c kvarn -n __fish_use_subcommand -f -l version"]
    for name, parser in commands().items():
        text = COMMANDS[name][1].split(":")[0].replace("'", "")
        out.append(f"complete -c kvarn -n __fish_use_subcommand -f -a {name} -d '{text}'")
        for option, what, values in options(parser):
            kind = f"-l {option[2:]}" if option.startswith("--") else f"-a {option}"
            more = f" -x -a '{' '.join(values)}'" if values else ""
            what = what.replace("'", "").replace("%", "")
            about = f" -d '{what}'" if what else ""
            out.append(f"complete -c kvarn -n '__fish_seen_subcommand_from {name}' {kind}{more}{about}")
    return "\n".join(out) + "\n"


def run(args: argparse.Namespace) -> int:
    print({"bash": bash, "zsh": zsh, "fish": fish}[args.shell](), end="")
    return 0
