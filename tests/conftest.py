"""Images that more than one file of tests reads."""

from __future__ import annotations

import os

os.environ["CUDA_VISIBLE_DEVICES"] = ""  # on a GPU no two runs are the same to the bit
os.environ["OMP_NUM_THREADS"] = "1"  # several tests at once, and a fork has no thread but its first

from pathlib import Path

import numpy as np
import pytest
from hypothesis import settings
from PIL import Image

# How long an example takes is the machine's business: beside other work some take seconds.
settings.register_profile("fpgm", deadline=None)
settings.load_profile("fpgm")


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """Two classes in ILSVRC's layout, photographs of many sizes, one of them grey."""
    random = np.random.default_rng(0)
    for part, count in (("train", 9), ("val", 3)):
        for name in ("n01440764", "n01443537"):
            folder = tmp_path / "images" / part / name
            folder.mkdir(parents=True)
            for i in range(count):
                shape = (int(random.integers(40, 90)), int(random.integers(40, 90)), 3)[
                    : 2 + (i > 0)
                ]
                pixels = random.integers(0, 256, shape, dtype=np.uint8)
                Image.fromarray(pixels).save(folder / f"{name}_{i}.JPEG")
    return tmp_path / "images"
