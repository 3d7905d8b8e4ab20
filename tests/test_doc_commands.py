"""test_doc_commands.py - what README, docs and help texts tell people to type works: commands are understood, Python runs.

SPDX-License-Identifier: MIT
"""

import re
import shlex
from pathlib import Path

import pytest

from kvarn import cli

ROOT = Path(__file__).resolve().parent.parent
DOCUMENTS = [ROOT/"README.md", ROOT/"CONTRIBUTING.md", *sorted((ROOT/"docs").glob("*.md"))]


def code(path: Path, *languages: str) -> "list[str]":
    """Blocks of a document: fenced ones of these languages, and indented ones."""
    text = path.read_text(encoding="utf-8")
    fenced = [body for language, body in re.findall(r"^```(\w*)\n(.*?)^```", text, re.M | re.S) if language in languages]
    indented = re.findall(r"(?:^    .*\n)+", text, re.M) if "" in languages else []
    return fenced + indented


def commands(text: str) -> "list[str]":
    """Lines that begin with kvarn and a command of it; without comments and without what surrounds them in a shell."""
    lines = [re.split(r"\s{2,}[#a-z]|  #", line.strip())[0] for line in text.splitlines()]
    return [line for line in lines if re.match(r"(?:[\w ]+\| )?(?:\$ )?kvarn (?:%s)\b" % "|".join(cli.COMMANDS), line)]


def written() -> "list[tuple[str, str]]":
    """(where, command line)"""
    shells = ("", "sh", "bash", "console")
    found = [(path.name, line) for path in DOCUMENTS for block in code(path, *shells) for line in commands(block)]
    found += [(path.name, line) for path in DOCUMENTS for span in re.findall(r"`(kvarn [^`]+)`", path.read_text())
              for line in commands(span)]
    parser = cli.build_parser()
    found += [("kvarn --help", line) for line in commands(parser.epilog)]
    for name, command in parser._subparsers._group_actions[0].choices.items():
        found += [(f"kvarn {name} --help", line) for line in commands(command.epilog)]
    return found


def test_examples_are_found():
    names = {where for where, _ in written()}
    assert "README.md" in names and {f"kvarn {name} --help" for name in cli.COMMANDS} <= names | {"kvarn env --help"}


@pytest.mark.parametrize("where, line", written(), ids=[f"{where}: {line}" for where, line in written()])
def test_command_is_understood(where, line):
    """Parsed by the command's own parser: options that do not exist, or lack a value, end it."""
    words = shlex.split(re.sub(r"[>|&].*$", "", line.split("| ")[-1].replace("...", "")))[1:]
    words = words[:words.index("--")] if "--" in words else words
    if words[:1] == ["patch"]:
        from argparse import ArgumentParser

        from kvarn import patch

        parser = ArgumentParser()
        patch.add_arguments(parser)
        assert parser.parse_intermixed_args(words[1:]).action
        return
    if words[1:] == ["--help"] or len(words) == 1 and words[0] in ("chat", "run", "serve", "plan", "tool", "completion"):
        return                                             # only named
    args, late = cli.build_parser({words[0]}).parse_known_args(words)
    assert args.command == words[0] and (not late or words[0] == "run")


@pytest.mark.llama
@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_python_of_the_documents_runs(path, tiny, capsys, monkeypatch):
    for block in code(path, "python"):
        block = block.replace("model.gguf", tiny()).replace("max_tokens=512", "max_tokens=8")
        exec(compile(block, path.name, "exec"), {})
        if "print" in block:
            assert capsys.readouterr().out.strip()
