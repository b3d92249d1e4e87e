"""What a user loses when one of these fails: criteria that look at data, a network left alone."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from zoo import Overwrites, randomised

import fpgm
from fpgm.criteria import CRITERIA, tie_rate
from fpgm.criteria.evidence import Evidence, gather, missing, require
from fpgm.errors import Error

seeds = st.integers(0, 2**31)
IMAGE = (3, 9, 9)
ALL = [name for name, criterion in CRITERIA.items() if criterion.views]
DATA = [name for name in ALL if CRITERIA[name].reads_images]
apoz, bn_gamma, hrank, taylor = (CRITERIA[name] for name in ("apoz", "bn_gamma", "hrank", "taylor"))


class Residual(nn.Module):
    """A stem and one residual group, every feature map within reach."""

    def __init__(self, width: int = 6) -> None:
        super().__init__()
        self.stem, self.stem_norm = nn.Conv2d(3, width, 3, padding=1), nn.BatchNorm2d(width)
        self.up, self.up_norm = nn.Conv2d(width, 5, 3, padding=1), nn.BatchNorm2d(5)
        self.down, self.down_norm = nn.Conv2d(5, width, 3, padding=1), nn.BatchNorm2d(width)
        self.fc = nn.Linear(width, 4)

    def maps(self, x: Tensor) -> dict[str, Tensor]:
        stem = F.relu(self.stem_norm(self.stem(x)))
        up = F.relu(self.up_norm(self.up(stem)))
        return {"stem": stem, "up": up, "down": F.relu(self.down_norm(self.down(up)) + stem)}

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.maps(x)["down"].mean((2, 3)))


class Gated(Residual):
    """The same with a gate of ones behind each BatchNorm."""

    def __init__(self) -> None:
        super().__init__()
        for name, width in (("stem", 6), ("up", 5), ("down", 6)):
            gate = torch.ones(width, 1, 1, dtype=torch.float64)
            setattr(self, f"{name}_gate", nn.Parameter(gate))

    def maps(self, x: Tensor) -> dict[str, Tensor]:
        stem = F.relu(self.stem_gate * self.stem_norm(self.stem(x)))
        up = F.relu(self.up_gate * self.up_norm(self.up(stem)))
        down = self.down_gate * self.down_norm(self.down(up))
        return {"down": F.relu(down + stem)}


def handed(name: str, model: nn.Module, found: Evidence) -> Tensor:
    """The scores of the inner convolution."""
    seen = {key: found["up"][key] for key in CRITERIA[name].views}
    return CRITERIA[name](model.up.weight, **seen)


def batches(seed: int, sizes=(5, 8), dtype=torch.float32) -> list[tuple[Tensor, Tensor]]:
    g = torch.Generator().manual_seed(seed)
    return [
        (torch.randn(n, 3, 9, 9, generator=g, dtype=dtype), torch.randint(4, (n,), generator=g))
        for n in sizes
    ]


def network(seed: int, dtype=torch.float32) -> nn.Module:
    torch.manual_seed(seed)
    return randomised(Residual(), seed, dtype)


@given(seeds)
@settings(deadline=None, max_examples=15)
def test_taylor_is_the_squared_derivative_by_a_gate_summed_over_minibatches(seed: int) -> None:
    model, data = network(seed, torch.float64), batches(seed, dtype=torch.float64)
    gated = Gated().double().eval()
    gated.load_state_dict(model.state_dict(), strict=False)
    expected = {name: torch.zeros(1, dtype=torch.float64) for name in ("stem", "up", "down")}
    for x, y in data:
        gated.zero_grad()
        F.cross_entropy(gated(x), y).backward()
        for name in expected:
            gate = getattr(gated, f"{name}_gate")
            expected[name] = expected[name] + gate.grad.flatten().square()
    found = gather(model, ["taylor"], data)
    for name, value in expected.items():
        scores = taylor(model.get_submodule(name).weight, **found[name])
        torch.testing.assert_close(scores, value, rtol=1e-10, atol=1e-14)


def test_weight_times_gradient_before_batchnorm_is_zero_and_no_criterion() -> None:
    model = network(0, torch.float64).train()
    for name in ("stem", "up", "down"):
        model.get_submodule(name).bias = None
        model.get_submodule(f"{name}_norm").eps = 1e-15  # all that keeps a scale
    x, y = batches(0, (8,), torch.float64)[0]
    F.cross_entropy(model(x), y).backward()
    for name in ("stem", "up", "down"):
        weight = model.get_submodule(name).weight
        product = (weight * weight.grad).sum((1, 2, 3))
        assert product.abs().max() < 1e-11 < 1e-6 < weight.grad.abs().max()


@given(seeds, st.integers(1, 12))
@settings(deadline=None, max_examples=15)
def test_apoz_and_hrank_are_those_of_the_maps_after_relu_however_batched(
    seed: int, cut: int
) -> None:
    model = network(seed)
    x, y = batches(seed, (13,))[0]
    found = gather(model, ["apoz", "hrank"], [(x[:cut], y[:cut]), (x[cut:], y[cut:])])
    with torch.no_grad():
        maps = model.maps(x)
    for name, values in maps.items():
        weight, own = model.get_submodule(name).weight, values.numpy()
        zeros = (own == 0).mean((0, 2, 3))
        ranks = np.linalg.matrix_rank(own).mean(0)
        np.testing.assert_allclose(apoz(weight, zeros=found[name]["zeros"]), -zeros, rtol=1e-12)
        np.testing.assert_allclose(hrank(weight, ranks=found[name]["ranks"]), ranks, rtol=1e-12)


def test_hrank_looks_at_all_images_that_it_is_given() -> None:
    model, (x, y) = network(0), batches(0, (150,))[0]
    ranks = gather(model, ["hrank"], [(x, y)])["up"]["ranks"]
    with torch.no_grad():
        expected = np.linalg.matrix_rank(model.maps(x)["up"].numpy()).mean(0)
    np.testing.assert_allclose(ranks, expected, rtol=1e-12)


def test_bn_gamma_needs_no_data_and_is_the_scale_of_the_own_batchnorm() -> None:
    model = network(3)
    found = gather(model, ["bn_gamma"])
    for name in ("stem", "up", "down"):
        gamma = model.get_submodule(f"{name}_norm").weight.detach().abs().double()
        scores = bn_gamma(model.get_submodule(name).weight, **found[name])
        assert torch.equal(scores, gamma)


@given(seeds, st.sampled_from(["trained", "training", "fresh"]))
@settings(deadline=None, max_examples=20)
def test_gathering_leaves_the_network_as_it_was(seed: int, how: str) -> None:
    model = Residual() if how == "fresh" else network(seed)
    model.train(how != "trained")
    model.up_norm.eval()
    model.up_norm.weight.requires_grad_(False)
    x, y = batches(seed)[0]
    F.cross_entropy(model(x), y).backward()
    if how == "fresh":
        for norm in (model.stem_norm, model.down_norm):
            norm.reset_running_stats()
    before, gradients = copy.deepcopy(model), [copy.deepcopy(p.grad) for p in model.parameters()]
    random = torch.get_rng_state()
    gather(model, ALL, batches(seed), image=IMAGE)
    assert torch.equal(torch.get_rng_state(), random)
    for (name, a), (_, b) in zip(
        model.state_dict().items(), before.state_dict().items(), strict=True
    ):
        assert torch.equal(a, b), name
    for a, b, old in zip(model.parameters(), before.parameters(), gradients, strict=True):
        assert a.requires_grad == b.requires_grad
        assert (a.grad is None) == (old is None)
        assert old is None or torch.equal(a.grad, old)
    for a, b in zip(model.modules(), before.modules(), strict=True):
        assert a.training == b.training


def test_every_batch_is_read_once_for_all_criteria() -> None:
    data = iter(batches(0))  # an iterator cannot be read twice
    model = network(0)
    together = gather(model, ALL, data, image=IMAGE)
    assert next(data, None) is None
    for name in ALL:
        alone = gather(model, [name], batches(0), image=IMAGE)
        for layer, values in together.items():
            for key in CRITERIA[name].views:
                assert torch.equal(values[key], alone[layer][key])


def shuffled(model: nn.Module, seed: int) -> tuple[nn.Module, Tensor]:
    """The same function, the inner convolution's filters in another order."""
    other = copy.deepcopy(model)
    order = torch.randperm(5, generator=torch.Generator().manual_seed(seed))
    for holder, name in (("up", "weight"), ("up", "bias"), ("up_norm", "weight"),
                         ("up_norm", "bias"), ("up_norm", "running_mean"),
                         ("up_norm", "running_var")):  # fmt: skip
        module = other.get_submodule(holder)
        getattr(module, name).data = getattr(module, name).data[order]
    other.down.weight.data = other.down.weight.data[:, order]
    return other, order


