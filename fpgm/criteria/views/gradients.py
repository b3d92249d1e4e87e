"""Views of the loss's gradient: by a layer's weight, and by what each filter makes of an image."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, fx

from fpgm.criteria.views.feature_maps import PerImage
from fpgm.criteria.views.view import Collector, View
from fpgm.graph.flow import tails
from fpgm.graph.operations import UNITS
from fpgm.graph.trace import ChannelGraph
from fpgm.graph.tracer import Image
from fpgm.networks.weights import weight_of

Measure = Callable[[Tensor, Tensor], Tensor]  # of values, and of the loss's gradient by them


@dataclass(frozen=True)
class WeightGradients(View):
    """What `measure` makes of a layer's weight and of the loss's gradient by it, both (N, ...) in
    float64, by minibatch: (N,); summed over the minibatches."""

    measure: Measure
    reads_images: ClassVar[bool] = True
    differentiates: ClassVar[bool] = True

    def collector(
        self, graph: ChannelGraph, layers: Sequence[str], image: Image | None
    ) -> Collector:
        return _WeightGradients(graph, layers, self.measure)


class _WeightGradients(Collector):
    def __init__(self, graph: ChannelGraph, layers: Sequence[str], measure: Measure) -> None:
        # A weight that is computed at each call is a parameter of the graph's layer.
        self._weights = {layer: weight_of(graph.module, layer) for layer in layers}
        self._measure = measure
        self._sums: dict[str, Tensor] = {}

    def sources(self) -> Sequence[Tensor]:
        return list(self._weights.values())

    def add(self, gradients: Sequence[Tensor | None]) -> None:
        for (layer, weight), gradient in zip(self._weights.items(), gradients, strict=True):
            values = weight.detach().double()
            by = torch.zeros_like(values) if gradient is None else gradient.double()
            value = self._measure(values, by)
            self._sums[layer] = self._sums[layer] + value if layer in self._sums else value

    def values(self) -> Mapping[str, Tensor]:
        return {layer: value.cpu() for layer, value in self._sums.items()}


@dataclass(frozen=True)
class MapGradients(View):
    """What `measure` makes of the feature maps and of the gradient of each image's own loss by
    them, both (B, N, H, W) -> (B, N): its mean over the images, (N,); with `each` that of every
    image, (N, images), in their order.

    The maps are those behind the layer's own BatchNorm and activation, where it has them, before
    anything is added to them. Units of a linear layer have maps of the places that it is used at.
    """

    measure: Measure
    each: bool = False
    reads_images: ClassVar[bool] = True
    differentiates: ClassVar[bool] = True

    def joined(self, batches: Sequence[Tensor]) -> Tensor:
        return torch.cat(list(batches), 1) if self.each else super().joined(batches)

    def collector(
        self, graph: ChannelGraph, layers: Sequence[str], image: Image | None
    ) -> Collector:
        return _MapGradients(graph, layers, self)


class _MapGradients(Collector):
    def __init__(self, graph: ChannelGraph, layers: Sequence[str], view: MapGradients) -> None:
        behind, writers = tails(graph), {name: node for node, name in graph.writers()}
        self._places = {layer: behind[layer].last for layer in layers}
        self._units = {self._places[n] for n in layers if graph.kinds[writers[n]] == UNITS}
        self.watched = frozenset(self._places.values())
        self._seen = {node: PerImage(view.each) for node in self.watched}
        self._maps: dict[fx.Node, Tensor] = {}  # of the batch that is being looked at
        self._measure = view.measure

    def see(self, node: fx.Node, value: Tensor) -> None:
        self._maps[node] = value

    def sources(self) -> Sequence[Tensor]:
        return list(self._maps.values())

    def add(self, gradients: Sequence[Tensor | None]) -> None:
        for (node, maps), gradient in zip(self._maps.items(), gradients, strict=True):
            values = maps.detach()
            # The loss is the mean of the batch's images.
            by = torch.zeros_like(values) if gradient is None else gradient * len(values)
            units = node in self._units
            self._seen[node].add(self._measure(_as_maps(values, units), _as_maps(by, units)))
        self._maps = {}

    def values(self) -> Mapping[str, Tensor]:
        return {layer: self._seen[node].value() for layer, node in self._places.items()}


def _as_maps(values: Tensor, units: bool) -> Tensor:
    """(B, N, H, W), of units (B, N) or (B, ..., N)."""
    values = values.movedim(-1, 1) if units else values
    return values.reshape(*values.shape[:2], *values.shape[2:], *[1] * (4 - values.dim()))
