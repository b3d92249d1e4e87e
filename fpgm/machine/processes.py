"""Which of a run's processes this is, as torchrun says it in the environment. No torch."""

from __future__ import annotations

import os


def rank() -> int:
    return int(os.environ.get("RANK", "0"))


def count() -> int:
    return int(os.environ.get("WORLD_SIZE", "1"))


def first() -> bool:
    """Whether this is the process that writes."""
    return rank() == 0


def alone() -> bool:
    return count() == 1


def speaker() -> str:
    """What a line opens with that one of several processes prints."""
    return "" if first() else f"rank {rank()}: "
