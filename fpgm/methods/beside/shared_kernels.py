"""Shared kernels: all 3x3 kernels of a network become a few hundred, flipped and rotated.

What is on the disk then is the few, and for each place which of them and which way round. They go
on learning: a centre moves by the gradients of all places that show it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from fpgm.compression import kernels
from fpgm.compression.kernels import Shared
from fpgm.errors import Error
from fpgm.machine.ranks import from_first
from fpgm.methods.beside.ttq import called, unpruned
from fpgm.pruning.method import Goal, Method, Task

Count = Annotated[int, Field(ge=1, le=65_536, examples=["256"])]
Turns = Annotated[bool, Field(examples=["true"])]
Step = Annotated[Literal["mean", "sum"], Field(examples=["mean"])]


class SharedKernels(Method):
    """Before the first epoch the 3x3 kernels of all convolutions without groups are replaced by the
    nearest of `count` centres (k-means), in any of the eight flips and rotations if `turns`.

    step: sum, a centre has the gradient of all its kernels together; mean, divided by how many they
    are, which is the step that they would take on average.

    State: `which` and `turn`, of all kernels in the order of the layers.
    """

    name: ClassVar[str] = "shared_kernels"
    quantises = True

    def __init__(
        self, task: Task, *, count: Count = 256, turns: Turns = True, step: Step = "mean"
    ) -> None:
        """Raises Error where the network has no such kernels."""
        super().__init__(task)
        self._count, self._turns, self._averages = count, turns, step == "mean"
        size = (kernels.SIDE, kernels.SIDE)
        learning = [weight for _, weight in called(task) if weight.requires_grad]
        self._weights = [w for w in learning if w.dim() == 4 and w.shape[2:] == size]
        if not self._weights:
            raise Error(f"method={self.name}: the network has no 3x3 kernels to share")
        self._which = self._turn = self._first = torch.empty(0, dtype=torch.long)

    @classmethod
    def problems(cls, goal: Goal, from_scratch: bool) -> list[str]:
        if from_scratch:
            return [
                f"method={cls.name}: shares the kernels of a trained network, name it with "
                "pretrained=RUN_DIR (pretrained=True in Python)"
            ]
        return unpruned(cls.name, goal)

    @torch.no_grad()
    def start(self) -> None:
        rows = _rows(self._weights)
        self.task.say(f"{len(rows):,} kernels are grouped around {self._count} centres")
        # Sums on a GPU come out another way each time: all processes take what the first has found.
        found = None
        if self.task.ranks.first:
            shared = kernels.shared(rows, self._count, self.task.goal.rule.seed, self._turns)
            found = Shared(shared.centres.cpu(), shared.which.cpu(), shared.turn.cpu())
        found = from_first(found, self.task.ranks)
        assert found is not None
        self._keep(found.which, found.turn)
        self._write(found.kernels())
        lost = kernels.loss(rows.cpu(), found) / max(float(rows.double().square().sum()), 1e-300)
        self.task.say(
            f"{len(rows):,} kernels are {len(found.centres)} now, {100 * lost:.1f} % of their "
            "squares lost"
        )

    @torch.no_grad()
    def after_backward(self) -> None:
        """Each kernel is given its centre's gradient: the optimizer moves all of them alike."""
        gradients = []
        for weight in self._weights:
            assert weight.grad is not None
            gradients.append(weight.grad)
        now = self._now()
        sums = kernels.gathered(_rows(gradients), now)
        if self._averages:
            counts = torch.bincount(now.which, minlength=len(sums)).clamp(min=1)
            sums = sums / counts[:, None]
        _spread(kernels.turned(sums[now.which], now.turn), gradients)

    @torch.no_grad()
    def after_step(self) -> None:
        # Equal steps of equal numbers are equal but for the last bit, on some machines.
        self._write(self._now().kernels())

    def _now(self) -> Shared:
        """As the weights stand: each centre is what its first kernel is."""
        rows = kernels.turned_back(_rows(self._weights), self._turn)
        return Shared(rows[self._first], self._which, self._turn)

    def _keep(self, which: Tensor, turn: Tensor) -> None:
        """Remember which kernel shows which centre, and the first of each centre's."""
        device = self._weights[0].device
        self._which, self._turn = which.to(device), turn.to(device)
        places = torch.arange(len(which), device=device)
        count = int(which.max()) + 1
        first = torch.full((count,), len(which), device=device)
        # A centre that no kernel shows has none, and takes part in nothing.
        first.scatter_reduce_(0, self._which, places, "amin")
        self._first = first.clamp(max=len(which) - 1)

    def _write(self, rows: Tensor) -> None:
        _spread(rows, self._weights)

    def closing(self, small: nn.Module) -> dict[str, Any]:
        """kernels: how many there are; different: of these, but for flips and rotations; bits: what
        they take by 288 K + n (log2 K + log2 |T|)."""
        count, places = len(self._which.unique()), len(self._which)
        bits = kernels.bits(count, places, self._turns)
        said = f"{places:,} kernels show {count} different ones, {-(-bits // 8):,} bytes"
        return {"kernels": places, "different": count, "bits": bits, "said": said}

    def state(self) -> dict[str, Any]:
        return {"which": self._which, "turn": self._turn}

    def resume(self, state: Mapping[str, Any]) -> None:
        self._keep(state["which"], state["turn"])


def _rows(weights: list[Any]) -> Tensor:
    """(N, C, 3, 3) each -> (n, 9), one below the other."""
    return torch.cat([weight.detach().reshape(-1, kernels.SIDE**2) for weight in weights])


def _spread(rows: Tensor, weights: list[Any]) -> None:
    """Write what `_rows` gives."""
    sizes = [weight.numel() // kernels.SIDE**2 for weight in weights]
    for weight, part in zip(weights, rows.split(sizes), strict=True):
        weight.copy_(part.view(weight.shape))
