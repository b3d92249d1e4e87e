"""Gates: feature maps that the network does not see, and whose filters learn all the same."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from fpgm.errors import GraphError
from fpgm.graph.flow import Tail
from fpgm.graph.trace import ChannelGraph
from fpgm.networks.modes import dropping


class Gate(nn.Module):
    """Feature maps (B, N, H, W) times a mask of zeros and ones (1, N, 1, 1); the gradient goes
    through as if all of it were ones."""

    mask: Tensor

    def __init__(self, like: Tensor) -> None:
        super().__init__()
        self.register_buffer("mask", torch.ones(1, len(like), 1, 1, device=like.device))

    def forward(self, maps: Tensor) -> Tensor:
        through: Tensor = _StraightThrough.apply(maps, self.mask.to(maps.dtype))
        return through


class GatedConv(nn.Module):
    """A convolution whose filters all learn, and whose input hears of those alone that `gate` lets
    through."""

    def __init__(self, conv: nn.Conv2d, gate: Gate) -> None:
        super().__init__()
        self.conv, self.gate = conv, gate

    def forward(self, images: Tensor) -> Tensor:
        conv, kind = self.conv, images.device.type
        weight, bias, mask = conv.weight, conv.bias, self.gate.mask
        if torch.is_autocast_enabled(kind):  # which does not look into a function of one's own
            dtype = torch.get_autocast_dtype(kind)
            images, weight = images.to(dtype), weight.to(dtype)
            bias = None if bias is None else bias.to(dtype)
        how = (conv.stride, conv.padding, conv.dilation, conv.groups)
        maps: Tensor = _Convolution.apply(images, weight, bias, mask.to(weight.dtype), how)
        return maps


class _StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, maps: Tensor, mask: Tensor) -> Tensor:
        return maps * mask

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient, None


class _Convolution(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, images: Tensor, weight: Tensor, bias: Tensor | None, mask: Tensor, how: Any
    ) -> Tensor:
        ctx.save_for_backward(images, weight, mask)
        ctx.how, ctx.biased = how, bias is not None
        return F.conv2d(images, weight, bias, *how)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:
        images, weight, mask = ctx.saved_tensors
        stride, padding, dilation, groups = ctx.how

        def part(of: Tensor, wanted: tuple[bool, bool, bool]) -> Any:
            return torch.ops.aten.convolution_backward(
                of, images, weight, [len(weight)], stride, padding, dilation, False, [0, 0], groups,
                wanted,
            )  # fmt: skip

        back = None
        if ctx.needs_input_grad[0]:
            back = part(gradient * mask, (True, False, False))[0]
        _, for_weight, for_bias = part(gradient, (False, True, ctx.biased))
        return back, for_weight, for_bias, None, None


def refuse_dropping(graph: ChannelGraph, key: str) -> None:
    """Raise GraphError where the traced network would not drop what the network drops in training.
    key: what was asked for, `schedule=...`."""
    for node in graph.kinds:
        function = str(node.target) if node.op == "call_function" else ""
        if "dropout" in function or "stochastic_depth" in function:
            raise GraphError(
                f"{key}: {node.name} is a function and was traced as it is in evaluation; "
                "use the layer (nn.Dropout) in place of it, or schedule=fade"
            )
    dropped = dropping(graph.module)
    if dropped is not None:
        raise GraphError(
            f"{key}: {dropped} drops something at random and was traced as it is in "
            "evaluation; set it to 0, or use schedule=fade"
        )


def put_behind(network: fx.GraphModule, node: fx.Node, name: str, module: nn.Module) -> None:
    """Give all that reads a node what `module`, which is added by a name, makes of it; the network
    is to be recompiled."""
    network.add_submodule(name, module)
    with network.graph.inserting_after(node):
        call = network.graph.call_module(name, (node,))
    node.replace_all_uses_with(call)
    call.args = (node,)


def gated(
    graph: ChannelGraph, behind: Mapping[str, Tail], layers: Sequence[str]
) -> tuple[nn.Module, dict[str, Gate]]:
    """The traced network, its parameters shared with the original, with a gate behind each of these
    convolutions, its BatchNorm and its activation. Raises GraphError."""
    refuse_dropping(graph, "schedule=gated")
    network, gates = graph.module, {}
    nodes = {name: node for node, name in graph.convolutions()}
    for number, name in enumerate(layers):
        conv, last = network.get_submodule(name), behind[name].last
        if not isinstance(conv, nn.Conv2d) or name in graph.computed:
            raise GraphError(
                f"schedule=gated: {name} is no plain convolution; ignore=[{name}] or schedule=fade"
            )
        gates[name] = gate = Gate(conv.weight)
        put_behind(network, last, f"gate_{number}", gate)
        network.add_submodule(f"gated_{number}", GatedConv(conv, gate))
        # Those with another padding are rare: what lies before them hears of masked filters, too.
        plain = type(conv) is nn.Conv2d and conv.padding_mode == "zeros"
        if plain and not isinstance(conv.padding, str):
            nodes[name].target = f"gated_{number}"
    network.recompile()
    return network, gates
