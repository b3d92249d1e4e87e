"""Images as uint8 tensors on the device, and batches of them, augmented there.

A data set that fits in memory needs no worker processes: a batch is one gather, and uint8 takes a
quarter of the memory and of the bus.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor

from fpgm import config
from fpgm.data.folder import Arrays, read_folder
from fpgm.data.images import Batches, Images, normalised, steps
from fpgm.data.streamed import Stream
from fpgm.errors import DataError, first_line
from fpgm.machine.ranks import ALONE, Ranks


@dataclass(frozen=True)
class Data:
    """Images in memory. images: (n, C, H, W) uint8; labels: (n,) int64; mean, std: (C,) of pixels
    in 0..1; pad, flip: the training augmentation."""

    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor
    mean: Tensor
    std: Tensor
    classes: tuple[str, ...]
    pad: int = 0
    flip: bool = False

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
        pad, flip = (self.pad, self.flip) if augmented else (0, False)
        return train_batches(self, batch_size, pad, flip, seed, ranks)

    def steps(self, batch_size: int, ranks: Ranks = ALONE) -> int:
        return steps(len(self.train_images), batch_size, ranks)

    def tests(self, batch_size: int, ranks: Ranks = ALONE) -> Batches:
        own = ranks.share(len(self.test_images))
        for start in range(own.start, own.stop, batch_size):
            part = slice(start, min(start + batch_size, own.stop))
            yield self.normalise(self.test_images[part]), self.test_labels[part]

    def preprocessing(self) -> dict[str, object]:
        """What a user of the network must know: channel means and deviations, size, classes."""
        return {
            "mean": self.mean.tolist(),
            "std": self.std.tolist(),
            "image_shape": list(self.image_shape),
            "classes": list(self.classes),
        }

    def normalise(self, images: Tensor) -> Tensor:
        """(B, C, H, W) uint8 -> float32 of zero mean and unit variance, channels last."""
        return normalised(images, self.mean, self.std)


def load(dataset: config.Dataset, device: torch.device) -> Images:
    """A data set: streamed, or read onto the device. Raises DataError."""
    if dataset.name == "imagenet":
        return Stream(dataset, device)
    return load_arrays(dataset, device)


def load_arrays(dataset: config.Dataset, device: torch.device) -> Data:
    """Read a data set onto the device. Raises DataError."""
    readers = {
        "digits": _digits,
        "cifar10": _cifar,
        "cifar100": _cifar,
        "image_folder": read_folder,
    }
    train_images, train_labels, test_images, test_labels, classes = readers[dataset.name](dataset)
    if dataset.name.startswith("cifar"):
        # The papers' constants: those of CIFAR-10's training images, for both.
        mean, std = (
            torch.tensor([125.3, 123.0, 113.9]) / 255,
            torch.tensor([63.0, 62.1, 66.7]) / 255,
        )
    else:
        mean, std = _moments(train_images)
    tensors = (train_images, train_labels, test_images, test_labels, mean, std)
    try:
        on_device = [t.to(device) for t in tensors]
    except torch.OutOfMemoryError as error:
        size = sum(t.nbytes for t in tensors) / 2**30
        raise DataError(
            f"dataset={dataset.name}: {size:.1f} GiB of images do not fit into the GPU's memory; "
            "dataset=imagenet reads images from the disk instead"
        ) from error
    return Data(*on_device, classes, dataset.pad, dataset.flip)  # type: ignore[arg-type, call-arg]


def train_batches(
    data: Data, batch_size: int, pad: int, flip: bool, seed: int, ranks: Ranks = ALONE
) -> Batches:
    """One epoch in random order: (B, C, H, W) normalised images, labels. The seed is all it needs.

    Of each batch this rank's part. A last batch of one image is left out: BatchNorm has no
    variance of it.
    """
    device = data.train_images.device
    generator = torch.Generator(device).manual_seed(seed)
    order = torch.randperm(len(data.train_images), generator=generator, device=device)
    for indices in order.split(batch_size)[: steps(len(order), batch_size, ranks)]:
        # Augmented as one batch, whoever gets which part of it.
        images = augment(data.train_images[indices], pad, flip, generator)
        own = ranks.share(len(indices) // ranks.world * ranks.world)
        yield data.normalise(images[own]), data.train_labels[indices[own]]


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
        windows = padded.unfold(2, h, 1).unfold(
            3, w, 1
        )  # (B, C, 2 pad + 1, 2 pad + 1, H, W), a view
        y, x = torch.randint(2 * pad + 1, (2, b), generator=generator, device=device)
        images = windows[torch.arange(b, device=device), :, y, x]
    return images


def _digits(dataset: config.Dataset) -> Arrays:
    from sklearn.datasets import load_digits  # a second to import: only where it is needed
    from sklearn.model_selection import train_test_split

    digits = load_digits()
    images = torch.from_numpy((digits.images * (255 / 16)).round().astype(np.uint8)).unsqueeze(1)
    labels = torch.from_numpy(digits.target).long()
    # A fixed split of 1437 + 360, every digit in the same share in both.
    train, test = train_test_split(
        np.arange(len(labels)), test_size=360, stratify=digits.target, random_state=0
    )
    names = tuple(str(name) for name in digits.target_names)
    return images[train], labels[train], images[test], labels[test], names


def _cifar(dataset: config.Dataset) -> Arrays:
    cls = (
        torchvision.datasets.CIFAR10 if dataset.name == "cifar10" else torchvision.datasets.CIFAR100
    )
    root = Path(dataset.root or "data").expanduser()
    try:
        root.mkdir(parents=True, exist_ok=True)
        train, test = (cls(root, train=part, download=True) for part in (True, False))
    except (OSError, RuntimeError) as error:
        raise DataError(
            f"dataset={dataset.name}: not in dataset.root={root}, and the download failed "
            f"({first_line(error)}); put {cls.filename} from {cls.url.rsplit('/', 1)[0]} there, "
            "or try dataset=digits, which needs no network"
        ) from error
    arrays = []
    for part in (train, test):
        arrays.append(torch.from_numpy(part.data).permute(0, 3, 1, 2).contiguous())
        arrays.append(torch.tensor(part.targets))
    return arrays[0], arrays[1], arrays[2], arrays[3], tuple(train.classes)


def _moments(images: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of each channel, of pixels in 0..1, exact over all pixels."""
    levels = torch.arange(256, dtype=torch.float64) / 255
    counts = torch.stack([torch.bincount(c.flatten(), minlength=256) for c in images.unbind(1)])
    share = counts.double() / counts.sum(1, keepdim=True)
    mean = share @ levels
    std = (share @ levels.square() - mean.square()).clamp(min=1e-12).sqrt()
    return mean.float(), std.float()
