"""Trained ternary quantisation (TTQ, Zhu et al., ICLR 2017): a layer's weights have three values.

Behind each ternary weight stands one in full precision, its latent weight, which the optimizer
steps and whose size decides which of the three it is; the two values are learnt, too.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from fpgm.graph.trace import trace
from fpgm.networks.weights import weights_of
from fpgm.pruning.method import Goal, Method, Task

Threshold = Annotated[float, Field(ge=0, lt=1, examples=["0.05"])]
Step = Annotated[Literal["mean", "sum"], Field(examples=["mean"])]


@dataclass
class _Layer:
    """weight: what the network computes with, ternary but for the moment of a step; latent: behind
    it, in its shape; values: (2,) parameter, W_p and W_n."""

    weight: nn.Parameter
    latent: Tensor
    values: nn.Parameter


class TTQ(Method):
    """The weights of all convolutions and linear layers but the first and the last become W_p, -W_n
    or 0, of each layer's own.

    threshold: of the layer's largest latent weight, what lies within is 0; step: sum, W_p and W_n
    have the gradient of all weights that are one of them, as published; mean, divided by how many
    these are, which is the step that they would take on average: thousands at once throw a
    trained network off at rates that suit its weights. W_p and W_n start as the mean size of what
    becomes them (ours) and are stepped without decay.

    State: by layer `latent` and `values`.
    """

    name: ClassVar[str] = "ttq"
    quantises = True

    def __init__(self, task: Task, *, threshold: Threshold = 0.05, step: Step = "mean") -> None:
        super().__init__(task)
        self._threshold, self._averages = threshold, step == "mean"
        self._layers = {
            name: _Layer(weight, weight.detach().clone(), _values(weight, threshold))
            for name, weight in called(task)[1:-1]
            if weight.requires_grad
        }

    @classmethod
    def problems(cls, goal: Goal, from_scratch: bool) -> list[str]:
        return unpruned(cls.name, goal)

    def parameters(self) -> Iterable[nn.Parameter | dict[str, Any]]:
        values = [layer.values for layer in self._layers.values()]
        return [{"params": values, "weight_decay": 0.0}] if values else []

    def start(self) -> None:
        self._quantise()

    @torch.no_grad()
    def after_backward(self) -> None:
        """The gradients of what the optimizer is to step, in place of those of ternary weights."""
        for layer in self._layers.values():
            assert layer.weight.grad is not None
            inner, values, counts = gradients(
                layer.weight.grad, layer.latent, layer.values, self._threshold
            )
            layer.values.grad = values / counts if self._averages else values
            layer.weight.grad.copy_(inner)
            layer.weight.copy_(layer.latent)

    @torch.no_grad()
    def after_step(self) -> None:
        for layer in self._layers.values():
            layer.latent.copy_(layer.weight)
        self._quantise()

    @torch.no_grad()
    def _quantise(self) -> None:
        for layer in self._layers.values():
            layer.weight.copy_(ternary(layer.latent, layer.values, self._threshold))

    def closing(self, small: nn.Module) -> dict[str, Any]:
        """layers: how many are ternary; weights: theirs; zeros: the share of these that is 0."""
        weights = [layer.weight.detach() for layer in self._layers.values()]
        count = sum(weight.numel() for weight in weights)
        zeros = sum(int((weight == 0).sum()) for weight in weights) / max(count, 1)
        said = (
            f"{count:,} weights of {len(weights)} layers have three values, {100 * zeros:.1f} % 0"
        )
        return {"layers": len(weights), "weights": count, "zeros": zeros, "said": said}

    def state(self) -> dict[str, Any]:
        return {
            "latent": {name: layer.latent for name, layer in self._layers.items()},
            "values": {name: layer.values.detach() for name, layer in self._layers.items()},
        }

    @torch.no_grad()
    def resume(self, state: Mapping[str, Any]) -> None:
        for name, layer in self._layers.items():
            layer.latent.copy_(state["latent"][name])
            layer.values.copy_(state["values"][name])


def called(task: Task) -> list[tuple[str, nn.Parameter]]:
    """Names and weights of the convolutions and linear layers in the order of execution, which
    names need not follow; without those that are never called."""
    weights = weights_of(task.full.network)
    targets = (str(node.target) for node in trace(task.full.network, task.image).kinds)
    return [(name, weights[name]) for name in dict.fromkeys(targets) if name in weights]


def unpruned(name: str, goal: Goal) -> list[str]:
    """A line where filters are pruned beside a method that lets none of them rest at zero."""
    if not goal.prunes:
        return []
    return [
        f"method={name}: not while filters are pruned; train what is left of them, with "
        "arch=compact pretrained=RUN_DIR rate=0"
    ]


def _values(weight: Tensor, threshold: float) -> nn.Parameter:
    found = weight.detach()
    edge = threshold * found.abs().max()
    sizes = [found[side].abs() for side in (found > edge, found < -edge)]
    return nn.Parameter(torch.stack([s.mean() if len(s) else edge for s in sizes]))


def ternary(latent: Tensor, values: Tensor, threshold: float) -> Tensor:
    """W_p where a latent weight is above threshold * max|w|, -W_n below its negative, else 0 (TTQ,
    eq. 6 and 9). values: (2,), W_p and W_n."""
    edge = threshold * latent.abs().max()
    zero = torch.zeros_like(latent)
    return torch.where(latent > edge, values[0], torch.where(latent < -edge, -values[1], zero))


def gradients(
    grad: Tensor, latent: Tensor, values: Tensor, threshold: float
) -> tuple[Tensor, Tensor, Tensor]:
    """From those of the ternary weights the gradients of the latent ones, in their shape: times
    W_p, 1 or W_n; and of W_p and W_n, (2,): the sum over what is W_p, minus that over what is -W_n
    (eq. 7, 8). Also how many these are, (2,), at least 1."""
    edge = threshold * latent.abs().max()
    above, below = latent > edge, latent < -edge
    scale = torch.where(above, values[0], torch.where(below, values[1], torch.ones_like(latent)))
    sums = torch.stack([(grad * above).sum(), -(grad * below).sum()])
    counts = torch.stack([above.sum(), below.sum()]).clamp(min=1)
    return grad * scale, sums, counts
