"""One line of progress: redrawn in place on a terminal, a line now and then elsewhere.

    command 2>&1 | python progress.py LOG     shows a build's [done/total] steps; LOG keeps all, its end is printed on failure

SPDX-License-Identifier: MIT
"""

import re
import shutil
import sys
import time
from typing import TextIO

STEP = re.compile(r"\[ *(\d+)(?:/(\d+)|%)\] *(.*)")
TROUBLE = re.compile(r"error|FAILED|Error|kvarn: |Failed", re.ASCII)


class Bar:
    """bar = Bar("label"); bar.show(0.3, "text") as often as you like; bar.close("last words")."""

    def __init__(self, label: str, stream: "TextIO | None" = None, every: float = 30.0):
        self.label = label
        self.stream = stream or sys.stderr
        self.live = self.stream.isatty()
        self.every = 0.1 if self.live else every     # seconds between two drawings
        self.drawn = time.monotonic()

    def show(self, part: float, text: str = "") -> None:
        now = time.monotonic()
        if now - self.drawn < self.every:
            return
        self.drawn = now
        part = min(max(part, 0.0), 1.0)
        if not self.live:
            print(f"{self.label} {part:4.0%}  {text}".rstrip(), file=self.stream, flush=True)
            return
        done = int(part*20)
        line = f"{self.label} [{'#'*done}{'.'*(20 - done)}] {text}"
        print("\r" + line[:shutil.get_terminal_size().columns - 1] + "\033[K", end="", file=self.stream, flush=True)

    def close(self, text: str = "") -> None:
        if self.live:
            print("\r\033[K", end="", file=self.stream)
        if text:
            print(f"{self.label} {text}", file=self.stream, flush=True)


def follow_build(log_path: str) -> int:
    started, bar = time.monotonic(), Bar("build", sys.stdout)
    last: "list[str]" = []
    installed = False
    with open(log_path, "w", encoding="utf-8", errors="replace") as log:
        for line in sys.stdin:
            log.write(line)
            last = (last + [line.rstrip()])[-40:]
            installed = installed or line.startswith("Successfully installed")
            step = STEP.search(line)
            if step:
                part = int(step.group(1))/int(step.group(2) or 100)
                bar.show(part, f"{int(time.monotonic() - started):4d} s  {step.group(3).split('/')[-1][:60]}")
            elif line.lstrip().startswith("kvarn: "):
                bar.close(line.strip())
    if not installed:
        with open(log_path, encoding="utf-8", errors="replace") as log:
            trouble = [line.rstrip() for line in log if TROUBLE.search(line)][:10]
        bar.close("failed; first lines that look like a reason, then the end of the log:\n" + "\n".join([*trouble, "...", *last]))
        return 1
    bar.close(f"done in {int(time.monotonic() - started)} s")
    return 0


if __name__ == "__main__":
    sys.exit(follow_build(sys.argv[1]))
