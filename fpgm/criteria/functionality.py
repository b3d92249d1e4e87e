"""Criteria by what filters are for."""

from __future__ import annotations

import math
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor
from torch.nn.functional import normalize

from fpgm.criteria.criterion import criterion
from fpgm.criteria.dependency import places_of
from fpgm.criteria.views import Gate, Preferred

Clusters = Annotated[float, Field(gt=0, le=1, examples=["0.25"])]
Steps = Annotated[int, Field(ge=1, examples=["10"])]
Pixels = Annotated[int, Field(ge=1, examples=["32"])]


@criterion(places=True, preferred=Preferred(), sensitivity=Gate(torch.square))
def functional(
    weight: Tensor,
    *,
    preferred: Tensor,
    sensitivity: Tensor,
    clusters: Clusters = 0.25,
    steps: Steps = 10,
    pixels: Pixels = 32,
) -> Tensor:
    """Of filters that are for the same, the one that contributes most stays longest. -> (N,).

    Inspired by functionality-oriented filter pruning (Qin et al.), of which only the abstract is
    public. Filters are clustered by the direction of the image that each responds to most; one goes
    before another where more filters of its own cluster contribute more than it does, and among
    those with as many where it contributes less: first the least of large clusters, last the best
    of each. preferred: (N, d); sensitivity: the contribution, see taylor; clusters: their number,
    as a share of the filters; steps, pixels: with which `preferred` is gathered, the second its
    images' side at most.
    """
    order = torch.argsort(sensitivity, stable=True)
    count = max(1, math.ceil(clusters * len(weight) - 1e-9))
    # In the order of contribution: what ties is told apart by that, and not by the index.
    cluster = kmeans(normalize(preferred[order]), count)
    same = cluster[:, None] == cluster
    better = same.triu(1).sum(1)
    return places_of(order[torch.argsort(better, descending=True, stable=True)])


def kmeans(points: Tensor, count: int) -> Tensor:
    """scikit-learn's Lloyd algorithm. (N, d) -> (N,), the cluster of each point, `count` at most.

    Begun as k-means++ with the best of all points in place of chance: each centre is the point that
    lowers the sum of squared distances most, of several the first.
    """
    from sklearn.cluster import KMeans  # a second: only where it is asked for

    squares = torch.cdist(points, points).square()
    digits = 1e-9 * squares.max()
    nearest = torch.full_like(squares[0], torch.inf)
    chosen: list[int] = []
    while len(chosen) < count and (nearest > digits).any():
        sums = torch.minimum(squares, nearest).sum(1)
        # The first of the least, to the digits that are no rounding: two points that are nearest
        # to each other lower the sum by the same.
        chosen.append(int((sums <= sums.min() + digits).nonzero()[0]))
        nearest = torch.minimum(nearest, squares[chosen[-1]])
    found = KMeans(len(chosen), init=points[chosen].cpu().numpy(), n_init=1, tol=0)
    return torch.from_numpy(found.fit_predict(points.cpu().numpy())).to(points.device)
