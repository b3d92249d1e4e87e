"""What a channel costs: the multiply-accumulates and the memory that go when it goes."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from torch import fx, nn

from fpgm.graph import operations as ops
from fpgm.graph.cost import Cost
from fpgm.graph.flow import Algebra, follow
from fpgm.graph.groups import Group
from fpgm.graph.trace import ChannelGraph

Filters = frozenset[tuple[str, int]]  # (convolution, index) of all that write a channel


@dataclass(frozen=True)
class Worth:
    """Of one channel of a group. macs: multiply-accumulates for one image, those of the filters
    that write it and of whoever reads it, where no other filter writes it; memory: pixels of the
    maps that its filters write (Group Fisher, Liu et al., ICML 2021)."""

    macs: float
    memory: float


def worths(graph: ChannelGraph, groups: Sequence[Group], dense: Cost) -> list[Worth]:
    """For each group. dense: what the network at full width costs on the images in question."""
    macs = {layer.name: layer.macs for layer in dense.layers}
    per_filter: dict[str, float] = {}
    pixels: dict[str, float] = {}
    for node, name in graph.writers():
        layer = graph.called(node)
        assert isinstance(layer, nn.Conv2d | nn.Linear)
        per_filter[name] = macs[name] / len(layer.weight)
        pixels[name] = per_filter[name] / layer.weight[0].numel()
    # What one channel of its input costs each layer, by the filters that write the channel.
    reads: defaultdict[Filters, list[tuple[str, float]]] = defaultdict(list)
    flow = follow(graph, Writers(graph))
    for node, kind in graph.kinds.items():
        if kind not in (ops.CONV, ops.GROUPED, ops.UNITS, ops.LINEAR):
            continue
        written = flow.read[node][node.all_input_nodes[0]] or []
        for writers in written:
            reads[writers].append((str(node.target), macs[str(node.target)] / len(written)))
    found = []
    for group in groups:
        names = [name for name, _ in group.members]
        own = frozenset((name, int(filters[0])) for name, filters in group.members)
        total = sum(per_filter[name] for name in names)
        for writers in (writers for writers in reads if writers and writers <= own):
            for reader, cost in reads[writers]:
                # A layer that reads its own group loses the filter's share of that but once.
                twice = 1 / graph.filters(reader) if reader in names else 0
                total += cost * (1 - twice)
        found.append(Worth(total, sum(pixels[name] for name in names)))
    return found


class Writers(Algebra[list[Filters]]):
    """All filters that write each channel; a depthwise one's and those that it reads."""

    def __init__(self, graph: ChannelGraph) -> None:
        self._graph = graph

    def written(self, node: fx.Node, read: list[Filters] | None) -> list[Filters]:
        name = str(node.target)
        own = [frozenset({(name, index)}) for index in range(self._graph.filters(name))]
        if read is None or self._graph.kinds[node] == ops.GROUPED:
            return own
        return [a | b for a, b in zip(own, read, strict=True)]

    def joined(self, node: fx.Node, parts: Sequence[list[Filters]]) -> list[Filters]:
        return [writers for part in parts for writers in part]

    def padded(self, node: fx.Node, source: list[Filters], front: int, back: int) -> list[Filters]:
        nobody: Filters = frozenset()
        return [nobody] * front + source + [nobody] * back

    def chosen(
        self, node: fx.Node, source: list[Filters], channels: Sequence[int]
    ) -> list[Filters]:
        return [source[channel] for channel in channels]

    def met(self, node: fx.Node, a: list[Filters], b: list[Filters]) -> list[Filters] | None:
        return [one | other for one, other in zip(a, b, strict=True)] if len(a) == len(b) else None
