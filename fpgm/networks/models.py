"""Networks by name: the CIFAR ResNets and VGG-16 of the papers, torchvision's by theirs.

A new network is one function and one entry in MODELS (and one YAML file in configs/arch to offer
it on the command line).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn

from fpgm.errors import Error


class ShortcutA(nn.Module):
    """Shortcut option A (He et al., 2016): take every second pixel, append zero channels."""

    def __init__(self, extra: int) -> None:
        super().__init__()
        self.extra = extra

    def forward(self, x: Tensor) -> Tensor:
        return F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 0, self.extra))


class BasicBlock(nn.Module):
    """Two 3x3 convolutions beside a shortcut without parameters, ReLU after the add."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.shortcut = nn.Identity() if stride == 1 else ShortcutA(outputs - inputs)

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(out)) + self.shortcut(x))


class CifarResNet(nn.Module):
    """ResNet for 32x32 images, depth = 6n + 2 (He et al., 2016, section 4.2)."""

    def __init__(self, depth: int, num_classes: int, in_channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, 16, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        blocks = (depth - 2) // 6
        self.layer1 = _stage(16, 16, blocks, stride=1)
        self.layer2 = _stage(16, 32, blocks, stride=2)
        self.layer3 = _stage(32, 64, blocks, stride=2)
        self.fc = nn.Linear(64, num_classes)
        self.apply(_initialise)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.fc(F.adaptive_avg_pool2d(x, 1).flatten(1))  # type: ignore[no-any-return]


class Vgg16(nn.Module):
    """VGG-16 with BatchNorm for 32x32 images, as pruned by PFEC and the FPGM code."""

    WIDTHS = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))

    def __init__(self, num_classes: int, in_channels: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        inputs = in_channels
        for stage, widths in enumerate(self.WIDTHS):
            if stage:
                layers.append(nn.MaxPool2d(2))
            for width in widths:
                conv = nn.Conv2d(inputs, width, 3, padding=1, bias=False)
                layers += [conv, nn.BatchNorm2d(width), nn.ReLU(inplace=True)]
                inputs = width
        self.features = nn.Sequential(*layers)
        self.classifier = nn.Sequential(
            nn.Linear(512, 512),
            nn.BatchNorm1d(512),
            nn.ReLU(inplace=True),
            nn.Linear(512, num_classes),
        )
        self.apply(_initialise)
        # As the FPGM code starts it; BatchNorm1d as torch does.
        for module in self.modules():
            if isinstance(module, nn.BatchNorm2d):
                nn.init.constant_(module.weight, 0.5)
            elif isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, 0, 0.01)

    def forward(self, x: Tensor) -> Tensor:
        x = F.adaptive_avg_pool2d(self.features(x), 1)
        return self.classifier(x.flatten(1))  # type: ignore[no-any-return]


def _stage(inputs: int, outputs: int, blocks: int, stride: int) -> nn.Sequential:
    first = BasicBlock(inputs, outputs, stride)
    return nn.Sequential(first, *(BasicBlock(outputs, outputs, 1) for _ in range(blocks - 1)))


def _initialise(module: nn.Module) -> None:
    """The papers' start: convolutions N(0, sqrt(2 / (kH kW N))), linear Kaiming normal."""
    if isinstance(module, nn.Conv2d):
        fan_out = module.kernel_size[0] * module.kernel_size[1] * module.out_channels
        nn.init.normal_(module.weight, 0, math.sqrt(2 / fan_out))
    elif isinstance(module, nn.Linear):
        nn.init.kaiming_normal_(module.weight)
        nn.init.zeros_(module.bias)


def _from_torchvision(name: str, num_classes: int, in_channels: int) -> nn.Module:
    if in_channels != 3:
        raise Error(f"arch={name} takes images of 3 channels, not {in_channels}: try arch=resnet20")
    network: nn.Module = torchvision.models.get_model(name, weights=None, num_classes=num_classes)
    return network


TORCHVISION = ("resnet18", "resnet34", "resnet50", "resnet101")
MODELS: dict[str, Callable[..., nn.Module]] = {
    **{f"resnet{depth}": partial(CifarResNet, depth) for depth in (20, 32, 44, 56, 110)},
    "vgg16": Vgg16,
    **{name: partial(_from_torchvision, name) for name in TORCHVISION},
}


def check_size(name: str, network: nn.Module, image: tuple[int, int, int]) -> None:
    """Raise Error where images of (C, H, W) are too small for a network."""
    training = network.training
    try:
        with torch.inference_mode():
            network.eval()(torch.zeros(1, *image))
    except RuntimeError as error:
        raise Error(
            f"arch={name}: images of {image[1]}x{image[2]} are too small for it; try "
            "dataset.image_size=32 or arch=resnet20"
        ) from error
    finally:
        network.train(training)


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


def model(name: str, num_classes: int = 10, in_channels: int = 3) -> nn.Module:
    """A freshly initialised network. Raises Error with the choices for an unknown name."""
    if name not in MODELS:
        raise Error(f"arch={name}: choose one of {', '.join(MODELS)}")
    return MODELS[name](num_classes=num_classes, in_channels=in_channels)