@given(seeds)
@settings(deadline=None, max_examples=15)
def test_the_order_of_the_filters_does_not_matter(seed: int) -> None:
    model, data = network(seed, torch.float64), batches(seed, dtype=torch.float64)
    model.up_norm.bias.data.abs_()  # filters that are silent tie, and ties go by the index
    model.up_norm.running_mean.zero_()
    model.up_norm.weight.data.clamp_(0.1)
    other, order = shuffled(model, seed)
    mine, theirs = (gather(m, ALL, data, image=IMAGE) for m in (model, other))
    for name in ALL:
        a, b = (handed(name, m, found) for m, found in ((model, mine), (other, theirs)))
        torch.testing.assert_close(a[order], b, rtol=1e-9, atol=1e-13)


@pytest.mark.parametrize("name", ALL)
def test_a_filter_that_is_zero_goes_before_every_live_one(name: str) -> None:
    model = network(0)
    with torch.no_grad():
        model.up.weight[3] = 0
        model.up_norm.bias[3] = 5  # BatchNorm makes something of it
    scores = handed(name, model, gather(model, [name], batches(0), image=IMAGE))
    assert scores.argsort()[0] == 3
    assert scores[3] < scores[[0, 1, 2, 4]].min()


def test_values_of_another_layer_are_refused() -> None:
    with pytest.raises(Error, match="gamma: needs a value for each of the 5 filters"):
        bn_gamma(torch.ones(5, 1, 1, 1), gamma=torch.ones(4))


