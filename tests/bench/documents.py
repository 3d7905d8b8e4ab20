"""documents.py - writes what README and docs say with figures: tables between their marks, and the plots.

    python tests/bench/documents.py             # all of them, from the results in tests/bench/results and cuda/bench/results
    python tests/bench/documents.py --text      # the tables alone

tests/test_documents.py compares the tables, and the hash that each plot carries of what it was drawn from.
SPDX-License-Identifier: MIT
"""

import sys
from pathlib import Path

import pictures
import quality
import sizes
import speed

ROOT = Path(__file__).resolve().parents[2]
DOCUMENTS = [ROOT/"README.md", *sorted((ROOT/"docs").glob("*.md"))]


def texts() -> "dict[str, str]":
    """Name of a mark -> what stands between its two ends."""
    return {**quality.texts(quality.load()), **speed.texts(), **sizes.texts(), **pictures.texts()}


def marks() -> "dict[str, str]":
    """Plot in docs/ -> the mark that it must carry (marked.py)."""
    return {**quality.marks(), **speed.marks(), **pictures.marks()}


def main() -> None:
    parts = texts()
    for path in DOCUMENTS:
        path.write_text(quality.filled(path.read_text(encoding="utf-8"), parts), encoding="utf-8")
    if "--text" not in sys.argv[1:]:
        for module in (quality, speed, pictures):
            module.draw(ROOT/"docs")


if __name__ == "__main__":
    main()
