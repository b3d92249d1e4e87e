"""A traced network in canonical form: layers as torch has them, channels chosen and kept in shape.

The same network can be written in many ways: a layer as a class of one's own, a BatchNorm and its
activation in one module, a convolution called as a function on a parameter, channels that are split
by a view. Each is proven to be what it stands for here, on the sample that the tracer has run, or
left as it is. Names stay the user's: a layer is called as the module that holds its weight, or as
the parameter itself where that is not called `weight`.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from fpgm.graph.operations import OPAQUE, argument, choose, kind_of, reshape
from fpgm.graph.probes import effective, normalises, plain
from fpgm.graph.tracer import Shape

_CONVOLUTIONS = {F.conv2d, torch.conv2d}
_MOVES = {
    "view", "reshape", "flatten", "permute", "transpose", "squeeze", "unsqueeze", "chunk", "split",
    "narrow", "unbind", "movedim", "swapaxes", "unflatten", "contiguous", "split_with_sizes",
    "tensor_split", "flip", "getitem", "channel_shuffle", "select",
}  # fmt: skip
_MOVING = (nn.Flatten, nn.Unflatten, nn.ChannelShuffle)
_MEETS = {operator.mul, operator.add, operator.imul, operator.iadd, torch.mul, torch.add, "mul"}
_MEETS |= {"mul_", "add", "add_"}


def canonical(traced: fx.GraphModule, samples: dict[fx.Node, Any]) -> set[str]:
    """Rewrite a traced network in place. samples: of its nodes (see graph.tracer), kept up to date.

    Returns the layers whose weight is computed from a parameter and so no parameter itself.
    """
    computed: set[str] = set()
    _without_checks(traced.graph, samples)
    for node in list(traced.graph.nodes):
        layer = _layer(traced, node, samples)
        if layer is not None:
            name, module, derived = layer
            _call(traced, node, name, module, samples)
            computed |= {name} if derived else set()
    _with_numbers(traced)
    _without_expansion(traced.graph, samples)
    if samples:
        _Moves(traced, samples).resolve()
    _without_leftovers(traced.graph)
    traced.graph.lint()
    traced.recompile()
    return computed


def _without_checks(graph: fx.Graph, samples: Mapping[fx.Node, Any]) -> None:
    """Assertions, and what was computed for nothing else."""
    for node in reversed(graph.nodes):
        useless = node.target is torch._assert or (
            not node.users
            and node.op in ("call_function", "call_method", "get_attr")
            and (isinstance(samples.get(node), int | float | tuple) or _compares(node))
        )
        if useless:
            graph.erase_node(node)


def _without_leftovers(graph: fx.Graph) -> None:
    """What is computed from parameters alone and read no more."""
    sources: set[fx.Node] = set()
    for node in graph.nodes:
        if node.op in ("placeholder", "call_module") or sources.intersection(node.all_input_nodes):
            sources.add(node)
    for node in reversed(graph.nodes):
        if node not in sources and not node.users and node.op != "output":
            graph.erase_node(node)


def _compares(node: fx.Node) -> bool:
    compared = (operator.eq, operator.ne, operator.lt, operator.le, operator.gt, operator.ge)
    return node.target in compared or node.op == "get_attr"


def _layer(
    traced: fx.GraphModule, node: fx.Node, samples: Mapping[fx.Node, Any]
) -> tuple[str, nn.Module, bool] | None:
    """Name and torch's own layer for what a node computes, where it is another's; whether its
    weight is computed. None where there is nothing to do."""
    if node.op == "call_module":
        own = traced.get_submodule(str(node.target))
        found = plain(own) or normalises(own)
        return None if found is None or found is own else (str(node.target), found, False)
    makers: dict[Any, Callable[..., Any]] = {
        **dict.fromkeys(_CONVOLUTIONS, _convolution),
        F.batch_norm: lambda traced, node: _batch_norm(traced, node, _dims(node, samples)),
        F.linear: _linear,
    }
    maker = makers.get(node.target) if node.op == "call_function" else None
    return maker(traced, node) if maker else None


def _convolution(traced: fx.GraphModule, node: fx.Node) -> tuple[str, nn.Module, bool] | None:
    weight = _tensor(traced, argument(node, 1, "weight", None))
    bias = _tensor(traced, argument(node, 2, "bias", None))
    places = {"stride": (3, 1), "padding": (4, 0), "dilation": (5, 1), "groups": (6, 1)}
    options = {key: argument(node, place, key, usual) for key, (place, usual) in places.items()}
    typed = all(not _nodes(value) for value in options.values())
    if weight is None or not typed or (bias is None and _is_node(node, 2, "bias")):
        return None
    name, value, derived = weight
    made = torch.nn.utils.skip_init(
        nn.Conv2d, value.shape[1] * options["groups"], len(value), tuple(value.shape[2:]),
        bias=bias is not None, device=value.device, dtype=value.dtype, **options,
    )  # fmt: skip
    return name, _filled(made, weight=value, bias=bias and bias[1]), derived


def _linear(traced: fx.GraphModule, node: fx.Node) -> tuple[str, nn.Module, bool] | None:
    weight = _tensor(traced, argument(node, 1, "weight", None))
    bias = _tensor(traced, argument(node, 2, "bias", None))
    if weight is None or (bias is None and _is_node(node, 2, "bias")):
        return None
    name, value, derived = weight
    options: dict[str, Any] = {"device": value.device, "dtype": value.dtype}
    made = torch.nn.utils.skip_init(
        nn.Linear, value.shape[1], len(value), bias=bias is not None, **options
    )
    return name, _filled(made, weight=value, bias=bias and bias[1]), derived


def _batch_norm(
    traced: fx.GraphModule, node: fx.Node, dims: int
) -> tuple[str, nn.Module, bool] | None:
    names = ("running_mean", "running_var", "weight", "bias")
    given = [argument(node, place, name, None) for place, name in enumerate(names, 1)]
    values = [_tensor(traced, value) for value in given]
    training, momentum, eps = (
        argument(node, place, key, usual)
        for place, key, usual in ((5, "training", False), (6, "momentum", 0.1), (7, "eps", 1e-5))
    )
    lost = any(value is None and wanted is not None for value, wanted in zip(values, given))
    if training or values[0] is None or values[1] is None or lost or _nodes((momentum, eps)):
        return None
    if any(value is not None and (value[2] or value[1].dim() != 1) for value in values):
        return None
    holder = str(given[0].target).rpartition(".")[0]
    own = traced.get_submodule(holder) if holder else traced
    count = getattr(own, "num_batches_tracked", None)
    made = (nn.BatchNorm1d if dims == 2 else nn.BatchNorm2d)(
        len(values[0][1]), eps, momentum, affine=given[2] is not None
    )
    tensors = {name: value and value[1] for name, value in zip(names, values, strict=True)}
    if (tensors["weight"] is None) != (tensors["bias"] is None):
        return None
    if count is not None:
        tensors["num_batches_tracked"] = count
    return holder or str(given[0].target), _filled(made, **tensors), False


def _dims(node: fx.Node, samples: Mapping[fx.Node, Any]) -> int:
    sample = samples.get(node)
    return len(sample.sizes) if isinstance(sample, Shape) else 4


def _filled(layer: nn.Module, **tensors: Tensor | None) -> nn.Module:
    """The layer with these very tensors, in eval mode."""
    for name, value in tensors.items():
        if name in layer._parameters:
            own = isinstance(value, nn.Parameter) or value is None
            layer._parameters[name] = value if own else nn.Parameter(value, requires_grad=False)  # type: ignore[assignment,arg-type]
        elif value is not None:
            layer._buffers[name] = value
    return layer.eval()


def _tensor(traced: fx.GraphModule, given: Any) -> tuple[str, Tensor, bool] | None:
    """Name and value of what is a parameter, or computed filter by filter from one alone; whether
    it is computed."""
    if not isinstance(given, fx.Node):
        return None
    if given.op == "get_attr":
        name, value = str(given.target), operator.attrgetter(str(given.target))(traced)
        if not isinstance(value, Tensor):
            return None
        derived = False
    else:
        found = effective(traced, given)
        if found is None:
            return None
        (name, value), derived = found, True
    holder, _, attribute = name.rpartition(".")
    return (holder if attribute == "weight" and holder else name), value, derived


def _is_node(node: fx.Node, place: int, name: str) -> bool:
    return isinstance(argument(node, place, name, None), fx.Node)


def _nodes(value: Any) -> list[fx.Node]:
    found: list[fx.Node] = []
    fx.node.map_arg(value, found.append)  # type: ignore[arg-type]
    return found


def _call(
    traced: fx.GraphModule,
    node: fx.Node,
    name: str,
    module: nn.Module,
    samples: dict[fx.Node, Any],
) -> None:
    """Have the node call `module`, which gets that name."""
    holder, _, last = name.rpartition(".")
    parent = traced.get_submodule(holder)
    before = getattr(parent, last, None)
    if isinstance(before, nn.Module):
        for child, inner in before.named_children():
            module.add_module(child, inner)
    elif before is not None:
        delattr(parent, last)
    setattr(parent, last, module)
    if node.op == "call_module":
        return
    with traced.graph.inserting_before(node):
        call = traced.graph.call_module(name, (node.args[0] if node.args else node.kwargs["input"],))
    call.stack_trace, call.meta = node.stack_trace, dict(node.meta)
    _replace(traced.graph, node, call, samples)


def _replace(
    graph: fx.Graph, old: fx.Node, new: fx.Node, samples: dict[fx.Node, Any]
) -> None:
    """And what fed the old one alone, if it is no longer needed."""
    old.replace_all_uses_with(new, delete_user_cb=lambda user: user is not new)
    if old in samples:
        samples[new] = samples[old]
    _erase(graph, old, samples)


def _erase(graph: fx.Graph, node: fx.Node, samples: dict[fx.Node, Any]) -> None:
    if node.users or node.op in ("placeholder", "output", "call_module"):
        return
    sources = node.all_input_nodes
    graph.erase_node(node)
    samples.pop(node, None)
    for source in sources:
        if source.op != "call_module" and _pure(source):
            _erase(graph, source, samples)


def _pure(node: fx.Node) -> bool:
    """Whether nothing is lost with a node that nobody reads: it moves values, or reads some."""
    return node.op == "get_attr" or _name(node) in _MOVES | {"size", "getattr", "expand_as"}


def _with_numbers(traced: fx.GraphModule) -> None:
    """A parameter of one number, a factor as a rule, as this number, and numbers behind tensors."""
    for node in list(traced.graph.nodes):
        if node.target not in _MEETS:
            continue
        if len(node.args) == 2 and isinstance(node.args[0], int | float):
            node.args = node.args[::-1]
        for source in node.all_input_nodes:
            value = None
            if source.op == "get_attr":
                value = operator.attrgetter(str(source.target))(traced)
            if isinstance(value, Tensor) and value.numel() == 1 and value.dim() <= 1:
                number = float(value)
                node.args = fx.node.map_arg(node.args, lambda n, s=source, v=number: v if n is s else n)  # type: ignore[misc]


def _without_expansion(graph: fx.Graph, samples: dict[fx.Node, Any]) -> None:
    """`x * y.expand_as(x)` is `x * y`: torch expands by itself."""
    for node in list(graph.nodes):
        if node.op != "call_method" or node.target not in ("expand_as", "expand"):
            continue
        source, sample = node.args[0], samples.get(node)
        meets = all(
            user.target in _MEETS
            and any(samples.get(n) == sample for n in user.all_input_nodes if n is not node)
            for user in node.users
        )
        before = samples.get(source)
        if isinstance(sample, Shape) and isinstance(before, Shape) and meets:
            if len(before.sizes) == len(sample.sizes):
                node.replace_all_uses_with(source)
                _erase(graph, node, samples)


class _Moves:
    """Chains of operations that only move values about, each value followed from where it was.

    A chain that hands on whole channels is what it does to them: some are chosen, in an order, or
    they get another shape.
    """

    def __init__(self, traced: fx.GraphModule, samples: dict[fx.Node, Any]) -> None:
        self._traced, self._graph, self._samples = traced, traced.graph, samples
        self._modules = dict(traced.named_modules())
        # Where each value of a node comes from: the first node of its chain, places in that.
        self._from: dict[fx.Node, tuple[fx.Node, Any]] = {}

    def resolve(self) -> None:
        for node in list(self._graph.nodes):
            if not self._moves(node):
                continue
            source = node.args[0]
            start = self._from.get(source) or self._places(source)
            places = start and self._moved(node, start[1])
            if not start or places is None:
                continue
            self._from[node] = start[0], places
            with self._graph.inserting_after(node):
                new = self._resolved(start[0], places)
            if new is None:
                continue
            new.stack_trace = node.stack_trace
            sample = self._samples[node]
            node.replace_all_uses_with(new)
            self._samples[new] = sample
        for node in reversed(list(self._graph.nodes)):
            if node in self._from and not node.users and not node._erased:
                _erase(self._graph, node, self._samples)

    def _moves(self, node: fx.Node) -> bool:
        """Whether it moves values in a way that no kind stands for yet."""
        if not node.args or not isinstance(node.args[0], fx.Node):
            return False
        if node.op == "call_module":
            moving = isinstance(self._modules[str(node.target)], _MOVING)
        else:
            moving = node.op in ("call_function", "call_method") and _name(node) in _MOVES
        # A copy in the middle of a chain is a part of it.
        follows = node.args[0] in self._from
        return moving and (follows or kind_of(node, self._modules) == OPAQUE)

    def _places(self, node: fx.Node) -> tuple[fx.Node, Tensor] | None:
        sample = self._samples.get(node)
        if not isinstance(sample, Shape) or len(sample.sizes) < 2:
            return None
        count = int(torch.tensor(sample.sizes).prod())
        return node, torch.arange(count).view(sample.sizes)

    def _moved(self, node: fx.Node, places: Any) -> Any:
        """The same operation on places. None where it takes what is not known."""
        known = {node.args[0]: places}
        for other in node.all_input_nodes[1:]:
            if not isinstance(self._samples.get(other), int):
                return None
            known[other] = self._samples[other]
        args, kwargs = (fx.node.map_arg(a, known.__getitem__) for a in (node.args, node.kwargs))
        if node.op == "call_module":
            return self._modules[str(node.target)](*args, **kwargs)
        if node.op == "call_method":
            return getattr(args[0], str(node.target))(*args[1:], **kwargs)
        return node.target(*args, **kwargs)  # type: ignore[operator]

    def _resolved(self, source: fx.Node, places: Any) -> fx.Node | None:
        """What the chain does to the channels of `source`, as one operation."""
        sample = self._samples[source]
        if not isinstance(places, Tensor) or places.dim() < 2 or places.numel() == 0:
            return None
        batch, total, *rest = sample.sizes
        run = int(torch.tensor(rest).prod()) if rest else 1
        natural = torch.arange(batch * total * run).view(sample.sizes)
        if len(places) != batch:
            return None
        if torch.equal(places, natural.flatten(1)):
            return self._graph.call_function(torch.flatten, (source, 1))
        channels = places.flatten(2)[0, :, 0] // run if places.dim() > 2 else places[0] // run
        if int(channels.max()) >= total:
            return None
        chosen = natural[:, channels]
        if torch.equal(places, chosen):
            return self._graph.call_function(choose, (source, tuple(channels.tolist())))
        tail = tuple(places.shape[2:])
        if places.dim() == 3:
            tail = (-1,)
        whole = torch.equal(channels, torch.arange(total)) and places.numel() == natural.numel()
        if whole and torch.equal(places.flatten(2), natural.flatten(2) if rest else natural[..., None]) and (places.dim() == 3 or set(tail) <= {1}):
            return self._graph.call_function(reshape, (source, tail))
        return None


def _name(node: fx.Node) -> str:
    if node.op == "call_method":
        return str(node.target)
    return getattr(node.target, "__name__", "") if node.op == "call_function" else ""
