"""conftest.py - what the tests share: where the installed libraries and tools are, tiny models, and skips that say why.

The tests run against the installed package, not the checkout. KVARN_LIB_PATH (a build's bin folder) points them elsewhere.

SPDX-License-Identifier: MIT
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

ROOT = Path(__file__).resolve().parent.parent


def why_no_llama() -> str:
    """"" once the patched libraries are loaded: before any test imports llama_cpp, which takes its libraries at that moment."""
    try:
        import kvarn

        kvarn.load()
    except ImportError as error:
        return str(error)
    return ""


def upstream_bin() -> "Path | None":
    """Folder of upstream's test programs: KVARN_TEST_BIN, or the newest build that has them."""
    if os.environ.get("KVARN_TEST_BIN"):
        return Path(os.environ["KVARN_TEST_BIN"])
    found = [path.parent for path in ROOT.glob("build/**/bin/test-backend-ops")]
    return max(found, key=lambda path: path.stat().st_mtime, default=None)


def pytest_collection_modifyitems(items):
    no_llama, no_upstream = why_no_llama(), upstream_bin() is None
    if os.environ.get("CI") and (no_llama or no_upstream):  # what CI builds itself must be there
        raise pytest.UsageError(f"CI skips nothing: {no_llama or 'upstream tests are not built'}; see build/setup.log")
    for item in items:
        if no_llama and (item.get_closest_marker("llama") or item.get_closest_marker("tools")):
            item.add_marker(pytest.mark.skip(reason=no_llama))
        if no_upstream and item.get_closest_marker("upstream"):
            item.add_marker(pytest.mark.skip(reason="upstream's tests are not built: `make test`, or -DKVARN_BUILD_TESTS=ON"))


@pytest.fixture(scope="session")
def root() -> Path:
    return ROOT


@pytest.fixture(scope="session")
def lib_dir() -> Path:
    """The patched libraries."""
    import kvarn

    return kvarn.lib_path()


@pytest.fixture(scope="session")
def bin_dir() -> Path:
    """llama-cli and its kin."""
    import kvarn

    return kvarn.bin_path()


@pytest.fixture(scope="session")
def test_bin_dir() -> Path:
    """Upstream's test programs."""
    return upstream_bin()


def flush_log(folder: Path) -> dict:
    """What to add to the environment so that upstream's tools print all they have to say; RuntimeError without a compiler.

    Their log has a thread of its own that is not waited for when a tool ends, so the last lines of a short run are lost, on a
    busy machine most of them. A few lines of C++ loaded into the process flush it at the end.
    """
    source, library = folder / "flush.cpp", folder / "libflush.so"
    source.write_text("struct common_log;\ncommon_log * common_log_main();\nvoid common_log_flush(common_log *);\n"
                      "static struct at_exit { ~at_exit() { common_log_flush(common_log_main()); } } at_exit;\n")
    done = subprocess.run(["g++", "-shared", "-fPIC", "-o", str(library), str(source)], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"g++ could not compile the flush of upstream's log: {done.stderr.strip()[-200:]}")
    return {"LD_PRELOAD": str(library)}


@pytest.fixture(scope="session")
def whole_log(tmp_path_factory) -> dict:
    try:
        return flush_log(tmp_path_factory.mktemp("log"))
    except RuntimeError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """tiny("llama", 128, ...) -> path of a generated model; made once per set of arguments."""
    import tiny_model

    folder, made = tmp_path_factory.mktemp("models"), {}

    def make(arch: str = "llama", head_dim: int = 128, **settings) -> str:
        key = (arch, head_dim, *sorted(settings.items()))
        if key not in made:
            name = "-".join(str(part).replace("'", "").strip("()").replace(", ", "=") for part in key)
            made[key] = str(tiny_model.write(folder / f"{name}.gguf", arch, head_dim, **settings))
        return made[key]

    return make


@pytest.fixture(scope="session")
def generated(tmp_path_factory):
    """generated("qwen35") -> path of the model of that architecture that upstream's test-llama-archs makes."""
    if upstream_bin() is None:
        pytest.skip("upstream's tests, which make this model, are not built: `make test`, or -DKVARN_BUILD_TESTS=ON")
    folder = tmp_path_factory.mktemp("generated")

    def make(arch: str) -> str:
        if not list(folder.glob(f"{arch}-*.gguf")):
            subprocess.run([upstream_bin()/"test-llama-archs", "-o", folder, "-s", "1", "-a", f"^{arch}$"], check=True,
                           capture_output=True)
        return str(next(folder.glob(f"{arch}-*.gguf")))

    return make
