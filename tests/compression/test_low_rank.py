"""Two convolutions of low rank are the best of their rank, and at full rank just as the one."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from zoo import randomised, zeroed

import fpgm
from fpgm.compression import low_rank
from fpgm.networks.layers import WAYS, BorderConv2d, Bordered, SameConv2d
from fpgm.runs import checkpoint


def full(conv: nn.Conv2d, way: str) -> int:
    """The rank at which nothing is lost."""
    n, c, height, width = conv.weight.shape
    return min(c * height, width * n) if way == "tai" else n


def apart(conv: nn.Conv2d, rank: int, way: str, x: Tensor) -> nn.Module:
    """A network of this layer alone, decomposed by what it answers to x."""
    network = nn.Sequential(conv)
    known = low_rank.responses(network, ["0"], [x]) if way == "zhang" else {}
    return low_rank.decomposed(network, {"0": rank}, way, known)


@st.composite
def convolutions(draw: st.DrawFn) -> nn.Conv2d:
    """Of any kernel, stride, dilation and padding, with and without bias and constants' borders."""
    size = st.integers(1, 3)
    both = st.tuples(size, size)
    kind = draw(st.sampled_from([nn.Conv2d, SameConv2d, BorderConv2d]))
    kernel, stride, dilation = draw(both), draw(both), draw(both)
    padding = (
        (0, 0) if kind is SameConv2d else draw(st.tuples(st.integers(0, 2), st.integers(0, 2)))
    )
    mode = "zeros"
    if kind is nn.Conv2d:
        mode = draw(st.sampled_from(["zeros", "reflect", "replicate", "circular"]))
        if stride == (1, 1) and draw(st.booleans()):
            padding = "same"
    torch.manual_seed(draw(st.integers(0, 99)))
    conv = kind(
        draw(st.integers(1, 5)), draw(st.integers(1, 5)), kernel, stride, padding, dilation,
        bias=draw(st.booleans()), padding_mode=mode, dtype=torch.float64,
    )  # fmt: skip
    if isinstance(conv, BorderConv2d):
        border = torch.randn(conv.out_channels, 1, *kernel, dtype=torch.float64)
        conv.register_buffer("border", border)
    return conv


@given(convolutions(), st.sampled_from(WAYS))
@settings(max_examples=60, deadline=None)
def test_at_full_rank_nothing_changes_up_to_the_borders(conv: nn.Conv2d, way: str) -> None:
    x = torch.randn(2, conv.in_channels, 9, 8, dtype=torch.float64)
    pair = apart(conv, full(conv, way), way, x)
    expected = conv(x).detach()
    assert (pair(x) - expected).abs().max() <= 1e-12 * max(1, float(expected.abs().max()))


@given(st.integers(0, 99), st.integers(1, 9))
@settings(max_examples=20, deadline=None)
@torch.no_grad()
def test_what_the_weights_lose_is_the_cut_singular_values(seed: int, rank: int) -> None:
    torch.manual_seed(seed)
    conv = nn.Conv2d(4, 6, 3, bias=False, dtype=torch.float64)
    pair = apart(conv, rank, "tai", torch.empty(0))[0]
    # Row r of the first and filter n of the second, one after the other, are one kernel.
    kernel = torch.einsum("rci,nrj->ncij", pair[0].weight[..., 0], pair[1].weight[:, :, 0])
    lost = (kernel - conv.weight).square().sum()
    singular = torch.linalg.svdvals(conv.weight.permute(1, 2, 3, 0).reshape(12, 18))
    assert float(lost) == pytest.approx(float(singular[rank:].square().sum()), rel=1e-9, abs=1e-12)
    cut = low_rank.spectrum(conv, None)[rank:].sum()
    assert float(lost) == pytest.approx(float(cut), rel=1e-9, abs=1e-12)


