"""A training loop of one's own as the methods see it."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from fpgm.errors import Error
from fpgm.graph.groups import Prunable
from fpgm.machine.ranks import ALONE, Ranks
from fpgm.methods import Goal, Schedule, Trained

log = logging.getLogger("fpgm")

Pairs = Iterable[tuple[Tensor, Tensor]]  # (B, C, H, W) normalised images and (B,) labels
Source = Pairs | Callable[[], Pairs]


def ranks() -> Ranks:
    """This process among those of a loop that is spread over several."""
    if dist.is_available() and dist.is_initialized():
        return Ranks(dist.get_rank(), dist.get_world_size())
    return ALONE


@dataclass
class LoopTask:
    """What the methods may look at and act on (pruning.method.Task), of a loop that others run.

    full: the network that the loop trains and its optimizer; source: of images, where there are
    any; count: how many batches of them the criterion is shown; seed: of their order; image:
    (C, H, W); steps_given: of the optimizer, in an epoch.
    """

    full: Trained
    goal: Goal
    prunable: Prunable
    epochs: int
    from_scratch: bool
    source: Source | None = None
    count: int = 0
    seed: int = 0
    image: tuple[int, int, int] | None = None
    steps_given: int | None = None
    ranks: Ranks = field(default_factory=ranks)

    def __post_init__(self) -> None:
        self.trained = self.full

    @property
    def device(self) -> torch.device:
        return next(self.full.network.parameters()).device

    @property
    def steps(self) -> int:
        if self.steps_given is None:
            raise Error("steps=None: this schedule counts them; steps=len(loader), of an epoch")
        return self.steps_given

    @property
    def schedule(self) -> Schedule:
        raise Error("methods beside the schedule go with fpgm-train, not with a loop of your own")

    @property
    def image_shape(self) -> tuple[int, int, int]:
        if self.image is None:
            raise Error("image=None: MACs depend on the images' size; image=(C, H, W)")
        return self.image

    @property
    def preprocessing(self) -> Mapping[str, Any]:
        return {}

    def shown(self) -> Iterator[tuple[Tensor, Tensor]]:
        return self.batches(self.count)

    def batches(self, count: int) -> Iterator[tuple[Tensor, Tensor]]:
        """So many batches of the source, on the network's device, the same ones at every call where
        torch's generator decides on their order. The loop's own random numbers stay as they are."""
        if self.source is None:
            raise Error(
                "batches=None: the criterion or schedule.recalibrate looks at images; "
                "batches=loader, of (images, labels)"
            )
        if isinstance(self.source, Iterator):
            raise Error(
                "batches: is an iterator, which can be read once; a loader, a list, or a function "
                "that returns one"
            )
        some = False
        for pair in _apart(self.source, count, self.seed):
            if not isinstance(pair, tuple | list) or len(pair) != 2:
                raise Error(f"batches: has a {type(pair).__name__}; (images, labels) are looked at")
            some, (images, labels) = True, pair
            yield images.to(self.device), labels.to(self.device)
        if count and not some:
            raise Error("batches: has no images; a loader of (images, labels)")

    def train(self, trained: Trained) -> None:
        """Step this from now on: the loop goes on calling the same module, and what it computes
        becomes that of `trained`, whose weights are the same. Raises Error where they are not, and
        where something else has put itself in the module's place."""
        network = self.full.network
        if self.trained is not self.full:
            del network.forward
        if trained is not self.full:
            ours = {id(parameter) for parameter in network.parameters()}
            if not all(id(parameter) in ours for parameter in trained.network.parameters()):
                raise Error("this method trains another network in place of yours: fpgm-train does")
            if "forward" in vars(network):
                raise Error(
                    "this schedule replaces the network's forward, and something has done so "
                    "before (as accelerate does for mixed precision); schedule=fade, or soft"
                )
            network.forward = trained.network.forward
        self.trained = trained

    def loss(self, outputs: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(outputs, labels)

    def given(self) -> nn.Module:
        raise Error("the network that a loop of your own has started from is not kept")

    def accelerated(self, network: nn.Module) -> Callable[[Tensor], Tensor]:
        return network

    def say(self, line: str) -> None:
        log.info(line)

    def warn(self, line: str) -> None:
        log.warning("warning: %s", line)


def _apart(source: Source, count: int, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """So many of its pairs, read with random numbers of their own."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        reader = iter(source() if callable(source) else source)
        state = torch.get_rng_state()
    for _ in range(count):
        with torch.random.fork_rng(devices=[]):
            torch.set_rng_state(state)
            pair = next(reader, None)
            state = torch.get_rng_state()
        if pair is None:
            return
        yield pair
