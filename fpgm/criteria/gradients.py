"""Criteria that look at the loss's gradient: how much the loss would change without a filter."""

from __future__ import annotations

import torch
from torch import Tensor

from fpgm.criteria.criterion import criterion
from fpgm.criteria.views import MapGradients, WeightGradients


def absolute_products(weight: Tensor, gradient: Tensor) -> Tensor:
    """(N, ...), (N, ...) -> (N,)."""
    return (weight * gradient).flatten(1).abs().sum(1)


def squared_products(weight: Tensor, gradient: Tensor) -> Tensor:
    """(N, ...), (N, ...) -> (N,)."""
    return (weight * gradient).flatten(1).square().sum(1)


def gate_gradient(maps: Tensor, gradients: Tensor) -> Tensor:
    """The derivative by a gate g = 1 that each map is multiplied by. (B, N, H, W) twice ->
    (B, N) float64."""
    return (maps * gradients).sum((2, 3), dtype=torch.float64)


def influence(maps: Tensor, gradients: Tensor) -> Tensor:
    """The same over the map's size, absolute. (B, N, H, W) twice -> (B, N)."""
    return gate_gradient(maps, gradients).abs() / (maps.shape[2] * maps.shape[3])


@criterion(
    absolute=WeightGradients(absolute_products),
    squares=WeightGradients(squared_products),
)
def taylor_weight(
    weight: Tensor, *, absolute: Tensor, squares: Tensor, squared: bool = False
) -> Tensor:
    """Sum over a filter's weights, and over minibatches, of |w dL/dw|, or with `squared` of
    (w dL/dw)^2. -> (N,). From memory: two of the criteria that CWDA is compared with.

    In front of a BatchNorm that takes the batch's statistics a filter's length means nothing, and
    the sum of w dL/dw is zero; that of its absolute values is not.
    """
    return squares if squared else absolute


@criterion(influence=MapGradients(influence))
def taylor_act(weight: Tensor, *, influence: Tensor) -> Tensor:
    """Mean over images of |1/HW sum_hw z dL/dz|, z the filter's feature map behind its BatchNorm
    and activation (Molchanov et al., ICLR 2017). -> (N,). Their normalisation by layer is
    scope_norm=l2."""
    return influence


@criterion(joint=True, gates=MapGradients(gate_gradient, each=True))
def group_fisher(weight: Tensor, *, gates: Tensor) -> Tensor:
    """Sum over images of the squared derivative of the image's loss by a gate on the channel:
    (sum over the layers that write it of sum_hw a dL/da)^2 (Group Fisher, Liu et al., ICML 2021).
    gates: (N, images). -> (N,).

    Their division by the memory that a channel takes is scope=global scope_cost=memory.
    """
    return gates.square().sum(1)
