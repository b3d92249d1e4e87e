"""Who writes and who reads each channel: a network traced by torch.fx."""

from __future__ import annotations

import contextlib
import traceback
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, fx, nn

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
    SLICE,
    argument,
    hooked,
    kind_of,
    reads_no_channels,
)
from fpgm.graph.overwriting import InplaceTracer, overwritten


@dataclass(frozen=True)
class ChannelGraph:
    """A traced network.

    kinds: what each node does to channels (see fpgm.graph.operations), in the order of execution;
    flat: nodes known to be (batch, features); overwritten: operation in place -> the earlier nodes
    that hold its result from there on; kept_full: convolutions that cannot be pruned and
    why; projections: those on a residual shortcut.
    """

    module: fx.GraphModule
    kinds: dict[fx.Node, str]
    flat: set[fx.Node]
    overwritten: dict[fx.Node, list[fx.Node]]
    kept_full: dict[str, str]
    projections: tuple[str, ...]

    def convolutions(self) -> Iterator[tuple[fx.Node, str]]:
        """Every convolution's node and qualified name, in the order of execution."""
        kinds = (CONV, DEPTHWISE)
        return ((n, str(n.target)) for n, kind in self.kinds.items() if kind in kinds)

    def filters(self, name: str) -> int:
        """How many filters a convolution has."""
        return len(self.module.get_submodule(name).weight)  # type: ignore[arg-type]

    def checked(self, keep: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """`keep` with every index sorted. Raises GraphError for what cannot be kept."""
        filters = {name: self.module.get_submodule(name) for _, name in self.convolutions()}
        checked = {}
        for name, kept in keep.items():
            if name not in filters:
                reason = self.kept_full.get(name, "no such convolution")
                raise GraphError(f"keep[{name!r}]: {reason}")
            kept = torch.as_tensor(kept).unique()
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


def exact() -> contextlib.AbstractContextManager[None]:
    """Context without TF32, which keeps 10 bits of a product: too few to show networks equal, or to
    tell what rank a map has. It is torch's default for convolutions on a GPU."""
    flags: contextlib.AbstractContextManager[None] = torch.backends.cudnn.flags(
        enabled=True, allow_tf32=False
    )
    return flags


@contextlib.contextmanager
def evaluating(*models: nn.Module) -> Iterator[None]:
    """Eval mode inside; every module's own mode again afterwards."""
    modes = {module: module.training for model in models for module in model.modules()}
    try:
        for model in models:
            model.eval()
        yield
    finally:
        for module, training in modes.items():
            module.training = training


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
    twice = {name for name, count in calls.items() if count > 1} | _shared_parameters(modules)
    kinds: dict[fx.Node, str] = {}
    flat: set[fx.Node] = set()
    for node in traced.graph.nodes:
        kind = kind_of(node, modules)
        repeated = kind in (CONV, DEPTHWISE, NORM, LINEAR) and node.target in twice
        kinds[node] = OPAQUE if repeated or not _fits(node, kind, flat, modules) else kind
        if _flattens(node, kinds[node], flat):
            flat.add(node)
    kept_full = _kept_full(kinds, flat, modules, twice)
    replaced = overwritten(kinds, modules)
    return ChannelGraph(traced, kinds, flat, replaced, kept_full, tuple(_projections(kinds)))


def _where(error: Exception) -> str:
    """The line of the network's own code that an error came up in."""
    own = (str(Path(torch.__file__).parent), str(Path(__file__).parent / "overwriting"))
    frames = traceback.extract_tb(error.__traceback__)
    lines = [f for f in frames if not f.filename.startswith(own) and f.filename != __file__]
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


def _kept_full(
    kinds: dict[fx.Node, str],
    flat: set[fx.Node],
    modules: dict[str, nn.Module],
    twice: set[str],
) -> dict[str, str]:
    """Why each convolution that cannot be pruned cannot: convolution -> reason."""
    reasons: dict[str, str] = {}
    writers: dict[fx.Node, set[str]] = {}  # whose filters this node's channels are
    for node, kind in kinds.items():
        name = str(node.target)
        carried = set().union(*(writers.get(n, set()) for n in node.all_input_nodes))
        if kind == OUTPUT:
            reasons.update(dict.fromkeys(carried, "its filters are outputs of the network"))
        elif kind == OPAQUE and carried and not reads_no_channels(node, flat):
            reason = f"its channels go into {node.name}, which pruning does not understand"
            reasons.update(dict.fromkeys(carried, reason))
        writers[node] = set() if kind in (OPAQUE, LINEAR) else carried
        if kind == CONV:
            writers[node] = {name}
        elif kind == DEPTHWISE:
            writers[node] = {name, *carried}
        elif node.op == "call_module" and isinstance(modules[name], nn.Conv2d):
            reasons[name] = _strange(modules[name], name in twice)
    return reasons


def _strange(conv: nn.Module, twice: bool) -> str:
    if twice:
        return "its weight is used twice"
    if hooked(conv):
        return "it has a hook"
    if type(conv) is not nn.Conv2d or getattr(conv, "groups", 1) == 1:
        return "not a plain convolution"
    return "a grouped convolution"


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
