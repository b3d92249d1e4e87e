"""What a run needs of a data set, wherever its images lie."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Protocol

import torch
from torch import Tensor

from fpgm.errors import DataError
from fpgm.machine.ranks import ALONE, Ranks

Batches = Iterator[tuple[Tensor, Tensor]]  # (B, C, H, W) normalised images and (B,) labels

_HELD_OUT_SEED = 20_190_616  # any constant would do


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

    @property
    def held_out_count(self) -> int:
        """How many training images are held out; `counts` and `epoch` are without them."""

    def held_out(
        self, batch_size: int, ranks: Ranks = ALONE, at_most: int | None = None
    ) -> Batches:
        """The training images that are held out, as they are and in order; this rank's share.
        at_most: so many of them, evenly spaced, as they may lie in the order of their classes."""

    def normalised_by(self, mean: Sequence[float], std: Sequence[float]) -> Images:
        """The same images by other constants, (C,) of pixels in 0..1."""

    def preprocessing(self) -> dict[str, object]:
        """What a user of the network must know: channel means and deviations, size, classes."""


def steps(count: int, batch_size: int, ranks: Ranks = ALONE) -> int:
    """How many batches an epoch of `count` images has: the last one needs two images a rank."""
    full, rest = divmod(count, batch_size)
    return full + (rest // ranks.world > 1)


def divided(count: int, share: float) -> tuple[Tensor, Tensor]:
    """Which of `count` images stay for training and which are held out: indices, sorted.

    share: of the images, 0..0.9. Drawn from a constant: every run on a data set holds out the same,
    whatever its seed. Raises DataError where none would be held out, or too few would stay.
    """
    held = int(count * share + 1e-9)
    if share > 0 and not 0 < held <= count - 2:
        raise DataError(
            f"dataset.validation={share}: holds out {held} of {count} training images; at least "
            "one must be held out, and two trained on"
        )
    order = torch.randperm(count, generator=torch.Generator().manual_seed(_HELD_OUT_SEED))
    return order[held:].sort().values, order[:held].sort().values


def spaced(count: int, at_most: int | None) -> Tensor:
    """At most so many of the indices 0..count - 1, evenly spaced: (n,)."""
    some = count if at_most is None else min(count, at_most)
    return torch.arange(some) * count // max(some, 1)


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
    held = f" ({images.held_out_count} more held out)" if images.held_out_count else ""
    return f"{train} + {test} images of {shape}{held}, {len(images.classes)} classes"
