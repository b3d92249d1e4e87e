"""The promise of the product: the compact network computes the same function."""

from __future__ import annotations

import copy
import operator
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from zoo import (
    FAMILIES,
    Functional,
    Gated,
    Mixed,
    Mysterious,
    Odd,
    Overwrites,
    Spelled,
    error,
    random_keep,
    randomised,
    zeroed,
)

import fpgm
from fpgm.compaction.compact import compact, load
from fpgm.errors import CheckpointError, GraphError
from fpgm.graph.groups import RESIDUAL, prunable
from fpgm.graph.trace import trace
from fpgm.networks.layers import BorderConv2d, Expand, Pick
from fpgm.runs import checkpoint

LIMIT = {torch.float32: 1e-5, torch.float64: 1e-12}


def images(seed: int, *shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@pytest.mark.parametrize(("arch", "rate"), [("resnet20", 0.1), ("resnet20", 0.9), ("vgg16", 0.4)])
def test_compact_network_computes_the_same_function(
    arch: str, rate: float, dtype: torch.dtype
) -> None:
    model, keep = zeroed(int(10 * rate), rate, fpgm.model(arch), dtype)
    small = compact(model, keep)
    x = images(1, 3, 3, 33, 39, dtype=dtype)
    assert error(model, small, x) <= LIMIT[dtype]
    widths = {
        name: m.out_channels for name, m in small.named_modules() if hasattr(m, "out_channels")
    }
    assert all(widths[name] == len(kept) for name, kept in keep.items())


@pytest.mark.parametrize(
    ("name", "residual"),
    [(name, RESIDUAL[i % 3]) for i, name in enumerate(FAMILIES)]
    + [("resnet", mode) for mode in RESIDUAL[1:]]
    + [("mobilenet_v2", "independent"), ("efficientnet", "shared")],
)
def test_any_torchvision_network_is_compacted_exactly(name: str, residual: str) -> None:
    model = randomised(FAMILIES[name](), 0, torch.float64)
    keep = random_keep(model, 0.5, 0, residual)
    assert keep
    fpgm.zero_(model, keep)
    assert error(model, compact(model, keep), images(0, 2, 3, 40, 45).double()) <= 1e-12


@pytest.mark.parametrize("residual", RESIDUAL)
@pytest.mark.parametrize(
    ("arch", "size", "left"),  # percent of the MACs at half the filters: independent, shared, inner
    [
        ("vgg11", 32, (26, 26, 26)),
        ("vgg13", 32, (26, 26, 26)),
        ("vgg19", 32, (26, 26, 26)),
        ("preresnet110", 9, (38, 26, 51)),
        ("preresnet164", 9, (34, 26, 40)),
        ("densenet40", 9, (26, 26, 26)),
        ("lenet5", 28, (34, 34, 34)),
    ],
)
def test_networks_of_the_literature_are_compacted_exactly_and_really_cut(
    arch: str, size: int, left: tuple[int, ...], residual: str
) -> None:
    """BatchNorms in front of convolutions: what is zeroed goes into a sum or a cat as it is."""
    channels = 1 if arch == "lenet5" else 3
    model = randomised(fpgm.model(arch, in_channels=channels), 0, torch.float64)
    for module in model.modules():
        if isinstance(module, nn.Conv2d) and module.bias is not None:
            nn.init.normal_(module.bias)
    keep = random_keep(model, 0.5, 0, residual)
    fpgm.zero_(model, keep)
    small = compact(model, keep)
    assert error(model, small, images(0, 2, channels, size, size).double()) <= 1e-12
    image = (channels, size, size)
    ratio = 100 * fpgm.cost(small, image).macs / fpgm.cost(model, image).macs
    assert ratio <= left[RESIDUAL.index(residual)]


@pytest.mark.parametrize("name", ["resnet20", "resnet"])
def test_shared_streams_are_narrow_and_need_no_scatter(name: str) -> None:
    model = FAMILIES[name]() if name in FAMILIES else fpgm.model(name)
    small = compact(model, fpgm.select(model, "l2", 0.5, residual="shared"))
    # Shortcut A appends channels between two stages: the compact network has to as well.
    parts = [m for m in small.modules() if isinstance(m, Expand | Pick)]
    assert len(parts) == (2 if name == "resnet20" else 0)
    widths = {m.out_channels for m in small.modules() if isinstance(m, nn.Conv2d)}
    full = {m.out_channels for m in model.modules() if isinstance(m, nn.Conv2d)}
    assert widths == {width // 2 for width in full}


def test_constants_of_a_gated_channel_are_products() -> None:
    """A dead channel beside a live gate, a live channel beside a dead gate, and both dead."""
    model = randomised(Gated(), 0, torch.float64)
    keep = {"a": torch.tensor([0, 1, 2, 3]), "gate": torch.tensor([2, 3, 4])}
    fpgm.zero_(model, keep)
    assert error(model, compact(model, keep), images(0, 2, 3, 9, 9).double()) <= 1e-12


@given(
    seed=st.integers(0, 10_000),
    rate=st.floats(0.1, 0.9),
    height=st.integers(5, 40),
    width=st.integers(5, 40),
    batch=st.integers(1, 3),
)
@settings(deadline=None, max_examples=6)
def test_compact_network_keeps_border_pixels_right_at_any_size(
    seed: int, rate: float, height: int, width: int, batch: int
) -> None:
    model, keep = zeroed(seed, rate, fpgm.model("resnet20"), torch.float64)
    x = images(seed, batch, 3, height, width, dtype=torch.float64)
    assert error(model, compact(model, keep), x) <= 1e-12


@pytest.mark.parametrize("network", [Spelled, Mixed])
def test_compaction_is_exact_however_the_network_is_written(network) -> None:
    for seed in range(4):
        model = randomised(network(), seed, torch.float64)
        keep = {  # whatever the graph would advise: every convolution loses some
            name: random_keep(model, 0.5, seed).get(name, torch.tensor([seed % 3, 4, 5]))
            for name, module in model.named_modules()
            if isinstance(module, nn.Conv2d)
        }
        fpgm.zero_(model, keep)
        try:
            small = compact(model, keep)
        except GraphError as refused:  # a convolution called in a way that is not understood
            keep = {n: k for n, k in keep.items() if f"'{n}'" not in str(refused)}
            small = compact(model, keep)
        x = images(seed, 2, 3, 8, 8, dtype=torch.float64)
        assert error(copy.deepcopy(model), small, x) <= 1e-12


def test_asking_for_sizes_and_scaling_keeps_nothing_whole() -> None:
    class Sizes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 8, 3)
            self.fc = nn.Linear(8, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.conv(x) * 0.5
            x /= 3
            x = nn.functional.avg_pool2d(x, x.size()[3]) - 1
            return self.fc(x.view(x.shape[0], -1))

    assert prunable(trace(Sizes())).layers == ("conv",)
    model, keep = zeroed(0, 0.5, Sizes(), torch.float64)
    small = compact(model, keep)
    assert error(model, small, images(0, 2, 3, 8, 8, dtype=torch.float64)) <= 1e-12
    assert small.get_submodule("fc").in_features == 4


@given(seed=st.integers(0, 10_000), rate=st.floats(0.1, 0.8))
@settings(deadline=None, max_examples=6)
@pytest.mark.parametrize("network", [Odd, Overwrites])
def test_compaction_is_exact_beyond_residual_networks(network, seed: int, rate: float) -> None:
    torch.manual_seed(seed)
    model, keep = zeroed(seed, rate, network(), torch.float64)
    x = images(seed, 2, 3, 47, 52, dtype=torch.float64)
    assert error(copy.deepcopy(model), compact(model, keep), x) <= 1e-12


def test_the_naive_ways_are_wrong_where_ours_is_right() -> None:
    model, keep = zeroed(0, 0.4, fpgm.model("resnet20"), torch.float64)
    x = images(0, 8, 3, 32, 32, dtype=torch.float64)
    small = compact(model, keep)
    dropped, folded = copy.deepcopy(small), copy.deepcopy(small)
    for network in (dropped, folded):
        for module in network.modules():
            if isinstance(module, BorderConv2d) and module.border is not None:
                if network is folded:
                    module.bias = nn.Parameter(module.border.sum((1, 2, 3)))
                module.border = None
            elif isinstance(module, Expand) and network is dropped:
                module.constant = None
    assert error(model, small, x) <= 1e-12
    assert error(model, dropped, x) > 1e-3
    assert error(model, folded, x) > 1e-3


def test_unpruned_channels_of_an_option_a_shortcut_are_not_computed() -> None:
    model = randomised(fpgm.model("resnet20"), 0)
    keep = random_keep(model, 0.4, 0)
    # Nobody in stage 2 writes channels 16..31 but these two layers' survivors.
    keep["layer2.0.conv2"] = torch.arange(16)
    keep["layer2.1.conv2"] = torch.arange(16)
    keep["layer2.2.conv2"] = torch.arange(15, 18)
    fpgm.zero_(model, keep)
    small = compact(model, keep)
    assert small.get_submodule("layer3.0.conv1").in_channels == 18
    assert error(model, small, images(0, 2, 3, 32, 32)) <= 1e-5


def test_nothing_is_added_where_all_constants_are_zero() -> None:
    model = fpgm.model("resnet20").eval()  # BatchNorm at its start: a zero filter gives zero
    small = compact(model, fpgm.select(model, "gm", 0.4))
    assert not any(n.endswith((".border", ".constant")) for n, _ in small.named_buffers())


def test_compact_leaves_the_network_as_it_was() -> None:
    model, keep = zeroed(0, 0.5, fpgm.model("resnet20"))
    model.train()
    before = copy.deepcopy(model.state_dict())
    small = compact(model, keep)
    assert model.training
    assert not small.training
    for parameter in small.parameters():
        parameter.data.zero_()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_what_is_not_understood_is_given_all_that_it_had() -> None:
    model, keep = zeroed(0, 0.5, Mysterious(), torch.float64)
    assert list(keep) == ["free", "fed", "grouped"]
    x = images(0, 2, 3, 9, 9, dtype=torch.float64)
    assert error(model, compact(model, keep), x) <= 1e-12


def test_beside_what_is_called_as_a_function_layers_get_narrower() -> None:
    model = randomised(Functional(), 0, torch.float64)
    # Standardised filter by filter, one of them grouped; the last is a parameter of nobody.
    assert list(random_keep(model, 0.5, 0)) == ["stem", "plain", "grouped"]
    keep = {"plain": torch.tensor([0, 5, 6]), "kernel": torch.tensor([1, 2])}
    fpgm.zero_(model, keep)
    small = compact(model, keep)
    assert small.get_submodule("plain").out_channels == 3
    assert error(model, small, images(0, 2, 3, 9, 9).double()) <= 1e-12


def residual_with_identity(relu_inplace: bool) -> nn.Module:
    class PreActivation(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem = nn.Conv2d(3, 8, 3, padding=1)
            self.relu = nn.ReLU(inplace=relu_inplace)
            self.shortcut, self.drop = nn.Identity(), nn.Dropout(0.1)
            self.c1, self.c2 = (nn.Conv2d(8, 8, 3, padding=1) for _ in range(2))
            self.norm = nn.BatchNorm2d(8)
            self.fc = nn.Linear(8, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.stem(x)
            kept = self.drop(self.shortcut(x)).contiguous()
            y = self.c2(self.relu(self.norm(self.c1(self.relu(x)))))
            z = y
            z *= 2
            return self.fc((y + kept).mean((2, 3)))

    return PreActivation()


@pytest.mark.parametrize("relu_inplace", [True, False])
def test_other_names_of_an_overwritten_tensor_change_with_it(relu_inplace: bool) -> None:
    for seed in range(3):
        model, keep = zeroed(seed, 0.5, residual_with_identity(relu_inplace), torch.float64)
        assert keep
        x = images(seed, 2, 3, 9, 9, dtype=torch.float64)
        assert error(model, compact(model, keep), x) <= 1e-12
        assert error(model, compact(model, {}), x) <= 1e-12


def forward_of(body) -> nn.Module:
    class Body(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Conv2d(3, 8, 3, padding=1)
            self.norm = nn.BatchNorm2d(8)
            self.b = nn.Conv2d(8, 8, 3, padding=1)
            self.fc = nn.Linear(8, 4)
            self.gamma = nn.Parameter(torch.ones(1, 8, 1, 1))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.fc(body(self, self.norm(self.a(x))).mean((2, 3)))

    return Body()


def dynamic_pad(s: nn.Module, x: torch.Tensor) -> torch.Tensor:
    y = s.b(x)
    return y + nn.functional.pad(x, (0, 0, 0, 0, 0, y.size(1) - x.size(1)))


def padded_twice(s: nn.Module, x: torch.Tensor) -> torch.Tensor:
    p = nn.functional.pad(x[:, :, :, :], (0, 0, 0, 0, 0, 8))
    return s.b(torch.cat((p, p), 2).chunk(2, 1)[0] + torch.mul(p, p).mean(1, keepdim=True).mean())


@pytest.mark.parametrize(
    "body",
    [
        lambda s, x: s.b(torch.cat(x.chunk(2, 1), 1)),
        lambda s, x: s.b(torch.cat(torch.split(x, 4, 1)[::-1], 1)),
        dynamic_pad,
        padded_twice,
        lambda s, x: s.b(x) + s.norm.bias.sum() + s.a.weight.sum(),
        lambda s, x: s.b(x) * s.gamma,
        lambda s, x: s.b(x.__imul__(2.0)) + x,
        lambda s, x: s.b(operator.ipow(x, 2)) + x,
        lambda s, x: torch.cat((s.b(x), x.softmax(1)), 1).chunk(2, 1)[0],
    ],
    ids=[
        "cat of chunks",
        "cat of split",
        "pad of a size",
        "pad twice",
        "parameters",
        "gamma",
        "dunder",
        "power in place",
        "cat with what is not known",
    ],
)
def test_odd_networks_are_compacted_exactly_and_not_with_an_error(body) -> None:
    for keep in ({}, {"a": torch.tensor([0, 3, 4, 7])}, {"b": torch.tensor([1, 2])}):
        model = randomised(forward_of(body), 0, torch.float64)
        fpgm.zero_(model, keep)
        x = images(0, 2, 3, 8, 8, dtype=torch.float64)
        small = compact(model, keep)
        assert error(model, small, x) <= 1e-12
        theirs = {id(p) for p in model.parameters()}
        assert not any(id(p) in theirs for p in small.parameters())


def test_layers_with_hooks_are_not_touched() -> None:
    model = fpgm.model("resnet20").eval()
    torch.nn.utils.spectral_norm(model.layer1[0].conv1)
    model.layer2[0].conv2.register_forward_hook(lambda module, inputs, output: output * 2)
    tied = prunable(trace(model))
    assert tied.kept_full["layer1.0.conv1"] == "it has a hook"
    assert tied.kept_full["layer2.0.conv2"] == "it has a hook"
    keep = fpgm.select(model, "gm", 0.4)
    fpgm.zero_(model, keep)
    assert error(model, compact(model, keep), images(0, 2, 3, 32, 32)) <= 1e-5


def test_depthwise_over_channels_that_are_all_gone_is_still_exact() -> None:
    class Depthwise(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.d = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3, padding=1, groups=8)
            self.fc = nn.Linear(8, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.fc(self.d(self.a(x)).mean((2, 3)))

    model = randomised(Depthwise(), 0, torch.float64)
    keep = {"a": torch.tensor([1, 2, 3]), "d": torch.tensor([0, 5])}
    fpgm.zero_(model, keep)
    x = images(0, 2, 3, 9, 9, dtype=torch.float64)
    assert error(model, compact(model, keep), x) <= 1e-12


def test_frozen_parameters_stay_frozen() -> None:
    model = fpgm.model("resnet20")
    model.conv1.weight.requires_grad_(False)
    small = compact(model, fpgm.select(model, "gm", 0.4))
    assert not small.get_submodule("conv1").weight.requires_grad
    assert small.get_submodule("fc").weight.requires_grad


def test_even_what_should_be_kept_whole_is_exact_if_the_user_insists() -> None:
    model = randomised(Mysterious(), 0, torch.float64)
    keep = {name: torch.tensor([1, 3]) for name in ("free", "shuffled", "fed", "head")}
    fpgm.zero_(model, keep)
    x = images(0, 2, 3, 9, 9, dtype=torch.float64)
    assert error(model, compact(model, keep), x) <= 1e-12


@pytest.mark.parametrize(
    ("keep", "message"),
    [
        ({"conv9": torch.tensor([0])}, "no such convolution"),
        ({"conv1": torch.tensor([], dtype=torch.long)}, "at least one filter"),
        ({"conv1": torch.tensor([16])}, "outside 0..15"),
    ],
)
def test_keep_that_cannot_be_followed_is_refused(keep, message: str) -> None:
    with pytest.raises(GraphError, match=message):
        compact(fpgm.model("resnet20"), keep)


def test_layer_that_is_called_twice_is_refused_with_the_reason() -> None:
    with pytest.raises(GraphError, match="its weight is used twice"):
        compact(Mysterious(), {"twice": torch.tensor([0, 1])})


@pytest.mark.parametrize("randomise", [True, False], ids=["constants", "no constants"])
def test_saved_compact_network_loads_as_the_same_function(tmp_path: Path, randomise: bool) -> None:
    model = fpgm.model("resnet20", num_classes=7, in_channels=1).eval()
    if randomise:
        randomised(model, 3)
    keep = random_keep(model, 0.4, 3)
    fpgm.zero_(model, keep)
    small = compact(model, keep)
    arch = {"name": "resnet20", "num_classes": 7, "in_channels": 1}
    content = {"arch": arch, "keep": keep, "state_dict": small.state_dict()}
    checkpoint.write(tmp_path / "compact.pt", content)
    torch.load(tmp_path / "compact.pt", weights_only=True)
    state = torch.random.get_rng_state()
    loaded = load(tmp_path / "compact.pt")
    assert torch.equal(state, torch.random.get_rng_state())
    x = images(0, 2, 1, 20, 20)
    assert torch.equal(loaded(x), small(x))
    assert not loaded.training
    checkpoint.write(tmp_path / "zeroed.pt", {**content, "state_dict": model.state_dict()})
    assert torch.equal(load(tmp_path / "zeroed.pt")(x), model(x))
    checkpoint.write(tmp_path / "x.pt", {**content, "state_dict": {"conv1.weight": x}})
    with pytest.raises(CheckpointError, match="not a network of this architecture"):
        load(tmp_path / "x.pt")
