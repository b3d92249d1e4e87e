"""How well what stays explains what goes: the claim of FPGM (He et al., CVPR 2019, section 3.3)
that filters near the geometric median are replaceable, as a number.

R^2 of least squares: 1 where a pruned filter, or its feature map, is a combination of the kept
ones, 0 where they tell nothing about it. All that it takes is the matrix of products between the
filters or maps of a layer, gathered once; every choice of filters is a part of it.

Maps are regressed with an intercept, over pixels: a constant costs a network nothing, as the next
BatchNorm or bias carries it. Filters are regressed without one, over weights: a constant filter
is a filter of its own, and nobody has it to give. So orthogonal filters have 0, and iid Gaussian
filters of d weights K / d where K are kept.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

CUT = 1e-10  # of the largest eigenvalue: directions that only rounding fills


class Products:
    """Sums over pixels of the products of maps, batch by batch, in float64.

    They are taken about the mean of the first batch, else the digits of a map that hardly varies
    would be lost beside its mean.
    """

    def __init__(self) -> None:
        self.pixels = 0
        self._about: Tensor | None = None
        self._sum = self._products = torch.zeros(())

    def add(self, maps: Tensor) -> None:
        """Feature maps (B, N, H, W)."""
        points = maps.detach().double().movedim(1, -1).flatten(0, -2)
        if self._about is None:
            self._about = points.mean(0)
        points = points - self._about
        self._sum = self._sum.to(points) + points.sum(0)
        self._products = self._products.to(points) + points.T @ points
        self.pixels += len(points)

    def covariance(self) -> Tensor:
        """(N, N), on the CPU."""
        mean = self._sum / self.pixels
        return (self._products / self.pixels - mean.outer(mean)).cpu()


def products(weight: Tensor) -> Tensor:
    """Of filters: (N, C, kH, kW) -> (N, N) float64."""
    filters = weight.detach().flatten(1).double().cpu()
    return filters @ filters.T


def explained(products: Tensor, pruned: Tensor) -> Tensor:
    """R^2 of each of `pruned` (P,) by all others: (N, N) products -> (P,) in 0..1.

    One whose own product is 0 is 1: nothing of it is left to explain (a constant map, by the
    intercept). It does not depend on the scale of any filter or map.
    """
    kept = torch.ones(len(products), dtype=torch.bool)
    kept[pruned] = False
    size = products.diagonal().clamp(min=0).sqrt()
    # What is 0 but for rounding must not be blown up to a direction of its own.
    scale = torch.where(size > 1e-7 * size.max(), size, torch.inf)
    cosine = products / scale[:, None] / scale
    across = cosine[pruned][:, kept]
    inverse: Tensor = torch.linalg.pinv(cosine[kept][:, kept], rtol=CUT, hermitian=True)
    shares: Tensor = (across @ inverse * across).sum(1).clamp(0, 1)
    return shares.masked_fill(scale[pruned].isinf(), 1.0)


def mean_explained(products: Tensor, choices: Iterable[Tensor]) -> float:
    """The mean R^2 over the pruned filters of all choices."""
    return float(torch.cat([explained(products, pruned) for pruned in choices]).mean())
