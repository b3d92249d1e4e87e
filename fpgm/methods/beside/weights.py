"""Weight pruning by magnitude (Han et al., NeurIPS 2015): single weights, not filters."""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Mapping
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from fpgm.networks.weights import weights_of
from fpgm.pruning.method import Method, Task
from fpgm.pruning.momentum import remembered

Rate = Annotated[float, Field(ge=0, lt=1, examples=["0.8"])]
Growth = Annotated[float, Field(ge=0, le=1, examples=["0.5"])]
Scope = Annotated[Literal["layer", "global"], Field(examples=["global"])]


class Weights(Method):
    """The share `rate` of the weights of all convolutions and linear layers is zero in the end:
    those of least magnitude, of each layer or (scope=global) of the network. Chosen again after
    each epoch; in between they are held at zero.

    growth: share of the epochs in which the share grows, as 1 - (1 - t)^3 (Zhu and Gupta, 2017),
    0: all go before the first epoch. Filters that a schedule prunes are zero anyway and count.
    Dense kernels are no faster for it; what gets smaller is a compressed file.
    """

    name: ClassVar[str] = "weights"

    def __init__(
        self, task: Task, *, rate: Rate = 0.8, scope: Scope = "global", growth: Growth = 0.5
    ) -> None:
        super().__init__(task)
        self._rate, self._scope, self._growth = rate, scope, growth
        self._held = Held(task)
        self._lost: set[str] = set()  # layers that have been named

    def share(self, done: int) -> float:
        """Of the weights that are zero after so many epochs."""
        # What goes last is trained without for an epoch at least.
        ends = min(self._growth * self.task.epochs, self.task.epochs - 1)
        return self._rate * grown(done / ends if done < ends else 1.0)

    def start(self) -> None:
        self._choose(0)

    def after_backward(self) -> None:
        self._held.after_backward()

    def after_step(self) -> None:
        self._held.after_step()

    def after_epoch(self, epoch: int) -> dict[str, Any]:
        if epoch + 1 == self.task.epochs:
            return {}  # what the last epoch has been trained with stays
        self._choose(epoch + 1)
        return {"changed": True}

    def closing(self, small: nn.Module) -> dict[str, Any]:
        found = sparsity(small)
        return {**found, "said": f"{self.name}: {found['said']}"}

    def state(self) -> dict[str, Any]:
        return {"kept": self._held.kept}

    def resume(self, state: Mapping[str, Any]) -> None:
        self._held.resume(state["kept"])

    def _choose(self, done: int) -> None:
        for name in self._held.choose(self.share(done), self._scope):
            if name not in self._lost and self.task.ranks.first:
                self._lost.add(name)
                self.task.warn(f"method.{self.name}.rate={self._rate:g}: nothing of {name} is left")


class Held:
    """Weights of a task's network that are zero and stay so. kept: layer -> 1 where one stays as it
    is, 0 where it is zero."""

    def __init__(self, task: Task) -> None:
        self._task = task
        self.kept: dict[str, Tensor] = {}

    @torch.no_grad()
    def choose(self, rate: float, scope: str) -> list[str]:
        """Zero the share `rate`, as `largest` says. Returns the layers of which nothing is left."""
        weights, lost = weights_of(self._task.full.network), []
        self.kept = largest(weights, rate, scope)
        for name, kept in self.kept.items():
            weight = weights[name]
            # Filters that a schedule has zeroed are its own to hold, or to let grow back.
            kept[~weight.flatten(1).any(1)] = 1
            if weight.any() and not (weight * kept).any():
                lost.append(name)
            _zero(weight, kept)
            for value in remembered(self._task.full.optimizer, weight):
                value.mul_(kept)
        return lost

    @torch.no_grad()
    def after_backward(self) -> None:
        """No gradient moves them."""
        for weight, kept in self._pairs():
            if weight.grad is not None:
                weight.grad.mul_(kept)

    @torch.no_grad()
    def after_step(self) -> None:
        """Nor decay, nor momentum of before."""
        for weight, kept in self._pairs():
            _zero(weight, kept)

    def resume(self, kept: Mapping[str, Tensor]) -> None:
        self.kept = {name: values.to(self._task.device) for name, values in kept.items()}

    def _pairs(self) -> Iterator[tuple[nn.Parameter, Tensor]]:
        weights = weights_of(self._task.full.network) if self.kept else {}
        return ((weights[name], kept) for name, kept in self.kept.items())


def grown(t: float) -> float:
    """1 - (1 - t)^3, of 0..1."""
    return 1 - (1 - t) ** 3


def largest(weights: Mapping[str, Tensor], rate: float, scope: str) -> dict[str, Tensor]:
    """1 where a weight stays and 0 where it goes: floor(rate n) of n, the least in magnitude, ties
    by the lowest index; of each layer, or of all layers as one."""
    if scope == "layer":
        return {
            name: _kept(weight.detach().flatten(), rate).view_as(weight)
            for name, weight in weights.items()
        }
    flat = torch.cat([weight.detach().flatten() for weight in weights.values()])
    parts = _kept(flat, rate).split([weight.numel() for weight in weights.values()])
    return {
        name: part.view_as(weight)
        for (name, weight), part in zip(weights.items(), parts, strict=True)
    }


def _zero(weight: Tensor, kept: Tensor) -> None:
    """In place. Plain zeros: those of negative weights are others, and do not compress."""
    weight.masked_fill_(kept == 0, 0)


def _kept(values: Tensor, rate: float) -> Tensor:
    """(n,) -> (n,)."""
    lowest = values.abs().argsort(stable=True)[: int(len(values) * rate + 1e-9)]
    return torch.ones_like(values).index_fill_(0, lowest, 0)


def sparsity(network: nn.Module) -> dict[str, Any]:
    """Of all convolutions and linear layers: zero, how many weights are, of `weights`; bytes of all
    the network's tensors, and `compressed`, what zlib leaves of these at its best; said."""
    found = list(weights_of(network).values())
    zero, total = sum(int((w == 0).sum()) for w in found), sum(w.numel() for w in found)
    # By name: a network that has been saved and loaded lists them in another order.
    tensors = [
        value.detach().cpu().contiguous() for _, value in sorted(network.state_dict().items())
    ]
    raw = b"".join(value.numpy().tobytes() for value in tensors)
    packed = len(zlib.compress(raw, 9))
    said = (
        f"{100 * zero / max(total, 1):.1f} % of {total:,} weights are zero: dense kernels take the "
        f"same MACs and milliseconds; compressed, the network has {packed:,} bytes of {len(raw):,}"
    )
    return {
        "zero": zero, "weights": total, "bytes": len(raw), "compressed": packed, "said": said,
    }  # fmt: skip
