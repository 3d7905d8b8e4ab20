"""marked.py - a PNG that carries a hash of what it was drawn from, so that a test can tell that it is stale.

SPDX-License-Identifier: MIT
"""

import hashlib
import json
from pathlib import Path

KEY = "kvarn-data"


def mark_of(data) -> str:
    """data: whatever JSON can hold."""
    return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()


def save(figure, path, mark: str) -> None:
    figure.savefig(path, dpi=130, metadata={KEY: mark, "Software": None})


def read(path) -> str:
    """The mark in a PNG; "" if it has none."""
    start = f"tEXt{KEY}\0".encode()
    content = Path(path).read_bytes()
    at = content.find(start)
    return content[at + len(start):at + len(start) + 64].decode() if at >= 0 else ""
