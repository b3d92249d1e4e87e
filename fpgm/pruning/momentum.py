"""What an optimizer remembers of a weight, and goes on moving it by when no gradient comes."""

from __future__ import annotations

import torch
from torch import Tensor


def remembered(optimizer: torch.optim.Optimizer, parameter: Tensor) -> list[Tensor]:
    """A value for each entry of a parameter: SGD's momentum, Adam's first and second moments, ...;
    nothing before the first step. In the parameter's shape, to be changed in place."""
    state = optimizer.state.get(parameter, {})
    values = state.values() if isinstance(state, dict) else ()
    return [v for v in values if isinstance(v, Tensor) and v.shape == parameter.shape]
