"""Which filters go together: channels that the graph ties, gathered into groups of one decision.

residual modes, for convolutions whose channels meet in an add:

independent  each prunes its own filters, as in the papers; the streams hold what anybody wrote
shared       one decision for all that write into a stream, which so gets narrow itself
inner        only convolutions that do not write into a stream are pruned

A depthwise filter always goes with the filter it reads, and the factors of a product together.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

import torch
from scipy.cluster.hierarchy import DisjointSet
from torch import Tensor, fx, nn

from fpgm.errors import Error
from fpgm.graph import operations as ops
from fpgm.graph.flow import Algebra, follow, kept_full, projections
from fpgm.graph.trace import ChannelGraph

RESIDUAL = ("independent", "shared", "inner")

NOBODY = -1  # a channel that is a constant from the start


@dataclass(frozen=True)
class Group:
    """Channels that are decided in one ranking. members: (convolution, (n,) filters) pairs; the
    i-th filters of all members are one channel and are kept or pruned together; shape: equal for
    groups whose layers are alike: kernel, stride, widths, and what their channels go into; blocks:
    runs of equal length of which each must keep the same number, as a grouped convolution that
    writes or reads them has as many channels in every group."""

    members: tuple[tuple[str, Tensor], ...]
    shape: tuple[object, ...] = ()
    blocks: int = 1

    def __len__(self) -> int:
        return len(self.members[0][1])

    @property
    def filters(self) -> Counter[str]:
        """How many filters of each layer it decides about."""
        return Counter({n: c * len(self) for n, c in Counter(n for n, _ in self.members).items()})


@dataclass(frozen=True)
class Prunable:
    """All that may be pruned, and why each convolution that is in no group is not."""

    groups: tuple[Group, ...]
    kept_full: dict[str, str]

    @property
    def layers(self) -> tuple[str, ...]:
        """Convolutions of which filters may be pruned, in the order of execution."""
        return tuple(dict.fromkeys(name for group in self.groups for name, _ in group.members))


def prunable(
    graph: ChannelGraph, residual: str = "independent", ignore: Sequence[str] = ()
) -> Prunable:
    """The groups of a network. ignore: shell-like patterns on names of convolutions that stay
    whole, and with them all that they are tied to. Raises ValueError for an unknown residual mode,
    Error for a pattern that fits no convolution."""
    if residual not in RESIDUAL:
        raise ValueError(f"residual={residual}: choose one of {', '.join(RESIDUAL)}")
    kept = kept_full(graph) | _ignored(graph, ignore)
    if residual != "shared":
        reason = "a projection shortcut, which the papers do not prune"
        kept.update({name: reason for name in projections(graph) if name not in kept})
    ties = _Ties(graph, residual)
    follow(graph, ties)
    rows = _rows(ties)
    streams = {ties.sets[channel] for channel in ties.streams} if residual == "inner" else set()
    factors = {name for node, name in graph.writers() if node in graph.flat}
    for names, channels in rows.items():
        if factors.issuperset(names):
            kept.update(dict.fromkeys(names, "factors of channels that no filter writes"))
        elif any(root in streams for root, _ in channels):
            for name in names:
                kept.setdefault(name, "writes into a residual stream")
    _keep_tied(kept, rows)
    shapes, labels = _shapes(graph), ties.labels()
    groups = []
    for names, channels in rows.items():
        if not any(name in kept for name in names):
            ordered, blocks = _in_blocks(channels, labels)
            indices = torch.tensor([filters for _, filters in ordered]).T
            members = tuple(zip(names, indices, strict=True))
            shape = (len(ordered), *(shapes[name] for name in names))
            groups.append(Group(members, shape, blocks))
    return Prunable(tuple(groups), kept)


def _ignored(graph: ChannelGraph, patterns: Sequence[str]) -> dict[str, str]:
    """Layer -> reason, of those that patterns fit. Raises Error for one that fits none."""
    layers = [name for _, name in graph.writers()]
    found: dict[str, str] = {}
    for pattern in patterns:
        fitting = [name for name in layers if fnmatchcase(name, pattern)]
        if not fitting and not any(fnmatchcase(name, pattern) for name in kept_full(graph)):
            raise Error(f"ignore: {pattern} fits no layer; the layers are {', '.join(layers)}")
        for name in fitting:
            found.setdefault(name, f"ignore={pattern}")
    return found


Rows = list[tuple[int, list[int]]]  # (channel, its filter in each member)


def _rows(ties: _Ties) -> dict[tuple[str, ...], Rows]:
    """The channels that filters write, those of the same layers together."""
    tied: dict[int, list[tuple[str, int]]] = defaultdict(list)
    for name, channels in ties.filters.items():
        for index, channel in enumerate(channels):
            tied[ties.sets[channel]].append((name, index))
    rows: dict[tuple[str, ...], Rows] = defaultdict(list)
    for root, filters in tied.items():
        rows[tuple(name for name, _ in filters)].append((root, [index for _, index in filters]))
    return rows


def _keep_tied(kept: dict[str, str], rows: Iterable[tuple[str, ...]]) -> None:
    """One layer that is kept whole keeps all that it is tied to."""
    while True:
        before = len(kept)
        for names in rows:
            held = next((name for name in names if name in kept), None)
            for name in names if held is not None else ():
                kept.setdefault(name, f"tied to {held}, which is kept: {kept[held or name]}")
        if len(kept) == before:
            return


def _in_blocks(rows: Rows, labels: Mapping[int, tuple[int, ...]]) -> tuple[Rows, int]:
    """The channels of a group in runs of those that the same groups of convolutions have, and how
    many runs there are: 1 where these would not be of one length."""
    runs: dict[tuple[int, ...], Rows] = defaultdict(list)
    for row in rows:
        runs[labels.get(row[0], ())].append(row)
    if len({len(run) for run in runs.values()}) > 1:
        return rows, 1
    return [row for _, run in sorted(runs.items()) for row in run], len(runs)


def _shapes(graph: ChannelGraph) -> dict[str, tuple[object, ...]]:
    """Convolution -> what it has in common with others of its kind."""
    found: dict[str, tuple[object, ...]] = {}
    for node, name in graph.writers():
        layer = graph.called(node)
        assert isinstance(layer, nn.Conv2d | nn.Linear)
        options = ("kernel_size", "stride", "dilation", "groups")
        how = tuple(getattr(layer, option, 1) for option in options)
        into = tuple(sorted(_read_by(node, graph)))
        found[name] = (*how, layer.weight.shape[1] * how[3], len(layer.weight), into)
    return found


def _read_by(node: fx.Node, graph: ChannelGraph) -> set[str]:
    """The kinds of operations that a node's channels go into, behind those that keep channels."""
    kinds: set[str] = set()
    for user in node.users:
        kind = graph.kinds[user]
        through = kind in (ops.NORM, ops.ELEMENTWISE, ops.POOL, ops.SLICE, ops.FLATTEN,
                           ops.SPATIAL, ops.RESHAPE)  # fmt: skip
        kinds |= _read_by(user, graph) if through else {kind}
    return kinds


