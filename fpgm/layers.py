"""The layers that a compact network has beyond torch's own."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class BorderConv2d(nn.Conv2d):
    """A zero-padded convolution some of whose input channels are constants.

    What the constants contribute differs only where the kernel reaches into the padding, and does
    not depend on the image: `border` (N, 1, kH, kW), their weights times their values, is applied
    once for each batch to an image of ones. None: all of them are zero.
    """

    border: Tensor | None

    def forward(self, x: Tensor) -> Tensor:
        out = super().forward(x)
        if self.border is None:
            return out
        ones = x.new_ones(1, 1, x.shape[2], x.shape[3])
        return out + F.conv2d(ones, self.border, None, self.stride, self.padding, self.dilation)


class Expand(nn.Module):
    """Put each channel at its place among `width` channels; the others are constants.

    positions: (C,) where the input's channels go. constant: (width,), None: all zero. An input
    that was flattened, (B, C * run), is expanded run by run.
    """

    positions: Tensor
    constant: Tensor | None

    def __init__(self, positions: Tensor, width: int, constant: Tensor) -> None:
        super().__init__()
        self.width = width
        # The positions follow from the filters that were kept: no need to store them.
        self.register_buffer("positions", positions, persistent=False)
        self.register_buffer("constant", constant)

    def forward(self, x: Tensor) -> Tensor:
        runs = x.unflatten(1, (len(self.positions), -1)) if x.dim() == 2 else x.unsqueeze(2)
        shape = (x.shape[0], self.width, *runs.shape[2:])
        wide = torch.zeros(shape, dtype=x.dtype, device=x.device).index_copy(
            1, self.positions, runs
        )
        if self.constant is not None:
            wide = wide + self.constant.view(1, -1, *[1] * (wide.dim() - 2))
        return wide.flatten(1, 2)


class Pick(nn.Module):
    """Some of the channels. indices: (n,) of the input's."""

    indices: Tensor

    def __init__(self, indices: Tensor) -> None:
        super().__init__()
        self.register_buffer("indices", indices, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return x.index_select(1, self.indices)
