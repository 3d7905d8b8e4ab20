"""test_patches.py - the patch series is small, adds no file, goes in all or nothing and comes out without a trace.

SPDX-License-Identifier: MIT
"""

import shutil
import subprocess
from pathlib import Path

import pytest

from kvarn import patch, upstream

ROOT = Path(__file__).resolve().parent.parent
SOURCE = ROOT / "ggml-kvarn"
MAX_ADDED, MAX_ADDED_PER_PATCH = 300, 150
CALL_SITE_WINDOW = 8  # an added line without "kvarn" must be that close to one with it

PRISTINE = {"ggml/CMakeLists.txt": "project(ggml)\n",
            "src/a.cpp": "".join(f"line {n}\n" for n in range(1, 41)),
            "src/b.cpp": "one\ntwo\nthree"}   # no line end at the end of the file


def series():
    return patch.read_series(SOURCE)


def snapshot(tree: Path) -> dict:
    return {path.relative_to(tree).as_posix(): (path.read_bytes(), path.stat().st_mode)
            for path in sorted(tree.rglob("*")) if path.is_file() and ".git" not in path.parts}


# ---------------------------------------------------------------------------------------------- the real series


def test_series_names_every_patch_without_gaps():
    names = (SOURCE / "patches" / "series").read_text().split()
    assert names == sorted(path.name for path in (SOURCE / "patches").glob("*.patch"))
    assert [int(name[:4]) for name in names] == list(range(1, len(names) + 1))


def test_patches_are_small_and_add_no_file():
    for one in series():  # read_patch() refuses new files, deletions and renames
        assert one.files, f"{one.name} edits nothing"
        assert one.added <= MAX_ADDED_PER_PATCH, f"{one.name} adds {one.added} lines, at most {MAX_ADDED_PER_PATCH}"
    total = sum(one.added for one in series())
    assert total <= MAX_ADDED, f"the series adds {total} lines, at most {MAX_ADDED}: move code into ggml-kvarn/"


def test_every_added_line_belongs_to_a_call_site():
    for one in series():
        for file in one.files:
            for hunk in file.hunks:
                added = [line[1:].decode() for line in hunk.lines if line[:1] == b"+"]
                for number, line in enumerate(added):
                    near = added[max(0, number - CALL_SITE_WINDOW):number + CALL_SITE_WINDOW + 1]
                    counts = "_COUNT ==" in line  # upstream asserts the number of ops and types
                    assert counts or any("kvarn" in other.lower() for other in near), \
                        f"{one.name}: {file.path} {hunk.header}: '{line.strip()}' has no kvarn near it"


def test_table_is_up_to_date():
    assert (SOURCE / "patches" / "README.md").read_text() == patch.readme(SOURCE), \
        "patches/README.md is stale; next: python -m kvarn.patch refresh TREE"


def test_pinned_version_is_written_once():
    pin = upstream.read_pin(SOURCE)
    text = (ROOT / "pyproject.toml").read_text()
    assert f"llama-cpp-python=={pin.version}" in text


@pytest.mark.slow
def test_real_tree_apply_and_revert(tmp_path):
    pin, tree = upstream.read_pin(SOURCE), tmp_path / "llama.cpp"
    if not (upstream.cache_dir() / pin.archive).is_file():
        pytest.skip(f"{pin.archive} is not in the cache folder; `make setup` fetches it")
    upstream.prepare(tree, pin)
    before = snapshot(tree)
    assert "files patched" in patch.apply(tree, SOURCE)
    assert snapshot(tree) != before
    assert "already patched" in patch.apply(tree, SOURCE)
    assert "with this series" in patch.check(tree, SOURCE)
    patch.revert(tree)
    assert snapshot(tree) == before
    victim = tree / series()[0].files[0].path
    victim.write_bytes(victim.read_bytes()[:-20])
    damaged = snapshot(tree)
    with pytest.raises(upstream.Failure, match="next:"):
        patch.apply(tree, SOURCE)
    assert snapshot(tree) == damaged


# ------------------------------------------------------------------------------------- the tool, on a small series


def write_tree(tree: Path, files: dict) -> None:
    for name, text in files.items():
        (tree / name).parent.mkdir(parents=True, exist_ok=True)
        (tree / name).write_bytes(text.encode())


def git(tree: Path, *words: str) -> str:
    settings = ["-c", "user.name=t", "-c", "user.email=t@example.org", "-c", "core.autocrlf=false"]
    return subprocess.run(["git", "-C", str(tree), *settings, *words], check=True, capture_output=True, text=True).stdout.strip()


