"""ImageNet from the disk: decoded and augmented in worker processes, normalised on the device."""

from __future__ import annotations

import copy
import logging
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import v2

from fpgm.data.folder import list_images, open_image
from fpgm.data.images import Batches, divided, normalised, preprocessing, spaced, steps
from fpgm.errors import DataError
from fpgm.machine.device import cores
from fpgm.machine.ranks import ALONE, Ranks, all_say

log = logging.getLogger("fpgm")

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet, as all its networks take it
RESIZE = 256 / 224  # the shorter side before the central crop, over the crop

Sample = tuple[Tensor, int] | str  # an image (3, H, W) uint8 and its label, or what went wrong


class Stream:
    """root/train/CLASS/* and root/val/CLASS/*. Raises DataError."""

    def __init__(
        self,
        root: Path,
        device: torch.device,
        size: int,
        flip: bool,
        mean: Tensor,
        std: Tensor,
        workers: int | None = None,
        on_error: str = "stop",
        validation: float = 0.0,
    ) -> None:
        """size: pixels; mean, std: (3,) of pixels in 0..1; the others as in config.Dataset."""
        files, test, self.classes = list_images(root, ("val",))
        train, held = ([files[i] for i in part] for part in divided(len(files), validation))
        self.device = device
        self.image_shape = (3, size, size)
        self.counts = (len(train), len(test))
        self.held_out_count = len(held)
        self._mean, self._std = mean.to(device), std.to(device)
        self._skip = on_error == "skip"
        processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))  # of torchrun on this machine
        self._workers = max(1, cores() // processes) if workers is None else workers
        mirror = [v2.RandomHorizontalFlip()] if flip else []
        augmented = [v2.RandomResizedCrop(size, antialias=True), *mirror]
        central = [v2.Resize(round(size * RESIZE), antialias=True), v2.CenterCrop(size)]
        self._loaders = {
            "train": self._loader(train, augmented),
            "plain": self._loader(train, central),
            "test": self._loader(test, central),
            "held": self._loader(held, central),
        }

    def epoch(
        self, batch_size: int, seed: int, ranks: Ranks = ALONE, augmented: bool = True
    ) -> Batches:
        generator = torch.Generator().manual_seed(seed)
        order = torch.randperm(self.counts[0], generator=generator)
        seeds = torch.randint(2**62, (self.counts[0],), generator=generator)
        batches = []
        for start in range(0, self.steps(batch_size, ranks) * batch_size, batch_size):
            indices = order[start : start + batch_size]
            part = indices[ranks.share(len(indices) // ranks.world * ranks.world)]
            batches.append([(int(i), int(seeds[i])) for i in part])
        return self._read("train" if augmented else "plain", batches, ranks)

    def steps(self, batch_size: int, ranks: Ranks = ALONE) -> int:
        return steps(self.counts[0], batch_size, ranks)

    def tests(self, batch_size: int, ranks: Ranks = ALONE) -> Batches:
        return self._in_order("test", range(self.counts[1]), batch_size, ranks)

    def held_out(
        self, batch_size: int, ranks: Ranks = ALONE, at_most: int | None = None
    ) -> Batches:
        some = spaced(self.held_out_count, at_most).tolist()
        return self._in_order("held", some, batch_size, ranks)

    def normalised_by(self, mean: Sequence[float], std: Sequence[float]) -> Stream:
        other = copy.copy(self)  # with the same workers
        other._mean, other._std = (torch.tensor(list(v), device=self.device) for v in (mean, std))
        return other

    def preprocessing(self) -> dict[str, object]:
        return preprocessing(self._mean, self._std, self.image_shape, self.classes)

    def _loader(
        self, files: Sequence[tuple[Path, int]], transforms: Sequence[Any]
    ) -> DataLoader[Any]:
        return DataLoader(
            _Files(files, v2.Compose([v2.PILToTensor(), *transforms])),
            batch_sampler=_Batches(),
            collate_fn=_collate,
            num_workers=self._workers,
            pin_memory=self.device.type == "cuda",
            persistent_workers=self._workers > 0,
            prefetch_factor=4 if self._workers else None,
        )

    def _in_order(
        self, part: str, indices: Sequence[int], batch_size: int, ranks: Ranks
    ) -> Batches:
        share = indices[ranks.share(len(indices))]
        batches = [share[start : start + batch_size] for start in range(0, len(share), batch_size)]
        return self._read(part, [[(i, 0) for i in batch] for batch in batches], ranks)

    def _read(self, part: str, batches: Sequence[list[tuple[int, int]]], ranks: Ranks) -> Batches:
        loader = self._loaders[part]
        assert isinstance(loader.batch_sampler, _Batches)
        loader.batch_sampler.batches = batches
        for images, labels, problems in loader:
            for problem in problems:
                if not self._skip:
                    raise DataError(f"{problem}; dataset.on_error=skip goes on without it")
                log.warning("warning: left out: %s", problem)
            trained = part in ("train", "plain")
            enough = len(labels) > trained  # BatchNorm has no variance of one image
            if self._skip and part == "train":  # a step is taken by all or by none
                enough = all_say(enough, ranks)
            if enough:
                # As bytes: a quarter of what floats take on the bus.
                images = images.to(self.device, non_blocking=True)
                yield (
                    normalised(images, self._mean, self._std),
                    labels.to(self.device, non_blocking=True),
                )


def _collate(samples: Sequence[Sample]) -> tuple[Tensor, Tensor, list[str]]:
    """One tensor of a batch's images, its labels, and what could not be read. In the worker: one
    large tensor crosses to the main process faster than many small ones."""
    good = [sample for sample in samples if not isinstance(sample, str)]
    problems = [sample for sample in samples if isinstance(sample, str)]
    images = torch.stack([image for image, _ in good]) if good else torch.empty(0)
    return images, torch.tensor([label for _, label in good]), problems


class _Batches:
    """The batches of the next pass, as lists of (index, seed)."""

    batches: Sequence[list[tuple[int, int]]] = ()

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        return iter(self.batches)

    def __len__(self) -> int:
        return len(self.batches)


class _Files(Dataset[Sample]):
    """Images by (index, seed): the seed makes their augmentation, whichever worker does it."""

    def __init__(self, files: Sequence[tuple[Path, int]], transform: Any) -> None:
        self._files, self._transform = files, transform

    def __getitem__(self, key: tuple[int, int]) -> Sample:
        index, seed = key
        path, label = self._files[index]
        try:
            image = open_image(path)
        except DataError as error:
            return str(error)
        # torch.random.fork_rng and torch.manual_seed look at every device: 130 us an image, not 2.
        generator = torch.default_generator
        before = generator.get_state()
        try:
            generator.manual_seed(seed)
            return self._transform(image), label
        finally:
            generator.set_state(before)
