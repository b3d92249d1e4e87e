"""How channels run through a network: who writes each, who reads it, what stands behind it.

`follow` walks the graph once and knows what every kind of operation does with channels; what is
known of a channel is up to the algebra that it is given: the filters that go together (groups),
the constants of what is pruned (compaction.constants), the filter that wrote it
(compaction.ballast), or, below, whose filters come where pruning does not understand them.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Generic, TypeVar

import torch
import torch.nn.functional as F
from torch import fx, nn

from fpgm.graph import operations as ops
from fpgm.graph.trace import ChannelGraph

T = TypeVar("T")


class Algebra(ABC, Generic[T]):
    """What one wants to know, T, of the channels of a tensor, operation by operation.

    None says that the channels are not known: there the tensor has full width.
    """

    @abstractmethod
    def written(self, node: fx.Node, read: T | None) -> T:
        """By the filters of a layer. read: what a depthwise or grouped convolution reads."""

    @abstractmethod
    def joined(self, node: fx.Node, parts: Sequence[T]) -> T:
        """By a concatenation."""

    @abstractmethod
    def padded(self, node: fx.Node, source: T, front: int, back: int) -> T:
        """By so many channels of one value before and behind those of `source`."""

    @abstractmethod
    def chosen(self, node: fx.Node, source: T, channels: Sequence[int]) -> T:
        """By these channels of `source`, in this order."""

    @abstractmethod
    def met(self, node: fx.Node, a: T, b: T) -> T | None:
        """By a sum or a product, channel by channel."""

    def mapped(self, node: fx.Node, source: T) -> T:
        """By what takes each channel for itself: BatchNorm, activation, pooling, flatten, ..."""
        return source

    def unknown(self, node: fx.Node, inputs: Sequence[T | None]) -> T | None:
        """By one of the operations above where the channels of an input are not known."""
        return None


@dataclass(frozen=True)
class Flow(Generic[T]):
    """written: node -> what its result is; read: node -> what it is given by each of its inputs,
    which differs from what that one has written where something was overwritten in between."""

    written: dict[fx.Node, T | None] = field(default_factory=dict)
    read: dict[fx.Node, dict[fx.Node, T | None]] = field(default_factory=dict)


def follow(graph: ChannelGraph, algebra: Algebra[T]) -> Flow[T]:
    """Walk the graph in the order of execution."""
    flow: Flow[T] = Flow()
    there: dict[fx.Node, T | None] = {}
    for node, kind in graph.kinds.items():
        flow.read[node] = {n: there[n] for n in node.all_input_nodes}
        there[node] = flow.written[node] = _result(node, kind, flow.read[node], algebra)
        # Other names of what is overwritten hold the result from here on.
        there.update(dict.fromkeys(graph.overwritten.get(node, ()), there[node]))
    return flow


def _result(
    node: fx.Node, kind: str, read: dict[fx.Node, T | None], algebra: Algebra[T]
) -> T | None:
    if kind in (ops.LINEAR, ops.OPAQUE, ops.OUTPUT):
        return None
    inputs = [read[n] for n in _operands(node, kind)]
    if kind in ops.WRITERS:
        by_groups = kind in (ops.DEPTHWISE, ops.GROUPED)
        return algebra.written(node, inputs[0] if by_groups else None)
    sides = [side for side in inputs if side is not None]
    if len(sides) < len(inputs):
        return algebra.unknown(node, inputs)
    if kind == ops.CAT:
        return algebra.joined(node, sides)
    if kind == ops.PAD:
        *_, front, back = ops.argument(node, 1, "pad", ())
        return algebra.padded(node, sides[0], front, back)
    if kind == ops.CHOOSE:
        return algebra.chosen(node, sides[0], node.args[1])  # type: ignore[arg-type]
    if kind in (ops.ADD, ops.MUL):
        return algebra.met(node, *sides)
    return algebra.mapped(node, sides[0])


def _operands(node: fx.Node, kind: str) -> list[fx.Node]:
    """The inputs whose channels these are: not the sizes that some operations take as well."""
    first = node.args[0]
    listed = first if kind == ops.CAT else node.args[:2] if kind in (ops.ADD, ops.MUL) else [first]
    assert isinstance(listed, list | tuple)
    return [n for n in listed if isinstance(n, fx.Node)]


class _Carried(Algebra[frozenset[str]]):
    """The layers whose filters are among a tensor's channels."""

    def __init__(self, graph: ChannelGraph) -> None:
        self._graph = graph

    def written(self, node: fx.Node, read: frozenset[str] | None) -> frozenset[str]:
        through = self._graph.kinds[node] == ops.DEPTHWISE
        return (read if through and read else frozenset()) | {str(node.target)}

    def joined(self, node: fx.Node, parts: Sequence[frozenset[str]]) -> frozenset[str]:
        return self.unknown(node, parts)

    def padded(
        self, node: fx.Node, source: frozenset[str], front: int, back: int
    ) -> frozenset[str]:
        return source

    def chosen(
        self, node: fx.Node, source: frozenset[str], channels: Sequence[int]
    ) -> frozenset[str]:
        return source

    def met(self, node: fx.Node, a: frozenset[str], b: frozenset[str]) -> frozenset[str]:
        return a | b

    def unknown(self, node: fx.Node, inputs: Sequence[frozenset[str] | None]) -> frozenset[str]:
        return frozenset().union(*(side for side in inputs if side is not None))


