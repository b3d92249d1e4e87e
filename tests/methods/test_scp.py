"""Differentiable masks: the published numbers, what is drawn and penalised, what a cut costs."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from tasks import Noise, few, made, steps, whole
from torch import Tensor, nn
from torch.distributions import RelaxedOneHotCategorical
from zoo import randomised

import fpgm
from fpgm.errors import Error, GraphError
from fpgm.methods.schedules.scp import SCP, Mask, Softness, silent
from fpgm.selection.zero import pruned

__all__ = ["few"]  # a fixture


class Chain(nn.Module):
    """Two convolutions whose BatchNorm goes into a ReLU, and one whose goes into a sigmoid."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.first = nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6)
        self.b, self.second = nn.Conv2d(6, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.c, self.third = nn.Conv2d(8, 5, 3, padding=1), nn.BatchNorm2d(5)
        self.fc = nn.Linear(5, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.first(self.a(x)))
        x = F.relu(self.second(self.b(x)))
        return self.fc(torch.sigmoid(self.third(self.c(x))).mean((2, 3)))


class Without(Chain):
    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.third(self.c(self.second(self.b(F.relu(self.a(x)))))).mean((2, 3)))


class Dropping(Chain):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(F.dropout(x, 0.5, self.training))


def norm_of(shift: list[float], scale: list[float]) -> nn.BatchNorm2d:
    norm = nn.BatchNorm2d(len(shift)).double()
    norm.bias.data, norm.weight.data = torch.tensor(shift).double(), torch.tensor(scale).double()
    return norm


@pytest.mark.parametrize(
    ("shift", "scale", "share", "drop"),
    [(0, 1, 0.51994, 0.00018), (-1, 0.5, 0.98214, 0.65537), (0.05, 3, 0.5, None)],
)
def test_the_published_measure_and_the_share_of_draws_that_drop(
    shift: float, scale: float, share: float, drop: float | None
) -> None:
    found = silent(torch.tensor(shift), torch.tensor(-scale), 0.05)
    assert float(found) == pytest.approx(share, abs=1e-5)
    # Of the normal inputs of a ReLU: how many are below the threshold.
    normal = torch.distributions.Normal(shift, scale)
    assert float(found) == pytest.approx(float(normal.cdf(torch.tensor(0.05))), abs=1e-6)
    if drop is not None:
        mask = Mask(norm_of([shift] * 200_000, [scale] * 200_000), Softness(), 1)
        torch.manual_seed(0)
        # p is the share of the draws below a half, whatever the temperature.
        dropped = float((mask.sampled() < 0.5).double().mean())
        assert dropped == pytest.approx(drop, abs=4 * math.sqrt(drop / 200_000) + 1e-5)


@pytest.mark.parametrize("temperature", [0.3, 0.5, 2.0])
def test_what_is_drawn_is_the_keep_part_of_torchs_relaxed_one_hot(temperature: float) -> None:
    count, shift, scale = 40_000, -0.8, 0.5
    mask = Mask(norm_of([shift] * count, [scale] * count), Softness(temperature=temperature), 1)
    torch.manual_seed(0)
    ours = mask.sampled().detach().sort().values
    p = torch.sigmoid(20 * (silent(torch.tensor(shift), torch.tensor(scale), 0.05) - 0.95))
    theirs = RelaxedOneHotCategorical(
        torch.tensor(temperature), probs=torch.stack((1 - p, p))
    ).sample((count,))[:, 0]
    # Kolmogorov and Smirnov's distance, at a level of one in a thousand.
    points = torch.linspace(0.01, 0.99, 99, dtype=torch.float64)
    gaps = [float((ours < x).double().mean() - (theirs < x).double().mean()) for x in points]
    assert max(map(abs, gaps)) < 1.95 * math.sqrt(2 / count)


