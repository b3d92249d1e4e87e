"""Operations that overwrite their argument, and their twins that do not."""

from __future__ import annotations

import operator
from typing import Any

from torch import fx, nn

from fpgm.operations import ELEMENTWISE_METHODS, named_arguments

_TWINS: dict[Any, Any] = {
    operator.iadd: operator.add,
    operator.isub: operator.sub,
    operator.imul: operator.mul,
    operator.itruediv: operator.truediv,
}


def inplace(node: fx.Node, modules: dict[str, nn.Module]) -> bool:
    """Whether the operation overwrites its first argument."""
    if node.op == "call_module":
        return bool(getattr(modules[str(node.target)], "inplace", False))
    name = str(node.target) if node.op == "call_method" else getattr(node.target, "__name__", "")
    underscore = name.endswith("_") and not name.endswith("__")
    return underscore or node.target in _TWINS or bool(named_arguments(node).get("inplace"))


def out_of_place(node: fx.Node) -> tuple[Any, tuple[Any, ...], dict[str, Any]] | None:
    """Target and arguments of the same operation that overwrites nothing, None if not known."""
    if node.op == "call_method":
        known = str(node.target) in {*ELEMENTWISE_METHODS, "add_"}
        return (str(node.target).rstrip("_"), node.args, dict(node.kwargs)) if known else None
    if node.target in _TWINS:
        return _TWINS[node.target], node.args, {}
    named = {key: value for key, value in named_arguments(node).items() if key != "inplace"}
    return (node.target, (), named) if named else None
