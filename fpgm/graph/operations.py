"""Operations that pruning understands: what each node of a traced network does to channels.

Whatever is not one of these kinds is OPAQUE: it gets its input at full width, and the
convolutions that feed it are kept whole and named.
"""

from __future__ import annotations

import copy
import functools
import inspect
import operator
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn
from torchvision.ops.stochastic_depth import stochastic_depth

from fpgm.networks.layers import SameConv2d

CONV, DEPTHWISE, GROUPED, UNITS = "conv", "depthwise", "grouped", "units"
NORM, POOL, ELEMENTWISE = "norm", "pool", "elementwise"
SPATIAL, FIXED = "spatial", "fixed"
CHOOSE, RESHAPE, SLOPE = "choose", "reshape", "slope"
ADD, MUL, CAT = "add", "mul", "cat"
FLATTEN, LINEAR, SLICE, PAD, OPAQUE, OUTPUT = (
    "flatten",
    "linear",
    "slice",
    "pad",
    "opaque",
    "output",
)

# One output value for one input value, no parameters of a channel: a constant stays a constant.
ELEMENTWISE_MODULES = (
    nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.ELU, nn.SELU, nn.CELU, nn.GELU, nn.SiLU, nn.Mish,
    nn.Hardswish, nn.Hardsigmoid, nn.Hardtanh, nn.Sigmoid, nn.Tanh, nn.Softplus, nn.Softsign,
    nn.LogSigmoid, nn.Hardshrink, nn.Softshrink, nn.Tanhshrink, nn.Threshold,
    nn.Identity, nn.Dropout, nn.Dropout2d,
)  # fmt: skip
_ELEMENTWISE_FUNCTIONS = {
    torch.relu, F.relu, F.relu6, F.leaky_relu, F.elu, F.selu, F.gelu, F.silu, F.mish, F.hardswish,
    F.hardsigmoid, F.hardtanh, F.sigmoid, torch.sigmoid, torch.tanh, F.softplus,
    F.dropout, F.dropout2d, F.relu_, F.leaky_relu_, F.elu_, torch.relu_, stochastic_depth,
    F.hardtanh, F.logsigmoid, F.softsign, F.threshold, F.tanh, torch.clamp, torch.exp, torch.neg,
    torch.sqrt, torch.abs, torch.clip,
}  # fmt: skip
_ELEMENTWISE_METHODS = {"relu", "relu_", "sigmoid", "sigmoid_", "tanh", "tanh_", "contiguous"}
_ELEMENTWISE_METHODS |= {"clamp", "clamp_", "exp", "neg", "sqrt", "abs"}
_ADDS = {operator.add, operator.iadd, torch.add}
_PRODUCTS = {operator.mul, operator.imul, torch.mul, "mul", "mul_"}
_SCALINGS = _PRODUCTS | {  # elementwise where the other side is a number
    operator.sub, operator.isub, operator.truediv, operator.itruediv, torch.sub, torch.div,
    "sub", "sub_", "div", "div_",
}  # fmt: skip
_POOL_MODULES = (nn.MaxPool2d, nn.AvgPool2d, nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d)
_POOL_FUNCTIONS = {
    F.max_pool2d, torch.max_pool2d, F.avg_pool2d, F.adaptive_avg_pool2d, F.adaptive_max_pool2d,
}  # fmt: skip
# A channel that is constant stays so: what is put between pixels is a mean of them.
_RESIZINGS = {F.interpolate, F.upsample}
# What overwrites its argument, and what computes the same elsewhere.
TWINS: dict[Any, Any] = {
    operator.iadd: operator.add,
    operator.isub: operator.sub,
    operator.imul: operator.mul,
    operator.itruediv: operator.truediv,
}
_SPATIAL_DIMS = ((2, 3), (-2, -1), (3, 2), (-1, -2))
CONVOLUTIONS = (CONV, DEPTHWISE, GROUPED)
WRITERS = (*CONVOLUTIONS, UNITS)  # the layers that have filters


