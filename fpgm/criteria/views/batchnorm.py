"""Views of the BatchNorm behind a convolution: its scale, its shift, and the loss's gradient."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from torch import Tensor

from fpgm.criteria.views.view import Collector, View
from fpgm.graph.flow import batch_norms
from fpgm.graph.trace import ChannelGraph
from fpgm.graph.tracer import Image


class _Behind(View):
    """Of the BatchNorm that alone reads a convolution."""

    part: ClassVar[str | None] = "BatchNorm"

    def scored(self, graph: ChannelGraph) -> set[str]:
        return set(batch_norms(graph))


@dataclass(frozen=True)
class Scale(_Behind):
    """The absolute scale of the BatchNorm behind, |gamma|, or its shift, |beta|. (N,)"""

    of: Literal["weight", "bias"] = "weight"

    def collector(
        self, graph: ChannelGraph, layers: Sequence[str], image: Image | None
    ) -> Collector:
        return _Scales(graph, layers, self.of)


class _Scales(Collector):
    def __init__(self, graph: ChannelGraph, layers: Sequence[str], of: str) -> None:
        norms = batch_norms(graph)
        self._norms = {layer: graph.module.get_submodule(norms[layer]) for layer in layers}
        self._of = of

    def values(self) -> Mapping[str, Tensor]:
        parts = {layer: getattr(norm, self._of) for layer, norm in self._norms.items()}
        return {layer: part.detach().abs().double().cpu() for layer, part in parts.items()}


@dataclass(frozen=True)
class Gate(_Behind):
    """What `measure` makes of the loss's gradient by a gate z = 1 on the BatchNorm's output, by
    minibatch: (N,) float64 -> (N,); summed over the minibatches."""

    measure: Callable[[Tensor], Tensor]
    reads_images: ClassVar[bool] = True
    differentiates: ClassVar[bool] = True

    def collector(
        self, graph: ChannelGraph, layers: Sequence[str], image: Image | None
    ) -> Collector:
        return _Gates(graph, layers, self.measure)


class _Gates(Collector):
    """The gradient is gamma dL/dgamma + beta dL/dbeta: no gate has to be there."""

    def __init__(
        self, graph: ChannelGraph, layers: Sequence[str], measure: Callable[[Tensor], Tensor]
    ) -> None:
        norms = batch_norms(graph)
        self._norms = {layer: norms[layer] for layer in layers}
        # Several convolutions may come to one BatchNorm.
        self._own = list(dict.fromkeys(self._norms.values()))
        modules = [graph.module.get_submodule(norm) for norm in self._own]
        self._affine: list[Any] = [p for m in modules for p in (m.weight, m.bias)]
        self._measure = measure
        self._sums: dict[str, Tensor] = {}

    def sources(self) -> Sequence[Tensor]:
        return self._affine

    def add(self, gradients: Sequence[Tensor | None]) -> None:
        products = [
            p.detach().double() * (0 if g is None else g.double())
            for p, g in zip(self._affine, gradients, strict=True)
        ]
        for norm, scaled, shifted in zip(self._own, products[::2], products[1::2], strict=True):
            value = self._measure(scaled + shifted)
            self._sums[norm] = self._sums[norm] + value if norm in self._sums else value

    def values(self) -> Mapping[str, Tensor]:
        return {layer: self._sums[norm].cpu() for layer, norm in self._norms.items()}
