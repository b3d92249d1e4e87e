"""ResRep (Ding et al., ICCV 2021): compactors behind convolutions learn which filters to forget.

A compactor is a 1x1 convolution behind conv and BatchNorm that starts as the identity. Its rows are
pressed towards zero; from the shortest of them the gradient of the loss is taken away, so that the
pressure alone moves them. In the end each compactor goes into the convolution before it, and a row
of zeros is a filter of zeros.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Annotated, Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor, fx, nn
from torch.optim.swa_utils import update_bn

from fpgm.errors import Error
from fpgm.graph.trace import ChannelGraph
from fpgm.pruning.inserting import Inserting
from fpgm.pruning.method import Task
from fpgm.pruning.momentum import remembered
from fpgm.pruning.settling import Share
from fpgm.pruning.zeroing import Recalibrate

Strength = Annotated[float, Field(ge=0, examples=["1e-4"])]
Momentum = Annotated[float, Field(ge=0, lt=1, examples=["0.99"])]
Count = Annotated[int, Field(ge=1, examples=["4"])]
Select = Annotated[float, Field(gt=0, le=1, examples=["0.5"])]

_TINY = 1e-30  # of a row that is zero


class ResRep(Inserting):
    """Presses the rows of compactors towards zero, selects the shortest of the network, more and
    more of them, and lets these forget.

    strength: of the pressure, lambda in lambda |q| of each row q; momentum: of the compactors,
    which have no weight decay; remove: how many more rows are selected at most after every `every`
    steps; warmup: share of all steps before the first are; select: share after which all that are
    to go are selected, for good: where the published pace is too slow for that, it is as much
    faster as it takes; latest: share after which all selected rows are zero: those that the
    pressure would not bring there in time go in a straight line (ours; None: they do not, as
    published, and what is left of them is cut).
    """

    name: ClassVar[str] = "resrep"
    silences: ClassVar[bool] = True  # merge leaves no scale and no shift of a row of zeros

    def __init__(
        self,
        task: Task,
        *,
        strength: Strength = 1e-4,
        momentum: Momentum = 0.99,
        remove: Count = 4,
        every: Count = 200,
        warmup: Share = 0.05,
        select: Select = 0.5,
        latest: Select | None = 0.8,
        recalibrate: Recalibrate = 0,
    ) -> None:
        """Raises Error, GraphError."""
        super().__init__(task, recalibrate=recalibrate)
        if latest is not None and latest < select:
            raise Error(
                f"schedule.latest={latest:g}: rows are selected until schedule.select={select:g}; "
                "at least that"
            )
        if task.goal.prunes and task.epochs == 0:
            raise Error("epochs=0: schedule=resrep selects while it trains; epochs=10, or more")
        self._strength, self._momentum = strength, momentum
        self._remove, self._every, self._selects = remove, every, select
        steps = task.epochs * task.steps if task.goal.prunes else 1
        self._last = max(1, math.ceil(select * steps))
        self._first = min(math.floor(warmup * steps), self._last - 1)
        self._end = None if latest is None else max(self._last, math.ceil(latest * steps))
        self._taken = 0
        self._left: dict[str, float] = {}  # of what was not zero when it was cut
        self._helped = {  # rows that the straight line has ever brought further than the pressure
            name: torch.zeros_like(module.weight[:, 0, 0, 0], dtype=torch.bool)
            for name, module in self.modules.items()
        }
        self._forget()

    def made(self, norm: nn.BatchNorm2d) -> nn.Module:
        return compactor(norm.weight)

    def place(self, norm: fx.Node, graph: ChannelGraph) -> fx.Node | None:
        return norm

    def parameters(self) -> Iterable[nn.Parameter | dict[str, Any]]:
        rows = [module.weight for module in self.modules.values()]
        return [{"params": rows, "momentum": self._momentum, "weight_decay": 0.0}] if rows else []

    def measured(self) -> dict[str, Tensor]:
        """Lengths of the rows, (N,) float64."""
        return {name: lengths(module.weight).double() for name, module in self.modules.items()}

    def gone(self) -> dict[str, Tensor]:
        return {name: row == 0 for name, row in self.measured().items()}

    def before_epoch(self, epoch: int) -> None:
        super().before_epoch(epoch)
        groups = self.task.full.optimizer.param_groups
        rows = {id(module.weight) for module in self.modules.values()}
        self._group = next((g for g in groups if any(id(p) in rows for p in g["params"])), {})

    @torch.no_grad()
    def after_backward(self) -> None:
        """Selected rows forget: neither the loss nor what it has said before moves them."""
        for row, stays in self._forgetting:
            if row.grad is not None:
                row.grad.mul_(stays)
            for value in remembered(self.task.full.optimizer, row):
                value.mul_(stays)

    @torch.no_grad()
    def after_step(self) -> None:
        if self._cut:
            return
        # The way that a constant gradient of this size goes in a step once momentum has built up.
        amount = self._strength * self._group["lr"] / (1 - self._group["momentum"])
        left = math.inf if self._end is None else max(self._end - self._taken, 1)  # steps
        for name, module in self.modules.items():
            size = lengths(module.weight)
            line = torch.where(self._masks[name], size / left, 0.0)
            self._helped[name] |= line > amount
            module.weight.mul_(shrinking(size, line.clamp_min(amount)).view(-1, 1, 1, 1))
        self._taken += 1
        if self._first <= self._taken <= self._last:
            self._select()

    def chosen(self, epoch: int) -> bool:
        if self._taken < self._last:
            self.rate = None  # the MACs depend on which rows are short
            self.full_rate()
        return epoch == self.task.epochs - 1 and self._clear()

    def finish(self) -> None:
        """Merge."""
        if not self._cut:
            self._clear()  # of a loop that ends early
            if self._recalibrate:
                shown = self.task.batches(self._recalibrate)
                update_bn((images for images, _ in shown), self._inserted.network)
            for name, module in self.modules.items():
                conv = self._model.get_submodule(name)
                assert isinstance(conv, nn.Conv2d)
                merge(conv, self.norms[name], module.weight)
            self.task.train(self.task.full)
            self._cut = True

    def closing(self, small: nn.Module) -> dict[str, Any]:
        if not self._left:
            return {}
        selected, zero, largest = (self._left[key] for key in ("selected", "zero", "largest"))
        pressed = self._left["pressed"]
        rest = f"; the others were zeroed, the longest {largest:.3g} of its layer's mean"
        said = (
            f"schedule=resrep: {zero:.0f} of {selected:.0f} selected rows had come to zero, "
            f"{pressed:.0f} of them by the pressure alone"
        )
        return {**self._left, "said": said + (rest if zero < selected else "")}

    def state(self) -> dict[str, Any]:
        rows = {name: module.weight.detach() for name, module in self.modules.items()}
        own = {"taken": self._taken, "left": self._left, "helped": self._helped}
        return {**super().state(), **own, "rows": rows}

    @torch.no_grad()
    def resume(self, state: Any) -> None:
        super().resume(state)
        self._taken, self._left = state["taken"], state["left"]
        for name, module in self.modules.items():
            module.weight.copy_(state["rows"][name])
            self._helped[name].copy_(state["helped"][name])
        self._forget()

    @property
    def settled_at(self) -> dict[str, Any] | None:
        return {"epoch": math.ceil(self._selects * self.task.epochs), "at_rest": None}

    def _select(self) -> None:
        """As many of the shortest rows as the pace allows by now; in the end all, for good."""
        if self._taken == self._last:
            self.rate = None
        total = round(self.full_rate() * sum(len(group) for group in self._groups))
        every, remove = pace(total, self._last - self._first, self._every, self._remove)
        since = self._taken - self._first
        if self._taken < self._last and since % every:
            return
        allowed = total if self._taken == self._last else remove * (since // every)
        if allowed and total:
            self._choose(min(1.0, allowed / total))
            self._forget()

    def _forget(self) -> None:
        """Which rows are not to hear of the loss."""
        self._forgetting = []
        for name, module in self.modules.items():
            if self._masks[name].any():
                stays = (~self._masks[name]).to(module.weight.dtype).view(-1, 1, 1, 1)
                self._forgetting.append((module.weight, stays))

    @torch.no_grad()
    def _clear(self) -> bool:
        """Zero the rows that are selected and not yet zero. Returns whether there were any."""
        rows = self.measured()
        there = {name: lengths_[self._masks[name]] for name, lengths_ in rows.items()}
        shares = {name: own / rows[name].mean() for name, own in there.items() if len(own)}
        selected = sum(len(own) for own in there.values())
        zero = sum(int((own == 0).sum()) for own in there.values())
        alone = {name: ~self._helped[name][self._masks[name]] for name in there}
        pressed = sum(int(((own == 0) & alone[name]).sum()) for name, own in there.items())
        largest = max((float(own.max()) for own in shares.values()), default=0.0)
        if not self._left:
            self._left = {
                "selected": selected,
                "zero": zero,
                "pressed": pressed,
                "largest": largest,
            }
        for name, module in self.modules.items():
            module.weight[self._masks[name]] = 0
        return zero < selected


def compactor(like: Tensor) -> nn.Conv2d:
    """A 1x1 convolution of (N,) channels that is the identity, of the kind of `like`."""
    conv = nn.Conv2d(len(like), len(like), 1, bias=False, device=like.device, dtype=like.dtype)
    nn.init.dirac_(conv.weight)
    return conv


def lengths(rows: Tensor) -> Tensor:
    """Euclidean, of each row: (N, N, 1, 1) -> (N,)."""
    found: Tensor = torch.linalg.vector_norm(rows.detach().flatten(1), dim=1)
    return found


def shrinking(lengths: Tensor, amounts: Tensor) -> Tensor:
    """What rows of these lengths are multiplied by to get shorter by these amounts, and to be
    exactly zero where they are no longer than that: max(0, 1 - amount / |q|), the proximal step of
    amount |q|. Both (N,) -> (N,)."""
    return (1 - amounts / lengths.clamp_min(_TINY)).clamp_min(0)


def pace(total: int, steps: int, every: int, remove: int) -> tuple[int, int]:
    """Steps between two selections, and how many more rows each takes, so that `total` are selected
    after `steps`: as given, or as much faster as it takes, first by more selections."""
    if total == 0 or (steps // every) * remove >= total:
        return every, remove
    every = max(1, min(every, steps, steps * remove // total))
    return every, max(remove, math.ceil(total / max(1, steps // every)))


@torch.no_grad()
def merge(conv: nn.Conv2d, norm: nn.BatchNorm2d, rows: Tensor) -> None:
    """Let a convolution and its BatchNorm compute, in evaluation, what both and a compactor behind
    them did: weights Q diag(g / s) W and shifts Q (b - g m / s), for scale g, shift b, mean m and
    deviation s. rows: Q, (N, N, 1, 1).

    The new mean, and the new variance as if channels were independent, go into the statistics, and
    scale and shift take them back: so the layer goes on nearly alike in training. Of a row of zeros
    all is zero.
    """
    mean, var, q = norm.running_mean, norm.running_var, rows.detach().flatten(1)
    assert mean is not None
    assert var is not None
    mixed = q * (norm.weight / (var + norm.eps).sqrt())
    conv.weight.copy_(torch.einsum("ij,jchw->ichw", mixed, conv.weight))
    if conv.bias is not None:
        mean = mean - conv.bias
        conv.bias.zero_()
    spread = mixed.square() @ var
    norm.bias.copy_(q @ norm.bias)
    norm.weight.copy_((spread + norm.eps).sqrt() * q.any(1))
    for statistic, value in ((norm.running_mean, mixed @ mean), (norm.running_var, spread)):
        assert statistic is not None
        statistic.copy_(value)