@given(st.integers(0, 999), st.floats(0.6, 0.99), st.integers(1, 5))
def test_in_evaluation_a_channel_is_kept_exactly_if_it_fires_often_enough_or_holds_its_layer(
    seed: int, cut: float, least: int
) -> None:
    torch.manual_seed(seed)
    norm = norm_of((2 * torch.randn(8) - 1).tolist(), torch.randn(8).tolist())
    mask = Mask(norm.eval(), Softness(cut=cut), least)
    share = silent(norm.bias, norm.weight, 0.05).detach()
    far = ((0.05 - norm.bias) / norm.weight.abs()).tolist()  # where shares are 1 they do not tell
    by_rank = sorted(range(8), key=far.__getitem__)
    expected = [float(share[i]) < cut or by_rank.index(i) < least for i in range(8)]
    maps = torch.randn(2, 8, 3, 3, dtype=torch.float64)
    assert torch.equal(mask(maps), maps * torch.tensor(expected).view(1, -1, 1, 1))
    assert int(mask.kept().sum()) >= least
    norm.train()
    for _ in range(3):
        assert (mask.sampled()[mask.held()] == 1).all()
    assert mask(maps.bfloat16()).dtype == torch.bfloat16


def test_one_draw_a_channel_and_step_and_it_is_differentiable_in_scale_and_shift() -> None:
    norm = norm_of([-0.8, -0.7, -0.2], [0.5, 0.4, -0.6]).train()
    mask = Mask(norm, Softness(), 1)
    maps = torch.rand(4, 3, 5, 5, dtype=torch.float64) + 0.5
    torch.manual_seed(3)
    factors = mask(maps) / maps
    assert torch.allclose(factors, factors[:1, :, :1, :1].expand_as(factors))
    torch.manual_seed(3)
    assert torch.allclose(mask(maps), factors * maps)

    def drawn(shift: Tensor, scale: Tensor) -> Tensor:
        norm.bias.data, norm.weight.data = shift, scale
        torch.manual_seed(3)
        return mask.sampled()

    torch.manual_seed(3)
    mask.sampled().sum().backward()
    shift, scale = norm.bias.data.clone(), norm.weight.data.clone()
    for parameter, at in ((norm.bias, 0), (norm.weight, 1)):
        assert parameter.grad is not None
        for i in range(3):
            ends = []
            for step in (1e-6, -1e-6):
                moved = [shift.clone(), scale.clone()]
                moved[at][i] += step
                ends.append(float(drawn(*moved).detach().sum()))
            numeric = (ends[0] - ends[1]) / 2e-6
            assert float(parameter.grad[i]) == pytest.approx(numeric, rel=1e-4, abs=1e-8)


def begun(task: Noise, **options: Any) -> SCP:
    schedule = SCP(task, **options)
    schedule.start()
    schedule.before_epoch(0)
    return schedule


def backward(task: Noise, schedule: SCP) -> dict[str, Tensor]:
    """The gradients of a step as the method leaves them, less what they were."""
    x, y = next(task.batches(1))
    task.trained.optimizer.zero_grad()
    F.cross_entropy(task.trained.network.train()(x), y).backward()
    before = {n: p.grad.clone() for n, p in task.full.network.named_parameters()}
    schedule.after_backward()
    return {n: p.grad - before[n] for n, p in task.full.network.named_parameters()}


def test_the_penalty_is_that_of_the_paper_on_masked_batchnorms_and_nowhere_else() -> None:
    task = Noise(residual="inner", model=randomised(fpgm.model("resnet20"), 3).train())
    schedule = begun(task, strength=0.3, scale_weight=2.0)
    added = backward(task, schedule)
    terms, leaves = [], {}
    for name, norm in schedule.norms.items():
        free = ~schedule.modules[name].held()
        shift, scale = (p.detach().clone().requires_grad_() for p in (norm.bias, norm.weight))
        terms.append((0.3 * (shift + 2 * scale.abs()) * free).sum())
        terms.append((-5e-4 / 2 * shift.square()).sum())  # what the optimizer's decay adds
        leaves[name.replace("conv", "bn")] = {"bias": shift, "weight": scale}
    torch.stack(terms).sum().backward()
    seen = 0
    for name, difference in added.items():
        layer, _, kind = name.rpartition(".")
        expected = torch.zeros_like(difference)
        if layer in leaves:
            seen += 1
            expected = leaves[layer][kind].grad
        torch.testing.assert_close(difference, expected, atol=1e-5, rtol=1e-4)
    assert seen == 18


