"""Filters go a few at a time, chosen anew each time, with steps of training between."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from fpgm.machine.ranks import from_first
from fpgm.methods.schedules.papers import Hard
from fpgm.pruning.method import Task
from fpgm.pruning.watch import Watch
from fpgm.pruning.zeroing import Keep, Recalibrate, Scores
from fpgm.selection.rule import Rule
from fpgm.selection.zero import pruned, zero_

Every = Annotated[int, Field(ge=1, examples=["30"])]
Duration = Annotated[float, Field(gt=0, le=1, examples=["0.5"])]


class Iterative(Hard):
    """The loop of Molchanov et al. (ICLR 2017) on a trained network: remove a few filters by the
    criterion on the weights as they are, train for some steps, and again, until as many are gone
    as the goal says; then train on. What is removed stays so.

    every: steps between two removals, the first of which is before the first step; duration: the
    share of all steps in which they happen. After the k-th of R removals k / R of all that goes is
    gone.
    """

    name: ClassVar[str] = "iterative"

    def __init__(
        self,
        task: Task,
        *,
        every: Every = 30,
        duration: Duration = 0.5,
        recalibrate: Recalibrate = 0,
        train_compact: bool = True,
    ) -> None:
        super().__init__(task, recalibrate=recalibrate, train_compact=train_compact)
        steps = math.ceil(duration * task.epochs * task.steps)
        self._every, self._removals = every, max(1, math.ceil(steps / every))
        self._taken = self._done = 0  # steps, and removals
        self._chosen = self._looked = False  # whether any were in this epoch, by a rate found in it
        self._gone: Mapping[str, Tensor] = self._masks  # what has been removed

    def share_before(self) -> float:
        return 1 / self._removals

    def removing(self) -> bool:
        """Whether anything is still to go."""
        return self._done < self._removals

    def looks_again(self) -> bool:
        """Once an epoch, as it takes as long as many steps, and at the last removal."""
        return self.removing() and (not self._looked or self._done == self._removals - 1)

    def still_during(self, epoch: int) -> bool:
        return super().still_during(epoch) and not self.removing()

    @property
    def settled_at(self) -> dict[str, Any] | None:
        last = (self._removals - 1) * self._every  # in steps
        return {"epoch": math.ceil(last / max(self.task.steps, 1)), "at_rest": None}

    def expected(self) -> Keep:
        return super().expected() if self.removing() else self.keep

    def start(self) -> None:
        if self._removals == 1 and self.task.epochs and self.task.goal.prunes:
            self.task.warn(
                f"schedule.every={self._every}: no second removal fits into schedule.duration of "
                f"{self.task.epochs * self.task.steps} steps, and everything goes at once"
            )
        super().start()
        self._removed()

    def before_epoch(self, epoch: int) -> None:
        super().before_epoch(epoch)
        self._held, self._looked = self._watch, False

    def after_backward(self) -> None:
        super().after_backward()
        if self._held is not self._watch:
            self._held.after_backward(self._masked)

    def after_step(self) -> None:
        self._taken += 1
        if self.removing() and self._taken == self._done * self._every:
            self._remove((self._done + 1) / self._removals)

    def after_epoch(self, epoch: int) -> dict[str, Any]:
        scores = self.scores if self._chosen else {}
        columns = super().after_epoch(epoch)
        self.scores, self._chosen = scores, False
        return {**columns, "churn": self.watch().churn(self._before)}

    def finish(self) -> None:
        if self.removing():
            self.task.warn(
                f"schedule={self.name}: training ended after {self._taken} steps, with removals "
                "still to come: all that was left goes at the end"
            )
            self._done = self._removals - 1
            self._remove(1.0)
        super().finish()

    def state(self) -> dict[str, Any]:
        return {**super().state(), "taken": self._taken, "removals": self._done}

    def resume(self, state: Mapping[str, Any]) -> None:
        super().resume(state)
        self._taken, self._done, self._gone = state["taken"], state["removals"], self._masks

    def _remove(self, share: float) -> None:
        self._evidence = None  # of the weights as they were
        self._choose(share)
        self._looked = True
        # Within an epoch ranks differ in BatchNorm's statistics, which MACs may depend on.
        self.use(from_first(self.keep, self.task.ranks))
        zero_(self._model, self.keep)
        self._clear_momentum()
        # What the epoch began with is watched to its end; all that is gone now gets no gradient.
        self._held = Watch(self._model, self._masks, self.task.trained)
        self._removed()

    def _removed(self) -> None:
        self._done += 1
        self._gone, self._chosen = self._masks, True

    def scored(self, rule: Rule, rate: float) -> Scores:
        """Filters that are gone are the lowest, whatever the criterion makes of zeros."""
        scores = super().scored(rule, rate)
        return {
            name: values.masked_fill(self._gone[name].cpu(), -torch.inf)
            for name, values in scores.items()
        }

    def _selected(self, rate: float, align: int, share: float = 1.0) -> tuple[Keep, Scores]:
        """A group of channels that would now lose fewer of them than are gone (below a threshold,
        or at a rate that has been found again) keeps what it has."""
        keep, scores = super()._selected(rate, align, share)
        masks = pruned(self._model, keep)
        for group in self._groups:
            back = ((self._gone[name] & ~masks[name])[own].any() for name, own in group.members)
            if any(back):
                for name, own in group.members:
                    masks[name][own] = self._gone[name][own]
        return {name: (~mask).nonzero().flatten().cpu() for name, mask in masks.items()}, scores
