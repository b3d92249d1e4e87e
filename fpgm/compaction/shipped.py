"""The compact network of a run as an architecture: what another run trains (arch=compact)."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from fpgm.compaction.compact import structure
from fpgm.errors import CheckpointError, Error
from fpgm.runs.checkpoint import read


def network(
    num_classes: int,
    in_channels: int,
    run: str = "",
    made: Mapping[str, Any] | None = None,
) -> nn.Module:
    """The network of a run's compact.pt, or of that file, its weights as they start.

    made: what such a file says of its network, in place of one; the network has it as `rebuilt_by`,
    so that what is trained from it needs the first run no longer. Raises Error for another number
    of classes or channels, CheckpointError.
    """
    if made is None:
        made = _read(run)
    theirs = made["arch"]["num_classes"], made["arch"]["in_channels"]
    if theirs != (num_classes, in_channels):
        raise Error(
            f"arch.run={run}: tells {theirs[0]} classes of images with {theirs[1]} channels, the "
            f"data set has {num_classes} and {in_channels}; name it with dataset="
        )
    built = structure(made, {name: tuple(shape) for name, shape in made["shapes"].items()})
    built.rebuilt_by = {"made": made}  # type: ignore[assignment]
    return built.train()


def _read(run: str) -> dict[str, Any]:
    path = Path(run).expanduser()
    path = path / "compact.pt" if path.is_dir() else path
    try:
        saved = read(path, ("arch", "keep", "state_dict"))
    except CheckpointError as error:
        raise CheckpointError(f"arch.run={run}: {error}") from error
    words = ("arch", "keep", "ballast", "decided", "image", "low_rank")
    # Names and shapes of the weights say which constants were zero and are not there.
    shapes = {name: list(value.shape) for name, value in saved["state_dict"].items()}
    return {**{key: saved[key] for key in words if key in saved}, "shapes": shapes}
