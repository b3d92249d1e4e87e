"""Whether a layer of somebody's own computes what one of torch's does: found out by trying.

A convolution or a BatchNorm is linear in its input but for a shift, and the same at every place:
on random inputs of several sizes nothing else gives the same values.
"""

from __future__ import annotations

import copy
import operator
from typing import Any, TypeVar

import torch
from torch import Tensor, fx, nn

from fpgm.graph.operations import computed, hooked
from fpgm.networks.layers import BorderConv2d, SameConv2d

L = TypeVar("L", bound=nn.Module)

SIZES = ((9, 9), (12, 15), (40, 70))  # of images, of both parities
SCALES = (1e-3, 1.0, 1e4)  # of what is in them


def plain(module: nn.Module) -> nn.Conv2d | None:
    """torch's convolution, or a SameConv2d, that shares its tensors with `module` and computes the
    same; None where `module` is no convolution with a forward of its own, or another."""
    if not isinstance(module, nn.Conv2d) or type(module) in (nn.Conv2d, SameConv2d):
        return None
    # A border whose values are not there yet is no less a border.
    if isinstance(module, BorderConv2d) and module.border is not None:
        return None
    if type(module).forward is nn.Conv2d.forward or hooked(module):
        return None
    for kind in (nn.Conv2d, SameConv2d):
        candidate = _alike(kind, module)
        if all(_same(module, candidate, module.in_channels, size) for size in SIZES):
            return candidate
    return None


def normalises(module: nn.Module) -> nn.BatchNorm2d | None:
    """torch's BatchNorm that shares its tensors with `module` and computes the same, where that
    only holds what a BatchNorm does (torchvision's FrozenBatchNorm2d); else None."""
    names = ("weight", "bias", "running_mean", "running_var")
    tensors = {name: getattr(module, name, None) for name in names}
    others = isinstance(module, nn.modules.batchnorm._BatchNorm) or next(module.children(), None)
    if others or hooked(module):
        return None
    if not all(isinstance(t, Tensor) and t.dim() == 1 for t in tensors.values()):
        return None
    if not isinstance(getattr(module, "eps", None), float):
        return None
    count = len(tensors["weight"])  # type: ignore[arg-type]
    plain_norm = nn.BatchNorm2d(count, eps=module.eps)  # type: ignore[arg-type]
    made = holding(plain_norm, num_batches_tracked=None, **tensors)
    return made if _same(module, made, count, (3, 4)) else None


def effective(traced: fx.GraphModule, node: fx.Node) -> tuple[str, Tensor, set[fx.Node]] | None:
    """The parameter that a convolution's weight is computed from, filter by filter (weight
    standardisation), what comes out, and the nodes that it takes. None where it is made of anything
    else: a filter of zeros must give zeros and leave the others as they are."""
    order = _above(node)
    if order is None:
        return None
    parameters = [n for n in order if n.op == "get_attr"]
    values = {n: operator.attrgetter(str(n.target))(traced) for n in parameters}
    whole = _computed(order, values)
    filters = [n for n in parameters if values[n].shape == whole.shape]
    if len(filters) != 1 or whole.dim() not in (2, 4):
        return None
    weight = filters[0]
    kept = torch.arange(len(values[weight])) % 2 == 0
    kept = kept.to(whole.device).view(-1, *[1] * (whole.dim() - 1))
    part = _computed(order, {**values, weight: values[weight] * kept})
    if not torch.equal(part, whole * kept):
        return None
    return str(weight.target), whole, set(order)


def _above(node: fx.Node) -> list[fx.Node] | None:
    """All that a node is computed from, in order; None where the image is among it."""
    found: dict[fx.Node, None] = {}

    def visit(n: fx.Node) -> bool:
        if n.op not in ("get_attr", "call_function", "call_method"):
            return False
        if not all(visit(source) for source in n.all_input_nodes):
            return False
        found[n] = None
        return True

    return list(found) if visit(node) else None


@torch.no_grad()
def _computed(order: list[fx.Node], given: dict[fx.Node, Any]) -> Tensor:
    values = dict(given)
    for n in order:
        if n in values:
            continue
        values[n] = computed(n, values, {})
    result: Tensor = values[order[-1]].detach()
    return result


def holding(layer: L, **tensors: Tensor | None) -> L:
    """The layer with these very tensors, in eval mode."""
    for name, value in tensors.items():
        if name in layer._buffers:
            layer._buffers[name] = value
        elif value is None or isinstance(value, nn.Parameter):
            layer._parameters[name] = value
        else:
            layer._parameters[name] = nn.Parameter(value, requires_grad=False)
    return layer.eval()


def _alike(kind: type[nn.Conv2d], module: nn.Conv2d) -> nn.Conv2d:
    """A convolution of that kind with the tensors of `module`."""
    options = ("stride", "padding", "dilation", "groups", "padding_mode")
    made: nn.Conv2d = torch.nn.utils.skip_init(
        kind, module.in_channels, module.out_channels, module.kernel_size,
        bias=module.bias is not None, device="meta",
        **{name: getattr(module, name) for name in options},
    )  # fmt: skip
    return holding(made, weight=module.weight, bias=module.bias)


@torch.no_grad()
def _same(one: nn.Module, other: nn.Module, channels: int, size: tuple[int, int]) -> bool:
    """In float64, on the CPU."""
    one, other = (copy.deepcopy(module).cpu().double() for module in (one, other))
    generator = torch.Generator().manual_seed(0)
    image = torch.randn(1, channels, *size, generator=generator, dtype=torch.float64)
    for scale in SCALES:
        try:
            a, b = one.forward(scale * image), other.forward(scale * image)
        except (RuntimeError, TypeError, ValueError):
            return False
        if a.shape != b.shape or (a - b).abs().sum() > 1e-12 * b.abs().sum():
            return False
    return True
