"""Which filters go together: channels that the graph ties, gathered into groups of one decision.

residual modes, for convolutions whose channels meet in an add:

independent  each prunes its own filters, as in the papers; the streams hold what anybody wrote
shared       one decision for all that write into a stream, which so gets narrow itself
inner        only convolutions that do not write into a stream are pruned

A depthwise filter always goes with the filter it reads, and the factors of a product together.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, fx, nn

from fpgm.graph import operations as ops
from fpgm.graph.trace import ChannelGraph

RESIDUAL = ("independent", "shared", "inner")

NOBODY = -1  # a channel that is a constant from the start


@dataclass(frozen=True)
class Group:
    """Channels that are decided in one ranking. members: (convolution, (n,) filters) pairs; the
    i-th filters of all members are one channel and are kept or pruned together."""

    members: tuple[tuple[str, Tensor], ...]

    def __len__(self) -> int:
        return len(self.members[0][1])


@dataclass(frozen=True)
class Prunable:
    """All that may be pruned, and why each convolution that is in no group is not."""

    groups: tuple[Group, ...]
    kept_full: dict[str, str]

    @property
    def layers(self) -> tuple[str, ...]:
        """Convolutions of which filters may be pruned, in the order of execution."""
        return tuple(dict.fromkeys(name for group in self.groups for name, _ in group.members))


def prunable(graph: ChannelGraph, residual: str = "independent") -> Prunable:
    """The groups of a network. Raises ValueError for an unknown residual mode."""
    if residual not in RESIDUAL:
        raise ValueError(f"residual={residual}: choose one of {', '.join(RESIDUAL)}")
    kept = dict(graph.kept_full)
    if residual != "shared":
        reason = "a projection shortcut, which the papers do not prune"
        kept.update({name: reason for name in graph.projections if name not in kept})
    ties = _Ties(graph, residual)
    tied: dict[int, list[tuple[str, int]]] = defaultdict(list)
    for name, channels in ties.filters.items():
        for index, channel in enumerate(channels):
            tied[ties.find(channel)].append((name, index))
    streams = {ties.find(channel) for channel in ties.streams}
    gathered: dict[tuple[str, ...], list[list[int]]] = defaultdict(list)
    for root, filters in tied.items():
        names = tuple(name for name, _ in filters)
        held = next((name for name in names if name in kept), None)
        if held is not None:
            for name in names:
                kept.setdefault(name, f"tied to {held}, which is kept: {kept[held]}")
        elif residual == "inner" and root in streams:
            kept.update(dict.fromkeys(names, "writes into a residual stream"))
        else:
            gathered[names].append([index for _, index in filters])
    groups = [
        Group(tuple(zip(names, torch.tensor(rows).T, strict=True)))
        for names, rows in gathered.items()
        if not any(name in kept for name in names)
    ]
    return Prunable(tuple(groups), kept)


class _Ties:
    """Union-find over channels. filters: convolution -> the channel that each filter writes."""

    def __init__(self, graph: ChannelGraph, residual: str) -> None:
        self.filters: dict[str, list[int]] = {}
        self.streams: list[int] = []  # channels that meet in an add
        self._parent: list[int] = []
        self._shared = residual == "shared"
        self._modules: dict[str, nn.Module] = dict(graph.module.named_modules())
        channels: dict[fx.Node, list[int] | None] = {}
        for node, kind in graph.kinds.items():
            channels[node] = self._written(node, kind, [channels[n] for n in node.all_input_nodes])

    def find(self, channel: int) -> int:
        while self._parent[channel] != channel:
            self._parent[channel] = self._parent[self._parent[channel]]
            channel = self._parent[channel]
        return channel

    def _fresh(self, count: int) -> list[int]:
        new = list(range(len(self._parent), len(self._parent) + count))
        self._parent += new
        return new

    def _written(
        self, node: fx.Node, kind: str, inputs: Sequence[list[int] | None]
    ) -> list[int] | None:
        """The channels of a node's result, None where they are not known."""
        if kind in (ops.CONV, ops.DEPTHWISE):
            module = self._modules[str(node.target)]
            assert isinstance(module, nn.Conv2d)
            own = self._fresh(module.out_channels)
            self.filters[str(node.target)] = own
            read = inputs[0] if kind == ops.DEPTHWISE else None
            return own if read is None else self._tied(own, read)
        if kind in (ops.LINEAR, ops.OPAQUE, ops.OUTPUT) or any(i is None for i in inputs):
            return None
        known = [i for i in inputs if i is not None]
        if kind == ops.CAT:
            listed = dict(zip(node.all_input_nodes, known, strict=True))
            return [c for n in node.args[0] for c in listed[n]]  # type: ignore[union-attr, index]
        if kind == ops.PAD:
            *_, front, back = ops.argument(node, 1, "pad", ())
            return [NOBODY] * front + known[0] + [NOBODY] * back
        if len(known) == 1:
            return known[0]
        if len(known[0]) != len(known[1]):
            return None
        if kind == ops.MUL:
            return self._tied(*known)
        self.streams += [c for c in known[0] + known[1] if c != NOBODY]
        return self._tied(*known) if self._shared else self._fresh(len(known[0]))

    def _tied(self, a: list[int], b: list[int]) -> list[int]:
        for one, other in zip(a, b, strict=True):
            if NOBODY not in (one, other):
                self._parent[self.find(other)] = self.find(one)
        return [other if one == NOBODY else one for one, other in zip(a, b, strict=True)]
