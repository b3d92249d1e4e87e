"""Criteria of a filter's weights alone: norms, and chance.

`weight` is (N, C, kH, kW); filter F_j = weight[j].flatten(). The lowest scores are pruned first.
"""

from __future__ import annotations

import torch
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
