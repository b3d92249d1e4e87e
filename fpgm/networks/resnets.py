"""The residual networks for images of 32x32: of 2015, and with the activation in front (2016)."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from fpgm.networks.initialisation import start

WIDTHS = (16, 32, 64)  # of the three stages; the second and the third halve the image


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
        self.layer1, self.layer2, self.layer3 = _stages(BasicBlock, (depth - 2) // 6)
        self.fc = nn.Linear(64, num_classes)
        start(self, linear=nn.init.kaiming_normal_)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.fc(F.adaptive_avg_pool2d(x, 1).flatten(1))  # type: ignore[no-any-return]


class PreBasicBlock(nn.Module):
    """BatchNorm, ReLU, convolution, twice; nothing behind the add, so that the shortcut, which has
    no parameters, is an identity (He et al., "Identity Mappings", 2016, figure 1b)."""

    EXPANSION = 1

    def __init__(self, inputs: int, width: int, stride: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(inputs)
        self.conv1 = nn.Conv2d(inputs, width, 3, stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.shortcut = nn.Identity() if stride == 1 else ShortcutA(width - inputs)

    def forward(self, x: Tensor) -> Tensor:
        out = self.conv1(F.relu(self.bn1(x)))
        return self.conv2(F.relu(self.bn2(out))) + self.shortcut(x)  # type: ignore[no-any-return]


class PreBottleneck(nn.Module):
    """Three times BatchNorm, ReLU, convolution: 1x1, 3x3, 1x1 to four times the width. Where the
    stream gets wider the shortcut is a 1x1 convolution of the block's raw input."""

    EXPANSION = 4

    def __init__(self, inputs: int, width: int, stride: int) -> None:
        super().__init__()
        outputs = self.EXPANSION * width
        self.bn1 = nn.BatchNorm2d(inputs)
        self.conv1 = nn.Conv2d(inputs, width, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, stride, padding=1, bias=False)
        self.bn3 = nn.BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, outputs, 1, bias=False)
        wider = inputs != outputs
        self.shortcut = (
            nn.Conv2d(inputs, outputs, 1, stride, bias=False) if wider else nn.Identity()
        )

    def forward(self, x: Tensor) -> Tensor:
        out = self.conv1(F.relu(self.bn1(x)))
        out = self.conv2(F.relu(self.bn2(out)))
        return self.conv3(F.relu(self.bn3(out))) + self.shortcut(x)  # type: ignore[no-any-return]


class PreResNet(nn.Module):
    """Three stages of so many pre-activation blocks, BatchNorm, ReLU, the mean over the image, a
    linear layer. The first BatchNorm and ReLU stand before the shortcut of the first block branches
    off, not in the block (He et al., "Identity Mappings", 2016, appendix)."""

    def __init__(
        self,
        block: type[PreBasicBlock] | type[PreBottleneck],
        blocks: int,
        num_classes: int,
        in_channels: int,
    ) -> None:
        super().__init__()
        outputs = block.EXPANSION * WIDTHS[-1]
        self.conv1 = nn.Conv2d(in_channels, 16, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.layer1, self.layer2, self.layer3 = _stages(block, blocks, block.EXPANSION)
        self.layer1[0].bn1 = nn.Identity()  # and its ReLU leaves what is rectified as it is
        self.bn2 = nn.BatchNorm2d(outputs)
        self.fc = nn.Linear(outputs, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        x = F.relu(self.bn2(self.layer3(self.layer2(self.layer1(x)))))
        return self.fc(F.adaptive_avg_pool2d(x, 1).flatten(1))  # type: ignore[no-any-return]


def preresnet110(num_classes: int, in_channels: int) -> nn.Module:
    """The pre-activation ResNet of depth 6n + 2, n = 18, with shortcut A (He et al., "Identity
    Mappings in Deep Residual Networks", ECCV 2016). It starts as CifarResNet does.
    252,887,680 MACs on 32x32, 1,727,962 parameters."""
    network = PreResNet(PreBasicBlock, 18, num_classes, in_channels)
    start(network, linear=nn.init.kaiming_normal_)
    return network


def preresnet164(num_classes: int, in_channels: int) -> nn.Module:
    """The pre-activation ResNet of bottlenecks, depth 9n + 2, n = 18 (the same paper), as Network
    Slimming prunes it (Liu et al., ICCV 2017): 1x1 projections without BatchNorm where the width
    changes, the scales of BatchNorm start at 0.5, the linear layer as torch has it; their code has
    the first activation in the first block. 247,646,720 MACs on 32x32, 1,703,258 parameters."""
    network = PreResNet(PreBottleneck, 18, num_classes, in_channels)
    start(network, scale=0.5)
    return network


def _stages(block: type[nn.Module], blocks: int, expansion: int = 1) -> list[nn.Sequential]:
    """Three stages of so many blocks each. block: (inputs, width, stride) -> expansion * width."""
    inputs, stages = 16, []
    for width in WIDTHS:
        stride = 1 if width == WIDTHS[0] else 2
        rest = (block(expansion * width, width, 1) for _ in range(blocks - 1))
        stages.append(nn.Sequential(block(inputs, width, stride), *rest))
        inputs = expansion * width
    return stages
