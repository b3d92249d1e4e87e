"""The data sets by name.

A new one that fits in memory is one function and one entry in READERS (and one YAML file in
configs/dataset to offer it on the command line).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
import torchvision
from torch import Tensor

from fpgm.data.folder import Arrays, read_folder
from fpgm.data.images import Images, divided
from fpgm.data.memory import Data
from fpgm.data.streamed import MEAN, STD, Stream
from fpgm.errors import DataError, first_line


def load(
    device: torch.device,
    *,
    name: str,
    root: str | None = None,
    image_size: int | None = None,
    pad: int = 0,
    flip: bool = False,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    workers: int | None = None,
    on_error: str = "stop",
    validation: float = 0.0,
) -> Images:
    """A data set: streamed, or read onto the device. Raises DataError.

    mean, std: of each channel, of pixels in 0..1 or in 0..255; None: measured from the images that
    are trained on. All else as config.Dataset has it.
    """
    if name == "imagenet":
        place = Path(root or ".").expanduser()
        constants = (_constants(mean or MEAN, 3), _constants(std or STD, 3))
        how = (image_size or 224, flip, *constants, workers, on_error, validation)
        return Stream(place, device, *how)
    *tensors, classes = READERS[name](name, root, image_size)
    held: list[Tensor] = []
    if validation > 0:
        stay, out = divided(len(tensors[0]), validation)
        held = [tensor[out] for tensor in tensors[:2]]
        tensors[:2] = [tensor[stay] for tensor in tensors[:2]]
    channels = tensors[0].shape[1]
    for given, moment in ((mean, 0), (std, 1)):
        measured = _moments(tensors[0])[moment] if given is None else _constants(given, channels)
        tensors.append(measured)
    try:
        on_device = [tensor.to(device) for tensor in tensors]
        held = [tensor.to(device) for tensor in held]
    except torch.OutOfMemoryError as error:
        size = sum(tensor.nbytes for tensor in [*tensors, *held]) / 2**30
        raise DataError(
            f"dataset={name}: {size:.1f} GiB of images do not fit into the GPU's memory; "
            "dataset=imagenet reads images from the disk instead"
        ) from error
    return Data(*on_device, classes, pad, flip, *held)  # type: ignore[arg-type, call-arg]


def _digits(*_: object) -> Arrays:
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


def _cifar(name: str, root: str | None, _: int | None) -> Arrays:
    cls = {"cifar10": torchvision.datasets.CIFAR10, "cifar100": torchvision.datasets.CIFAR100}[name]
    place = Path(root or "data").expanduser()
    try:
        place.mkdir(parents=True, exist_ok=True)
        train, test = (cls(place, train=part, download=True) for part in (True, False))
    except (OSError, RuntimeError) as error:
        raise DataError(
            f"dataset={name}: not in dataset.root={place}, and the download failed "
            f"({first_line(error)}); put {cls.filename} from {cls.url.rsplit('/', 1)[0]} there, "
            "or try dataset=digits, which needs no network"
        ) from error
    images = [torch.from_numpy(p.data).permute(0, 3, 1, 2).contiguous() for p in (train, test)]
    labels = [torch.tensor(part.targets) for part in (train, test)]
    return images[0], labels[0], images[1], labels[1], tuple(train.classes)


def _image_folder(_: str, root: str | None, image_size: int | None) -> Arrays:
    return read_folder(Path(root or ".").expanduser(), image_size)


READERS: dict[str, Callable[[str, str | None, int | None], Arrays]] = {
    "digits": _digits,
    "cifar10": _cifar,
    "cifar100": _cifar,
    "image_folder": _image_folder,
}


def _constants(values: Sequence[float], channels: int) -> Tensor:
    """(C,) of pixels in 0..1, from those of the configuration."""
    if len(values) != channels:
        raise DataError(
            f"dataset.mean, dataset.std: {list(values)} for images of {channels} channels; null "
            "measures them"
        )
    constants = torch.tensor(list(values))
    return constants / 255 if max(values) > 1 else constants


def _moments(images: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of each channel, of pixels in 0..1, exact over all pixels."""
    levels = torch.arange(256, dtype=torch.float64) / 255
    counts = torch.stack([torch.bincount(c.flatten(), minlength=256) for c in images.unbind(1)])
    share = counts.double() / counts.sum(1, keepdim=True)
    mean = share @ levels
    std = (share @ levels.square() - mean.square()).clamp(min=1e-12).sqrt()
    return mean.float(), std.float()
