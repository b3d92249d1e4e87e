"""Networks start as their papers' code starts them."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import fpgm
from fpgm.errors import Error
from fpgm.networks.models import MODELS


def test_vgg16_starts_as_the_published_code_does() -> None:
    torch.manual_seed(0)
    network = fpgm.model("vgg16")
    scales = {type(m): m.weight.unique().tolist() for m in network.modules()
              if isinstance(m, nn.BatchNorm1d | nn.BatchNorm2d)}  # fmt: skip
    assert scales == {nn.BatchNorm2d: [0.5], nn.BatchNorm1d: [1.0]}
    linear = network.classifier[0]
    assert linear.weight.std().item() == pytest.approx(0.01, rel=0.01)
    assert linear.bias.count_nonzero() == 0
    conv = network.features[0]
    assert conv.weight.std().item() == pytest.approx((2 / (9 * 64)) ** 0.5, rel=0.05)


def test_residual_networks_start_with_kaiming_s_linear_layer() -> None:
    torch.manual_seed(0)
    linear = fpgm.model("resnet20", num_classes=1000).fc
    assert linear.weight.std().item() == pytest.approx((2 / 64) ** 0.5, rel=0.02)


def test_unknown_network_is_told_the_choices() -> None:
    with pytest.raises(Error, match=f"arch=vgg: choose one of {', '.join(MODELS)}"):
        fpgm.model("vgg")
