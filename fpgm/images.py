"""What a run needs of a data set, wherever its images lie."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

import torch
from torch import Tensor

from fpgm.distributed import ALONE, Ranks

Batches = Iterator[tuple[Tensor, Tensor]]  # (B, C, H, W) normalised images and (B,) labels


class Images(Protocol):
    """A data set, in memory (fpgm.data.Data) or streamed from the disk (fpgm.streaming.Stream)."""

    @property
    def classes(self) -> tuple[str, ...]: ...

    @property
    def device(self) -> torch.device: ...

    @property
    def image_shape(self) -> tuple[int, int, int]: ...

    @property
    def counts(self) -> tuple[int, int]:
        """How many images there are to train and to test."""

    def epoch(
        self, batch_size: int, seed: int, ranks: Ranks = ALONE, augmented: bool = True
    ) -> Batches:
        """One pass over the training images in random order; this rank's part of each batch. The
        seed is all the randomness there is: the same on any number of ranks or workers."""

    def steps(self, batch_size: int, ranks: Ranks = ALONE) -> int:
        """How many batches `epoch` gives."""

    def tests(self, batch_size: int, ranks: Ranks = ALONE) -> Batches:
        """All test images in order; this rank's share of them."""

    def preprocessing(self) -> dict[str, object]:
        """What a user of the network must know: channel means and deviations, size, classes."""


def summary(images: Images) -> str:
    """How many images of what, in words."""
    shape = "x".join(map(str, images.image_shape))
    train, test = images.counts
    return f"{train} + {test} images of {shape}, {len(images.classes)} classes"
