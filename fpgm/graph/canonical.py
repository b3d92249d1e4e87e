"""A traced network in canonical form: layers as torch has them, channels chosen and kept in shape.

The same network can be written in many ways: a layer as a class of one's own, a BatchNorm and its
activation in one module, a convolution called as a function on a parameter, channels that are split
by a view. Each is proven to be what it stands for here, on the sample that the tracer has run, or
left as it is. Names stay the user's: a layer is called as the module that holds its weight, or as
the parameter itself where that is not called `weight`.
"""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from fpgm.graph.moves import MOVES, resolve
from fpgm.graph.operations import argument, name_of
from fpgm.graph.probes import effective, holding, normalises, plain
from fpgm.graph.tracer import Shape

# What two tensors are told to meet in.
_MEETS = {
    operator.mul, operator.add, operator.imul, operator.iadd, torch.mul, torch.add, "mul", "mul_",
    "add", "add_",
}  # fmt: skip
_STATISTICS = ("running_mean", "running_var")


def canonical(traced: fx.GraphModule, samples: dict[fx.Node, Any]) -> set[str]:
    """Rewrite a traced network in place. samples: of its nodes (see graph.tracer), kept up to date.

    Returns the layers whose weight is computed from a parameter and so no parameter itself.
    """
    graph, computed = traced.graph, set()
    _forget(graph, samples)
    _without_checks(graph, samples)
    uses = _uses(traced)
    for node in list(graph.nodes):
        layer = _layer(traced, node, samples, uses)
        if layer is not None and _free(traced, layer.name, node):
            _call(traced, node, layer, samples)
            computed |= {layer.name} if layer.computed else set()
    _without_leftovers(graph)
    _with_numbers(traced)
    _without_expansion(graph, samples)
    if samples:
        moved = resolve(traced, samples)
        for node in reversed([n for n in graph.nodes if n in moved]):
            _erase(graph, node)
    _without_leftovers(graph)
    graph.lint()
    traced.recompile()
    return computed


def _forget(graph: fx.Graph, samples: dict[fx.Node, Any]) -> None:
    """What comes of squeeze() of every dimension of one: of a single image the batch goes, too."""
    lost: set[fx.Node] = set()
    for node in graph.nodes:
        every = name_of(node) == "squeeze" and len(node.args) == 1 and not node.kwargs
        if every or lost.intersection(node.all_input_nodes):
            lost.add(node)
            samples.pop(node, None)


def _without_checks(graph: fx.Graph, samples: Mapping[fx.Node, Any]) -> None:
    """The numbers that were computed for what is decided already."""
    compared = {getattr(operator, name) for name in ("eq", "ne", "lt", "le", "gt", "ge")}
    for node in reversed(graph.nodes):
        number = isinstance(samples.get(node), int | float | tuple) or node.target in compared
        unread = not node.users and node.op in ("call_function", "call_method") and number
        if unread:
            graph.erase_node(node)


def _without_leftovers(graph: fx.Graph) -> None:
    """What is computed from parameters alone and read no more."""
    of_images: set[fx.Node] = set()
    for node in graph.nodes:
        if node.op in ("placeholder", "call_module") or of_images & set(node.all_input_nodes):
            of_images.add(node)
    for node in reversed(graph.nodes):
        if node not in of_images and not node.users and node.op != "output":
            graph.erase_node(node)


@dataclass(frozen=True)
class _Layer:
    """torch's own layer for what a node computes. computed: whether its weight is made from a
    parameter at each call."""

    name: str
    module: nn.Module
    computed: bool = False


@dataclass(frozen=True)
class _Tensor:
    """What a layer is called with. layer: whose weight it would be; read: from a parameter or
    buffer as it is, and not computed."""

    layer: str
    value: Tensor
    read: bool


def _layer(
    traced: fx.GraphModule, node: fx.Node, samples: Mapping[fx.Node, Any], uses: Counter[int]
) -> _Layer | None:
    """The layer that a node stands for, None where it is torch's own or none."""
    if node.op == "call_module":
        own = traced.get_submodule(str(node.target))
        found = plain(own) or normalises(own)
        return None if found is None else _Layer(str(node.target), found)
    if node.op != "call_function":
        return None
    if node.target in (F.conv2d, torch.conv2d):
        return _convolution(traced, node, uses)
    if node.target is F.linear:
        return _linear(traced, node, uses)
    if node.target is F.batch_norm:
        sample = samples.get(node)
        flat = isinstance(sample, Shape) and len(sample.sizes) == 2
        return _batch_norm(traced, node, uses, nn.BatchNorm1d if flat else nn.BatchNorm2d)
    return None


