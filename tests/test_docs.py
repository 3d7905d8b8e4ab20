"""test_docs.py - the layer rules hold, links lead somewhere, and no file says what it should not.

SPDX-License-Identifier: MIT
"""

import ast
import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
CODE = (".c", ".cpp", ".h", ".cu", ".cuh", ".metal")
MAX_LINES = 600
MAX_WIDTH = 130


def tracked() -> "list[Path]":
    """Files of the checkout: git's list where there is git, else all but build products."""
    done = subprocess.run(["git", "-C", str(ROOT), "ls-files"], capture_output=True, text=True)
    if done.returncode == 0 and done.stdout:
        return [ROOT / name for name in done.stdout.splitlines() if (ROOT / name).is_file()]
    skip = {"build", ".venv", ".git", "dist", "__pycache__"}
    return [path for path in ROOT.rglob("*") if path.is_file() and not skip & set(path.relative_to(ROOT).parts)]


def texts(*suffixes: str) -> "list[tuple[Path, str]]":
    return [(path.relative_to(ROOT), path.read_text(encoding="utf-8")) for path in tracked() if path.suffix in suffixes]


def test_format_header_includes_nothing_and_has_no_pointer():
    text = (ROOT / "ggml-kvarn/kvarn-format.h").read_text()
    code = [line.split("//")[0] for line in text.splitlines()]
    assert not [line for line in code if "#include" in line]
    assert not [line for line in code if re.search(r"\w\s+\*+\s*\w+\s*[,;)=]", line)]


def test_ggml_headers_only_in_glue():
    allowed = re.compile(r"(-ggml\.(c|cpp|cu|h)|kvarn-(graph|cache)[-a-z]*\.(c|cpp|h))$")
    for path, text in texts(*CODE):
        found = re.findall(r'#include\s+[<"]((?:ggml|llama)[^">]*)[">]', text)
        is_caller = path.parts[:2] == ("tests", "fuzz")   # of llama.cpp's public API
        assert not found or is_caller or allowed.search(path.name), f"{path} includes {found[0]}; only the glue files know ggml"


def test_reference_imports_numpy_only():
    path = ROOT / "python/kvarn/reference.py"
    imports = re.findall(r"^\s*(?:import|from)\s+([\w.]+)", path.read_text(), re.MULTILINE)
    assert set(imports) <= {"numpy", "__future__"}, imports


def test_scripts_that_cmake_calls_need_only_the_standard_library():
    for name in ("upstream.py", "patch.py"):
        text = (ROOT / "python/kvarn" / name).read_text()
        imports = {found.split(".")[0] for found in re.findall(r"^\s*(?:import|from)\s+([\w.]+)", text, re.MULTILINE)}
        assert imports <= {"argparse", "gzip", "hashlib", "importlib", "json", "os", "pathlib", "re", "shutil", "subprocess",
                           "sys", "tarfile", "tempfile", "time", "typing", "upstream", ""}, f"{name}: {imports}"


def test_files_are_short_and_plain():
    for path, text in texts(".py", ".txt", ".toml", *CODE):
        lines = text.splitlines()
        assert len(lines) <= MAX_LINES, f"{path} has {len(lines)} lines, at most {MAX_LINES}: split it by subject"
        for number, line in enumerate(lines, 1):
            assert len(line) <= MAX_WIDTH + 20, f"{path}:{number} has {len(line)} columns"
            assert line.isascii(), f"{path}:{number} is not ASCII: {line.strip()}"
            assert "\t" not in line, f"{path}:{number} has a tab"


def test_nothing_unfinished():
    words = re.compile(r"\b(TO" + r"DO|FIX" + r"ME|X" + r"XX)\b(?!\(#\d+\))")
    for path, text in texts(".py", ".md", ".toml", ".txt", *CODE):
        for number, line in enumerate(text.splitlines(), 1):
            assert not words.search(line), f"{path}:{number}: {line.strip()}: needs an issue number, or to be done"


def test_no_machine_in_a_file():
    """No path of somebody's machine, no host of a package registry: pip's own configuration decides."""
    banned = re.compile(r"(?<![\w.])/(home|root|Users|work|opt|tmp)/\w|pyp" r"i\.org|files\.pythonhos" r"ted")
    for path, text in texts(".py", ".md", ".toml", ".txt", ".patch", "", *CODE):
        for number, line in enumerate(text.splitlines(), 1):
            if path.name != "test_docs.py":
                assert not banned.search(line), f"{path}:{number}: {line.strip()}"


def test_first_line_names_the_file():
    for path, text in texts(*CODE):
        assert text.startswith(f"// {path.name} - "), f"{path}: the first line is '// {path.name} - one sentence'"
        assert "SPDX-License-Identifier: MIT" in text, f"{path} has no license tag"


def test_links_lead_somewhere():
    for path, text in texts(".md"):
        for target in re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", text):
            if not re.match(r"[a-z]+:", target):
                assert (ROOT / path.parent / target).exists(), f"{path} links to {target}, which does not exist"


def test_readme_says_what_a_stranger_needs():
    text = (ROOT / "README.md").read_text()
    for needed in ("make demo", "make test", "--cache-type-k kvarn", "from kvarn import Llama", "Not: ", "apt-get install"):
        assert needed in text, f"README.md does not say '{needed}'"
    assert len(text.splitlines()) <= 150
    screen = "\n".join(text.splitlines()[:30])
    assert "| f16 |" in screen and "](docs/first.png)" in screen and "\n    make demo " in screen, "no longer on the first screen"


def test_every_page_is_listed():
    index = (ROOT/"docs/README.md").read_text()
    assert not [path.name for path in (ROOT/"docs").glob("*.md") if path.name != "README.md" and f"({path.name})" not in index]


def test_markers_in_the_readme_are_pairs():
    text = (ROOT / "README.md").read_text()
    for name in re.findall(r"<!-- (\w+): begin", text):
        assert f"<!-- {name}: end -->" in text


@pytest.mark.slow
def test_ruff_is_silent():
    ruff = pytest.importorskip("ruff", reason="ruff is not installed: `make setup` does it")
    from ruff.__main__ import find_ruff_bin

    assert ruff
    done = subprocess.run([find_ruff_bin(), "check", str(ROOT)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


@pytest.mark.slow
def test_types_are_strict():
    """mypy --strict, as pyproject.toml has it."""
    if importlib.util.find_spec("mypy") is None:
        assert not os.environ.get("CI"), "mypy is missing: make's list of packages installs it"
        pytest.skip("mypy is not installed: `make test` does it")
    done = subprocess.run([sys.executable, "-m", "mypy", "--cache-dir", os.devnull], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_public_names_have_docstrings():
    """What `import kvarn` offers, and what stands behind it."""
    missing = []
    for name in ("cache_size", "codec", "context", "gguf_header", "kv_info", "kvtype", "library", "llama", "log", "model_shape",
                 "reference", "server"):
        tree = ast.parse((ROOT/f"python/kvarn/{name}.py").read_text())
        assert ast.get_docstring(tree), name
        nodes = [node for node in tree.body if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and node.name[0] != "_"]
        for node in [node for node in nodes if isinstance(node, ast.ClassDef)]:
            nodes += [inner for inner in node.body if isinstance(inner, ast.FunctionDef) and inner.name[0] != "_"]
        missing += [f"{name}.{node.name}" for node in nodes if not ast.get_docstring(node)]
    assert not missing
