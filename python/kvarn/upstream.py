"""Fetches the pinned llama.cpp: the tree inside the llama-cpp-python source archive, checked by hash.

    python -m kvarn.upstream TREE [--from DIR]     puts a pristine tree into TREE
    python -m kvarn.upstream --sdist               prints the path of the checked source archive
    python -m kvarn.upstream --pack FILE.tar.gz    the part of it that a build needs (10 MB), for our own source archive
    python -m kvarn.upstream --binding DIR         llama-cpp-python's Python files into DIR, which our wheel brings along

Where it comes from, first match wins: --from DIR or KVARN_LLAMA_CPP_DIR (a llama.cpp tree, copied, never changed), the packed
part in our own source archive, an archive with the right sha256 in the cache folder, pip. The cache folder is KVARN_CACHE_DIR or
the user's cache. Which index pip asks is decided by pip's own configuration. Standard library and pip only: CMake calls this file
before anything is installed.

SPDX-License-Identifier: MIT
"""

import argparse
import gzip
import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

STAMP = ".kvarn-upstream"
PACKED = "vendor/llama.cpp.tar.gz"   # beside ggml-kvarn, in a source archive made by `make sdist`

# what the build and its tests need of llama.cpp; without the web UI's sources, which are half of all files
WANTED = ("CMakeLists.txt", "LICENSE", "AUTHORS", "cmake", "common", "ggml", "include", "licenses", "scripts", "src", "tests",
          "tools", "vendor")
UNWANTED = ("tools/ui/src", "tools/ui/static", "tools/ui/tests", "tools/server/bench", "tests/snapshots")


class Failure(Exception):
    """A refusal in one or two lines: what, where, what to do instead."""


class Pin(NamedTuple):
    package: str
    sha256: str
    commit: str

    @property
    def archive(self) -> str:
        name, version = self.package.split("==")
        return f"{name.replace('-', '_')}-{version}.tar.gz"

    @property
    def version(self) -> str:
        return self.package.split("==")[1]


def source_dir() -> Path:
    """The ggml-kvarn folder: of the checkout, or the copy inside an installed package."""
    here = Path(__file__).resolve().parent
    for folder in (here.parent.parent / "ggml-kvarn", here / "ggml-kvarn"):
        if (folder / "upstream.txt").is_file():
            return folder
    raise Failure(f"no ggml-kvarn folder beside {here}: run this from a checkout, or install the package again")


def read_pin(source: Path) -> Pin:
    words = dict(line.split() for line in (source / "upstream.txt").read_text().splitlines() if line.strip())
    return Pin(words["package"], words["sha256"], words["commit"])


def cache_dir() -> Path:
    if os.environ.get("KVARN_CACHE_DIR"):
        return Path(os.environ["KVARN_CACHE_DIR"])
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "kvarn"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "kvarn"


def sha256_of(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        for block in iter(lambda: file.read(1 << 20), b""):
            digest.update(block)
    return digest.hexdigest()


def say(text: str) -> None:
    print(f"kvarn: {text}", file=sys.stderr, flush=True)


def fetch(pin: Pin) -> Path:
    """Path of the source archive with the pinned hash; downloads it with pip when the cache has none."""
    cache = cache_dir()
    archive = cache / pin.archive
    if archive.is_file():
        if sha256_of(archive) == pin.sha256:
            return archive
        say(f"{archive} does not have the pinned sha256; fetching it again")
    by_hand = f"or put {pin.archive} (sha256 {pin.sha256[:12]}...) into {cache}"
    if importlib.util.find_spec("pip") is None:
        raise Failure(f"{sys.executable} has no pip to fetch {pin.package} with\n"
                      f"use the Python of a virtual environment (-DPython_EXECUTABLE=...), {by_hand}")
    try:
        cache.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise Failure(f"cannot create the cache folder {cache}: {error.strerror}; set KVARN_CACHE_DIR") from None
    say(f"fetching {pin.package} (77 MB) with pip into {cache}")
    with tempfile.TemporaryDirectory(dir=cache) as scratch:
        requirement = Path(scratch) / "requirement.txt"
        requirement.write_text(f"{pin.package} --hash=sha256:{pin.sha256}\n")
        command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--no-binary", pin.package.split("==")[0],
                   "--require-hashes",
                   "-r", str(requirement), "-d", scratch]
        if importlib.util.find_spec("scikit_build_core") is not None:
            command.append("--no-build-isolation")  # pip reads the archive's metadata with what is installed here
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace")
        fetched = Path(scratch) / pin.archive
        if done.returncode != 0 or not fetched.is_file():
            raise Failure(f"pip could not fetch {pin.package}; its last words:\n{done.stdout.strip()[-1500:]}\n"
                          f"check pip's index settings, {by_hand}")
        if sha256_of(fetched) != pin.sha256:
            raise Failure(f"{pin.archive} from pip does not have the pinned sha256 {pin.sha256}")
        fetched.replace(archive)
    return archive


