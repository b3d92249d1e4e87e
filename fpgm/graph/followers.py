"""What follows each convolution in the graph: the BatchNorm that scales its channels, and the ReLU
that makes feature maps of them."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import fx, nn

from fpgm.graph import operations as ops
from fpgm.graph.trace import ChannelGraph

_RELUS = {F.relu, F.relu_, torch.relu, torch.relu_, F.relu6, "relu", "relu_"}
_SAME_CHANNELS = (ops.NORM, ops.ADD, ops.POOL, ops.SLICE)


def batch_norms(graph: ChannelGraph) -> dict[str, str]:
    """Convolution -> the BatchNorm2d with a scale and a shift that alone reads it.

    At once, or behind pooling or an activation. A convolution that several layers read has none:
    no single scale says what its channels are worth.
    """
    found = {}
    for node, name in graph.convolutions():
        reader: fx.Node | None = _reader(node, graph)
        while reader is not None and graph.kinds[reader] in (ops.ELEMENTWISE, ops.POOL, ops.SLICE):
            reader = _reader(reader, graph)
        if reader is not None and graph.kinds[reader] == ops.NORM:
            module = graph.module.get_submodule(str(reader.target))
            if type(module) is nn.BatchNorm2d and module.affine:
                found[name] = str(reader.target)
    return found


def rectifiers(graph: ChannelGraph) -> dict[str, fx.Node]:
    """Convolution -> the first ReLU or ReLU6 that its channels come to, as (B, C, H, W).

    On the way may lie BatchNorm, pooling and residual adds: for a block's last convolution it is
    the ReLU behind the add, as its channel is part of that feature map and of none before it.
    """
    found = {}
    for node, name in graph.convolutions():
        reached = {node}
        for other, kind in graph.kinds.items():  # in the order of execution
            if other in graph.flat or not reached.intersection(other.all_input_nodes):
                continue
            if is_relu(other, graph):
                found[name] = other
                break
            if kind in _SAME_CHANNELS or _is_identity(other, graph):
                reached.add(other)
    return found


def is_relu(node: fx.Node, graph: ChannelGraph) -> bool:
    if node.op == "call_module":
        return type(graph.module.get_submodule(str(node.target))) in (nn.ReLU, nn.ReLU6)
    return node.target in _RELUS


def _is_identity(node: fx.Node, graph: ChannelGraph) -> bool:
    """Of what evaluation leaves as it is, only layers: functions are rare between these."""
    if node.op != "call_module":
        return False
    module = graph.module.get_submodule(str(node.target))
    return type(module) in (nn.Identity, nn.Dropout, nn.Dropout2d)


def _reader(node: fx.Node, graph: ChannelGraph) -> fx.Node | None:
    """The one operation that reads a node's values, None where there are none or several."""
    readers = [user for user in node.users if not ops.reads_no_channels(user, graph.flat)]
    return readers[0] if len(readers) == 1 else None
