"""Which rank each convolution gets: by a share of its energy, or as many as the MACs allow."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fpgm.errors import BudgetError
from fpgm.networks.layers import TAI
from fpgm.networks.modes import evaluating
from fpgm.shipping.knapsack import knapsack

CHOICES = 64  # ranks of a layer that a budget chooses among
UNITS = 1_000_000  # that a budget is counted in


@dataclass(frozen=True)
class Layer:
    """A convolution that may become two. energy: (R,) share that each rank keeps, rising to 1;
    whole: its MACs for one image, in all of its calls; each: MACs of the two for each rank."""

    energy: Tensor
    whole: int
    each: int

    @property
    def most(self) -> int:
        """The largest rank that saves MACs; 0 where none does."""
        return min(len(self.energy), (self.whole - 1) // self.each)


def layers(
    network: nn.Module,
    spectra: Mapping[str, Tensor],
    image: tuple[int, int, int],
    way: str,
) -> dict[str, Layer]:
    """spectra: of each convolution what each rank adds (low_rank.spectrum); image: (C, H, W).
    Convolutions that are never called are left out."""
    sizes = _sizes(network, spectra, image)
    found = {}
    for name, values in spectra.items():
        if not sizes[name]:
            continue
        conv = network.get_submodule(name)
        assert isinstance(conv, nn.Conv2d)
        outputs, inputs, height, width = conv.weight.shape
        places = sum(rows * columns for rows, columns, _ in sizes[name])
        if way == TAI:
            down = sum(rows * read for rows, _, read in sizes[name])
            each = inputs * height * down + outputs * width * places
        else:
            each = (inputs * height * width + outputs) * places
        total = values.sum()
        energy = values.cumsum(0) / total if total > 0 else torch.ones_like(values)
        found[name] = Layer(energy, outputs * inputs * height * width * places, each)
    return found


def _sizes(
    network: nn.Module, names: Mapping[str, object], image: tuple[int, int, int]
) -> dict[str, list[tuple[int, int, int]]]:
    """Of each call of each convolution: rows and columns that it writes, columns that it reads."""
    found: dict[str, list[tuple[int, int, int]]] = {name: [] for name in names}

    def look(name: str, inputs: Tensor, output: Tensor) -> None:
        found[name].append((output.shape[2], output.shape[3], inputs.shape[3]))

    hooks = [
        network.get_submodule(name).register_forward_hook(
            lambda _module, inputs, output, name=name: look(name, inputs[0], output)
        )
        for name in names
    ]
    parameter = next(network.parameters())
    try:
        with evaluating(network), torch.no_grad():
            network(parameter.new_zeros(1, *image))
    finally:
        for hook in hooks:
            hook.remove()
    return found


def by_energy(layers: Mapping[str, Layer], share: float) -> dict[str, int]:
    """Of each layer the least rank that keeps `share` of its energy; a layer that would save no
    MACs so is left as it is."""
    ranks = {}
    for name, layer in layers.items():
        rank = 1 + int((layer.energy < share - 1e-12).sum())
        if rank <= layer.most:
            ranks[name] = rank
    return ranks


def by_macs(layers: Mapping[str, Layer], total: int, target: float) -> dict[str, int]:
    """The ranks with the largest product, over the layers, of the energy kept within target * total
    MACs of the network (Zhang et al., section 2.4); none where it has no more than that. Raises
    BudgetError with the least target where rank 1 everywhere has more."""
    if target >= 1:
        return {}
    others = total - sum(layer.whole for layer in layers.values())
    least = others + sum(
        min(layer.whole, layer.each) if layer.most else layer.whole for layer in layers.values()
    )
    if least > target * total:
        raise BudgetError(
            f"--macs-target {target:g}: rank 1 in every layer leaves {least / total:.4f} of the "
            f"MACs; {math.ceil(1e3 * least / total) / 1e3:g} or more"
        )
    options = [_choices(layer) for layer in layers.values()]
    unit = max(1, math.ceil(total / UNITS))
    costs: list[list[float]] = []
    values: list[list[float]] = []
    for layer, ranks in zip(layers.values(), options, strict=True):
        # Up: what is found always fits.
        costs.append([-(-(r * layer.each if r else layer.whole) // unit) for r in ranks])
        values.append(
            [math.log(max(float(layer.energy[r - 1]), 1e-300)) if r else 0 for r in ranks]
        )
    chosen = knapsack(costs, values, (target * total - others) // unit)
    if chosen is None:  # the least fits but for the units that are counted in
        chosen = [len(ranks) - 1 for ranks in options]
    picked = {
        name: ranks[choice] for name, ranks, choice in zip(layers, options, chosen, strict=True)
    }
    return {name: rank for name, rank in picked.items() if rank}


def _choices(layer: Layer) -> Sequence[int]:
    """Ranks that save MACs, evenly spread, down to 1; 0, the first, is the layer as it is."""
    count = min(CHOICES, layer.most)
    spread = {round(1 + (layer.most - 1) * i / max(1, count - 1)) for i in range(count)}
    return [0, *sorted(spread, reverse=True)]
