"""From `keep` to masks and zeroed weights."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from fpgm.errors import Error
from fpgm.networks.weights import weight_of


def pruned(model: nn.Module, keep: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The complement of `keep`: convolution -> (N,) mask, True where a filter is pruned."""
    masks = {}
    for name, kept in keep.items():
        try:
            weight = weight_of(model, name)
        except AttributeError:
            raise Error(f"keep[{name!r}]: no such layer with a weight") from None
        if len(kept) and not 0 <= int(kept.min()) <= int(kept.max()) < len(weight):
            raise Error(f"keep[{name!r}] has indices outside 0..{len(weight) - 1}")
        mask = torch.ones(len(weight), dtype=torch.bool, device=weight.device)
        masks[name] = mask.index_fill_(0, kept.to(weight.device), False)
    return masks


@torch.no_grad()
def zero_(model: nn.Module, keep: Mapping[str, Tensor]) -> None:
    """Set the weights of all filters outside `keep` to zero, in place. Biases stay as they are."""
    for name, mask in pruned(model, keep).items():
        weight_of(model, name)[mask] = 0
