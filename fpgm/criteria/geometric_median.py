"""FPGM's criterion and its kin: where a filter lies among the others of its layer.

FPGM (He et al., CVPR 2019). `weight` is (N, C, kH, kW); filter F_j = weight[j].flatten().
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor
from torch.nn.functional import normalize

from fpgm.criteria.criterion import criterion
from fpgm.criteria.weights import filters as flattened
from fpgm.criteria.weights import l2, norms

Distance = Callable[[Tensor, Tensor], Tensor]
Share = Annotated[float, Field(ge=0, le=1, examples=["0.25"])]


@criterion()
def gm(weight: Tensor, distance: Literal["l2", "l1", "cosine"] = "l2") -> Tensor:
    """Sum of distances to the other filters of the layer (FPGM, eq. 4). (N, C, kH, kW) -> (N,).

    `distance` is one of DISTANCES. Only "l2" is the paper's; the others are its ablation.
    """
    return summed(flattened(weight), DISTANCES[distance])


@criterion()
def fermat(weight: Tensor) -> Tensor:
    """Distance to the layer's true geometric median (FPGM, eq. 2-3). (N, C, kH, kW) -> (N,).

    Where filters lie on one line the median need not be unique; one of the minimisers is used.
    """
    points = flattened(weight)
    return norms(points - geometric_median(points))


def shares(filters: int, rate: float, norm_share: float = 0.25) -> tuple[int, int]:
    """How many go by norm and how many by distance: the floor of each share, as published. Their
    sum can be one less than floor(filters * rate): 16 filters at 0.4 lose 1 + 4."""
    amount = filters * rate
    return int(amount * norm_share + 1e-9), int(amount * (1 - norm_share) + 1e-9)


@criterion(places=True, pruned=lambda *given, **options: sum(shares(*given, **options)))
def mix(weight: Tensor, rate: float, norm_share: Share = 0.25) -> Tensor:
    """FPGM-mix as published: part of the pruned filters by norm, the rest by distance. -> (N,).

    The score is the place in the order of pruning. Of a layer that loses `rate` of its filters the
    share norm_share are the smallest by L2, the others the smallest by their distances among the
    survivors of that, on the same weights (the paper's 40 % are 10 % norm + 30 % distance).
    """
    points = flattened(weight)
    by_norm, _ = shares(len(points), rate, norm_share)
    order = torch.argsort(l2(weight), stable=True)
    survivors = order[by_norm:].sort().values
    sums = summed(points[survivors], euclidean)
    order = torch.cat((order[:by_norm], survivors[torch.argsort(sums, stable=True)]))
    place = torch.arange(len(points), dtype=points.dtype, device=points.device)
    return torch.empty_like(place).scatter_(0, order, place)


def geometric_median(points: Tensor, iterations: int = 1000, tolerance: float = 1e-12) -> Tensor:
    """The point with the least sum of Euclidean distances to `points` (N, d) -> (d,).

    Weiszfeld's iteration divides by zero on a data point. The only data point that can be the
    median is the one with the least sum, so that one is tested first (Vardi & Zhang 2000): it is
    the median where the pull of the other points does not exceed its multiplicity. If it is not,
    one step along the pull goes below the sum at every data point, and as the sum never rises
    again no later iterate can meet one.
    """
    start: Tensor = points[summed(points, euclidean).argmin()]
    distance = norms(points - start)
    scale = distance.mean()
    away = distance > tolerance * scale  # nearer ones are the same point: the pull hides them
    if not away.any():
        return start
    weights = 1 / distance[away]
    pull = ((points[away] - start) * weights[:, None]).sum(0)
    multiplicity = float((~away).sum())
    if pull.norm() <= multiplicity:
        return start
    median: Tensor = start + pull / weights.sum() * (1 - multiplicity / pull.norm())
    for _ in range(iterations):
        weights = 1 / norms(points - median)
        new = (points * weights[:, None]).sum(0) / weights.sum()
        moved = (new - median).norm()
        median = new
        if moved <= tolerance * scale:
            break
    return median


def summed(filters: Tensor, distance: Distance, block: int = 256) -> Tensor:
    """Sum of distances of each filter to all others. (N, d) -> (N,).

    Distances are symmetric: each block of rows meets only itself and what comes after it, which
    halves the work and keeps the memory at (block, N).

    Centred first, as no distance but the cosine changes under a translation and `euclidean` needs
    it for its digits: with the mean at the origin sum_i |a - x_i| >= N |a|, and so its loss of
    about sqrt(eps) * (|a| + |b|) a pair stays a few times 1.5e-8 of the sum, however near to each
    other the filters lie.
    """
    if distance is not cosine:
        filters = filters - filters.mean(0)
    sums = filters.new_zeros(len(filters))
    for start in range(0, len(filters), block):
        distances = distance(filters[start : start + block], filters[start:])
        distances.diagonal().zero_()
        sums[start : start + block] += distances.sum(1)
        sums[start + block :] += distances[:, block:].sum(0)
    return sums


def euclidean(a: Tensor, b: Tensor) -> Tensor:
    """(n, d), (m, d) -> (n, m) by |a|^2 + |b|^2 - 2ab: one matrix product, in place from there.

    Squares below 4e-14 of |a|^2 + |b|^2 are rounding (equal filters of 25,088 weights give up to
    1.6e-14) and made 0, so that equal filters get equal sums.
    """
    square, other = a.square().sum(1)[:, None], b.square().sum(1)
    distance = (a @ b.T).mul_(-2).add_(other).add_(square)
    rounding = distance < 4e-14 * (square + other)
    return distance.masked_fill_(rounding, 0).sqrt_()


def manhattan(a: Tensor, b: Tensor) -> Tensor:
    """Sum of absolute differences. (n, d), (m, d) -> (n, m)."""
    return torch.cdist(a, b, p=1)


def cosine(a: Tensor, b: Tensor) -> Tensor:
    """1 - cosine; a zero filter has none: 1 to all others, 0 to zeros. (n, d), (m, d) -> (n, m)."""
    zero = ~a.any(1)[:, None] & ~b.any(1)
    cosines = normalize(a) @ normalize(b).T
    return (1 - cosines).masked_fill_(zero, 0)


DISTANCES: dict[str, Distance] = {"l2": euclidean, "l1": manhattan, "cosine": cosine}
