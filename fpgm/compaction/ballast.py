"""Zero filters that a compact network is better off with: its ballast, beside what is kept.

A pruned filter may stay as a filter of zeros. That costs MACs and can save more milliseconds than
they take: the convolution that feeds an add writes the whole stream, so that no Expand is needed (a
widened convolution in place of a scatter); the map of the constants at the borders goes into the
weight of one constant channel; and a width becomes a multiple of what the runtime computes at once.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence

import torch
from torch import Tensor, fx

from fpgm.compaction.constants import Analysis, Expansion, Keep, analyse
from fpgm.graph.flow import Algebra, Flow, follow
from fpgm.graph.groups import Group
from fpgm.graph.trace import ChannelGraph

Stream = tuple[str, int]  # kind of the operation that reads, its channels: the adds of a stream
Filter = tuple[str, int]  # convolution, index


def everything(graph: ChannelGraph, keep: Keep) -> dict[str, Tensor]:
    """All filters: the network at full width."""
    return {name: torch.arange(graph.filters(name)) for name in keep}


def streams(graph: ChannelGraph, keep: Keep) -> list[Stream]:
    """What is read through an Expand, in the order of execution."""
    return list(dict.fromkeys(_stream(e, graph) for e in analyse(graph, keep).widened()))


def widened(
    graph: ChannelGraph, keep: Keep, ballast: Keep, chosen: Collection[Stream]
) -> dict[str, Tensor]:
    """`ballast` and what more the convolutions must write so that `chosen` read without an Expand.

    Channels that no convolution writes (those of a shortcut A) still need one.
    """
    ballast, writers = dict(ballast), follow(graph, _Writers(graph))
    while True:  # what is written now is missing further up: at the other side of an earlier add
        before = sum(len(filters) for filters in ballast.values())
        for expansion in analyse(graph, keep, ballast).widened():
            if _stream(expansion, graph) in chosen:
                by = writers.read[expansion.reader][expansion.source] or []
                _add(ballast, keep, [by[i] for i in expansion.missing.tolist()])
        if sum(len(filters) for filters in ballast.values()) == before:
            return ballast


def rounded(
    graph: ChannelGraph, keep: Keep, ballast: Keep, groups: Iterable[Group], multiple: int
) -> dict[str, Tensor]:
    """`ballast` and more filters of each group, until its width is a multiple of `multiple`.

    Wherever the absent channels of a group leave a constant that is not zero, one of them is among
    these: it carries the others' (see narrowing.convolution). The largest constants go first.
    """
    ballast = dict(ballast)
    worth = _largest(analyse(graph, keep, ballast), follow(graph, _Writers(graph)))
    for group in groups:
        there, best = torch.zeros(len(group), dtype=torch.bool), torch.zeros(len(group))
        for name, filters in group.members:
            there |= torch.isin(filters, torch.cat((keep[name], ballast.get(name, keep[name]))))
            best = torch.maximum(best, worth[name][filters])
        best = best.masked_fill(there, -1)
        # One more than there are where there is something to carry.
        wanted = int(there.sum()) + bool(best.max() > 0)
        more = min(-(-wanted // multiple) * multiple, len(group)) - int(there.sum())
        extra = best.argsort(descending=True, stable=True)[:more].tolist()
        for name, filters in group.members:
            _add(ballast, keep, [(name, filter_) for filter_ in filters[extra].tolist()])
    return ballast


def _stream(expansion: Expansion, graph: ChannelGraph) -> Stream:
    return graph.kinds[expansion.reader], expansion.channels.total


def _add(ballast: dict[str, Tensor], keep: Keep, filters: Iterable[Filter | None]) -> None:
    more: dict[str, list[int]] = {}
    for name, index in (filter_ for filter_ in filters if filter_ is not None):
        more.setdefault(name, []).append(index)
    for name, indices in more.items():
        if name in keep:
            present = ballast.get(name, keep[name])
            ballast[name] = torch.cat((present, torch.tensor(indices))).unique()


def _largest(analysis: Analysis, writers: Flow[list[Filter | None]]) -> dict[str, Tensor]:
    """The largest constant, in size, that each absent filter leaves where a map would need it."""
    graph = analysis.graph
    largest = {name: torch.zeros(graph.filters(name)) for _, name in graph.writers()}
    for node, name in graph.convolutions():
        if name not in analysis.carriers:
            continue
        source = node.all_input_nodes[0]
        constants = analysis.inputs(node).absent.abs().tolist()
        for writer, constant in zip(writers.read[node][source] or (), constants, strict=False):
            if writer is not None and constant > 0:
                by, index = writer
                largest[by][index] = max(float(largest[by][index]), constant)
    return largest


class _Writers(Algebra[list[Filter | None]]):
    """The filter that writes each channel, of two that meet the first; None: no filter does."""

    def __init__(self, graph: ChannelGraph) -> None:
        self._graph = graph

    def written(
        self,
        node: fx.Node,
        read: list[Filter | None] | None,
    ) -> list[Filter | None]:
        name = str(node.target)
        return [(name, index) for index in range(self._graph.filters(name))]

    def joined(
        self,
        node: fx.Node,
        parts: Sequence[list[Filter | None]],
    ) -> list[Filter | None]:
        return [writer for part in parts for writer in part]

    def padded(
        self,
        node: fx.Node,
        source: list[Filter | None],
        front: int,
        back: int,
    ) -> list[Filter | None]:
        return [None] * front + source + [None] * back

    def chosen(
        self,
        node: fx.Node,
        source: list[Filter | None],
        channels: Sequence[int],
    ) -> list[Filter | None]:
        return [source[channel] for channel in channels]

    def met(
        self,
        node: fx.Node,
        a: list[Filter | None],
        b: list[Filter | None],
    ) -> list[Filter | None]:
        return [one or other for one, other in zip(a, b, strict=False)]
