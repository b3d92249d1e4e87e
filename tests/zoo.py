"""Networks for tests: BatchNorms drawn at random, filters zeroed at random."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models import (
    densenet,
    efficientnet,
    mobilenetv2,
    mobilenetv3,
    resnet,
    shufflenetv2,
    squeezenet,
)
from torchvision.models import regnet as regnets
from torchvision.models.convnext import CNBlockConfig, ConvNeXt
from torchvision.models.googlenet import GoogLeNet

import fpgm
from fpgm.compaction.compact import equivalence


def randomised(model: nn.Module, seed: int, dtype: torch.dtype = torch.float32) -> nn.Module:
    """Every BatchNorm's weight, bias, mean and variance drawn at random: nothing is 0 or 1."""
    g = torch.Generator().manual_seed(seed)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d | nn.BatchNorm1d):
            shape = module.running_mean.shape
            module.weight.data = torch.randn(shape, generator=g)
            module.bias.data = torch.randn(shape, generator=g)
            module.running_mean = torch.randn(shape, generator=g)
            module.running_var = 0.1 + 2 * torch.rand(shape, generator=g)
    return model.to(dtype).eval()


def random_keep(
    model: nn.Module, rate: float, seed: int, residual: str = "independent"
) -> dict[str, Tensor]:
    """Each prunable convolution loses floor(N * rate) filters, but never all, at random."""
    return fpgm.select(model, "random", rate, residual=residual, seed=seed)


def error(full: nn.Module, small: nn.Module, x: Tensor) -> float:
    """How far two networks lie apart, of the largest output."""
    measured = equivalence(full, small, x)
    return measured["max_abs_diff"] / measured["max_abs_logit"]


def zeroed(seed: int, rate: float, model: nn.Module, dtype: torch.dtype = torch.float32):
    """A randomised network with random filters zeroed, and what was kept."""
    model = randomised(model, seed, dtype)
    keep = random_keep(model, rate, seed)
    fpgm.zero_(model, keep)
    return model, keep


class Odd(nn.Module):
    """What ResNets do not have: cat, biases, paddings of all kinds, f(0) != 0, long flatten."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Conv2d(3, 10, 3, padding=1)
        self.b = nn.Conv2d(3, 6, 5, padding="same")
        self.norm = nn.BatchNorm2d(16)
        self.reflect = nn.Conv2d(16, 12, 3, padding=1, padding_mode="reflect")
        self.valid = nn.Conv2d(12, 14, 3, bias=False)
        self.dilated = nn.Conv2d(14, 9, 3, stride=2, padding=(2, 1), dilation=2)
        self.act = nn.PReLU(init=0.3)
        self.point = nn.Conv2d(9, 11, 1, padding=1, bias=False)
        self.last = nn.BatchNorm1d(11 * 9)
        self.fc = nn.Linear(11 * 9, 7, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.cat((self.a(x), torch.sigmoid(self.b(x))), 1)
        x = F.max_pool2d(F.gelu(self.norm(x)), 3, 2, 1)
        x = F.avg_pool2d(F.silu(self.reflect(x)) + 0.25, 2, ceil_mode=True)
        x = self.act(self.dilated(F.hardswish(self.valid(x), inplace=True)))
        x = F.adaptive_avg_pool2d(F.leaky_relu_(self.point(x), 0.2), 3)
        return self.fc(self.last(x.view(x.size(0), -1)))


class Overwrites(nn.Module):
    """In-place operations whose argument is read again afterwards."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(8)
        self.relu = nn.ReLU(inplace=True)
        self.up = nn.Conv2d(8, 8, 3, padding=1)
        self.down = nn.Conv2d(8, 8, 3, padding=1)
        self.fc = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.stem(x))
        self.relu(x)  # x itself is rectified from here on
        y = self.up(x)
        y += x
        z = self.down(y)
        z += y
        y.relu_()
        z = z + y
        return self.fc(z.mean((2, 3)))


class Spelled(nn.Module):
    """The same operations in the spellings that people use: names, positions, sizes, operators."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Conv2d(3, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.b = nn.Conv2d(8, 8, 3, padding=1, bias=False)
        self.c = nn.Conv2d(16, 6, 3, padding=1)
        self.d = nn.Conv2d(8, 6, 3, padding=1)
        self.fc = nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(input=self.a(x))
        F.relu(x, True)  # in place, by position
        y = self.b(F.leaky_relu(input=x, negative_slope=0.1))
        y = torch.add(input=y, other=x)
        F.leaky_relu_(y, 0.3)
        y *= 1.5
        z = torch.cat(tensors=(y, x), dim=1)
        w = torch.cat([y, y], 1)
        z = self.c(z + F.sigmoid(w))
        z = z + self.d(x.clamp_(min=0.1)) * z.sigmoid()
        z.add_(0.5)
        z = F.avg_pool2d(z, z.size()[3])
        z = F.avg_pool2d(z, (z.shape[2], z.size(3)), padding=0)
        return self.fc(z.reshape(z.size()[0], -1))


class Mixed(nn.Module):
    """Dimensions that look like channels and are not."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Conv2d(3, 8, 3, padding=1)
        self.along_width = nn.Linear(8, 8)
        self.b = nn.Conv2d(8, 8, 3, padding=1)
        self.c = nn.Conv2d(8, 8, 3, padding=1)
        self.average = nn.AvgPool2d(3, 1, padding=1)
        self.d = nn.Conv2d(8, 8, 3, padding=1)
        self.fc = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.along_width(self.a(x))  # (B, C, H, W): a linear layer over W
        x = F.relu(self.b(x))
        x = x + x.mean((2, 3))[0]  # (8,) is added along W
        x = self.average(self.c(x))  # zeros around the image are averaged in
        x = torch.cat((x, self.d(x)), 2)  # one above the other
        first, second = x.chunk(2, 1)
        return self.fc(torch.cat((second, first), 1).mean((2, 3), keepdim=False))


