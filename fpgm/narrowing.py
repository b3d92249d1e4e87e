"""One layer with fewer channels: the parts of a compact network."""

from __future__ import annotations

import copy
from typing import Any

from torch import Tensor, nn
from torch.nn.utils import skip_init

from fpgm.channels import Channels
from fpgm.layers import BorderConv2d


def convolution(old: nn.Conv2d, inputs: Channels, keep: Tensor) -> tuple[nn.Conv2d, list[str]]:
    """The filters `keep` over the live inputs, and what its constant inputs add folded in.

    Also returns the attributes that hold nothing but folded constants. Zeros around the image
    make a constant differ at the borders: then it becomes a map, else a bias.
    """
    bordered = not inputs.whole and _pads_zeros(old)
    folded = not inputs.whole and not bordered
    options: dict[str, Any] = {k: getattr(old, k) for k in ("stride", "padding", "dilation")}
    new = skip_init(
        BorderConv2d if bordered else nn.Conv2d,
        len(inputs.live),
        len(keep),
        kernel_size=old.kernel_size,
        bias=old.bias is not None or folded,
        padding_mode=old.padding_mode,
        device=old.weight.device,
        dtype=old.weight.dtype,
        **options,
    )
    assert isinstance(new, nn.Conv2d)
    new.weight.copy_(old.weight[keep][:, inputs.live])
    kernel = (old.weight[keep].double() * inputs.constant[:, None, None]).sum(1, keepdim=True)
    if new.bias is not None:
        new.bias.copy_(bias(old)[keep] + (kernel.sum((1, 2, 3)) if folded else 0))
    if bordered:
        new.register_buffer("border", kernel.to(old.weight.dtype))
        return new, ["border"]
    return new, ["bias"] if folded and old.bias is None else []


def depthwise(old: nn.Conv2d, keep: Tensor) -> nn.Conv2d:
    """The filters `keep` of a depthwise convolution, over as many inputs."""
    new = copy.deepcopy(old)
    new.in_channels = new.out_channels = new.groups = len(keep)
    new.weight = nn.Parameter(old.weight[keep].clone())
    if old.bias is not None:
        new.bias = nn.Parameter(old.bias[keep].clone())
    return new


def norm(old: nn.BatchNorm1d | nn.BatchNorm2d, inputs: Channels) -> nn.BatchNorm1d | nn.BatchNorm2d:
    """A BatchNorm of the live inputs."""
    new = copy.deepcopy(old)
    new.num_features = len(inputs.live)
    for name, tensor in [*old.named_parameters(), *old.named_buffers()]:
        if tensor.dim() == 1:
            getattr(new, name).data = tensor.data[inputs.live].clone()
    return new


def linear(old: nn.Linear, inputs: Channels) -> tuple[nn.Linear, list[str]]:
    """All outputs over the live inputs, constants folded into the bias. Returns as convolution."""
    options: dict[str, Any] = {"device": old.weight.device, "dtype": old.weight.dtype}
    new = skip_init(nn.Linear, len(inputs.live), old.out_features, **options)
    assert isinstance(new, nn.Linear)
    new.weight.copy_(old.weight[:, inputs.live])
    new.bias.copy_(bias(old) + old.weight.double() @ inputs.constant)
    return new, ["bias"] if old.bias is None else []


def bias(layer: nn.Conv2d | nn.Linear) -> Tensor:
    """The bias of a layer, zeros where it has none. (N,)"""
    return layer.weight.new_zeros(len(layer.weight)) if layer.bias is None else layer.bias


def without_inputs(layer: nn.Conv2d, keep: Tensor) -> Channels:
    """What the filters of a convolution write, those outside `keep` being zero: their bias."""
    return Channels(layer.out_channels, keep, bias(layer).detach().double().index_fill(0, keep, 0))


def _pads_zeros(conv: nn.Conv2d) -> bool:
    """Whether the kernel ever reaches into zeros around the image."""
    padding = (0, 0) if conv.padding == "valid" else conv.padding
    return conv.padding_mode == "zeros" and any(padding if isinstance(padding, tuple) else (1,))
