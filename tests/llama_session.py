"""llama_session.py - models and contexts on llama.cpp's low-level API: feed sequences, read logits, cut, copy, save.

SPDX-License-Identifier: MIT
"""

import ctypes
import functools

import numpy as np

import kvarn.library

LIBRARY = kvarn.library.load()  # before llama_cpp: it takes its libraries when it is imported

import llama_cpp  # noqa: E402

from kvarn.log import CapturedLog  # noqa: E402

FLASH = {False: 0, True: 1, None: -1}  # None: the library decides


@functools.lru_cache(maxsize=None)
def model(path: str):
    """A model, kept until the process ends."""
    params = llama_cpp.llama_model_default_params()
    params.use_mmap = False
    with CapturedLog(False) as log:
        loaded = llama_cpp.llama_model_load_from_file(path.encode(), params)
    if not loaded:
        raise RuntimeError(f"cannot load {path}: {log.reason()}")
    return loaded


def vocabulary(path: str) -> int:
    return llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(model(path)))


def nmse(a: np.ndarray, b: np.ndarray) -> float:
    """Squared error of b relative to the energy of a."""
    a = a.astype(np.float64)
    return float(((a - b)**2).sum()/(a**2).sum())


class Refused(RuntimeError):
    """Carries the error lines that the library logged."""

    def __init__(self, errors: "list[str]"):
        super().__init__("; ".join(errors))
        self.errors = errors