def is_binding(path: str) -> bool:
    """path is relative to the top of the source archive: llama-cpp-python's Python files and their license."""
    return path == "LICENSE.md" or path.startswith("llama_cpp/") and path.endswith((".py", "py.typed"))


def is_wanted(path: str) -> bool:
    """path is relative to the top of llama.cpp."""
    inside = any(path == top or path.startswith(top + "/") for top in WANTED)
    return inside and not any(path == top or path.startswith(top + "/") for top in UNWANTED)


def unpack(archive: Path, tree: Path) -> None:
    now = int(time.time())
    with tarfile.open(archive) as tar:
        members = []
        for member in tar:
            _, _, path = member.name.partition("/vendor/llama.cpp/")
            if path and is_wanted(path) and (member.isfile() or member.isdir()):
                parts = Path(path).parts
                if ".." in parts or Path(path).is_absolute():
                    raise Failure(f"{archive} holds the unsafe path {member.name}")
                member.name = path
                member.mtime = now  # a new pin must look newer than what an old one was built into
                members.append(member)
        if hasattr(tarfile, "data_filter"):
            tar.extractall(tree, members, filter="data")
        else:
            tar.extractall(tree, members)


def pack(archive: Path, packed: Path) -> int:
    """Writes the wanted files of the source archive into a smaller one, the same bytes every time; how many they are."""
    packed.parent.mkdir(parents=True, exist_ok=True)
    partial = packed.with_name(packed.name + ".partial")
    with tarfile.open(archive) as tar, partial.open("wb") as file, \
            gzip.GzipFile(filename="", mode="wb", fileobj=file, mtime=0) as zipped, \
            tarfile.open(fileobj=zipped, mode="w", format=tarfile.PAX_FORMAT) as out:
        wanted = {}
        for member in tar:
            _, _, path = member.name.partition("/")
            _, _, inner = f"/{path}".partition("/vendor/llama.cpp/")
            if member.isfile() and (inner and is_wanted(inner) or is_binding(path)):
                wanted[path] = member
        for path, member in sorted(wanted.items()):
            entry = tarfile.TarInfo(f"packed/{path}")
            entry.size, entry.mode = member.size, 0o755 if member.mode & 0o100 else 0o644
            out.addfile(entry, tar.extractfile(member))
    partial.replace(packed)
    return len(wanted)


def unpack_binding(folder: Path, pin: Pin) -> None:
    """Makes folder hold llama-cpp-python's Python files; does nothing when its stamp says it already does."""
    stamp = folder / STAMP
    if stamp.is_file() and stamp.read_text().strip() == pin.sha256:
        return
    with tarfile.open(source_archive(pin)) as tar:
        for member in tar:
            _, _, path = member.name.partition("/")
            data = tar.extractfile(member) if is_binding(path) and member.isfile() else None
            if data is not None and ".." not in Path(path).parts:
                (folder / path).parent.mkdir(parents=True, exist_ok=True)
                (folder / path).write_bytes(data.read())
    stamp.write_text(pin.sha256 + "\n")


def source_archive(pin: Pin) -> Path:
    """The packed part in our own source archive, or the whole one."""
    packed = source_dir().parent / PACKED
    return packed if packed.is_file() else fetch(pin)


