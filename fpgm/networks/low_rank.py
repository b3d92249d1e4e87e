"""Two convolutions of a rank in place of one: the layers; fpgm.compression finds the weights."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from fpgm.networks.layers import BorderConv2d, BorderMap, SameConv2d

TAI, ZHANG = "tai", "zhang"
WAYS = (TAI, ZHANG)


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
