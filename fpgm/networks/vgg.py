"""VGG for images of 32x32."""

from __future__ import annotations

from functools import partial

import torch.nn.functional as F
from torch import Tensor, nn

from fpgm.networks.initialisation import start

WIDTHS = (64, 128, 256, 512, 512)
# How many convolutions each stage has: configurations A, B, D and E of Simonyan & Zisserman (2015).
CONVOLUTIONS = {11: (1, 1, 2, 2, 2), 13: (2,) * 5, 16: (2, 2, 3, 3, 3), 19: (2, 2, 4, 4, 4)}


class Vgg(nn.Module):
    """VGG with BatchNorm for 32x32 images, as pruned by PFEC and the FPGM code.

    depth: the convolutions, and three linear layers of the original, of which two are here, 512
    wide with a BatchNorm between (Network Slimming's VGG-19 has the last alone). It starts as the
    FPGM code starts it: the scales of BatchNorm2d at 0.5, linear layers N(0, 0.01), BatchNorm1d as
    torch does. The convolutions take 152,764,416, 228,261,888, 313,196,544 or 398,131,200 MACs on
    32x32, the linear layers 267,264 for 10 classes.
    """

    def __init__(self, depth: int, num_classes: int, in_channels: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        inputs = in_channels
        for stage, (width, count) in enumerate(zip(WIDTHS, CONVOLUTIONS[depth], strict=True)):
            if stage:
                layers.append(nn.MaxPool2d(2))
            for _ in range(count):
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
        start(self, scale=0.5, linear=partial(nn.init.normal_, std=0.01))

    def forward(self, x: Tensor) -> Tensor:
        x = F.adaptive_avg_pool2d(self.features(x), 1)
        return self.classifier(x.flatten(1))  # type: ignore[no-any-return]
