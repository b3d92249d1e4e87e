"""Filters that are to go fade away, step by step (after HESSO, Chen et al., 2024)."""

from __future__ import annotations

import math
from typing import Annotated, Any, ClassVar

from pydantic import Field

from fpgm.graph.flow import tails
from fpgm.graph.trace import trace
from fpgm.methods.schedules.papers import Hard
from fpgm.pruning.method import Task
from fpgm.pruning.silence import Silence
from fpgm.pruning.zeroing import Recalibrate

Duration = Annotated[float, Field(ge=0, le=1, examples=["0.3"])]


class Fade(Hard):
    """Selected once on a trained network; from then on, after each of D steps t = 0, 1, ..., the
    filters to go are multiplied by (D - t - 1) / (D - t), together with the scale and shift behind
    them: a straight line to exactly 0. The rest of the training holds them there.

    duration: the share of all steps that D is; at 0 all of it happens before the first.
    """

    name: ClassVar[str] = "fade"
    silences: ClassVar[bool] = True
    at_once: ClassVar[bool] = False

    def __init__(
        self,
        task: Task,
        *,
        duration: Duration = 0.3,
        recalibrate: Recalibrate = 0,
        train_compact: bool = True,
    ) -> None:
        super().__init__(task, recalibrate=recalibrate, train_compact=train_compact)
        self._steps = math.ceil(duration * task.epochs * task.steps)
        self._tails = tails(trace(self._model, task.image))
        self._taken = 0

    def start(self) -> None:
        self._refuse_ties(self._choose(1.0))
        if not self._steps:
            self._vanish()

    def masked(self, epoch: int) -> bool:
        return self._taken >= self._steps

    def before_epoch(self, epoch: int) -> None:
        super().before_epoch(epoch)
        self._silence = Silence(self._masks, self._tails, self.task.trained)

    def after_backward(self) -> None:
        super().after_backward()
        if self._taken >= self._steps:
            self._silence.still()

    def after_step(self) -> None:
        if self._taken < self._steps:
            self._silence.scale((self._steps - self._taken - 1) / (self._steps - self._taken))
        self._taken += 1

    def after_epoch(self, epoch: int) -> dict[str, Any]:
        gone = self._masked
        columns = super().after_epoch(epoch)
        return columns if gone else {**columns, "revived": 0}  # they are on their way

    def enforce(self, epoch: int, chosen: bool) -> bool:
        return False  # the steps have done it

    def finish(self) -> None:
        if self._taken < self._steps:  # of a loop that was ended before
            self._vanish()
        super().finish()

    def _vanish(self) -> None:
        Silence(self._masks, self._tails, self.task.full).scale(0.0)

    def state(self) -> dict[str, Any]:
        return {**super().state(), "taken": self._taken}

    def resume(self, state: Any) -> None:
        super().resume(state)
        self._taken = state["taken"]
