"""What a user loses when one of these fails: criteria of the loss's gradient, image by image."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from zoo import FAMILIES, Functional, randomised

import fpgm
from fpgm.criteria import CRITERIA
from fpgm.criteria.evidence import gather, missing
from fpgm.graph.groups import prunable
from fpgm.graph.trace import trace
from fpgm.selection.rule import Rule
from fpgm.selection.select import score

seeds = st.integers(0, 2**31)
Data = list[tuple[Tensor, Tensor]]
UNITS = ("wide", "factors")  # their channels come last


def as_it_is(name: str, maps: Tensor) -> Tensor:
    return maps


class Residual(nn.Module):
    """A stem and one residual group; every map goes through `at`, by the name of its writer."""

    at = staticmethod(as_it_is)

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.stem_norm = nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6)
        self.up, self.up_norm = nn.Conv2d(6, 5, 3, padding=1), nn.BatchNorm2d(5)
        self.down, self.down_norm = nn.Conv2d(5, 6, 3, padding=1), nn.BatchNorm2d(6)
        self.fc = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        stem = self.at("stem", F.relu(self.stem_norm(self.stem(x))))
        up = self.at("up", F.relu(self.up_norm(self.up(stem))))
        down = self.at("down", self.down_norm(self.down(up)))
        return self.fc(F.relu(down + stem).mean((2, 3)))


class Plain(nn.Module):
    """No BatchNorm, no ReLU, an activation that moves zero."""

    at = staticmethod(as_it_is)

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.fc = nn.Conv2d(3, 5, 3), nn.Conv2d(5, 4, 3), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        a = torch.sigmoid(self.at("a", self.a(x)))
        return self.fc(self.at("b", torch.tanh(self.b(a))).mean((2, 3)))


class Hidden(nn.Module):
    """Units of linear layers: at every place of an image, and one for each channel of it."""

    at = staticmethod(as_it_is)

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1)
        self.wide, self.narrow = nn.Linear(4, 7), nn.Linear(7, 4)
        self.squeeze, self.factors = nn.Linear(4, 3), nn.Linear(3, 4)
        self.fc = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.conv(x))
        y = self.at("wide", F.gelu(self.wide(x.permute(0, 2, 3, 1))))
        x = x + self.narrow(y).permute(0, 3, 1, 2)
        z = torch.relu(self.squeeze(x.mean((2, 3))))
        z = self.at("factors", self.factors(z)).sigmoid()
        return self.fc((x * z[:, :, None, None]).mean((2, 3)))


def made(kind: type[nn.Module], seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return randomised(kind(), seed, torch.float64)


def images(seed: int, count: int = 6) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(count, 3, 9, 9, generator=g, dtype=torch.float64)
    return x, torch.randint(4, (count,), generator=g)


def cut(data: tuple[Tensor, Tensor], *at: int) -> Data:
    return list(zip(data[0].tensor_split(at), data[1].tensor_split(at), strict=True))


def widths(model: nn.Module, data: tuple[Tensor, Tensor]) -> dict[str, tuple[int, int]]:
    """Writer -> channels and pixels of its map."""
    found: dict[str, tuple[int, int]] = {}

    def look(name: str, maps: Tensor) -> Tensor:
        width = maps.shape[-1 if name in UNITS else 1]
        found[name] = (width, maps[0].numel() // width)
        return maps

    model.at = look
    model(data[0][:1])
    model.at = as_it_is
    return found


def gated(names: tuple[str, ...], gate: Tensor) -> Callable[[str, Tensor], Tensor]:
    """A gate (N,) on the maps of these."""

    def close(name: str, maps: Tensor) -> Tensor:
        if name not in names:
            return maps
        return maps * (gate if name in UNITS else gate.view(-1, 1, 1))

    return close


def by_gates(
    model: nn.Module, data: tuple[Tensor, Tensor], names: tuple[str, ...], width: int
) -> Tensor:
    """The derivative of each image's own loss by a gate on the maps of all `names`, (images, N)."""
    rows = []
    for image, label in zip(*data, strict=True):
        gate = torch.ones(width, dtype=torch.float64, requires_grad=True)
        model.at = gated(names, gate)
        loss = F.cross_entropy(model(image[None]), label[None])
        rows.append(torch.autograd.grad(loss, gate)[0])
    model.at = as_it_is
    return torch.stack(rows)


