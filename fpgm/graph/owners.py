"""Which group decides about each channel that a layer reads or writes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import fx, nn

from fpgm.graph import operations as ops
from fpgm.graph.flow import Algebra, follow
from fpgm.graph.groups import Group
from fpgm.graph.trace import ChannelGraph

Reads = tuple[float, tuple[tuple[int, float], ...]]  # fixed channels, and (group, channels each)


def channels(graph: ChannelGraph, groups: Sequence[Group]) -> dict[str, tuple[Reads, Reads]]:
    """Convolution -> the channels that it reads and writes, by the groups that decide about them.

    Channels of a stream that several groups write (residual=independent) count as always there.
    """
    owner = {
        (name, int(index)): number
        for number, group in enumerate(groups)
        for name, filters in group.members
        for index in filters
    }
    flow = follow(graph, _Owners(graph, owner))
    found: dict[str, tuple[Reads, Reads]] = {}
    for node, name in graph.convolutions():
        conv = graph.called(node)
        assert isinstance(conv, nn.Conv2d)
        read = flow.read[node][node.all_input_nodes[0]]
        read = [None] * conv.in_channels if read is None else read
        written = [owner.get((name, index)) for index in range(graph.filters(name))]
        found[name] = (_counted(read, groups), _counted(written, groups))
    return found


def _counted(owners: Sequence[int | None], groups: Sequence[Group]) -> Reads:
    """(fixed, by group): how often each of a group's channels is there, once as a rule."""
    sizes: dict[int, int] = {}
    for number in owners:
        if number is not None and number >= 0:
            sizes[number] = sizes.get(number, 0) + 1
    fixed = sum(number is None for number in owners)
    return float(fixed), tuple((g, count / len(groups[g])) for g, count in sizes.items())


NEVER = -1  # a channel of zeros from the start: a compact network has none of these


class _Owners(Algebra[list[int | None]]):
    """The group that decides about each channel, None where none does alone."""

    def __init__(self, graph: ChannelGraph, owner: Mapping[tuple[str, int], int]) -> None:
        self._graph, self._owner = graph, owner

    def written(self, node: fx.Node, read: list[int | None] | None) -> list[int | None]:
        name = str(node.target)
        return [self._owner.get((name, index)) for index in range(self._graph.filters(name))]

    def joined(self, node: fx.Node, parts: Sequence[list[int | None]]) -> list[int | None]:
        return [number for part in parts for number in part]

    def padded(
        self, node: fx.Node, source: list[int | None], front: int, back: int
    ) -> list[int | None]:
        return [NEVER] * front + source + [NEVER] * back

    def met(
        self, node: fx.Node, a: list[int | None], b: list[int | None]
    ) -> list[int | None] | None:
        if len(a) != len(b):
            return None
        if self._graph.kinds[node] == ops.MUL:
            return a
        pairs = zip(a, b, strict=True)
        return [x if x == y or y == NEVER else y if x == NEVER else None for x, y in pairs]
