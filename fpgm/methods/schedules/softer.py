"""Softer than soft: what is selected is weakened after every epoch, less and less of it left, and
only in the end zeroed (SRFP and ASRFP, Cai et al., 2020)."""

from __future__ import annotations

import math
from typing import Annotated, ClassVar

import torch
from pydantic import Field

from fpgm.methods.schedules.papers import Asymptotic, Soft
from fpgm.networks.weights import weight_of
from fpgm.pruning.method import Task
from fpgm.pruning.settling import Settle, Share
from fpgm.pruning.zeroing import Interval, Recalibrate, Zeroing

Start = Annotated[float, Field(ge=0, le=1, examples=["1.0"])]
Decay = Annotated[float, Field(ge=0, le=50, examples=["0", "5"])]


class _Weakening(Zeroing):
    """In place of zeroing, filters that are selected are multiplied by alpha, which is 0 from the
    last selection on."""

    at_once: ClassVar[bool] = False
    _from: float
    _decay: float

    def left(self, done: int) -> float:
        """alpha after so many epochs."""
        end = self.settling.epoch
        return left(done, self.task.epochs if end is None else end, self._from, self._decay)

    def start(self) -> None:
        share = self.share_before()
        if share is not None:
            self._refuse_ties(self._choose(share))
            self._weaken(self.left(0))
            self._clear_momentum()

    def enforce(self, epoch: int, chosen: bool) -> bool:
        factor = 0.0 if self.last(epoch) else self.left(epoch + 1)
        if factor == 0:
            return super().enforce(epoch, chosen)
        changed = chosen and factor < 1 and any(bool(mask.any()) for mask in self._masks.values())
        if changed:
            self._weaken(factor)
        if chosen and self._reset_momentum:
            self._clear_momentum()
        return changed

    @torch.no_grad()
    def _weaken(self, factor: float) -> None:
        for name, mask in self._masks.items():
            weight = weight_of(self._model, name)
            # Zero as soft has it, and not the minus zero of a negative weight.
            weight[mask] = weight[mask] * factor if factor else 0.0


class Softer(_Weakening, Soft):
    """SRFP: soft, but filters that are selected after epoch t are multiplied by alpha(t), which
    falls to 0 with the last selection (see `left`). With start=0 it is soft.

    start: alpha before the first epoch; decay: how fast it falls, 0: on a straight line; the rest
    as in Soft.
    """

    name: ClassVar[str] = "softer"

    def __init__(
        self,
        task: Task,
        *,
        start: Start = 1.0,
        decay: Decay = 0.0,
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
        self._from, self._decay = start, decay


class SofterAsymptotic(_Weakening, Asymptotic):
    """ASRFP: softer, at a rate that grows to the one asked for as in ASFP."""

    name: ClassVar[str] = "softer_asymptotic"

    def __init__(
        self,
        task: Task,
        *,
        start: Start = 1.0,
        decay: Decay = 0.0,
        interval: Interval = 1,
        reset_momentum: bool = False,
        settle: Settle = 1.0,
        latest: Share = 0.6,
        recalibrate: Recalibrate = 0,
        train_compact: bool = True,
    ) -> None:
        """Raises Error."""
        super().__init__(
            task, interval=interval, reset_momentum=reset_momentum, settle=settle, latest=latest,
            recalibrate=recalibrate, train_compact=train_compact,
        )  # fmt: skip
        self._from, self._decay = start, decay


def left(t: int, end: int, start: float = 1.0, decay: float = 0.0) -> float:
    """alpha(t) = start (e^(-kt/T) - e^(-k)) / (1 - e^(-k)) after t of T epochs, k the decay: from
    start at t = 0 to 0 at T, with k = 0 the line start (1 - t/T). Ours: of the papers' only its
    ends are certain."""
    if t >= end:
        return 0.0
    share = 1 - t / end
    if decay == 0:
        return start * share
    fallen = math.expm1(-decay * share) / math.expm1(-decay)
    return start * math.exp(-decay * t / end) * fallen
