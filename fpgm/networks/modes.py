"""How a network is run to be looked at: in eval mode, and without TF32."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import nn


def exact() -> contextlib.AbstractContextManager[None]:
    """Context without TF32, which keeps 10 bits of a product: too few to show networks equal, or to
    tell what rank a map has. It is torch's default for convolutions on a GPU."""
    flags: contextlib.AbstractContextManager[None] = torch.backends.cudnn.flags(
        enabled=True, allow_tf32=False
    )
    return flags


@contextlib.contextmanager
def evaluating(*models: nn.Module) -> Iterator[None]:
    """Eval mode inside; every module's own mode again afterwards."""
    modes = {module: module.training for model in models for module in model.modules()}
    try:
        for model in models:
            model.eval()
        yield
    finally:
        for module, training in modes.items():
            module.training = training


def dropping(model: nn.Module) -> str | None:
    """The first layer that is not torch's own and drops something at random in training (timm's
    DropPath, DropBlock), which a network that is traced in eval mode has not; None: there is
    none."""
    for name, module in model.named_modules():
        others = not type(module).__module__.startswith(("torch.nn", "fpgm"))
        drops = others and "drop" in type(module).__name__.lower()
        rates = [getattr(module, key, 0) for key in ("drop_prob", "p")]
        if drops and any(isinstance(rate, int | float) and rate > 0 for rate in rates):
            return str(name)
    return None
