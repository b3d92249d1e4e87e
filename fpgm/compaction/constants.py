"""What is left of a network without its pruned filters, and what they still say.

A zeroed filter still says something: through its BatchNorm it emits a constant. So every tensor
carries, besides the channels that are still computed (live), the constant value of each channel
that is not. Elementwise operations map constants to constants, an add merges live channels, and
whoever reads constants folds them in: a linear layer into its bias, a zero-padded convolution as
one map that does not depend on the image, so that the borders are right too.

`analyse` finds all of this out without building a network; fpgm.compaction.rewriting builds it.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from fpgm.errors import GraphError
from fpgm.graph import operations as ops
from fpgm.graph.cost import Cost
from fpgm.graph.flow import Algebra, Flow, follow, kept_full
from fpgm.graph.trace import ChannelGraph
from fpgm.networks.layers import SameConv2d

Keep = Mapping[str, Tensor]


@dataclass(frozen=True)
class Channels:
    """The channels of one tensor of the zeroed network.

    total: how many there are; live: which of them the compact tensor holds, sorted, in its order;
    constant: (total,) float64, the value of each channel that is the same whatever the image, NaN
    where it is not. All that are not live are constant; one that is live may be, too.
    After a flatten a channel may be a run of features.
    """

    total: int
    live: Tensor
    constant: Tensor

    @property
    def whole(self) -> bool:
        return len(self.live) == self.total

    @property
    def absent(self) -> Tensor:
        """The constants of the channels that are not live, 0 for the others. (total,)"""
        return self.constant.index_fill(0, self.live, 0)

    def map(self, function: Callable[[Tensor], Tensor]) -> Channels:
        """Apply an elementwise function of (1, C, 1, 1) to the constants."""
        constant = function(self.constant.view(1, -1, 1, 1).clone()).flatten()
        # Not every activation hands NaN on.
        return replace(self, constant=constant.masked_fill(self.constant.isnan(), torch.nan))

    def features(self, size: int) -> Channels:
        """The same seen as `size` features, size / total in a run for each channel."""
        run = size // self.total
        places = torch.arange(run, device=self.live.device)
        live = (self.live[:, None] * run + places).flatten()
        return Channels(size, live, self.constant.repeat_interleave(run))


@dataclass(frozen=True)
class Expansion:
    """`reader` needs the channels `onto` of `source`, and the compact tensor has others.

    Those that it has too many are not picked, those that it lacks are put there as constants.
    """

    reader: fx.Node
    source: fx.Node
    channels: Channels
    onto: Tensor

    @property
    def picked(self) -> Tensor:
        """Which of the live channels are read: a mask over them."""
        return torch.isin(self.channels.live, self.onto)

    @property
    def missing(self) -> Tensor:
        """Channels that are read and not live."""
        return self.onto[~torch.isin(self.onto, self.channels.live)]


@dataclass(frozen=True)
class Analysis:
    """The compact network of (graph, keep, ballast), before it is built.

    flow: the Channels of every result, and as every reader is given them; kept, emitted: for each
    layer its filters that are not zero, and all that the compact one has; expansions: by
    (reader, source), where both do not fit; carriers: convolution to which absent inputs say
    something else at the borders -> the live input that is constant and so can carry it, None where
    there is none that can and a map of it is needed; decided: node -> channels that live behind it
    because of what the constants before it are.
    """

    graph: ChannelGraph
    flow: Flow[Channels]
    kept: dict[str, Tensor]
    emitted: dict[str, Tensor]
    expansions: dict[tuple[fx.Node, fx.Node], Expansion]
    carriers: dict[str, int | None]
    decided: dict[str, Tensor]

    def inputs(self, node: fx.Node) -> Channels:
        """What a layer reads, as many channels as it has inputs."""
        source = node.all_input_nodes[0]
        channels = _fitted(self.flow.read[node][source], node, self.graph)
        expansion = self.expansions.get((node, source))
        by_groups = self.graph.kinds[node] == ops.GROUPED and expansion is not None
        return replace(channels, live=expansion.onto) if by_groups and expansion else channels

    def macs(self, dense: Cost) -> int:
        """What an image costs in the compact network, where it costs `dense` in the original."""
        macs = {layer.name: layer.macs for layer in dense.layers}
        saved = 0
        for node, kind in self.graph.kinds.items():
            name, layer = str(node.target), self.graph.called(node)
            if kind not in (*ops.WRITERS, ops.LINEAR, ops.FIXED):
                continue
            assert isinstance(layer, nn.Conv2d | nn.Linear)
            outputs, inputs = layer.weight.shape[:2]
            read = inputs if kind == ops.DEPTHWISE else len(self.inputs(node).live)
            if kind == ops.GROUPED and isinstance(layer, nn.Conv2d):
                read //= len(groups_of(layer, self.emitted[name]))
            left = len(self.emitted.get(name, range(outputs))) * read
            saved += macs[name] - macs[name] // (outputs * inputs) * left
        return dense.macs - saved

    def widened(self) -> Iterator[Expansion]:
        """The expansions that put constants somewhere, in the order of execution."""
        return (e for e in self.expansions.values() if len(e.missing))


@torch.no_grad()
def analyse(
    graph: ChannelGraph, keep: Keep, ballast: Keep | None = None, decided: Keep | None = None
) -> Analysis:
    """What compaction does to each node. Raises GraphError for what cannot be kept.

    keep: convolution -> filters that are not zero, all where it is not named; ballast: filters that
    stay as zeros beside these; decided: as of an analysis of the same network with its values,
    where this one's are not those.
    """
    keep, ballast = _checked(graph, keep), _checked(graph, ballast or {})
    kept, emitted = {}, {}
    for node, name in graph.writers():
        device = graph.module.get_parameter(f"{name}.weight").device
        filters = keep.get(name, torch.arange(graph.filters(name)))
        written = torch.cat((filters, ballast.get(name, filters))).unique()
        if graph.kinds[node] == ops.GROUPED:
            layer = graph.called(node)
            assert isinstance(layer, nn.Conv2d)
            size = layer.out_channels // layer.groups
            written = _levelled(written, size, groups_of(layer, written))
        kept[name], emitted[name] = filters.to(device), written.to(device)
    # First what every tensor has, then what its readers need, which nobody above depends on.
    constants = _Constants(graph, kept, emitted, decided)
    flow = follow(graph, constants)
    expansions = {
        (reader, source): Expansion(reader, source, channels, onto)
        for reader in graph.kinds
        for source, channels, onto in _needs(reader, graph, flow, emitted)
        if not torch.equal(channels.live, onto)
    }
    analysis = Analysis(graph, flow, kept, emitted, expansions, {}, constants.decided)
    for node, name in graph.convolutions():
        inputs = analysis.inputs(node)
        bordered = not inputs.whole and pads_zeros(graph.module.get_submodule(name))
        if graph.kinds[node] in (ops.CONV, ops.GROUPED) and bordered:
            # One channel is read by one group alone.
            single = graph.kinds[node] == ops.CONV
            analysis.carriers[name] = _carrier(inputs) if single else None
    return analysis


class _Constants(Algebra[Channels]):
    """What each tensor of the compact network has, and the constants of the rest."""

    def __init__(
        self, graph: ChannelGraph, kept: Keep, emitted: Keep, decided: Keep | None
    ) -> None:
        self._graph, self._kept, self._emitted, self._given = graph, kept, emitted, decided
        self.decided: dict[str, Tensor] = {}
        self._modules: dict[str, nn.Module] = dict(graph.module.named_modules())

    def written(self, node: fx.Node, read: Channels | None) -> Channels:
        # Filters that are not kept are zero: they write their bias.
        name = str(node.target)
        layer = self._graph.called(node)
        assert isinstance(layer, nn.Conv2d | nn.Linear)
        constant = bias(layer).detach().double().index_fill(0, self._kept[name], torch.nan)
        return Channels(len(constant), self._emitted[name], constant)

    def joined(self, node: fx.Node, parts: Sequence[Channels]) -> Channels:
        starts = [sum(part.total for part in parts[:i]) for i in range(len(parts))]
        live = torch.cat([p.live + start for p, start in zip(parts, starts, strict=True)])
        total = sum(part.total for part in parts)
        return Channels(total, live, torch.cat([part.constant for part in parts]))

    def padded(self, node: fx.Node, source: Channels, front: int, back: int) -> Channels:
        # Nobody has to hold what is appended.
        value = ops.argument(node, 3, "value", None) or 0.0
        constant = F.pad(source.constant, (front, back), value=value)
        return Channels(source.total + front + back, source.live + front, constant)

    def chosen(self, node: fx.Node, source: Channels, channels: Sequence[int]) -> Channels:
        places = torch.tensor(channels, device=source.live.device)
        live = torch.isin(places, source.live).nonzero().flatten()
        # A tensor must have one channel at least.
        live = live if len(live) else live.new_zeros(1)
        return Channels(len(places), live, source.constant[places])

    def met(self, node: fx.Node, a: Channels, b: Channels) -> Channels | None:
        if a.total != b.total:
            return None
        # Where one side varies the result does: it has the channels that either side has.
        live = torch.cat((a.live, b.live)).unique()
        product = self._graph.kinds[node] == ops.MUL
        constant = a.constant * b.constant if product else a.constant + b.constant
        return Channels(a.total, live, constant)

    def mapped(self, node: fx.Node, source: Channels) -> Channels:
        kind = self._graph.kinds[node]
        if kind == ops.ELEMENTWISE:
            return source.map(lambda c: ops.apply(node, self._modules, c))
        if kind == ops.NORM:
            return self._normed(node, source)
        if kind == ops.SLOPE:
            layer = self._graph.called(node)
            assert isinstance(layer, nn.PReLU)
            return source.map(lambda c: F.prelu(c, layer.weight.double()))
        if kind in (ops.SPATIAL, ops.FIXED):
            # Zeros stay zeros; any other constant differs at the borders and must be there.
            there = source.constant.isnan() | (source.constant != 0)
            if self._given is not None:
                there = torch.zeros_like(there)
                there[self._given.get(node.name, source.live)] = True
            there[source.live] = True
            live = there.nonzero().flatten()
            if len(live) > len(source.live):
                self.decided[node.name] = live
            constant = source.constant.masked_fill(there, torch.nan)
            return Channels(source.total, live, constant)
        return source  # pixels are chosen or merged: a constant stays what it is

    def unknown(self, node: fx.Node, inputs: Sequence[Channels | None]) -> Channels | None:
        # A BatchNorm says how many there are.
        return self._normed(node, inputs[0]) if self._graph.kinds[node] == ops.NORM else None

    def _normed(self, node: fx.Node, source: Channels | None) -> Channels:
        norm = copy.deepcopy(self._graph.called(node))
        assert isinstance(norm, nn.BatchNorm2d | nn.BatchNorm1d)
        norm.double().eval()
        mean, var = norm.running_mean, norm.running_var
        return _fitted(source, node, self._graph).map(
            lambda c: F.batch_norm(c, mean, var, norm.weight, norm.bias, eps=norm.eps)
        )


def _fitted(channels: Channels | None, node: fx.Node, graph: ChannelGraph) -> Channels:
    """What a layer reads, seen as many channels as it has inputs; all of them where not known."""
    layer = graph.called(node)
    size = next(
        int(getattr(layer, name))
        for name in ("in_channels", "num_features", "in_features", "num_parameters")
        if hasattr(layer, name)
    )
    if channels is None:
        device = next(graph.module.parameters()).device
        varying = torch.full((size,), torch.nan, dtype=torch.float64, device=device)
        return Channels(size, torch.arange(size, device=device), varying)
    return channels if channels.total == size else channels.features(size)


def _needs(
    reader: fx.Node, graph: ChannelGraph, flow: Flow[Channels], emitted: Keep
) -> Iterator[tuple[fx.Node, Channels, Tensor]]:
    """Which channels of its inputs a node must be given, where it does not take what there is."""
    kind, written = graph.kinds[reader], flow.written[reader]
    # Whatever it does, it does to the same values: it gets all channels that there were.
    whole = written is None and kind in (ops.OPAQUE, ops.OUTPUT, ops.ADD, ops.MUL, ops.CAT)
    whole = whole and not ops.reads_no_channels(reader, graph.flat)
    for source, channels in flow.read[reader].items():
        if kind == ops.DEPTHWISE:
            # A constant that is still read becomes an image here: that channel must be there.
            yield source, _fitted(channels, reader, graph), emitted[str(reader.target)]
        elif kind == ops.CHOOSE and channels is not None and written is not None:
            chosen = torch.tensor(reader.args[1], device=channels.live.device)[written.live]
            yield source, channels, torch.cat((channels.live, chosen)).unique()
        elif kind == ops.GROUPED:
            layer, fitted = graph.called(reader), _fitted(channels, reader, graph)
            assert isinstance(layer, nn.Conv2d)
            groups = groups_of(layer, emitted[str(reader.target)])
            yield source, fitted, _levelled(fitted.live, layer.in_channels // layer.groups, groups)
        elif channels is not None and written is not None and kind in (ops.SPATIAL, ops.FIXED):
            yield source, channels, written.live
        elif channels is not None and whole:
            yield source, channels, torch.arange(channels.total, device=channels.live.device)
        elif channels is not None and written is not None and kind in (ops.ADD, ops.MUL):
            yield source, channels, written.live


def groups_of(conv: nn.Conv2d, filters: Tensor) -> Tensor:
    """Which groups of a grouped convolution these filters are in, sorted."""
    groups: Tensor = (filters // (conv.out_channels // conv.groups)).unique()
    return groups


def _levelled(channels: Tensor, size: int, groups: Tensor) -> Tensor:
    """`channels` that lie in these groups of `size`, and as many more as make all groups hold the
    same number, one at least; sorted."""
    members = groups[:, None] * size + torch.arange(size, device=groups.device)
    there = torch.isin(members, channels)
    wanted = max(int(there.sum(1).max()), 1)
    # Those that are there first, then the others in order.
    order = there.to(torch.int8).argsort(dim=1, descending=True, stable=True)[:, :wanted]
    return members.gather(1, order).flatten().sort().values


def _carrier(inputs: Channels) -> int | None:
    """Which live input is constant and can stand for the absent ones, None if there is none.

    The largest; one that is small beside them would cost digits.
    """
    values = inputs.constant[inputs.live].abs().nan_to_num(0)
    if not len(values) or values.max() <= 1e-2 * inputs.absent.abs().max():
        return None
    return int(values.argmax())


def _checked(graph: ChannelGraph, keep: Keep) -> dict[str, Tensor]:
    """`keep` with every index sorted. Raises GraphError for what cannot be kept."""
    names = {name for _, name in graph.writers()}
    checked = {}
    for name, filters in keep.items():
        if name not in names:
            reason = kept_full(graph).get(name, "no such convolution")
            raise GraphError(f"keep[{name!r}]: {reason}")
        filters, width = torch.as_tensor(filters).unique(), graph.filters(name)
        if len(filters) == 0:
            raise GraphError(f"keep[{name!r}] is empty: a layer needs at least one filter")
        if filters[0] < 0 or filters[-1] >= width:
            raise GraphError(f"keep[{name!r}] has indices outside 0..{width - 1}")
        checked[name] = filters
    return checked


def bias(layer: nn.Conv2d | nn.Linear) -> Tensor:
    """The bias of a layer, zeros where it has none. (N,)"""
    return layer.weight.new_zeros(len(layer.weight)) if layer.bias is None else layer.bias


def pads_zeros(conv: nn.Module) -> bool:
    """Whether the kernel ever reaches into zeros around the image."""
    assert isinstance(conv, nn.Conv2d)
    if isinstance(conv, SameConv2d):
        return True
    padding = (0, 0) if conv.padding == "valid" else conv.padding
    return conv.padding_mode == "zeros" and any(padding if isinstance(padding, tuple) else (1,))
