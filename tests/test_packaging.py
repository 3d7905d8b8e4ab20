"""test_packaging.py - what is shipped: a source archive that builds offline, libraries that find each other, a container file.

SPDX-License-Identifier: MIT
"""

import ctypes
import importlib.metadata
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKED_LIMIT = 12 << 20     # bytes of the packed llama.cpp
LIBS_LIMIT = 40 << 20       # bytes of the CPU libraries, as built; with all CPU levels, too
CPU_LEVELS = {"x86_64": ("x64", "haswell", "skylakex", "zen4", "sapphirerapids")}


def missing(what: str, how: str) -> None:
    """Fails where CI can install it, skips elsewhere."""
    if os.environ.get("CI"):
        pytest.fail(f"{what} is missing; {how}")
    pytest.skip(f"{what} is missing; {how}")


@pytest.fixture(scope="module")
def packed(tmp_path_factory) -> Path:
    """The part of llama.cpp that goes into our source archive."""
    from kvarn import upstream

    pin = upstream.read_pin(ROOT/"ggml-kvarn")
    archive = upstream.cache_dir()/pin.archive
    if not archive.is_file():
        missing(str(archive), "the first build fetches it")
    path = tmp_path_factory.mktemp("packed")/"llama.cpp.tar.gz"
    upstream.pack(archive, path)
    return path


@pytest.mark.slow
def test_packed_source_is_small_and_always_the_same(packed, tmp_path):
    from kvarn import upstream

    assert packed.stat().st_size < PACKED_LIMIT
    with tarfile.open(packed) as tar:
        members = [member.name.partition("/")[2] for member in tar]
    names = [member[len("vendor/llama.cpp/"):] for member in members if member.startswith("vendor/")]
    binding = [member for member in members if not member.startswith("vendor/")]
    assert members == sorted(members) and all(map(upstream.is_wanted, names)) and all(map(upstream.is_binding, binding))
    assert {"LICENSE.md", "llama_cpp/llama.py", "llama_cpp/server/app.py"} <= set(binding)
    assert {"CMakeLists.txt", "LICENSE", "ggml/CMakeLists.txt", "src/llama.cpp"} <= set(names)
    upstream.pack(upstream.cache_dir()/upstream.read_pin(ROOT/"ggml-kvarn").archive, tmp_path/"again.tar.gz")
    assert (tmp_path/"again.tar.gz").read_bytes() == packed.read_bytes()


