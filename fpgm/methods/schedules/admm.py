"""ADMM for filters: trained towards a pruned network before anything is pruned (Zhang et al., ECCV
2018, and Ye et al., 2018, for whole filters)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Annotated, Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn

from fpgm.machine.ranks import from_first
from fpgm.methods.schedules.papers import Hard
from fpgm.networks.weights import weight_of
from fpgm.pruning.admm import Pull
from fpgm.pruning.method import Task
from fpgm.pruning.zeroing import Recalibrate, Scores
from fpgm.selection.rule import Rule
from fpgm.selection.zero import pruned

Rho = Annotated[float, Field(gt=0, examples=["0.001"])]
Interval = Annotated[float, Field(gt=0, examples=["20", "0.5"])]
Growth = Annotated[float, Field(ge=1, examples=["1.3"])]
Duration = Annotated[float, Field(gt=0, le=1, examples=["0.5"])]


class ADMM(Hard):
    """For a share `duration` of the epochs the weights W are pulled by rho (W - Z + U) towards Z,
    the nearest network that is pruned as the run asks; every `interval` epochs Z is found again, of
    W + U, and U adds up what they differ by. Then the filters of least norm are zeroed and held,
    and the rest trains on.

    rho is multiplied by `growth` each time Z is found, up to `ceiling`. Filters are chosen by their
    Euclidean norm, to which Z is the nearest point; criterion= is not looked at. Progressively, as
    the authors go to high rates: pretrained= of the last run, a higher rate.
    """

    name: ClassVar[str] = "admm"
    asks_criterion: ClassVar[bool] = False
    at_once: ClassVar[bool] = False

    def __init__(
        self,
        task: Task,
        *,
        rho: Rho = 0.1,
        interval: Interval = 0.5,
        growth: Growth = 1.3,
        ceiling: Rho = 3.0,
        duration: Duration = 0.5,
        recalibrate: Recalibrate = 0,
        train_compact: bool = True,
    ) -> None:
        super().__init__(task, recalibrate=recalibrate, train_compact=train_compact)
        self._end = math.ceil(duration * task.epochs)
        every = round(interval * task.steps) if task.goal.prunes and self._end else 1
        self._pull = Pull(rho, growth, ceiling, every)

    @property
    def rule(self) -> Rule:
        return replace(self.task.goal.rule, criterion=Rule().criterion, options={})

    def scored(self, rule: Rule, rate: float) -> Scores:
        """Euclidean norms of the filters, of W + U while these are pulled."""
        weights: dict[str, Tensor] = dict(self._weights())
        if self._pull.split is not None:
            differed = self._pull.split.u
            weights = {name: weight + differed[name] for name, weight in weights.items()}
        return {name: lengths(weight).cpu() for name, weight in weights.items()}

    def share_before(self) -> float | None:
        return 1.0 if self.task.epochs == 0 else None

    def share_after(self, epoch: int) -> float | None:
        return 1.0 if epoch + 1 == self._end else None

    def settled(self, epoch: int) -> bool:
        return epoch >= self._end

    def masked(self, epoch: int) -> bool:
        return self.settled(epoch)

    @property
    def settled_at(self) -> dict[str, Any] | None:
        return {"epoch": self._end, "at_rest": None}

    def start(self) -> None:
        super().start()
        if self.task.goal.prunes and self._end > 0:
            self._pull.start(self._weights(), self._project)

    def after_backward(self) -> None:
        super().after_backward()
        if self._pull.split is not None:
            self._pull.split.pull(self._weights())

    def after_step(self) -> None:
        self._pull.after_step(self._weights(), self._project)

    def after_epoch(self, epoch: int) -> dict[str, Any]:
        ends = self._pull.split is not None and self.settled(epoch + 1)
        weights = {n: w.detach().clone() for n, w in self._weights().items()} if ends else {}
        columns = super().after_epoch(epoch)  # cuts, by W + U
        if ends:
            self._pull.end(weights)
        return columns

    def closing(self, small: nn.Module) -> dict[str, Any]:
        """distances: |W - Z| / |W| at each time that Z was found again, and at the cut."""
        distances = self._pull.distances
        if not distances:
            return {}
        first, last = distances[0], distances[-1]
        said = f"schedule={self.name}: |W - Z| / |W| went from {first:.3g} to {last:.3g} at the cut"
        return {"distances": distances, "said": said}

    def state(self) -> dict[str, Any]:
        return {**super().state(), "pull": self._pull.state()}

    def resume(self, state: Any) -> None:
        super().resume(state)
        self._pull.resume(state["pull"], self.task.device)

    def _weights(self) -> dict[str, nn.Parameter]:
        return {name: weight_of(self._model, name) for name in self.task.prunable.layers}

    def _project(self, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The same with the filters zeroed that would go now. weights: W + U."""
        keep = self._selected(self.full_rate(), self.rule.align)[0]
        # Within an epoch ranks differ in BatchNorm's statistics, which MACs may depend on.
        masks = pruned(self._model, from_first(keep, self.task.ranks))
        return {name: without(weight, masks[name]) for name, weight in weights.items()}


def lengths(weight: Tensor) -> Tensor:
    """Euclidean, of each filter, in float64: (N, ...) -> (N,)."""
    found: Tensor = torch.linalg.vector_norm(weight.detach().flatten(1).double(), dim=1)
    return found


def without(weight: Tensor, mask: Tensor) -> Tensor:
    """The filters of a mask (N,) zeroed: of all weights that have these zeros the nearest."""
    return weight.masked_fill(mask.to(weight.device).view(-1, *[1] * (weight.dim() - 1)), 0)
