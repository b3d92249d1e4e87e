"""A network traced by torch.fx: its operations, what each does to channels, what it overwrites."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch.nn.functional as F
from torch import fx, nn
from torchvision.ops.stochastic_depth import stochastic_depth

from fpgm.errors import GraphError
from fpgm.graph.canonical import canonical
from fpgm.graph.operations import (
    ADD,
    CHOOSE,
    CONVOLUTIONS,
    ELEMENTWISE,
    FIXED,
    FLATTEN,
    LINEAR,
    MUL,
    NORM,
    OPAQUE,
    OUTPUT,
    PAD,
    POOL,
    RESHAPE,
    SLICE,
    SLOPE,
    SPATIAL,
    UNITS,
    WRITERS,
    argument,
    inplace,
    kind_of,
    name_of,
)
from fpgm.graph.tracer import Image, Shape, SizeError, traced, where
from fpgm.networks.modes import evaluating

# What gives back its argument itself, in eval mode ...
_SAME = (nn.Identity, nn.Dropout, nn.Dropout2d)
_SAME_FUNCTIONS = {F.dropout, F.dropout2d, stochastic_depth}
# ... or may give back a part or another shape of it.
_VIEWS = {
    "view", "reshape", "flatten", "permute", "transpose", "squeeze", "unsqueeze", "chunk", "split",
    "narrow", "select", "expand", "unbind", "getitem", "movedim", "swapaxes", "unflatten", "detach",
    "view_as", "t", "choose", "ravel", "tensor_split", "split_with_sizes", "expand_as", "swapdims",
    "moveaxis", "reshape_as", "to", "float", "double", "contiguous",
}  # fmt: skip


@dataclass(frozen=True)
class ChannelGraph:
    """A traced network.

    kinds: what each node does to channels (see fpgm.graph.operations), in the order of execution;
    flat: nodes known to be (batch, features); overwritten: operation in place -> the earlier nodes
    that hold its result from there on; shared: modules called twice, or with a parameter that
    another module has too; computed: layers whose weight is computed from a parameter.
    """

    module: fx.GraphModule
    kinds: dict[fx.Node, str]
    flat: set[fx.Node]
    overwritten: dict[fx.Node, list[fx.Node]]
    shared: set[str]
    computed: set[str] = field(default_factory=set)

    def writers(self) -> Iterator[tuple[fx.Node, str]]:
        """Node and qualified name of every layer that has filters: the convolutions, and linear
        layers whose units are filters."""
        return ((n, str(n.target)) for n, kind in self.kinds.items() if kind in WRITERS)

    def convolutions(self) -> Iterator[tuple[fx.Node, str]]:
        """Every convolution's node and qualified name, in the order of execution."""
        return ((n, str(n.target)) for n, kind in self.kinds.items() if kind in CONVOLUTIONS)

    def filters(self, name: str) -> int:
        """How many filters a convolution has."""
        return len(self.module.get_submodule(name).weight)  # type: ignore[arg-type]

    def called(self, node: fx.Node) -> nn.Module | None:
        """The module that a node calls, None where it is no call of a module."""
        return self.module.get_submodule(str(node.target)) if node.op == "call_module" else None


def trace(model: nn.Module, image: Image | None = None) -> ChannelGraph:
    """Trace `model` in eval mode and classify its operations. The model is left as it is.

    image: (C, H, W) that it is given, where the way through its code depends on that; the graph is
    that of every size that goes the same way.
    Raises GraphError where Python control flow depends on the data, or on the image and there is
    none, and where the network refuses the image.
    """
    with evaluating(model):
        try:
            network, samples = traced(model, image)
            computed = canonical(network, samples)
        except SizeError as error:
            name = type(model).__name__
            raise GraphError(f"{name}{where(error)}: {error}; give image=(C, H, W)") from error
        except (fx.proxy.TraceError, TypeError, RuntimeError) as error:
            name = type(model).__name__
            raise GraphError(
                f"{name} cannot be traced by torch.fx{where(error)}: {error}"
            ) from error
    return _classified(network, samples, computed)


