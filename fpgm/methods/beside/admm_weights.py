"""ADMM for single weights (Zhang et al., ECCV 2018)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar

from pydantic import Field
from torch import Tensor, nn

from fpgm.methods.beside.weights import Held, Scope, largest, sparsity
from fpgm.networks.weights import weights_of
from fpgm.pruning.admm import Pull
from fpgm.pruning.method import Method, Task

Rate = Annotated[float, Field(ge=0, lt=1, examples=["0.9"])]
Rho = Annotated[float, Field(gt=0, examples=["0.001"])]
Interval = Annotated[float, Field(gt=0, examples=["20", "0.5"])]
Growth = Annotated[float, Field(ge=1, examples=["1.3"])]
Duration = Annotated[float, Field(gt=0, le=1, examples=["0.5"])]


class ADMMWeights(Method):
    """For a share `duration` of the epochs the weights W of all convolutions and linear layers are
    pulled by rho (W - Z + U) towards Z, which has the share `rate` of zeros; every `interval`
    epochs Z is found again, of W + U, and U adds up what they differ by. Then the least are zeroed
    and held, and the rest trains on.

    rho is multiplied by `growth` each time Z is found, up to `ceiling`. Progressively, as the
    authors go to high rates: pretrained= of the last run, about a third of its weights left.
    """

    name: ClassVar[str] = "admm_weights"

    def __init__(
        self,
        task: Task,
        *,
        rate: Rate = 0.8,
        scope: Scope = "layer",
        rho: Rho = 0.1,
        interval: Interval = 0.5,
        growth: Growth = 1.3,
        ceiling: Rho = 3.0,
        duration: Duration = 0.5,
    ) -> None:
        super().__init__(task)
        self._rate, self._scope = rate, scope
        self._end = math.ceil(duration * task.epochs)
        self._pull = Pull(rho, growth, ceiling, round(interval * task.steps) if self._end else 1)
        self._held = Held(task)

    def start(self) -> None:
        weights = weights_of(self.task.full.network)
        if self._end == 0:
            self._held.choose(self._rate, self._scope)
        else:
            self._pull.start(weights, self._project)

    def after_backward(self) -> None:
        if self._pull.split is not None:
            self._pull.split.pull(weights_of(self.task.full.network))
        self._held.after_backward()

    def after_step(self) -> None:
        self._pull.after_step(weights_of(self.task.full.network), self._project)
        self._held.after_step()

    def after_epoch(self, epoch: int) -> dict[str, Any]:
        if self._pull.split is None or epoch + 1 < self._end:
            return {}
        self._pull.end(weights_of(self.task.full.network))
        self._held.choose(self._rate, self._scope)
        return {"changed": True}

    def closing(self, small: nn.Module) -> dict[str, Any]:
        """distances: |W - Z| / |W| at each time that Z was found again, and at the cut; the rest
        as `sparsity` says."""
        distances, found = self._pull.distances, sparsity(small)
        last = f"; |W - Z| / |W| {distances[-1]:.3g} at the cut" if distances else ""
        said = f"{self.name}: {found.pop('said')}{last}"
        return {**found, "distances": distances, "said": said}

    def state(self) -> dict[str, Any]:
        return {"pull": self._pull.state(), "kept": self._held.kept}

    def resume(self, state: Mapping[str, Any]) -> None:
        self._pull.resume(state["pull"], self.task.device)
        self._held.resume(state["kept"])

    def _project(self, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        kept = largest(weights, self._rate, self._scope)
        return {name: weight * kept[name] for name, weight in weights.items()}
