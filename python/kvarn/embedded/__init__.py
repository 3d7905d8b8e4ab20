"""kvarn.embedded - a small model that reasons at length, and the problems it was trained to solve.

Every answer byte is one token. See README.md in this folder for how the model was made and how well it does.

SPDX-License-Identifier: MIT
"""
from pathlib import Path

from .tasks import FAMILIES, Problem, Score, check, problems

families = tuple(FAMILIES)


def path() -> Path:
    """The GGUF file of the embedded model."""
    return Path(__file__).with_name("kvarn-tasks.gguf")


__all__ = ["Problem", "Score", "check", "families", "path", "problems"]
