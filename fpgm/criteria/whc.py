"""WHC: a filter's norm, weighted by how little it looks like the others."""

from __future__ import annotations

from torch import Tensor

from fpgm.criteria.criterion import criterion
from fpgm.criteria.weights import filters, norms


@criterion()
def whc(weight: Tensor) -> Tensor:
    """Weighted hybrid criterion: |F_i| sum_{j != i} |F_j| (1 - |cos(F_i, F_j)|) (Chen et al.,
    ISCAS 2023). -> (N,).

    Written with products in place of cosines, so that a filter of zeros needs no case of its own:
    it scores 0, as do filters that are all parallel to each other.
    """
    points = filters(weight)
    sizes = norms(points)
    products = (points @ points.T).abs().fill_diagonal_(0)
    return (sizes * (sizes.sum() - sizes) - products.sum(1)).clamp_min(0)  # rounding
