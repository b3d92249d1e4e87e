"""Images a second from ImageNet's folders: fpgm's reader beside a bare torchvision loader.

    python scripts/bench_loader.py DIR
    python scripts/bench_loader.py DIR 16

Arguments: a folder with train/ and val/, and the number of workers (2). Both crop, resize, flip and
normalise at 224; passes over the training images in turn, medians of 7 after one to start the
workers.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Iterable
from pathlib import Path

import torch
from torch.utils.data import DataLoader
from torchvision.datasets import ImageFolder
from torchvision.transforms import v2

from fpgm.data.sets import load
from fpgm.data.streamed import MEAN, STD

BATCH, PASSES = 32, 7


def bare(root: Path, workers: int) -> DataLoader:
    """As in torchvision's own training recipe."""
    steps = [v2.PILToTensor(), v2.RandomResizedCrop(224, antialias=True), v2.RandomHorizontalFlip()]
    floats = [v2.ToDtype(torch.float32, scale=True), v2.Normalize(MEAN, STD)]
    images = ImageFolder(str(root / "train"), v2.Compose([*steps, *floats]))
    options = {"num_workers": workers, "persistent_workers": True, "prefetch_factor": 4}
    return DataLoader(images, BATCH, shuffle=True, **options)


def seconds(batches: Iterable[object]) -> float:
    began = time.perf_counter()
    for _ in batches:
        pass
    return time.perf_counter() - began


def main(root: Path, workers: int = 2) -> None:
    options = {"image_size": 224, "flip": True, "workers": workers}
    stream = load(torch.device("cpu"), name="imagenet", root=str(root), **options)
    loader = bare(root, workers)
    spent: list[tuple[float, float]] = []
    for seed in range(PASSES + 1):
        spent.append((seconds(stream.epoch(BATCH, seed)), seconds(loader)))
    count = stream.counts[0]
    ours, theirs = (
        statistics.median(count / s for s in own) for own in zip(*spent[1:], strict=True)
    )
    print(f"fpgm {ours:.0f}, torchvision {theirs:.0f} images/s, ratio {ours / theirs:.2f}")


if __name__ == "__main__":
    main(Path(sys.argv[1]), *map(int, sys.argv[2:]))
