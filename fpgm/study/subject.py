"""The network that a study looks at, and the images it learned from, as the command names them."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
import torchvision
import yaml
from torch import Tensor, nn

from fpgm.compaction.compact import load
from fpgm.config import dataset
from fpgm.data import sets
from fpgm.data.images import Images
from fpgm.errors import CheckpointError, Error, first_line
from fpgm.keys import CONFIGS
from fpgm.networks import models
from fpgm.runs import checkpoint
from fpgm.runs.run import read_config


@dataclass(frozen=True)
class Subject:
    """source: the network in words; images: None where there are none, and why in `no_images`."""

    source: str
    model: nn.Module
    images: Images | None = None
    no_images: str = "give images with --data"


def find(
    path: Path | None,
    arch: str | None,
    weights: str | None,
    data: Path | None,
    image_size: int | None,
    seed: int,
    want_images: bool,
) -> Subject:
    """The network of a run directory, a checkpoint, or a name. weights: random (or None),
    torchvision, or a run directory or checkpoint. Raises Error and those of what it reads."""
    if path is None:
        if arch is None:
            raise Error("give a run directory, a checkpoint, or --arch, as in --arch resnet50")
        if weights in (None, "random", "torchvision"):
            source, model = _by_name(arch, weights, seed)
        elif Path(str(weights)).exists():
            path = Path(str(weights))
            source, model = _from_disk(path, arch)
        else:
            raise Error(
                f"--weights {weights}: no such run directory or checkpoint, and neither random nor "
                "torchvision"
            )
    elif weights is not None:
        raise Error(f"--weights {weights}: only with --arch and without {path}")
    else:
        source, model = _from_disk(path, arch)
    images, reason = None, Subject.no_images
    if want_images:
        images, reason = _images(data or _run_of(path), image_size, weights == "torchvision")
        if images is not None:
            _check(model, images)
    return Subject(source, model.eval(), images, reason)


def _by_name(arch: str, weights: str | None, seed: int) -> tuple[str, nn.Module]:
    torch.manual_seed(seed)
    if weights != "torchvision":
        return f"{arch}, random start, seed {seed}", _build(arch)
    if arch not in torchvision.models.list_models(module=torchvision.models):
        raise Error(f"--weights torchvision: torchvision has no network called {arch}")
    choices = torchvision.models.get_model_weights(arch)
    chosen = getattr(choices, "IMAGENET1K_V1", None) or choices.DEFAULT
    try:
        model: nn.Module = torchvision.models.get_model(arch, weights=chosen)
    except (OSError, RuntimeError) as error:
        raise Error(
            f"--weights torchvision: the download failed ({first_line(error)}); put "
            "the file where torch.hub looks for it, or give a checkpoint"
        ) from error
    return f"{arch}, torchvision's {chosen}", model


def _build(arch: str, num_classes: int = 10, in_channels: int = 3) -> nn.Module:
    """fpgm's network of that name, timm:NAME, module:function, else torchvision's."""
    if arch in models.MODELS or ":" in arch:
        return models.model(arch, num_classes, in_channels)
    names = torchvision.models.list_models(module=torchvision.models)
    if arch not in names:
        own = ", ".join(models.MODELS)
        raise Error(f"--arch {arch}: choose one of {own}, or another of torchvision's")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about initialisations that will change
        model: nn.Module = torchvision.models.get_model(arch, weights=None, num_classes=num_classes)
    return model


def _from_disk(path: Path, arch: str | None) -> tuple[str, nn.Module]:
    if path.is_dir():
        read_config(path)
        if not (path / "zeroed.pt").exists():
            raise Error(f"{path}: no zeroed.pt there, so that run is not done; finish it first")
        if arch is None:
            return f"{path}, zeroed.pt", load(path / "zeroed.pt")
        path /= "zeroed.pt"
    content = checkpoint.read(path)
    if arch is None:
        if "keep" not in content:
            raise Error(f"{path}: no network is named there; name it, as in --arch resnet56")
        return str(path), load(path)
    # `model`: what an epoch leaves, last.pt.
    state = content.get("state_dict", content.get("model", content))
    if not isinstance(state, dict) or not all(isinstance(v, Tensor) for v in state.values()):
        raise CheckpointError(f"{path}: holds no state_dict of a network")
    state = {name.removeprefix("module."): value for name, value in state.items()}
    model = _build(arch, *_sizes(path, state))
    checkpoint.fit(model, state, str(path))
    return f"{path}, {arch}", model


def _sizes(path: Path, state: Mapping[str, Tensor]) -> tuple[int, int]:
    """Classes and image channels of a network, from its last linear and first convolution."""
    convolutions = [v for v in state.values() if v.ndim == 4]
    last = [v for k, v in state.items() if k.endswith("weight") and v.ndim == 2]
    if not convolutions or not last:
        raise Error(f"{path}: no convolutions and linear layer in it")
    return len(last[-1]), convolutions[0].shape[1]


def _run_of(path: Path | None) -> Path | None:
    """The run directory that a checkpoint lies in."""
    if path is None:
        return None
    directory = path if path.is_dir() else path.parent
    return directory if (directory / "config.yaml").exists() else None


def _images(
    where: Path | None, image_size: int | None, imagenet: bool
) -> tuple[Images | None, str]:
    """The images of a run directory or an image folder, or None and why there are none.

    imagenet: prepared as torchvision's networks expect, not by the folder's own mean and deviation.
    """
    if where is None:
        return None, Subject.no_images
    if not where.is_dir():
        raise Error(f"--data {where}: no such directory; a run directory, or one with train/*")
    name, given = "imagenet" if imagenet else "image_folder", {"root": str(where)}
    try:
        if (where / "config.yaml").exists():
            values = read_config(where)["dataset"]
        else:
            values = yaml.safe_load((CONFIGS / "dataset" / f"{name}.yaml").read_text())
            values |= given | ({"image_size": image_size} if image_size else {})
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        return sets.load(device, **dataset(values).model_dump()), ""
    except (Error, OSError) as error:
        return None, f"the images of {where} cannot be read ({first_line(error)})"


def _check(model: nn.Module, images: Images) -> None:
    """Raise Error where the network does not take these images or has other classes."""
    shape = "x".join(map(str, images.image_shape))
    model.eval()
    try:
        with torch.inference_mode():
            outputs = model(torch.zeros(2, *images.image_shape))
    except RuntimeError as error:
        raise Error(
            f"--data: the network does not take images of {shape} ({first_line(error)})"
        ) from error
    if outputs.shape[1] != len(images.classes):
        raise Error(
            f"--data: {len(images.classes)} classes there, the network tells {outputs.shape[1]}"
        )
