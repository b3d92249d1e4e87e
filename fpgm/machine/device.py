"""What this machine offers: device, precision, and what to write down about it."""

from __future__ import annotations

import contextlib
import ctypes
import os
import platform
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import torchvision

from fpgm.errors import Error


def choose_device(name: str) -> torch.device:
    """`auto` takes a GPU where there is one. Raises Error."""
    if name == "cuda" and not torch.cuda.is_available():
        raise Error("device=cuda: torch sees no GPU here; use device=cpu or device=auto")
    automatic = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(automatic if name == "auto" else name)


def choose_precision(name: str, device: torch.device) -> torch.dtype | None:
    """The type to autocast to, None for float32. `auto` takes bf16 where the hardware has it."""
    if name == "float32":
        return None
    if name == "bf16" or has_bf16(device):
        return torch.bfloat16
    return None


def has_bf16(device: torch.device) -> bool:
    """Whether bf16 products are done in hardware. Emulated they are slower than float32."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    with contextlib.suppress(OSError):
        flags = Path("/proc/cpuinfo").read_text()
        return "avx512_bf16" in flags or "amx_bf16" in flags
    return False


def adds_bytes_exactly() -> bool:
    """Whether sums of products of bytes are right here: x86 without VNNI adds two of them in 16
    bits, which saturate. What cannot be told is taken not to be."""
    if platform.machine().lower() not in ("x86_64", "amd64", "i686"):
        return True
    with contextlib.suppress(OSError):
        return "_vnni" in Path("/proc/cpuinfo").read_text()  # avx512_vnni, avx_vnni
    return False


def cores() -> int:
    """Of those that this process may run on, where the system says which."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def keep_freed_memory() -> None:
    """Have glibc keep what is freed for the next allocation, as tcmalloc and jemalloc do.

    Else every feature map of a few megabytes goes back to the system and comes again page by page,
    at every layer of every batch. Elsewhere nothing happens.
    """
    mmap_max, trim_threshold = -4, -1  # of mallopt(3)
    with contextlib.suppress(OSError, AttributeError):
        libc = ctypes.CDLL(None)
        libc.mallopt(mmap_max, 0)
        libc.mallopt(trim_threshold, 2**31 - 1)


def autocast(device: torch.device, dtype: torch.dtype | None) -> torch.autocast:
    """Context for the forward pass; does nothing for None."""
    return torch.autocast(device.type, dtype or torch.bfloat16, enabled=dtype is not None)


def precision_name(device: torch.device, dtype: torch.dtype | None) -> str:
    """What the products of training are rounded to."""
    if dtype is not None:
        return "bf16"
    tensor_cores = device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)
    return "float32, convolutions in TF32" if tensor_cores else "float32"


def environment(device: torch.device, dtype: torch.dtype | None) -> dict[str, Any]:
    """What a reader of a report needs to judge its figures and times."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else _processor()
    return {
        "fpgm": version("fpgm"),
        "torch": torch.__version__,
        "torchvision": torchvision.__version__,
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "device": device.type,
        "processor": name,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "precision": precision_name(device, dtype),
    }


def _processor() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor()
