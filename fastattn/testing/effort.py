"""How much a test does: less where Triton interprets its kernels, which takes a thousand times as long."""

import os
from collections.abc import Sequence
from typing import TypeVar

INTERPRETING = os.environ.get("TRITON_INTERPRET", "0") != "0"

Item = TypeVar("Item")


def examples(count: int, share: int = 5) -> int:
    """Of hypothesis, for one test: all, or one in so many."""
    return max(count // share, 4) if INTERPRETING else count


def some(items: Sequence[Item], count: int = 2) -> Sequence[Item]:
    """All of them, or the first few."""
    return items[:count] if INTERPRETING else items
