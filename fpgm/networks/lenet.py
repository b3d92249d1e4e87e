"""LeNet-5 as the pruning literature knows it."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn


class LeNet5(nn.Module):
    """Caffe's LeNet-5 for images of 28x28: convolutions of 20 and 50 filters of 5x5, max pooling
    behind each, linear layers of 500 and the classes, ReLU behind the first of these alone.

    430,500 weights on one channel and 10 classes, 580 biases apart, and 2,293,000 MACs. It starts
    as Caffe's "xavier" filler does, U(-sqrt(3 / fan in), sqrt(3 / fan in)), with biases of 0.
    """

    def __init__(self, num_classes: int, in_channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, 20, 5)
        self.conv2 = nn.Conv2d(20, 50, 5)
        self.fc1 = nn.Linear(50 * 4 * 4, 500)
        self.fc2 = nn.Linear(500, num_classes)
        for layer in (self.conv1, self.conv2, self.fc1, self.fc2):
            nn.init.kaiming_uniform_(layer.weight, nonlinearity="linear")
            assert layer.bias is not None
            nn.init.zeros_(layer.bias)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(self.conv1(x), 2)
        x = F.max_pool2d(self.conv2(x), 2)
        return self.fc2(F.relu(self.fc1(x.flatten(1))))  # type: ignore[no-any-return]
