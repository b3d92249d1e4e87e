"""Criteria that look at the feature maps behind the ReLU."""

from __future__ import annotations

from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from fpgm.criteria.criterion import criterion
from fpgm.criteria.views import Maps


def share_of_zeros(maps: Tensor) -> Tensor:
    """Of each map. A NaN is no zero, and must not pass for one. (B, N, H, W) -> (B, N)."""
    share = 1 - maps.count_nonzero((2, 3)).double() / (maps.shape[2] * maps.shape[3])
    return share.masked_fill(maps.sum((2, 3)).isnan(), torch.nan)


def rank(maps: Tensor) -> Tensor:
    """Of each (H, W) map, with numpy's and torch's usual tolerance. (B, N, H, W) -> (B, N)."""
    if max(maps.shape[2:]) > 32:  # a GPU's batched decomposition ends there: one by one, slower
        maps = maps.cpu()
    finite = maps.isfinite().flatten(2).all(2)
    ranks: Tensor = torch.linalg.matrix_rank(maps.nan_to_num(0, 0, 0))  # no rank of NaN
    return ranks.double().masked_fill(~finite, torch.nan)


def average(maps: Tensor) -> Tensor:
    """Of each map. (B, N, H, W) -> (B, N) float64."""
    return maps.mean((2, 3), dtype=torch.float64)


@criterion(zeros=Maps(share_of_zeros))
def apoz(weight: Tensor, *, zeros: Tensor) -> Tensor:
    """Average share of zeros after ReLU, negated: the most silent filter goes first (Network
    Trimming, Hu et al., 2016). zeros: in 0..1. -> (N,)."""
    return 0 - zeros


@criterion(averages=Maps(average, each=True))
def entropy(
    weight: Tensor,
    *,
    averages: Tensor,
    bins: Annotated[int, Field(ge=2, examples=["20"])] = 20,
) -> Tensor:
    """Entropy, in nats, of the mean activation after ReLU over images, from a histogram of `bins`
    equal bins over the filter's own range. averages: (N, images). -> (N,), at most the logarithm
    of bins and of images. From memory: one of the criteria that CWDA is compared with."""
    least, most = averages.aminmax(dim=1, keepdim=True)
    span = most - least
    # One value for all images, but for rounding: all of them are in one bin.
    constant = span <= 1e-6 * most.abs()
    places = ((averages - least) / span.masked_fill(constant, torch.inf) * bins).long()
    counts = averages.new_zeros(len(averages), bins)
    counts.scatter_add_(1, places.clamp_max(bins - 1), torch.ones_like(averages))
    parts: Tensor = torch.special.entr(counts / averages.shape[1])  # -p log p
    return parts.sum(1)


@criterion(ranks=Maps(rank))
def hrank(weight: Tensor, *, ranks: Tensor) -> Tensor:
    """Mean rank of the filter's feature map after ReLU, over images (HRank, Lin et al., CVPR 2020).
    -> (N,). Small maps tie often: see tie_rate. Singular values are slow, and the mean hardly
    differs between images (the finding that HRank rests on): one batch does."""
    return ranks
