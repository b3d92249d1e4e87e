"""ADMM for single weights (Zhang et al., ECCV 2018)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn

from fpgm.methods.beside.weights import Scope, largest, layers, sizes, zeroed
from fpgm.pruning.admm import Split, on
from fpgm.pruning.method import Method, Task
from fpgm.pruning.momentum import remembered

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
        self._rate, self._scope, self._rho, self._interval = rate, scope, rho, interval
        self._growth, self._ceiling = growth, ceiling
        self._end = math.ceil(duration * task.epochs)
        self._split: Split | None = None
        self._kept: dict[str, Tensor] = {}  # layer -> 1 where a weight stays, once the others went
        self._taken = 0  # steps
        self._distances: list[float] = []  # |W - Z| / |W|, before each time that Z is found again

    def start(self) -> None:
        if self._end == 0:
            self._cut()
        else:
            self._split = Split.of(self._weights(), self._project, self._rho)

    def after_backward(self) -> None:
        if self._split is not None:
            self._split.pull(self._weights())
        for name, weight in self._weights().items():
            if self._kept and weight.grad is not None:
                weight.grad.mul_(self._kept[name])

    @torch.no_grad()
    def after_step(self) -> None:
        self._taken += 1
        if self._split is None:
            for name, weight in self._weights().items():
                zeroed(weight, self._kept[name])
        elif self._taken % max(1, round(self._interval * self.task.steps)) == 0:
            weights = self._weights()
            self._distances.append(self._split.distance(weights))
            growth = min(self._growth, max(self._ceiling / self._split.rho, 1.0))
            self._split.update(weights, self._project, growth)

    def after_epoch(self, epoch: int) -> dict[str, Any]:
        if self._split is None or epoch + 1 < self._end:
            return {}
        self._distances.append(self._split.distance(self._weights()))
        self._split = None
        self._cut()
        return {"changed": True}

    def closing(self, small: nn.Module) -> dict[str, Any]:
        """distances: |W - Z| / |W| at each time that Z was found again, and at the cut; of the
        compact network: zero, weights, bytes, compressed (zlib)."""
        found = list(layers(small).values())
        zero, total = sum(int((w == 0).sum()) for w in found), sum(w.numel() for w in found)
        size, packed = sizes(small)
        last = f"; |W - Z| / |W| {self._distances[-1]:.3g} at the cut" if self._distances else ""
        said = (
            f"{self.name}: {100 * zero / max(total, 1):.1f} % of {total:,} weights are zero: dense "
            f"kernels take the same MACs and milliseconds; compressed {packed:,} bytes{last}"
        )
        sizes_ = {"zero": zero, "weights": total, "bytes": size, "compressed": packed}
        return {**sizes_, "distances": self._distances, "said": said}

    def state(self) -> dict[str, Any]:
        split = None if self._split is None else self._split.state()
        counted = {"taken": self._taken, "distances": self._distances}
        return {"split": split, "kept": self._kept, **counted}

    def resume(self, state: Mapping[str, Any]) -> None:
        device = self.task.device
        self._taken, self._distances = state["taken"], list(state["distances"])
        self._kept = {name: kept.to(device) for name, kept in state["kept"].items()}
        self._split = None if state["split"] is None else Split(**on(state["split"], device))

    def _weights(self) -> dict[str, nn.Parameter]:
        return layers(self.task.full.network)

    def _project(self, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        kept = largest(weights, self._rate, self._scope)
        return {name: weight * kept[name] for name, weight in weights.items()}

    @torch.no_grad()
    def _cut(self) -> None:
        weights = self._weights()
        self._kept = largest(weights, self._rate, self._scope)
        for name, weight in weights.items():
            # Filters that a schedule has zeroed are its own to hold, or to let grow back.
            self._kept[name][~weight.flatten(1).any(1)] = 1
            zeroed(weight, self._kept[name])
            for value in remembered(self.task.full.optimizer, weight):
                value.mul_(self._kept[name])
