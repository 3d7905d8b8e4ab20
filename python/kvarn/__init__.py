"""KVarN: key-value cache types of 2, 3 and 4 bits for llama.cpp and llama-cpp-python.

    from kvarn import Llama
    llm = Llama("model.gguf", kv_type="kvarn", n_ctx=32768)     # kvarn4 keys, kvarn2 values

Also here, each loaded when it is first used: KVARN2, KVARN3, KVARN4 (type ids for type_k and type_v of frameworks), install(),
load(), lib_path(), bin_path(), codec, reference, embedded. SPDX-License-Identifier: MIT
"""

from importlib import import_module
from typing import Any

_FROM = {
    "Llama": "llama", "install": "llama",
    "load": "library", "lib_path": "library", "bin_path": "library",
    "KVARN2": "library", "KVARN3": "library", "KVARN4": "library",
}
_MODULES = ("codec", "embedded", "reference")

__all__ = ["__version__", *_FROM, *_MODULES]


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import PackageNotFoundError, version  # slow to import, and rarely asked for

        try:
            return version("kvarn")
        except PackageNotFoundError:
            return "0+checkout"
    if name in _MODULES:
        return import_module(f"kvarn.{name}")
    if name not in _FROM:
        raise AttributeError(f"module 'kvarn' has no attribute '{name}'")
    module = import_module(f"kvarn.{_FROM[name]}")
    if name.startswith("KVARN"):
        return module.load().types[name.lower()]
    return getattr(module, name)


def __dir__() -> "list[str]":
    return sorted(__all__)
