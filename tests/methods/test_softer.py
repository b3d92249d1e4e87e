"""Softer pruning: what is multiplied, by what, when, and that soft is its special case."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tasks import Noise, count, steps
from torch import Tensor

from fpgm.errors import Error
from fpgm.methods.schedules.papers import Asymptotic, Soft
from fpgm.methods.schedules.softer import Softer, SofterAsymptotic, left


def weights(task: Noise) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in task.full.network.named_parameters()}


def masks(task: Noise, schedule: Any) -> dict[str, Tensor]:
    """Parameter -> (N,), True where its filter is selected."""
    found = {}
    for name, kept in schedule.keep.items():
        mask = torch.ones(len(task.full.network.get_submodule(name).weight), dtype=torch.bool)
        mask[kept] = False
        found[f"{name}.weight"] = mask
    return found


@given(st.integers(1, 200), st.floats(0, 1), st.floats(0, 30))
def test_alpha_falls_from_its_start_to_zero_as_the_formula_says(
    end: int, start: float, decay: float
) -> None:
    values = [left(t, end, start, decay) for t in range(end + 1)]
    assert values[0] == pytest.approx(start)
    assert values[-1] == 0
    assert all(a >= b for a, b in itertools.pairwise(values))
    if decay > 1e-3:  # else the quotient says nothing in float64
        for t, value in enumerate(values):
            shifted = math.exp(-decay * t / end) - math.exp(-decay)
            assert value == pytest.approx(start * shifted / (1 - math.exp(-decay)), abs=1e-12)
    assert left(1, end, start, 1e-9) == pytest.approx(left(1, end, start, 0), abs=1e-8)


@pytest.mark.parametrize("kind", [Softer, SofterAsymptotic])
@pytest.mark.parametrize("decay", [0.0, 3.0])
def test_after_each_epoch_selected_filters_are_multiplied_by_alpha_and_others_by_nothing(
    kind: type, decay: float
) -> None:
    task = Noise(epochs=4)
    schedule = kind(task, decay=decay, start=0.9)
    schedule.start()
    for epoch in range(4):
        schedule.before_epoch(epoch)
        with torch.no_grad():  # what training does, without the hands of a schedule
            for parameter in task.full.network.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
        before = weights(task)
        columns = schedule.after_epoch(epoch)
        alpha = 0.9 * (math.exp(-decay * (epoch + 1) / 4) - math.exp(-decay)) if decay else 0.0
        alpha = alpha / (1 - math.exp(-decay)) if decay else 0.9 * (1 - (epoch + 1) / 4)
        selected, after = masks(task, schedule), weights(task)
        for name, weight in after.items():
            mask = selected.get(name, torch.zeros(len(weight), dtype=torch.bool))
            torch.testing.assert_close(weight[mask], alpha * before[name][mask], rtol=1e-6, atol=0)
            assert torch.equal(weight[~mask], before[name][~mask])
        some = any(mask.any() for mask in selected.values())
        assert columns["changed"] == some
    assert count(schedule) == 264
    assert schedule.watch().revived() == 0  # all of them exactly zero


def test_before_the_first_epoch_too_they_are_multiplied_and_not_zeroed() -> None:
    task = Noise(epochs=2)
    before = weights(task)
    schedule = Softer(task, start=0.5)
    schedule.start()
    for name, mask in masks(task, schedule).items():
        assert torch.equal(weights(task)[name][mask], 0.5 * before[name][mask])
        assert torch.equal(weights(task)[name][~mask], before[name][~mask])


@pytest.mark.parametrize(("kind", "plain"), [(Softer, Soft), (SofterAsymptotic, Asymptotic)])
@pytest.mark.parametrize("settle", [1.0, 0.5])
def test_with_alpha_zero_from_the_start_it_is_soft_to_the_bit(
    kind: type, plain: type, settle: float
) -> None:
    ends, tables = [], []
    for make, options in ((kind, {"start": 0.0}), (plain, {})):
        task = Noise()
        torch.manual_seed(1)
        tables.append(steps(task, make(task, settle=settle, **options)))
        ends.append(weights(task))
    assert tables[0] == tables[1]
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[1])


def test_what_is_not_zero_counts_as_revived_as_the_last_zeroing_will_cost_it() -> None:
    task = Noise(epochs=3)
    rows = steps(task, Softer(task, settle=0.7))
    assert [row["pruned"] for row in rows] == [264, 264, 264]
    assert [row["revived"] for row in rows] == [264, 264, 264]
    task = Noise(epochs=3)
    rows = steps(task, Softer(task, settle=0.3))
    assert [row["revived"] for row in rows] == [264, 0, 0]


def test_once_settled_nothing_moves_and_the_compact_network_may_be_trained() -> None:
    task = Noise()
    schedule = Softer(task, settle=0.5)
    rows = steps(task, schedule)
    assert [schedule.still_during(epoch) for epoch in range(4)] == [False, False, True, True]
    assert [(row["revived"], row["churn"], row["changed"]) for row in rows[2:]] == [
        (0, 0, False)
    ] * 2
    assert schedule.left(2) == 0


def test_a_run_without_epochs_is_zeroed() -> None:
    schedule = Softer(Noise(epochs=0))
    schedule.start()
    assert count(schedule) == 264
    assert schedule.watch().revived() == 0


def test_options_out_of_range_and_a_rest_that_never_comes_are_refused() -> None:
    (line,) = Softer.check({"start": 1.5}, "schedule.")
    assert line.startswith("schedule.start=1.5")
    (line,) = SofterAsymptotic.check({"decay": -1}, "schedule.")
    assert line.startswith("schedule.decay=-1")
    with pytest.raises(Error, match="schedule=softer_asymptotic the rate grows"):
        SofterAsymptotic(Noise(), settle="auto")
