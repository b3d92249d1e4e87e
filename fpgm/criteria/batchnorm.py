"""Criteria that look at the BatchNorm behind a convolution."""

from __future__ import annotations

import torch
from torch import Tensor

from fpgm.criteria.criterion import criterion
from fpgm.criteria.views import Gate, Scale


@criterion(gamma=Scale())
def bn_gamma(weight: Tensor, *, gamma: Tensor) -> Tensor:
    """Absolute scale of the filter's BatchNorm (Network Slimming, Liu et al., ICCV 2017). -> (N,).

    method=slimming trains these scales towards zero.
    """
    return gamma.abs()


@criterion(beta=Scale(of="bias"))
def bn_beta(weight: Tensor, *, beta: Tensor) -> Tensor:
    """Absolute shift of the filter's BatchNorm. -> (N,). From memory: one of the criteria that CWDA
    is compared with."""
    return beta.abs()


@criterion(sensitivity=Gate(torch.square))
def taylor(weight: Tensor, *, sensitivity: Tensor) -> Tensor:
    """How much the loss would change without the filter, to first order and squared (Molchanov et
    al., CVPR 2019, with a gate on BatchNorm's output). -> (N,).

    sensitivity: sum over minibatches of (gamma dL/dgamma + beta dL/dbeta)^2, which is (dL/dz)^2
    of a gate z = 1 behind the BatchNorm.
    """
    return sensitivity
