"""What the training loop works on, as it is before the first epoch."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fpgm.config import Config
from fpgm.data import sets
from fpgm.data.images import Images
from fpgm.errors import CheckpointError, first_line
from fpgm.machine.device import choose_device, choose_precision, keep_freed_memory
from fpgm.machine.ranks import ALONE, Ranks, check_agreement, from_first, spread
from fpgm.methods.compacted import Compacted, compacted
from fpgm.methods.zeroing import Pruning
from fpgm.networks import models
from fpgm.runs import checkpoint


@dataclass
class Job:
    """What the loop works on.

    arch: the arguments of models.model that give this network. What is trained is chosen by
    `set_up`: compacted, the compact network in place of `model`, where that is exact; stepper, the
    optimizer of whichever is trained; forward, that network as all ranks train it; fast, the same
    compiled, where that is asked for.
    """

    config: Config
    directory: Path
    images: Images
    arch: dict[str, Any]
    model: nn.Module
    optimizer: torch.optim.SGD
    pruning: Pruning
    precision: torch.dtype | None
    ranks: Ranks
    compacted: Compacted | None = field(default=None, init=False)
    stepper: torch.optim.SGD = field(init=False)
    forward: nn.Module = field(init=False)
    fast: nn.Module = field(init=False)

    def __post_init__(self) -> None:
        self.stepper, self.forward, self.fast = self.optimizer, self.model, self.model

    @property
    def device(self) -> torch.device:
        return self.images.device

    @property
    def network(self) -> nn.Module:
        """The network that is trained, as it is."""
        return self.model if self.compacted is None else self.compacted.network

    def set_up(self) -> None:
        """Choose what is trained, now that the selection is known."""
        schedule = self.config.schedule
        still = schedule.name == "frozen" and schedule.zero_at_start
        # The penalty's steps are not those that write_back makes up for.
        if still and schedule.train_compact and not self.config.criterion.slimming:
            groups, image = self.pruning.prunable.groups, self.images.image_shape
            keep = self.pruning.keep
            self.compacted = compacted(self.model, self.optimizer, keep, groups, image)
        self.stepper = self.optimizer if self.compacted is None else self.compacted.optimizer
        self.pruning.watch(self.compacted)
        self.forward = spread(self.network, self.ranks)
        self.fast = self._compiled() if self.config.compile else self.forward

    def _compiled(self) -> nn.Module:
        """What is trained, compiled for full batches, once for all epochs; on a GPU as CUDA graphs,
        but not where processes meet in the middle of them."""
        mode = "reduce-overhead" if self.device.type == "cuda" else None
        if self.ranks.world > 1:
            # Split at DDP's buckets, the parts of a graph overwrite each other's buffers in torch
            # before 2.9 (pytorch/pytorch#160745).
            mode, torch._dynamo.config.optimize_ddp = None, False
        return torch.compile(self.forward, mode=mode, dynamic=False)  # type: ignore[return-value]

    def outputs(self, inputs: torch.Tensor) -> torch.Tensor:
        """What is trained says of a batch: (B, C, H, W) -> (B, classes)."""
        # Compiling for the last, short batch as well takes longer than its one step an epoch.
        full = len(inputs) == self.config.batch_size // self.ranks.world
        logits: torch.Tensor = (self.fast if full else self.forward)(inputs)
        return logits

    def select_again(self, epoch: int) -> dict[str, Any]:
        """Select and zero after an epoch, as the schedule says; what is trained follows.

        Returns the facts of Pruning.after_epoch. Raises Error where the processes do not agree.
        """
        facts = self.pruning.after_epoch(epoch)
        check_agreement(self.pruning.keep, self.ranks)
        if facts["churn"] > 0 and self.compacted is not None:
            self.set_up()  # the compact network has other filters now
        return facts

    def start_epoch(self, lr: float) -> None:
        """Make ready to train."""
        for optimizer in (self.optimizer, self.stepper):
            for group in optimizer.param_groups:
                group["lr"] = lr
        self.network.train()
        self.pruning.start_epoch()

    def end_epoch(self, steps: int) -> None:
        """Bring the network at full width up to date after `steps` steps."""
        if self.compacted is not None:
            self.compacted.write_back(steps)


def load_images(config: Config, ranks: Ranks = ALONE) -> Images:
    """The run's data set, on its device. Raises Error."""
    device = choose_device(config.device)
    # The others wait until the first has downloaded or decoded what is then there for all.
    images = sets.load(device, **asdict(config.dataset)) if ranks.first else None
    from_first(None, ranks)
    return images or sets.load(device, **asdict(config.dataset))


def prepare(
    config: Config, directory: Path, images: Images, fresh: bool, ranks: Ranks = ALONE
) -> Job:
    """Network and optimizer as they are before the first epoch.

    fresh: no epoch is done, so that pretrained weights are wanted.
    """
    keep_freed_memory()
    arch: dict[str, Any] = {
        "name": config.arch,
        "num_classes": len(images.classes),
        "in_channels": images.image_shape[0],
    }
    torch.manual_seed(config.seed)
    model = models.model(**arch)
    if fresh and config.pretrained is not None:
        load_pretrained(model, config.arch, config.pretrained)
    models.check_size(config.arch, model, images.image_shape)
    model = model.to(images.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    o = config.optimizer
    optimizer = torch.optim.SGD(
        model.parameters(), o.lr, o.momentum, weight_decay=o.weight_decay, nesterov=o.nesterov
    )
    precision = choose_precision(config.precision, images.device)
    pruning = Pruning(
        model, optimizer, config, images.image_shape, lambda: shown(config, images), ranks
    )
    return Job(config, directory, images, arch, model, optimizer, pruning, precision, ranks)


def shown(config: Config, images: Images) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """The training images that the criterion looks at: the same ones at every selection, so that
    none changes by the draw, and on any number of processes."""
    stream = images.epoch(config.batch_size, config.seed, augmented=False)
    return itertools.islice(stream, config.criterion.batches)


def load_pretrained(model: nn.Module, arch: str, name: str) -> None:
    """Start from a run directory, a checkpoint, or torchvision's ImageNet weights."""
    if name != "torchvision":
        checkpoint.load_weights(model, checkpoint.pretrained_file(name))
        return
    try:
        weights = models.torchvision_weights(arch)
    except (OSError, RuntimeError) as error:
        raise CheckpointError(
            f"pretrained=torchvision: the download failed ({first_line(error)}); put "
            "the file where torch.hub looks for it, or give a checkpoint"
        ) from error
    checkpoint.fit(model, weights, f"pretrained=torchvision, {arch}")
