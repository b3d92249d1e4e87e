"""A growing penalty: whom it moves and by how much, when it ends, and that nothing is left."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from tasks import Noise, few, steps, whole
from torch import Tensor

from fpgm.compaction.compact import compact
from fpgm.errors import Error
from fpgm.methods.schedules.greg import GReg
from fpgm.selection.zero import pruned

__all__ = ["few"]  # a fixture

LAYER, NORM = "layer1.0.conv1", "layer1.0.bn1"


def backward(task: Noise) -> dict[str, Tensor]:
    """The gradients of a batch, as they are before any method changes them."""
    x, y = next(task.batches(1))
    task.full.network.zero_grad()
    F.cross_entropy(task.full.network(x), y).backward()
    return {name: p.grad.clone() for name, p in task.full.network.named_parameters()}


def started(**options: Any) -> tuple[Noise, GReg]:
    task = Noise(epochs=4, from_scratch=False)
    schedule = GReg(task, **options)
    schedule.start()
    schedule.before_epoch(0)
    return task, schedule


def test_the_penalty_grows_as_published_where_there_are_steps_enough() -> None:
    task = Noise(epochs=100, from_scratch=False)
    task.steps = 5000
    schedule = GReg(task)
    for taken, penalty in (
        (0, 0),
        (9, 0),
        (10, 1e-4),
        (99_990, 0.9999),
        (100_000, 1),
        (200_000, 1),
    ):
        schedule._taken = taken
        assert schedule.penalty == pytest.approx(penalty)


@settings(max_examples=30, deadline=None)
@given(
    st.integers(1, 300), st.integers(1, 20), st.floats(0.1, 1), st.floats(1e-6, 0.5),
    st.floats(0.1, 2),
)  # fmt: skip
def test_however_short_the_run_the_penalty_comes_to_its_ceiling_and_never_falls(
    count: int, every: int, latest: float, growth: float, ceiling: float
) -> None:
    task = _shared()
    task.steps = count
    schedule = GReg(task, growth=growth, every=every, ceiling=ceiling, latest=latest, ratio=1e9)
    penalties = []
    for taken in range(max(schedule._last, every + 1)):
        schedule._taken = taken
        penalties.append(schedule.penalty)
    assert penalties[0] == 0
    assert all(a <= b for a, b in itertools.pairwise(penalties))
    assert penalties[-1] == pytest.approx(ceiling)
    assert max(penalties) <= ceiling


_NOISE: list[Noise] = []


def _shared() -> Noise:
    """One task for all examples: nothing of it is trained."""
    if not _NOISE:
        _NOISE.append(Noise(epochs=1, from_scratch=False))
    return _NOISE[0]


def test_only_filters_that_are_to_go_feel_it_and_by_the_gradient_of_its_square() -> None:
    task, schedule = started(every=2, growth=0.3, latest=1.0)
    schedule.after_step()
    schedule.after_step()
    before = backward(task)
    schedule.after_backward()
    masks = pruned(task.full.network, schedule.keep)
    assert schedule.penalty == pytest.approx(0.3)
    for name, parameter in task.full.network.named_parameters():
        expected = before[name]
        mask = masks.get(name.removesuffix(".weight"))
        if mask is not None:
            # By autograd: the gradient of (penalty / 2) |w|^2 over the masked filters.
            leaf = parameter.detach().clone().requires_grad_()
            (0.15 * leaf[mask].square().sum()).backward()
            assert leaf.grad is not None
            expected = expected + leaf.grad
        torch.testing.assert_close(parameter.grad, expected)


def test_it_ends_early_once_every_layer_is_a_thousand_times_larger_than_what_goes() -> None:
    task, schedule = started(every=2, latest=1.0)
    masks = pruned(task.full.network, schedule.keep)
    weights = {name: task.full.network.get_submodule(name).weight.data for name in masks}
    for factor, ends in ((1e-2, False), (1e-4, True)):
        for name, mask in masks.items():
            weights[name][mask] *= factor / (1e-2 if ends else 1)
            assert weights[name][mask].any()
        if ends:  # all but one layer
            weights[LAYER][masks[LAYER]] *= 1e2
            schedule.after_step()
            schedule.after_step()
            assert not schedule.masked(1)
            weights[LAYER][masks[LAYER]] *= 1e-2
        schedule.after_step()
        assert not schedule.masked(1)  # looked at every second step
        schedule.after_step()
        assert schedule.masked(1) == ends
    for name, mask in masks.items():
        assert not weights[name][mask].any()
        assert weights[name][~mask].any()


def test_what_is_left_at_the_latest_is_silenced_with_its_batchnorm_and_stays_so() -> None:
    task = Noise(epochs=4, from_scratch=False)
    schedule = GReg(task, every=1, latest=0.5)
    rows = steps(task, schedule)
    network = task.full.network
    assert schedule._gone is not None
    assert schedule._gone["step"] == 6
    assert [row["revived"] for row in rows] == [0, 0, 0, 0]
    assert not any(row["changed"] for row in rows)
    mask = pruned(network, schedule.keep)[LAYER]
    conv, norm = network.get_submodule(LAYER), network.get_submodule(NORM)
    for parameter in (conv.weight, norm.weight, norm.bias):
        assert not parameter[mask].any()
        assert parameter[~mask].any()
        assert not task.full.optimizer.state[parameter]["momentum_buffer"][mask].any()
    x, _ = next(task.batches(1))
    small = compact(network.eval(), schedule.keep)
    torch.testing.assert_close(small(x), network(x), atol=1e-4, rtol=1e-4)


def test_the_longer_it_presses_the_smaller_they_are() -> None:
    shares = []
    for ceiling in (1e-3, 1.0):
        task = Noise(epochs=4, from_scratch=False)
        schedule = GReg(task, every=1, ceiling=ceiling, growth=1e-9, latest=1.0)
        schedule._last += 1  # it stops one step short of silencing
        steps(task, schedule)
        shares.append(schedule._ratio())
    assert shares[1] > 1.5 * shares[0]


def test_a_run_says_when_and_how_small_they_were(tmp_path: Path, few: None) -> None:
    whole(tmp_path / "base", "rate=0", "epochs=1")
    words = (f"pretrained={tmp_path}/base", "schedule=greg", "schedule.every=1", "criterion=l1")
    report = whole(tmp_path / "run", *words)
    found = report["methods"]["greg"]
    assert found["step"] == 2
    assert found["penalty"] == 1
    assert found["ratio"] > 1
    assert "by latest" in (tmp_path / "run" / "report.md").read_text()
    assert whole(tmp_path / "bare", *words, "epochs=0")["pruning"]["pruned_filters"] == 264


@pytest.mark.parametrize(
    ("words", "line"),
    [
        ((), "schedule=greg: prunes a trained network, name it with pretrained=RUN_DIR"),
        (("schedule.ratio=0.5",), "schedule.ratio=0.5: must be above 1"),
        (("schedule.latest=0",), "schedule.latest=0: must be above 0"),
    ],
)
def test_what_it_cannot_do_is_said_in_a_line(
    tmp_path: Path, few: None, words: tuple[str, ...], line: str
) -> None:
    with pytest.raises(Error, match=line):
        whole(tmp_path, "schedule=greg", *words)
