"""The finished run whose layers are looked at: its network, and images that it may be asked."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fpgm.compaction.compact import load
from fpgm.config import dataset
from fpgm.data import sets
from fpgm.data.images import Images
from fpgm.errors import Error
from fpgm.machine.device import choose_device, choose_precision
from fpgm.runs import checkpoint
from fpgm.runs.run import read_config, read_report

SEEN = 0.2  # share of the training images held out now where the run has held none out
PIXELS = 256_000  # of a batch that the accuracy is measured on: its maps stay in a core's cache


@dataclass(frozen=True)
class Subject:
    """seen: whether the network was trained on the images that are held out."""

    directory: Path
    config: dict[str, Any]
    model: nn.Module
    images: Images
    precision: torch.dtype | None
    seen: bool

    def shown(self, at_most: int) -> list[tuple[Tensor, Tensor]]:
        """The images that the accuracy is measured on: held out, never test images."""
        _, height, width = self.images.image_shape
        size = max(1, PIXELS // (height * width))
        return list(self.images.held_out(size, at_most=at_most))

    def training(self, count: int) -> Iterator[tuple[Tensor, Tensor]]:
        """So many batches of training images as they are, none of them held out: those that a
        criterion is shown in a run of the same seed."""
        batches = self.images.epoch(self.config["batch_size"], self.config["seed"], augmented=False)
        return itertools.islice(batches, count)


def find(directory: Path) -> Subject:
    """A run directory. Raises Error and those of what it reads."""
    if not directory.is_dir():
        raise Error(f"{directory}: no such directory; give that of a finished run")
    config = read_config(directory)
    if read_report(directory) is None or not (directory / "zeroed.pt").exists():
        raise Error(f"{directory}: that run is not done; finish it first")
    device = choose_device("auto")
    model = load(directory / "zeroed.pt").to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    # As the network was trained, and not as the images that stay would have it.
    made = checkpoint.read(directory / "zeroed.pt", ("preprocessing",))["preprocessing"]
    given = dataset(config["dataset"]).model_dump()
    constants = {
        "mean": made["mean"],
        "std": made["std"],
        "validation": given["validation"] or SEEN,
    }
    images = sets.load(device, **given | constants)
    precision = choose_precision(config["precision"], device)
    return Subject(directory, config, model, images, precision, not given["validation"])