def _classified(
    network: fx.GraphModule, samples: dict[fx.Node, Any], computed: set[str]
) -> ChannelGraph:
    modules = dict(network.named_modules())
    calls = Counter(str(n.target) for n in network.graph.nodes if n.op == "call_module")
    shared = {name for name, count in calls.items() if count > 1} | _shared_parameters(network)
    kinds: dict[fx.Node, str] = {}
    flat: set[fx.Node] = set()
    runs: set[fx.Node] = set()  # (B, features), of which several are of one channel
    for node in network.graph.nodes:
        kind = kind_of(node, modules)
        # No filter can be taken from one call alone of a layer that is called twice.
        repeated = kind in (*CONVOLUTIONS, NORM, SLOPE, LINEAR) and node.target in shared
        fits = _fits(node, kind, flat, modules) or (
            kind == LINEAR and _along_features(node, kinds, samples)
        )
        fits = fits and _has_pixels(node, kind, samples)
        if node in runs or runs.intersection(node.all_input_nodes):
            fits = fits and kind not in (CHOOSE, RESHAPE)
        kinds[node] = kind if fits and not repeated else OPAQUE
        if kinds[node] == FLATTEN and _in_runs(node, samples):
            runs.add(node)
        elif kinds[node] not in (*WRITERS, LINEAR, OPAQUE, OUTPUT):
            runs |= {node} if runs.intersection(node.all_input_nodes) else set()
        if _flattens(node, kinds[node], flat, samples):
            flat.add(node)
    for node in [n for n, kind in kinds.items() if kind == LINEAR]:
        if _hidden(node, kinds, samples):
            kinds[node] = UNITS
    overwritten = _overwritten(kinds, modules)
    return ChannelGraph(network, kinds, flat, overwritten, shared, computed)


def _along_features(
    node: fx.Node, kinds: Mapping[fx.Node, str], samples: Mapping[fx.Node, Any]
) -> bool:
    """Whether a linear layer that reads more than (batch, features) reads no channels of an image,
    which lie elsewhere, but another linear layer or what pruning does not understand."""
    source = node.all_input_nodes[0]
    sample = samples.get(source)
    while kinds[source] == ELEMENTWISE:
        source = source.all_input_nodes[0]
    return isinstance(sample, Shape) and len(sample.sizes) > 2 and kinds[source] in (LINEAR, OPAQUE)


def _hidden(node: fx.Node, kinds: Mapping[fx.Node, str], samples: Mapping[fx.Node, Any]) -> bool:
    """Whether a linear layer's outputs are filters: hidden units at every place of an image, that
    only another linear layer reads (an MLP of 1x1 convolutions, as in ConvNeXt), or the factors of
    channels (squeeze and excitation)."""
    sample, readers = samples.get(node), list(_readers(node, kinds))
    if not isinstance(sample, Shape) or not readers:
        return False
    if len(sample.sizes) == 2:
        return all(kinds[reader] == MUL for reader in readers)
    return all(kinds[reader] in (LINEAR, UNITS) for reader in readers)


def _readers(node: fx.Node, kinds: Mapping[fx.Node, str]) -> Iterator[fx.Node]:
    """What reads a node's values, behind what takes each by itself."""
    for user in node.users:
        through = kinds[user] in (ELEMENTWISE, RESHAPE)
        yield from _readers(user, kinds) if through else (user,)


def _fits(node: fx.Node, kind: str, flat: set[fx.Node], modules: dict[str, nn.Module]) -> bool:
    """Whether the inputs have the dimensions that the rules for this kind of operation expect."""
    inputs = [n in flat for n in node.all_input_nodes]
    if type(modules.get(str(node.target))) is nn.BatchNorm1d:
        return inputs[0]
    if kind == LINEAR:
        return inputs[0]
    if kind in (ADD, MUL):
        return len(set(inputs)) == 1
    return kind in (ELEMENTWISE, FLATTEN, CHOOSE, RESHAPE, OPAQUE, OUTPUT) or not any(inputs)


