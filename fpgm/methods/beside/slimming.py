"""Network Slimming's penalty (Liu et al., ICCV 2017): BatchNorm scales are trained towards zero."""

from __future__ import annotations

from typing import Annotated, ClassVar

import torch
from pydantic import Field
from torch import nn

from fpgm.pruning.method import Method, Task

Strength = Annotated[float, Field(ge=0, examples=["1e-4"])]


class Slimming(Method):
    """Adds strength * sign(gamma), a subgradient of the L1 norm, to the gradient of every scale."""

    name: ClassVar[str] = "slimming"

    def __init__(self, task: Task, *, strength: Strength = 1e-4) -> None:
        super().__init__(task)
        self._strength = strength

    def before_epoch(self, epoch: int) -> None:
        modules = self.task.trained.network.modules()
        norms = [m for m in modules if isinstance(m, nn.BatchNorm2d) and m.affine]
        self._scales = [norm.weight for norm in norms]

    @torch.no_grad()
    def after_backward(self) -> None:
        for scale in self._scales:
            assert scale.grad is not None
            scale.grad.add_(scale.sign(), alpha=self._strength)