class _Ties(Algebra[list[int]]):
    """Channels by number. sets: which of them are one channel; filters: convolution -> the channel
    that each filter writes; streams: channels that meet in an add; runs: of the channels that a
    grouped convolution reads or writes, a list for each of its groups."""

    def __init__(self, graph: ChannelGraph, residual: str) -> None:
        self.sets = DisjointSet()
        self.filters: dict[str, list[int]] = {}
        self.streams: list[int] = []
        self.runs: list[list[list[int]]] = []
        self._graph = graph
        self._shared = residual == "shared"

    def written(self, node: fx.Node, read: list[int] | None) -> list[int]:
        name = str(node.target)
        own = self.filters[name] = self._fresh(self._graph.filters(name))
        if read is None:
            return own
        if self._graph.kinds[node] == ops.DEPTHWISE:
            return self._tied(own, read)
        conv = self._graph.called(node)
        assert isinstance(conv, nn.Conv2d)
        reads, writes = (_split(channels, conv.groups) for channels in (read, own))
        if 1 in (len(reads[0]), len(writes[0])):  # a group goes as a whole, or nothing of it
            for run, written in zip(reads, writes, strict=True):
                one = [*written, *(channel for channel in run if channel != NOBODY)]
                self._tied(one[1:], one[:-1])
        else:
            self.runs += [reads, writes]
        return own

    def labels(self) -> dict[int, tuple[int, ...]]:
        """Channel -> which group of each grouped convolution has it."""
        found: dict[int, tuple[int, ...]] = defaultdict(tuple)
        for number, runs in enumerate(self.runs):
            for place, run in enumerate(runs):
                for channel in {self.sets[c] for c in run if c != NOBODY}:
                    found[channel] += (number, place)
        return found

    def chosen(self, node: fx.Node, source: list[int], channels: Sequence[int]) -> list[int]:
        return [source[channel] for channel in channels]

    def joined(self, node: fx.Node, parts: Sequence[list[int]]) -> list[int]:
        return [channel for part in parts for channel in part]

    def padded(self, node: fx.Node, source: list[int], front: int, back: int) -> list[int]:
        return [NOBODY] * front + source + [NOBODY] * back

    def met(self, node: fx.Node, a: list[int], b: list[int]) -> list[int] | None:
        if len(node.all_input_nodes) == 1:  # x + x
            return a
        if len(a) != len(b):
            return None
        if self._graph.kinds[node] == ops.MUL:
            return self._tied(a, b)
        self.streams += [channel for channel in a + b if channel != NOBODY]
        # In a stream that is not shared any channel may be there whoever prunes his own.
        return self._tied(a, b) if self._shared else self._fresh(len(a))

    def _fresh(self, count: int) -> list[int]:
        channels = list(range(len(self.sets), len(self.sets) + count))
        for channel in channels:
            self.sets.add(channel)
        return channels

    def _tied(self, a: list[int], b: list[int]) -> list[int]:
        for one, other in zip(a, b, strict=True):
            if NOBODY not in (one, other):
                self.sets.merge(one, other)
        return [other if one == NOBODY else one for one, other in zip(a, b, strict=True)]


def _split(channels: list[int], groups: int) -> list[list[int]]:
    """The channels of each group of a grouped convolution."""
    size = len(channels) // groups
    return [channels[start : start + size] for start in range(0, len(channels), size)]
