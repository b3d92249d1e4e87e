"""A penalty that grows drives out the filters that are to go (GReg-1, Wang et al., ICLR 2021)."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn

from fpgm.graph.flow import tails
from fpgm.graph.trace import trace
from fpgm.methods.schedules.papers import Hard
from fpgm.networks.weights import weight_of
from fpgm.pruning.method import Task
from fpgm.pruning.silence import Silence
from fpgm.pruning.zeroing import Recalibrate

Positive = Annotated[float, Field(gt=0, examples=["1e-4"])]
Every = Annotated[int, Field(ge=1, examples=["10"])]
Ratio = Annotated[float, Field(gt=1, examples=["1000"])]
Latest = Annotated[float, Field(gt=0, le=1, examples=["0.5"])]

_TINY = 1e-30  # of a filter that is zero already: the ratio stays a number


class GReg(Hard):
    """Selected once on a trained network; then an L2 penalty on these filters alone, (penalty / 2)
    |w|^2, grows step by step from 0, until in every layer the mean |w| of what is kept is more than
    `ratio` times that of what goes. That is then silenced, weights, scales and shifts, and held.

    growth: of the penalty, after every `every` steps, up to `ceiling`; latest: the share of all
    steps after which what is left is silenced in any case. Where these are too few for the penalty
    to come to its ceiling, it grows as much faster as it takes to be there by then.
    """

    name: ClassVar[str] = "greg"
    silences: ClassVar[bool] = True
    at_once: ClassVar[bool] = False

    def __init__(
        self,
        task: Task,
        *,
        growth: Positive = 1e-4,
        every: Every = 10,
        ceiling: Positive = 1.0,
        ratio: Ratio = 1000.0,
        latest: Latest = 0.5,
        recalibrate: Recalibrate = 0,
        train_compact: bool = True,
    ) -> None:
        super().__init__(task, recalibrate=recalibrate, train_compact=train_compact)
        self._last = max(1, round(latest * task.epochs * task.steps))
        self._every, self._ceiling, self._limit = every, ceiling, ratio
        self._growth = max(growth, ceiling / max(1, (self._last - 1) // every))
        self._tails = tails(trace(self._model, task.image))
        self._taken = 0  # steps
        self._gone: dict[str, float] | None = None  # when, and how the filters were left

    @property
    def penalty(self) -> float:
        """Of the step that comes next."""
        return min(self._ceiling, self._growth * (self._taken // self._every))

    def start(self) -> None:
        self._refuse_ties(self._choose(1.0))

    def masked(self, epoch: int) -> bool:
        return self._gone is not None

    def before_epoch(self, epoch: int) -> None:
        super().before_epoch(epoch)
        self._silence = Silence(self._masks, self._tails, self.task.trained)
        # Once they are gone the compact network may be trained, which has none of them.
        weights = self._weights() if self._gone is None else []
        self._penalised = [(w, mask.view(-1, 1, 1, 1)) for w, mask in weights]

    @torch.no_grad()
    def after_backward(self) -> None:
        super().after_backward()
        if self._gone is not None:
            self._silence.still()
            return
        for weight, mask in self._penalised:
            if weight.grad is not None:
                weight.grad.addcmul_(weight, mask.to(weight.dtype), value=self.penalty)

    def after_step(self) -> None:
        if self._gone is not None:
            return
        self._taken += 1
        at_last = self._taken >= self._last
        if at_last or (self._taken % self._every == 0 and self._ratio() > self._limit):
            self._silence_all()

    def after_epoch(self, epoch: int) -> dict[str, Any]:
        gone = self._masked
        columns = super().after_epoch(epoch)
        # Until then they are on their way.
        return columns if gone else {**columns, "revived": 0, "changed": False}

    def enforce(self, epoch: int, chosen: bool) -> bool:
        return False  # the steps have done it

    def finish(self) -> None:
        if self._gone is None:  # of a run without epochs
            self._silence_all()
        super().finish()

    def closing(self, small: nn.Module) -> dict[str, Any]:
        if self._gone is None or not self._gone["ratio"]:
            return {}
        penalty, step, ratio = (self._gone[key] for key in ("penalty", "step", "ratio"))
        why = "ratio" if ratio > self._limit else "latest"
        said = (
            f"schedule={self.name}: silenced after step {step:.0f} (by {why}), at a penalty of "
            f"{penalty:.3g}; what is kept was {ratio:.3g} times as large"
        )
        return {**self._gone, "said": said}

    def state(self) -> dict[str, Any]:
        return {**super().state(), "taken": self._taken, "gone": self._gone}

    def resume(self, state: Any) -> None:
        super().resume(state)
        self._taken, self._gone = state["taken"], state["gone"]

    def _silence_all(self) -> None:
        self._gone = {"step": self._taken, "penalty": self.penalty, "ratio": self._ratio()}
        Silence(self._masks, self._tails, self.task.full).scale(0.0)

    def _weights(self) -> list[tuple[nn.Parameter, Tensor]]:
        """Of the layers that lose filters, and which they lose."""
        named = ((weight_of(self._model, name), mask) for name, mask in self._masks.items())
        return [(weight, mask) for weight, mask in named if mask.any()]

    @torch.no_grad()
    def _ratio(self) -> float:
        """Mean |w| of the kept filters over that of those to go, in the layer where it is least; 0
        where none are to go."""
        ratios = []
        for weight, mask in self._weights():
            size = weight.abs().flatten(1).mean(1)
            ratios.append(size[~mask].mean() / size[mask].mean().clamp_min(_TINY))
        # At once: each number that the host reads makes a GPU wait.
        return float(torch.stack(ratios).min()) if ratios else 0.0
