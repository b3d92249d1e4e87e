"""Incremental network quantisation (INQ, Zhou et al., ICLR 2017): weights become powers of two.

A share of each layer's weights, the largest first, is rounded to 0 or to plus or minus a power of
two and stays so, while the others learn to make up for it; the share grows until none is left.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn

from fpgm.networks.weights import weights_of
from fpgm.pruning.method import Goal, Method, Task
from fpgm.pruning.momentum import remembered

Bits = Annotated[int, Field(ge=2, le=8, examples=["5"])]
Shares = Annotated[list[float], Field(examples=["[0.5,0.75,0.875,1]"])]


class INQ(Method):
    """Rounds the weights of all convolutions and linear layers, step by step.

    bits: of a weight, which has one of 2^(bits - 1) + 1 values; shares: of a layer's weights that
    are rounded by then, those that are zero not counted. The steps but the last divide the epochs
    evenly; the last, after the last epoch, leaves nothing that could still learn.

    State: by layer, `rounded`, which weights (in the weight's shape), and `top`, the exponent of
    the largest value, by the weights that the run starts with.
    """

    name: ClassVar[str] = "inq"
    quantises = True

    def __init__(
        self,
        task: Task,
        *,
        bits: Bits = 5,
        shares: Shares = [0.5, 0.75, 0.875, 1.0],  # noqa: B006
    ) -> None:
        super().__init__(task)
        self._bits, self._shares = bits, list(shares)
        self._rounded: dict[str, Tensor] = {}
        self._top: dict[str, int] = {}
        self._held: list[tuple[Tensor, Tensor, Tensor]] = []  # weight, which, their values

    @classmethod
    def problems(cls, goal: Goal, from_scratch: bool) -> list[str]:
        if from_scratch:
            return [
                f"method={cls.name}: rounds the weights of a trained network, name it with "
                "pretrained=RUN_DIR (pretrained=True in Python)"
            ]
        return []

    @classmethod
    def check(cls, options: Mapping[str, Any], prefix: str) -> list[str]:
        problems = super().check(options, prefix)
        shares = options.get("shares", [1.0])
        if not problems and not (
            shares and shares[0] > 0 and shares[-1] == 1 and shares == sorted(set(shares))
        ):
            problems.append(
                f"{prefix}shares={shares}: shares of the weights, rising from above 0 to 1, for "
                "example [0.5,0.75,0.875,1]"
            )
        return problems

    def start(self) -> None:
        for name, weight in weights_of(self.task.full.network).items():
            self._rounded[name] = torch.zeros_like(weight, dtype=torch.bool)
            self._top[name] = top_exponent(weight)

    def share_during(self, epoch: int) -> float:
        """Of the weights that are rounded while `epoch` is trained."""
        steps = len(self._shares) - 1
        done = [
            share
            for step, share in enumerate(self._shares[:-1])
            if step * self.task.epochs // steps <= epoch
        ]
        return done[-1] if done else 0.0

    def before_epoch(self, epoch: int) -> None:
        self._round(self.share_during(epoch))

    @torch.no_grad()
    def _round(self, share: float) -> None:
        """Round so many, and again those that were: a schedule may have changed them since."""
        self._held = []
        for name, weight in weights_of(self.task.full.network).items():
            which = largest(weight, self._rounded[name].to(weight.device), share)
            values = power_of_two(weight, self._top[name], self._bits)
            torch.where(which, values, weight, out=weight.data)
            self._rounded[name] = which
            self._held.append((weight, which, values))

    @torch.no_grad()
    def after_backward(self) -> None:
        for weight, which, _ in self._held:
            if weight.grad is not None:
                weight.grad.masked_fill_(which, 0)

    @torch.no_grad()
    def after_step(self) -> None:
        # Decay and momentum move what has no gradient, too.
        for weight, which, values in self._held:
            torch.where(which, values, weight, out=weight.data)
            for value in remembered(self.task.full.optimizer, weight):
                value.masked_fill_(which, 0)

    def after_epoch(self, epoch: int) -> dict[str, Any]:
        if epoch < self.task.epochs - 1:
            return {}
        self._round(1.0)
        return {"changed": True}

    def finish(self) -> None:
        self._round(1.0)  # whatever the schedule has done at the end, and without any epoch

    def closing(self, small: nn.Module) -> dict[str, Any]:
        """bits; weights of the compact network; exact: how many of them are 0 or a power of two."""
        weights = [weight.detach() for weight in weights_of(small).values()]
        count = sum(weight.numel() for weight in weights)
        exact = sum(int(is_power_of_two(weight).sum()) for weight in weights)
        said = f"{exact:,} of {count:,} weights are 0 or a power of two"
        return {"bits": self._bits, "weights": count, "exact": exact, "said": said}

    def state(self) -> dict[str, Any]:
        return {"rounded": dict(self._rounded), "top": dict(self._top)}

    def resume(self, state: Mapping[str, Any]) -> None:
        self._rounded, self._top = dict(state["rounded"]), dict(state["top"])


def top_exponent(weight: Tensor) -> int:
    """n1 = floor(log2(4 s / 3)), s the largest |w|: that of the largest value (INQ, eq. 2). -1
    for zeros."""
    mantissa, exponent = torch.frexp(weight.detach().abs().max())
    return int(exponent) - int(mantissa < 0.75)


def power_of_two(weight: Tensor, top: int, bits: int) -> Tensor:
    """Each weight as the nearest of 0, +-2^n2 .. +-2^n1, n1 = top, n2 = n1 + 1 - 2^(bits - 2): beta
    for (alpha + beta) / 2 <= |w| < 3 beta / 2, alpha < beta neighbours (INQ, eq. 1 and 4)."""
    # |w| = m 2^e with m in [1/2, 1): 2^e from three quarters of it on, else 2^(e - 1).
    mantissa, exponent = torch.frexp(weight.detach())
    exponent = exponent - (mantissa.abs() < 0.75).to(exponent.dtype)
    least = top + 1 - 2 ** (bits - 2)
    sizes = torch.ldexp(torch.ones_like(weight), exponent.clamp(least, top))
    zero = weight.detach().abs() < 2.0 ** (least - 1)
    return torch.where(zero, torch.zeros_like(sizes), sizes * weight.detach().sign())


def is_power_of_two(weight: Tensor) -> Tensor:
    """Where a weight is 0 or plus or minus a power of two."""
    return (weight == 0) | (torch.frexp(weight).mantissa.abs() == 0.5)


def largest(weight: Tensor, before: Tensor, share: float) -> Tensor:
    """Which weights are rounded once `share` of those that are not zero are: those of `before`,
    then the largest, of equal ones the first. A mask in the weight's shape; at 1 all of it."""
    if share >= 1:
        return torch.ones_like(before)
    sizes = weight.detach().abs().masked_fill(before, torch.inf).flatten()
    count = math.ceil(share * int((sizes > 0).sum()) - 1e-9)
    order = sizes.argsort(descending=True, stable=True)
    which = before.flatten().clone()
    which[order[:count]] = True
    return which.view_as(before)
