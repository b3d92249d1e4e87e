"""Networks by name: those of the papers for small images, torchvision's by theirs, and by
timm:NAME or package.module:function what is built elsewhere.

A new network is one function and one entry in MODELS (and one YAML file in configs/arch to offer
it on the command line).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torchvision
from torch import Tensor, nn

from fpgm.errors import Error, told
from fpgm.networks import elsewhere
from fpgm.networks.densenet import densenet40
from fpgm.networks.lenet import LeNet5
from fpgm.networks.resnets import CifarResNet, preresnet110, preresnet164
from fpgm.networks.vgg import CONVOLUTIONS, Vgg


def _from_torchvision(name: str, num_classes: int, in_channels: int) -> nn.Module:
    if in_channels != 3:
        raise Error(f"arch={name} takes images of 3 channels, not {in_channels}: try arch=resnet20")
    network: nn.Module = torchvision.models.get_model(name, weights=None, num_classes=num_classes)
    return network


TORCHVISION = ("resnet18", "resnet34", "resnet50", "resnet101", "resnet152")
MODELS: dict[str, Callable[..., nn.Module]] = {
    **{f"resnet{depth}": partial(CifarResNet, depth) for depth in (20, 32, 44, 56, 110)},
    "preresnet110": preresnet110,
    "preresnet164": preresnet164,
    **{f"vgg{depth}": partial(Vgg, depth) for depth in CONVOLUTIONS},
    "densenet40": densenet40,
    "lenet5": LeNet5,
    **{name: partial(_from_torchvision, name) for name in TORCHVISION},
}
ONE_SIZE = {"lenet5": 28}  # networks whose linear layers take images of one size, in pixels


def check_size(
    name: str, network: nn.Module, image: tuple[int, int, int], classes: int | None = None
) -> None:
    """Raise Error where images of (C, H, W) are too small for a network, or not of its size, and
    where it does not give (B, classes)."""
    size = ONE_SIZE.get(name)
    if size is not None and image[1:] != (size, size):
        raise Error(
            f"arch={name} takes images of {size}x{size}, not {image[1]}x{image[2]}: try "
            f"dataset=mnist, dataset.image_size={size} (image_folder) or arch=resnet20"
        )
    training = network.training
    try:
        with torch.inference_mode():
            outputs = network.eval()(torch.zeros(1, *image))
    except Exception as error:  # somebody else's network may raise anything
        if name in MODELS and not isinstance(error, RuntimeError):
            raise
        if name not in MODELS:
            shape = "x".join(map(str, image))
            raise Error(f"arch={name}: images of {shape} make it raise {told(error)}") from error
        raise Error(
            f"arch={name}: images of {image[1]}x{image[2]} are too small for it; try "
            "dataset.image_size=32 or arch=resnet20"
        ) from error
    finally:
        network.train(training)
    given = tuple(outputs.shape) if isinstance(outputs, Tensor) else type(outputs).__name__
    if classes is not None and given != (1, classes):
        raise Error(
            f"arch={name}: gives {given} for one image, not (1, {classes}), a number for each class"
        )


def torchvision_weights(name: str) -> dict[str, Tensor]:
    """torchvision's ImageNet weights of the papers' time (V1), downloaded once.

    Raises Error for a network that it has none for, OSError or RuntimeError without a network.
    """
    if name not in TORCHVISION:
        raise Error(
            f"pretrained=torchvision: torchvision has no weights for arch={name}, only for "
            f"{', '.join(TORCHVISION)}"
        )
    weights = torchvision.models.get_model_weights(name).IMAGENET1K_V1
    state: dict[str, Tensor] = weights.get_state_dict(progress=True, check_hash=True)
    return state


def model(name: str, num_classes: int = 10, in_channels: int = 3, **options: Any) -> nn.Module:
    """A freshly initialised network.

    name: one of fpgm's, timm:NAME, or package.module:function, which is imported and called;
    options: keyword arguments of the latter two. Raises Error with the choices for an unknown name.
    """
    if ":" in name:
        return elsewhere.build(name, num_classes, in_channels, options)
    if name not in MODELS:
        raise Error(f"arch={name}: choose one of {', '.join(MODELS)}")
    if options:
        raise Error(f"arch={name}: takes no {', '.join(options)}; its name says all")
    return MODELS[name](num_classes=num_classes, in_channels=in_channels)
