"""A layer of a network by its name, its live filters, and which of them a criterion prunes."""

from __future__ import annotations

import difflib
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from torch import Tensor, nn

from fpgm.criteria import CRITERIA
from fpgm.errors import Error
from fpgm.networks.weights import weight_of
from fpgm.selection.ranking import ascending
from fpgm.selection.rule import Rule
from fpgm.study.scores import convolutions, live_layers
from fpgm.study.statistics.agreement import Array

MOST_LISTED = 8


@dataclass(frozen=True)
class Filters:
    """Those of a layer that live. indices: (n,) in the layer, ascending; weight: (n, C, kH, kW)
    float32 on the CPU; zero: how many others there are, which are pruned already."""

    layer: str
    indices: Tensor
    weight: Tensor
    zero: int

    def __len__(self) -> int:
        return len(self.indices)

    @property
    def norms(self) -> Array:
        """L2, (n,)."""
        lengths: Array = self.weight.flatten(1).double().norm(dim=1).numpy()
        return lengths


def names(model: nn.Module, given: Sequence[str] | None) -> list[str]:
    """The layers to show: those given, else the first, the middle and the last that fpgm prunes.

    Raises Error for one that is no convolution, with the nearest names.
    """
    if given is None:
        every, _ = convolutions(model, everything=False)
        if not every:
            raise Error("the network has no convolution that fpgm prunes; name one with --layer")
        return list(dict.fromkeys((every[0], every[(len(every) - 1) // 2], every[-1])))
    every, _ = convolutions(model, everything=True)
    for name in given:
        if name not in every:
            near = difflib.get_close_matches(name, every, n=3, cutoff=0.3) or every[:3]
            raise Error(f"--layer {name}: no such convolution; the nearest are {', '.join(near)}")
    return list(dict.fromkeys(given))


def filters(model: nn.Module, layer: str) -> Filters:
    """The live filters of a layer, in their own order. Raises Error where there are too few."""
    found, left = live_layers(model, [layer])
    if not found:
        raise Error(f"--layer {layer}: has {left[layer]}, too few to choose among")
    indices = found[0].order.sort().values
    weight = weight_of(model, layer).detach().float().cpu()
    return Filters(layer, indices, weight[indices], len(weight) - len(indices))


def check(rate: float, criteria: Sequence[str]) -> None:
    """Raise Error for a rate that prunes all or nothing, and for a criterion that there is not or
    that looks at more than the weights."""
    if not 0 < rate < 1:
        raise Error(f"--rate {rate:g}: must be above 0 and below 1, for example 0.1")
    choices = [name for name, criterion in CRITERIA.items() if not criterion.views]
    for name in criteria:
        if name not in choices:
            why = "looks at more than the weights; " if name in CRITERIA else ""
            raise Error(f"--criteria {name}: {why}choose from {', '.join(choices)}")
    if len(set(criteria)) < len(criteria):
        raise Error(f"--criteria {','.join(criteria)}: names one twice")


def listed(of: Filters, places: Tensor) -> str:
    """The filters at these places in words: their indices, and how many more there are."""
    indices = of.indices[places].tolist()
    more = f" and {len(indices) - MOST_LISTED} more" if len(indices) > MOST_LISTED else ""
    return ", ".join(map(str, indices[:MOST_LISTED])) + more


def by_chance(criterion: str) -> bool:
    """Whether a criterion draws its scores."""
    return "seed" in CRITERIA[criterion].given


def pruned(weight: Tensor, criterion: str, rate: float, draw: int = 0) -> Tensor:
    """Which filters a criterion prunes: (n, C, kH, kW) -> places (P,), sorted; never all of them.

    draw: of a criterion that goes by chance, another choice for each.
    """
    given: Mapping[str, float] = {"rate": rate, "seed": zlib.crc32(f"figure/{draw}".encode())}
    marked = CRITERIA[criterion]
    scores = marked(weight, **{key: given[key] for key in marked.given})
    gone = min(Rule(criterion).pruned(len(weight), rate), len(weight) - 1)
    return ascending(scores)[:gone].sort().values


def chosen(of: Filters, criteria: Sequence[str], rate: float) -> dict[str, Tensor]:
    """Criterion -> the places of the filters that it prunes (see `pruned`). Raises Error where one
    prunes nothing, with a rate at which it does."""
    places = {criterion: pruned(of.weight, criterion, rate) for criterion in criteria}
    for criterion, gone in places.items():
        if not len(gone):
            raise Error(
                f"--rate {rate:g}: {criterion} prunes none of the {len(of)} filters of {of.layer}; "
                f"try --rate {np.ceil(1000 / len(of)) / 1000:g}"
            )
    return places
