"""Chains of operations that only move values about, each value followed from where it was.

A chain that hands on whole channels is what it does to them: some are chosen, in an order (a split,
a slice, a shuffle), or they get another shape.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn

from fpgm.graph.operations import OPAQUE, choose, computed, kind_of, name_of, reshape
from fpgm.graph.tracer import Shape

MOVES = {
    "view", "reshape", "flatten", "permute", "transpose", "squeeze", "unsqueeze", "chunk", "split",
    "narrow", "unbind", "movedim", "swapaxes", "unflatten", "contiguous", "split_with_sizes",
    "tensor_split", "flip", "getitem", "channel_shuffle", "select",
}  # fmt: skip
_LAYERS = (nn.Flatten, nn.Unflatten, nn.ChannelShuffle)


def resolve(traced: fx.GraphModule, samples: dict[fx.Node, Any]) -> set[fx.Node]:
    """Put one operation in place of each chain that hands on whole channels, and returns the nodes
    that are read no more. samples: see graph.tracer; those of new nodes are added."""
    modules = dict(traced.named_modules())
    # Where the values of a node come from: the first node of its chain, and the places in that.
    origin: dict[fx.Node, tuple[fx.Node, Any]] = {}
    for node in list(traced.graph.nodes):
        if node not in samples or not _moves(node, modules, origin):
            continue
        before = node.args[0]
        assert isinstance(before, fx.Node)
        start = origin.get(before) or _start(before, samples)
        places = _moved(node, start[1], modules, samples) if start else None
        if start is None or places is None:
            continue
        origin[node] = start[0], places
        with traced.graph.inserting_after(node):
            new = _resolved(traced.graph, start[0], places, samples[start[0]].sizes)
        if new is None:
            continue
        if new is not start[0]:
            new.stack_trace = node.stack_trace
            samples[new] = samples[node]
        node.replace_all_uses_with(new)
    return set(origin)


def _moves(
    node: fx.Node, modules: Mapping[str, nn.Module], chains: Mapping[fx.Node, object]
) -> bool:
    """Whether it moves values in a way that no kind stands for yet, or goes on with a chain."""
    if not node.args or not isinstance(node.args[0], fx.Node):
        return False
    if node.op == "call_module":
        moving = isinstance(modules[str(node.target)], _LAYERS)
    else:
        moving = name_of(node) in MOVES
    return moving and (node.args[0] in chains or kind_of(node, dict(modules)) == OPAQUE)


def _start(node: fx.Node, samples: Mapping[fx.Node, Any]) -> tuple[fx.Node, Tensor] | None:
    """A chain that begins with what `node` gives: (B, C, ...), each value by its number."""
    sample = samples.get(node)
    if not isinstance(sample, Shape) or len(sample.sizes) < 2 or 1 in sample.varies:
        return None  # no channels there, but rows of an image
    if any(sample.sizes[place] == 1 for place in sample.varies):
        return None  # what is one pixel here is more elsewhere
    return node, _numbered(sample.sizes)


def _numbered(sizes: tuple[int, ...]) -> Tensor:
    return torch.arange(math.prod(sizes)).view(sizes)


def _moved(
    node: fx.Node, places: Any, modules: Mapping[str, nn.Module], samples: Mapping[fx.Node, Any]
) -> Any:
    """The same operation on places. None where it takes what is not known."""
    known: dict[fx.Node, Any] = {}
    for other in node.all_input_nodes:
        value = places if other is node.args[0] else samples.get(other)
        if value is None or (value is not places and not isinstance(value, int)):
            return None
        known[other] = value
    return computed(node, known, modules)


def _resolved(
    graph: fx.Graph, source: fx.Node, places: Any, sizes: tuple[int, ...]
) -> fx.Node | None:
    """What the chain does to the channels of `source` (B, C, ...), as one operation; `source`
    itself where that is nothing."""
    if not isinstance(places, Tensor) or places.dim() < 2 or len(places) != sizes[0]:
        return None
    natural, run = _numbered(sizes), math.prod(sizes[2:])
    if torch.equal(places, natural):
        return source
    if torch.equal(places, natural.flatten(1)):
        return graph.call_function(torch.flatten, (source, 1))
    channels = places.flatten(1).view(*places.shape[:2], -1)[0, :, 0] // run
    if int(channels.max()) >= sizes[1]:
        return None  # of another image
    if torch.equal(places, natural[:, channels]):
        return graph.call_function(choose, (source, tuple(channels.tolist())))
    tail = (-1,) if places.dim() == 3 else tuple(places.shape[2:])
    sized = tail == (-1,) or set(tail) <= {1}  # the same for every image
    same = (places.shape[1], places.numel()) == (sizes[1], natural.numel())
    if sized and same and torch.equal(places.flatten(), natural.flatten()):
        return graph.call_function(reshape, (source, tail))
    return None
