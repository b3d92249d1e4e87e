"""The moments of training at which a method may act, and what it acts on."""

from __future__ import annotations

import inspect
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor, nn

from fpgm.config import checked
from fpgm.graph.groups import Prunable
from fpgm.machine.ranks import Ranks
from fpgm.pruning.latency import Latency
from fpgm.selection.rule import Rule

Batches = Iterator[tuple[Tensor, Tensor]]  # (B, C, H, W) normalised images and (B,) labels


@dataclass(frozen=True)
class Trained:
    """A network and the optimizer that steps it. rows: convolution -> which filters of the network
    at full width it has, those of a layer that is not named all."""

    network: nn.Module
    optimizer: torch.optim.Optimizer
    rows: Mapping[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Goal:
    """How much is to go: rate, a share of each layer's filters, or macs_target, a share of the
    dense network's MACs, or latency, of its time; residual: what is decided together (see
    graph.groups)."""

    rule: Rule
    rate: float
    macs_target: float | None = None
    residual: str = "independent"
    latency: Latency | None = None

    @property
    def prunes(self) -> bool:
        budget = self.macs_target is not None or self.latency is not None
        return budget or self.rule.prunes(self.rate)


class Task(Protocol):
    """What a method may look at and act on (training.task.Task)."""

    full: Trained  # the network at full width
    trained: Trained  # what the loop steps: the same, unless a method trains another in its place
    goal: Goal
    prunable: Prunable
    ranks: Ranks

    @property
    def epochs(self) -> int: ...

    @property
    def device(self) -> torch.device: ...

    @property
    def steps(self) -> int:
        """Of an epoch."""

    @property
    def schedule(self) -> Schedule:
        """The method that owns the selection. Raises Error where no others go beside it."""

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(C, H, W). Raises Error where it is not known."""

    @property
    def image(self) -> tuple[int, int, int] | None:
        """The same, None where it is not known."""

    @property
    def preprocessing(self) -> Mapping[str, Any]:
        """What is known of the images: data.images.preprocessing."""

    @property
    def from_scratch(self) -> bool:
        """Whether the network starts at random."""

    def shown(self) -> Batches:
        """The training images that the criterion looks at, the same ones at every call."""

    def batches(self, count: int) -> Batches:
        """So many batches of training images, as they are."""

    def train(self, trained: Trained) -> None:
        """Step this from now on."""

    def loss(self, outputs: Tensor, labels: Tensor) -> Tensor:
        """The task's own of a batch: outputs (B, classes), labels (B,)."""

    def given(self) -> nn.Module:
        """A copy of the trained network that the run starts from, as it was then."""

    def accelerated(self, network: nn.Module) -> Callable[[Tensor], Tensor]:
        """The same function of a batch of images, compiled where the run is."""

    def say(self, line: str) -> None:
        """On the screen and in the run's log."""

    def warn(self, line: str) -> None:
        """Say it as a warning."""


class Method:
    """What pruning does while a network trains. A moment does nothing unless a method says so.

    A method is one file of this package and one YAML; the keyword parameters of its __init__ are
    its options, and their annotations say what is allowed.
    """

    name: ClassVar[str]
    quantises: ClassVar[bool] = False  # whether it says which values weights may have

    def __init__(self, task: Task) -> None:
        self.task = task

    def start(self) -> None:
        """Before the first epoch of a fresh run."""

    def before_epoch(self, epoch: int) -> None:
        """Before an epoch's first step; epochs count from 0."""

    def parameters(self) -> Iterable[nn.Parameter | dict[str, Any]]:
        """Trained beside the network's own; or groups of them with settings of their own, as
        torch.optim takes them: {"params": [...], "weight_decay": 0.0}."""
        return ()

    def loss(self, inputs: Tensor, outputs: Tensor, labels: Tensor) -> Tensor | float:
        """Added to the task's loss of a batch: inputs (B, C, H, W), outputs (B, classes)."""
        return 0.0

    def after_backward(self) -> None:
        """The gradients are there."""

    def after_step(self) -> None:
        """The weights have moved."""

    def after_epoch(self, epoch: int) -> dict[str, Any]:
        """May choose again. Returns columns of history.csv."""
        return {}

    def finish(self) -> None:
        """After the last epoch: leaves a plain network at full width."""

    def closing(self, small: nn.Module) -> dict[str, Any]:
        """What the report is to say of it, plain values; `said` is a line of the closing table.
        small: the compact network."""
        return {}

    def state(self) -> dict[str, Any]:
        """Tensors and plain values, from which `resume` goes on to the bit."""
        return {}

    def resume(self, state: Mapping[str, Any]) -> None:
        """In place of `start`, in a run that goes on."""

    def still_during(self, epoch: int) -> bool:
        """Whether filters that are pruned when `epoch` begins stay as they are in it, and nothing
        else is done to them: then the compact network may be trained in their place."""
        return False

    @classmethod
    def problems(cls, goal: Goal, from_scratch: bool) -> list[str]:
        """A line for each thing that keeps this method from being used so."""
        return []

    @classmethod
    def check(cls, options: Mapping[str, Any], prefix: str) -> list[str]:
        """A line for each option that is unknown or has a value it does not take."""
        return checked(_options(cls), options, prefix)


class Schedule(Method):
    """A method that owns the selection. keep: convolution -> kept filters, all that can be pruned;
    scores: layer -> (N,), what they were chosen by after the last epoch, where they were."""

    keep: dict[str, Tensor]
    scores: Mapping[str, Tensor] = {}
    # Whether what is selected at the start is gone before the first step.
    at_once: ClassVar[bool] = True
    # Whether what is pruned loses its BatchNorm's scale and shift, too.
    silences: ClassVar[bool] = False
    latency: Mapping[str, Any] = {}  # what the clock said of the widths, where it chose them

    @property
    def holds(self) -> bool:
        """Whether what has been selected by the first epoch is gone then, and does not learn."""
        return False

    @property
    def rule(self) -> Rule:
        """How it chooses: as the run says, where it has no way of its own."""
        return self.task.goal.rule

    def full_rate(self) -> float:
        """The rate that the run comes to."""
        return self.task.goal.rate

    @property
    def settled_at(self) -> dict[str, Any] | None:
        """epoch: how many were done when the selection was fixed; at_rest: whether it had come to
        rest, None where the moment was given. None where it may change to the end."""
        return None

    @property
    def zeroed(self) -> nn.Module:
        """The network as it would be if training ended now."""
        return self.task.full.network

    def expected(self) -> dict[str, Tensor]:
        """What would be kept in the end, by the weights as they stand. Changes nothing."""
        return self.keep


def _options(method: type[Method]) -> dict[str, tuple[Any, Any]]:
    """Name -> (annotation, default) of the keyword parameters of __init__."""
    make: Callable[..., None] = method.__init__
    hints = typing.get_type_hints(make, include_extras=True)
    parameters = inspect.signature(make).parameters.values()
    return {
        p.name: (hints[p.name], ... if p.default is p.empty else p.default)
        for p in parameters
        if p.kind is p.KEYWORD_ONLY
    }
