"""Networks are those of the papers: their parts, their size, their start."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import fpgm
from fpgm.errors import Error
from fpgm.graph.flow import is_relu
from fpgm.graph.operations import POOL
from fpgm.graph.trace import trace
from fpgm.networks.models import MODELS, ONE_SIZE, check_size


def convolutions(network: nn.Module) -> dict[str, nn.Conv2d]:
    return {n: m for n, m in network.named_modules() if isinstance(m, nn.Conv2d)}


@pytest.mark.parametrize(
    ("arch", "macs", "params"),
    [
        ("vgg11", 152_764_416, 9_492_042),
        ("vgg13", 228_261_888, 9_676_746),
        ("vgg16", 313_196_544, 14_987_722),  # 3.13e8 in PFEC, 15 M
        (
            "vgg19",
            398_131_200,
            20_298_698,
        ),  # 7.97e8 FLOPs in Network Slimming, 20.04 M on one layer
        ("preresnet110", 252_887_040, 1_727_962),
        ("preresnet164", 247_644_160, 1_703_258),  # 4.99e8 FLOPs, 1.70 M there
        ("densenet40", 264_808_448, 1_019_722),  # 5.33e8 FLOPs, 1.02 M there
        ("lenet5", 1_888_000, 431_080),
    ],
)
def test_networks_have_the_size_that_the_papers_print(arch: str, macs: int, params: int) -> None:
    size, channels = ONE_SIZE.get(arch, 32), 1 if arch == "lenet5" else 3
    network = fpgm.model(arch, in_channels=channels)
    counted = fpgm.cost(network, (channels, size, size))
    layers = convolutions(network)
    assert sum(layer.macs for layer in counted.layers if layer.name in layers) == macs
    assert counted.params == params


@pytest.mark.parametrize("depth", [11, 13, 16, 19])
def test_vgg_has_the_convolutions_of_its_depth(depth: int) -> None:
    assert len(convolutions(fpgm.model(f"vgg{depth}"))) == depth - 3


@pytest.mark.parametrize("arch", ["preresnet110", "preresnet164", "densenet40", "resnet110"])
def test_depth_counts_the_layers_but_projections(arch: str) -> None:
    layers = [name for name in convolutions(fpgm.model(arch)) if "shortcut" not in name]
    assert arch.endswith(str(len(layers) + 1))


def test_lenet5_is_the_one_that_the_literature_prunes() -> None:
    network = fpgm.model("lenet5", in_channels=1)
    weights = {n: p.numel() for n, p in network.named_parameters() if n.endswith("weight")}
    assert sum(weights.values()) == 430_500
    assert list(weights.values()) == [500, 25_000, 400_000, 5_000]
    graph = trace(network)
    pooled = [node.target for node, kind in graph.kinds.items() if kind == POOL]
    assert pooled == [nn.functional.max_pool2d] * 2
    rectified = [node.all_input_nodes[0].target for node in graph.kinds if is_relu(node, graph)]
    assert rectified == ["fc1"]


@pytest.mark.parametrize("image", [(1, 32, 32), (1, 28, 27), (3, 8, 8)])
def test_lenet5_says_which_images_it_takes(image: tuple[int, int, int]) -> None:
    network = fpgm.model("lenet5", in_channels=image[0])
    with pytest.raises(
        Error, match=f"arch=lenet5 takes images of 28x28, not {image[1]}x{image[2]}"
    ):
        check_size("lenet5", network, image)
    check_size("lenet5", network, (image[0], 28, 28))


def test_what_comes_through_a_pre_activation_shortcut_is_not_touched() -> None:
    """Identity mappings: no ReLU and no BatchNorm behind the add."""
    network = fpgm.model("preresnet110").eval()
    for block in network.layer1:
        nn.init.zeros_(block.conv2.weight)
    x = torch.randn(2, 16, 12, 12, generator=torch.Generator().manual_seed(0))
    assert torch.equal(network.layer1(x), x)
    block = fpgm.model("preresnet164").eval().layer2[0]
    nn.init.zeros_(block.conv3.weight)
    x = x.repeat(1, 4, 1, 1)
    assert torch.equal(block(x), nn.functional.conv2d(x, block.shortcut.weight, stride=2))


@pytest.mark.parametrize("arch", ["preresnet110", "preresnet164"])
def test_the_first_activation_stands_before_the_first_shortcut(arch: str) -> None:
    network = fpgm.model(arch).eval()
    read = []
    network.layer1[0].shortcut.register_forward_pre_hook(lambda _, inputs: read.append(inputs[0]))
    network(torch.randn(2, 3, 12, 12, generator=torch.Generator().manual_seed(0)))
    assert read[0].min() == 0


def test_densenet_layers_append_their_channels_to_all_before() -> None:
    network = fpgm.model("densenet40").eval()
    x = torch.randn(2, 16, 8, 8, generator=torch.Generator().manual_seed(0))
    for i, layer in enumerate(network.features[:12]):
        y = layer(x)
        assert y.shape[1] == 16 + 12 * (i + 1)
        assert torch.equal(y[:, : x.shape[1]], x)
        x = y
    transition = network.features[12]
    convolved = transition.conv(nn.functional.relu(transition.bn(x)))
    assert transition(x).shape == (2, 160, 4, 4)
    torch.testing.assert_close(transition(x).mean((2, 3)), convolved.mean((2, 3)))


@pytest.mark.parametrize("arch", ["preresnet164", "densenet40", "vgg11"])
def test_scales_start_at_one_half_as_network_slimming_s(arch: str) -> None:
    scales = [m.weight for m in fpgm.model(arch).modules() if isinstance(m, nn.BatchNorm2d)]
    assert torch.cat(scales).unique().tolist() == [0.5]


def test_lenet5_starts_as_caffe_s_filler_does() -> None:
    torch.manual_seed(0)
    network = fpgm.model("lenet5", in_channels=1)
    for layer, fan_in in ((network.conv2, 500), (network.fc1, 800)):
        assert layer.weight.abs().max().item() == pytest.approx((3 / fan_in) ** 0.5, rel=0.01)
        assert layer.bias.count_nonzero() == 0


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
