"""Kernels that layers share: k-means over the 3x3 kernels of a network, whichever way round.

A kernel w is near a centre c if any of the eight flips and rotations t makes |w - t(c)| small.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from fpgm.networks.kernels import inverse, moves

SIDE = 3
ROUNDS = 25  # of k-means; most of what there is to gain comes in the first
CHUNK = 2**24  # distances at once


@dataclass(frozen=True)
class Shared:
    """centres (K, 9); which (n,): each kernel's centre; turn (n,): the move (networks.kernels) that
    makes the kernel of it."""

    centres: Tensor
    which: Tensor
    turn: Tensor

    def kernels(self) -> Tensor:
        """(n, 9)."""
        return turned(self.centres[self.which], self.turn)


def turned(kernels: Tensor, turn: Tensor) -> Tensor:
    """Each of the kernels (n, 9) moved as `turn` (n,) says."""
    return kernels.gather(1, moves(SIDE).to(kernels.device)[turn])


def turned_back(kernels: Tensor, turn: Tensor) -> Tensor:
    """What `turned` was given."""
    return turned(kernels, inverse(SIDE).to(kernels.device)[turn])


def shared(kernels: Tensor, count: int, seed: int, turns: bool = True) -> Shared:
    """Kernels (n, 9) by `count` centres, or as many as there are kernels, with a small sum of
    |w - t(c)|^2. turns: also flipped and rotated, never with a larger sum than without."""
    moves_used = len(moves(SIDE)) if turns else 1
    count = min(count, len(kernels))
    generator = torch.Generator().manual_seed(seed)
    best = _refined(kernels, _spread(kernels, count, 1, generator), 1)
    if turns:
        # From the centres without turns it can only get better; from ones of its own it mostly is.
        starts = [best.centres, _spread(kernels, count, moves_used, generator)]
        found = [_refined(kernels, start, moves_used) for start in starts]
        best = min(found, key=lambda one: loss(kernels, one))
    return best


def loss(kernels: Tensor, found: Shared) -> float:
    """The sum of |w - t(c)|^2."""
    return float((kernels.double() - found.kernels().double()).square().sum())


def gathered(gradients: Tensor, found: Shared) -> Tensor:
    """Of each centre, from those of the kernels (n, 9): the sum of t^-1 of its kernels'. (K, 9)"""
    back = turned_back(gradients, found.turn)
    # One segment after the other: index_add has another order each time on a GPU, and processes
    # that train together would part.
    order = found.which.argsort(stable=True)
    lengths = torch.bincount(found.which, minlength=len(found.centres))
    return torch.segment_reduce(back[order], "sum", lengths=lengths)


def bits(count: int, kernels: int, turns: bool) -> int:
    """What n kernels take by K centres in float32: 288 K + n (log2 K + log2 |T|)."""
    code = math.ceil(math.log2(count)) if count > 1 else 0
    return 32 * SIDE**2 * count + kernels * (code + 3 * turns)


def _spread(kernels: Tensor, count: int, used: int, generator: torch.Generator) -> Tensor:
    """k-means++ (Arthur and Vassilvitskii, 2007): centres among the kernels, one after the other,
    with a chance as the squared distance to the nearest there is."""
    first = int(torch.randint(len(kernels), (1,), generator=generator))
    chosen = [kernels[first]]
    nearest = _nearest(kernels, kernels[first : first + 1], used)[0]
    while len(chosen) < count:
        chances = nearest.double().cumsum(0)
        if chances[-1] <= 0:
            break  # every kernel is a centre
        at = torch.rand(1, generator=generator, dtype=torch.float64).to(chances.device)
        index = int(
            torch.searchsorted(chances, at * chances[-1], right=True).clamp(max=len(kernels) - 1)
        )
        chosen.append(kernels[index])
        nearest = torch.minimum(nearest, _nearest(kernels, kernels[index : index + 1], used)[0])
    return torch.stack(chosen)


def _nearest(kernels: Tensor, centres: Tensor, used: int) -> tuple[Tensor, Tensor, Tensor]:
    """Squared distance to the nearest centre in any of the first `used` moves, which, and how."""
    ways = centres[:, moves(SIDE)[:used].to(centres.device)].flatten(0, 1)  # (K used, 9)
    # The nearest has the largest w c - |c|^2 / 2: one product, and the square of w is the same.
    least = ways.square().sum(1) / 2
    parts = kernels.split(max(1, CHUNK // len(ways)))
    index = torch.cat([(part @ ways.T - least).argmax(1) for part in parts])
    distance = (kernels - ways[index]).square().sum(1)
    return distance, index // used, index % used


def _refined(kernels: Tensor, centres: Tensor, used: int) -> Shared:
    """Lloyd's rounds: each kernel to its nearest centre, each centre to the mean of its kernels."""
    for _ in range(ROUNDS):
        _, which, turn = _nearest(kernels, centres, used)
        back = turned_back(kernels, turn)
        sums = torch.zeros_like(centres).index_add_(0, which, back)
        counts = torch.bincount(which, minlength=len(centres))
        moved = torch.where(counts[:, None] > 0, sums / counts.clamp(min=1)[:, None], centres)
        if torch.equal(moved, centres):
            break
        centres = moved
    _, which, turn = _nearest(kernels, centres, used)
    return Shared(centres, which, turn)