def test_means_are_estimated_on_what_the_masks_keep() -> None:
    task = Noise(model=Chain(), residual="inner")
    for norm in (task.full.network.first, task.full.network.second):
        nn.init.constant_(norm.bias, -1.0)
        nn.init.constant_(norm.weight, 0.5)
    schedule = begun(task)
    before = {name: norm.running_mean.clone() for name, norm in schedule.norms.items()}
    torch.manual_seed(0)
    backward(task, schedule)
    schedule.after_step()
    seen = []
    for name, norm in schedule.norms.items():
        kept = schedule.modules[name].drawn > 0.5
        assert torch.equal(norm.running_mean != before[name], kept)
        seen += kept.tolist()
    assert 0 < sum(seen) < len(seen)


@pytest.mark.parametrize("goal", [{"macs_target": 0.6}, {"rate": 0.4}])
def test_there_is_no_penalty_once_what_is_dropped_meets_the_goal(goal: dict[str, float]) -> None:
    task = Noise(residual="inner", **goal)
    schedule = begun(task)
    task.trained.network.train()
    schedule.after_step()
    assert backward(task, schedule)["layer1.0.bn1.bias"].abs().min() > 0
    for norm in schedule.norms.values():
        norm.bias.data[: int(0.8 * len(norm.bias))] = -50.0
    schedule.after_step()
    added = backward(task, schedule)
    norm = schedule.norms["layer1.0.conv1"]
    # All that is added is what takes the decay away.
    torch.testing.assert_close(added["layer1.0.bn1.bias"], -5e-4 * norm.bias.detach())
    assert not added["layer1.0.bn1.weight"].any()
    for norm in schedule.norms.values():
        norm.bias.data[:] = 1.0
    schedule.after_step()
    assert backward(task, schedule)["layer1.0.bn1.weight"].any()
    published = SCP(Noise(residual="inner", **goal), until="end")
    published.before_epoch(0)
    for norm in published.norms.values():
        norm.bias.data[: int(0.8 * len(norm.bias))] = -50.0
    published.after_step()
    assert published._pressing


@pytest.mark.parametrize(
    "network", [Chain, lambda: fpgm.model("resnet20"), lambda: fpgm.model("vgg11")]
)
@pytest.mark.parametrize("until", ["goal", "end"])
def test_cutting_what_is_dropped_costs_nothing(network: Any, until: str) -> None:
    model = randomised(network(), 5, torch.float64)
    task = Noise(model=model, residual="inner", epochs=1, rate=0.2)
    task.image = task.image_shape = (3, 32, 32)
    schedule = SCP(task, until=until)
    for norm in schedule.norms.values():
        norm.bias.data[::2] = 0.05 - 1.8 * norm.weight.data[::2].abs()  # they fire now and then
        norm.bias.data[1::2] = 0.5
    schedule.start()
    schedule.before_epoch(0)
    x = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    expected = schedule.zeroed.eval()(x)
    plain = model(x)
    row = schedule.after_epoch(0)
    schedule.finish()
    assert not row["changed"]
    assert row["dead"] == row["pruned"] == sum(len(n.bias[::2]) for n in schedule.norms.values())
    largest = expected.abs().max()
    assert not torch.equal(plain, expected)  # the masks did something
    assert (model(x) - expected).abs().max() <= 1e-12 * largest
    assert (fpgm.compact(model, schedule.keep)(x) - expected).abs().max() <= 1e-12 * largest
    said = schedule.closing(model)
    assert said["cut"] == said["dropped"] == row["pruned"]
    for name, norm in schedule.norms.items():
        gone = pruned(model, schedule.keep)[name]
        for parameter in (model.get_submodule(name).weight, norm.weight, norm.bias):
            assert not parameter[gone].any()


def test_where_too_few_are_dropped_those_that_fire_least_go_and_it_is_said() -> None:
    task = Noise(residual="inner", epochs=1, rate=0.4)
    schedule = begun(task)
    for module in schedule.modules.values():
        nn.init.uniform_(module._norm[0].bias, 0.1, 1.0)
    for _ in range(3):
        backward(task, schedule)
        schedule.after_step()
    fires = {name: values.clone() for name, values in schedule.measured().items()}
    row = schedule.after_epoch(0)
    assert row["changed"]
    assert schedule.closing(task.full.network)["dropped"] == 0
    (warning,) = task.warnings
    assert "schedule.strength=5e-05: " in warning
    assert "in so few steps about 0.3" in warning  # lr 0.1, momentum 0.9, 3 steps
    gone = torch.cat(
        [values[pruned(task.full.network, schedule.keep)[n]] for n, values in fires.items()]
    )
    total = sum(len(values) for values in fires.values())
    assert len(gone) == int(0.4 * total)
    for name, values in fires.items():
        kept = schedule.keep[name]
        at_floor = len(kept) == math.ceil(0.1 * len(values))
        assert at_floor or values[kept].min() >= gone.max() - 1e-9


