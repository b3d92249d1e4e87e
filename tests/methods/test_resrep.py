"""Compactors: how they are pressed, which rows forget, and that merging them loses nothing."""

from __future__ import annotations

import copy
import csv
import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from tasks import Noise, few, made, steps, whole
from torch import Tensor, nn
from zoo import error, randomised

import fpgm
from fpgm.errors import Error, GraphError
from fpgm.methods.schedules.resrep import ResRep, compactor, lengths, merge, pace, shrinking
from fpgm.selection.zero import pruned

__all__ = ["few"]  # a fixture


class Biased(nn.Module):
    """A convolution with a bias before its BatchNorm, another width, no square kernels."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.norm = nn.Conv2d(3, 7, (3, 2), padding=1), nn.BatchNorm2d(7, eps=0.1)
        self.fc = nn.Linear(7, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(torch.relu(self.norm(self.a(x))).mean((2, 3)))


def prepared(task: Noise, **options: Any) -> ResRep:
    """As training.task.prepare makes it: its parameters are trained, too."""
    schedule = ResRep(task, **options)
    for group in schedule.parameters():
        assert isinstance(group, dict)
        task.full.optimizer.add_param_group(group)
    return schedule


def masks(schedule: ResRep) -> dict[str, Tensor]:
    found = pruned(schedule.task.full.network, schedule.keep)
    return {name: found[name] for name in schedule.modules}


@given(st.integers(0, 99), st.floats(0, 3))
def test_a_row_gets_shorter_by_the_amount_and_never_turns_round(seed: int, amount: float) -> None:
    """The proximal step: the q that makes |q - row|^2 / 2 + amount |q| least."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(6, 4, generator=generator, dtype=torch.float64)
    rows[0] = 0
    amounts = torch.full((6,), amount, dtype=torch.float64)
    moved = rows * shrinking(lengths(rows), amounts)[:, None]
    assert moved.isfinite().all()
    torch.testing.assert_close(lengths(moved), (lengths(rows) - amount).clamp_min(0))
    others = moved + 0.05 * torch.randn(40, 6, 4, generator=generator, dtype=torch.float64)

    def cost(q: Tensor) -> Tensor:
        return (q - rows).square().sum(-1) / 2 + amount * q.norm(dim=-1)

    assert (cost(moved) <= cost(others) + 1e-12).all()
    assert (lengths(moved)[lengths(rows) <= amount] == 0).all()


