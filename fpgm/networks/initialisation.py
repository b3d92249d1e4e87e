"""How a network starts, as the papers' code starts it."""

from __future__ import annotations

import math
from collections.abc import Callable

from torch import Tensor, nn


def start(
    network: nn.Module, *, scale: float = 1.0, linear: Callable[[Tensor], Tensor] | None = None
) -> None:
    """Draw the weights of a network anew, in place.

    Convolutions are N(0, sqrt(2 / (kH kW N))) (He et al., 2015, by the filters), the scales of
    BatchNorm2d are `scale`; linear: what draws the weight of a linear layer, whose bias is then 0,
    None: as torch does.
    """
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            fan_out = module.kernel_size[0] * module.kernel_size[1] * module.out_channels
            nn.init.normal_(module.weight, 0, math.sqrt(2 / fan_out))
        elif isinstance(module, nn.BatchNorm2d):
            nn.init.constant_(module.weight, scale)
        elif isinstance(module, nn.Linear) and linear is not None:
            linear(module.weight)
            nn.init.zeros_(module.bias)
