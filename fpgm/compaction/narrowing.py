"""One layer with fewer channels: the parts of a compact network."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import skip_init

from fpgm.compaction.constants import Channels, bias, groups_of, pads_zeros
from fpgm.networks.layers import BorderConv2d, SameConv2d


def convolution(
    old: nn.Conv2d, inputs: Channels, kept: Tensor, emitted: Tensor, carrier: int | None
) -> tuple[nn.Conv2d, list[str]]:
    """The filters `emitted` over the live inputs, and what its absent inputs add folded in.

    Filters that are emitted but not `kept` are zero. Also returns the attributes that hold
    nothing but folded constants. Zeros around the image make a constant differ at the borders:
    then it goes into the weight of the input `carrier`, that is itself constant, where there is
    one, and else becomes a map; without such zeros it becomes a bias.
    """
    bordered = not inputs.whole and pads_zeros(old)
    folded = not inputs.whole and not bordered
    options: dict[str, Any] = {k: getattr(old, k) for k in ("stride", "padding", "dilation")}
    groups = groups_of(old, emitted)
    new = skip_init(
        BorderConv2d if bordered else type(old),
        len(inputs.live),
        len(emitted),
        kernel_size=old.kernel_size,
        groups=len(groups),
        bias=old.bias is not None or folded,
        padding_mode=old.padding_mode,
        device=old.weight.device,
        dtype=old.weight.dtype,
        **options,
    )
    assert isinstance(new, nn.Conv2d)
    alive = torch.isin(emitted, kept)[:, None, None, None]
    weight = old.weight[emitted] * alive
    # The inputs that each filter reads: those of its group, and of these the live ones.
    size, own = old.in_channels // old.groups, emitted // (old.out_channels // old.groups)
    read = own[:, None] * size + torch.arange(size, device=own.device)
    live = inputs.live.view(len(groups), -1)[torch.searchsorted(groups, own)] - read[:, :1]
    new.weight.copy_(weight.gather(1, live[:, :, None, None].expand(-1, -1, *old.kernel_size)))
    # What the absent inputs add at each place of the kernel; a pixel inside gets the sum of these.
    absent = inputs.absent[read][:, :, None, None]
    kernel = (weight.double() * absent).sum(1, keepdim=True)
    if new.bias is not None:
        new.bias.copy_(bias(old)[emitted] + (kernel.sum((1, 2, 3)) if folded else 0))
    if bordered:
        if carrier is not None:
            # It is padded with the same zeros, so its weight has the borders right, too.
            value = inputs.constant[inputs.live[carrier]]
            new.weight[:, carrier] += (kernel[:, 0] / value).to(old.weight.dtype)
            kernel = torch.zeros_like(kernel)
        new.register_buffer("border", kernel.to(old.weight.dtype))
        new.same = isinstance(old, SameConv2d)  # type: ignore[assignment]
        return new, ["border"]
    return new, ["bias"] if folded and old.bias is None else []


def depthwise(old: nn.Conv2d, kept: Tensor, emitted: Tensor) -> nn.Conv2d:
    """The filters `emitted` of a depthwise convolution, over as many inputs; zero if not kept."""
    new = copy.deepcopy(old)
    new.in_channels = new.out_channels = new.groups = len(emitted)
    alive = torch.isin(emitted, kept)[:, None, None, None]
    new.weight = nn.Parameter(old.weight[emitted] * alive)
    if old.bias is not None:
        new.bias = nn.Parameter(old.bias[emitted].clone())
    return new


def norm(old: nn.BatchNorm1d | nn.BatchNorm2d, inputs: Channels) -> nn.BatchNorm1d | nn.BatchNorm2d:
    """A BatchNorm of the live inputs."""
    new = copy.deepcopy(old)
    new._modules.clear()  # an activation that it had with it is called by itself
    new.num_features = len(inputs.live)
    tensors = (*old.named_parameters(recurse=False), *old.named_buffers(recurse=False))
    for name, tensor in tensors:
        if tensor.dim() == 1:
            getattr(new, name).data = tensor.data[inputs.live].clone()
    return new


def linear(
    old: nn.Linear, inputs: Channels, kept: Tensor, emitted: Tensor
) -> tuple[nn.Linear, list[str]]:
    """The outputs `emitted` over the live inputs, zero if not `kept`, constants folded into the
    bias. Returns as convolution."""
    if inputs.whole and len(kept) == old.out_features:
        return copy.deepcopy(old), []
    options: dict[str, Any] = {"device": old.weight.device, "dtype": old.weight.dtype}
    folded = not inputs.whole
    options["bias"] = folded or old.bias is not None
    new = skip_init(nn.Linear, len(inputs.live), len(emitted), **options)
    assert isinstance(new, nn.Linear)
    weight = old.weight[emitted] * torch.isin(emitted, kept)[:, None]
    new.weight.copy_(weight[:, inputs.live])
    if new.bias is not None:
        new.bias.copy_(bias(old)[emitted] + weight.double() @ inputs.absent)
    return new, ["bias"] if old.bias is None and folded else []


def slope(old: nn.PReLU, inputs: Channels) -> nn.PReLU:
    """A PReLU of the live inputs."""
    new = copy.deepcopy(old)
    new.num_parameters = len(inputs.live)
    new.weight = nn.Parameter(old.weight[inputs.live].clone())
    return new
