"""Zero filters that a compact network is better off with: what to emit beside what is kept.

A pruned filter may stay as a filter of zeros, `emit` of the rewriting. That costs MACs and can
save more milliseconds than they take: the convolution that feeds an add writes the whole stream,
so that no Expand is needed (a widened convolution in place of a scatter); the map of the constants
at the borders goes into the weight of one constant channel; and a width becomes a multiple of what
the runtime computes at once.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable

import torch
from torch import Tensor, fx

from fpgm.compaction.constants import Expansion
from fpgm.compaction.narrowing import pads_zeros
from fpgm.compaction.rewriting import Keep, Rewriter
from fpgm.graph import operations as ops
from fpgm.graph.groups import Group
from fpgm.graph.trace import ChannelGraph

Stream = tuple[str, int]  # kind of the operation that reads, its channels: the adds of a stream
Filter = tuple[str, int]  # convolution, index


def everything(graph: ChannelGraph, keep: Keep) -> dict[str, Tensor]:
    """All filters: the network at full width."""
    return {name: torch.arange(graph.filters(name)) for name in keep}


def streams(graph: ChannelGraph, keep: Keep) -> list[Stream]:
    """What is read through an Expand, in the order of execution."""
    expansions = _rewritten(graph, keep, {}).expansions
    return list(dict.fromkeys(_stream(graph, expansion) for expansion in expansions))


def widened(
    graph: ChannelGraph, keep: Keep, emit: Keep, chosen: Collection[Stream]
) -> dict[str, Tensor]:
    """`emit` and what more the convolutions must write so that `chosen` read without an Expand.

    Channels that no convolution writes (those of a shortcut A) still need one.
    """
    emit, writers = dict(emit), _writers(graph)
    while True:  # what is written now is missing further up: at the other side of an earlier add
        before = sum(len(filters) for filters in emit.values())
        for expansion in _rewritten(graph, keep, emit).expansions:
            if _stream(graph, expansion) in chosen:
                by = writers[expansion.source] or []
                _add(emit, keep, [by[i] for i in expansion.missing.tolist()])
        if sum(len(filters) for filters in emit.values()) == before:
            return emit


def rounded(
    graph: ChannelGraph, keep: Keep, emit: Keep, groups: Iterable[Group], multiple: int
) -> dict[str, Tensor]:
    """`emit` and more filters of each group, until its width is a multiple of `multiple`.

    Wherever the absent channels of a group leave a constant that is not zero, one of them is among
    these: it carries the others' (see narrowing.convolution). The largest constants go first.
    """
    emit = dict(emit)
    worth = _constants(graph, keep, emit)
    for group in groups:
        there, best = torch.zeros(len(group), dtype=torch.bool), torch.zeros(len(group))
        for name, filters in group.members:
            there |= torch.isin(filters, torch.cat((keep[name], emit.get(name, keep[name]))))
            best = torch.maximum(best, worth[name][filters])
        best = best.masked_fill(there, -1)
        wanted = int(there.sum()) + bool(best.max() > 0)
        more = min(-(-wanted // multiple) * multiple, len(group)) - int(there.sum())
        extra = best.argsort(descending=True, stable=True)[:more].tolist()
        for name, filters in group.members:
            _add(emit, keep, [(name, filter_) for filter_ in filters[extra].tolist()])
    return emit


def _rewritten(graph: ChannelGraph, keep: Keep, emit: Keep) -> Rewriter:
    rewriter = Rewriter(graph, keep, emit)
    rewriter.run()
    return rewriter


def _stream(graph: ChannelGraph, expansion: Expansion) -> Stream:
    return graph.kinds[expansion.reader], expansion.width


def _add(emit: dict[str, Tensor], keep: Keep, filters: Iterable[Filter | None]) -> None:
    more: dict[str, list[int]] = {}
    for name, index in (filter_ for filter_ in filters if filter_ is not None):
        more.setdefault(name, []).append(index)
    for name, indices in more.items():
        if name in keep:
            emit[name] = torch.cat((emit.get(name, keep[name]), torch.tensor(indices))).unique()


def _constants(graph: ChannelGraph, keep: Keep, emit: Keep) -> dict[str, Tensor]:
    """The largest constant, in size, that each absent filter leaves where a map would need it."""
    channels, writers = _rewritten(graph, keep, emit).channels, _writers(graph)
    worth = {name: torch.zeros(graph.filters(name)) for _, name in graph.convolutions()}
    for node, name in graph.convolutions():
        source = node.all_input_nodes[0]
        read, by = channels[source], writers[source]
        padded = pads_zeros(graph.module.get_submodule(name))
        if read is None or by is None or graph.kinds[node] != ops.CONV or not padded:
            continue
        for writer, constant in zip(by, read.absent.abs().tolist(), strict=True):
            if writer is not None and constant > 0:
                name, index = writer
                worth[name][index] = max(float(worth[name][index]), constant)
    return worth


def _writers(graph: ChannelGraph) -> dict[fx.Node, list[Filter | None] | None]:
    """The filter that writes each channel of a node's result, of two that meet the first.

    None: a channel that no filter writes, and a node whose channels are not known.
    """
    writers: dict[fx.Node, list[Filter | None] | None] = {}
    for node, kind in graph.kinds.items():
        above = {n: writers[n] for n in node.all_input_nodes}
        inputs = [by for by in above.values() if by is not None]
        by: list[Filter | None] | None = inputs[0] if inputs else None
        if kind in (ops.CONV, ops.DEPTHWISE):
            name = str(node.target)
            by = [(name, i) for i in range(graph.filters(name))]
        elif kind in (ops.LINEAR, ops.OPAQUE, ops.OUTPUT) or len(inputs) < len(above):
            by = None
        elif kind == ops.CAT:
            by = [filter_ for n in node.args[0] for filter_ in above[n]]  # type: ignore
        elif kind == ops.PAD:
            *_, front, back = ops.argument(node, 1, "pad", ())
            by = [None] * front + inputs[0] + [None] * back
        elif len(inputs) == 2:
            by = [a or b for a, b in zip(*inputs, strict=False)]
        writers[node] = by
    return writers
