"""What the training loop works on, as it is before the first epoch."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fpgm import checkpoint, data, models
from fpgm.config import Config
from fpgm.machine import choose_device, choose_precision, keep_freed_memory
from fpgm.pruning import Pruning


class TrainingError(RuntimeError):
    """A run that cannot go on; what was written stays."""


@dataclass
class Job:
    """What the loop works on. arch: the arguments of models.model that give this network."""

    config: Config
    directory: Path
    images: data.Data
    arch: dict[str, Any]
    model: nn.Module
    optimizer: torch.optim.Optimizer
    pruning: Pruning
    precision: torch.dtype | None

    @property
    def device(self) -> torch.device:
        return self.images.train_images.device


def prepare(config: Config, directory: Path, fresh: bool) -> Job:
    """Data, network and optimizer as they are before the first epoch.

    fresh: no epoch is done, so that pretrained weights are wanted.
    """
    device = choose_device(config.device)
    keep_freed_memory()
    images = data.load(config.dataset, device)
    arch: dict[str, Any] = {
        "name": config.arch,
        "num_classes": len(images.classes),
        "in_channels": images.image_shape[0],
    }
    torch.manual_seed(config.seed)
    model = models.model(**arch)
    if fresh and config.pretrained is not None:
        checkpoint.load_weights(model, checkpoint.pretrained_file(config.pretrained))
    models.check_size(config.arch, model, images.image_shape)
    model = model.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    o = config.optimizer
    optimizer = torch.optim.SGD(
        model.parameters(), o.lr, o.momentum, weight_decay=o.weight_decay, nesterov=o.nesterov
    )
    precision = choose_precision(config.precision, device)
    pruning = Pruning(model, optimizer, config, images.image_shape)
    return Job(config, directory, images, arch, model, optimizer, pruning, precision)
