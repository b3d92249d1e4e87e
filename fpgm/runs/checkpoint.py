"""Tensors on disk: written so that a cut leaves the old file, read without running anything."""

from __future__ import annotations

import io
import os
import pickle
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fpgm.errors import CheckpointError, first_line
from fpgm.runs import packing
from fpgm.runs.files import write_bytes


def write(path: Path, content: Mapping[str, Any]) -> None:
    """Save a dictionary of tensors and plain values, whole or not at all. Raises OSError."""
    buffer = io.BytesIO()  # torch.save to a full disk raises no OSError, a plain write does
    torch.save(dict(content), buffer)
    write_bytes(path, buffer.getvalue())


def read(path: Path, keys: Iterable[str] = ()) -> dict[str, Any]:
    """Load a dictionary that has `keys`, on the CPU. Raises CheckpointError."""
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise CheckpointError(f"{path}: no such file") from error
    except pickle.UnpicklingError as error:
        if "Weights only load failed" in str(error) and "GLOBAL" in str(error):
            raise CheckpointError(
                f"{path}: holds Python objects and not only tensors; refused, nothing was executed"
            ) from error
        raise CheckpointError(f"{path}: truncated or damaged") from error
    except Exception as error:  # torch.load lets whatever a damaged file causes through
        raise CheckpointError(f"{path}: truncated or damaged ({first_line(error)})") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: not written by fpgm, holds a {type(content).__name__}")
    if "packed" in content:
        try:
            content = packing.unpack(content["packed"])
        except Exception as error:  # whatever a damaged file causes
            raise CheckpointError(f"{path}: truncated or damaged ({first_line(error)})") from error
    missing = [key for key in keys if key not in content]
    if missing:
        raise CheckpointError(f"{path}: not written by fpgm, has no {missing[0]!r}")
    return dict(content)


def save_epoch(directory: Path, state: Mapping[str, Any]) -> None:
    """Write `last.pt`; the one before it stays as `previous.pt`. Raises OSError.

    Both are renamed only when the new one is on the disk: at any moment one of them is whole.
    """
    last, new = directory / "last.pt", directory / ".next.pt"
    write(new, state)
    if last.exists():
        os.replace(last, directory / "previous.pt")
    os.replace(new, last)


def restore_epoch(directory: Path) -> tuple[dict[str, Any] | None, str | None]:
    """The newest state that can be read, or None, and a line about what could not be read.

    A file that cannot be read is set aside as NAME.damaged, so that it never takes the place of a
    good one.
    """
    problems = []
    for name in ("last.pt", "previous.pt"):
        path = directory / name
        if path.exists():
            try:
                state = read(path, ("model", "optimizer", "methods", "history"))
            except CheckpointError as error:
                problems.append(str(error))
                os.replace(path, path.with_suffix(".pt.damaged"))
            else:
                return state, f"{problems[0]}; going back to the epoch before" if problems else None
    return None, "; ".join([*problems, "starting over"]) if problems else None


def load_weights(model: nn.Module, path: Path) -> None:
    """Load a network's weights from a checkpoint of fpgm, or a plain state_dict as others save it.

    Raises CheckpointError that names the first parameter that does not match.
    """
    content = read(path)
    weights = content.get("state_dict", content)
    if not isinstance(weights, dict) or not all(isinstance(w, Tensor) for w in weights.values()):
        raise CheckpointError(f"{path}: holds no state_dict of a network")
    fit(model, {name.removeprefix("module."): value for name, value in weights.items()}, str(path))


def fit(model: nn.Module, weights: Mapping[str, Tensor], source: str) -> None:
    """Load a state_dict; CheckpointError names `source` and the first parameter that differs."""
    for name, weight in model.state_dict().items():
        if name not in weights:
            raise CheckpointError(f"{source}: another network: it has no {name}")
        if weights[name].shape != weight.shape:
            theirs, ours = tuple(weights[name].shape), tuple(weight.shape)
            raise CheckpointError(
                f"{source}: another network: {name} is {theirs} there, {ours} here"
            )
    unknown = next((name for name in weights if name not in model.state_dict()), None)
    if unknown is not None:
        raise CheckpointError(f"{source}: another network: {unknown} is not in this one")
    model.load_state_dict(weights)


def preprocessing(name: str) -> dict[str, Any]:
    """What a finished run's network, or a file of one, wants of its images, and its classes (see
    data.images.preprocessing). Raises CheckpointError."""
    path = Path(name).expanduser()
    path = path / "compact.pt" if path.is_dir() else path
    return dict(read(path, ("preprocessing",))["preprocessing"])


def pretrained_file(name: str, model: nn.Module | None = None) -> Path:
    """The checkpoint meant by pretrained=: a file, or what a finished run has left: its network at
    full width, or the compact one where that alone has the shapes of `model`, or is there."""
    path = Path(name).expanduser()
    if path.is_dir():
        there = [path / file for file in ("zeroed.pt", "compact.pt") if (path / file).exists()]
        if not there:
            raise CheckpointError(
                f"pretrained={name}: no zeroed.pt there, so that run is not done; finish it first"
            )
        return next((file for file in there if model is None or _fits(model, file)), there[0])
    if not path.exists():
        raise CheckpointError(
            f"pretrained={name}: no such file; give a run directory or a checkpoint"
        )
    return path


def _fits(model: nn.Module, path: Path) -> bool:
    """Whether a file of fpgm's has a network of the same shapes."""
    theirs = read(path, ("state_dict",))["state_dict"]
    return {k: v.shape for k, v in theirs.items()} == {
        k: v.shape for k, v in model.state_dict().items()
    }
