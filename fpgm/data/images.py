"""What a run needs of a data set, wherever its images lie."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

import torch
from torch import Tensor

from fpgm.machine.ranks import ALONE, Ranks

Batches = Iterator[tuple[Tensor, Tensor]]  # (B, C, H, W) normalised images and (B,) labels


class Images(Protocol):
    """A data set, in memory (memory.Data) or streamed from the disk (streamed.Stream)."""

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


def steps(count: int, batch_size: int, ranks: Ranks = ALONE) -> int:
    """How many batches an epoch of `count` images has: the last one needs two images a rank."""
    full, rest = divmod(count, batch_size)
    return full + (rest // ranks.world > 1)


def preprocessing(
    mean: Tensor, std: Tensor, image_shape: tuple[int, int, int], classes: tuple[str, ...]
) -> dict[str, object]:
    """As checkpoints hold it."""
    constants = {"mean": mean.tolist(), "std": std.tolist()}
    return {**constants, "image_shape": list(image_shape), "classes": list(classes)}


def normalised(images: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """(B, C, H, W) uint8 -> float32 of zero mean and unit variance, channels last.

    mean, std: (C,) of pixels in 0..1.
    """
    batch, channels, height, width = images.shape
    scaled = images.to(torch.float32, memory_format=torch.channels_last)
    # Long rows: faster than three channels at a time.
    rows = scaled.permute(0, 2, 3, 1).view(batch * height, width * channels)
    rows -= (255 * mean).repeat(width)
    rows /= (255 * std).repeat(width)
    return scaled


def summary(images: Images) -> str:
    """How many images of what, in words."""
    shape = "x".join(map(str, images.image_shape))
    train, test = images.counts
    return f"{train} + {test} images of {shape}, {len(images.classes)} classes"
