"""Removing a few filters at a time: when, how many, by what, and that none comes back."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tasks import Noise, count, cut_short, few, made, steps, whole
from torch import Tensor, nn
from zoo import FAMILIES, randomised

import fpgm
from fpgm.compaction.constants import analyse
from fpgm.criteria import CRITERIA
from fpgm.criteria.evidence import gather
from fpgm.errors import Error
from fpgm.graph.cost import cost
from fpgm.graph.trace import trace
from fpgm.methods import Method
from fpgm.methods.schedules.fade import Fade
from fpgm.methods.schedules.iterative import Iterative
from fpgm.methods.schedules.papers import Hard
from fpgm.selection.rule import Rule
from fpgm.selection.zero import pruned
from fpgm.training.loop import one_epoch

__all__ = ["few"]  # a fixture


class Stream(nn.Module):
    """Two blocks on one stream, of a few filters."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 12, 3), nn.BatchNorm2d(12), nn.ReLU())
        self.blocks = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(12, 20, 3, padding=1), nn.BatchNorm2d(20), nn.ReLU(),
                nn.Conv2d(20, 12, 3, padding=1), nn.BatchNorm2d(12),
            )
            for _ in "ab"
        )  # fmt: skip
        self.fc = nn.Linear(12, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = (x + block(x)).relu()
        return self.fc(x.mean((2, 3)))


def stream() -> nn.Module:
    torch.manual_seed(0)
    return randomised(Stream(), 0).train()


class Watching(Method):
    """Beside a schedule: what was gone after each step, and whether any of it had moved."""

    def __init__(self, task: Noise, schedule: Iterative) -> None:
        super().__init__(task)
        self.schedule, self.counts, self.gone = schedule, [], []

    def start(self) -> None:
        self.after_step()

    def after_step(self) -> None:
        network = self.task.full.network
        self.counts.append(count(self.schedule))
        self.gone.append(pruned(network, self.schedule.keep))
        for name, mask in self.gone[-1].items():
            assert not network.get_submodule(name).weight[mask].any()


def watched(task: Noise, **options: Any) -> tuple[list[dict[str, Any]], Iterative, Watching]:
    schedule = Iterative(task, **options)
    watching = Watching(task, schedule)
    return steps(task, schedule, watching), schedule, watching


def kept_macs(task: Noise, keep: dict[str, Tensor]) -> float:
    network, image = task.full.network, task.image_shape
    dense = cost(network, image)
    return analyse(trace(network, image), keep).macs(dense) / dense.macs


def test_the_goal_is_met_in_equal_parts_at_the_steps_that_are_said() -> None:
    task = Noise(epochs=4)  # of 3 steps
    rows, schedule, watching = watched(task, every=2, duration=0.5)
    sizes = [len(m) for m in watching.gone[0].values()]
    parts = [sum(int(n * 0.4 * share / 3 + 1e-9) for n in sizes) for share in (1, 2, 3)]
    at = [0, 0, 1, 1, 2]  # removals at steps 0, 2 and 4, the first before any
    assert watching.counts == [parts[min(i, 2)] for i in (*at, *[2] * 8)]
    hard = Hard(Noise())
    hard.start()
    assert count(schedule) == count(hard) == parts[2] == 264
    assert [row["pruned"] for row in rows] == [parts[0], parts[1], parts[2], parts[2]]
    churn = [1 - parts[0] / parts[1], 1 - parts[1] / parts[2], 0, 0]
    assert [row["churn"] for row in rows] == pytest.approx(churn)
    assert all(row["revived"] == 0 and not row["changed"] for row in rows)
    assert schedule.settled_at == {"epoch": 2, "at_rest": None}


def test_a_run_without_epochs_and_one_short_of_steps_lose_all_the_same() -> None:
    _, schedule, watching = watched(Noise(epochs=0))
    assert watching.counts == [count(schedule)] == [264]
    task = Noise(epochs=4)
    _, schedule, _ = watched(task, every=10, duration=1.0)
    assert count(schedule) == 264
    few_steps = Iterative(task, every=1, duration=1.0)
    few_steps.start()
    few_steps.before_epoch(0)
    few_steps.after_step()
    few_steps.finish()
    assert count(few_steps) == 264
    assert "training ended after 1 steps" in task.warnings[-1]


@pytest.mark.parametrize("scope", ["layer", "global"])
@pytest.mark.parametrize("name", CRITERIA)
def test_what_is_gone_never_comes_back_whatever_the_criterion(name: str, scope: str) -> None:
    if CRITERIA[name].places and scope == "global":
        return
    task = Noise(Rule(name, scope=scope), 0.5, 2, stream(), from_scratch=False)
    _, schedule, watching = watched(task, every=1, duration=1.0)
    assert len(set(watching.counts)) == 6
    for before, after in zip(watching.gone, watching.gone[1:], strict=False):
        assert not any((mask & ~after[name]).any() for name, mask in before.items())
    assert watching.counts[-1] == count(schedule)
    assert len(schedule.scores) > 0


def offset() -> nn.Module:
    """Filters that lie far from the origin: to the geometric median's criteria a zero filter is
    the most unlike all others, and the last to go."""
    model = stream()
    with torch.no_grad():
        for layer in (m for m in model.modules() if isinstance(m, nn.Conv2d)):
            layer.weight += 1
    return model


@pytest.mark.parametrize("name", ["gm", "fermat"])
def test_no_live_filter_goes_in_place_of_one_that_is_gone(name: str) -> None:
    task = Noise(Rule(name), 0.5, 2, offset(), from_scratch=False)
    _, _, watching = watched(task, every=2, duration=1.0)
    sizes = [len(mask) for mask in watching.gone[0].values()]
    parts = [sum(int(n * 0.5 * share / 3 + 1e-9) for n in sizes) for share in (1, 2, 3)]
    assert sorted(set(watching.counts)) == parts


def test_a_run_that_goes_on_knows_what_is_gone() -> None:
    task = Noise(Rule("gm"), 0.5, 2, offset(), from_scratch=False)
    schedule = Iterative(task, every=4, duration=1.0)  # the second removal is in the second epoch
    schedule.start()
    resumed = Iterative(task, every=4, duration=1.0)
    resumed.resume(schedule.state())
    expected, kept = resumed.expected(), schedule.keep
    assert all(torch.isin(expected[name], kept[name]).all() for name in kept)
    sizes = {name: len(kept) for name, kept in schedule.expected().items()}
    assert {name: len(kept) for name, kept in expected.items()} == sizes


def test_below_a_threshold_that_fewer_filters_are_under_than_before_none_comes_back() -> None:
    task = Noise(Rule("l2", threshold=1.0), 0.4, 2, stream(), from_scratch=False)
    network = task.full.network
    with torch.no_grad():
        for name in task.prunable.layers:
            weight = network.get_submodule(name).weight
            weight /= weight.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
            weight[: len(weight) // 2] *= 0.5  # half of them go
            weight[len(weight) // 2 :] *= 2
    schedule = Iterative(task, every=1, duration=0.5)
    schedule.start()
    gone = count(schedule)
    assert gone > 0
    with torch.no_grad():
        for parameter in network.parameters():
            parameter *= 100  # and now none would
    before = schedule.keep
    schedule.before_epoch(0)
    schedule.after_step()
    assert count(schedule) == gone
    assert all(torch.equal(schedule.keep[name], kept) for name, kept in before.items())


def test_a_rate_for_a_budget_is_found_again_once_an_epoch_and_at_the_end() -> None:
    task = Noise(Rule("l2"), 0.4, 2, stream(), from_scratch=False, macs_target=0.6)
    found = []

    class Counted(Iterative):
        def _found_rate(self) -> float:
            found.append(self._done)
            return super()._found_rate()

    steps(task, Counted(task, every=1, duration=1.0))
    assert found == [0, 1, 4, 5]  # removals, of six in two epochs of three steps


def test_when_all_is_gone_what_is_expected_is_what_is_kept_and_no_image_is_read() -> None:
    task = Noise(Rule("taylor_act"), 0.5, 2, stream(), from_scratch=False)
    schedule = Iterative(task, every=1, duration=0.5)
    steps(task, schedule)
    task.shown = lambda: pytest.fail("images are read")  # type: ignore[method-assign]
    expected = schedule.expected()
    assert all(torch.equal(expected[name], kept) for name, kept in schedule.keep.items())


@given(
    st.sampled_from(["gm", "l2", "fermat"]),
    st.sampled_from(["independent", "shared", "inner"]),
    st.sampled_from([1, 4]),
    st.sampled_from(["layer", "global"]),
)
@settings(deadline=None, max_examples=8)
def test_whole_groups_go_and_stay_gone_to_a_budget(
    name: str, residual: str, align: int, scope: str
) -> None:
    rule = Rule(name, align=align, scope=scope)
    task = Noise(rule, 0.4, 2, stream(), False, residual=residual, macs_target=0.6)
    _, schedule, watching = watched(task, every=1, duration=0.8)
    for before, after in zip(watching.gone, watching.gone[1:], strict=False):
        assert not any((mask & ~after[layer]).any() for layer, mask in before.items())
    for group in task.prunable.groups:
        masks = [watching.gone[-1][layer][filters] for layer, filters in group.members]
        assert all(torch.equal(mask, masks[0]) for mask in masks)
    assert (0.3 if align > 1 else 0.5) < kept_macs(task, schedule.keep) <= 0.6


def test_every_removal_looks_at_the_weights_as_they_are_then() -> None:
    """By a criterion that puts zeros lowest: each selection is that of the network as it stands."""
    task = Noise(Rule("taylor_act"), epochs=2, from_scratch=False)
    found: list[tuple[nn.Module, dict[str, Tensor]]] = []

    class Kept(Iterative):
        def _remove(self, share: float) -> None:
            before = copy.deepcopy(self.task.full.network)
            super()._remove(share)
            found.append((before, dict(self.keep)))

    schedule = Kept(task, every=2, duration=1.0)
    steps(task, schedule)
    assert len(found) == 2
    for at, (network, keep) in enumerate(found, 2):
        evidence = gather(network, ["taylor_act"], task.shown())
        expected = fpgm.select(network, "taylor_act", 0.4 * at / 3, evidence=evidence)
        assert all(torch.equal(keep[name], kept) for name, kept in expected.items())


def test_the_compact_network_is_trained_once_all_is_gone_and_not_before() -> None:
    task = Noise(epochs=4)
    schedule = Iterative(task, every=2, duration=0.5)
    still = []

    class Asked(Method):
        def before_epoch(self, epoch: int) -> None:
            still.append(schedule.still_during(epoch))

    steps(task, Asked(task), schedule)
    assert still == [False, False, True, True]
    off = Iterative(task, train_compact=False, every=100)
    off.start()
    assert not off.still_during(0)


@pytest.fixture
def trained(tmp_path: Path) -> str:
    torch.manual_seed(0)
    model = randomised(fpgm.model("resnet20", in_channels=1), 0)
    torch.save(model.state_dict(), tmp_path / "w.pt")
    return f"pretrained={tmp_path / 'w.pt'}"


def test_a_run_that_is_cut_short_between_removals_goes_on_to_the_same_bits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, trained: str, few: None
) -> None:
    words = [
        "schedule=iterative", "schedule.every=1", "schedule.duration=0.8", "optimizer.lr=0.01",
        "criterion=taylor_act", "criterion.batches=1", trained, "macs_target=0.5", "epochs=2",
    ]  # fmt: skip
    report = whole(tmp_path / "whole", *words)
    cut_short(tmp_path / "cut", monkeypatch, *words)
    again = whole(tmp_path / "cut", *words)
    assert {**again, "timing": None} == {**report, "timing": None}
    a, b = (
        torch.load(tmp_path / where / "zeroed.pt", weights_only=True)["state_dict"]
        for where in ("whole", "cut")
    )
    assert all(torch.equal(value, b[name]) for name, value in a.items())
    assert report["compact"]["macs"] <= 0.5 * report["dense"]["macs"]
    assert all(churn > 0 for churn in report["pruning"]["churn"])
    same = report["equivalence"]
    assert same["max_abs_diff"] <= 1e-5 * same["max_abs_logit"]


def test_what_stands_is_announced_in_a_run_that_goes_on(
    tmp_path: Path, trained: str, few: None
) -> None:
    words = ["schedule=iterative", "schedule.every=1", "macs_target=0.5", trained]
    task = made(tmp_path, *words)
    schedule = task.schedule
    for epoch in range(2):
        one_epoch(task, epoch)
    resumed = made(tmp_path, *words)
    resumed.resume(task.state())
    assert resumed.schedule.full_rate() == schedule.full_rate() > 0.1
    kept = resumed.schedule.expected()
    assert all(torch.equal(kept[name], keep) for name, keep in schedule.keep.items())


def test_from_scratch_and_bad_options_are_refused_in_a_line() -> None:
    (line,) = Iterative.problems(Noise().goal, from_scratch=True)
    assert line.startswith("schedule=iterative: prunes a trained network, name it with pretrained=")
    assert Iterative.problems(Noise().goal, from_scratch=False) == []
    (line,) = Iterative.check({"every": 0}, "schedule.")
    assert line == "schedule.every=0: must be at least 1, for example schedule.every=30"
    (line,) = Iterative.check({"duration": 0.0}, "schedule.")
    assert line.startswith("schedule.duration=0.0: must be above 0")
    model = fpgm.model("resnet20")
    sgd = torch.optim.SGD(model.parameters(), 0.1)
    with pytest.raises(Error, match=r"steps=None: this schedule counts them"):
        fpgm.Pruner(model, sgd, epochs=2, schedule="iterative", pretrained=True)


def test_so_few_steps_that_all_goes_at_once_are_said() -> None:
    task = Noise(epochs=4)
    Iterative(task, every=6).start()
    (line,) = task.warnings
    assert line.startswith("schedule.every=6: no second removal fits into schedule.duration")
    task = Noise(epochs=4)
    Iterative(task, every=5).start()
    assert task.warnings == []


@pytest.mark.parametrize("kind", [Iterative, Fade, Hard])
def test_hidden_units_of_linear_layers_are_pruned_in_training(
    kind: type[Hard], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Noise, "image", (3, 32, 32))
    monkeypatch.setattr(Noise, "image_shape", (3, 32, 32))
    torch.manual_seed(0)
    task = Noise(model=FAMILIES["convnext"]().train(), epochs=2, from_scratch=False)
    schedule = kind(task, **({"every": 2} if kind is Iterative else {}))
    steps(task, schedule)
    masks = pruned(task.full.network, schedule.keep)
    assert {name: int(mask.sum()) for name, mask in masks.items()} == {
        "features.1.0.block.3": 25, "features.3.0.block.3": 51
    }  # fmt: skip
    for name, mask in masks.items():
        assert not task.full.network.get_submodule(name).weight[mask].any()
