"""Data sets by name."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch

from fpgm.data import memory
from fpgm.data.images import Images


def load(device: torch.device, **words: Any) -> Images:
    return memory.load(SimpleNamespace(**words), device)  # type: ignore[arg-type]