def kept_full(graph: ChannelGraph) -> dict[str, str]:
    """Why each convolution that cannot be pruned cannot: convolution -> reason."""
    reasons: dict[str, str] = {}
    algebra = _Carried(graph)
    flow = follow(graph, algebra)
    for node, kind in graph.kinds.items():
        module = graph.called(node)
        if isinstance(module, nn.Conv2d) and kind not in (*ops.CONVOLUTIONS, ops.FIXED):
            reasons[str(node.target)] = _strange(module, str(node.target) in graph.shared)
        carried = algebra.unknown(node, list(flow.read[node].values()))
        if kind == ops.OUTPUT:
            reasons.update(dict.fromkeys(carried, "its filters are outputs of the network"))
        elif kind == ops.OPAQUE and not ops.reads_no_channels(node, graph.flat):
            reason = f"its channels go into {node.name}, which pruning does not understand"
            reasons.update(dict.fromkeys(carried, reason))
    return reasons


def _strange(conv: nn.Conv2d, twice: bool) -> str:
    if twice:
        return "its weight is used twice"
    if ops.hooked(conv):
        return "it has a hook"
    return "not a plain convolution"


def projections(graph: ChannelGraph) -> Iterator[str]:
    """Convolutions that reach an add alone, beside a branch of two or more from the same input."""
    for node, kind in graph.kinds.items():
        inputs = node.all_input_nodes
        if kind != ops.ADD or len(inputs) != 2:
            continue
        for branch, other in (inputs, inputs[::-1]):
            while graph.kinds[branch] == ops.NORM:
                branch = branch.all_input_nodes[0]
            if (
                graph.kinds[branch] not in (ops.CONV, ops.GROUPED)
                or _depth(other, branch, graph) >= 0
            ):
                continue  # no convolution, or one that both operands come through
            if _depth(other, branch.all_input_nodes[0], graph) >= 2:
                yield str(branch.target)


def _depth(node: fx.Node, source: fx.Node, graph: ChannelGraph) -> float:
    """Most convolutions on a way from `source` to `node`, -inf where there is none."""
    depth: dict[fx.Node, float] = {}
    for n, kind in graph.kinds.items():  # in the order of execution
        above = max((depth[i] for i in n.all_input_nodes), default=-float("inf"))
        depth[n] = 0 if n is source else above + (kind == ops.CONV)
        if n is node:
            break
    return depth[node]


def batch_norms(graph: ChannelGraph) -> dict[str, str]:
    """Convolution -> the BatchNorm2d with a scale and a shift that alone reads it.

    At once, or behind pooling or an activation. A convolution that several layers read has none:
    no single scale says what its channels are worth.
    """
    behind = {}
    for node, name in graph.convolutions():
        reader = _reader(node, graph)
        while reader is not None and graph.kinds[reader] in (ops.ELEMENTWISE, ops.POOL, ops.SLICE):
            reader = _reader(reader, graph)
        if reader is not None and graph.kinds[reader] == ops.NORM:
            module = graph.called(reader)
            if type(module) is nn.BatchNorm2d and module.affine:
                behind[name] = str(reader.target)
    return behind


def rectifiers(graph: ChannelGraph) -> dict[str, fx.Node]:
    """Convolution -> the first ReLU or ReLU6 that its channels come to, as (B, C, H, W).

    On the way may lie BatchNorm, pooling and residual adds: for a block's last convolution it is
    the ReLU behind the add, as its channel is part of that feature map and of none before it.
    """
    behind = {}
    for node, name in graph.convolutions():
        reached = {node}
        for other, kind in graph.kinds.items():  # in the order of execution
            if other in graph.flat or not reached.intersection(other.all_input_nodes):
                continue
            if is_relu(other, graph):
                behind[name] = other
                break
            if kind in (ops.NORM, ops.ADD, ops.POOL, ops.SLICE) or _is_identity(other, graph):
                reached.add(other)
    return behind


@dataclass(frozen=True)
class Tail:
    """What alone reads a convolution and is zero where that is: norms, the BatchNorms in it; last:
    the last operation, the convolution itself where there is none."""

    norms: tuple[str, ...]
    last: fx.Node


def tails(graph: ChannelGraph) -> dict[str, Tail]:
    """Layer with filters -> its BatchNorm, once without a shift, and activation."""
    modules = dict(graph.module.named_modules())
    found = {}
    for node, name in graph.writers():
        last, norms = node, []
        while len(last.users) == 1:
            reader = next(iter(last.users))
            if graph.kinds[reader] == ops.NORM:
                norm = modules[str(reader.target)]
                if type(norm) is not nn.BatchNorm2d or not norm.affine:
                    break
                norms.append(str(reader.target))
            elif graph.kinds[reader] != ops.ELEMENTWISE or _moves_zero(reader, modules):
                break
            last = reader
        found[name] = Tail(tuple(norms), last)
    return found


def _moves_zero(node: fx.Node, modules: dict[str, nn.Module]) -> bool:
    return bool(ops.apply(node, modules, torch.zeros(1, 1, 1, 1)).any())


_RELUS = {F.relu, F.relu_, torch.relu, torch.relu_, F.relu6, "relu", "relu_"}


def is_relu(node: fx.Node, graph: ChannelGraph) -> bool:
    if node.op == "call_module":
        return type(graph.called(node)) in (nn.ReLU, nn.ReLU6)
    return node.target in _RELUS


def _is_identity(node: fx.Node, graph: ChannelGraph) -> bool:
    """Of what evaluation leaves as it is, only layers: functions are rare between these."""
    return type(graph.called(node)) in (nn.Identity, nn.Dropout, nn.Dropout2d)


def _reader(node: fx.Node, graph: ChannelGraph) -> fx.Node | None:
    """The one operation that reads a node's values, None where there are none or several."""
    readers = [user for user in node.users if not ops.reads_no_channels(user, graph.flat)]
    return readers[0] if len(readers) == 1 else None