def _convolution(traced: fx.GraphModule, node: fx.Node, uses: Counter[int]) -> _Layer | None:
    given = _weights(traced, node, uses)
    places = {"stride": (3, 1), "padding": (4, 0), "dilation": (5, 1), "groups": (6, 1)}
    options = {key: argument(node, place, key, usual) for key, (place, usual) in places.items()}
    if given is None or any(map(_holds_nodes, options.values())):
        return None
    weight, bias = given
    made = torch.nn.utils.skip_init(
        nn.Conv2d, weight.value.shape[1] * options["groups"], len(weight.value),
        tuple(weight.value.shape[2:]), bias=bias is not None, device="meta", **options,
    )  # fmt: skip
    # Filters that are no parameter are not pruned: they go with what they read.
    made.fixed = weight.read and not isinstance(weight.value, nn.Parameter)
    return _Layer(weight.layer, holding(made, weight=weight.value, bias=bias), not weight.read)


def _linear(traced: fx.GraphModule, node: fx.Node, uses: Counter[int]) -> _Layer | None:
    given = _weights(traced, node, uses)
    if given is None or given[0].value.dim() != 2:
        return None
    weight, bias = given
    units, inputs = weight.value.shape
    options: dict[str, Any] = {"bias": bias is not None, "device": "meta"}
    made = torch.nn.utils.skip_init(nn.Linear, inputs, units, **options)
    return _Layer(weight.layer, holding(made, weight=weight.value, bias=bias), not weight.read)


def _weights(
    traced: fx.GraphModule, node: fx.Node, uses: Counter[int]
) -> tuple[_Tensor, Tensor | None] | None:
    """Weight and bias of a function's second and third argument, None where one is not known."""
    weight = _tensor(traced, argument(node, 1, "weight", None), uses)
    given = argument(node, 2, "bias", None)
    bias = _tensor(traced, given, uses)
    if weight is None or (bias is None and given is not None):
        return None
    return weight, None if bias is None else bias.value


def _batch_norm(
    traced: fx.GraphModule, node: fx.Node, uses: Counter[int], kind: Callable[..., nn.Module]
) -> _Layer | None:
    names = (*_STATISTICS, "weight", "bias")
    given = {name: argument(node, place, name, None) for place, name in enumerate(names, 1)}
    found = {name: _tensor(traced, value, uses) for name, value in given.items()}
    training = argument(node, 5, "training", False)
    momentum, eps = argument(node, 6, "momentum", 0.1), argument(node, 7, "eps", 1e-5)
    known = all(found[name] is not None for name in _STATISTICS) and all(
        given[name] is None or (tensor is not None and tensor.read)
        for name, tensor in found.items()
    )
    pair = (given["weight"] is None) == (given["bias"] is None)
    if training or not known or not pair or _holds_nodes((momentum, eps)):
        return None
    tensors = {name: None if one is None else one.value for name, one in found.items()}
    # It is called as the module that holds its statistics.
    holder, _, last = str(given["running_mean"].target).rpartition(".")
    count, affine = len(tensors["running_mean"]), given["weight"] is not None  # type: ignore[arg-type]
    made = kind(count, eps, momentum, affine=affine)
    return _Layer(holder or last, holding(made, **tensors))


def _tensor(traced: fx.GraphModule, given: Any, uses: Counter[int]) -> _Tensor | None:
    """What is a parameter or buffer, or computed filter by filter from one alone; else None."""
    if not isinstance(given, fx.Node):
        return None
    read = given.op == "get_attr"
    if read:
        name, value = str(given.target), operator.attrgetter(str(given.target))(traced)
        if not isinstance(value, Tensor) or uses[id(value)] != 1:
            return None  # no layer has it for itself
    else:
        found = effective(traced, given)
        if found is None:
            return None
        name, value, inside = found
        for n in (n for n in inside if n.op == "get_attr"):
            own = operator.attrgetter(str(n.target))(traced)
            if uses[id(own)] != sum(user in inside for user in n.users):
                return None
    holder, _, attribute = name.rpartition(".")
    return _Tensor(holder if attribute == "weight" and holder else name, value, read)


