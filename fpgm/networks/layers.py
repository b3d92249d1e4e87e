"""The layers that a compact network has beyond torch's own."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

TAI, ZHANG = "tai", "zhang"
WAYS = (TAI, ZHANG)  # of a low rank: by the weights, by the responses


class SameConv2d(nn.Conv2d):
    """A convolution padded with zeros as TensorFlow does: ceil(size / stride) pixels come out,
    whatever the kernel; where the zeros cannot be shared the lower and the right side get more."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(padded(x, self))


class BorderConv2d(nn.Conv2d):
    """A zero-padded convolution some of whose input channels are constants.

    What the constants contribute differs only where the kernel reaches into the padding, and does
    not depend on the image: `border` (N, 1, kH, kW), their weights times their values, is applied
    once for each batch to an image of ones. None: all of them are zero. same: padded as a
    SameConv2d.
    """

    border: Tensor | None
    same = False

    def forward(self, x: Tensor) -> Tensor:
        out = super().forward(padded(x, self) if self.same else x)
        return out if self.border is None else out + _of_ones(x, self)


class BorderMap(nn.Module):
    """What `border` says alone, beside a convolution that others compute: as in a BorderConv2d, of
    which it has the geometry. (B, C, H, W) -> (1, N, H', W')."""

    border: Tensor

    def __init__(self, conv: BorderConv2d) -> None:
        super().__init__()
        assert conv.border is not None
        self.register_buffer("border", conv.border.clone())
        self.kernel_size, self.stride, self.padding = conv.kernel_size, conv.stride, conv.padding
        self.dilation, self.same = conv.dilation, conv.same

    def forward(self, x: Tensor) -> Tensor:
        return _of_ones(x, self)


def _of_ones(x: Tensor, layer: Any) -> Tensor:
    """A layer's `border` over an image of ones as large as x."""
    ones = x.new_ones(1, 1, x.shape[2], x.shape[3])
    ones = padded(ones, layer) if layer.same else ones
    return F.conv2d(ones, layer.border, None, layer.stride, layer.padding, layer.dilation)


def padded(x: Tensor, conv: nn.Conv2d | BorderMap) -> Tensor:
    """Zeros around (B, C, H, W) until the convolution gives ceil(size / stride) pixels."""
    pad: list[int] = []
    for place in (1, 0):  # F.pad begins with the last dimension
        size, stride = x.shape[2 + place], conv.stride[place]
        reach = (conv.kernel_size[place] - 1) * conv.dilation[place] + 1
        more = max((-(-size // stride) - 1) * stride + reach - size, 0)
        pad += [more // 2, more - more // 2]
    return F.pad(x, pad)


class Expand(nn.Module):
    """Put each channel at its place among `width` channels; the others are constants.

    positions: (C,) where the input's channels go. constant: (width,), None: all zero. An input
    that was flattened, (B, C * run), is expanded run by run.
    """

    source: Tensor
    constant: Tensor | None

    def __init__(self, positions: Tensor, width: int, constant: Tensor) -> None:
        super().__init__()
        self.channels = len(positions)
        # Read from a tensor with one zero channel behind its own: a gather is several times faster
        # than a scatter. It follows from the filters that were kept: no need to store it.
        source = torch.full((width,), len(positions), device=positions.device)
        source[positions] = torch.arange(len(positions), device=positions.device)
        self.register_buffer("source", source, persistent=False)
        self.register_buffer("constant", constant)

    def forward(self, x: Tensor) -> Tensor:
        runs = x.unflatten(1, (self.channels, -1)) if x.dim() == 2 else x
        zero = [0, 0] * (runs.dim() - 2) + [0, 1]
        wide = F.pad(runs, zero).index_select(1, self.source)
        if self.constant is not None:
            wide = wide + self.constant.view(1, -1, *[1] * (wide.dim() - 2))
        return wide.flatten(1) if x.dim() == 2 else wide


class Pick(nn.Module):
    """Some of the channels. indices: (n,) of the input's."""

    indices: Tensor

    def __init__(self, indices: Tensor) -> None:
        super().__init__()
        self.register_buffer("indices", indices, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return x.index_select(1, self.indices)


class Bordered(nn.Module):
    """Two convolutions in place of a BorderConv2d, and beside them what its constants say."""

    def __init__(self, pair: nn.Sequential, outside: BorderMap) -> None:
        super().__init__()
        self.pair, self.outside = pair, outside

    def forward(self, x: Tensor) -> Tensor:
        return self.pair(x) + self.outside(x)  # type: ignore[no-any-return]


def pair(conv: nn.Conv2d, rank: int, way: str) -> nn.Module:
    """Layers `first` and `second` that stand for a convolution (N, C, kH, kW) without groups, in a
    Bordered where it has a map of constants. Their weights are as torch starts them.

    tai: (K, C, kH, 1), then (N, K, 1, kW), each with the stride, padding and dilation of its
    direction (Tai et al., ICLR 2016); zhang: (K, C, kH, kW), then (N, K, 1, 1) (Zhang et al.).
    """
    kind = SameConv2d if getattr(conv, "same", isinstance(conv, SameConv2d)) else nn.Conv2d
    about: dict[str, Any] = {"device": conv.weight.device, "dtype": conv.weight.dtype}
    usual: dict[str, Any] = {"padding_mode": conv.padding_mode, **about}
    geometry = {k: getattr(conv, k) for k in ("kernel_size", "stride", "dilation", "padding")}
    inputs, outputs, biased = conv.in_channels, conv.out_channels, conv.bias is not None
    if way == ZHANG:
        first = kind(inputs, rank, bias=False, **geometry, **usual)
        second: nn.Conv2d = nn.Conv2d(rank, outputs, 1, bias=True, **about)
    else:
        down, along = ({k: _along(v, axis, k) for k, v in geometry.items()} for axis in (0, 1))
        first = kind(inputs, rank, bias=False, **down, **usual)
        second = kind(rank, outputs, bias=biased, **along, **usual)
    both = nn.Sequential(OrderedDict(first=first, second=second))
    if isinstance(conv, BorderConv2d) and conv.border is not None:
        return Bordered(both, BorderMap(conv))
    return both


def _along(value: Any, axis: int, key: str) -> Any:
    """A kernel size, stride, dilation or padding in one direction, and none in the other."""
    if isinstance(value, str):
        return value
    none = 0 if key == "padding" else 1
    return tuple(v if place == axis else none for place, v in enumerate(value))


def split(network: nn.Module, ranks: Mapping[str, int], way: str) -> None:
    """Put a pair of layers, see `pair`, in the place of each convolution that is named."""
    for name, rank in ranks.items():
        conv = network.get_submodule(name)
        assert isinstance(conv, nn.Conv2d)
        network.set_submodule(name, pair(conv, rank, way))
