"""Llama: llama_cpp.Llama with names for cache types, flash attention where a type needs it, and errors that say why.

    Llama("model.gguf", kv_type="kvarn")                 kvarn4 keys, kvarn2 values: the setting the authors ship
    Llama("model.gguf", kv_type="kvarn4/kvarn2")         the same, spelled out: KEYS/VALUES
    Llama("model.gguf", type_k="kvarn3", type_v="f16")   one side each, by name or by id

SPDX-License-Identifier: MIT
"""

import contextlib
import ctypes
import re
from typing import NamedTuple

from . import kvtype
from .library import load

LIBRARY = load()  # before llama_cpp: it takes its libraries when it is imported

import llama_cpp  # noqa: E402

from .log import CapturedLog  # noqa: E402

_NUMBER = r"\s*([\d.]+)"
_SIZE = re.compile(rf"size ={_NUMBER} MiB \({_NUMBER} cells,{_NUMBER} layers.*"
                   rf"K \((\w+)\):{_NUMBER} MiB, V \((\w+)\):{_NUMBER} MiB")
_SIDE = re.compile(rf"kvarn: (keys|values) (\w+):{_NUMBER} bits per value,{_NUMBER} tiles of{_NUMBER} tokens per stream "
                   rf"\({_NUMBER} asked")
_TAIL = re.compile(rf"kvarn: tail ={_NUMBER} MiB")


class KVSize(NamedTuple):
    """What a context allocated for keys and values."""

    keys: str          # type names
    values: str
    keys_mib: float
    values_mib: float
    tail_mib: float    # tokens that are not in a full tile yet, in f16; 0 without kvarn
    f16_mib: float     # what f16 takes for the same number of tokens
    stored_mib: float  # keys and values of these tokens alone, without tail and spare tiles

    @property
    def mib(self) -> float:
        return self.keys_mib + self.values_mib + self.tail_mib

    @property
    def bits_per_value(self) -> float:
        """Everything allocated, spread over the tokens the user asked for."""
        return 16*self.mib/self.f16_mib if self.f16_mib else 0.0

    @property
    def stored_bits(self) -> float:
        """Bits per value of the types themselves: what a long context comes close to."""
        return 16*self.stored_mib/self.f16_mib if self.f16_mib else 0.0

    def __str__(self) -> str:
        return (f"KV cache {kvtype.label(self.keys, self.values)}: {self.mib:.2f} MiB, {self.bits_per_value:.2f} bits per value "
                f"(f16: {self.f16_mib:.2f} MiB)")


def bits_of(name: str) -> float:
    """Stored bits per value of a row-wise type."""
    return {"f32": 32.0, "f16": 16.0, "bf16": 16.0,
            "q8_0": 8.5, "q5_1": 6.0, "q5_0": 5.5, "q4_1": 5.0, "q4_0": 4.5, "iq4_nl": 4.5}[name]


def read_size(lines: "list[str]") -> KVSize:
    """Sums the size lines of all caches of a context (a model with sliding windows has two)."""
    keys = values = "f16"
    total = {"keys": 0.0, "values": 0.0, "tail": 0.0, "f16": 0.0, "stored": 0.0}
    sides = {match.group(1): (float(match.group(3)), float(match.group(4))/float(match.group(6)))
             for match in map(_SIDE.search, lines) if match}  # bits per value, tokens allocated per token asked for
    for line in lines:
        tail, size = _TAIL.search(line), _SIZE.search(line)
        if tail:
            total["tail"] += float(tail.group(1))
        if size:
            for which, name, mib in (("keys", size.group(4), size.group(5)), ("values", size.group(6), size.group(7))):
                bits, spare = sides.get(which, (16.0, 1.0)) if kvtype.is_kvarn(name) else (bits_of(name), 1.0)
                total[which] += float(mib)
                total["stored"] += float(mib)/spare
                total["f16"] += float(mib)*16/bits/spare
            if not kvtype.is_kvarn(keys, values):
                keys, values = size.group(4), size.group(6)
    return KVSize(keys, values, total["keys"], total["values"], total["tail"], total["f16"], total["stored"])