def test_a_layer_that_would_die_keeps_the_floor_and_is_named() -> None:
    task = Noise(residual="inner", epochs=2)
    schedule = SCP(task, until="end", strength=2.0)
    steps(task, schedule, count=8)
    for name in schedule.modules:
        assert len(schedule.keep[name]) >= math.ceil(
            0.1 * len(task.full.network.get_submodule(name).weight)
        )
    assert any("layer1.0.conv1" in line and "floor=0.1" in line for line in task.warnings)


@pytest.mark.parametrize("until", ["goal", "end"])
def test_of_channels_that_never_fire_those_stay_that_the_masks_have_kept(until: str) -> None:
    """Of a layer that would die; by the shares alone they are all alike."""
    task = Noise(residual="inner", epochs=1, rate=0.4)
    schedule = begun(task, until=until)
    norm = schedule.norms["layer1.0.conv1"]
    norm.weight.data[:], norm.bias.data[:] = 1.0, -20 - torch.randperm(16).float()
    assert (silent(norm.bias.double(), norm.weight.double(), 0.05) == 1).all()
    kept = schedule.modules["layer1.0.conv1"].kept().nonzero().flatten()
    assert kept.tolist() == norm.bias.topk(2).indices.sort().values.tolist()
    schedule.after_epoch(0)
    assert torch.equal(schedule.keep["layer1.0.conv1"], kept)


def test_only_layers_before_a_relu_are_masked_and_the_others_are_said() -> None:
    task = Noise(model=Chain())
    schedule = begun(task)
    assert list(schedule.modules) == ["a", "b"]
    assert any("1 layers stay whole: c" in line for line in task.said)
    assert len(schedule.expected()["c"]) == 5
    resnet = Noise()
    assert len(SCP(resnet).modules) == 10  # conv1, and the first of each block


def test_a_run_from_scratch_and_one_from_a_trained_network_meet_their_target(
    tmp_path: Path, few: None
) -> None:
    words = ("schedule=scp", "macs_target=0.7", "residual=inner", "schedule.strength=0.3")
    scratch = whole(tmp_path / "scratch", *words)
    assert scratch["compact"]["macs"] <= 0.7 * scratch["dense"]["macs"]
    start = f"pretrained={tmp_path}/scratch"
    trained = whole(tmp_path / "trained", *words, start, "epochs=0", "criterion=l1")
    assert trained["compact"]["macs"] <= 0.7 * trained["dense"]["macs"]
    assert "criterion=l1 is not looked at" in (tmp_path / "trained" / "train.log").read_text()
    assert "schedule=scp: of" in (tmp_path / "scratch" / "report.md").read_text()


def test_what_cannot_be_masked_is_refused_before_the_first_epoch(tmp_path: Path, few: None) -> None:
    with pytest.raises(Error, match=r"schedule=scp: no BatchNorm .* alone behind a; ignore=\[a"):
        SCP(Noise(model=Without()))
    with pytest.raises(GraphError, match="schedule=scp: dropout is a function"):
        SCP(Noise(model=Dropping()))
    with pytest.raises(Error, match=r"schedule.cut=1: must be above 0 and below 1"):
        made(tmp_path, "schedule=scp", "schedule.cut=1")
    with pytest.raises(Error, match=r"schedule.until=never: choose one of goal, end"):
        made(tmp_path, "schedule=scp", "schedule.until=never")


def test_more_than_the_goal_is_said(tmp_path: Path, few: None) -> None:
    words = ("schedule=scp", "macs_target=0.9", "residual=inner", "schedule.strength=3")
    report = whole(tmp_path, *words, "epochs=3")
    assert report["compact"]["macs"] < 0.8 * report["dense"]["macs"]
    assert (
        "channels more are dropped than the goal asks for" in (tmp_path / "train.log").read_text()
    )
