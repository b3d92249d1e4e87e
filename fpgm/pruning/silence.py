"""What stands behind a filter and speaks for it alone: its BatchNorm's scale and shift.

A filter of zeros still emits a constant through its BatchNorm. Where a method takes these along,
its channel is zero, and nothing has to be folded into the layers that read it.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from fpgm.graph.flow import Tail
from fpgm.networks.weights import parameters_of
from fpgm.pruning.method import Trained
from fpgm.pruning.momentum import remembered


class Silence:
    """Of the filters that masks say, in a network: their weights and what stands behind them.

    masks: convolution -> (N,) bool, True for the filters meant; tails: of the network at full
    width; trained: that one, or what is stepped in its place; weights: false for what stands behind
    the filters alone.
    """

    def __init__(
        self,
        masks: Mapping[str, Tensor],
        tails: Mapping[str, Tail],
        trained: Trained,
        weights: bool = True,
    ) -> None:
        self._optimizer = trained.optimizer
        self._before: list[Tensor] | None = None
        self._parameters: list[nn.Parameter] = []
        self._stays: list[Tensor] = []  # 0 where a filter is meant, else 1
        for name, mask in masks.items():
            here = mask[trained.rows[name]] if name in trained.rows else mask
            if not here.any():
                continue
            names = (name, *tails[name].norms) if weights else tails[name].norms
            for parameter in (p for n in names for p in parameters_of(trained.network, n)):
                shape = (-1, *[1] * (parameter.dim() - 1))
                self._parameters.append(parameter)
                self._stays.append(
                    torch.ones_like(parameter).masked_fill_(
                        here.to(parameter.device).view(shape), 0
                    )
                )

    @torch.no_grad()
    def scale(self, factor: float) -> None:
        """Multiply them, and forget their momentum."""
        for parameter, stays in zip(self._parameters, self._stays, strict=True):
            parameter.mul_(stays + (1 - stays) * factor)
            for value in remembered(self._optimizer, parameter):
                value.mul_(stays)

    @torch.no_grad()
    def freeze(self) -> None:
        """Keep the values that they have: `restore` after a step brings them back, whatever
        moved them, gradient, momentum or decay."""
        self._before = [parameter.clone() for parameter in self._parameters]

    @torch.no_grad()
    def restore(self) -> None:
        """What `freeze` has kept."""
        for parameter, stays, before in zip(
            self._parameters, self._stays, self._before or (), strict=True
        ):
            torch.where(stays > 0, parameter, before, out=parameter)
            for value in remembered(self._optimizer, parameter):
                value.mul_(stays)

    @torch.no_grad()
    def still(self) -> None:
        """Take their gradients from them."""
        pairs = [(p.grad, s) for p, s in zip(self._parameters, self._stays, strict=True)]
        gradients = [gradient for gradient, _ in pairs if gradient is not None]
        if gradients:
            torch._foreach_mul_(gradients, [s for gradient, s in pairs if gradient is not None])
