"""Who writes and who reads each channel: a network traced by torch.fx."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from torch import Tensor, fx, nn

from fpgm.operations import (
    ADD,
    CONV,
    ELEMENTWISE,
    FLATTEN,
    LINEAR,
    NORM,
    OPAQUE,
    OUTPUT,
    POOL,
    SLICE,
    kind_of,
    reads_batch_size,
)


class GraphError(ValueError):
    """A network that cannot be traced or compacted."""


@dataclass(frozen=True)
class ChannelGraph:
    """A traced network. `kept_full` says of each convolution that is not prunable why."""

    module: fx.GraphModule
    kinds: dict[fx.Node, str]
    prunable: tuple[str, ...]
    kept_full: dict[str, str]

    def convolutions(self) -> Iterator[tuple[fx.Node, str]]:
        """Every convolution's node and qualified name, in the order of execution."""
        return ((n, str(n.target)) for n, kind in self.kinds.items() if kind == CONV)

    def checked(self, keep: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """`keep` with every index sorted. Raises GraphError for what cannot be kept."""
        filters = {name: self.module.get_submodule(name) for _, name in self.convolutions()}
        checked = {}
        for name, kept in keep.items():
            if name not in filters:
                reason = self.kept_full.get(name, "no such convolution")
                raise GraphError(f"keep[{name!r}]: {reason}")
            kept = kept.unique()
            width = int(getattr(filters[name], "out_channels"))  # noqa: B009
            if len(kept) == 0:
                raise GraphError(f"keep[{name!r}] is empty: a layer needs at least one filter")
            if kept[0] < 0 or kept[-1] >= width:
                raise GraphError(f"keep[{name!r}] has indices outside 0..{width - 1}")
            checked[name] = kept
        return checked

    def writer(self, node: fx.Node) -> fx.Node:
        """The nearest node above that decides about channels: a convolution, add, cat, ..."""
        while self.kinds[node] in (NORM, ELEMENTWISE, POOL, SLICE, FLATTEN):
            node = node.all_input_nodes[0]
        return node


def trace(model: nn.Module) -> ChannelGraph:
    """Trace `model` in eval mode and classify its operations. The model is left as it is.

    Raises GraphError where Python control flow depends on the data.
    """
    modes = {module: module.training for module in model.modules()}
    try:
        traced = fx.symbolic_trace(model.eval())
    except (fx.proxy.TraceError, TypeError, RuntimeError) as error:
        raise GraphError(f"{type(model).__name__} cannot be traced by torch.fx: {error}") from error
    finally:
        for module, training in modes.items():
            module.training = training
    modules = dict(traced.named_modules())
    calls = Counter(str(n.target) for n in traced.graph.nodes if n.op == "call_module")
    shared = _shared_parameters(modules)
    kinds: dict[fx.Node, str] = {}
    for node in traced.graph.nodes:
        kind = kind_of(node, modules)
        twice = node.op == "call_module" and (calls[str(node.target)] > 1 or node.target in shared)
        stateful = kind in (CONV, NORM, LINEAR)
        kinds[node] = OPAQUE if twice and stateful else kind
    kept_full = _kept_full(kinds, modules, calls, shared)
    prunable = tuple(
        str(n.target) for n, k in kinds.items() if k == CONV and n.target not in kept_full
    )
    return ChannelGraph(traced, kinds, prunable, kept_full)


def _shared_parameters(modules: dict[str, nn.Module]) -> set[str]:
    """Modules with a parameter that another module has too."""
    owners: dict[int, list[str]] = {}
    for name, module in modules.items():
        for parameter in module.parameters(recurse=False):
            owners.setdefault(id(parameter), []).append(name)
    return {name for names in owners.values() if len(names) > 1 for name in names}


def _kept_full(
    kinds: dict[fx.Node, str], modules: dict[str, nn.Module], calls: Counter[str], shared: set[str]
) -> dict[str, str]:
    """Why each convolution that is not pruned is not: convolution -> reason."""
    reasons: dict[str, str] = {}
    writers: dict[fx.Node, set[str]] = {}  # whose filters this node's channels are
    for node, kind in kinds.items():
        carried = set().union(*(writers.get(n, set()) for n in node.all_input_nodes))
        if kind == OUTPUT:
            reasons.update(dict.fromkeys(carried, "its filters are outputs of the network"))
        elif kind == OPAQUE and not reads_batch_size(node):
            reason = f"its channels go into {node.name}, which pruning does not understand"
            reasons.update(dict.fromkeys(carried, reason))
        writers[node] = set() if kind in (OPAQUE, LINEAR) else carried
        module = modules.get(str(node.target)) if node.op == "call_module" else None
        if kind == CONV:
            writers[node] = {str(node.target)}
        elif isinstance(module, nn.Conv2d):
            name = str(node.target)
            twice = calls[name] > 1 or name in shared
            reasons[name] = "its weight is used twice" if twice else "a grouped convolution"
    for name in _projections(kinds):
        reasons.setdefault(name, "a projection shortcut, which the papers do not prune")
    return reasons


def _projections(kinds: dict[fx.Node, str]) -> Iterator[str]:
    """Convolutions that reach an add alone, beside a branch of two or more from the same input."""
    for node, kind in kinds.items():
        if kind != ADD:
            continue
        inputs = node.all_input_nodes
        for branch, other in (inputs, inputs[::-1]) if len(inputs) == 2 else ():
            while kinds[branch] == NORM:
                branch = branch.all_input_nodes[0]
            if kinds[branch] != CONV or _depth(other, branch, kinds) >= 0:
                continue  # no convolution, or one that both operands come through
            if _depth(other, branch.all_input_nodes[0], kinds) >= 2:
                yield str(branch.target)


def _depth(node: fx.Node, source: fx.Node, kinds: dict[fx.Node, str]) -> float:
    """Most convolutions on a way from `source` to `node`, -inf where there is none."""
    depth: dict[fx.Node, float] = {}
    for n in kinds:  # in the order of execution
        above = max((depth[i] for i in n.all_input_nodes), default=-float("inf"))
        depth[n] = 0 if n is source else above + (kinds[n] == CONV)
        if n is node:
            break
    return depth[node]