@pytest.fixture
def small(tmp_path):
    """(pristine tree with a stamp, ggml-kvarn folder with two patches and one overlay file)"""
    if shutil.which("git") is None:
        pytest.skip("git is not installed, and `patch refresh` works on a git tree")
    work, source, tree = tmp_path / "work", tmp_path / "repo" / "ggml-kvarn", tmp_path / "tree"
    write_tree(work, PRISTINE)
    git(work.parent, "init", "-q", str(work))
    git(work, "add", "-A")
    git(work, "commit", "-qm", "pristine")
    base = git(work, "rev-parse", "HEAD")
    lines = PRISTINE["src/a.cpp"].splitlines(keepends=True)
    lines[4:5] = ["kvarn 5a\n", "kvarn 5b\n"]
    lines[30:30] = ["kvarn 31\n"]
    (work / "src/a.cpp").write_text("".join(lines))
    git(work, "commit", "-qam", "a : call kvarn\n\nBecause the test says so. It has two sentences.")
    (work / "src/a.cpp").write_text("kvarn 0\n" + "".join(lines))
    (work / "src/b.cpp").write_text("one\nkvarn\ntwo\nthree")
    git(work, "commit", "-qam", "b : call kvarn too")
    write_tree(source, {"upstream.txt": f"package llama-cpp-python==0\nsha256 0\ncommit {base}\n",
                        "overlay.txt": "ggml-kvarn/new.c -> src/new.c\n", "new.c": "int kvarn;\n"})
    patch.refresh(work, source, None)
    write_tree(tree, {**PRISTINE, upstream.STAMP: f"{base} test\n"})
    return tree, source, work


def test_refresh_is_repeatable(small):
    tree, source, work = small
    first = snapshot(source)
    patch.refresh(work, source, None)
    assert snapshot(source) == first
    assert "| 0001-a-call-kvarn | Because the test says so | 1 | 3 | 1 |" in (source / "patches/README.md").read_text()


def test_apply_revert_is_byte_identical(small):
    tree, source, _ = small
    before = snapshot(tree)
    patch.apply(tree, source)
    assert (tree / "src/b.cpp").read_text() == "one\nkvarn\ntwo\nthree"
    assert (tree / "src/a.cpp").read_text().startswith("kvarn 0\nline 1\n")
    assert (tree / "src/new.c").is_file()
    applied = snapshot(tree)
    assert "already patched" in patch.apply(tree, source)
    assert "up to date" in patch.apply(tree, source, update=True)
    assert snapshot(tree) == applied
    patch.revert(tree)
    assert snapshot(tree) == before


def test_same_result_as_git_apply(small):
    tree, source, work = small
    patch.apply(tree, source)
    for name in ("src/a.cpp", "src/b.cpp"):
        assert (tree / name).read_bytes() == (work / name).read_bytes()


def test_update_rewrites_only_what_changed(small):
    tree, source, _ = small
    patch.apply(tree, source)
    (source / "new.c").write_text("long kvarn;\n")
    with pytest.raises(upstream.Failure, match="apply --update"):
        patch.apply(tree, source)
    stamps = {name: (tree / name).stat().st_mtime_ns for name in ("src/a.cpp", "src/b.cpp")}
    assert "1 written" in patch.apply(tree, source, update=True)
    assert (tree / "src/new.c").read_text() == "long kvarn;\n"
    assert stamps == {name: (tree / name).stat().st_mtime_ns for name in stamps}


def test_update_to_a_shorter_series(small):
    tree, source, _ = small
    before = snapshot(tree)
    patch.apply(tree, source)
    (source / "patches/series").write_text("0001-a-call-kvarn.patch\n")
    (source / "overlay.txt").write_text("")
    patch.apply(tree, source, update=True)
    assert (tree / "src/b.cpp").read_text() == PRISTINE["src/b.cpp"]
    assert not (tree / "src/new.c").exists()
    patch.revert(tree)
    assert snapshot(tree) == before


