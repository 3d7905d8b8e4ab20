"""Loads the patched llama.cpp libraries into llama-cpp-python, and proves first that they are the patched ones.

A cache type that a stock library does not know ends in a crash there, not in an error, so nothing creates a context before load()
has seen our own symbols. Type ids are never written down: they are found by name in the library at hand.

SPDX-License-Identifier: MIT
"""

import ctypes
import importlib.metadata
import importlib.util
import os
import sys
import threading
import warnings
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import kvarn

from . import kvtype
from .upstream import read_pin, source_dir

NAMES = tuple(filter(kvtype.is_kvarn, kvtype.NAMES))
N_TYPE_IDS = 256                 # how far type ids are searched; kvarn_type_bits() takes any number

# struct -> size that this llama-cpp-python declares, and defaults that the library must return
STRUCT_SIZES = {"llama_context_params": 160, "llama_model_params": 80, "llama_batch": 56, "llama_token_data_array": 32}
DEFAULTS = {"n_ctx": 512, "n_batch": 2048, "type_k": 1, "type_v": 1, "flash_attn_type": -1}

LOG = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)

_lock = threading.Lock()
_loaded = None


@dataclass(frozen=True)
class Library:
    """Libraries that are proved to be the patched ones."""

    path: Path                   # the folder
    types: "dict[str, int]"      # every type name of the library -> id
    format_version: int

    def name(self, type_id: int) -> str:
        """Name of a type id; ValueError if the library has no such type (a stock one would crash on it)."""
        for name, number in self.types.items():
            if number == type_id:
                return name
        raise ValueError(f"{type_id} is no type id of {self.path}; use a name: {', '.join(self.types)}")


def package_dirs() -> "list[Path]":
    """An editable install has two: the checkout and the place of the compiled files."""
    return [Path(folder) for folder in kvarn.__path__]


def lib_path() -> Path:
    """The folder of the patched libraries: KVARN_LIB_PATH, or kvarn/lib of the installed package."""
    if os.environ.get("KVARN_LIB_PATH"):
        return Path(os.environ["KVARN_LIB_PATH"])
    for folder in package_dirs():
        if (folder / "lib").is_dir():
            return folder / "lib"
    raise ImportError(f"kvarn's libraries are not built: no folder lib in {package_dirs()[0]}; "
                      "install kvarn (pip install . in the checkout), or set KVARN_LIB_PATH to a build's bin folder")


def bin_path() -> Path:
    """The folder of the command line tools; with KVARN_LIB_PATH set, that folder."""
    if os.environ.get("KVARN_LIB_PATH"):
        return Path(os.environ["KVARN_LIB_PATH"])
    return lib_path().parent / "bin"


def library_file(folder: Path, base: str) -> Path:
    """The file of a library, "ggml-base" or the like; ImportError if the folder has none."""
    names = [f"lib{base}.dylib", f"lib{base}.so"] if sys.platform == "darwin" else [f"lib{base}.so"]
    for name in names:
        if (folder / name).is_file():
            return folder / name
    raise ImportError(f"{folder} has no {names[0]}; it is not a folder of llama.cpp libraries (see KVARN_LIB_PATH)")


def probe(folder: Path) -> Library:
    """Opens the libraries and reads the type table. ImportError if they are not ours."""
    try:
        handle = ctypes.CDLL(str(library_file(folder, "ggml-base")))
    except OSError as error:
        raise ImportError(f"cannot load the libraries in {folder}: {error}") from None
    try:
        format_version = handle.kvarn_format_version()
        type_bits = handle.kvarn_type_bits
    except AttributeError:
        raise ImportError(f"the libraries in {folder} are stock llama.cpp, without kvarn's types; "
                          "unset KVARN_LIB_PATH, or point it at a build of kvarn") from None
    handle.ggml_type_name.restype = ctypes.c_char_p
    ids = [number for number in range(N_TYPE_IDS) if type_bits(number) > 0]
    types = {}
    for number in range(max(ids, default=-1) + 1):          # ids below a known one are inside the library's table
        name = handle.ggml_type_name(number)
        if name and name.decode().isidentifier() and name[:1].islower():
            types[name.decode()] = number
    missing = [name for name in NAMES if types.get(name) not in ids]
    if missing:
        raise ImportError(f"the libraries in {folder} do not know {', '.join(missing)}; install kvarn again")
    return Library(folder, types, format_version)


