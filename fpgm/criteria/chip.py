"""CHIP: how much of the layer's feature maps would be lost without a filter's own."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fpgm.criteria.criterion import criterion
from fpgm.criteria.views import Maps

_CHUNK = 2**22  # numbers of float64 that a step may take in each of its few tensors: 32 MiB

# Nodes of the integral below, as shares of the largest singular value: s = e^x at equal steps of x,
# where the trapezoidal rule converges as e^(-pi^2 / step). Beyond the ends less than 1e-12 is left.
_STEP = 0.32
_NODES = torch.arange(-34, 30, _STEP, dtype=torch.float64).exp()


def nuclear_losses(maps: Tensor) -> Tensor:
    """|A|_* - |A without row i|_* of each image's A (N, HW), |.|_* the sum of the singular values.
    (B, N, H, W) -> (B, N) float64, to about 1e-8 of the largest singular value."""
    rows = maps.flatten(2)
    finite = rows.isfinite().flatten(1).all(1)
    rows = rows.nan_to_num(0, 0, 0)  # no singular values of NaN
    size = rows.shape[1] * max(rows.shape[2], min(rows.shape[1:]), len(_NODES))
    parts = rows.split(max(1, _CHUNK // size))
    losses = torch.cat([_nuclear_losses(part.double()) for part in parts])
    return losses.masked_fill(~finite[:, None], torch.nan)


def _nuclear_losses(rows: Tensor) -> Tensor:
    """(B, N, M) float64 -> (B, N).

    One decomposition for all rows: sqrt(x) = 1/pi int_0^inf x / (x + t) dt / sqrt(t), and without
    row i the determinant of AA' + t shrinks by the factor t times the share of the row that the
    others leave, so that with t = s^2 and A = U diag(sigma) V'

        |A|_* - |A without row i|_* = -1/pi int_0^inf log(1 - q_i(s)) ds,
        q_i(s) = sum_k u_ik^2 sigma_k^2 / (sigma_k^2 + s^2).
    """
    squares, shares, left = _decomposed(rows)
    largest = squares.amax(1).sqrt()
    nodes = _NODES.to(rows.device)
    near = nodes < 1
    relative = squares / squares.amax(1, keepdim=True).where(largest[:, None] > 0, 1)
    # Where s is small 1 - q is what is known to all its digits, where it is large q is.
    above = nodes.square() + relative[:, :, None]
    remaining = left[:, :, None] + shares @ (nodes[near].square() / above[:, :, near])
    taken = shares @ (relative[:, :, None] / above[:, :, ~near])
    logs = torch.cat((remaining.log(), torch.log1p(-taken)), 2)
    return (logs @ (nodes * _STEP)) * (-largest[:, None] / math.pi)


def _decomposed(rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """A = U diag(sigma) V': sigma^2 (B, R), u_ik^2 (B, N, R), and what these lack to 1 in each row
    (B, N). Of few rows by AA', whose eigenvectors are U; of more rows than columns A itself, as
    dividing by small sigmas spoils what A'A says of U."""
    count, length = rows.shape[1:]
    if count <= length:
        squares, vectors = torch.linalg.eigh(rows @ rows.mT)
    else:
        vectors, sigma, _ = torch.linalg.svd(rows, full_matrices=False)
        squares = sigma.square()
    # What rounding makes of a singular value of 0.
    none = squares <= 4e-16 * squares.shape[1] * squares.amax(1, keepdim=True)
    squares, shares = squares.masked_fill(none, 0), vectors.square()
    left = (shares * none[:, None]).sum(2)
    if count > length:
        outside = (1 - shares.sum(2)).clamp_min(0)
        left = left + outside.masked_fill(outside < 1e-13, 0)
    return squares, shares * ~none[:, None], left


@criterion(losses=Maps(nuclear_losses))
def chip(weight: Tensor, *, losses: Tensor) -> Tensor:
    """Channel independence: by how much the nuclear norm of the layer's feature maps after ReLU,
    as rows (N, HW) of one matrix an image, falls without the filter's own; mean over images (CHIP,
    Sui et al., NeurIPS 2021). -> (N,)."""
    return losses
