"""Llama: llama_cpp.Llama with names for cache types, flash attention where a type needs it, and errors that say why.

    Llama("model.gguf", kv_type="kvarn")                 kvarn4 keys, kvarn2 values: the setting the authors ship
    Llama("model.gguf", kv_type="kvarn4/kvarn2")         the same, spelled out: KEYS/VALUES
    Llama("model.gguf", type_k="kvarn3", type_v="f16")   one side each, by name or by id
    with Llama("model.gguf", kv_type="kvarn") as llm:    freed at the end of the block
        print(llm.kv_info())                             what the cache takes, and what f16 would

SPDX-License-Identifier: MIT
"""

import contextlib
import ctypes
import os
from html import escape
from types import TracebackType
from typing import Any, Callable, Dict, Iterator, Optional, Sequence, Type, Union

from . import kvtype
from .kv_info import KVInfo, KVSize, info_of, read_size
from .library import load

LIBRARY = load()  # before llama_cpp: it takes its libraries when it is imported

import llama_cpp  # noqa: E402

from .log import CapturedLog  # noqa: E402

__all__ = ["LIBRARY", "KVInfo", "KVSize", "Llama", "install", "llama_cpp", "read_size", "type_id"]


def type_id(given: Union[str, int]) -> int:
    """Id of a cache type given by name or id; ValueError if the library does not have it."""
    if isinstance(given, str):
        if given not in kvtype.NAMES:
            raise ValueError(f"unknown cache type '{given}': use one of {', '.join(kvtype.NAMES)}")
        return LIBRARY.types[given]
    name = LIBRARY.name(int(given))
    if name not in kvtype.NAMES:
        raise ValueError(f"type {name} (id {given}) is no cache type: use one of {', '.join(kvtype.NAMES)}")
    return int(given)


@contextlib.contextmanager
def environment(name: str, value: Optional[str]) -> "Iterator[None]":
    """A variable that the library reads when a context is made; None leaves it as it is."""
    before = os.environ.get(name)
    if value is not None:
        os.environ[name] = value
    try:
        yield
    finally:
        if value is not None:
            os.environ.pop(name)
            if before is not None:
                os.environ[name] = before


