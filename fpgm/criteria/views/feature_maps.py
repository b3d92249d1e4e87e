"""Views of feature maps behind the ReLU."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, fx

from fpgm.criteria.views.view import Collector, View
from fpgm.graph.flow import rectifiers
from fpgm.graph.trace import ChannelGraph
from fpgm.graph.tracer import Image


@dataclass(frozen=True)
class Maps(View):
    """What `measure` makes of the feature maps behind the ReLU, (B, N, H, W) -> (B, N): its mean
    over the images, (N,); with `each` that of every image, (N, images), in their order."""

    measure: Callable[[Tensor], Tensor]
    each: bool = False
    part: ClassVar[str | None] = "ReLU"
    reads_images: ClassVar[bool] = True

    def scored(self, graph: ChannelGraph) -> set[str]:
        return set(rectifiers(graph))

    def joined(self, batches: Sequence[Tensor]) -> Tensor:
        return torch.cat(list(batches), 1) if self.each else super().joined(batches)

    def collector(
        self, graph: ChannelGraph, layers: Sequence[str], image: Image | None
    ) -> Collector:
        relus = rectifiers(graph)
        return _Maps({layer: relus[layer] for layer in layers}, self)


class _Maps(Collector):
    def __init__(self, relus: Mapping[str, fx.Node], view: Maps) -> None:
        # Several convolutions may come to one ReLU: its maps are measured once.
        self._relus, self._view = relus, view
        self.watched = frozenset(relus.values())
        self._seen = {node: PerImage(view.each) for node in self.watched}

    def see(self, node: fx.Node, value: Tensor) -> None:
        self._seen[node].add(self._view.measure(value.detach()))

    def values(self) -> Mapping[str, Tensor]:
        return {layer: self._seen[node].value() for layer, node in self._relus.items()}


class PerImage:
    """Numbers of each image, (B, N) by batch: their mean, (N,), or with `each` all, (N, images)."""

    def __init__(self, each: bool) -> None:
        self._each = each
        self._parts: list[Tensor] = []
        self._images = 0

    def add(self, values: Tensor) -> None:
        self._images += len(values)
        values = values.detach().double()
        if self._each:
            self._parts.append(values.T.cpu())
            return
        total = values.sum(0)
        self._parts = [self._parts[0] + total] if self._parts else [total]

    def value(self) -> Tensor:
        return torch.cat(self._parts, 1) if self._each else (self._parts[0] / self._images).cpu()
