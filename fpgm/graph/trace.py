"""A network traced by torch.fx: its operations, what each does to channels, what it overwrites."""

from __future__ import annotations

import operator
import traceback
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn
from torchvision.ops.stochastic_depth import stochastic_depth

from fpgm.errors import GraphError
from fpgm.graph.operations import (
    ADD,
    CONV,
    DEPTHWISE,
    ELEMENTWISE,
    FLATTEN,
    LINEAR,
    MUL,
    NORM,
    OPAQUE,
    OUTPUT,
    POOL,
    TWINS,
    argument,
    inplace,
    kind_of,
)
from fpgm.networks.layers import BorderConv2d, Expand, Pick
from fpgm.networks.modes import evaluating

# What gives back its argument itself, in eval mode ...
_SAME = (nn.Identity, nn.Dropout, nn.Dropout2d)
_SAME_FUNCTIONS = {F.dropout, F.dropout2d, stochastic_depth, "contiguous", "to", "float", "double"}
# ... or may give back a part or another shape of it.
_VIEWS = {
    "view", "reshape", "flatten", "permute", "transpose", "squeeze", "unsqueeze", "chunk", "split",
    "narrow", "select", "expand", "unbind", "getitem", "movedim", "swapaxes", "unflatten", "detach",
    "view_as", "t",
}  # fmt: skip


@dataclass(frozen=True)
class ChannelGraph:
    """A traced network.

    kinds: what each node does to channels (see fpgm.graph.operations), in the order of execution;
    flat: nodes known to be (batch, features); overwritten: operation in place -> the earlier nodes
    that hold its result from there on; shared: modules called twice, or with a parameter that
    another module has too.
    """

    module: fx.GraphModule
    kinds: dict[fx.Node, str]
    flat: set[fx.Node]
    overwritten: dict[fx.Node, list[fx.Node]]
    shared: set[str]

    def convolutions(self) -> Iterator[tuple[fx.Node, str]]:
        """Every convolution's node and qualified name, in the order of execution."""
        kinds = (CONV, DEPTHWISE)
        return ((n, str(n.target)) for n, kind in self.kinds.items() if kind in kinds)

    def filters(self, name: str) -> int:
        """How many filters a convolution has."""
        return len(self.module.get_submodule(name).weight)  # type: ignore[arg-type]

    def called(self, node: fx.Node) -> nn.Module | None:
        """The module that a node calls, None where it is no call of a module."""
        return self.module.get_submodule(str(node.target)) if node.op == "call_module" else None


def trace(model: nn.Module) -> ChannelGraph:
    """Trace `model` in eval mode and classify its operations. The model is left as it is.

    Raises GraphError where Python control flow depends on the data.
    """
    with evaluating(model):
        try:
            graph = InplaceTracer().trace(model)
            for node in graph.nodes:
                node.type = None  # annotations; torch 2.6 cannot pickle those that are strings
            traced = fx.GraphModule(model, graph)
        except (fx.proxy.TraceError, TypeError, RuntimeError) as error:
            name = type(model).__name__
            raise GraphError(
                f"{name} cannot be traced by torch.fx{_where(error)}: {error}"
            ) from error
    modules = dict(traced.named_modules())
    calls = Counter(str(n.target) for n in traced.graph.nodes if n.op == "call_module")
    shared = {name for name, count in calls.items() if count > 1} | _shared_parameters(modules)
    kinds: dict[fx.Node, str] = {}
    flat: set[fx.Node] = set()
    for node in traced.graph.nodes:
        kind = kind_of(node, modules)
        # No filter can be taken from one call alone of a layer that is called twice.
        repeated = kind in (CONV, DEPTHWISE, NORM, LINEAR) and node.target in shared
        kinds[node] = OPAQUE if repeated or not _fits(node, kind, flat, modules) else kind
        if _flattens(node, kinds[node], flat):
            flat.add(node)
    return ChannelGraph(traced, kinds, flat, _overwritten(kinds, modules), shared)


class InplaceProxy(fx.Proxy):
    """Records `x += y` as what it is: torch.fx's own proxy takes some of these for `x = x + y`."""


def _recorded(target: Any) -> Any:
    def method(self: fx.Proxy, other: Any) -> fx.Proxy:
        return self.tracer.create_proxy("call_function", target, (self, other), {})

    return method


for _target in (*TWINS, operator.ipow, operator.ifloordiv, operator.imod):
    setattr(InplaceProxy, f"__{_target.__name__}__", _recorded(_target))


class InplaceTracer(fx.Tracer):
    """torch.fx's tracer, with proxies that see what is overwritten."""

    record_stack_traces = True  # fpgm.structure names the lines

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        """torch's own layers, and those of a network that is compact already."""
        ours = isinstance(m, BorderConv2d | Expand | Pick)
        return ours or super().is_leaf_module(m, module_qualified_name)

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return InplaceProxy(node, self)


def _where(error: Exception) -> str:
    """The line of the network's own code that an error came up in."""
    tracing = (str(Path(torch.__file__).parent), __file__)
    frames = traceback.extract_tb(error.__traceback__)
    lines = [frame for frame in frames if not frame.filename.startswith(tracing)]
    return f" at {lines[-1].filename}:{lines[-1].lineno} ({lines[-1].line})" if lines else ""


def _fits(node: fx.Node, kind: str, flat: set[fx.Node], modules: dict[str, nn.Module]) -> bool:
    """Whether the inputs have the dimensions that the rules for this kind of operation expect."""
    inputs = [n in flat for n in node.all_input_nodes]
    if kind == LINEAR or type(modules.get(str(node.target))) is nn.BatchNorm1d:
        return inputs[0]
    if kind in (ADD, MUL):
        return len(set(inputs)) == 1
    return kind in (ELEMENTWISE, FLATTEN, OPAQUE, OUTPUT) or not any(inputs)


def _flattens(node: fx.Node, kind: str, flat: set[fx.Node]) -> bool:
    """Whether the result is (batch, features)."""
    if kind == POOL and node.op != "call_module" and "mean" in str(node.target):
        return not argument(node, 2, "keepdim", False)
    return kind == FLATTEN or (kind not in (OPAQUE, OUTPUT) and node.all_input_nodes[0] in flat)


def _shared_parameters(modules: dict[str, nn.Module]) -> set[str]:
    """Modules with a parameter that another module has too."""
    owners: dict[int, list[str]] = {}
    for name, module in modules.items():
        for parameter in module.parameters(recurse=False):
            owners.setdefault(id(parameter), []).append(name)
    return {name for names in owners.values() if len(names) > 1 for name in names}


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
        same = overwrites or _gives_back(node, modules)
        whole[node] = whole[source] if same and source is not node else node
        viewed = same or _name(node) in _VIEWS
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


def _name(node: fx.Node) -> str:
    if node.op == "call_method":
        return str(node.target)
    return getattr(node.target, "__name__", "") if node.op == "call_function" else ""


def _gives_back(node: fx.Node, modules: dict[str, nn.Module]) -> bool:
    if node.op == "call_module":
        return isinstance(modules[str(node.target)], _SAME)
    return node.target in _SAME_FUNCTIONS