@given(seeds, st.sampled_from([Residual, Plain, Hidden]))
@settings(deadline=None, max_examples=8)
def test_taylor_act_is_the_change_by_a_gate_on_the_map_by_finite_differences(
    seed: int, kind: type[nn.Module]
) -> None:
    model, data = made(kind, seed), images(seed, 1)
    found = gather(model, ["taylor_act"], [data], list(widths(model, data)))
    for writer, (width, pixels) in widths(model, data).items():
        expected = []
        for channel in range(width):
            losses = []
            for step in (-1e-5, 1e-5):
                gate = torch.ones(width, dtype=torch.float64)
                gate[channel] += step
                model.at = gated((writer,), gate)
                with torch.no_grad():
                    losses.append(F.cross_entropy(model(data[0]), data[1]).item())
            expected.append(abs(losses[1] - losses[0]) / 2e-5 / pixels)
        model.at = as_it_is
        got = CRITERIA["taylor_act"](model.get_submodule(writer).weight, **found[writer])
        wanted = torch.tensor(expected, dtype=torch.float64)
        torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-9)


@given(seeds, st.sampled_from([Residual, Plain, Hidden]), st.integers(1, 5))
@settings(deadline=None, max_examples=12)
def test_what_images_say_is_of_each_ones_own_loss_however_they_are_batched(
    seed: int, kind: type[nn.Module], at: int
) -> None:
    model, data = made(kind, seed), images(seed)
    sizes = widths(model, data)
    names = ["taylor_act", "group_fisher"]
    for batches in ([data], cut(data, at), cut(data, 1, 2, 3, 4, 5)):
        found = gather(model, names, batches, list(sizes))
        for writer, (width, pixels) in sizes.items():
            each = by_gates(model, data, (writer,), width)
            weight, seen = model.get_submodule(writer).weight, found[writer]
            act = CRITERIA["taylor_act"](weight, influence=seen["influence"])
            fisher = CRITERIA["group_fisher"](weight, gates=seen["gates"])
            torch.testing.assert_close(seen["gates"], each.T, rtol=1e-9, atol=1e-14)
            torch.testing.assert_close(act, each.abs().mean(0) / pixels, rtol=1e-9, atol=1e-14)
            torch.testing.assert_close(fisher, each.square().sum(0), rtol=1e-9, atol=1e-14)


@given(seeds)
@settings(deadline=None, max_examples=8)
def test_group_fisher_squares_what_all_writers_of_a_channel_say_together(seed: int) -> None:
    model, data = made(Residual, seed), images(seed)
    rule = Rule("group_fisher")
    scores = {}
    for residual in ("shared", "independent"):
        groups = prunable(trace(model), residual).groups
        layers = [name for group in groups for name, _ in group.members]
        evidence = gather(model, ["group_fisher"], cut(data, 2), layers)
        scores[residual] = score(model, rule, 0.5, groups, evidence)
    together = by_gates(model, data, ("stem", "down"), 6).square().sum(0)
    for name in ("stem", "down"):
        torch.testing.assert_close(scores["shared"][name], together, rtol=1e-9, atol=1e-14)
        alone = by_gates(model, data, (name,), 6).square().sum(0)
        torch.testing.assert_close(scores["independent"][name], alone, rtol=1e-9, atol=1e-14)
    alone = by_gates(model, data, ("up",), 5).square().sum(0)
    torch.testing.assert_close(scores["shared"]["up"], alone, rtol=1e-9, atol=1e-14)
    keep = fpgm.select(model, "group_fisher", 0.5, residual="shared", evidence=evidence)
    assert keep["stem"].tolist() == sorted(together.argsort()[3:].tolist())


@given(seeds, st.booleans())
@settings(deadline=None, max_examples=10)
def test_taylor_weight_is_weight_times_gradient_summed_over_weights_and_minibatches(
    seed: int, squared: bool
) -> None:
    for kind in (Residual, Hidden):
        model, batches = made(kind, seed), cut(images(seed), 2)
        layers = ["stem", "up", "down"] if kind is Residual else ["conv", "wide", "factors"]
        found = gather(model, ["taylor_weight"], batches, layers)
        for name in layers:
            weight = model.get_submodule(name).weight
            expected = torch.zeros(len(weight), dtype=torch.float64)
            for x, y in batches:
                (gradient,) = torch.autograd.grad(F.cross_entropy(model(x), y), weight)
                products = (weight * gradient).detach().flatten(1)
                expected += (products.square() if squared else products.abs()).sum(1)
            got = CRITERIA["taylor_weight"](weight, **found[name], squared=squared)
            torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-14)