def type_id(given: "str | int") -> int:
    """Id of a cache type given by name or id; ValueError if the library does not have it."""
    if isinstance(given, str):
        if given not in kvtype.NAMES:
            raise ValueError(f"unknown cache type '{given}': use one of {', '.join(kvtype.NAMES)}")
        return LIBRARY.types[given]
    name = LIBRARY.name(int(given))
    if name not in kvtype.NAMES:
        raise ValueError(f"type {name} (id {given}) is no cache type: use one of {', '.join(kvtype.NAMES)}")
    return int(given)


class Llama(llama_cpp.Llama):
    """llama_cpp.Llama on the patched libraries.

    kv_type     "kvarn", "kvarn2", "kvarn3", "kvarn4", any type of llama.cpp, or "KEYS/VALUES"; None: f16
    type_k, type_v   the same side by side, by name or id; not together with kv_type
    flash_attn  None: on where a type needs it
    swa_full    None: off with kvarn types, else llama.cpp's default
    """

    _stack = contextlib.ExitStack()  # what close() asks for when __init__ refused before it got its own

    def __init__(self, model_path: str, *, kv_type: "str | None" = None, type_k: "str | int | None" = None,
                 type_v: "str | int | None" = None, flash_attn: "bool | None" = None, swa_full: "bool | None" = None,
                 verbose: bool = True, **kwargs):
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
        with CapturedLog(verbose) as log:
            try:
                super().__init__(model_path, type_k=ids[0], type_v=ids[1], flash_attn=flash_attn, swa_full=swa_full,
                                 verbose=verbose, **kwargs)
            except (ValueError, RuntimeError) as error:
                reason = log.reason()
                raise type(error)(f"{error}: {reason}" if reason else str(error)) from None
        self.kv_size = read_size(log.lines)

    def eval(self, tokens) -> None:
        room = self.n_ctx() - self.n_tokens
        if len(tokens) > room:
            raise RuntimeError(f"{len(tokens)} more tokens do not fit: {self.n_tokens} of n_ctx = {self.n_ctx()} are in use; "
                               "make the Llama with a larger n_ctx")
        with CapturedLog(self.verbose) as log:
            try:
                super().eval(tokens)
            except RuntimeError as error:
                reason = log.reason()
                raise RuntimeError(f"{error}: {reason}" if reason else str(error)) from None

    # states without the scores array: it is not filled unless logits_all, and is a hundred times the size of a small cache

    def save_state(self) -> "llama_cpp.LlamaState":
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
        n = state.n_tokens
        if n > len(self.input_ids):
            raise RuntimeError(f"the state holds {n} tokens, this context takes {self.n_ctx()}; use a larger n_ctx")
        buffer = (ctypes.c_uint8*state.llama_state_size).from_buffer_copy(state.llama_state)
        with CapturedLog(self.verbose) as log:
            taken = llama_cpp.llama_state_set_data(self._ctx.ctx, buffer, state.llama_state_size)
        if taken != state.llama_state_size or not taken:
            self.reset()
            raise RuntimeError("the state does not fit this context: "
                               + (log.reason() or "another model, cache type or n_ctx, or damaged data"))
        if len(state.scores):
            self.scores[:len(state.scores)] = state.scores
        self.input_ids[:n] = state.input_ids[:n]
        self.n_tokens = n
        self._requires_eval = True
        self._seed = state.seed

    def __getstate__(self):
        state = super().__getstate__()
        for side in ("type_k", "type_v"):  # ids are the library's own; names outlive it
            state[side] = LIBRARY.name(state[side])
        return state


def install() -> None:
    """Makes llama_cpp.Llama this class, for frameworks that create it themselves and pass kv_type through."""
    llama_cpp.Llama = Llama