def _leaf(function: Callable[..., Any]) -> Callable[..., Any]:
    """One operation of a graph, also where a network that has it is traced again."""

    @functools.wraps(function)
    def called(x: Any, given: Any) -> Any:
        if isinstance(x, fx.Proxy):
            return x.tracer.create_proxy("call_function", called, (x, given), {})
        return function(x, given)

    return called


@_leaf
def choose(x: torch.Tensor, channels: tuple[int, ...]) -> torch.Tensor:
    """These channels of (B, C, ...), in this order: a part, or all of them shuffled."""
    first, last = channels[0], channels[-1] + 1
    return x[:, first:last] if channels == tuple(range(first, last)) else x[:, list(channels)]


@_leaf
def reshape(x: torch.Tensor, tail: tuple[int, ...]) -> torch.Tensor:
    """(B, C, ...) with other dimensions behind the channels, and the same values."""
    return x.reshape(*x.shape[:2], *tail)


@_leaf
def check_way(value: Any, traced: Any) -> None:
    """Raise ValueError where a size, or what the code asks of it, is not what it was when the
    network was traced: then its code would go another way."""
    if value != traced:
        raise ValueError(
            "images of this size take another way through the network's code than those that it "
            "was compacted for: compact it with image=(C, H, W) of these"
        )


def named_arguments(node: fx.Node) -> dict[str, Any]:
    """The arguments of a Python function by name; nothing for what has no signature."""
    if node.op != "call_function" or not callable(node.target):
        return {}
    try:
        return dict(inspect.signature(node.target).bind(*node.args, **node.kwargs).arguments)
    except (TypeError, ValueError):
        return {}


def apply(node: fx.Node, modules: dict[str, nn.Module], constants: torch.Tensor) -> torch.Tensor:
    """An elementwise node's function, on other values."""
    target: Any = node.target
    if node.op == "call_module":
        result = copy.deepcopy(modules[target]).double().eval()(constants)
    elif node.op == "call_method":
        result = getattr(constants, target)(*node.args[1:], **node.kwargs)
    else:
        result = target(constants, *node.args[1:], **node.kwargs)
    assert isinstance(result, torch.Tensor)
    return result


def computed(node: fx.Node, given: Mapping[fx.Node, Any], modules: Mapping[str, nn.Module]) -> Any:
    """A node's operation on other values of its inputs. modules: by name, that it may call."""
    args: Any = fx.node.map_arg(node.args, given.__getitem__)
    kwargs: Any = fx.node.map_arg(node.kwargs, given.__getitem__)
    target: Any = node.target
    if node.op == "call_module":
        return modules[target].forward(*args, **kwargs)
    if node.op == "call_method":
        return getattr(args[0], target)(*args[1:], **kwargs)
    return target(*args, **kwargs)


def name_of(node: fx.Node) -> str:
    """Of the function or method that a node calls, empty where it calls none."""
    if node.op == "call_method":
        return str(node.target)
    return getattr(node.target, "__name__", "") if node.op == "call_function" else ""


def kind_of(node: fx.Node, modules: dict[str, nn.Module]) -> str:
    """One of the kinds above, judged by the operation and its arguments alone."""
    if node.op == "output":
        return OUTPUT
    kind = OPAQUE
    if node.op == "call_module":
        kind = _module_kind(modules[str(node.target)])
    elif node.op == "call_function":
        kind = _function_kind(node)
    elif node.op == "call_method":
        kind = _method_kind(node)
    # A constant is mapped by the operation alone: all else that it takes must be typed there.
    others = kind == ELEMENTWISE and len(node.all_input_nodes) > 1
    # The rules for the kinds look for a tensor, or a list of them, in the first place.
    first = node.args[0] if node.args else None
    if kind == CAT:
        tensors = isinstance(first, list | tuple) and all(isinstance(n, fx.Node) for n in first)
    else:
        tensors = isinstance(first, fx.Node)
    return kind if tensors and not others else OPAQUE


def hooked(module: nn.Module) -> bool:
    """Whether something runs before or after its forward, and may change anything."""
    return bool(module._forward_hooks or module._forward_pre_hooks)


