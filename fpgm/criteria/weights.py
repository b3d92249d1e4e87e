"""Criteria of a filter's weights alone: norms, and chance.

`weight` is (N, C, kH, kW); filter F_j = weight[j].flatten(). The lowest scores are pruned first.
"""

from __future__ import annotations

import math
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from fpgm.criteria.criterion import criterion


@criterion()
def l1(weight: Tensor) -> Tensor:
    """Sum of absolute weights of each filter (PFEC, Li et al., ICLR 2017). -> (N,)."""
    return filters(weight).abs().sum(1)


@criterion()
def l2(weight: Tensor) -> Tensor:
    """Euclidean norm of each filter (SFP, He et al., IJCAI 2018, eq. 2 with p = 2). -> (N,)."""
    return norms(filters(weight))


@criterion()
def lp(weight: Tensor, p: Annotated[float, Field(ge=1, examples=["inf"])] = math.inf) -> Tensor:
    """L_p norm of each filter, (sum |w|^p)^(1/p), the largest weight for p = inf (SFP, He et al.,
    IJCAI 2018, eq. 2). -> (N,)."""
    sizes = filters(weight).abs()
    largest = sizes.amax(1, keepdim=True)
    # Of the largest weight: 0.1^400 is 0 in float64. A filter of zeros has none.
    shares = sizes / largest.where(largest > 0, 1)
    # Infinity needs no case of its own: of the shares only the ones are left, and n^0 = 1.
    return shares.pow(p).sum(1).pow(1 / p) * largest[:, 0]


@criterion()
def random(weight: Tensor, seed: int = 0) -> Tensor:
    """Uniform scores, the baseline that every comparison needs. -> (N,)."""
    generator = torch.Generator().manual_seed(seed)  # on the CPU: the same on every device
    return torch.rand(len(weight), generator=generator, dtype=torch.float64).to(weight.device)


def filters(weight: Tensor) -> Tensor:
    """(N, C, kH, kW) -> (N, d) in float64, detached."""
    return weight.detach().flatten(1).double()


def norms(points: Tensor) -> Tensor:
    """(N, d) -> (N,)."""
    lengths: Tensor = torch.linalg.vector_norm(points, dim=1)
    return lengths
