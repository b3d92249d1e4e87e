"""The network that is asked about, from its name, its file, or the function that builds it."""

from __future__ import annotations

import difflib
import importlib
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torchvision
from torch import nn
from torchvision.models import segmentation

from fpgm.compaction.compact import load
from fpgm.errors import CheckpointError, Error, first_line, imported
from fpgm.graph.tracer import stated
from fpgm.networks import models
from fpgm.runs import checkpoint
from fpgm.runs.run import read_config

Image = tuple[int, int, int]

LARGE: Image = (3, 224, 224)  # what torchvision's networks are made for, and most others
SMALL: Image = (3, 32, 32)


@dataclass(frozen=True)
class Subject:
    """image: (C, H, W), what the network is made for as far as that is known."""

    name: str
    model: nn.Module
    image: Image


def find(given: str) -> Subject:
    """A network of fpgm or of torchvision by its name, timm:NAME, package.module:function, a run
    directory or a checkpoint of fpgm. Raises Error."""
    path = Path(given).expanduser()
    # The same start each time: it decides which filters of a stream are the same ones.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        if path.exists():
            model, image = _from_disk(path)
        elif given.startswith("timm:"):
            model, image = _of_timm(given), LARGE
        elif ":" in given:
            model, image = _own(given), LARGE
        else:
            model, image = _by_name(given)
    return Subject(given, model.eval(), stated(model) or image)


def _by_name(given: str) -> tuple[nn.Module, Image]:
    """fpgm's network of that name, else torchvision's."""
    classification = torchvision.models.list_models(module=torchvision.models)
    segmenting = torchvision.models.list_models(module=segmentation)
    if given in models.MODELS and given not in models.TORCHVISION:
        pixels = models.ONE_SIZE.get(given)
        return models.model(given), (3, pixels, pixels) if pixels else SMALL
    if given not in (*classification, *segmenting):
        names = (*models.MODELS, *classification, *segmenting)
        raise Error(f"{given}: no network, run or checkpoint of that name{_nearest(given, names)}")
    options: dict[str, Any] = {"weights": None}
    if given in segmenting:
        options["weights_backbone"] = None
    if given in ("googlenet", "inception_v3"):
        options["init_weights"] = False  # which takes seconds
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about initialisations that will change
        return torchvision.models.get_model(given, **options), LARGE


def _nearest(name: str, choices: tuple[str, ...]) -> str:
    near = difflib.get_close_matches(name, dict.fromkeys(choices), n=3, cutoff=0.5)
    ways = "a network of fpgm or torchvision, timm:NAME, package.module:function, a run"
    return f"; the nearest are {', '.join(near)}" if near else f"; give {ways}"


def _of_timm(given: str) -> nn.Module:
    name = given.removeprefix("timm:")
    try:
        timm = importlib.import_module("timm")
    except ImportError as error:
        raise Error(f"{given}: needs timm: pip install 'fpgm[timm]'") from error
    if not timm.is_model(name):
        near = difflib.get_close_matches(name, timm.list_models(), n=3, cutoff=0.5)
        told = f"; the nearest are {', '.join(near)}" if near else ""
        raise Error(f"{given}: timm has no network of that name{told}")
    try:
        network: nn.Module = timm.create_model(name)
    except (RuntimeError, ValueError) as error:  # a set of weights that there is not
        raise Error(f"{given}: {first_line(error)}") from error
    return network


def _own(given: str) -> nn.Module:
    """What a function of the user's own returns when it is called without arguments."""
    build = imported("MODEL", given)
    if not callable(build):
        raise Error(f"MODEL={given}: is a {type(build).__name__} and no function that builds one")
    try:
        network = build()
    except Exception as error:  # it is somebody's code, and may raise anything
        raise Error(
            f"MODEL={given}: called without arguments it raises {type(error).__name__}: "
            f"{first_line(error)}"
        ) from error
    if not isinstance(network, nn.Module):
        raise Error(f"MODEL={given}: returns a {type(network).__name__} and no torch.nn.Module")
    return network


def _from_disk(path: Path) -> tuple[nn.Module, Image]:
    """A checkpoint that fpgm has written, of a finished run the network at full width."""
    if path.is_dir():
        arch = read_config(path)["arch"]
        if not (path / "zeroed.pt").exists():
            raise Error(
                f"{path}: no zeroed.pt there, so that run is not done; fpgm-explain {arch} tells "
                "the same of its network"
            )
        path = path / "zeroed.pt"
    try:
        content = checkpoint.read(path, ("arch", "keep", "state_dict", "preprocessing"))
    except CheckpointError as error:
        if "has no" not in str(error):
            raise
        raise CheckpointError(
            f"{path}: only weights; give the network's name, or package.module:function for yours"
        ) from error
    channels, height, width = content["preprocessing"]["image_shape"]
    return load(path), (channels, height, width)


def sized(subject: Subject, given: str | None) -> Image:
    """--image as it was typed, or what the network is made for. Raises Error for what is no image
    and for images that the network does not take."""
    image = _typed(given) if given is not None else subject.image
    shape = "x".join(map(str, image))
    parameter = next(subject.model.parameters(), torch.zeros(0))
    try:
        with torch.inference_mode():
            subject.model(torch.zeros(1, *image, dtype=parameter.dtype, device=parameter.device))
    except Exception as error:  # it is somebody's code, and may raise anything
        raise Error(
            f"--image {','.join(map(str, image))}: {subject.name} does not take images of {shape} "
            f"({first_line(error)}); give the C,H,W that it is made for"
        ) from error
    return image


def _typed(given: str) -> Image:
    try:
        channels, height, width = map(int, given.split(","))
    except ValueError:
        channels = height = width = 0
    if min(channels, height, width) < 1:
        raise Error(f"--image {given}: channels, height and width, for example --image 3,224,224")
    return channels, height, width
