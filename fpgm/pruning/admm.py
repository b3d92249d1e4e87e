"""ADMM's pure part: weights that are to become sparse, and sparse ones that they are held to.

min L(W) with W in a set S (so many filters, so many weights that are not zero) becomes, in turns,
W <- argmin L(W) + rho / 2 |W - Z + U|^2 by training, Z <- the point of S nearest to W + U, U <- U +
W - Z (Zhang et al., ECCV 2018; Ren et al., ASPLOS 2019).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

Tensors = dict[str, Tensor]
Projection = Callable[[Mapping[str, Tensor]], Tensors]


@dataclass
class Split:
    """z: layer -> the sparse weight; u: -> what W and Z have differed by, summed up; rho: how
    strongly W is held to it."""

    z: Tensors
    u: Tensors
    rho: float

    @classmethod
    def of(cls, weights: Mapping[str, Tensor], project: Projection, rho: float) -> Split:
        """Z is the projection of W, U is zero."""
        zeros = {name: torch.zeros_like(weight) for name, weight in weights.items()}
        return cls(project(_detached(weights)), zeros, rho)

    @torch.no_grad()
    def pull(self, weights: Mapping[str, Tensor]) -> None:
        """Add the gradient of rho / 2 |W - Z + U|^2 to that of each weight which has one. Filters
        that are zero are a schedule's to hold: what they differed by before does not move them."""
        for name, weight in weights.items():
            if weight.grad is not None:
                off = weight - self.z[name] + self.u[name]
                weight.grad.add_(off * _alive(weight), alpha=self.rho)

    @torch.no_grad()
    def update(self, weights: Mapping[str, Tensor], project: Projection, growth: float) -> None:
        """Z = project(W + U), U += W - Z, rho *= growth. U counts in units of 1 / rho: what it
        stands for in the loss stays as it is."""
        weights = _detached(weights)
        for name, weight in weights.items():
            self.u[name] *= _alive(weight)
        self.z = project({name: weight + self.u[name] for name, weight in weights.items()})
        for name, weight in weights.items():
            self.u[name] = (self.u[name] + weight - self.z[name]) / growth
        self.rho *= growth

    def distance(self, weights: Mapping[str, Tensor]) -> float:
        """|W - Z| / |W|, of all layers as one."""
        off = sum(float((w.detach() - self.z[n]).square().sum()) for n, w in weights.items())
        size = sum(float(w.detach().square().sum()) for w in weights.values())
        return (off / size) ** 0.5 if size else 0.0


class Pull:
    """Trains weights towards sparse ones, step by step: a Split that is found again after every
    `every` steps, with a rho that is multiplied by `growth` each time, up to `ceiling`.

    distances: |W - Z| / |W| at each time that Z was found again, and at the end.
    """

    def __init__(self, rho: float, growth: float, ceiling: float, every: int) -> None:
        self._rho, self._growth, self._ceiling, self._every = rho, growth, ceiling, max(1, every)
        self._taken = 0  # steps
        self.split: Split | None = None  # before the start and after the end there is none
        self.distances: list[float] = []

    def start(self, weights: Mapping[str, Tensor], project: Projection) -> None:
        self.split = Split.of(weights, project, self._rho)

    def after_step(self, weights: Mapping[str, Tensor], project: Projection) -> None:
        self._taken += 1
        if self.split is None or self._taken % self._every:
            return
        self.distances.append(self.split.distance(weights))
        growth = min(self._growth, max(self._ceiling / self.split.rho, 1.0))
        self.split.update(weights, project, growth)

    def end(self, weights: Mapping[str, Tensor]) -> None:
        if self.split is not None:
            self.distances.append(self.split.distance(weights))
        self.split = None

    def state(self) -> dict[str, Any]:
        split = self.split and {"z": self.split.z, "u": self.split.u, "rho": self.split.rho}
        return {"split": split, "taken": self._taken, "distances": self.distances}

    def resume(self, state: Mapping[str, Any], device: torch.device) -> None:
        self._taken, self.distances = state["taken"], list(state["distances"])
        self.split = None
        if state["split"] is not None:
            z, u = (
                {name: value.to(device) for name, value in state["split"][key].items()}
                for key in ("z", "u")
            )
            self.split = Split(z, u, state["split"]["rho"])


def _alive(weight: Tensor) -> Tensor:
    """1 for each filter that is not zero, else 0: (N, ...) -> (N, 1, ...)."""
    some = weight.detach().reshape(len(weight), -1).any(1).to(weight.dtype)
    return some.view(-1, *[1] * (weight.dim() - 1))


def _detached(weights: Mapping[str, Tensor]) -> Tensors:
    return {name: weight.detach().clone() for name, weight in weights.items()}
