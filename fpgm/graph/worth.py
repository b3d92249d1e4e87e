"""What a channel costs: the multiply-accumulates, parameters and memory that go when it goes."""

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

READERS = (ops.CONV, ops.GROUPED, ops.UNITS, ops.LINEAR)  # with a weight for each channel they read


@dataclass(frozen=True)
class Worth:
    """Of a channel, or of one filter. macs: multiply-accumulates for one image, params: parameters,
    those of the filters that write it, of what stands behind them and of whoever reads it; memory:
    pixels of the maps that its filters write (Group Fisher, Liu et al., ICML 2021)."""

    macs: float = 0.0
    params: float = 0.0
    memory: float = 0.0

    def __add__(self, other: Worth) -> Worth:
        return Worth(self.macs + other.macs, self.params + other.params, self.memory + other.memory)

    def __mul__(self, factor: float) -> Worth:
        return Worth(self.macs * factor, self.params * factor, self.memory * factor)


@dataclass(frozen=True)
class _Prices:
    """own: layer -> what one of its filters is by itself; reads: the filters that write a channel
    -> (layer, what one channel of its input is to it) of all that read it."""

    own: dict[str, Worth]
    reads: dict[Filters, list[tuple[str, Worth]]]


def worths(graph: ChannelGraph, groups: Sequence[Group], dense: Cost) -> list[Worth]:
    """For each group what goes with one channel of it: a reader's part where no other filter writes
    the channel. dense: what the network at full width costs on the images in question."""
    prices = _prices(graph, dense)
    found = []
    for group in groups:
        names = [name for name, _ in group.members]
        own = frozenset((name, int(filters[0])) for name, filters in group.members)
        total = sum((prices.own[name] for name in names), Worth())
        for writers in (writers for writers in prices.reads if writers and writers <= own):
            for reader, price in prices.reads[writers]:
                # A layer that reads its own group loses the filter's share of that but once.
                twice = 1 / graph.filters(reader) if reader in names else 0
                total += price * (1 - twice)
        found.append(total)
    return found


def by_filter(graph: ChannelGraph, dense: Cost) -> dict[str, list[Worth]]:
    """Layer -> of each of its filters what it is by itself, and its part of whoever reads its
    channels. Filters that write one channel have equal parts: together what goes with all of
    them."""
    prices = _prices(graph, dense)
    found = {name: [own] * graph.filters(name) for name, own in prices.own.items()}
    for writers, readers in prices.reads.items():
        total = sum((price for _, price in readers), Worth())
        for name, index in writers:
            found[name][index] += total * (1 / len(writers))
    return found


def _prices(graph: ChannelGraph, dense: Cost) -> _Prices:
    macs = {layer.name: layer.macs for layer in dense.layers}
    own: dict[str, Worth] = {}
    for node, name in graph.writers():
        layer = graph.called(node)
        assert isinstance(layer, nn.Conv2d | nn.Linear)
        filters, size = len(layer.weight), layer.weight[0].numel()
        each = macs[name] / filters
        own[name] = Worth(each, _parameters(layer) / filters, each / size)
    reads: defaultdict[Filters, list[tuple[str, Worth]]] = defaultdict(list)
    flow = follow(graph, Writers(graph))
    for node, kind in graph.kinds.items():
        if kind not in (*READERS, ops.NORM, ops.SLOPE):
            continue
        layer, name = graph.called(node), str(node.target)
        assert layer is not None
        written = flow.read[node][node.all_input_nodes[0]] or []
        # A norm has a parameter of each channel; a layer's bias is its filters' own.
        whole = layer.weight if isinstance(layer, nn.Conv2d | nn.Linear) else None
        params = _parameters(layer) if whole is None else whole.numel()
        for writers in written:
            price = Worth(macs.get(name, 0) / len(written), params / len(written))
            reads[writers].append((name, price))
    return _Prices(own, dict(reads))


def _parameters(layer: nn.Module) -> int:
    return sum(parameter.numel() for parameter in layer.parameters(recurse=False))


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
