"""test_doc_commands.py - every command of README and docs is executed: here, by another test, or it stands below with the reason.

    cheap ones     run as they are, in a folder with a tiny model.gguf; WITH makes the others short
    ELSEWHERE      what a test of another file runs, or what needs a GPU, a Mac, a container, root or hours

Help texts' examples and commands inside a sentence are parsed by the program's own parser. SPDX-License-Identifier: MIT
"""

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from kvarn import cli

ROOT = Path(__file__).resolve().parent.parent
DOCUMENTS = [*(ROOT/name for name in ("README.md", "CONTRIBUTING.md", "cuda/README.md", "metal/README.md")),
             *sorted((ROOT/"docs").glob("*.md"))]
SHELLS = ("", "sh", "bash", "console")
PROGRAMS = r"""kvarn|make|gmake|pip|python3?|\.venv/bin/python|pytest|cmake|docker|git|llama-[a-z-]+|test-backend-ops|apt-get|
               brew|nvcc|curl|\./\w[\w-]*|\.[ ]\.venv\S*"""
PROGRAM = re.compile(rf"""(?:[A-Z_]+=(?:"[^"]*"|\S*)[ ])*(?:[\w ]+\|[ ])?(?:\$[ ])?(?:{PROGRAMS})(?:[ ]|$)""", re.X)
LIMIT = 300      # seconds for one command

# what is added so that a command ends soon; of two options argparse takes the last
WITH = {
    "kvarn demo --model": "--tokens 8 --threads 2", "kvarn run": "--max-tokens 8", "git diff": "--max-tokens 8",
    "kvarn bench": "--rounds 1 --tokens 2 --prompt 0 --depths 0,256", "kvarn chat": "--ctx 1024",
    "kvarn eval model": "--ctx 512 --chunks 1 --decode 32 --greedy 16", "llama-cli": "-st -p hello -n 8 -c 1024",
}

# (command, who runs it, or why nobody does)
ELSEWHERE = [
    (r"make (demo|test|setup)$", "this is how the tests themselves are set up and run (.ci/run)"),
    (r"\. \.venv/bin/activate$", "the tests run inside it"),
    (r"(\.venv/bin/python -m )?pytest tests/", "make test runs every test"),
    (r"python -m mypy$", "tests/test_docs.py"),
    (r"make sdist$|pip install --no-build-isolation --no-deps dist/", "tests/test_packaging.py builds it and what is inside"),
    (r"kvarn serve ", "tests/test_server.py, tests/test_web_page.py, tests/test_llama_ui.py start it and talk to it"),
    (r"curl ", "tests/test_web_page.py asks a running server the same"),
    (r"kvarn demo( --quick)?$", "make demo; tests/test_embedded.py runs problems of the same families"),
    (r"kvarn eval( --.*)?$", "minutes; tests/test_evaluation.py, with a smaller model"),
    (r"kvarn patch (apply|revert) TREE|git am PATH|python -m kvarn\.(upstream|patch) ", "tests/test_patches.py"),
    (r"python tests/bench/documents.py", "tests/test_documents.py compares what it writes"),
    (r"python tests/bench/(ablation|shift)\.py", "tests/test_quality.py runs a small study; shift.py needs a text model"),
    (r"test-backend-ops -o KVARN$", "tests/test_llama_upstream.py; on another backend it needs that device"),
    (r"make soak$", "half an hour; tests/test_soak.py runs two minutes of it"),
    (r"(CMAKE_ARGS=(\"[^\"]*\"|\S+) )?pip (install|wheel) .*(-e )?\.$|cmake -B build && cmake --build build$",
     "a build of llama.cpp, ten minutes: make test has done it with the same CMakeLists.txt"),
    (r"CMAKE_ARGS=\"?-DGGML_CUDA=on\"? ", "needs nvcc and an NVIDIA GPU"),
    (r"python cuda/bench/|make test ARGS=\"-m cuda\"$", "needs an NVIDIA GPU"),
    (r"gmake test|KVARN_METAL_TINY=", "needs a Mac"),
    (r"docker ", "needs Docker, the build a network, and the run a GPU; tests/test_packaging.py reads the container file"),
    (r"apt-get install |brew install ", "needs root"),
    (r"pip (cache remove|install '\.\[server\]')", "would change the environment that the tests run in"),
]


def blocks(path: Path, *languages: str) -> "list[str]":
    """Blocks of a document: fenced ones of these languages, and indented ones."""
    text = path.read_text(encoding="utf-8")
    fenced = re.findall(r"^```(\w*)\n(.*?)^```", text, re.M | re.S)
    rest = re.sub(r"^```.*?^```", "", text, flags=re.M | re.S)
    return [body for language, body in fenced if language in languages] + (re.findall(r"(?:^    .*\n)+", rest, re.M)
                                                                          if "" in languages else [])


def plain(line: str) -> str:
    """A line of a block without its comment and without what explains it three blanks later."""
    return re.split(r"\s{2,}[#a-z]|\s#\s", line.strip())[0].strip().removeprefix("$ ")


