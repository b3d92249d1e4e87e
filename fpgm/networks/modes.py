"""How a network is run to be looked at: in eval mode, and without TF32."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from functools import partial

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
        kind = type(module).__name__.lower()
        drops = others and ("drop" in kind or "stochastic" in kind)
        rates = [getattr(module, key, 0) for key in ("drop_prob", "p")]
        if drops and any(isinstance(rate, int | float) and rate > 0 for rate in rates):
            return str(name)
    return None


def partly_read(model: nn.Module, image: tuple[int, int, int]) -> str | None:
    """The first depthwise convolution of which some taps meet nothing but padding on images of
    (C, H, W), None where there is none."""
    names: list[str] = []

    def look(name: str, conv: nn.Conv2d, inputs: tuple[torch.Tensor, ...], y: torch.Tensor) -> None:
        sides = zip(inputs[0].shape[2:], y.shape[2:], conv.kernel_size, strict=True)
        for side, (pixels, outputs, taps) in enumerate(sides):
            pad = conv.padding[side] if not isinstance(conv.padding, str) else taps // 2
            first = [at * conv.stride[side] - int(pad) for at in range(outputs)]
            reads = {t for t in range(taps) for at in first if 0 <= at + t < pixels}
            if conv.groups > 1 and len(reads) < taps:
                names.append(name)

    convolutions = [(n, m) for n, m in model.named_modules() if isinstance(m, nn.Conv2d)]
    hooks = [conv.register_forward_hook(partial(look, name)) for name, conv in convolutions]
    try:
        with evaluating(model), torch.inference_mode():
            model(torch.zeros(1, *image, device=next(model.parameters()).device))
    finally:
        for hook in hooks:
            hook.remove()
    return next(iter(names), None)
