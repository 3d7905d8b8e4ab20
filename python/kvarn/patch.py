"""Puts KVarN into a llama.cpp tree and takes it out again: our files (overlay.txt), then the call sites (patches/).

    python -m kvarn.patch apply TREE      all or nothing; --update brings an already patched tree up to date
    python -m kvarn.patch check TREE      says whether TREE is patched, or would take the patches; changes nothing
    python -m kvarn.patch revert TREE     the pristine tree again, byte for byte
    python -m kvarn.patch refresh TREE    makes patches/ from the commits of a git tree, one patch per commit
    python -m kvarn.patch table           prints the table of patches/README.md

Strict on purpose: a patch goes in only where git's blob hash says that the file is the pinned one, and what comes out must have
the hash the patch names. Neither git nor patch is needed, except for refresh. Standard library only: CMake calls this file.

SPDX-License-Identifier: MIT
"""

import argparse
import hashlib
import json
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

if __package__:
    from .upstream import Failure, Pin, commit_of, read_pin, source_dir
else:  # run as a file, by CMake
    from upstream import Failure, Pin, commit_of, read_pin, source_dir  # type: ignore[import-not-found, no-redef]

EXAMPLE = """examples:
  kvarn patch check ~/llama.cpp      would it go in? changes nothing
  kvarn patch apply ~/llama.cpp      all or nothing; then build as usual, with -ctk kvarn4 -ctv kvarn2
  kvarn patch revert ~/llama.cpp     the pristine tree again, byte for byte
"""
STAMP = ".kvarn-patched"
BACKUP = ".kvarn-pristine"
HUNK = re.compile(r"@@ -(\d+)(?:,(\d+))? \+(\d+)(?:,(\d+))? @@")


class Hunk(NamedTuple):
    header: str
    start: int              # first line in the pristine file, from 1
    lines: "list[bytes]"    # with their ' ', '+' or '-' and their line end


class FilePatch(NamedTuple):
    path: str
    old_blob: str
    new_blob: str
    hunks: "list[Hunk]"


class Patch(NamedTuple):
    name: str
    subject: str
    body: str
    files: "list[FilePatch]"

    @property
    def added(self) -> int:
        return sum(line[:1] == b"+" for file in self.files for hunk in file.hunks for line in hunk.lines)

    @property
    def removed(self) -> int:
        return sum(line[:1] == b"-" for file in self.files for hunk in file.hunks for line in hunk.lines)