def _module_kind(module: nn.Module) -> str:
    # Exact types: a subclass may compute anything.
    kind = OPAQUE
    if hooked(module):
        return kind
    if type(module) in (nn.Conv2d, SameConv2d):
        depthwise = module.groups == module.in_channels == module.out_channels
        kind = CONV if module.groups == 1 else DEPTHWISE if depthwise else GROUPED
        if getattr(module, "fixed", False):  # its filters are no parameter
            kind = FIXED if depthwise and module.bias is None else OPAQUE
    elif type(module) in (nn.BatchNorm2d, nn.BatchNorm1d) and module.running_mean is not None:
        kind = NORM
    elif type(module) is nn.Linear:
        kind = LINEAR
    elif type(module) is nn.PReLU:
        kind = ELEMENTWISE if module.num_parameters == 1 else SLOPE
    elif type(module) in ELEMENTWISE_MODULES:
        kind = ELEMENTWISE
    elif type(module) in _POOL_MODULES:
        kind = _pool_kind(vars(module))
    elif type(module) in (nn.Upsample, nn.UpsamplingNearest2d, nn.UpsamplingBilinear2d):
        kind = POOL
    elif type(module) is nn.ZeroPad2d:
        kind = SPATIAL
    elif type(module) is nn.Flatten and (module.start_dim, module.end_dim) == (1, -1):
        kind = FLATTEN
    return kind


def _function_kind(node: fx.Node) -> str:
    target, args = node.target, node.args
    kind = OPAQUE
    if target in _ELEMENTWISE_FUNCTIONS:
        kind = ELEMENTWISE
    elif target in _ADDS:
        kind = _add_kind(node)
    elif target in _SCALINGS:
        kind = _scaling_kind(node)
    elif target in _POOL_FUNCTIONS:
        kind = _pool_kind(_pooling_options(node))
    elif target in _RESIZINGS:
        kind = POOL
    elif target is choose:
        kind = CHOOSE
    elif target is reshape:
        kind = RESHAPE
    elif target in (torch.cat, torch.concat):
        kind = CAT if argument(node, 1, "dim", 0) == 1 else OPAQUE
    elif target is torch.flatten:
        start, end = argument(node, 1, "start_dim", 0), argument(node, 2, "end_dim", -1)
        kind = FLATTEN if (start, end) == (1, -1) else OPAQUE
    elif target is operator.getitem and _slices_space(args[1]):
        kind = SLICE
    elif target is F.pad:
        kind = PAD if _pads_channels(node) else SPATIAL if _pads_space(node) else OPAQUE
    elif target is torch.mean and argument(node, 1, "dim", None) in _SPATIAL_DIMS:
        kind = POOL
    return kind


def _method_kind(node: fx.Node) -> str:
    args = node.args
    kind = OPAQUE
    if node.target in _ELEMENTWISE_METHODS:
        kind = ELEMENTWISE
    elif node.target in ("add", "add_"):
        kind = _add_kind(node)
    elif node.target in _SCALINGS:
        kind = _scaling_kind(node)
    elif node.target == "flatten":
        start, end = argument(node, 1, "start_dim", 0), argument(node, 2, "end_dim", -1)
        kind = FLATTEN if (start, end) == (1, -1) else OPAQUE
    elif node.target in ("view", "reshape") and len(args) == 3 and args[2] == -1:
        kind = FLATTEN if _is_batch_size(args[1]) else OPAQUE
    elif node.target in ("mean", "amax", "amin"):
        dims = argument(node, 1, "dim", None)
        kind = POOL if isinstance(dims, tuple | list) and tuple(dims) in _SPATIAL_DIMS else OPAQUE
    return kind


def argument(node: fx.Node, position: int, name: str, default: Any) -> Any:
    """An argument given by position or by name, a list as a tuple."""
    value = node.args[position] if len(node.args) > position else node.kwargs.get(name, default)
    return tuple(value) if isinstance(value, list) else value


def _add_kind(node: fx.Node) -> str:
    if node.kwargs.get("alpha", 1) != 1 or len(node.args) != 2:
        return OPAQUE
    return ADD if isinstance(node.args[1], fx.Node) else ELEMENTWISE


def _scaling_kind(node: fx.Node) -> str:
    if len(node.args) != 2 or node.kwargs:
        return OPAQUE
    both = MUL if node.target in _PRODUCTS else OPAQUE
    return both if isinstance(node.args[1], fx.Node) else ELEMENTWISE