@pytest.fixture(scope="module")
def source_archive(packed, tmp_path_factory) -> Path:
    """Our own source archive, as `make sdist` makes it, of a copy of the checkout."""
    if subprocess.run([sys.executable, "-c", "import scikit_build_core"]).returncode:
        missing("scikit-build-core", "`make test` installs it")
    folder = tmp_path_factory.mktemp("sdist")
    listing = ["git", "-C", str(ROOT), "ls-files", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(listing, capture_output=True, text=True).stdout.splitlines()
    copy = folder/"checkout"
    for name in names or [str(path.relative_to(ROOT)) for path in ROOT.rglob("*") if path.is_file()]:
        if (ROOT/name).is_file():
            (copy/name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT/name, copy/name)
    (copy/"vendor").mkdir()
    shutil.copy(packed, copy/"vendor/llama.cpp.tar.gz")
    code = f"import scikit_build_core.build as b; print(b.build_sdist({str(folder)!r}))"
    done = subprocess.run([sys.executable, "-c", code], cwd=copy, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return folder/done.stdout.split()[-1]


@pytest.mark.slow
def test_source_archive_holds_what_a_build_needs_and_no_more(source_archive):
    with tarfile.open(source_archive) as tar:
        names = {member.name.partition("/")[2] for member in tar}
    for needed in ("CMakeLists.txt", "pyproject.toml", "LICENSE", "vendor/llama.cpp.tar.gz", "ggml-kvarn/kvarn-format.h",
                   "python/kvarn/embedded/kvarn-tasks.gguf", "python/kvarn/py.typed", "tests/kvarn-backend-ops.h"):
        assert needed in names, needed
    overlay = re.findall(r"^([a-z].*?) *->", (ROOT/"ggml-kvarn/overlay.txt").read_text(), re.M)
    assert set(overlay) <= names
    assert not [name for name in names if re.search(r"^(build|dist|\.[^/]+)/|__pycache__|\.so$", name)]


def wheel_options() -> "list[str]":
    """CMAKE_ARGS of the wheels that cibuildwheel builds on Linux."""
    text = (ROOT/"pyproject.toml").read_text()
    return re.search(r"^\[tool.cibuildwheel\]$.*?CMAKE_ARGS = \"(.*?)\"", text, re.M | re.S).group(1).split()


@pytest.mark.slow
def test_source_archive_configures_without_network_pip_or_cache(source_archive, tmp_path):
    """Everything a build needs from elsewhere is needed when it is configured: the patched llama.cpp must come out, and with a
    wheel's options a CPU backend for every level goes into the package."""
    cmake = shutil.which("cmake")
    if cmake is None:
        missing("cmake", "apt-get install cmake")
    with tarfile.open(source_archive) as tar:
        tar.extractall(tmp_path)
    source = next(tmp_path.glob("kvarn-*"))
    env = {**os.environ, "KVARN_CACHE_DIR": str(tmp_path/"empty"), "PIP_NO_INDEX": "1", "KVARN_LLAMA_CPP_DIR": ""}
    command = [cmake, "-S", str(source), "-B", str(tmp_path/"build"), f"-DPython_EXECUTABLE={sys.executable}", *wheel_options()]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
    assert not (tmp_path/"empty").exists(), "something was fetched"
    assert "kvarn" in (tmp_path/"build/llama.cpp/src/llama-kv-cache.cpp").read_text()
    assert (tmp_path/"build/llama.cpp/.kvarn-patched").is_file()
    assert (tmp_path/"build/binding/llama_cpp/llama_cpp.py").is_file()
    installed = (tmp_path/"build/cmake_install.cmake").read_text()
    levels = CPU_LEVELS.get(platform.machine(), ("",))
    assert not [level for level in levels if f"libggml-cpu-{level}" not in installed]
    assert "were not used" not in done.stderr, "an option of the wheels means nothing to CMake"


def test_backends_are_searched_beside_the_library(tmp_path):
    """kvarn-backend-dir.h in a library of its own: what takes the place of GGML_BACKEND_DIR names that library's folder."""
    if shutil.which("g++") is None:
        missing("g++", "apt-get install g++")
    (tmp_path/"place").mkdir()
    (tmp_path/"one.cpp").write_text('extern "C" const char * place() {\n'
                                    '    static const std::string s = GGML_BACKEND_DIR;\n    return s.c_str();\n}\n')
    built = tmp_path/"place/libone.so"
    subprocess.run(["g++", "-shared", "-fPIC", "-Wall", "-Wextra", "-Werror", "-std=c++17", "-include",
                    str(ROOT/"ggml-kvarn/kvarn-backend-dir.h"), "-DGGML_BACKEND_DIR=kvarn_backend_dir()", "-o", str(built),
                    str(tmp_path/"one.cpp"), "-ldl"], check=True)
    place = ctypes.CDLL(str(built)).place
    place.restype = ctypes.c_char_p
    assert place().decode() == str(tmp_path/"place")


# ------------------------------------------------------------------------------------------ the installed libraries


def dynamic(path: Path) -> str:
    if shutil.which("readelf") is None:
        missing("readelf", "apt-get install binutils")
    return subprocess.run(["readelf", "-d", str(path)], capture_output=True, text=True, check=True).stdout


@pytest.mark.tools
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads ELF files")
def test_libraries_find_each_other_wherever_they_are(lib_dir, bin_dir):
    from kvarn.cli import TOOLS

    if os.environ.get("KVARN_LIB_PATH"):
        pytest.skip("KVARN_LIB_PATH points to a build, which knows its own folder")
    ours = {path.name for path in lib_dir.glob("*.so")}
    assert {"libllama.so", "libggml.so", "libggml-base.so", "libmtmd.so"} <= ours
    assert any(name.startswith("libggml-cpu") for name in ours)     # a wheel has one per CPU level
    system = re.compile(r"lib(c|m|stdc\+\+|gcc_s|gomp|pthread|dl|rt|cuda|cudart|cublas|cublasLt|nccl)\.so\.|ld-linux")
    for path in [*lib_dir.glob("*.so"), *(bin_dir/name for name in TOOLS)]:
        said = dynamic(path)
        runpath = re.findall(r"R(?:UN)?PATH\).*\[(.*)\]", said)
        assert all(part.startswith("$ORIGIN") for part in ":".join(runpath).split(":") if part), f"{path.name}: {runpath}"
        needed = re.findall(r"NEEDED\).*\[(.*)\]", said)
        strange = [name for name in needed if name not in ours and not system.search(name)]
        assert not strange, f"{path.name} needs {strange}"
        assert not set(needed) & ours or runpath, f"{path.name} has no way to {needed}"


@pytest.mark.tools
def test_size_of_the_libraries(lib_dir):
    if os.environ.get("KVARN_LIB_PATH") or any(lib_dir.glob("*cuda*")):
        pytest.skip("not an installed CPU build")
    size = sum(path.stat().st_size for path in lib_dir.glob("*.so"))
    assert size < LIBS_LIMIT, f"{size/2**20:.1f} MiB"


@pytest.mark.tools
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads ELF files")
def test_extension_is_for_every_python(lib_dir):
    found = list(lib_dir.parent.glob("_native.*"))
    if os.environ.get("KVARN_LIB_PATH"):
        pytest.skip("not an installed build")
    assert [path.name for path in found] in (["_native.abi3.so"], ["_native.py"])
    wheel = importlib.metadata.distribution("kvarn").read_text("WHEEL")
    assert set(re.findall(r"^Tag: (.*)$", wheel, re.M)) == {f"cp39-abi3-linux_{platform.machine()}"}
    if found[0].suffix == ".so":
        symbols = subprocess.run(["nm", "-D", "--undefined-only", str(found[0])], capture_output=True, text=True).stdout
        private = set(re.findall(r"\b_Py\w+", symbols)) - {"_Py_NoneStruct", "_Py_Dealloc"}
        assert "PyImport_" in symbols and not private, f"not in the stable ABI: {private}"


ALONE = """
import importlib.machinery, importlib.metadata, json, sys
found = importlib.metadata.version
def version(name):
    if name == "llama-cpp-python":
        raise importlib.metadata.PackageNotFoundError
    return found(name)
class Alone:
    def find_spec(self, name, path=None, target=None):
        if name != "llama_cpp":
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, [folder for folder in sys.path if folder.endswith("binding")])
        if spec is None:
            raise ModuleNotFoundError(name)
        return spec
importlib.metadata.version = version
sys.meta_path.insert(0, Alone())
from kvarn import Llama, library
import llama_cpp
llm = Llama(sys.argv[1], kv_type="kvarn", n_ctx=256, verbose=False)
print(json.dumps([llama_cpp.__file__, str(library.bundled_binding()), llm("hello", max_tokens=4)["usage"]["completion_tokens"]]))
"""


@pytest.mark.llama
def test_works_without_an_installed_llama_cpp_python(tiny):
    """Its Python files come along: `pip install .` is all that kvarn demo needs."""
    from kvarn import library

    if library.bundled_binding() is None:
        missing("the bundled llama-cpp-python", "a build from the pinned archive brings it along")
    done = subprocess.run([sys.executable, "-c", ALONE, tiny()], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    file, bundled, n = json.loads(done.stdout)
    assert Path(file).parent.parent == Path(bundled) and n > 0
    declared = set(re.findall(r"^Requires-Dist: ([\w-]+)", importlib.metadata.distribution("kvarn").read_text("METADATA"), re.M))
    assert {"numpy", "diskcache", "jinja2", "typing-extensions"} <= {name.lower().replace("_", "-") for name in declared}


# ------------------------------------------------------------------------------------------------------ container


def test_container_file_copies_what_exists():
    text = (ROOT/"cuda/Containerfile").read_text()
    copied = [name for line in re.findall(r"^COPY (?!--from)(.*)$", text, re.M) for name in line.split()[:-1]]
    assert copied and all((ROOT/name).exists() for name in copied)
    overlay = re.findall(r"^([a-z].*?) *->", (ROOT/"ggml-kvarn/overlay.txt").read_text(), re.M)
    assert {Path(name).parts[0] for name in overlay} <= set(copied), "a folder of the overlay is not copied"
    assert len(set(re.findall(r"\$\{CUDA\}-\w+-(ubuntu\d+\.\d+)", text))) == 1, "both stages need one Python"
    assert "GGML_CUDA=ON" in text and "GGML_NATIVE=OFF" in text
