"""Images as uint8 tensors on the device, and batches of them, augmented there.

A data set that fits in memory needs no worker processes: a batch is one gather, and uint8 takes a
quarter of the memory and of the bus.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from fpgm.data.images import Batches, normalised, preprocessing, spaced, steps
from fpgm.machine.ranks import ALONE, Ranks


@dataclass(frozen=True)
class Data:
    """Images in memory. images: (n, C, H, W) uint8; labels: (n,) int64; mean, std: (C,) of pixels
    in 0..1; pad, flip: the training augmentation; held_images, held_labels: those held out."""

    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor
    mean: Tensor
    std: Tensor
    classes: tuple[str, ...]
    pad: int = 0
    flip: bool = False
    held_images: Tensor | None = None
    held_labels: Tensor | None = None

    @property
    def device(self) -> torch.device:
        return self.train_images.device

    @property
    def image_shape(self) -> tuple[int, int, int]:
        c, h, w = self.train_images.shape[1:]
        return c, h, w

    @property
    def counts(self) -> tuple[int, int]:
        return len(self.train_images), len(self.test_images)

    def epoch(
        self, batch_size: int, seed: int, ranks: Ranks = ALONE, augmented: bool = True
    ) -> Batches:
        # The seed is all it needs, and a last batch of one image is left out: BatchNorm has no
        # variance of it.
        generator = torch.Generator(self.device).manual_seed(seed)
        order = torch.randperm(len(self.train_images), generator=generator, device=self.device)
        for indices in order.split(batch_size)[: self.steps(batch_size, ranks)]:
            images = self.train_images[indices]
            if augmented:  # as one batch, whoever gets which part of it
                images = augment(images, self.pad, self.flip, generator)
            part = ranks.share(len(indices) // ranks.world * ranks.world)
            yield self.normalise(images[part]), self.train_labels[indices[part]]

    def steps(self, batch_size: int, ranks: Ranks = ALONE) -> int:
        return steps(len(self.train_images), batch_size, ranks)

    def tests(self, batch_size: int, ranks: Ranks = ALONE) -> Batches:
        return self._in_order(self.test_images, self.test_labels, batch_size, ranks)

    @property
    def held_out_count(self) -> int:
        return 0 if self.held_images is None else len(self.held_images)

    def held_out(
        self, batch_size: int, ranks: Ranks = ALONE, at_most: int | None = None
    ) -> Batches:
        if self.held_images is None or self.held_labels is None:
            return iter(())
        some = spaced(self.held_out_count, at_most).to(self.device)
        return self._in_order(self.held_images[some], self.held_labels[some], batch_size, ranks)

    def normalised_by(self, mean: Sequence[float], std: Sequence[float]) -> Data:
        constants = [torch.tensor(list(values), device=self.device) for values in (mean, std)]
        return replace(self, mean=constants[0], std=constants[1])

    def preprocessing(self) -> dict[str, object]:
        return preprocessing(self.mean, self.std, self.image_shape, self.classes)

    def normalise(self, images: Tensor) -> Tensor:
        """(B, C, H, W) uint8 -> float32 of zero mean and unit variance, channels last."""
        return normalised(images, self.mean, self.std)

    def _in_order(self, images: Tensor, labels: Tensor, batch_size: int, ranks: Ranks) -> Batches:
        share = ranks.share(len(images))
        for start in range(share.start, share.stop, batch_size):
            part = slice(start, min(start + batch_size, share.stop))
            yield self.normalise(images[part]), labels[part]


def augment(images: Tensor, pad: int, flip: bool, generator: torch.Generator) -> Tensor:
    """Each image of (B, C, H, W) uint8 cropped at its own random place and flipped by its own coin.

    The papers' augmentation: zeros are padded onto the raw image (black), not onto the normalised
    one (grey).
    """
    b, _, h, w = images.shape
    device = images.device
    if flip:
        coin = torch.rand(b, generator=generator, device=device) < 0.5
        images = torch.where(coin.view(-1, 1, 1, 1), images.flip(3), images)
    if pad:
        padded = F.pad(images, (pad, pad, pad, pad))
        windows = padded.unfold(2, h, 1).unfold(3, w, 1)  # a view (B, C, places, places, H, W)
        y, x = torch.randint(2 * pad + 1, (2, b), generator=generator, device=device)
        images = windows[torch.arange(b, device=device), :, y, x]
    return images