def _pooling_options(node: fx.Node) -> dict[str, Any]:
    given = {**named_arguments(node), **node.kwargs}
    if node.target is F.avg_pool2d:  # a builtin: no signature to read
        names = ("input", "kernel_size", "stride", "padding", "ceil_mode", "count_include_pad",
                 "divisor_override")  # fmt: skip
        given = {"count_include_pad": True, **dict(zip(names, node.args, strict=False)), **given}
    return given


def _pool_kind(options: dict[str, Any]) -> str:
    """POOL where a channel that is constant before is the same constant afterwards, SPATIAL where
    zeros around the image are averaged with it."""
    if options.get("return_indices", False):
        return OPAQUE
    padded = options.get("padding", 0) not in (0, (0, 0))
    averages_zeros = padded and options.get("count_include_pad", False)
    return SPATIAL if averages_zeros or options.get("divisor_override") is not None else POOL


def _slices_space(index: Any) -> bool:
    """x[:, :, ...]: batch and channels whole, only pixels chosen."""
    whole = slice(None)
    return (
        isinstance(index, tuple)
        and 2 <= len(index) <= 4
        and index[0] == whole
        and index[1] == whole
        and all(isinstance(i, slice) for i in index[2:])
    )


def _pads_channels(node: fx.Node) -> bool:
    """F.pad(x, (0, 0, 0, 0, front, back)): whole channels of one value, no pixels."""
    pad = argument(node, 1, "pad", ())
    constant = argument(node, 2, "mode", "constant") == "constant"
    typed = len(pad) == 6 and all(isinstance(p, int) for p in pad)
    return bool(typed and not any(pad[:4]) and min(pad[4:]) >= 0 and constant)


def _pads_space(node: fx.Node) -> bool:
    """F.pad(x, (left, right, top, bottom)): zeros, or the image's own pixels, around the image."""
    pad = argument(node, 1, "pad", ())
    # Another value than zero, or a frame of -inf, would be a constant that is not linear.
    value = argument(node, 3, "value", None)
    return isinstance(pad, tuple) and len(pad) in (2, 4) and value in (None, 0, 0.0)


def _is_batch_size(size: Any) -> bool:
    """x.size(0), x.size()[0] or x.shape[0]."""
    if not isinstance(size, fx.Node):
        return False
    if size.target == "size":
        return bool(size.args[1:] == (0,))
    shape = size.args[0] if size.target is operator.getitem else None
    return isinstance(shape, fx.Node) and is_shape(shape) and bool(size.args[1] == 0)


def is_shape(node: fx.Node) -> bool:
    """Whether it is a tensor's shape, and no part of one."""
    attribute = node.target is getattr and node.args[1] == "shape"
    return bool(attribute) or (node.target == "size" and len(node.args) == 1)


def reads_no_channels(node: fx.Node, flat: set[fx.Node]) -> bool:
    """Whether it asks only for sizes that are the same for any number of channels.

    flat: the nodes that are (B, features), of which only the batch size is.
    """
    others = (0,) if set(node.all_input_nodes) & flat else (0, 2, 3, -1, -2)
    if node.target == "size" and len(node.args) == 2:
        return node.args[1] in others
    indices = [user.args[1] for user in node.users if user.target is operator.getitem]
    known = len(indices) == len(node.users) and all(
        i in others or (isinstance(i, slice) and others != (0,) and _of_pixels(i)) for i in indices
    )
    return is_shape(node) and known


def _of_pixels(part: slice) -> bool:
    """Whether a part of (B, C, H, W) has nothing of the first two."""
    return part.start in (2, 3, -2, -1) and part.stop is None


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
        if str(node.target) not in {*_ELEMENTWISE_METHODS, *_SCALINGS, "add_"}:
            return None
        return str(node.target).rstrip("_"), node.args, dict(node.kwargs)
    if node.target in TWINS:
        return TWINS[node.target], node.args, {}
    named = named_arguments(node)
    if not named.pop("inplace", False):  # it overwrites by its name, not by this option
        return None
    return node.target, (), named
