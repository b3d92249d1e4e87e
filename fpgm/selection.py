"""Which filters to keep: scores and a rate to `keep`, convolution -> kept filters."""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fpgm.criteria import CRITERIA
from fpgm.graph import trace


class SelectionError(ValueError):
    """A criterion or rate that cannot be followed."""


def pruned_count(filters: int, rate: float) -> int:
    """How many of a layer's filters go: floor(filters * rate), safe against rounding from below."""
    return int(filters * rate + 1e-9)


def select(
    model: nn.Module,
    criterion: str = "gm",
    rate: float = 0.4,
    layers: Iterable[str] | None = None,
    seed: int = 0,
    **options: Any,
) -> dict[str, Tensor]:
    """Choose the filters to keep, layer by layer; ties go by the lowest index. Changes nothing.

    criterion: a name in CRITERIA, `options` go to its function; layers: the convolutions to prune,
    by default all that the network's graph allows; seed: for `random`.
    Returns convolution -> kept filters, sorted. Raises SelectionError for an unknown criterion and
    for a rate outside [0, 1) or one that would leave a layer empty.
    """
    if criterion not in CRITERIA:
        raise SelectionError(f"criterion={criterion}: choose one of {', '.join(CRITERIA)}")
    if not 0 <= rate < 1:
        raise SelectionError(f"rate={rate}: must be at least 0 and below 1, for example rate=0.4")
    modules = dict(model.named_modules())
    keep = {}
    for name in trace(model).prunable if layers is None else layers:
        weight = modules[name].weight
        assert isinstance(weight, Tensor)
        pruned = pruned_count(len(weight), rate)
        if pruned == len(weight):
            raise SelectionError(
                f"rate={rate}: would prune all {len(weight)} filters of {name}; "
                f"at most {(len(weight) - 1) / len(weight):.4g} leaves it one"
            )
        extra: dict[str, Any] = {}
        if criterion == "mix":
            extra["pruned"] = pruned
        elif criterion == "random":  # layers of one size must not lose the same filters
            extra["seed"] = zlib.crc32(f"{seed}/{name}".encode())
        scores = CRITERIA[criterion](weight, **options, **extra)
        keep[name] = torch.argsort(scores, stable=True)[pruned:].sort().values
    return keep


def pruned(model: nn.Module, keep: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The complement of `keep`: convolution -> (N,) mask, True where a filter is pruned."""
    modules = dict(model.named_modules())
    masks = {}
    for name, kept in keep.items():
        weight = modules[name].weight
        assert isinstance(weight, Tensor)
        mask = torch.ones(len(weight), dtype=torch.bool, device=weight.device)
        masks[name] = mask.index_fill_(0, kept.to(weight.device), False)
    return masks


@torch.no_grad()
def zero_(model: nn.Module, keep: Mapping[str, Tensor]) -> None:
    """Set the weights of all filters outside `keep` to zero, in place. Biases stay as they are."""
    for name, mask in pruned(model, keep).items():
        weight = model.get_submodule(name).weight
        assert isinstance(weight, Tensor)
        weight[mask] = 0
