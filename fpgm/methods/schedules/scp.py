"""Operation-aware soft channel pruning (SCP, Kang & Han, ICML 2020): masks that are differentiable.

Behind BatchNorm and ReLU a channel whose shift is far below zero, by its scale, hardly ever fires.
While the network trains such channels are dropped at random, the more often the less they fire,
and a penalty on shifts and scales brings more of them there.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, fx, nn
from torch.distributions import RelaxedBernoulli

from fpgm.compaction.constants import analyse
from fpgm.graph.cost import cost
from fpgm.graph.flow import is_relu, tails
from fpgm.graph.trace import ChannelGraph, trace
from fpgm.pruning.inserting import Inserting
from fpgm.pruning.method import Task
from fpgm.pruning.silence import Silence
from fpgm.pruning.zeroing import Recalibrate
from fpgm.selection.ranking import least_kept

Strength = Annotated[float, Field(ge=0, examples=["5e-5"])]
Positive = Annotated[float, Field(gt=0, examples=["0.5"])]
Number = Annotated[float, Field(examples=["0.05"])]
Share = Annotated[float, Field(gt=0, lt=1, examples=["0.95"])]
Until = Annotated[Literal["goal", "end"], Field(examples=["goal"])]

_CHECKS = 10  # in an epoch, of whether the goal is met


class SCP(Inserting):
    """Masks channels behind BatchNorm and ReLU while the network trains, adds strength (shift +
    scale_weight |scale|) of each to the loss, and cuts at the end: the channels that fire least,
    over the network, until the goal is met. From when those that are dropped in evaluation meet it
    there is no penalty. With until=end there is to the end, and what is dropped then goes, whatever
    the goal.

    threshold, cut, steepness: of `silent`, `dropped`: what fires less often than 1 - cut above
    threshold is dropped in evaluation; temperature: of the masks in training. A layer keeps the
    share `floor` of its channels.
    """

    name: ClassVar[str] = "scp"
    silences: ClassVar[bool] = True

    def __init__(
        self,
        task: Task,
        *,
        strength: Strength = 5e-5,
        scale_weight: Strength = 2.0,
        threshold: Number = 0.05,
        cut: Share = 0.95,
        steepness: Positive = 20.0,
        temperature: Positive = 0.5,
        until: Until = "goal",
        recalibrate: Recalibrate = 0,
    ) -> None:
        """Raises Error, GraphError."""
        self._softness = Softness(threshold, cut, steepness, temperature)
        super().__init__(task, recalibrate=recalibrate)
        self._strength, self._scale_weight, self._until = strength, scale_weight, until
        self._tails = tails(trace(self._model, task.image))
        self._pressing = True  # whether there is a penalty
        self._taken = 0  # steps
        self._way = 0.0  # that they would take a parameter whose gradient is always 1
        self._said: dict[str, int] = {}
        self._on_cpu: tuple[ChannelGraph, Any] | None = None

    def made(self, norm: nn.BatchNorm2d) -> nn.Module:
        least = least_kept(norm.num_features, self.task.goal.rule.floor)
        return Mask(norm, self._softness, least)

    def place(self, norm: fx.Node, graph: ChannelGraph) -> fx.Node | None:
        """Behind the ReLU that alone reads the BatchNorm."""
        reader = next(iter(norm.users)) if len(norm.users) == 1 else None
        return reader if reader is not None and is_relu(reader, graph) else None

    def measured(self) -> dict[str, Tensor]:
        """How often each channel fires above the threshold, (N,) float64."""
        return {name: 1 - mask.silent().detach() for name, mask in self.modules.items()}

    def gone(self) -> dict[str, Tensor]:
        return {name: ~mask.kept() for name, mask in self.modules.items()}

    def start(self) -> None:
        super().start()
        if self._until == "end" and not self._cut:
            self.task.say("schedule.until=end: what is dropped in the end goes, whatever the goal")

    def before_epoch(self, epoch: int) -> None:
        super().before_epoch(epoch)
        self._means = [norm.running_mean.clone() for norm in self._statistics()]
        groups = self.task.full.optimizer.param_groups
        of = {id(parameter): group for group in groups for parameter in group["params"]}
        self._groups_of = {name: of.get(id(norm.bias), {}) for name, norm in self.norms.items()}

    @torch.no_grad()
    def after_backward(self) -> None:
        """The penalty's gradient; shifts have no weight decay, which would hold them near zero."""
        if self._cut:
            return
        for name, norm in self.norms.items():
            scale, shift = norm.weight.grad, norm.bias.grad
            if scale is None or shift is None:
                continue
            if isinstance(self.task.full.optimizer, torch.optim.SGD):  # others decay in other ways
                shift.add_(norm.bias, alpha=-self._groups_of[name].get("weight_decay", 0.0))
            if self._pressing:
                free = (~self.modules[name].held()).to(shift.dtype)
                shift.add_(free, alpha=self._strength)
                scale.addcmul_(free, norm.weight.sign(), value=self._strength * self._scale_weight)

    @torch.no_grad()
    def after_step(self) -> None:
        if self._cut:
            return
        # Means are estimated on what is seen: of channels whose mask keeps them.
        for norm, before, mask in zip(
            self._statistics(), self._means, self.modules.values(), strict=True
        ):
            assert norm.running_mean is not None
            if mask.drawn is not None:
                torch.where(mask.drawn > 0.5, norm.running_mean, before, out=norm.running_mean)
            before.copy_(norm.running_mean)
        self._taken += 1
        group = next(iter(self._groups_of.values()))
        self._way += group.get("lr", 0.0) / (1 - group.get("momentum", 0.0))
        if self._until == "goal" and self._taken % max(1, self.task.steps // _CHECKS) == 0:
            self._pressing = not self._met()

    def chosen(self, epoch: int) -> bool:
        if self._until == "goal":
            self.rate = None
        last = epoch == self.task.epochs - 1
        self.scores = {name: values.cpu() for name, values in self.measured().items()}
        self.use(self.expected())
        return last and self._silence()

    def expected(self) -> dict[str, Tensor]:
        """What is dropped goes, and until the goal is met what fires least."""
        if self._cut:
            return self.keep
        keep = super().expected() if self._until == "goal" else self._everything()
        for name, mask in self.modules.items():
            opened, align = int(mask.kept().sum()), self.rule.align
            count = min(-(-opened // align) * align, len(keep[name]))
            keep[name] = mask.order()[:count].cpu().sort().values
        return keep

    def full_rate(self) -> float:
        return super().full_rate() if self._until == "goal" else 0.0

    def finish(self) -> None:
        if not self._cut:  # of a run without epochs, or of a loop that ends early
            if self.task.epochs == 0:
                self.use(self.expected())
            self._silence()
        super().finish()

    def closing(self, small: nn.Module) -> dict[str, Any]:
        if not self._said:
            return {}
        cut, dropped = self._said["cut"], self._said["dropped"]
        said = (
            f"schedule=scp: of {cut} channels cut {dropped} had been dropped in evaluation before, "
            f"which costs nothing, and {cut - dropped} had not"
        )
        return {**self._said, "said": said}

    def state(self) -> dict[str, Any]:
        own = {
            "taken": self._taken,
            "way": self._way,
            "pressing": self._pressing,
            "said": self._said,
        }
        return {**super().state(), **own}

    def resume(self, state: Any) -> None:
        super().resume(state)
        self._taken, self._way, self._pressing = state["taken"], state["way"], state["pressing"]
        self._said = dict(state["said"])

    def _statistics(self) -> list[Any]:
        return list(self.norms.values()) if not self._cut else []

    def _met(self) -> bool:
        """Whether the goal is by what is dropped in evaluation alone."""
        goal = self.task.goal
        kept = {name: ~mask for name, mask in self.gone().items()}
        if goal.macs_target is None:
            keep = super().expected()
            there = {name: keep[name].to(mask.device) for name, mask in kept.items()}
            return all(
                int(mask.sum()) == int(mask[there[name]].sum()) for name, mask in kept.items()
            )
        if self._on_cpu is None:  # the analysis looks at every small result
            graph = trace(copy.deepcopy(self._model).cpu(), self.task.image)
            self._on_cpu = graph, cost(graph.module, self.task.image_shape)
        graph, dense = self._on_cpu
        keep = self._everything()
        keep |= {name: mask.nonzero().flatten().cpu() for name, mask in kept.items()}
        met: bool = analyse(graph, keep).macs(dense) <= goal.macs_target * dense.macs
        return met

    def _silence(self) -> bool:
        """Cut what is selected. Returns whether that changes what the network computes."""
        gone = self.gone()
        pairs = [(self._masks[name], dropped) for name, dropped in gone.items()]
        self._said = {
            "cut": sum(int(mask.sum()) for mask, _ in pairs),
            "dropped": sum(int((mask & dropped).sum()) for mask, dropped in pairs),
        }
        self._warn_of_haste()
        held = [name for name, mask in self.modules.items() if mask.held().any()]
        if held:
            self.task.warn(
                f"schedule=scp: all but a few channels of {', '.join(held)} hardly ever fire; "
                f"floor={self.rule.floor:g} of them stay; try a smaller schedule.strength"
            )
        if self._until == "goal":
            self._warn_of_overshoot()
        changes = any(bool((mask != dropped).any()) for mask, dropped in pairs)
        Silence(self._masks, self._tails, self.task.full).scale(0.0)
        self.task.train(self.task.full)
        self._cut = True
        return changes

    def _warn_of_overshoot(self) -> None:
        """Where more is dropped than the goal asks for: at equal MACs it is to be compared with
        nothing."""
        wanted = super().expected()
        kept = sum(len(self.keep[name]) for name in self.modules)
        more = sum(len(wanted[name]) for name in self.modules) - kept
        if more > 0.1 * self._said["cut"]:
            self.task.warn(
                f"schedule.strength={self._strength:g}: {more} channels more are dropped than the "
                f"goal asks for, and go as well; schedule.strength={self._strength / 2:.1g}"
            )

    def _warn_of_haste(self) -> None:
        """Where too few channels were dropped by the end of the training."""
        cut, dropped = self._said["cut"], self._said["dropped"]
        if dropped >= 0.9 * cut or not self._way:
            return
        # A scale and a shift are of the size of 1.
        enough = 1 / self._way
        more = f"; in so few steps about {enough:.1g}" if enough > self._strength else ""
        self.task.warn(
            f"schedule.strength={self._strength:g}: {cut - dropped} of {cut} channels were cut "
            f"that had not been dropped{more}"
        )


@dataclass(frozen=True)
class Softness:
    """What a mask makes of a channel: see SCP."""

    threshold: float = 0.05
    cut: float = 0.95
    steepness: float = 20.0
    temperature: float = 0.5


def silent(shift: Tensor, scale: Tensor, threshold: float) -> Tensor:
    """The share of its inputs at which a channel is below the threshold behind BatchNorm, where
    they are normal: (1 + erf((threshold - shift) / (|scale| sqrt 2))) / 2. (N,) -> (N,)."""
    found: Tensor = torch.special.ndtr(below(shift, scale, threshold))
    return found


def below(shift: Tensor, scale: Tensor, threshold: float) -> Tensor:
    """How many deviations a channel's mean lies below the threshold. (N,) -> (N,)."""
    return (threshold - shift) / (scale.abs() + 1e-8)


class Mask(nn.Module):
    """Behind a BatchNorm and ReLU, of N channels: maps (B, N, H, W) times, in training, the keep
    part of a relaxed one-hot variable of (1 - p, p), drawn once a step for each channel from
    torch's generator, p = sigmoid(steepness (silent - cut)); in evaluation 1 where silent < cut, 0
    elsewhere. The `least` channels that fire most are always kept.

    It takes its mode from the BatchNorm's. drawn: (N,), of the last step in training.
    """

    def __init__(self, norm: nn.BatchNorm2d, softness: Softness, least: int) -> None:
        super().__init__()
        self._norm = [norm]  # which is the network's own, and none of this module's
        self._softness, self._least = softness, least
        self.drawn: Tensor | None = None

    def forward(self, maps: Tensor) -> Tensor:
        factors = self.sampled() if self._norm[0].training else self.kept()
        return maps * factors.to(maps.dtype).view(1, -1, 1, 1)

    def silent(self) -> Tensor:
        """(N,), float64: beyond 0.95 float32 has few digits."""
        norm = self._norm[0]
        return silent(norm.bias.double(), norm.weight.double(), self._softness.threshold)

    @torch.no_grad()
    def order(self) -> Tensor:
        """Channels by how often they fire, most first: also those that all but never do. (N,)."""
        norm = self._norm[0]
        far = below(norm.bias.double(), norm.weight.double(), self._softness.threshold)
        return far.argsort(stable=True)

    def sampled(self) -> Tensor:
        """(N,), in 0..1. Of two relaxed classes the first is a relaxed Bernoulli variable."""
        share = self.silent()
        odds = self._softness.steepness * (self._softness.cut - share)
        temperature = torch.full((), self._softness.temperature, device=odds.device)
        found = RelaxedBernoulli(temperature, logits=odds, validate_args=False).rsample()
        found = torch.where(self._held(share), 1.0, found)
        self.drawn = found.detach()
        return found

    @torch.no_grad()
    def kept(self) -> Tensor:
        """(N,) bool, in evaluation."""
        share = self.silent()
        return (share < self._softness.cut) | self._held(share)

    @torch.no_grad()
    def held(self) -> Tensor:
        """(N,) bool: kept although they hardly ever fire, as others do even less."""
        return self._held(self.silent())

    def _held(self, share: Tensor) -> Tensor:
        most = torch.zeros_like(share, dtype=torch.bool)
        most[self.order()[: self._least]] = True
        return most & (share >= self._softness.cut)
