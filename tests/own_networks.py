"""Networks of one's own, as `arch=own arch.build=own_networks:NAME` names them."""

from __future__ import annotations

from functools import partial
from subprocess import Popen, run
from typing import Any

from torch import Tensor, nn

from fpgm.networks.resnets import CifarResNet

__all__ = ["Popen", "run"]  # which are no networks

thing = 3


def tiny(num_classes: int, in_channels: int, width: int = 8, kernel: int = 3) -> nn.Sequential:
    """Two convolutions that can be pruned."""
    return nn.Sequential(
        nn.Conv2d(in_channels, width, kernel, padding=kernel // 2, bias=False),
        nn.BatchNorm2d(width),
        nn.ReLU(),
        nn.Conv2d(width, 2 * width, kernel, 2, padding=kernel // 2, bias=False),
        nn.BatchNorm2d(2 * width),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(2 * width, num_classes),
    )


def resnet8(num_classes: int, in_channels: int) -> nn.Module:
    """What resnet20 is, with one block in each stage."""
    return CifarResNet(8, num_classes, in_channels)


def averaged(num_classes: int, in_channels: int) -> nn.Sequential:
    """Zeros around the image are averaged with what is emitted, some of it cut off by a ReLU."""
    return nn.Sequential(
        nn.Conv2d(in_channels, 12, 3, padding=1, bias=False),
        nn.BatchNorm2d(12),
        nn.ReLU(),
        nn.AvgPool2d(3, 1, 1),
        nn.Conv2d(12, 8, 3, padding=1),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, num_classes),
    )


class Twice(nn.Module):
    """A layer that is called twice, one that is never, and one that does not learn."""

    def __init__(self, num_classes: int, in_channels: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(in_channels, 8, 3, padding=1)
        self.auxiliary = nn.Conv2d(8, 8, 3)
        self.again = nn.Conv2d(8, 8, 3, padding=1)
        self.fixed = nn.Conv2d(8, 8, 3, padding=1).requires_grad_(False)
        self.last = nn.Linear(8, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x).relu()
        x = self.again(self.again(x).relu()).relu()
        return self.last(self.fixed(x).mean((2, 3)))  # type: ignore[no-any-return]


class Normalised(nn.Module):
    """One that says how it wants its images."""

    mean, std = (0.1, 0.2, 0.3), (0.4, 0.5, 0.6)

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.layers = tiny(num_classes, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)  # type: ignore[no-any-return]


def handed_on(**options: Any) -> nn.Sequential:
    return tiny(in_channels=1, **options)


def plain(num_classes):  # type: ignore[no-untyped-def]
    """As people write it."""
    return tiny(num_classes, 1)


narrow = partial(tiny, width=4)


def fixed() -> nn.Sequential:
    return tiny(7, 1)


def large(num_classes: int, in_channels: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(in_channels, 4, 11), tiny(num_classes, 4))


def linear(num_classes: int) -> nn.Sequential:
    return nn.Sequential(nn.Flatten(), nn.Linear(64, num_classes))


def nothing(num_classes: int) -> list[int]:
    return [num_classes]


def broken(num_classes: int) -> nn.Module:
    return nn.Conv2d(1, num_classes, 3, groups=7)


def wants(num_classes: int, depth: int) -> nn.Module:
    return tiny(num_classes, depth)
