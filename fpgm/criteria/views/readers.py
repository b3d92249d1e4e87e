"""Views of who reads a filter's channel: their weights, and what the filter costs with them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, fx, nn

from fpgm.criteria.views.view import Collector, View
from fpgm.errors import Error
from fpgm.graph.cost import cost
from fpgm.graph.flow import follow
from fpgm.graph.trace import ChannelGraph
from fpgm.graph.tracer import Image
from fpgm.graph.worth import READERS, Filters, Writers, by_filter


@dataclass(frozen=True)
class Reader:
    """A layer and the channels that it reads. writers: all filters that write each of them, as
    many as there are; behind a flatten a channel is a run of features."""

    node: fx.Node
    layer: nn.Conv2d | nn.Linear
    writers: Sequence[Filters]

    @property
    def name(self) -> str:
        return str(self.node.target)

    def weights(self) -> Tensor:
        """What is read of each channel. (channels, d) float64."""
        weight = self.layer.weight.detach().double()
        channels, groups = len(self.writers), getattr(self.layer, "groups", 1)
        # (groups, N / groups, C / groups, d): filters of a group read channels of the same group.
        by_group = weight.view(groups, len(weight) // groups, channels // groups, -1)
        return by_group.transpose(1, 2).reshape(channels, -1)


def readers(graph: ChannelGraph) -> Iterator[Reader]:
    """Every layer with a weight for each channel that it reads, and whose channels are known, in
    the order of execution. A depthwise convolution is none: its filters write the same channels."""
    flow = follow(graph, Writers(graph))
    for node, kind in graph.kinds.items():
        written = flow.read[node].get(node.all_input_nodes[0]) if kind in READERS else None
        if written is not None:
            layer = graph.called(node)
            assert isinstance(layer, nn.Conv2d | nn.Linear)
            yield Reader(node, layer, written)


@dataclass(frozen=True)
class Readers(View):
    """What `measure` makes of the weights that read a filter's channel, (channels, d) float64 ->
    (channels,), summed over all channels that the filter writes and all layers that read them.
    (N,), zeros where nobody does."""

    measure: Callable[[Tensor], Tensor]

    def collector(
        self, graph: ChannelGraph, layers: Sequence[str], image: Image | None
    ) -> Collector:
        return _Weights(graph, layers, self.measure)


class _Weights(Collector):
    def __init__(
        self, graph: ChannelGraph, layers: Sequence[str], measure: Callable[[Tensor], Tensor]
    ) -> None:
        self._graph, self._layers, self._measure = graph, layers, measure

    def values(self) -> Mapping[str, Tensor]:
        found = {
            layer: torch.zeros(self._graph.filters(layer), dtype=torch.float64)
            for layer in self._layers
        }
        for reader in readers(self._graph):
            measured = self._measure(reader.weights()).cpu()
            for layer, (channels, filters) in places(reader.writers).items():
                if layer in found:
                    found[layer].index_add_(0, filters, measured[channels])
        return found


def places(writers: Sequence[Filters]) -> dict[str, tuple[Tensor, Tensor]]:
    """Layer -> the channels that it writes and the filter that each comes from, both (n,)."""
    pairs: defaultdict[str, list[tuple[int, int]]] = defaultdict(list)
    for channel, filters in enumerate(writers):
        for layer, index in filters:
            pairs[layer].append((channel, index))
    tables = {layer: torch.tensor(table) for layer, table in pairs.items()}
    return {layer: (table[:, 0], table[:, 1]) for layer, table in tables.items()}


@dataclass(frozen=True)
class Worth(View):
    """What a filter costs, as a share of the network: multiply-accumulates for one image,
    parameters, or pixels of its maps (graph.worth.by_filter). (N,)

    Its own, and its part of all layers that read its channel."""

    of: Literal["macs", "params", "memory"]
    needs_image: ClassVar[bool] = True

    def collector(
        self, graph: ChannelGraph, layers: Sequence[str], image: Image | None
    ) -> Collector:
        if image is None:
            raise Error(
                "image=None: what a filter costs depends on the images' size; give image=(C, H, W)"
            )
        return _Shares(graph, layers, image, self.of)


class _Shares(Collector):
    def __init__(self, graph: ChannelGraph, layers: Sequence[str], image: Image, of: str) -> None:
        dense = cost(graph.module, image)
        found = by_filter(graph, dense)
        maps = sum(worth.memory for of_layer in found.values() for worth in of_layer)
        whole = {"macs": dense.macs, "params": dense.params, "memory": maps}[of]
        self._shares = {
            layer: torch.tensor([getattr(w, of) / whole for w in found[layer]], dtype=torch.float64)
            for layer in layers
        }

    def values(self) -> Mapping[str, Tensor]:
        return self._shares