def written() -> "list[tuple[str, str]]":
    """(document, command) of every line of a block that begins with a program, and of every make, pip, .. inside a sentence."""
    found = []
    for path in DOCUMENTS:
        name = str(path.relative_to(ROOT))
        lines = [plain(line) for block in blocks(path, *SHELLS) for line in block.splitlines()]
        lines += re.findall(r"`([^`\n]+)`", re.sub(r"^```.*?^```", "", path.read_text(encoding="utf-8"), flags=re.M | re.S))
        found += [(name, line) for line in lines if PROGRAM.match(line) and " .. " not in line and line.split()[-1] != "|"]
    return list(dict.fromkeys((name, line) for name, line in found if " " in line))


def elsewhere(line: str) -> "str | None":
    return next((reason for form, reason in ELSEWHERE if re.match(form, line)), None)


def is_kvarn(line: str) -> bool:
    return re.match(r"(?:[\w ]+\| )?kvarn (?:%s)\b" % "|".join(cli.COMMANDS), line) is not None


def is_named_only(line: str) -> bool:
    """`kvarn plan` in a sentence."""
    return bool(re.fullmatch(r"kvarn (?:%s)(?: --(?:vram 24G|help|kv kvarn))?" % "|".join(cli.COMMANDS), line)) and \
        line.split()[1] not in ("doctor", "demo", "eval")


def runs() -> "list[tuple[str, str]]":
    """Commands that this file executes, each once."""
    lines = dict((line, name) for name, line in written() if not elsewhere(line) and not is_named_only(line))
    return [(name, line) for line, name in lines.items()]


def test_examples_are_found():
    names = {name for name, _ in written()}
    pages = ("quickstart", "benchmarks", "choosing", "porting")
    assert {"README.md", "CONTRIBUTING.md", "cuda/README.md", "metal/README.md", *(f"docs/{page}.md" for page in pages)} <= names
    assert len(runs()) >= 15


@pytest.mark.parametrize("name, line", written(), ids=[f"{name}: {line}" for name, line in written()])
def test_every_command_is_executed_somewhere(name, line):
    assert elsewhere(line) or is_named_only(line) or is_kvarn(line) or line.startswith("llama-cli -m model.gguf"), \
        f"{name}: nothing executes `{line}`: let it be cheap enough to run here, or say in ELSEWHERE who does or why nobody can"


def test_no_reason_is_left_over():
    lines = [line for _, line in written()]
    unused = [form for form, _ in ELSEWHERE if not any(re.match(form, line) for line in lines)]
    assert not unused


@pytest.mark.llama
@pytest.mark.tools
@pytest.mark.slow
@pytest.mark.parametrize("name, line", runs(), ids=[f"{name}: {line}" for name, line in runs()])
def test_command_runs(name, line, tiny, tmp_path):
    """As it stands in the document, in a shell."""
    shutil.copy(tiny(), tmp_path/"model.gguf")
    (tmp_path/"wiki.test.raw").write_text("The quick brown fox jumps over the lazy dog.\n"*400)
    change = "git init -q . && git add *.raw && git -c user.name=a -c user.email=a@b commit -qm a && echo b >> wiki.test.raw"
    subprocess.run(change, shell=True, cwd=tmp_path, check=True)
    extra = next((more for start, more in sorted(WITH.items(), key=lambda entry: -len(entry[0])) if line.startswith(start)), "")
    env = {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}", "HOME": str(tmp_path)}
    done = subprocess.run(["bash", "-c", f"set -o pipefail; {line} {extra}"], cwd=tmp_path, env=env, input="hello\n", text=True,
                          capture_output=True, timeout=LIMIT)
    assert done.returncode == 0, f"{line}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}"
    if ">>" not in line:
        assert done.stdout.strip()


# --- examples of help texts


def examples() -> "list[tuple[str, str]]":
    parser = cli.build_parser()
    found = [("kvarn --help", plain(line)) for line in parser.epilog.splitlines()]
    for name, command in parser._subparsers._group_actions[0].choices.items():
        found += [(f"kvarn {name} --help", plain(line)) for line in command.epilog.splitlines()]
    return [(where, line) for where, line in found if is_kvarn(line)]


def test_every_command_has_an_example():
    assert {f"kvarn {name} --help" for name in cli.COMMANDS} <= {where for where, _ in examples()} | {"kvarn env --help"}


PARSED = examples() + [(name, line) for name, line in written() if is_kvarn(line)]


@pytest.mark.parametrize("where, line", PARSED, ids=[f"{where}: {line}" for where, line in PARSED])
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
    if words[1:] == ["--help"] or is_named_only(line):
        return
    args, late = cli.build_parser({words[0]}).parse_known_args(words)
    assert args.command == words[0] and (not late or words[0] == "run")


@pytest.mark.llama
@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_python_of_the_documents_runs(path, tiny, capsys, monkeypatch):
    for block in blocks(path, "python"):
        block = block.replace("model.gguf", tiny()).replace("max_tokens=512", "max_tokens=8")
        exec(compile(block, path.name, "exec"), {})
        if "print" in block:
            assert capsys.readouterr().out.strip()
