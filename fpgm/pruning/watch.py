"""What the pruned filters of a network in training do: which come back, which are dead."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from fpgm.networks.weights import weight_of
from fpgm.pruning.method import Trained


class Watch:
    """masks: convolution -> (N,) bool, True where a filter of `full` is pruned; trained: the
    network that is stepped in its place, or the same."""

    def __init__(self, full: nn.Module, masks: Mapping[str, Tensor], trained: Trained) -> None:
        self.masks = masks
        self._full = {name: _weight(full, name) for name in masks}
        # Of the layers that have pruned filters, in lists for torch's foreach operations.
        self._watched: list[Tensor] = []  # the weights that are trained
        self._kept: list[Tensor] = []  # 0 where a filter is pruned, else 1
        self._seen: list[Tensor] = []  # gradients so far, their absolute values summed
        for name, mask in masks.items():
            weight = _weight(trained.network, name)
            here = mask[trained.rows[name]] if name in trained.rows else mask
            if here.any():
                self._watched.append(weight)
                shape = (-1, *[1] * (weight.dim() - 1))
                self._kept.append(torch.ones_like(weight).masked_fill_(here.view(shape), 0))
                self._seen.append(torch.zeros_like(weight))

    @property
    def pruned(self) -> int:
        """How many filters are."""
        return sum(int(mask.sum()) for mask in self.masks.values())

    def forget(self) -> None:
        """Which pruned filters have seen a gradient."""
        for seen in self._seen:
            seen.zero_()

    @torch.no_grad()
    def after_backward(self, masked: bool) -> None:
        """Note which pruned filters a gradient reaches and, if `masked`, take it from them."""
        gradients, seen, kept = [], [], []
        for weight, *others in zip(self._watched, self._seen, self._kept, strict=True):
            if weight.grad is not None:  # of a layer that is not trained, or not used
                gradients.append(weight.grad)
                seen.append(others[0])
                kept.append(others[1])
        # A few launches for all layers: one by one they take a GPU as long as a forward pass.
        if gradients:
            torch._foreach_add_(seen, torch._foreach_abs(gradients))
            if masked:
                torch._foreach_mul_(gradients, kept)

    @torch.no_grad()
    def revived(self) -> int:
        """Pruned filters whose weight has left zero."""
        moved = (self._full[name].flatten(1).any(1) & mask for name, mask in self.masks.items())
        return sum(int(filters.sum()) for filters in moved)

    def dead(self) -> int:
        """Pruned filters that no gradient reached since `forget`."""
        reached = (
            seen.flatten(1).any(1) & ~kept.flatten(1).any(1)
            for seen, kept in zip(self._seen, self._kept, strict=True)
        )
        return self.pruned - sum(int(filters.sum()) for filters in reached)

    def churn(self, before: Mapping[str, Tensor]) -> float:
        """Share of the pruned filters that the masks `before` had not pruned."""
        new = sum(int((mask & ~before[name]).sum()) for name, mask in self.masks.items())
        return new / self.pruned if self.pruned else 0.0


def _weight(network: nn.Module, name: str) -> Tensor:
    return weight_of(network, name)
