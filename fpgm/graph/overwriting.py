"""Operations that overwrite their argument: who else holds it, and twins that write elsewhere."""

from __future__ import annotations

import operator
from collections import defaultdict
from collections.abc import Iterable
from typing import Any

import torch.nn.functional as F
from torch import fx, nn
from torchvision.ops.stochastic_depth import stochastic_depth

from fpgm.errors import GraphError
from fpgm.graph.operations import ELEMENTWISE_METHODS, named_arguments
from fpgm.networks.layers import BorderConv2d, Expand, Pick

_TWINS: dict[Any, Any] = {
    operator.iadd: operator.add,
    operator.isub: operator.sub,
    operator.imul: operator.mul,
    operator.itruediv: operator.truediv,
}
# What gives back its argument itself, in eval mode ...
_SAME = (nn.Identity, nn.Dropout, nn.Dropout2d)
_SAME_FUNCTIONS = {F.dropout, F.dropout2d, stochastic_depth, "contiguous", "to", "float", "double"}
# ... or may give back a part or another shape of it.
_VIEWS = {
    "view", "reshape", "flatten", "permute", "transpose", "squeeze", "unsqueeze", "chunk", "split",
    "narrow", "select", "expand", "unbind", "getitem", "movedim", "swapaxes", "unflatten", "detach",
    "view_as", "t",
}  # fmt: skip


class InplaceProxy(fx.Proxy):
    """Records `x += y` as what it is: torch.fx's own proxy takes some of these for `x = x + y`."""


def _recorded(target: Any) -> Any:
    def method(self: fx.Proxy, other: Any) -> fx.Proxy:
        return self.tracer.create_proxy("call_function", target, (self, other), {})

    return method


for _target in (*_TWINS, operator.ipow, operator.ifloordiv, operator.imod):
    setattr(InplaceProxy, f"__{_target.__name__}__", _recorded(_target))


class InplaceTracer(fx.Tracer):
    """torch.fx's tracer, with proxies that see what is overwritten."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        """torch's own layers, and those of a network that is compact already."""
        ours = isinstance(m, BorderConv2d | Expand | Pick)
        return ours or super().is_leaf_module(m, module_qualified_name)

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return InplaceProxy(node, self)


def inplace(node: fx.Node, modules: dict[str, nn.Module]) -> bool:
    """Whether the operation overwrites its first argument."""
    if node.op == "call_module":
        return bool(getattr(modules[str(node.target)], "inplace", False))
    if node.op not in ("call_function", "call_method"):
        return False
    name = str(node.target) if node.op == "call_method" else getattr(node.target, "__name__", "")
    if node.op == "call_function" and getattr(operator, name, None) is node.target:
        twins = (name[1:], f"{name[1:]}_")  # iadd and add, ior and or_
        return name.startswith("i") and any(hasattr(operator, twin) for twin in twins)
    underscore = name.endswith("_") and (not name.endswith("__") or name.startswith("__i"))
    return underscore or bool(named_arguments(node).get("inplace"))


def out_of_place(node: fx.Node) -> tuple[Any, tuple[Any, ...], dict[str, Any]] | None:
    """Target and arguments of the same operation that overwrites nothing, None if not known."""
    if node.op == "call_method":
        known = str(node.target) in {*ELEMENTWISE_METHODS, "add_"}
        return (str(node.target).rstrip("_"), node.args, dict(node.kwargs)) if known else None
    if node.target in _TWINS:
        return _TWINS[node.target], node.args, {}
    named = {key: value for key, value in named_arguments(node).items() if key != "inplace"}
    return (node.target, (), named) if named else None


def overwritten(
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