def load_backends(folder: Path) -> ctypes.CDLL:
    """libggml with its backends: a wheel has one library per CPU level, and the best one is loaded when somebody asks."""
    handle = ctypes.CDLL(str(library_file(folder, "ggml")))
    handle.ggml_backend_reg_count.restype = ctypes.c_size_t
    if not handle.ggml_backend_reg_count():
        base, log, data = ctypes.CDLL(str(library_file(folder, "ggml-base"))), ctypes.c_void_p(), ctypes.c_void_p()
        quiet = LOG(lambda *_: None)
        base.ggml_log_get(ctypes.byref(log), ctypes.byref(data))
        base.ggml_log_set(quiet, None)
        handle.ggml_backend_load_all()
        base.ggml_log_set(log, data)
    return handle


def bundled_binding() -> "Path | None":
    """The folder of the llama-cpp-python that came with this install, without libraries; None if it came with none."""
    return next((folder / "binding" for folder in package_dirs() if (folder / "binding" / "llama_cpp").is_dir()), None)


def check_version() -> None:
    """llama-cpp-python must be the pinned version: its structs follow one llama.cpp commit. The one that came along is, and
    it is used where none is installed."""
    wanted = read_pin(source_dir()).version
    install = f"CMAKE_ARGS=-DLLAMA_BUILD=OFF pip install --no-cache-dir --no-binary llama-cpp-python llama-cpp-python=={wanted}"
    try:
        found = importlib.metadata.version("llama-cpp-python")
    except importlib.metadata.PackageNotFoundError:
        bundled = bundled_binding()
        if bundled is not None:
            if str(bundled) not in sys.path:
                sys.path.append(str(bundled))
            return
        raise ImportError(f"kvarn.Llama needs llama-cpp-python {wanted}; next: {install}") from None
    if found != wanted:
        raise ImportError(f"kvarn needs llama-cpp-python {wanted}, whose structs match its libraries, and found {found}; "
                          f"next: {install}")


def check_structs(llama_cpp: ModuleType) -> None:
    """ImportError if llama-cpp-python declares other structs than the libraries have: they would read garbage."""
    for name, size in STRUCT_SIZES.items():
        found = ctypes.sizeof(getattr(llama_cpp, name))
        if found != size:
            raise ImportError(f"llama-cpp-python declares {name} with {found} bytes, kvarn's libraries have {size}; "
                              "install the pinned version again")
    defaults = llama_cpp.llama_context_default_params()
    for name, value in DEFAULTS.items():
        found = getattr(defaults, name)
        if found != value:
            raise ImportError(f"the libraries return {name} = {found} instead of {value}: another version of llama.cpp than "
                              "llama-cpp-python expects; install kvarn again")


def warn_of_lost_gpu(folder: Path) -> None:
    """Our libraries replace llama-cpp-python's in this process; says so where that takes the GPU away."""
    spec = importlib.util.find_spec("llama_cpp")
    theirs = Path(spec.origin).parent / "lib" if spec and spec.origin else Path()
    if any(theirs.glob("libggml-cuda*")) and not any(folder.glob("libggml-cuda*")):
        warnings.warn("llama-cpp-python has CUDA libraries, kvarn's libraries are CPU only and replace them in this process; "
                      "build kvarn with CMAKE_ARGS=-DGGML_CUDA=on to keep the GPU", stacklevel=4)


def load() -> Library:
    """Makes llama_cpp use the patched libraries; does nothing the second time."""
    global _loaded
    with _lock:
        if _loaded is None:
            _loaded = _load()
        return _loaded


def _load() -> Library:
    folder = lib_path()
    binding = sys.modules.get("llama_cpp.llama_cpp")
    if binding is not None and Path(binding._lib._name).parent.resolve() != folder.resolve():
        raise ImportError(f"llama_cpp was imported before kvarn and has loaded {binding._lib._name}; "
                          "put `from kvarn import Llama` (or kvarn.load()) before the first `import llama_cpp`")
    check_version()
    library = probe(folder)
    load_backends(folder)
    if binding is None:
        warn_of_lost_gpu(folder)
        # llama_cpp reads both when it is imported; child processes must not inherit them
        ours = {"LLAMA_CPP_LIB_PATH": str(folder), "MTMD_CPP_LIB": str(folder)}
        saved = {name: os.environ.get(name) for name in ours}
        os.environ.update(ours)
        try:
            binding = importlib.import_module("llama_cpp.llama_cpp")
            if any(folder.glob("libmtmd.*")):
                importlib.import_module("llama_cpp.mtmd_cpp")
        except (AttributeError, FileNotFoundError, RuntimeError) as error:
            raise ImportError(f"llama-cpp-python cannot use the libraries in {folder}: {error}") from error
        finally:
            for name, value in saved.items():
                if value is None:
                    del os.environ[name]
                else:
                    os.environ[name] = value
    check_structs(binding)
    return library
