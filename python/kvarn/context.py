"""A model and bare contexts of it: decode tokens, get all logits, look at the attention outputs. For evaluation.

kvarn.Llama loads a model for every cache; here one model serves many contexts. SPDX-License-Identifier: MIT
"""

import ctypes
from pathlib import Path
from typing import Sequence

import numpy as np

from . import kvtype
from .kv_info import read_size
from .library import library_file
from .llama import LIBRARY, environment
from .llama import llama_cpp as api
from .log import CapturedLog


class Tensor(ctypes.Structure):
    """ggml_tensor of the pinned library, as far as we look: up to its name."""

    _fields_ = [("type", ctypes.c_int), ("buffer", ctypes.c_void_p), ("ne", ctypes.c_int64*4), ("nb", ctypes.c_size_t*4),
                ("op", ctypes.c_int), ("op_params", ctypes.c_int32*16), ("flags", ctypes.c_int32), ("src", ctypes.c_void_p*10),
                ("view_src", ctypes.c_void_p), ("view_offs", ctypes.c_size_t), ("data", ctypes.c_void_p),
                ("name", ctypes.c_char*64)]


def _ggml() -> ctypes.CDLL:
    handle = ctypes.CDLL(str(library_file(LIBRARY.path, "ggml-base")))
    handle.ggml_backend_tensor_get.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_size_t]
    handle.ggml_get_name.argtypes, handle.ggml_get_name.restype = [ctypes.c_void_p], ctypes.c_char_p
    return handle


class AttentionTap:
    """Keeps the output of every attention block, after its output matrix: there it does not depend on how a cache rotates.

    rows[layer] is f32 [tokens of the last decode, channels]. Copying them takes time: listening says whether it is wanted.
    """

    def __init__(self) -> None:
        self.listening = True
        self.ggml = _ggml()
        self.rows: "dict[str, np.ndarray]" = {}
        self.callback = api.ggml_backend_sched_eval_callback(self._see)

    def _see(self, address: int, ask: bool, _: object) -> bool:
        if not self.listening:
            return not ask
        tensor = Tensor.from_address(address)
        source = Tensor.from_address(tensor.src[0]) if tensor.src[0] else None
        if source is None or not source.name.startswith(b"blk.") or b".attn_output.weight" not in source.name:
            return not ask
        if not ask and tensor.type == 0:
            rows = np.empty((tensor.ne[1], tensor.ne[0]), np.float32)
            self.ggml.ggml_backend_tensor_get(address, rows.ctypes.data, 0, rows.nbytes)
            self.rows[source.name.decode()] = rows
        return True


class Model:
    """A model without a context; FileNotFoundError or RuntimeError with llama.cpp's reason if it cannot be loaded."""

    def __init__(self, path: str, gpu_layers: int = -1):
        if not Path(path).is_file():
            raise FileNotFoundError(f"no model at {path}")
        params = api.llama_model_default_params()
        params.n_gpu_layers = gpu_layers
        with CapturedLog(False) as log:
            self.handle = api.llama_model_load_from_file(str(path).encode(), params)
        if not self.handle:
            raise RuntimeError(f"cannot load {path}: {log.reason() or 'not a GGUF of a model that llama.cpp knows'}")
        self.vocabulary = api.llama_model_get_vocab(self.handle)
        self.n_vocab = api.llama_vocab_n_tokens(self.vocabulary)
        self.n_ctx_train = api.llama_model_n_ctx_train(self.handle)

    def meta(self, key: str) -> str:
        """A value of the file's header as text; "" if there is none."""
        buffer = ctypes.create_string_buffer(256)
        size = api.llama_model_meta_val_str(self.handle, key.encode(), buffer, len(buffer))
        return buffer.value.decode(errors="replace") if size >= 0 else ""

    def tokenize(self, text: bytes, special: bool = False) -> "list[int]":
        """Tokens of text, with what the model puts before it."""
        for room in (len(text) + 8, 4*len(text) + 64):
            tokens = (api.llama_token*room)()
            n = api.llama_tokenize(self.vocabulary, text, len(text), tokens, room, True, special)
            if n >= 0:
                return list(tokens[:n])
        raise RuntimeError(f"cannot tokenize {len(text)} bytes of text")

    def is_end(self, token: int) -> bool:
        """True if a model ends its text with this token."""
        return bool(api.llama_vocab_is_eog(self.vocabulary, token))

    def text(self, tokens: "list[int]") -> bytes:
        """What tokens stand for, without special ones."""
        out = b""
        for token in tokens:
            piece = ctypes.create_string_buffer(256)
            n = api.llama_token_to_piece(self.vocabulary, token, piece, len(piece), 0, False)
            out += piece.raw[:max(n, 0)]
        return out

    def close(self) -> None:
        """Frees the weights; its contexts must be closed before."""
        api.llama_model_free(self.handle)


class Context:
    """One sequence of one model with one cache type."""

    def __init__(self, model: Model, cache: str, n_ctx: int, n_ubatch: int = 128, threads: int = 0, strict: bool = False,
                 tap: "AttentionTap | None" = None):
        self.model, self.cache, self.tap = model, cache, tap
        params = api.llama_context_default_params()
        params.n_ctx, params.n_batch, params.n_ubatch = n_ctx, n_ubatch, n_ubatch
        params.type_k, params.type_v = (LIBRARY.types[name] for name in kvtype.parse(cache))
        params.flash_attn_type = api.LLAMA_FLASH_ATTN_TYPE_ENABLED
        params.swa_full = False
        if threads:
            params.n_threads = params.n_threads_batch = threads
        if tap is not None:
            params.cb_eval = tap.callback
        with CapturedLog(False) as log, environment("KVARN_STRICT", "1" if strict else None):
            self.handle = api.llama_init_from_model(model.handle, params)
        if not self.handle:
            raise RuntimeError(f"no context with cache type {cache}: {log.reason() or 'llama.cpp gives no reason'}")
        self.size = read_size(log.lines)
        self.n_tokens = 0
        self.batch = api.llama_batch_init(n_ubatch, 0, 1)

    def decode(self, tokens: "Sequence[int]", all_logits: bool = True) -> np.ndarray:
        """Decodes at most n_ubatch tokens; logits f32 [len(tokens), vocabulary], or [1, ..] of the last. The library's array."""
        batch, n = self.batch, len(tokens)
        batch.n_tokens = n
        for i, token in enumerate(tokens):
            batch.token[i] = int(token)
            batch.pos[i] = self.n_tokens + i
            batch.n_seq_id[i] = 1
            batch.seq_id[i][0] = 0
            batch.logits[i] = all_logits or i == n - 1
        with CapturedLog(False) as log:
            status = api.llama_decode(self.handle, batch)
        if status:
            raise RuntimeError(f"decoding with cache type {self.cache} failed ({status}): {log.reason() or 'out of cells?'}")
        self.n_tokens += n
        rows = n if all_logits else 1
        return np.ctypeslib.as_array(api.llama_get_logits(self.handle), shape=(rows*self.model.n_vocab,)).reshape(rows, -1)

    def clear(self) -> None:
        """Forgets all tokens."""
        api.llama_memory_clear(api.llama_get_memory(self.handle), True)
        self.n_tokens = 0

    def close(self) -> None:
        """Frees the cache."""
        api.llama_batch_free(self.batch)
        with CapturedLog(False):
            api.llama_free(self.handle)