@given(st.integers(1, 2000), st.integers(1, 5000), st.integers(1, 300), st.integers(1, 9))
def test_every_row_that_is_to_go_is_selected_in_time_at_the_published_pace_or_faster(
    total: int, count: int, every: int, remove: int
) -> None:
    then, more = pace(total, count, every, remove)
    assert 1 <= then <= every
    assert more >= remove
    assert (count // then) * more >= total
    if (count // every) * remove >= total:
        assert (then, more) == (every, remove)


@pytest.mark.parametrize("network", [Biased, lambda: fpgm.model("resnet20")])
def test_merging_loses_nothing_and_leaves_no_trace_of_a_row_of_zeros(network: Any) -> None:
    model = randomised(network(), 0, torch.float64)
    task = Noise(model=model)
    schedule = prepared(task)
    generator = torch.Generator().manual_seed(1)
    keep = fpgm.select(model, "random", 0.5, residual=task.goal.residual)
    for name, module in schedule.modules.items():
        noise = torch.randn(module.weight.shape, generator=generator, dtype=torch.float64)
        module.weight.data += 0.3 * noise
        module.weight.data[pruned(model, keep)[name]] = 0
    schedule.use(keep)
    x = torch.randn(5, 3, 12, 12, generator=generator, dtype=torch.float64)
    expected = schedule.zeroed.eval()(x)
    before = copy.deepcopy(model)
    schedule.finish()
    assert (before(x) - expected).abs().max() > 1e-2  # the compactors did something
    largest = expected.abs().max()
    assert (model.eval()(x) - expected).abs().max() <= 1e-12 * largest
    assert (fpgm.compact(model, keep)(x) - expected).abs().max() <= 1e-12 * largest
    assert error(model, fpgm.compact(model, keep), x) <= 1e-12
    for name, norm in schedule.norms.items():
        gone = pruned(model, keep)[name]
        for parameter in (model.get_submodule(name).weight, norm.weight, norm.bias):
            assert not parameter[gone].any()
            assert parameter[~gone].flatten(1 if parameter.dim() > 1 else 0).any()


def test_a_merged_layer_goes_on_in_training_as_the_compactor_did() -> None:
    torch.manual_seed(0)
    model = randomised(Biased(), 0, torch.float64).train()
    images = torch.randn(256, 3, 9, 9, dtype=torch.float64)
    model.norm.momentum = None
    model.norm.reset_running_stats()
    model(images)
    model.norm.momentum = 0.1
    q = compactor(model.norm.weight)
    q.weight.data += 0.2 * torch.randn_like(q.weight)
    expected = q(model.norm(model.a(images)))
    merge(model.a, model.norm, q.weight)
    found = model.norm(model.a(images))
    # The variances alone are estimates.
    assert torch.allclose(found.mean((0, 2, 3)), expected.mean((0, 2, 3)), atol=1e-6)
    ratio = found.std((0, 2, 3)) / expected.std((0, 2, 3))
    assert ((ratio > 0.7) & (ratio < 1.4)).all()


def test_with_compactors_as_they_start_the_network_computes_what_it_did() -> None:
    model = randomised(fpgm.model("resnet20"), 0)
    x = torch.randn(2, 3, 12, 12)
    expected = model(x)
    schedule = prepared(Noise(model=model))
    assert torch.allclose(schedule.zeroed(x), expected, atol=1e-5)
    assert {id(p) for p in model.parameters()} < {id(p) for p in schedule.zeroed.parameters()}


def test_selected_rows_hear_of_nothing_but_the_pressure_and_all_feel_that() -> None:
    task = Noise(epochs=2, residual="inner")
    schedule = prepared(task, strength=0.002, warmup=0.0, select=0.5, latest=1.0, every=1)
    schedule.start()
    schedule.before_epoch(0)
    name = "layer2.0.conv1"
    row = schedule.modules[name].weight
    for _ in range(3):
        x, y = next(task.batches(1))
        task.trained.optimizer.zero_grad()
        F.cross_entropy(task.trained.network(x), y).backward()
        schedule.after_backward()
        task.trained.optimizer.step()
        schedule.after_step()
    gone = masks(schedule)[name]
    assert gone.any()
    assert not gone.all()
    task.trained.optimizer.zero_grad()
    F.cross_entropy(task.trained.network(x), y).backward()
    heard = row.grad.clone()
    assert heard[gone].any()
    schedule.after_backward()
    assert not row.grad[gone].any()
    assert torch.equal(row.grad[~gone], heard[~gone])
    buffer = task.full.optimizer.state[row]["momentum_buffer"]
    assert not buffer[gone].any()
    assert buffer[~gone].any()
    before = lengths(row)
    task.trained.optimizer.step()
    stepped = lengths(row)
    assert torch.equal(stepped[gone], before[gone])  # no decay either
    schedule.after_step()
    # lr 0.1, momentum 0.99: a constant gradient of 0.002 goes 0.002 * 0.1 / 0.01 a step in the end.
    expected = (stepped - 0.02).clamp_min(0)
    line = stepped * (1 - 1 / 3)  # three steps are left
    torch.testing.assert_close(lengths(row)[~gone], expected[~gone])
    torch.testing.assert_close(lengths(row)[gone], torch.minimum(expected, line)[gone])


def test_the_shortest_rows_of_the_network_are_selected_at_the_pace_that_is_asked_for() -> None:
    task = Noise(epochs=4, residual="inner", rate=0.5)
    task.steps = 50
    schedule = prepared(task, warmup=0.25, select=0.75, remove=2, every=5)
    schedule.start()
    schedule.before_epoch(0)
    generator = torch.Generator().manual_seed(0)
    for module in schedule.modules.values():
        rows = torch.rand(len(module.weight), 1, 1, 1, generator=generator)
        module.weight.data *= 0.5 + rows
    total = int(0.5 * sum(len(module.weight) for module in schedule.modules.values()))
    seen = []
    schedule._strength = 0.0
    for _ in range(200):
        schedule.after_step()
        seen.append(sum(int(mask.sum()) for mask in masks(schedule).values()))
    assert seen[:50] == [0] * 50
    _, remove = pace(total, 100, 5, 2)
    assert all(b - a <= remove for a, b in itertools.pairwise(seen[:149]))
    assert seen[149] == seen[-1] == total
    # By hand: of all rows the shortest, a tenth of each layer stays. Selected ones are shorter
    # since, by the straight line: they stay the shortest.
    rows = {name: lengths(module.weight) for name, module in schedule.modules.items()}
    limit = max(float(row[masks(schedule)[name]].max()) for name, row in rows.items())
    for name, row in rows.items():
        assert (row[~masks(schedule)[name]] >= limit - 1e-6).all()


def test_selected_rows_are_zero_by_latest_however_weak_the_pressure() -> None:
    task = Noise(epochs=5, residual="inner")
    schedule = prepared(task, strength=0.0, select=0.4, latest=0.8)
    rows = steps(task, schedule)
    assert [row["dead"] for row in rows][:2] == [0, 0]
    assert rows[3]["dead"] == rows[3]["pruned"] > 0
    assert rows[-1]["dead"] == rows[-1]["pruned"]
    assert not any(row["changed"] for row in rows)
    assert rows[3]["churn"] == 0
    assert (
        "had come to zero, 0 of them by the pressure alone"
        in (schedule.closing(task.full.network)["said"])
    )


@pytest.mark.parametrize("strength", [0.0, 0.004, 0.02, 1.0])
def test_rows_that_the_straight_line_brought_to_zero_are_not_the_pressures(strength: float) -> None:
    """Against all lengths that were ever seen: without gradients a row is the pressure's if that
    would have had it at zero by `latest` from where it was when it was selected."""
    task = Noise(epochs=2, residual="inner")
    task.steps = 10
    schedule = prepared(task, strength=strength, warmup=0.0, select=0.5, latest=0.8, every=1)
    schedule.start()
    generator = torch.Generator().manual_seed(0)
    for module in schedule.modules.values():
        rows = torch.rand(len(module.weight), 1, 1, 1, generator=generator)
        module.weight.data *= 0.2 + rows
    schedule.before_epoch(0)
    way = strength * 0.1 / (1 - 0.99)
    slow = {name: torch.zeros(len(m.weight), dtype=bool) for name, m in schedule.modules.items()}
    for step in range(20):
        for name, module in schedule.modules.items():
            needed = lengths(module.weight) > way * max(16 - step, 1) * (1 + 1e-6)
            slow[name] |= needed & masks(schedule)[name]
        schedule.after_step()
    schedule.finish()
    said = schedule.closing(task.full.network)
    gone = masks(schedule)
    assert said["zero"] == said["selected"] > 0
    assert said["pressed"] == sum(int((gone[name] & ~slow[name]).sum()) for name in slow)
    assert {0.0: said["pressed"] == 0, 1.0: said["pressed"] == said["zero"]}.get(strength, True)


def test_a_resumed_run_still_knows_whom_the_straight_line_has_helped() -> None:
    task = Noise(epochs=5, residual="inner")
    schedule = prepared(task, strength=0.0, select=0.4, latest=0.8)
    steps(task, schedule)
    state = schedule.state()
    other = prepared(Noise(epochs=5, residual="inner"), strength=0.0, select=0.4, latest=0.8)
    other.resume(copy.deepcopy(state))
    assert any(helped.any() for helped in other.state()["helped"].values())
    for name, helped in state["helped"].items():
        assert torch.equal(other.state()["helped"][name], helped)


def test_what_is_not_zero_in_the_end_is_zeroed_and_said() -> None:
    task = Noise(epochs=2, residual="inner")
    schedule = prepared(task, strength=0.0, select=1.0, latest=1.0, every=1)
    schedule._end += 3  # a run that was to be longer
    rows = steps(task, schedule)
    assert rows[-1]["changed"]
    assert "the others were zeroed, the longest" in schedule.closing(task.full.network)["said"]
    assert all(not schedule.modules[n].weight[mask].any() for n, mask in masks(schedule).items())


def test_rows_that_the_pressure_has_not_yet_brought_to_zero_are_not_counted() -> None:
    task = Noise(epochs=1, residual="inner")
    schedule = prepared(task, strength=0.001, warmup=0.0, select=0.5, latest=1.0, every=1)
    schedule._end += 10_000  # the pressure would do it in time, but the loop ends early
    steps(task, schedule)
    said = schedule.closing(task.full.network)
    assert said["pressed"] == said["zero"] < said["selected"]


def test_a_run_loses_nothing_at_the_cut_and_meets_its_target(tmp_path: Path, few: None) -> None:
    words = ("schedule=resrep", "macs_target=0.6", "residual=inner", "epochs=4")
    report = whole(tmp_path, *words, "optimizer.lr=0.02")
    assert report["compact"]["macs"] <= 0.6 * report["dense"]["macs"]
    accuracy = report["accuracy"]
    assert accuracy["dense"] == accuracy["zeroed_last"] == accuracy["compact_last"]
    with open(tmp_path / "history.csv") as file:
        last = list(csv.DictReader(file))[-1]
    assert last["accuracy_before"] == last["accuracy_after"]
    assert last["pruned"] == last["dead"]
    assert "criterion=gm is not looked at" in (tmp_path / "train.log").read_text()


def test_compactors_have_a_momentum_of_their_own_and_no_decay(tmp_path: Path, few: None) -> None:
    task = made(tmp_path, "schedule=resrep", "schedule.momentum=0.97", "residual=inner")
    (first, second) = task.full.optimizer.param_groups
    assert (second["momentum"], second["weight_decay"]) == (0.97, 0)
    assert first["momentum"] == 0.9
    assert len(second["params"]) == 9
    assert len(made(tmp_path, "schedule=resrep", "rate=0").full.optimizer.param_groups) == 1


class Without(Biased):
    def forward(self, x: Tensor) -> Tensor:
        return self.fc(torch.relu(self.a(x)).mean((2, 3)))


class Dropping(Biased):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(F.dropout(x, 0.5, self.training))


def test_layers_that_several_write_stay_whole() -> None:
    task = Noise(residual="shared")
    schedule = prepared(task)
    schedule.start()
    assert len(schedule.modules) == 9
    (line,) = task.said
    assert "10 layers stay whole: conv1, layer1.0.conv2" in line
    steps(task, schedule)
    assert all(
        len(kept) == len(task.full.network.get_submodule(name).weight)
        for name, kept in schedule.keep.items()
        if name not in schedule.modules
    )


def test_what_cannot_be_merged_is_refused_before_the_first_epoch(tmp_path: Path, few: None) -> None:
    with pytest.raises(Error, match=r"schedule=resrep: no BatchNorm .* alone behind a; ignore=\[a"):
        ResRep(Noise(model=Without()))
    with pytest.raises(GraphError, match="schedule=resrep: dropout is a function"):
        ResRep(Noise(model=Dropping()))
    with pytest.raises(Error, match="epochs=0: schedule=resrep selects while it trains"):
        ResRep(Noise(epochs=0))
    with pytest.raises(Error, match=r"schedule.latest=0.3: rows are selected until .*select=0.5"):
        ResRep(Noise(), latest=0.3)
    with pytest.raises(Error, match=r"schedule.momentum=1: must be .* below 1"):
        made(tmp_path, "schedule=resrep", "schedule.momentum=1")
    with pytest.raises(Error, match="schedule=resrep: no convolution of this network fits"):
        ResRep(Noise(model=_tied(), residual="shared"))


def _tied() -> nn.Module:
    """A network whose convolutions all write into one stream."""

    class Tied(Biased):
        def __init__(self) -> None:
            super().__init__()
            self.b, self.other = nn.Conv2d(3, 7, (3, 2), padding=1), nn.BatchNorm2d(7)

        def forward(self, x: Tensor) -> Tensor:
            y = self.norm(self.a(x)) + self.other(self.b(x))
            return self.fc(torch.relu(y).mean((2, 3)))

    return Tied()


def test_as_published_no_straight_line_helps_and_what_is_left_is_cut() -> None:
    task = Noise(epochs=5, residual="inner")
    schedule = prepared(task, strength=1e-9, select=0.4, latest=None)
    rows = steps(task, schedule)
    assert rows[-1]["dead"] == 0 < rows[-1]["pruned"]
    said = schedule.closing(task.full.network)
    assert said["pressed"] == said["zero"] == 0 < said["largest"]