@given(st.integers(0, 99), st.integers(1, 6), st.booleans(), st.booleans())
@settings(max_examples=20, deadline=None)
@torch.no_grad()
def test_what_the_responses_lose_is_the_cut_eigenvalues(
    seed: int, rank: int, bias: bool, bordered: bool
) -> None:
    torch.manual_seed(seed)
    kind = BorderConv2d if bordered else nn.Conv2d
    conv = kind(3, 6, 3, padding=1, bias=bias, dtype=torch.float64)
    if bordered:
        conv.register_buffer("border", torch.randn(6, 1, 3, 3, dtype=torch.float64))
    x = 1 + torch.randn(4, 3, 7, 7, dtype=torch.float64)  # a mean that is not zero
    answers = conv(x)
    pair = apart(conv, rank, "zhang", x)
    lost = (pair(x) - answers).square().sum(1).mean()
    rows = answers.detach().transpose(0, 1).flatten(1)
    cut = torch.linalg.eigvalsh(torch.cov(rows, correction=0)).flip(0)[rank:].sum()
    assert float(lost) == pytest.approx(float(cut), rel=1e-9, abs=1e-12)


def test_responses_of_several_batches_are_those_of_all_images() -> None:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(2, 5, 3, stride=2), nn.ReLU(), nn.Conv2d(5, 4, 1))
    x = torch.randn(6, 2, 8, 8)
    parts = low_rank.responses(network, ["0", "2"], x.split(4))
    for name, answers in (("0", network[0](x)), ("2", network(x))):
        rows = answers.detach().double().transpose(0, 1).flatten(1)
        assert torch.allclose(parts[name].mean, rows.mean(1), atol=1e-6)
        assert torch.allclose(parts[name].covariance, torch.cov(rows, correction=0), atol=1e-6)


def test_layers_that_cannot_be_two_are_left_alone() -> None:
    network = nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.Conv2d(4, 4, 3, groups=2), nn.Conv2d(4, 6, 3), nn.Conv2d(6, 1, 1)
    )
    assert list(low_rank.decomposable(network)) == ["2"]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("residual", ["independent", "inner"])
def test_a_compact_network_is_saved_and_loaded_with_its_pairs(
    way: str, residual: str, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    model = randomised(fpgm.model("resnet20"), 1)
    keep = fpgm.select(model, "gm", 0.4, residual=residual)
    fpgm.zero_(model, keep)
    small = fpgm.compact(model, keep)
    x = torch.randn(4, 3, 16, 16)
    convs = low_rank.decomposable(small)
    known = low_rank.responses(small, convs, [x]) if way == "zhang" else {}
    pairs = low_rank.decomposed(small, dict.fromkeys(convs, 5), way, known)
    assert residual == "inner" or any(isinstance(m, Bordered) for m in pairs.modules())
    path = tmp_path / "compact.pt"
    arch = {"name": "resnet20", "num_classes": 10, "in_channels": 3}
    step = {"way": way, "ranks": dict.fromkeys(convs, 5)}
    said = {"arch": arch, "keep": keep, "low_rank": [step], "state_dict": pairs.state_dict()}
    checkpoint.write(path, said)
    again = fpgm.load(path)
    with torch.inference_mode():
        assert torch.equal(again(x), pairs(x))
    assert not torch.equal(pairs(x), small(x))


def test_the_network_itself_is_left_as_it_is() -> None:
    model, keep = zeroed(0, 0.4, fpgm.model("resnet20"))
    small = fpgm.compact(model, keep)
    before = {name: value.clone() for name, value in small.state_dict().items()}
    low_rank.decomposed(small, {"layer1.0.conv1": 2}, "tai", {})
    assert all(torch.equal(before[name], value) for name, value in small.state_dict().items())


def test_pairs_are_folded_and_exported_like_any_convolution() -> None:
    from fpgm.shipping.folding import fold

    model = randomised(fpgm.model("resnet20"), 1)
    pairs = low_rank.decomposed(model, {"layer1.0.conv1": 4, "layer2.0.conv2": 4}, "tai", {})
    folded, x = fold(pairs), torch.randn(2, 3, 16, 16)
    assert not any(isinstance(m, nn.BatchNorm2d) for m in folded.modules())
    with torch.inference_mode():
        assert F.mse_loss(folded(x), pairs(x)) < 1e-8
