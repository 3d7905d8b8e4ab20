"""The last row of a terminal, kept for a status while text scrolls above it.

    scrolling region        ESC [ 1 ; rows-1 r     text stays above the last row
    drawing                 ESC 7, go there, text, ESC 8: the cursor is where it was

Nothing is written where the stream is no terminal. SPDX-License-Identifier: MIT
"""

import os
import shutil
import sys
import time
from types import TracebackType
from typing import Optional, TextIO, Type

EVERY = 0.1        # seconds between two drawings


class StatusLine:
    """with StatusLine() as line: line.show("text") as often as you like."""

    def __init__(self, stream: Optional[TextIO] = None):
        self.stream = stream or sys.stdout
        self.live = self.stream.isatty() and os.environ.get("TERM", "dumb") != "dumb"
        self.rows, self.drawn = 0, 0.0

    def __enter__(self) -> "StatusLine":
        self.fit()
        return self

    def fit(self) -> None:
        """Sets the region for the terminal's size, which may change at any time."""
        rows = shutil.get_terminal_size().lines
        if self.live and rows > 3 and rows != self.rows:
            self.rows = rows
            # a line feed first: the cursor may be on the last row
            self.stream.write(f"\n\0337\033[1;{rows - 1}r\0338\033[1A")
            self.stream.flush()

    def show(self, text: str, now: bool = False) -> None:
        moment = time.monotonic()
        if not self.live or (moment - self.drawn < EVERY and not now):
            return
        self.drawn = moment
        self.fit()
        width = shutil.get_terminal_size().columns - 1
        self.stream.write(f"\0337\033[{self.rows};1H\033[2m{text[:width]}\033[0m\033[K\0338")
        self.stream.flush()

    def __exit__(self, kind: Optional[Type[BaseException]], error: Optional[BaseException],
                 trace: Optional[TracebackType]) -> None:
        if self.live and self.rows:
            self.stream.write(f"\0337\033[r\033[{self.rows};1H\033[K\0338")
            self.stream.flush()