class Context:
    """with Context(path, "kvarn4", "kvarn2", n_ctx=1024) as context: ..."""

    def __init__(self, path: str, keys: str = "f16", values: str = "f16", n_ctx: int = 1024, n_batch: int = 512,
                 n_ubatch: int = 128, n_seq: int = 1, unified: bool = True, flash: "bool | None" = True, swa_full: bool = False,
                 n_threads: int = 1):
        params = llama_cpp.llama_context_default_params()
        params.n_ctx, params.n_batch, params.n_ubatch, params.n_seq_max = n_ctx, n_batch, n_ubatch, n_seq
        params.n_threads = params.n_threads_batch = n_threads
        params.type_k, params.type_v = LIBRARY.types[keys], LIBRARY.types[values]
        params.flash_attn_type = FLASH[flash]
        params.kv_unified, params.swa_full, params.no_perf = unified, swa_full, False
        self.n_vocab, self.n_batch = vocabulary(path), n_batch
        with CapturedLog(False) as log:
            self.handle = llama_cpp.llama_init_from_model(model(path), params)
        self.log = self.creation_log = log.lines
        if not self.handle:
            raise Refused(log.errors)
        self.memory = llama_cpp.llama_get_memory(self.handle)
        self.batch = llama_cpp.llama_batch_init(n_batch, 0, n_seq)

    def __enter__(self) -> "Context":
        return self

    def __exit__(self, *details) -> None:
        llama_cpp.llama_batch_free(self.batch)
        with CapturedLog(False):
            llama_cpp.llama_free(self.handle)

    def try_decode(self, rows: "list[tuple[int, int, int]]", wanted: "set[int]" = frozenset()) -> int:
        """One batch of (token, position, sequence or tuple of them) rows; result of llama_decode. wanted: rows to get logits."""
        batch = self.batch
        for i, (token, position, sequences) in enumerate(rows):
            sequences = sequences if isinstance(sequences, tuple) else (sequences,)
            batch.token[i], batch.pos[i], batch.n_seq_id[i], batch.logits[i] = token, position, len(sequences), i in wanted
            for j, sequence in enumerate(sequences):
                batch.seq_id[i][j] = sequence
        batch.n_tokens = len(rows)
        with CapturedLog(False) as log:
            status = llama_cpp.llama_decode(self.handle, batch)
        self.log = log.lines
        return status

    def decode(self, rows, wanted=frozenset()) -> None:
        status = self.try_decode(rows, wanted)
        assert status == 0, f"llama_decode returned {status} for {len(rows)} tokens: {self.log}"

    def logits(self, row: int) -> np.ndarray:
        """Logits of a wanted row of the last batch, copied."""
        return np.ctypeslib.as_array(llama_cpp.llama_get_logits_ith(self.handle, row), shape=(self.n_vocab,)).copy()

    def feed(self, tokens, position: int = 0, sequence: int = 0) -> np.ndarray:
        """Appends tokens to a sequence, in batches as large as the context takes; logits after the last one."""
        rows = [(int(token), position + i, sequence) for i, token in enumerate(tokens)]
        for start in range(0, len(rows), self.n_batch):
            part = rows[start:start + self.n_batch]
            self.decode(part, {len(part) - 1})
        return self.logits(len(part) - 1)

    def greedy(self, prompt, n: int) -> "tuple[list[int], np.ndarray]":
        """n tokens after the prompt, each the likeliest; and all their logits."""
        rows, tokens = [self.feed(prompt)], []
        for i in range(n):
            tokens.append(int(rows[-1].argmax()))
            rows.append(self.feed(tokens[-1:], len(prompt) + i))
        return tokens, np.stack(rows)

    def try_decode_and_abort(self, rows, after: int) -> int:
        """try_decode(), given up when the library asks for the `after`-th time whether it should."""
        asked = 0

        @llama_cpp.ggml_abort_callback
        def callback(data):
            nonlocal asked
            asked += 1
            return asked > after

        with CapturedLog(False):
            llama_cpp.llama_set_abort_callback(self.handle, callback, None)
        try:
            return self.try_decode(rows)
        finally:
            with CapturedLog(False):
                llama_cpp.llama_set_abort_callback(self.handle, llama_cpp.ggml_abort_callback(), None)

    def last_position(self, sequence: int = 0) -> int:
        return llama_cpp.llama_memory_seq_pos_max(self.memory, sequence)

    def n_reused(self) -> int:
        """Graphs that were used again instead of being built."""
        return llama_cpp.llama_perf_context(self.handle).n_reused

    def remove(self, sequence: int, start: int = -1, end: int = -1) -> None:
        """Removes positions [start, end) of a sequence (-1: of all); a kvarn cache never refuses."""
        assert llama_cpp.llama_memory_seq_rm(self.memory, sequence, start, end), f"seq_rm({sequence}, {start}, {end}) was refused"

    def copy(self, source: int, target: int, start: int = -1, end: int = -1) -> None:
        llama_cpp.llama_memory_seq_cp(self.memory, source, target, start, end)

    def keep(self, sequence: int) -> None:
        llama_cpp.llama_memory_seq_keep(self.memory, sequence)

    def can_shift(self) -> bool:
        return llama_cpp.llama_memory_can_shift(self.memory)

    def add(self, sequence: int, start: int, end: int, shift: int) -> None:
        """Moves the tokens at positions [start, end) by `shift`."""
        with CapturedLog(False) as log:
            llama_cpp.llama_memory_seq_add(self.memory, sequence, start, end, shift)
        self.log = log.lines

    def divide(self, sequence: int, start: int, end: int, divisor: int) -> None:
        """Divides positions [start, end)."""
        with CapturedLog(False) as log:
            llama_cpp.llama_memory_seq_div(self.memory, sequence, start, end, divisor)
        self.log = log.lines

    def clear(self) -> None:
        llama_cpp.llama_memory_clear(self.memory, True)

    def save(self, sequence: "int | None" = None) -> bytes:
        """State of a sequence, or of everything."""
        with CapturedLog(False):
            if sequence is None:
                size = llama_cpp.llama_state_get_size(self.handle)
                data = (ctypes.c_uint8*size)()
                n = llama_cpp.llama_state_get_data(self.handle, data, size)
            else:
                size = llama_cpp.llama_state_seq_get_size(self.handle, sequence)
                data = (ctypes.c_uint8*size)()
                n = llama_cpp.llama_state_seq_get_data(self.handle, data, size, sequence)
        assert n == size, f"a state of {size} bytes was announced, {n} were written"
        return bytes(data)

    def load(self, state: bytes, sequence: "int | None" = None) -> "list[str]":
        """Restores a state; the error lines if it was refused."""
        data = (ctypes.c_uint8*max(1, len(state))).from_buffer_copy(state or b"\0")
        with CapturedLog(False) as log:
            if sequence is None:
                n = llama_cpp.llama_state_set_data(self.handle, data, len(state))
            else:
                n = llama_cpp.llama_state_seq_set_data(self.handle, data, len(state), sequence)
        self.log = log.lines
        if n != len(state):
            assert log.errors, f"{n} of {len(state)} bytes were taken without an error line"
        return log.errors
