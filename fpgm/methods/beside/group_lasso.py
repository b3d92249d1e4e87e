"""Structured sparsity (SSL, Wen et al., NeurIPS 2016): whole filters are trained towards zero."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn

from fpgm.networks.weights import weight_of
from fpgm.pruning.method import Method, Task
from fpgm.selection.ranking import least_kept

Strength = Annotated[float, Field(ge=0, examples=["0.005"])]


class GroupLasso(Method):
    """The penalty strength * sum of the filters' Euclidean norms, by its proximal step after every
    step of the optimizer: filters reach zero and do not only come near it.

    Of each layer that may be pruned the share `floor` of the filters, and one, stays.
    """

    name: ClassVar[str] = "group_lasso"

    def __init__(self, task: Task, *, strength: Strength = 0.005) -> None:
        super().__init__(task)
        self._strength = strength
        self._warned: set[str] = set()
        self._layers: list[tuple[Tensor, dict[str, Any], int]] = []

    def before_epoch(self, epoch: int) -> None:
        trained, floor = self.task.trained, self.task.goal.rule.floor
        # What the optimizer does to a weight: its learning rate changes from step to step.
        group_of = {
            id(p): group for group in trained.optimizer.param_groups for p in group["params"]
        }
        self._layers = []
        for name in self.task.prunable.layers:
            filters = len(weight_of(self.task.full.network, name))
            weight = weight_of(trained.network, name)
            self._layers.append((weight, group_of[id(weight)], least_kept(filters, floor)))
        self._held = [torch.zeros((), dtype=torch.bool, device=w.device) for w, *_ in self._layers]

    @torch.no_grad()
    def after_step(self) -> None:
        for held, (weight, group, least) in zip(self._held, self._layers, strict=True):
            factors, at_floor = shrinkage(
                torch.linalg.vector_norm(weight.flatten(1), dim=1),
                group["lr"] * self._strength,
                least,
            )
            weight.mul_(factors.view(-1, *[1] * (weight.dim() - 1)))
            held |= at_floor

    def after_epoch(self, epoch: int) -> dict[str, Any]:
        # Asked once an epoch: in a step a GPU would have to wait for the answer.
        for name, held in zip(self.task.prunable.layers, self._held, strict=True):
            if name not in self._warned and bool(held):
                self._warned.add(name)
                self.task.warn(
                    f"method.group_lasso.strength={self._strength:g}: drives all of {name} to "
                    "zero; its largest filters are spared, to the share floor="
                    f"{self.task.goal.rule.floor:g}"
                )
        return {}

    def closing(self, small: nn.Module) -> dict[str, Any]:
        """zero: the filters that are zero, by layer, pruned ones among them."""
        zero, total = {}, 0
        for name in self.task.prunable.layers:
            weight = weight_of(self.task.full.network, name).detach()
            zero[name] = int((~weight.flatten(1).any(1)).sum())
            total += len(weight)
        count = sum(zero.values())
        said = f"group_lasso: {count} of {total} filters are zero"
        cut = "; criterion=l2 threshold=1e-6 schedule=hard cuts them" if count else ""
        return {"zero": zero, "filters": total, "said": said + cut}

    def state(self) -> dict[str, Any]:
        return {"warned": sorted(self._warned)}

    def resume(self, state: Any) -> None:
        self._warned = set(state["warned"])

    def still_during(self, epoch: int) -> bool:
        # A filter's norm is also that of its weights on pruned channels, which a compact network
        # does not have.
        return self._strength == 0


def shrinkage(norms: Tensor, threshold: float, least: int) -> tuple[Tensor, Tensor]:
    """What the filters of a layer are multiplied by: max(0, 1 - threshold / norm), the proximal
    step of threshold * sum of norms. norms (N,) -> (N,), and whether it would leave fewer than
    `least` of those that are not zero yet: then the largest stay as they are."""
    ordered = norms.sort(descending=True).values
    # No number leaves the device.
    last = (norms > 0).sum().clamp(1, least) - 1
    limit = ordered.gather(0, last.view(1))
    at_floor = (limit <= threshold) & (limit > 0)
    factors = (1 - threshold / norms.clamp_min(torch.finfo(norms.dtype).tiny)).clamp_min(0)
    return torch.where(at_floor & (norms >= limit), torch.ones_like(norms), factors), at_floor.any()