@pytest.mark.parametrize("damage, said", [
    (("src/b.cpp", "two", "TWO"), r"conflict in src/b.cpp, hunk @@ .*0002"),
    (("src/a.cpp", "line 20", "line xx"), "src/a.cpp differs from the pinned version"),
    (("src/a.cpp", "line 5\n", ""), r"conflict in src/a.cpp, hunk @@ .*0001"),
])
def test_conflict_changes_nothing(small, damage, said):
    tree, source, _ = small
    name, old, new = damage
    (tree / name).write_text((tree / name).read_text().replace(old, new))
    before = snapshot(tree)
    with pytest.raises(upstream.Failure, match=said) as refusal:
        patch.apply(tree, source)
    assert "next: " in str(refusal.value)
    assert snapshot(tree) == before


def test_wrong_pin_is_refused(small):
    tree, source, work = small
    (tree / upstream.STAMP).write_text("f00ba4" + "0"*34 + " test\n")
    before = snapshot(tree)
    with pytest.raises(upstream.Failure, match="is at commit f00ba4000, the patches are for"):
        patch.apply(tree, source)
    assert snapshot(tree) == before
    with pytest.raises(upstream.Failure, match="is at commit"):
        patch.check(work, source)


def test_foreign_overlay_file_is_refused(small):
    tree, source, _ = small
    (tree / "src/new.c").write_text("somebody else's\n")
    before = snapshot(tree)
    with pytest.raises(upstream.Failure, match="already has a file src/new.c"):
        patch.apply(tree, source)
    assert snapshot(tree) == before


def test_edits_after_patching_are_kept(small):
    tree, source, _ = small
    patch.apply(tree, source)
    (tree / "src/a.cpp").write_text("mine\n")
    with pytest.raises(upstream.Failure, match="was edited after the patches went in"):
        patch.revert(tree)
    assert (tree / "src/a.cpp").read_text() == "mine\n"
    patch.revert(tree, discard=True)
    assert (tree / "src/a.cpp").read_text() == PRISTINE["src/a.cpp"]


def test_patch_with_a_new_file_is_refused(small):
    tree, source, work = small
    (work / "src/c.cpp").write_text("kvarn\n")
    git(work, "add", "-A")
    git(work, "commit", "-qm", "c : a new file")
    before = snapshot(source)
    with pytest.raises(upstream.Failure, match="new files go through overlay.txt"):
        patch.refresh(work, source, None)
    assert snapshot(source) == before


def test_edited_patch_is_refused(small):
    tree, source, _ = small
    path = source / "patches/0002-b-call-kvarn-too.patch"
    path.write_text(path.read_text().replace("+kvarn 0", "+kvarn zero"))
    with pytest.raises(upstream.Failure, match="was edited by hand"):
        patch.apply(tree, source)
    assert not (tree / patch.STAMP).exists()


def test_failures_are_one_readable_message(small, capsys):
    tree, source, _ = small
    assert patch.main(["revert", str(tree), "--source", str(source)]) == 1
    assert "is not patched" in capsys.readouterr().err
    assert patch.main(["apply", str(tree / "src"), "--source", str(source)]) == 1
    assert "is no llama.cpp tree" in capsys.readouterr().err


# ------------------------------------------------------------------------------------------------ fetching


def test_cached_archive_with_the_wrong_hash_is_not_used(tmp_path, monkeypatch):
    pin = upstream.Pin("llama-cpp-python==0", "0"*64, "0"*40)
    (tmp_path / pin.archive).write_bytes(b"not an archive")
    monkeypatch.setenv("KVARN_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(upstream.subprocess, "run", lambda *_, **__: subprocess.CompletedProcess([], 1, "no such version"))
    with pytest.raises(upstream.Failure, match="pip could not fetch llama-cpp-python==0(?s:.*)no such version"):
        upstream.fetch(pin)


def test_no_pip_says_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setenv("KVARN_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(upstream.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(upstream.Failure, match="has no pip(?s:.*)put llama_cpp_python-0.tar.gz"):
        upstream.fetch(upstream.Pin("llama-cpp-python==0", "0"*64, "0"*40))


def test_override_folder_must_be_llama_cpp(tmp_path):
    with pytest.raises(upstream.Failure, match="is no llama.cpp tree"):
        upstream.prepare(tmp_path / "tree", upstream.Pin("a==0", "0", "0"), tmp_path)


def test_override_folder_is_copied_not_changed(small, tmp_path):
    tree, source, work = small
    before = snapshot(work)
    copy = tmp_path / "copy"
    upstream.prepare(copy, upstream.read_pin(source), work)
    assert (copy / "src/a.cpp").is_file() and upstream.commit_of(copy) == upstream.commit_of(work)
    assert snapshot(work) == before
