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
        """Add the gradient of rho / 2 |W - Z + U|^2 to that of each weight which has one."""
        for name, weight in weights.items():
            if weight.grad is not None:
                weight.grad.add_(weight - self.z[name] + self.u[name], alpha=self.rho)

    @torch.no_grad()
    def update(self, weights: Mapping[str, Tensor], project: Projection, growth: float) -> None:
        """Z = project(W + U), U += W - Z, rho *= growth. U counts in units of 1 / rho: what it
        stands for in the loss stays as it is."""
        weights = _detached(weights)
        self.z = project({name: weight + self.u[name] for name, weight in weights.items()})
        for name, weight in weights.items():
            self.u[name] = (self.u[name] + weight - self.z[name]) / growth
        self.rho *= growth

    def distance(self, weights: Mapping[str, Tensor]) -> float:
        """|W - Z| / |W|, of all layers as one."""
        off = sum(float((w.detach() - self.z[n]).square().sum()) for n, w in weights.items())
        size = sum(float(w.detach().square().sum()) for w in weights.values())
        return (off / size) ** 0.5 if size else 0.0

    def state(self) -> dict[str, Any]:
        return {"z": self.z, "u": self.u, "rho": self.rho}


def _detached(weights: Mapping[str, Tensor]) -> Tensors:
    return {name: weight.detach().clone() for name, weight in weights.items()}


def on(state: Mapping[str, Any], device: torch.device) -> dict[str, Any]:
    """What Split.state gave, on a device."""
    moved = {key: {n: t.to(device) for n, t in state[key].items()} for key in ("z", "u")}
    return {**moved, "rho": state["rho"]}