def test_before_a_batchnorm_the_products_sum_to_zero_and_their_absolute_values_do_not() -> None:
    torch.manual_seed(0)
    model = Residual().double()  # its BatchNorms take the batch's own statistics
    for norm in (model.stem_norm, model.up_norm, model.down_norm):
        norm.eps = 1e-15
    x, y = images(0)
    found = gather(model, ["taylor_weight"], [(x, y)])
    model.train()
    weights = [model.get_submodule(name).weight for name in found]
    gradients = torch.autograd.grad(F.cross_entropy(model(x), y), weights)
    for name, weight, gradient in zip(found, weights, gradients, strict=True):
        assert (weight * gradient).flatten(1).sum(1).abs().max() < 1e-11
        assert found[name]["absolute"].min() > 1e-4


def test_weights_that_are_computed_are_seen_as_they_are_used() -> None:
    torch.manual_seed(0)
    model = Functional().double()
    x, y = torch.randn(4, 3, 12, 12, dtype=torch.float64), torch.tensor([0, 1, 2, 3])
    found = gather(model, ["taylor_weight", "taylor_act"], [(x, y)])
    flat = model.stem.weight.reshape(1, 8, -1)
    used = F.batch_norm(flat, None, None, training=True).reshape_as(model.stem.weight).detach()
    used.requires_grad_()
    plain = nn.Conv2d(3, 8, 3, padding=1).double()
    del plain.weight
    plain.weight, plain.bias = used, model.stem.bias
    model.stem = plain
    (gradient,) = torch.autograd.grad(F.cross_entropy(model(x), y), used)
    expected = (used * gradient).detach().flatten(1).abs().sum(1)
    torch.testing.assert_close(found["stem"]["absolute"], expected, rtol=1e-9, atol=1e-14)
    assert set(found) == {"stem", "plain", "grouped"}


class InPlace(nn.Module):
    """Maps that are overwritten where they are, and read again."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm, self.relu = nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(True)
        self.up, self.fc = nn.Conv2d(6, 6, 3, padding=1), nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.stem(x))
        self.relu(x)  # x itself is rectified from here on
        y = self.up(x)
        y += x
        return self.fc(y.relu_().mean((2, 3)))


@pytest.mark.parametrize(("writer", "place"), [("stem", "norm"), ("up", "up")])
def test_in_place_operations_do_not_spoil_what_a_map_and_its_gradient_say(
    writer: str, place: str
) -> None:
    model = made(InPlace, 0)
    x, y = images(0)
    found = gather(model, ["group_fisher"], [(x, y)])[writer]["gates"]
    rows = []
    for image, label in zip(x, y, strict=True):
        gate = torch.ones(6, 1, 1, dtype=torch.float64, requires_grad=True)
        module = model.get_submodule(place)
        hook = module.register_forward_hook(lambda m, i, out, g=gate: out * g)
        loss = F.cross_entropy(model(image[None]), label[None])
        rows.append(torch.autograd.grad(loss, gate)[0].flatten())
        hook.remove()
    torch.testing.assert_close(found, torch.stack(rows, 1), rtol=1e-9, atol=1e-14)


@pytest.mark.parametrize("name", ["taylor_act", "group_fisher", "taylor_weight"])
def test_networks_without_batchnorm_and_with_hidden_units_are_pruned(name: str) -> None:
    torch.manual_seed(0)
    model = FAMILIES["convnext"]().eval()
    assert missing(model, name) == []
    data = [(torch.randn(4, 3, 32, 32), torch.tensor([0, 1, 2, 3]))]
    keep = fpgm.select(model, name, 0.25, evidence=gather(model, [name], data))
    assert [len(kept) for kept in keep.values()] == [48, 96]
    fpgm.zero_(model, keep)
    small = fpgm.compact(model, keep)
    with torch.no_grad():
        torch.testing.assert_close(small(data[0][0]), model(data[0][0]), rtol=1e-4, atol=1e-5)
