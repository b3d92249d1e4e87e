"""The network that a run starts from, and the constants of normalisation that it wants."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import torch
import yaml
from torch import nn

from fpgm.config import Config
from fpgm.data.images import Images
from fpgm.errors import CheckpointError, Error, first_line
from fpgm.keys import CONFIGS
from fpgm.networks import elsewhere, models
from fpgm.runs import checkpoint

log = logging.getLogger("fpgm")

NAMED = ("torchvision", "timm")  # what pretrained= may be beside a file or a run directory


def network_of(config: Config, arch: Mapping[str, Any], trained: bool = True) -> nn.Module:
    """The run's network as it is before the first epoch. Seeds torch.

    arch: the arguments of models.model; trained: with the weights that pretrained= names. Raises
    Error, CheckpointError where they are not there.
    """
    torch.manual_seed(config.seed)
    model = models.model(**arch)
    if trained and config.pretrained is not None:
        load_pretrained(model, arch, config.pretrained)
    return model


def given(config: Config, arch: Mapping[str, Any]) -> nn.Module:
    """The trained network that a run starts from, again. Raises Error where its last layer was not
    trained, CheckpointError where its file has gone."""
    with torch.random.fork_rng(devices=[]):
        model = network_of(config, arch)
    if config.pretrained == "timm":
        theirs = model.pretrained_cfg["num_classes"]  # type: ignore[index]
        if theirs != arch["num_classes"]:
            raise Error(
                f"pretrained=timm: those weights tell {theirs} classes, so that the last layer for "
                f"{arch['num_classes']} starts at random and teaches nothing; train it first, with "
                "rate=0, and start from that with pretrained=RUN_DIR"
            )
    return model


def load_pretrained(model: nn.Module, arch: Mapping[str, Any], name: str) -> None:
    """Start from a run directory, a checkpoint, or torchvision's or timm's ImageNet weights."""
    network = arch["name"]
    if name == "timm":
        given = {key: value for key, value in arch.items() if key != "name"}
        classes, channels = given.pop("num_classes"), given.pop("in_channels")
        checkpoint.fit(model, elsewhere.timm_weights(network, classes, channels, given), "timm")
    elif name == "torchvision":
        try:
            weights = models.torchvision_weights(network)
        except (OSError, RuntimeError) as error:
            raise CheckpointError(
                f"pretrained=torchvision: the download failed ({first_line(error)}); put "
                "the file where torch.hub looks for it, or give a checkpoint"
            ) from error
        checkpoint.fit(model, weights, f"pretrained=torchvision, {network}")
    else:
        checkpoint.load_weights(model, checkpoint.pretrained_file(name, model))


def as_wanted(
    config: Config, images: Images, model: nn.Module, state: Mapping[str, Any] | None
) -> Images:
    """The images, normalised as a network of timm's or one's own wants them: as the run has begun
    (state), else as its trained weights or the network itself say; as the data set says where they
    say nothing, where the configuration names constants, and for fpgm's and torchvision's networks.
    """
    if isinstance(config.arch, str) or _chosen(config):
        return images
    made = state["preprocessing"] if state is not None else _of_file(config.pretrained)
    told = elsewhere.constants(model, config.network, config.pretrained)
    wanted = told if made is None else (made["mean"], made["std"])
    if wanted is None or len(wanted[0]) != images.image_shape[0]:
        return images
    numbers = (" ".join(f"{value:.4g}" for value in values) for values in wanted)
    log.info("images normalised as the network wants them: mean %s, std %s", *numbers)
    return images.normalised_by(*wanted)


def _of_file(pretrained: str | None) -> dict[str, Any] | None:
    """The preprocessing that a checkpoint of fpgm has been trained with; None of others."""
    if pretrained is None or pretrained in NAMED:
        return None
    made = checkpoint.read(checkpoint.pretrained_file(pretrained)).get("preprocessing")
    return made if isinstance(made, dict) else None


def _chosen(config: Config) -> bool:
    """Whether constants are given: others than those that the data set's YAML has."""
    path = CONFIGS / "dataset" / f"{config.dataset.name}.yaml"
    values = yaml.safe_load(path.read_text())
    usual = values.get("dataset", values)
    return (config.dataset.mean, config.dataset.std) != (usual["mean"], usual["std"])
