"""Which group decides about each channel that a layer reads or writes."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from fpgm.graph.flow import follow
from fpgm.graph.groups import Group
from fpgm.graph.trace import ChannelGraph
from fpgm.graph.worth import Filters, Writers

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
    flow = follow(graph, Writers(graph))

    def decided(writers: Filters) -> int | None:
        groups_of = {owner.get(writer) for writer in writers}
        return NEVER if not writers else groups_of.pop() if len(groups_of) == 1 else None

    found: dict[str, tuple[Reads, Reads]] = {}
    for node, name in graph.convolutions():
        conv = graph.called(node)
        assert isinstance(conv, nn.Conv2d)
        read = flow.read[node][node.all_input_nodes[0]]
        owners = [None] * conv.in_channels if read is None else [decided(w) for w in read]
        written = [owner.get((name, index)) for index in range(graph.filters(name))]
        found[name] = (_counted(owners, groups), _counted(written, groups))
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