def _in_runs(node: fx.Node, samples: Mapping[fx.Node, Any]) -> bool:
    """Whether a flatten makes several features of a channel, as far as it is known."""
    before, after = samples.get(node.all_input_nodes[0]), samples.get(node)
    known = isinstance(before, Shape) and isinstance(after, Shape)
    return not known or before.sizes[1:2] != after.sizes[1:2]  # type: ignore[union-attr]


def _has_pixels(node: fx.Node, kind: str, samples: Mapping[fx.Node, Any]) -> bool:
    """Whether what is meant for (B, C, H, W) gets that, where it is known what it gets."""
    sample = samples.get(node.all_input_nodes[0]) if node.all_input_nodes else None
    meant = kind in (*CONVOLUTIONS, POOL, SPATIAL, FIXED, PAD, SLICE)
    return not meant or not isinstance(sample, Shape) or len(sample.sizes) == 4


def _flattens(node: fx.Node, kind: str, flat: set[fx.Node], samples: Mapping[fx.Node, Any]) -> bool:
    """Whether the result is (batch, features)."""
    if isinstance(samples.get(node), Shape):
        return len(samples[node].sizes) == 2
    if kind == POOL and node.op != "call_module" and "mean" in str(node.target):
        return not argument(node, 2, "keepdim", False)
    return kind == FLATTEN or (kind not in (OPAQUE, OUTPUT) and node.all_input_nodes[0] in flat)


def _shared_parameters(network: fx.GraphModule) -> set[str]:
    """Modules with a parameter that another one has, too."""
    users: dict[int, set[str]] = defaultdict(set)
    for node in network.graph.nodes:
        if node.op == "call_module":
            module = network.get_submodule(str(node.target))
            for parameter in module.parameters(recurse=False):
                users[id(parameter)].add(str(node.target))
    return {name for names in users.values() if len(names) > 1 for name in names}


def _overwritten(
    nodes: Iterable[fx.Node], modules: dict[str, nn.Module]
) -> dict[fx.Node, list[fx.Node]]:
    """Which earlier results an operation replaces: operation -> nodes that are its argument.

    Raises GraphError where a part of what is overwritten, or what it is a part of, is read again:
    that one would have changed as well, and here nothing is overwritten.
    """
    order = {node: place for place, node in enumerate(nodes)}
    whole: dict[fx.Node, fx.Node] = {}  # the first name of the same tensor
    storage: dict[fx.Node, fx.Node] = {}  # the first name of the memory that it lies in
    replaced: dict[fx.Node, list[fx.Node]] = defaultdict(list)
    for node in order:
        source = node.all_input_nodes[0] if node.all_input_nodes else node
        overwrites = inplace(node, modules)
        # Of what is no part of another it gives back the same, and else perhaps a copy.
        dense = name_of(node) == "contiguous" and name_of(source) not in _VIEWS
        same = overwrites or dense or _gives_back(node, modules)
        whole[node] = whole[source] if same and source is not node else node
        viewed = same or name_of(node) in _VIEWS or _is_view(node, modules)
        storage[node] = storage[source] if viewed and source is not node else node
        for other in storage if overwrites else ():
            if storage[other] is not storage[node] or other is node:
                continue
            if whole[other] is whole[node]:
                replaced[node].append(other)
            elif any(order[user] > order[node] for user in other.users):
                raise GraphError(
                    f"{node.name} overwrites memory that {other.name} shares and that is read "
                    "again: write to a copy (x = x + y in place of x += y, inplace=False)"
                )
    return replaced


def _is_view(node: fx.Node, modules: dict[str, nn.Module]) -> bool:
    return node.op == "call_module" and isinstance(
        modules[str(node.target)], nn.Flatten | nn.Unflatten
    )


def _gives_back(node: fx.Node, modules: dict[str, nn.Module]) -> bool:
    if node.op == "call_module":
        return isinstance(modules[str(node.target)], _SAME)
    return node.target in _SAME_FUNCTIONS