class Llama(llama_cpp.Llama):
    """llama_cpp.Llama on the patched libraries: the same methods, and what they do is the same with every cache type.

    kv_type          "kvarn", "kvarn2", "kvarn3", "kvarn4", any type of llama.cpp, or "KEYS/VALUES"; None: f16
    type_k, type_v   the same side by side, by name or id; not together with kv_type
    flash_attn       None: on where a type needs it
    swa_full         None: off with kvarn types, else llama.cpp's default
    kv_sink          tokens at the start that kvarn keeps exact, rounded up to 128s; None: KVARN_SINK of the environment, or 0
    verbose, kwargs  llama_cpp.Llama's

    ValueError if a name is unknown or the model cannot have such a cache; the message has llama.cpp's own reason.
    kv_size holds what was allocated; kv_info() adds how much of it is in use and what f16 would take.
    """

    _stack = contextlib.ExitStack()  # what close() asks for when __init__ refused before it got its own
    kv_size: KVSize
    on_eval: Optional[Callable[[int, int], None]] = None     # see eval()

    def __init__(self, model_path: str, *, kv_type: Optional[str] = None, type_k: Union[str, int, None] = None,
                 type_v: Union[str, int, None] = None, flash_attn: Optional[bool] = None, swa_full: Optional[bool] = None,
                 kv_sink: Optional[int] = None, verbose: bool = True, **kwargs: Any):
        if kv_type is not None:
            if type_k is not None or type_v is not None:
                raise ValueError("give kv_type, or type_k and type_v, not both")
            type_k, type_v = kvtype.parse(kv_type)
        ids = [None if given is None else type_id(given) for given in (type_k, type_v)]
        names = [None if number is None else LIBRARY.name(number) for number in ids]
        if flash_attn is None:
            flash_attn = any(map(kvtype.is_quantized, names))
        elif not flash_attn and (kvtype.is_kvarn(*names) or kvtype.is_quantized(names[1])):
            raise ValueError(f"cache type {kvtype.label(names[0] or 'f16', names[1] or 'f16')} needs flash attention; "
                             "leave flash_attn out, or use kv_type='f16'")
        if swa_full is None and kvtype.is_kvarn(*names):
            swa_full = False
        self.kv_sink = kv_sink
        with CapturedLog(verbose) as log, environment("KVARN_SINK", None if kv_sink is None else str(kv_sink)):
            try:
                super().__init__(model_path, type_k=ids[0], type_v=ids[1], flash_attn=flash_attn, swa_full=swa_full,
                                 verbose=verbose, **kwargs)
            except (ValueError, RuntimeError) as error:
                reason = log.reason()
                raise type(error)(f"{error}: {reason}" if reason else str(error)) from None
        self.kv_size = read_size(log.lines)

    def kv_info(self) -> KVInfo:
        """Type, bits per value, bytes allocated and saved against f16, tokens in use: a line, or a table in a notebook."""
        return info_of(self.kv_size, self.n_ctx(), self.n_tokens)

    def __enter__(self) -> "Llama":
        return self

    def __exit__(self, kind: Optional[Type[BaseException]], error: Optional[BaseException],
                 trace: Optional[TracebackType]) -> None:
        self.close()

    def __repr__(self) -> str:
        name = os.path.basename(getattr(self, "model_path", ""))
        if not hasattr(self, "kv_size"):
            return f"<kvarn.Llama {name}, not loaded>"
        return f"<kvarn.Llama {name}, {self.kv_info()}>"

    def _repr_html_(self) -> str:
        if not hasattr(self, "kv_size"):
            return escape(repr(self))
        name = self.metadata.get("general.name") or os.path.basename(self.model_path)
        return f"<b>{escape(name)}</b>{self.kv_info()._repr_html_()}"

    def eval(self, tokens: Sequence[int]) -> None:
        """Decodes tokens after those in the cache, n_batch at a time. RuntimeError, with nothing decoded, if they do not fit.

        on_eval(done, all), where set, is called before every batch, be it of one token.
        """
        room = self.n_ctx() - self.n_tokens
        if len(tokens) > room:
            raise RuntimeError(f"{len(tokens)} more tokens do not fit: {self.n_tokens} of n_ctx = {self.n_ctx()} are in use; "
                               "make the Llama with a larger n_ctx")
        with CapturedLog(self.verbose) as log:
            try:
                for start in range(0, len(tokens), self.n_batch):
                    if self.on_eval is not None:
                        self.on_eval(start, len(tokens))
                    super().eval(tokens[start:start + self.n_batch])
            except RuntimeError as error:
                reason = log.reason()
                raise RuntimeError(f"{error}: {reason}" if reason else str(error)) from None

    # states without the scores array: it is not filled unless logits_all, and is a hundred times the size of a small cache

    def save_state(self) -> "llama_cpp.LlamaState":
        """A copy of cache and tokens, to go on from later; picklable. Without logits, unless logits_all."""
        scores = self.scores
        if not self._logits_all:
            self.scores = scores[:0]
        try:
            with CapturedLog(self.verbose):
                state = super().save_state()
        finally:
            self.scores = scores
        state.input_ids = state.input_ids[:state.n_tokens].copy()
        return state

    def load_state(self, state: "llama_cpp.LlamaState") -> None:
        """Goes back to a saved state. RuntimeError, with an empty cache, if it is another model's or type's, or damaged."""
        n = state.n_tokens
        if n > len(self.input_ids):
            raise RuntimeError(f"the state holds {n} tokens, this context takes {self.n_ctx()}; use a larger n_ctx")
        buffer = (ctypes.c_uint8*state.llama_state_size).from_buffer_copy(state.llama_state)
        with CapturedLog(self.verbose) as log:
            taken = llama_cpp.llama_state_set_data(self._ctx.ctx, buffer, state.llama_state_size)
        if taken != state.llama_state_size or not taken:
            self.reset()  # type: ignore[no-untyped-call]
            raise RuntimeError("the state does not fit this context: "
                               + (log.reason() or "another model, cache type or n_ctx, or damaged data"))
        if len(state.scores):
            self.scores[:len(state.scores)] = state.scores
        self.input_ids[:n] = state.input_ids[:n]
        self.n_tokens = n
        self._requires_eval = True
        self._seed = state.seed

    def __getstate__(self) -> "Dict[str, Any]":
        state: "Dict[str, Any]" = super().__getstate__()  # type: ignore[no-untyped-call]
        for side in ("type_k", "type_v"):  # ids are the library's own; names outlive it
            state[side] = LIBRARY.name(state[side])
        state["kv_sink"] = self.kv_sink
        return state


def install() -> None:
    """Makes llama_cpp.Llama this class, for frameworks that create it themselves and pass kv_type through."""
    llama_cpp.Llama = Llama  # type: ignore[misc]
