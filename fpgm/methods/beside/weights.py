"""Weight pruning by magnitude (Han et al., NeurIPS 2015): single weights, not filters."""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

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
        self._kept: dict[str, Tensor] = {}  # layer -> 1 where a weight stays
        self._held: list[tuple[nn.Parameter, Tensor]] = []

    def share(self, done: int) -> float:
        """Of the weights that are zero after so many epochs."""
        ends = min(
            self._growth * self.task.epochs, self.task.epochs - 1
        )  # the last are trained with
        return self._rate * grown(done / ends if done < ends else 1.0)

    def start(self) -> None:
        self._choose(0)

    def before_epoch(self, epoch: int) -> None:
        weights = layers(self.task.full.network)
        self._held = [(weights[name], kept) for name, kept in self._kept.items()]

    def after_backward(self) -> None:
        gradients = [(p.grad, kept) for p, kept in self._held if p.grad is not None]
        if gradients:
            torch._foreach_mul_([g for g, _ in gradients], [kept for _, kept in gradients])

    @torch.no_grad()
    def after_step(self) -> None:
        for parameter, kept in self._held:  # momentum of before goes on, and decay
            zeroed(parameter, kept)

    def after_epoch(self, epoch: int) -> dict[str, Any]:
        if epoch + 1 == self.task.epochs:
            return {}  # what the last epoch has been trained with stays
        self._choose(epoch + 1)
        return {"changed": True}

    def closing(self, small: nn.Module) -> dict[str, Any]:
        """Of the compact network: zero, weights, bytes, compressed (zlib)."""
        found = list(layers(small).values())
        zero, total = sum(int((w == 0).sum()) for w in found), sum(w.numel() for w in found)
        size, packed = sizes(small)
        said = (
            f"weights: {100 * zero / max(total, 1):.1f} % of {total:,} are zero: dense kernels "
            "take the same MACs and milliseconds; compressed, the network has "
            f"{packed:,} bytes of {size:,}"
        )
        return {"zero": zero, "weights": total, "bytes": size, "compressed": packed, "said": said}

    def state(self) -> dict[str, Any]:
        return {"kept": self._kept}

    def resume(self, state: Mapping[str, Any]) -> None:
        device = self.task.device
        self._kept = {name: kept.to(device) for name, kept in state["kept"].items()}

    @torch.no_grad()
    def _choose(self, done: int) -> None:
        """Zero what is to be zero after so many epochs."""
        weights = layers(self.task.full.network)
        self._kept = largest(weights, self.share(done), self._scope)
        for name, kept in self._kept.items():
            weight = weights[name]
            # Filters that a schedule has zeroed are its own to hold, or to let grow back.
            kept[~weight.flatten(1).any(1)] = 1
            if self.task.ranks.first and not (weight * kept).any() and weight.any():
                self.task.warn(f"method.{self.name}.rate={self._rate:g}: nothing of {name} is left")
            zeroed(weight, kept)
            for value in remembered(self.task.full.optimizer, weight):
                value.mul_(kept)


def layers(network: nn.Module) -> dict[str, nn.Parameter]:
    """The weights of all convolutions and linear layers, by name."""
    found = {}
    for name, module in network.named_modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            assert isinstance(module.weight, nn.Parameter)
            found[name] = module.weight
    return found


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


def zeroed(weight: Tensor, kept: Tensor) -> None:
    """In place. Plain zeros: those of negative weights are others, and do not compress."""
    weight.masked_fill_(kept == 0, 0)


def _kept(values: Tensor, rate: float) -> Tensor:
    """(n,) -> (n,)."""
    lowest = values.abs().argsort(stable=True)[: int(len(values) * rate + 1e-9)]
    return torch.ones_like(values).index_fill_(0, lowest, 0)


def sizes(network: nn.Module) -> tuple[int, int]:
    """Bytes of all its tensors, and those of them that zlib leaves at its best."""
    tensors = [value.detach().cpu().contiguous() for value in network.state_dict().values()]
    raw = b"".join(value.numpy().tobytes() for value in tensors)
    return len(raw), len(zlib.compress(raw, 9))
