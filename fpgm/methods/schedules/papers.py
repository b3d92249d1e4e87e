"""The papers' schedules: when to prune, how hard, and whether pruned filters may move."""

from __future__ import annotations

import math
from typing import Any, ClassVar

from fpgm.errors import Error
from fpgm.pruning.method import Goal, Task
from fpgm.pruning.settling import Settle, Share
from fpgm.pruning.zeroing import Interval, Recalibrate, Zeroing


class Frozen(Zeroing):
    """The published FPGM code: zeroed before the first epoch, selected and zeroed again after every
    epoch, and the gradients of pruned filters masked."""

    name: ClassVar[str] = "frozen"

    def masked(self, epoch: int) -> bool:
        return True


class Soft(Zeroing):
    """The published SFP code: as frozen, but pruned filters go on learning until they are zeroed
    again. With zero_at_start=false (schedule=printed) SFP and FPGM's Algorithm 1 as printed."""

    name: ClassVar[str] = "soft"

    def __init__(
        self,
        task: Task,
        *,
        interval: Interval = 1,
        zero_at_start: bool = True,
        reset_momentum: bool = False,
        settle: Settle = 1.0,
        latest: Share = 0.6,
        recalibrate: Recalibrate = 0,
        train_compact: bool = True,
    ) -> None:
        super().__init__(
            task, interval=interval, zero_at_start=zero_at_start, reset_momentum=reset_momentum,
            settle=settle, latest=latest, recalibrate=recalibrate, train_compact=train_compact,
        )  # fmt: skip


class Asymptotic(Zeroing):
    """ASFP: soft, at a rate that grows to the one asked for."""

    name: ClassVar[str] = "asymptotic"

    def __init__(
        self,
        task: Task,
        *,
        interval: Interval = 1,
        reset_momentum: bool = False,
        settle: Settle = 1.0,
        latest: Share = 0.6,
        recalibrate: Recalibrate = 0,
        train_compact: bool = True,
    ) -> None:
        """Raises Error."""
        if settle == "auto":
            raise Error(
                f"schedule.settle=auto: with schedule={self.name} the rate grows to the end, and "
                "the selection with it; schedule.settle=0.6, or schedule=soft"
            )
        super().__init__(
            task, interval=interval, zero_at_start=False, reset_momentum=reset_momentum,
            settle=settle, latest=latest, recalibrate=recalibrate, train_compact=train_compact,
        )  # fmt: skip

    def share_after(self, epoch: int) -> float | None:
        share = super().share_after(epoch)
        if share is None or self.last(epoch):
            return share
        return asymptotic(epoch, self.task.epochs - 1, 1.0)


class Hard(Zeroing):
    """PFEC: selected once on a trained network, then fine-tuned with pruned filters at zero."""

    name: ClassVar[str] = "hard"

    def __init__(
        self, task: Task, *, recalibrate: Recalibrate = 0, train_compact: bool = True
    ) -> None:
        super().__init__(task, recalibrate=recalibrate, train_compact=train_compact)

    def share_after(self, epoch: int) -> float | None:
        return None

    def masked(self, epoch: int) -> bool:
        return True

    @property
    def settled_at(self) -> dict[str, Any] | None:
        return {"epoch": 0, "at_rest": None}

    @classmethod
    def problems(cls, goal: Goal, from_scratch: bool) -> list[str]:
        if goal.prunes and from_scratch:
            line = f"schedule={cls.name}: prunes a trained network, name it with pretrained=RUN_DIR"
            return [f"{line} (pretrained=True in Python)"]
        return []


def asymptotic(t: float, last: float, rate: float) -> float:
    """ASFP's curve P(t) = b (1 - e^(-kt)) through (0, 0), (last / 8, 3/4 rate) and (last, rate).

    With x = e^(-k last / 8) the three points say (1 - x) / (1 - x^8) = 3/4: k last = 11.08999.
    """
    if last <= 0:
        return rate
    x = 0.25
    for _ in range(50):
        x = 0.25 + 0.75 * x**8
    decay = -8 * math.log(x)
    return rate * (1 - math.exp(-decay * t / last)) / (1 - math.exp(-decay))
