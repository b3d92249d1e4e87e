"""DenseNet for images of 32x32."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fpgm.networks.initialisation import start


class Activated(nn.Module):
    """BatchNorm, ReLU, convolution: the order of all of DenseNet."""

    def __init__(self, inputs: int, outputs: int, kernel: int) -> None:
        super().__init__()
        self.bn = nn.BatchNorm2d(inputs)
        self.conv = nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.relu(self.bn(x)))  # type: ignore[no-any-return]


class Dense(Activated):
    """Its new channels behind those that it has read."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat((x, super().forward(x)), 1)


class Transition(Activated):
    """From one block to the next: a 1x1 convolution, and half the image."""

    def forward(self, x: Tensor) -> Tensor:
        return F.avg_pool2d(super().forward(x), 2)


class DenseNet(nn.Module):
    """Three blocks of n dense layers that add `growth` channels each, depth = 3n + 4, without
    bottlenecks and compression (Huang et al., CVPR 2017, section 3)."""

    def __init__(self, depth: int, growth: int, num_classes: int, in_channels: int) -> None:
        super().__init__()
        count, channels = (depth - 4) // 3, 16
        self.conv1 = nn.Conv2d(in_channels, channels, 3, padding=1, bias=False)
        layers: list[nn.Module] = []
        for block in range(3):
            if block:
                layers.append(Transition(channels, channels, 1))
            layers += [Dense(channels + growth * i, growth, 3) for i in range(count)]
            channels += growth * count
        self.features = nn.Sequential(*layers)
        self.bn = nn.BatchNorm2d(channels)
        self.fc = nn.Linear(channels, num_classes)
        start(self, scale=0.5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn(self.features(self.conv1(x))))
        return self.fc(F.adaptive_avg_pool2d(x, 1).flatten(1))  # type: ignore[no-any-return]


def densenet40(num_classes: int, in_channels: int) -> nn.Module:
    """DenseNet-40 of growth 12, depth 3n + 4, n = 12, as Network Slimming prunes it (Liu et al.,
    ICCV 2017). It starts with 16 channels, by which that paper's 1.02 M parameters come out (its
    later code: 24, 1,059,298), the scales of BatchNorm at 0.5, the linear layer as torch has it.
    264,812,928 MACs on 32x32, 1,019,722 parameters."""
    return DenseNet(40, 12, num_classes, in_channels)