class Mysterious(nn.Module):
    """Channels go where pruning does not understand them, twice through one weight, and out."""

    def __init__(self) -> None:
        super().__init__()
        self.free = nn.Conv2d(3, 8, 3, padding=1)
        self.shuffled = nn.Conv2d(8, 8, 3, padding=1)
        self.twice = nn.Conv2d(8, 8, 3, padding=1)
        self.grouped = nn.Conv2d(8, 8, 3, padding=1, groups=4)
        self.fed = nn.Conv2d(8, 8, 1)
        self.head = nn.Conv2d(8, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.shuffled(F.relu(self.free(x)))
        x = x.softmax(1)
        x = self.twice(self.twice(x))
        x = self.grouped(self.fed(x))
        return self.head(x).mean((2, 3))


class Gated(nn.Module):
    """Channels that another convolution's channels are multiplied by."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Conv2d(3, 6, 3, padding=1)
        self.norm = nn.BatchNorm2d(6)
        self.gate = nn.Conv2d(6, 6, 1)
        self.b = nn.Conv2d(6, 4, 3, padding=1)
        self.fc = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = F.silu(self.norm(self.a(x)))
        x = x * self.gate(F.adaptive_avg_pool2d(x, 1)).sigmoid()
        return self.fc(self.b(x).mean((2, 3)))


class Standard(nn.Conv2d):
    """Its weight is standardised at each call, as in NFNets: no layer but a function is called."""

    def forward(self, x: Tensor) -> Tensor:
        flat = self.weight.reshape(1, self.out_channels, -1)
        weight = F.batch_norm(flat, None, None, training=True).reshape_as(self.weight)
        return F.conv2d(x, weight, self.bias, self.stride, self.padding, groups=self.groups)


class Functional(nn.Module):
    """Convolutions and products that are called as functions, beside one that is a layer."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = Standard(3, 8, 3, padding=1)
        self.plain = nn.Conv2d(8, 12, 3, stride=2)
        self.grouped = Standard(12, 8, 3, groups=2)
        self.kernel = nn.Parameter(torch.randn(6, 8, 1, 1))
        self.table = nn.Parameter(torch.randn(6, 5))

    def forward(self, x: Tensor) -> Tensor:
        x = self.grouped(F.relu(self.plain(F.relu(self.stem(x)))))
        x = F.relu(F.conv2d(x, self.kernel))
        return F.linear(x.mean((2, 3)) @ self.table, self.table) @ self.table


# The families of torchvision, a few blocks of each: all that their full sizes have, in a hundredth
# of the time.
FAMILIES = {
    "resnet": lambda: resnet.ResNet(resnet.BasicBlock, [2, 1, 1, 1], 10),
    "bottleneck": lambda: resnet.ResNet(resnet.Bottleneck, [1, 1, 1, 1], 10, width_per_group=16),
    "densenet": lambda: densenet.DenseNet(8, (2, 2, 2), 16, num_classes=10),
    "googlenet": lambda: GoogLeNet(10, aux_logits=False, init_weights=False),
    "mobilenet_v2": lambda: mobilenetv2.MobileNetV2(10, width_mult=0.25),
    "mobilenet_v3": lambda: mobilenetv3.mobilenet_v3_small(num_classes=10, width_mult=0.25),
    "efficientnet": lambda: efficientnet.EfficientNet(
        efficientnet._efficientnet_conf("efficientnet_b0", width_mult=0.25, depth_mult=0.3)[0],
        0.2,
        num_classes=10,
        last_channel=32,
    ),
    "regnet": lambda: regnets.RegNet(
        regnets.BlockParams.from_init_params(4, 16, 16.0, 2.0, 8, se_ratio=0.25), 10
    ),
    "shufflenet": lambda: shufflenetv2.ShuffleNetV2([2, 1, 1], [24, 16, 32, 64, 64], 10),
    "convnext": lambda: ConvNeXt(
        [CNBlockConfig(16, 32, 1), CNBlockConfig(32, None, 1)], num_classes=10
    ),
    "squeezenet": lambda: squeezenet.SqueezeNet("1_0", 10),
}
