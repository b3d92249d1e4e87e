"""Low-rank convolutions: one becomes two, with a rank that says how much of it is left.

By the weights (Tai et al., Convolutional neural networks with low-rank regularization, ICLR 2016)
or by the responses to images (Zhang et al., Accelerating very deep convolutional networks, TPAMI
2016, the linear case). At full rank both compute what the convolution computes.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fpgm.networks.layers import TAI, Bordered, split
from fpgm.networks.modes import evaluating, exact


@dataclass(frozen=True)
class Responses:
    """Of a convolution, over all images and places: mean (N,), covariance (N, N), float64."""

    mean: Tensor
    covariance: Tensor


def decomposable(network: nn.Module) -> dict[str, nn.Conv2d]:
    """The convolutions that can become two: those without groups, of several filters and inputs."""
    return {
        name: module
        for name, module in network.named_modules()
        if isinstance(module, nn.Conv2d)
        and module.groups == 1
        and min(module.in_channels, module.out_channels) > 1
    }


@torch.no_grad()
def responses(
    network: nn.Module, names: Iterable[str], batches: Iterable[Tensor]
) -> dict[str, Responses]:
    """What the convolutions `names` answer to images, batches (B, C, H, W), in eval mode; those
    that are never called are left out."""
    names = list(names)
    sums: dict[str, Any] = dict.fromkeys(names, 0)
    products: dict[str, Any] = dict.fromkeys(names, 0)
    counts = dict.fromkeys(names, 0)

    def gather(name: str, output: Tensor) -> None:
        rows = output.transpose(0, 1).flatten(1).double()  # (N, places)
        sums[name] = sums[name] + rows.sum(1)
        products[name] = products[name] + rows @ rows.T
        counts[name] += rows.shape[1]

    hooks = [
        network.get_submodule(name).register_forward_hook(
            lambda _module, _inputs, output, name=name: gather(name, output)
        )
        for name in names
    ]
    try:
        with evaluating(network), exact():
            for batch in batches:
                network(batch)
    finally:
        for hook in hooks:
            hook.remove()
    found = {}
    for name in filter(counts.__getitem__, names):
        mean = sums[name] / counts[name]
        found[name] = Responses(mean, products[name] / counts[name] - torch.outer(mean, mean))
    return found


def matrix(weight: Tensor) -> Tensor:
    """(N, C, kH, kW) -> (C kH, kW N): of rank K it is a sum of K products, each of a filter down
    the image and one along it (Tai et al., eq. 4)."""
    return weight.permute(1, 2, 3, 0).flatten(2).flatten(0, 1)


def spectrum(conv: nn.Conv2d, known: Responses | None) -> Tensor:
    """What each rank more adds, falling, (R,) float64: squared singular values of the weights, or,
    where responses are known, the eigenvalues of their covariance."""
    if known is None:
        values: Tensor = torch.linalg.svdvals(matrix(conv.weight.detach().double()))
        return values.square()
    eigenvalues: Tensor = torch.linalg.eigvalsh(known.covariance).flip(0)
    return eigenvalues.clamp(min=0)


@torch.no_grad()
def decomposed(
    network: nn.Module, ranks: Mapping[str, int], way: str, known: Mapping[str, Responses]
) -> nn.Module:
    """A copy of a network with two convolutions for each that has a rank.

    known: of each of these, where they are decomposed by their responses.
    """
    small = copy.deepcopy(network)
    split(small, ranks, way)
    for name in ranks:
        conv, new = network.get_submodule(name), small.get_submodule(name)
        assert isinstance(conv, nn.Conv2d)
        both = new.pair if isinstance(new, Bordered) else new
        first, second = both.children()
        assert isinstance(first, nn.Conv2d) and isinstance(second, nn.Conv2d)  # noqa: PT018
        if way == TAI:
            _by_weights(conv, first, second)
        else:
            _by_responses(conv, first, second, known[name], new)
    return small


def _by_weights(conv: nn.Conv2d, first: nn.Conv2d, second: nn.Conv2d) -> None:
    outputs, inputs, height, width = conv.weight.shape
    u, s, v = torch.linalg.svd(matrix(conv.weight.double()), full_matrices=False)
    rank, root = first.out_channels, s.sqrt()
    down = (u * root)[:, :rank].T.reshape(rank, inputs, height, 1)
    along = (root[:, None] * v)[:rank].view(rank, width, outputs).permute(2, 0, 1)[:, :, None]
    first.weight.copy_(down)
    second.weight.copy_(along)
    if second.bias is not None and conv.bias is not None:
        second.bias.copy_(conv.bias)


def _by_responses(
    conv: nn.Conv2d, first: nn.Conv2d, second: nn.Conv2d, known: Responses, new: nn.Module
) -> None:
    """y is near U U^T (y - mean) + mean, U the first eigenvectors: first U^T W, then U."""
    _, vectors = torch.linalg.eigh(known.covariance)
    basis = vectors.flip(1)[:, : first.out_channels]  # (N, K)
    first.weight.copy_((basis.T @ conv.weight.double().flatten(1)).view_as(first.weight))
    second.weight.copy_(basis[:, :, None, None])
    bias = known.mean.new_zeros(len(known.mean)) if conv.bias is None else conv.bias.double()
    assert second.bias is not None
    second.bias.copy_(basis @ (basis.T @ (bias - known.mean)) + known.mean)
    if isinstance(new, Bordered):
        border = new.outside.border.double().flatten(1)
        new.outside.border.copy_((basis @ (basis.T @ border)).view_as(new.outside.border))
