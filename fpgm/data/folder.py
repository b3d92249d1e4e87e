"""A folder of images in memory: one folder a class, decoded once, cached as one array."""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision.datasets.folder import IMG_EXTENSIONS
from torchvision.transforms.functional import center_crop, resize
from tqdm import tqdm

from fpgm.errors import DataError

# train images (n, C, H, W) uint8 and labels (n,) int64, the same for test, names of the classes
Arrays = tuple[Tensor, Tensor, Tensor, Tensor, tuple[str, ...]]
Listed = list[tuple[Path, int]]  # files and their labels


def read_folder(root: Path, image_size: int | None) -> Arrays:
    """train/CLASS/* and test/CLASS/* (or val/), decoded once and cached. Raises DataError."""
    train, test, classes = list_images(root, ("test", "val"))
    size = image_size or min(open_image(train[0][0]).size)
    images = [_decoded([path for path, _ in part], size, root) for part in (train, test)]
    labels = [torch.tensor([label for _, label in part]) for part in (train, test)]
    return images[0], labels[0], images[1], labels[1], classes


def list_images(root: Path, tests: Sequence[str]) -> tuple[Listed, Listed, tuple[str, ...]]:
    """The images of root/train/CLASS/* and of the first of `tests` that is there, and the classes.

    Raises DataError.
    """
    if not root.is_dir():
        raise DataError(f"dataset.root={root}: no such directory; dataset=digits needs none")
    train = root / "train"
    test = next((root / name for name in tests if (root / name).is_dir()), root / tests[0])
    classes = _classes(train)
    if _classes(test) != classes:
        odd = sorted(set(_classes(test)) ^ set(classes))
        raise DataError(
            f"{test}: not the same classes as {train}, differing in {', '.join(odd[:5])}"
        )
    return _files(train, classes), _files(test, classes), classes


def _classes(part: Path) -> tuple[str, ...]:
    names = sorted(p.name for p in part.iterdir() if p.is_dir()) if part.is_dir() else []
    if len(names) < 2:
        raise DataError(
            f"{part}: needs a folder of images for each class ({part.name}/CLASS/*), "
            f"found {len(names)}"
        )
    return tuple(names)


def _files(part: Path, classes: Sequence[str]) -> Listed:
    files: Listed = []
    for label, name in enumerate(classes):
        paths = sorted(p for p in (part / name).iterdir() if p.suffix.lower() in IMG_EXTENSIONS)
        if not paths:
            raise DataError(f"{part / name}: no images ({', '.join(IMG_EXTENSIONS)})")
        files += [(path, label) for path in paths]
    return files


def open_image(path: Path) -> Image.Image:
    """Decode an image as RGB. Raises DataError with its name."""
    try:
        with Image.open(path) as image:
            return image.convert("RGB")
    except (OSError, ValueError, SyntaxError) as error:
        raise DataError(f"{path}: not a readable image; remove or replace it") from error


def _decoded(files: Sequence[Path], size: int, root: Path) -> Tensor:
    """All images at size x size, (n, 3, size, size) uint8: from the cache or into it."""
    needed = len(files) * 3 * size * size
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if needed > memory / 2:
        raise DataError(
            f"dataset.image_size={size}: {len(files)} images take {needed / 2**30:.0f} GiB, more "
            f"than half of this machine's memory; try dataset.image_size={size // 2}"
        )
    cache = _cache_of(files, size, root)
    with contextlib.suppress(OSError, ValueError, EOFError):  # not there, or damaged
        return torch.from_numpy(np.load(cache))
    images = np.empty((len(files), 3, size, size), np.uint8)

    def decode(index: int) -> None:
        images[index] = _square(open_image(files[index]), size)

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        decoded = pool.map(decode, range(len(files)))
        for _ in tqdm(decoded, "decoding, once", len(files), leave=False, disable=None):
            pass
    part = cache.with_suffix(f".{os.getpid()}.part")
    try:
        cache.parent.mkdir(parents=True, exist_ok=True)
        with part.open("wb") as file:
            np.save(file, images)
        part.replace(cache)
    except OSError:  # the next run decodes again
        part.unlink(missing_ok=True)
    return torch.from_numpy(images)


def _cache_of(files: Sequence[Path], size: int, root: Path) -> Path:
    """Where the decoded images lie, by what they were decoded from."""
    key = hashlib.sha256(f"1 {size} {root.resolve()}\n".encode())
    for path in files:
        stat = path.stat()
        key.update(f"{path.relative_to(root)}\0{stat.st_size}\0{stat.st_mtime_ns}\n".encode())
    home = Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser()
    return home / "fpgm" / "decoded" / f"{key.hexdigest()[:24]}.npy"


def _square(image: Image.Image, size: int) -> np.ndarray:
    """(3, size, size): the shorter side resized, then the centre."""
    if image.size != (size, size):
        image = center_crop(resize(image, size), [size, size])
    return np.asarray(image).transpose(2, 0, 1)