def _uses(traced: fx.GraphModule) -> Counter[int]:
    """How often each parameter and buffer is used, by its id: once for each operation that reads
    it, and by every call of a layer that has it."""
    found: Counter[int] = Counter()
    for node in traced.graph.nodes:
        if node.op == "get_attr":
            found[id(operator.attrgetter(str(node.target))(traced))] += len(node.users)
        if node.op == "call_module":
            layer = traced.get_submodule(str(node.target))
            found.update(id(tensor) for tensor in (*layer.parameters(), *layer.buffers()))
    return found


def _free(traced: fx.GraphModule, name: str, node: fx.Node) -> bool:
    """Whether a layer can get this name: no other call has it, and what holds it is no layer."""
    if node.op == "call_module":
        return True
    called = {str(n.target) for n in traced.graph.nodes if n.op == "call_module"}
    parts = name.split(".")
    above = {".".join(parts[:end]) for end in range(1, len(parts) + 1)}
    return not called & above


def _holds_nodes(value: Any) -> bool:
    found: list[fx.Node] = []
    fx.node.map_arg(value, found.append)
    return bool(found)


def _call(
    traced: fx.GraphModule, node: fx.Node, layer: _Layer, samples: dict[fx.Node, Any]
) -> None:
    """Have the node call the layer's module, which gets its name."""
    holder, _, last = layer.name.rpartition(".")
    parent, module = traced.get_submodule(holder), layer.module
    before = getattr(parent, last, None)
    if isinstance(before, nn.Module):
        for child, inner in before.named_children():
            module.add_module(child, inner)
        # What else it holds may be read by others.
        read = {str(n.target) for n in traced.graph.nodes if n.op == "get_attr" and n.users}
        for key, value in (*before._parameters.items(), *before._buffers.items()):
            if f"{layer.name}.{key}" in read and not hasattr(module, key):
                setattr(module, key, value)
    elif before is not None:
        delattr(parent, last)
    setattr(parent, last, module)
    if node.op == "call_module":
        return
    images = node.args[0] if node.args else node.kwargs["input"]
    with traced.graph.inserting_before(node):
        call = traced.graph.call_module(layer.name, (images,))
    call.stack_trace, call.meta = node.stack_trace, dict(node.meta)
    node.replace_all_uses_with(call)
    if node in samples:
        samples[call] = samples[node]
    _erase(traced.graph, node)


def _erase(graph: fx.Graph, node: fx.Node) -> None:
    """A node that nobody reads, and what fed it alone."""
    if node.users or node._erased:
        return
    sources = node.all_input_nodes
    graph.erase_node(node)
    for source in sources:
        if source.op == "get_attr" or name_of(source) in MOVES | {"size", "getattr", "expand_as"}:
            _erase(graph, source)


def _with_numbers(traced: fx.GraphModule) -> None:
    """A parameter of one number, a factor as a rule, as this number, and numbers in the second
    place."""
    for node in list(traced.graph.nodes):
        if node.target not in _MEETS:
            continue
        numbers: dict[fx.Node, float] = {}
        for source in node.all_input_nodes:
            attribute = source.op == "get_attr"
            value = operator.attrgetter(str(source.target))(traced) if attribute else None
            if isinstance(value, Tensor) and value.numel() == 1 and value.dim() <= 1:
                numbers[source] = float(value.detach())
        if numbers:
            node.args = tuple(numbers.get(a, a) if isinstance(a, fx.Node) else a for a in node.args)
        if len(node.args) == 2 and not node.kwargs and isinstance(node.args[0], int | float):
            node.args = node.args[::-1]


def _without_expansion(graph: fx.Graph, samples: Mapping[fx.Node, Any]) -> None:
    """`x * y.expand_as(x)` is `x * y`: torch expands by itself."""
    for node in list(graph.nodes):
        if node.op != "call_method" or node.target not in ("expand_as", "expand"):
            continue
        source, after = node.args[0], samples.get(node)
        assert isinstance(source, fx.Node)
        before = samples.get(source)
        if not isinstance(after, Shape) or not isinstance(before, Shape):
            continue
        alike = len(before.sizes) == len(after.sizes)
        if alike and all(_meets(user, node, after, samples) for user in node.users):
            node.replace_all_uses_with(source)
            _erase(graph, node)


def _meets(user: fx.Node, node: fx.Node, sample: Shape, samples: Mapping[fx.Node, Any]) -> bool:
    """Whether `user` has another operand of the size that `node` has."""
    others = (n for n in user.all_input_nodes if n is not node)
    return user.target in _MEETS and any(samples.get(other) == sample for other in others)