def blob_id(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


# -------------------------------------------------------------------------------------------------- reading


def read_patch(path: Path) -> Patch:
    lines = path.read_bytes().splitlines(keepends=True)
    subject, body, files, i = "", [], [], 0
    while i < len(lines) and not lines[i].startswith(b"Subject: "):
        i += 1
    if i == len(lines):
        raise Failure(f"{path.name} has no Subject line; make patches with: python -m kvarn.patch refresh TREE")
    while lines[i].strip():
        subject += lines[i].decode().rstrip("\n")
        i += 1
    subject = re.sub(r"^Subject: (\[PATCH[^]]*\] )?", "", subject)
    while i < len(lines) and lines[i] != b"---\n" and not lines[i].startswith(b"diff --git "):
        body.append(lines[i].decode())
        i += 1
    while i < len(lines):
        line = lines[i]
        i += 1
        if line.startswith((b"new file mode", b"deleted file mode", b"rename ", b"GIT binary patch", b"old mode")):
            raise Failure(f"{path.name}: '{line.decode().strip()}': a patch only edits files; new files go through overlay.txt")
        if line.startswith(b"index "):
            old, new = line.split()[1].decode().split("..")
        elif line.startswith(b"+++ b/"):
            files.append(FilePatch(line[6:].decode().strip(), old, new, []))
        elif line.startswith(b"@@ "):
            match = HUNK.match(line.decode(errors="replace"))
            if match is None:
                raise Failure(f"{path.name}: '{line.decode(errors='replace').strip()}' is no hunk")
            n_old, n_new = int(match.group(2) or 1), int(match.group(4) or 1)
            taken = []
            while n_old or n_new:
                n_old -= lines[i][:1] in b" -"
                n_new -= lines[i][:1] in b" +"
                taken.append(lines[i])
                i += 1
            if i < len(lines) and lines[i].startswith(b"\\ No newline"):
                taken[-1] = taken[-1].rstrip(b"\n")
                i += 1
            files[-1].hunks.append(Hunk(match.group(0), int(match.group(1)), taken))
    return Patch(path.name, subject, "".join(body).strip(), files)


def read_series(source: Path) -> "list[Patch]":
    names = (source / "patches" / "series").read_text().split()
    return [read_patch(source / "patches" / name) for name in names]


def read_overlay(source: Path) -> "dict[str, Path]":
    """path inside llama.cpp -> our file; overlay.txt has 'our/file -> path/in/llama.cpp', ours relative to the repository"""
    pairs = {}
    for line in (source / "overlay.txt").read_text().splitlines():
        if line.strip() and not line.startswith("#"):
            ours, _, theirs = (part.strip() for part in line.partition("->"))
            path = source.parent / ours
            if not path.is_file() or not theirs:
                raise Failure(f"{source.name}/overlay.txt: '{line.strip()}': {path} is missing")
            pairs[theirs] = path
    return pairs


def series_digest(source: Path) -> str:
    """Hash of everything that decides what a patched tree contains."""
    digest = hashlib.sha256((source / "upstream.txt").read_bytes())
    names = (source / "patches" / "series").read_text().split()
    for label, path in [(name, source / "patches" / name) for name in names] + sorted(read_overlay(source).items()):
        digest.update(label.encode() + b"\0" + blob_id(path.read_bytes()).encode())
    return digest.hexdigest()


# ------------------------------------------------------------------------------------------------- applying


def apply_hunks(data: bytes, file: FilePatch, patch: Patch, hint: str) -> bytes:
    """The patched file. Every hunk must match at its own line; there is no fuzz."""
    lines = data.splitlines(keepends=True)
    out, at = [], 0
    for hunk in file.hunks:
        old = [line[1:] for line in hunk.lines if line[:1] in b" -"]
        start = hunk.start - 1 if old else hunk.start
        if start < at or lines[start:start + len(old)] != old:
            raise Failure(f"conflict in {file.path}, hunk {hunk.header} of {patch.name}: the tree has other lines there\n{hint}")
        out += lines[at:start]
        out += [line[1:] for line in hunk.lines if line[:1] in b" +"]
        at = start + len(old)
    return b"".join(out + lines[at:])


def plan(tree: Path, source: Path, pristine: Path) -> "tuple[dict[str, bytes], dict[str, bytes]]":
    """(files as they were, files as they shall be), all in memory; pristine is where the untouched files lie."""
    pin = read_pin(source)
    hint = restore_hint(tree, pin)
    before, after = {}, {}
    for patch in read_series(source):
        for file in patch.files:
            if file.path not in after:
                if (pristine / file.path).is_file():
                    path = pristine / file.path
                else:
                    path = tree / file.path
                if not path.is_file():
                    raise Failure(f"{tree} has no {file.path}, which {patch.name} edits\n{hint}")
                before[file.path] = after[file.path] = path.read_bytes()
            new = apply_hunks(after[file.path], file, patch, hint)
            if blob_id(after[file.path]) != file.old_blob:
                raise Failure(f"{file.path} differs from the pinned version outside the hunks of {patch.name}\n{hint}")
            if blob_id(new) != file.new_blob:
                raise Failure(f"{patch.name} was edited by hand ({file.path} comes out with another hash); "
                              "make it again: python -m kvarn.patch refresh TREE")
            after[file.path] = new
    for theirs, ours in read_overlay(source).items():
        if theirs in after:
            raise Failure(f"overlay.txt and the patches both write {theirs}")
        after[theirs] = ours.read_bytes()
    return before, after


def restore_hint(tree: Path, pin: Pin) -> str:
    commit = commit_of(tree)
    where = f"it is at {commit[:9]}" if commit else "its commit is unknown"
    if (tree / ".git").exists():
        return f"the patches are for llama.cpp {pin.commit[:9]}, {where}; next: git -C {tree} checkout {pin.commit[:9]} -- ."
    return f"the patches are for llama.cpp {pin.commit[:9]}, {where}; next: python -m kvarn.upstream NEW_TREE"


def check_pin(tree: Path, source: Path) -> None:
    pin, commit = read_pin(source), commit_of(tree)
    if not (tree / "ggml" / "CMakeLists.txt").is_file():
        raise Failure(f"{tree} is no llama.cpp tree (no ggml/CMakeLists.txt)")
    if commit and commit not in ("unknown", pin.commit):
        raise Failure(f"{tree} is at commit {commit[:9]}, the patches are for {pin.commit[:9]}\n"
                      f"next: git -C {tree} checkout {pin.commit[:9]}, or add --any-commit if the files are the same")


def read_stamp(tree: Path) -> "dict[str, Any] | None":
    stamp = tree / STAMP
    return json.loads(stamp.read_text()) if stamp.is_file() else None


def check_unedited(tree: Path, stamp: "dict[str, Any]") -> None:
    for path, blob in stamp["files"].items():
        data = (tree / path).read_bytes() if (tree / path).is_file() else b""
        if blob_id(data) != blob:
            raise Failure(f"{path} was edited after the patches went in; keep your change elsewhere, then next:\n"
                          f"python -m kvarn.patch revert --discard {tree}")


def write_files(tree: Path, files: "dict[str, bytes]") -> int:
    """Writes what differs; all new contents reach the disk in a scratch folder before the first file of the tree is replaced."""
    changed = {path: data for path, data in files.items()
               if not (tree / path).is_file() or (tree / path).read_bytes() != data}
    with tempfile.TemporaryDirectory(dir=tree, prefix=".kvarn-scratch-") as scratch:
        for number, data in enumerate(changed.values()):
            (Path(scratch) / str(number)).write_bytes(data)
        for number, path in enumerate(changed):
            target = tree / path
            target.parent.mkdir(parents=True, exist_ok=True)
            if target.is_file():
                shutil.copymode(target, Path(scratch) / str(number))
            (Path(scratch) / str(number)).replace(target)
    return len(changed)


def apply(tree: Path, source: Path, update: bool = False, any_commit: bool = False) -> str:
    stamp, digest, pristine = read_stamp(tree), series_digest(source), tree / BACKUP
    if stamp and stamp["digest"] == digest and not update:
        return f"{tree} is already patched with this series"
    if stamp and not update:
        raise Failure(f"{tree} is patched with another version of the series; next: python -m kvarn.patch apply --update {tree}")
    if stamp and stamp["digest"] == digest:
        check_unedited(tree, stamp)
        return f"{tree} is up to date"
    if not any_commit:
        check_pin(tree, source)
    if stamp:
        check_unedited(tree, stamp)
    before, after = plan(tree, source, pristine)
    known = stamp["files"] if stamp else {}
    for path in read_overlay(source):
        if (tree / path).exists() and path not in known:
            raise Failure(f"{tree} already has a file {path}, and no stamp says that it is ours\n"
                          f"{restore_hint(tree, read_pin(source))}")
    gone = {path for path in known if path not in after}
    pristine.mkdir(exist_ok=True)
    write_files(pristine, before)
    pending = dict(stamp or {"files": {}}, digest="incomplete")
    pending["files"] = {**known, **{path: blob_id(data) for path, data in after.items()}}
    restored = {path: (pristine / path).read_bytes() for path in gone if (pristine / path).is_file()}
    (tree / STAMP).write_text(json.dumps(pending, indent=1))
    n_changed = write_files(tree, {**after, **restored})
    for path in gone - set(restored):
        (tree / path).unlink()
    for path in restored:
        (pristine / path).unlink()
    files = {path: blob_id(data) for path, data in sorted(after.items())}
    (tree / STAMP).write_text(json.dumps({"digest": digest, "files": files}, indent=1) + "\n")
    return f"{tree}: {len(before)} files patched, {len(after) - len(before)} added, {n_changed} written"


def revert(tree: Path, discard: bool = False) -> str:
    stamp, pristine = read_stamp(tree), tree / BACKUP
    if stamp is None:
        raise Failure(f"{tree} is not patched (no {STAMP}); nothing to revert")
    if not discard and stamp["digest"] != "incomplete":
        check_unedited(tree, stamp)
    backup = {path: (pristine / path).read_bytes() for path in stamp["files"] if (pristine / path).is_file()}
    write_files(tree, backup)
    for path in stamp["files"].keys() - backup.keys():
        (tree / path).unlink(missing_ok=True)
    shutil.rmtree(pristine)
    (tree / STAMP).unlink()
    return f"{tree}: {len(backup)} files restored, {len(stamp['files']) - len(backup)} removed"


def check(tree: Path, source: Path, any_commit: bool = False) -> str:
    stamp = read_stamp(tree)
    if stamp:
        check_unedited(tree, stamp)
        same = stamp["digest"] == series_digest(source)
        return f"{tree} is patched with " + ("this series" if same else "another version of the series")
    if not any_commit:
        check_pin(tree, source)
    before, after = plan(tree, source, tree / BACKUP)
    return f"{tree} takes the series: {len(before)} files edited, {len(after) - len(before)} added"


# ----------------------------------------------------------------------------------------- making the series


def why(patch: Patch) -> str:
    first = patch.body.split("\n\n")[0].replace("\n", " ").strip() or patch.subject
    return first.split(". ")[0].rstrip(".")


def table(series: "list[Patch]") -> str:
    rows = ["| patch | why | files | +lines | -lines |", "|---|---|---|---|---|"]
    for patch in series:
        rows.append(f"| {patch.name[:-len('.patch')]} | {why(patch)} | {len(patch.files)} | {patch.added} | {patch.removed} |")
    touched = {file.path for patch in series for file in patch.files}
    rows.append(f"| all | | {len(touched)} | {sum(p.added for p in series)} | {sum(p.removed for p in series)} |")
    return "\n".join(rows)


def readme(source: Path) -> str:
    pin = read_pin(source)
    return ("# The call sites of KVarN in llama.cpp\n\n"
            f"For llama.cpp {pin.commit[:9]} (inside {pin.package}). Made by `python -m kvarn.patch refresh TREE`; do not edit.\n"
            "A patch only edits files of llama.cpp; our own files get there through `../overlay.txt`.\n\n"
            + table(read_series(source)) + "\n")


def refresh(tree: Path, source: Path, base: "str | None") -> str:
    def git(*words: str) -> str:
        done = subprocess.run(["git", "-C", str(tree), *words], capture_output=True, text=True)
        if done.returncode:
            raise Failure(f"git {' '.join(words)}: {done.stderr.strip()}")
        return done.stdout.strip()

    pin = read_pin(source)
    if base is None:
        known = subprocess.run(["git", "-C", str(tree), "cat-file", "-e", pin.commit + "^{commit}"], capture_output=True)
        base = pin.commit if known.returncode == 0 else git("rev-list", "--max-parents=0", "HEAD").split()[0]
    with tempfile.TemporaryDirectory() as scratch:
        git("format-patch", "-q", "--zero-commit", "--no-signature", "--no-numbered", "--full-index", "--no-renames",
            "-o", scratch, f"{base}..HEAD", "--", ".", *(f":(exclude){path}" for path in read_overlay(source)))
        made = sorted(Path(scratch).glob("*.patch"))
        if not made:
            raise Failure(f"no commit after {base[:9]} in {tree}: one commit per patch is expected")
        for path in made:
            read_patch(path)
        folder = source / "patches"
        folder.mkdir(exist_ok=True)
        for old in folder.glob("*.patch"):
            old.unlink()
        for path in made:
            shutil.copyfile(path, folder / path.name)
    (folder / "series").write_text("".join(path.name + "\n" for path in made))
    (folder / "README.md").write_text(readme(source))
    return table(read_series(source))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("action", choices=("apply", "check", "revert", "refresh", "table"))
    parser.add_argument("tree", nargs="?", type=Path, help="a llama.cpp tree (not for table)")
    parser.add_argument("--source", type=Path, help="another ggml-kvarn folder")
    parser.add_argument("--update", action="store_true", help="apply: bring a patched tree up to date")
    parser.add_argument("--any-commit", action="store_true", help="apply, check: do not ask which commit the tree is at")
    parser.add_argument("--discard", action="store_true", help="revert: drop edits made after the patches went in")
    parser.add_argument("--base", help="refresh: the commit before the first patch")


def run(args: argparse.Namespace) -> int:
    if args.tree is None and args.action != "table":
        print(f"kvarn: {args.action} needs the llama.cpp tree: kvarn patch {args.action} TREE", file=sys.stderr)
        return 2
    try:
        source = args.source or source_dir()
        tree = (args.tree or Path()).absolute()
        if args.action == "apply":
            print(apply(tree, source, args.update, args.any_commit))
        elif args.action == "check":
            print(check(tree, source, args.any_commit))
            print(table(read_series(source)))
        elif args.action == "revert":
            print(revert(tree, args.discard))
        elif args.action == "refresh":
            print(refresh(tree, source, args.base))
        else:
            print(table(read_series(source)))
    except Failure as failure:
        print(f"kvarn: {failure}", file=sys.stderr)
        return 1
    return 0


def main(argv: "list[str] | None" = None, prog: str = "python -m kvarn.patch") -> int:
    parser = argparse.ArgumentParser(prog=prog, description="Puts KVarN into a llama.cpp tree and out.",
                                     epilog=EXAMPLE, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser)
    return run(parser.parse_intermixed_args(argv))


if __name__ == "__main__":
    sys.exit(main())