def commit_of(tree: Path) -> str:
    """The commit a llama.cpp tree is at, from our stamp or from git's files; "" if nothing says so."""
    stamp = tree / STAMP
    if stamp.is_file():
        return stamp.read_text().split()[0]
    git = tree / ".git"
    try:
        if git.is_file():
            git = (tree / git.read_text().split(":", 1)[1].strip()).resolve()
        head = (git / "HEAD").read_text().strip()
        if not head.startswith("ref: "):
            return head
        name = head[len("ref: "):]
        if (git / name).is_file():
            return (git / name).read_text().strip()
        packed = (git / "packed-refs").read_text().splitlines()
        return next((line.split()[0] for line in packed if line.endswith(" " + name)), "")
    except (OSError, IndexError):
        return ""


def copy_tree(origin: Path, tree: Path) -> None:
    for path in sorted(origin.rglob("*")):
        name = path.relative_to(origin).as_posix()
        if is_wanted(name) and path.is_file() and ".git" not in path.parts:
            (tree / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, tree / name)


def prepare(tree: Path, pin: Pin, origin: "Path | None" = None) -> None:
    """Makes TREE the pristine upstream tree; does nothing when its stamp says it already came from there."""
    label = f"{commit_of(origin) or 'unknown'} {origin.resolve()}" if origin else f"{pin.commit} {pin.archive}"
    stamp = tree / STAMP
    if stamp.is_file() and stamp.read_text().strip() == label:
        return
    if tree.exists() and any(tree.iterdir()) and not stamp.is_file():
        raise Failure(f"{tree} exists and was not made by this command; remove it or name another folder")
    if origin and not (origin / "ggml" / "CMakeLists.txt").is_file():
        raise Failure(f"{origin} is no llama.cpp tree (no ggml/CMakeLists.txt); KVARN_LLAMA_CPP_DIR names its top folder")
    partial = tree.with_name(tree.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    if origin:
        say(f"copying llama.cpp from {origin}")
        copy_tree(origin, partial)
    else:
        archive = source_archive(pin)
        say(f"unpacking llama.cpp {pin.commit[:9]} from {archive}")
        unpack(archive, partial)
    if not (partial / "ggml" / "CMakeLists.txt").is_file():
        raise Failure(f"no llama.cpp came out of {origin or pin.archive}")
    (partial / STAMP).write_text(label + "\n")
    shutil.rmtree(tree, ignore_errors=True)
    partial.replace(tree)


def main(argv: "list[str] | None" = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m kvarn.upstream", description="Fetches the pinned llama.cpp.")
    parser.add_argument("tree", nargs="?", type=Path, help="folder to create")
    parser.add_argument("--from", dest="origin", default=os.environ.get("KVARN_LLAMA_CPP_DIR") or None, type=Path,
                        help="a llama.cpp tree to copy instead of fetching one")
    parser.add_argument("--sdist", action="store_true", help="only fetch the source archive and print its path")
    parser.add_argument("--pack", metavar="FILE", type=Path, help="only write the part of it that a build needs")
    parser.add_argument("--binding", metavar="DIR", type=Path, help="only write llama-cpp-python's Python files")
    args = parser.parse_args(argv)
    if not args.sdist and not args.pack and not args.binding and args.tree is None:
        parser.error("name the folder to create, or use --sdist, --pack or --binding")
    try:
        pin = read_pin(source_dir())
        if args.pack:
            n_files = pack(fetch(pin), args.pack)
            say(f"{args.pack}: {n_files} files of llama.cpp {pin.commit[:9]}, {args.pack.stat().st_size/2**20:.1f} MiB")
        elif args.binding:
            if args.origin:
                say("llama-cpp-python does not come along: its source archive is not used; kvarn.Llama needs it installed")
            else:
                unpack_binding(args.binding, pin)
        elif args.sdist:
            print(fetch(pin))
        else:
            prepare(args.tree.absolute(), pin, args.origin)
    except Failure as failure:
        say(str(failure))
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
