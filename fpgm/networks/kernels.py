"""The eight flips and rotations of a square kernel."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor


@cache
def moves(size: int) -> Tensor:
    """(8, size * size): where each number of a flattened kernel comes from, for the four rotations
    and those of the kernel flipped; the first leaves it as it is."""
    places = torch.arange(size * size).view(size, size)
    both = (places, places.flip(1))
    return torch.stack([torch.rot90(p, turns).flatten() for p in both for turns in range(4)])


@cache
def inverse(size: int) -> Tensor:
    """(8,): which of the moves takes back each of them."""
    table = moves(size)
    start = torch.arange(size * size)
    back = [next(j for j in range(8) if torch.equal(one[table[j]], start)) for one in table]
    return torch.tensor(back)
