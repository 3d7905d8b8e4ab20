"""Catches what llama.cpp logs, so that a failure can say its reason and the cache its size.

llama-cpp-python hides the library's errors unless verbose (it still has ggml's old level numbers), which leaves
"Failed to create llama_context" and nothing else.

SPDX-License-Identifier: MIT
"""

import ctypes
import sys
import threading

import llama_cpp
import llama_cpp._logger  # installs its own callback when imported; ours comes after

WARN, ERROR, CONT = 3, 4, 5

_active: "list[CapturedLog]" = []
_lock = threading.Lock()


@llama_cpp.llama_log_callback  # type: ignore[untyped-decorator]
def _callback(level: int, text: bytes, user_data: "ctypes.c_void_p") -> None:
    if _active:
        _active[-1].take(level, text.decode("utf-8", errors="replace"))


class CapturedLog:
    """with CapturedLog(verbose) as log: ...   log.lines and log.errors hold what was said; verbose also prints it."""

    def __init__(self, verbose: bool):
        self.verbose = verbose
        self.lines: "list[str]" = []
        self.errors: "list[str]" = []
        self.is_error = False
        self.partial = ""

    def take(self, level: int, text: str) -> None:
        """A piece of the log, of any length; lines are put together here."""
        if self.verbose:
            print(text, end="", flush=True, file=sys.stderr)
        if level != CONT:
            self.is_error = level == ERROR
        self.partial += text
        *whole, self.partial = self.partial.split("\n")
        for line in whole:
            self.lines.append(line)
            if self.is_error and line.strip():
                self.errors.append(line.strip())

    def reason(self) -> str:
        """The library's error lines as one text, without its function names; "" if it gave none."""
        said = []
        for line in self.errors:
            words = line.split(": ")
            while len(words) > 1 and " " not in words[0] and words[0] != "kvarn":
                words = words[1:]
            text = ": ".join(words)
            text = text.replace("failed to initialize the context: ", "").rstrip(".")
            if text not in said:
                said.append(text)
        return "; ".join(said[:3])

    def __enter__(self) -> "CapturedLog":
        with _lock:
            self.saved, self.saved_data = llama_cpp.llama_log_callback(), ctypes.c_void_p()
            llama_cpp.llama_log_get(ctypes.byref(self.saved), ctypes.byref(self.saved_data))
            _active.append(self)
            llama_cpp.llama_log_set(_callback, None)
        return self

    def __exit__(self, *details: object) -> None:
        with _lock:
            _active.remove(self)
            llama_cpp.llama_log_set(self.saved, self.saved_data)
