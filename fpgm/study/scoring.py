"""A network's layers with their scores, in an order that does not depend on how it is written down.

Filters of a layer can be permuted (with the BatchNorm after them and the inputs of the next layer)
and the network is the same. So that a study of it is the same, too, down to its random numbers,
filters and input channels are sorted by their norms before anything else.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor, nn

from fpgm.criteria import CRITERIA
from fpgm.errors import Error
from fpgm.graph.groups import prunable
from fpgm.graph.trace import trace
from fpgm.selection.ranking import levelled
from fpgm.study.agreement import Array

LEAST = 4  # filters that a ranking needs to say anything
Evidence = Mapping[str, Mapping[str, Tensor]]  # layer -> keyword of a criterion -> (N,)


@dataclass
class Layer:
    """One convolution. filters: how many it has; order: indices of those that live, sorted by
    norm; weight: (n, C, kH, kW) theirs, float32; scores: criterion -> (n,), again: criterion ->
    (D, n) after small perturbations."""

    name: str
    filters: int
    order: Tensor
    weight: Tensor
    scores: dict[str, Array] = field(default_factory=dict)
    again: dict[str, Array] = field(default_factory=dict)

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.weight.shape)

    def matrix(self, names: Sequence[str]) -> Array:
        """(K, n)."""
        return np.stack([self.scores[name] for name in names])

    def matrices(self, names: Sequence[str]) -> Array:
        """After perturbation, (D, K, n)."""
        return np.stack([self.again[name] for name in names], axis=1)


def convolutions(model: nn.Module, everything: bool) -> tuple[list[str], dict[str, str]]:
    """Names of the layers to study, in the order of execution, and why the others are left out.

    everything: all convolutions, also those that fpgm would not prune. Raises GraphError for a
    network that cannot be traced, where `everything` is not asked for.
    """
    every = [name for name, module in model.named_modules() if isinstance(module, nn.Conv2d)]
    if everything:
        return every, {}
    groups = prunable(trace(model))
    left = {name: groups.kept_full.get(name, "never used") for name in every}
    return list(groups.layers), {n: left[n] for n in every if n not in groups.layers}


def live_layers(model: nn.Module, names: Iterable[str]) -> tuple[list[Layer], dict[str, str]]:
    """The layers that can be ranked, and why the others cannot. Zero filters are left out.

    Raises Error that names the first layer with a weight that is no number.
    """
    layers, left = [], {}
    for name in names:
        weight = model.get_submodule(name).weight
        assert isinstance(weight, Tensor)
        weight = weight.detach().float().cpu()
        if not weight.isfinite().all():
            bad = int((~weight.isfinite()).sum())
            raise Error(
                f"{name}: {bad} of its {weight.numel()} weights are nan or infinite; the run that "
                "wrote them diverged, study an earlier checkpoint"
            )
        live = weight.flatten(1).any(1).nonzero().flatten()
        if len(live) < LEAST:
            zero = len(weight) - len(live)
            left[name] = f"{len(live)} filters" + (f" and {zero} zero ones" if zero else "")
            continue
        order = live[_by_norm(weight[live])]
        channels = _by_norm(weight[order].transpose(0, 1))
        layers.append(Layer(name, len(weight), order, weight[order][:, channels].contiguous()))
    return layers, left


def _by_norm(weight: Tensor) -> Tensor:
    """Indices along the first axis, least norm first. The same bits in whatever order the others
    come: their squares are sorted before they are added up."""
    values = np.sort(weight.flatten(1).abs().double().numpy(), axis=1)
    return torch.from_numpy(np.argsort(np.square(values).sum(1), kind="stable"))


def score(layer: Layer, names: Iterable[str], seed: int, noise: float, draws: int) -> None:
    """Fill in the scores of criteria that look at the weight alone, and those under noise.

    noise: standard deviation of what is added to every weight, in those of the layer's weights.
    """
    names = list(names)
    deviation = float(layer.weight.std()) * noise
    generator = np.random.default_rng([seed, zlib.crc32(layer.name.encode())])
    options = {"random": {"seed": zlib.crc32(f"{seed}/{layer.name}".encode())}}
    again: dict[str, list[Array]] = {name: [] for name in names}
    for name in names:
        layer.scores[name] = _scored(name, layer.weight, options.get(name, {}))
    for _ in range(draws):
        added = torch.from_numpy(generator.standard_normal(layer.shape, dtype=np.float32))
        noisy = layer.weight + deviation * added
        for name in names:
            again[name].append(_scored(name, noisy, options.get(name, {})))
    layer.again.update({name: np.stack(rows) for name, rows in again.items()})


def score_with(
    layer: Layer,
    name: str,
    keyword: str,
    evidence: Sequence[Evidence],
    seed: int,
    noise: float,
    draws: int,
) -> None:
    """Fill in the scores of a criterion that takes evidence: one dictionary for each batch.

    The score is that of the mean over batches. With several batches the perturbation is a
    bootstrap over them; with one (BatchNorm's parameters are what they are) noise on the evidence.
    """
    found = [e[layer.name][keyword] for e in evidence if keyword in e[layer.name]]
    rows = torch.stack(found)[:, layer.order]
    generator = np.random.default_rng([seed, zlib.crc32(f"{layer.name}/{name}".encode())])

    def scored(values: Tensor) -> Array:
        return _scored(name, layer.weight, {keyword: values})

    layer.scores[name] = scored(rows.mean(0))
    again = []
    for _ in range(draws):
        if len(rows) > 1:
            again.append(scored(rows[generator.integers(len(rows), size=len(rows))].mean(0)))
        else:
            added = torch.from_numpy(generator.standard_normal(rows.shape[1]))
            again.append(scored((rows[0] + noise * rows[0].std() * added).abs()))
    layer.again[name] = np.stack(again)


def _scored(name: str, weight: Tensor, options: Mapping[str, object]) -> Array:
    scores: Array = levelled(CRITERIA[name](weight, **options).double()).numpy()
    return scores
