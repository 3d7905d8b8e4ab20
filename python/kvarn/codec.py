"""KVarN tiles in numpy arrays, by the C code that llama.cpp runs: seal, unseal, attend.

    from kvarn import codec
    tiles = codec.seal(x, side="k", bits=4)     # x float32 [.., 128, D], rotated -> uint8 [.., tile_bytes(D, 4)]
    y = codec.unseal(tiles, side="k", bits=4)   # float32 [.., 128, D]

A tile holds 128 tokens of one KV head; side is "k" or "v", bits 2, 3 or 4, D a multiple of 16 up to 512. What the bytes mean is
in ggml-kvarn/FORMAT.md; kvarn.reference is the same in plain numpy. The calls release the GIL. SPDX-License-Identifier: MIT
"""

import math
from typing import Any

import numpy as np

try:
    from . import _native
except ImportError as error:
    raise ImportError(f"kvarn's compiled extension is missing ({error}); install kvarn: pip install . in the checkout") from None

G = 128  # tokens per tile
SIDES = {"k": 0, "v": 1}

ffi = _native.ffi


def _open() -> Any:
    """The C functions: from the compiled extension, or bound at run time where it was built without Python.h."""
    if hasattr(_native, "lib"):
        return _native.lib
    from .library import lib_path, library_file

    return ffi.dlopen(str(library_file(lib_path(), "ggml-base")))


lib = _open()
FORMAT_VERSION = lib.kvarn_format_version()


def tile_bytes(D: int, bits: int) -> int:
    """Bytes of one tile of D channels; ValueError if there is no such tile."""
    if not isinstance(bits, (int, np.integer)) or bits not in (2, 3, 4):
        raise ValueError(f"bits must be 2, 3 or 4, not {bits!r}")
    size = int(lib.kvarn_tile_bytes(int(D), int(bits)))
    if size == 0:
        raise ValueError(f"no tile has {D} channels; D must be a multiple of 16 from 16 to 512")
    return size


def _side(side: str) -> int:
    if side not in SIDES:
        raise ValueError(f"side must be 'k' or 'v', not {side!r}")
    return SIDES[side]


def _array(name: str, a: Any, dtype: Any, ndim: int) -> np.ndarray:
    """a, C-contiguous, if it has this dtype and at least ndim dimensions."""
    a = np.asarray(a)
    if a.dtype != dtype:
        raise TypeError(f"{name} must be {np.dtype(dtype)}, not {a.dtype}; convert it with .astype(numpy.{np.dtype(dtype)})")
    if a.ndim < ndim:
        raise ValueError(f"{name} must have at least {ndim} dimension{'s' * (ndim > 1)}, not shape {a.shape}")
    return np.ascontiguousarray(a)


def _channels(name: str, tiles: np.ndarray, bits: int) -> int:
    """D of tiles of this many bytes."""
    for D in range(16, 513, 16):
        if tile_bytes(D, bits) == tiles.shape[-1]:
            return D
    raise ValueError(f"{name}: no {bits}-bit tile has {tiles.shape[-1]} bytes (D = 128: {tile_bytes(128, bits)}); wrong bits?")


def _floats(a: np.ndarray) -> Any:
    return ffi.cast("float *", a.ctypes.data)


def _bytes(a: np.ndarray) -> Any:
    return ffi.cast("uint8_t *", a.ctypes.data)


def seal(x: Any, side: str = "k", bits: int = 4) -> np.ndarray:
    """x float32 [.., 128, D], rotated -> tiles uint8 [.., tile_bytes]. NaN counts as 0, values are clamped to +-65504."""
    x, side_id = _array("x", x, np.float32, 2), _side(side)
    *batch, n_tokens, D = x.shape
    if n_tokens != G:
        raise ValueError(f"x must have {G} tokens in its last but one dimension, not shape {x.shape}")
    tiles = np.empty((*batch, tile_bytes(D, bits)), np.uint8)
    scratch = np.empty(lib.kvarn_seal_scratch(D), np.float32)
    for one, tile in zip(x.reshape(-1, G, D), tiles.reshape(-1, tiles.shape[-1])):
        lib.kvarn_seal_ref(side_id, bits, D, _floats(one), _bytes(tile), _floats(scratch))
    return tiles


def unseal(tiles: Any, side: str = "k", bits: int = 4) -> np.ndarray:
    """tiles uint8 [.., tile_bytes] -> x float32 [.., 128, D]; the size of a tile tells D."""
    tiles, side_id = _array("tiles", tiles, np.uint8, 1), _side(side)
    D = _channels("tiles", tiles, bits)
    x = np.empty((*tiles.shape[:-1], G, D), np.float32)
    for one, tile in zip(x.reshape(-1, G, D), tiles.reshape(-1, tiles.shape[-1])):
        lib.kvarn_unseal_ref(side_id, bits, D, _bytes(tile), _floats(one))
    return x


def attend(q: Any, k: Any, v: Any, bits_k: int = 4, bits_v: int = 4, scale: "float | None" = None) -> np.ndarray:
    """Softmax attention from the codes: q float32 [n_q, D] -> float32 [n_q, D].

    k, v   tiles of one KV head, uint8 [n_tiles, tile_bytes]; q is rotated like the keys, the result like the values
    scale  multiplies the scores; 1/sqrt(D) unless given
    """
    q, k, v = _array("q", q, np.float32, 2), _array("k", k, np.uint8, 2), _array("v", v, np.uint8, 2)
    for name, a in (("q", q), ("k", k), ("v", v)):
        if a.ndim != 2:
            raise ValueError(f"{name} must have 2 dimensions, not shape {a.shape}")
    D = q.shape[1]
    if _channels("k", k, bits_k) != D or _channels("v", v, bits_v) != D:
        raise ValueError(f"q has {D} channels, the tiles of k {_channels('k', k, bits_k)}, of v {_channels('v', v, bits_v)}")
    if len(k) != len(v) or len(k) == 0:
        raise ValueError(f"k and v need the same number of tiles, at least one; they have {len(k)} and {len(v)}")
    out = np.empty(q.shape, np.float32)
    scale = 1.0 / math.sqrt(D) if scale is None else scale
    lib.kvarn_attend_ref(bits_k, bits_v, D, len(q), len(k), _floats(q), _bytes(k), _bytes(v), scale, _floats(out))
    return out