def test_layers_without_batchnorm_are_named_and_the_rest_scored() -> None:
    model = fpgm.model("vgg16")
    model.features[1] = nn.Identity()
    assert missing(model, "bn_gamma") == missing(model, "taylor") == ["features.0"]
    assert missing(model, "apoz") == missing(model, "gm") == []
    found = gather(model, ["bn_gamma"])
    assert found["features.0"] == {}
    assert set(found["features.3"]) == {"gamma"}
    with pytest.raises(Error, match=r"bn_gamma: needs a BatchNorm .* behind features.0;"):
        require(model, "bn_gamma")
    require(model, "bn_gamma", ["features.3"])


def test_layers_without_relu_are_named() -> None:
    import torchvision

    model = torchvision.models.mobilenet_v2()
    lacking = missing(model, "apoz")
    assert lacking  # the linear bottlenecks
    assert all(model.get_submodule(name).kernel_size == (1, 1) for name in lacking)
    assert missing(model, "bn_gamma") == []
    assert missing(torchvision.models.efficientnet_b0(), "hrank") != []


def test_inplace_relus_show_what_they_wrote_and_not_what_came_later() -> None:
    model = randomised(Overwrites(), 0)
    x, y = torch.randn(4, 3, 6, 6), torch.zeros(4, dtype=torch.long)
    zeros = gather(model, ["apoz"], [(x, y)])["stem"]["zeros"]
    with torch.no_grad():
        expected = (model.norm(model.stem(x)) <= 0).double().mean((0, 2, 3))
    torch.testing.assert_close(zeros, expected)


@pytest.mark.parametrize("name", DATA)
def test_missing_images_and_nan_are_said_in_one_line(name: str) -> None:
    model = network(0)
    for none in (None, []):
        with pytest.raises(Error, match=f"criterion={name}: needs images"):
            gather(model, [name], none, image=IMAGE)
    model.up.weight.data[2, 0, 0, 0] = torch.nan
    with pytest.raises(Error, match="not finite") as caught:
        gather(model, [name], batches(0), image=IMAGE)
    assert "\n" not in str(caught.value)


def test_tie_rate_counts_filters_that_share_their_score() -> None:
    assert tie_rate(torch.tensor([1.0, 2, 2, 3, 3, 3, 4])) == 5 / 7
    assert tie_rate(torch.arange(4.0)) == 0
