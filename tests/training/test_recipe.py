"""The learning rate: the papers' steps, and torch's own curves as oracles for the others."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import compose
from hypothesis import given
from hypothesis import strategies as st
from tasks import few, made
from torch.optim.lr_scheduler import CosineAnnealingLR, LRScheduler, OneCycleLR

from fpgm.config import Optimizer
from fpgm.errors import Error
from fpgm.training import loop
from fpgm.training.asked import asked
from fpgm.training.recipe import learning_rate

__all__ = ["few"]  # a fixture

SGD: dict[str, Any] = {
    "lr": 0.1, "momentum": 0.9, "nesterov": True, "weight_decay": 5e-4, "schedule": "step",
    "milestones": [0.3, 0.6, 0.8], "gamma": 0.2, "warmup_epochs": 0, "label_smoothing": 0.0,
}  # fmt: skip


def recipe(**changes: Any) -> Optimizer:
    return Optimizer(**{**SGD, **changes})


def rates(optimizer: Optimizer, epochs: int, steps: int) -> list[float]:
    return [
        learning_rate(optimizer, e, epochs, s, steps) for e in range(epochs) for s in range(steps)
    ]


def of_torch(total: int, kind: type[LRScheduler], **options: Any) -> Iterator[float]:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], 0.1)
    schedule = kind(optimizer, **options)  # type: ignore[call-arg]
    for _ in range(total):
        yield optimizer.param_groups[0]["lr"]
        optimizer.step()
        schedule.step()


def test_learning_rate_falls_where_the_papers_let_it_fall() -> None:
    found = [learning_rate(recipe(), epoch, 200) for epoch in (0, 59, 60, 119, 120, 160, 199)]
    assert found == pytest.approx([0.1, 0.1, 0.02, 0.02, 0.004, 0.0008, 0.0008])
    warm = recipe(warmup_epochs=1)
    assert learning_rate(warm, 0, 200) == pytest.approx(0.01)
    assert learning_rate(warm, 1, 200) == pytest.approx(0.1)


@given(st.integers(1, 12), st.integers(1, 12))
def test_the_papers_steps_fall_between_epochs(epochs: int, steps: int) -> None:
    for epoch in range(epochs):
        assert len({learning_rate(recipe(), epoch, epochs, s, steps) for s in range(steps)}) == 1


@given(st.integers(1, 9), st.integers(1, 30))
def test_cosine_is_torchs(epochs: int, steps: int) -> None:
    total = epochs * steps
    theirs = of_torch(total, CosineAnnealingLR, T_max=total)
    assert rates(recipe(schedule="cosine"), epochs, steps) == pytest.approx(list(theirs), abs=1e-9)


@given(st.integers(1, 9), st.integers(5, 30))
def test_one_cycle_is_torchs_with_its_peak_at_a_quarter(epochs: int, steps: int) -> None:
    total = epochs * steps
    theirs = of_torch(total, OneCycleLR, max_lr=0.1, total_steps=total, pct_start=0.25)
    ours = rates(recipe(schedule="onecycle"), epochs, steps)
    assert ours == pytest.approx(list(theirs), abs=1e-9)


@given(st.integers(1, 4), st.integers(1, 3))
def test_one_cycle_of_a_few_steps_is_a_learning_rate_still(epochs: int, steps: int) -> None:
    assert all(0 < rate <= 0.1 for rate in rates(recipe(schedule="onecycle"), epochs, steps))


def test_a_warm_up_leads_to_the_cosine() -> None:
    found = rates(recipe(schedule="cosine", warmup_epochs=2), 4, 10)
    assert found[:20] == pytest.approx([0.1 * (0.1 + 0.9 * i / 20) for i in range(20)])
    assert found[20] == pytest.approx(0.1)
    assert all(a > b for a, b in itertools.pairwise(found[20:]))
    assert all(0 < rate <= 0.1 for rate in rates(recipe(schedule="cosine", warmup_epochs=9), 3, 2))


def test_two_warm_ups_are_one_too_many() -> None:
    with pytest.raises(Error, match=r"optimizer.warmup_epochs=1: optimizer.schedule=onecycle has"):
        asked(compose("optimizer=fast", "optimizer.warmup_epochs=1"))


def test_each_step_is_taken_at_its_own_rate(
    tmp_path: Path, few: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen, step = [], loop.step

    def watched(task: Any, inputs: Any, labels: Any) -> Any:
        seen.append(task.trained.optimizer.param_groups[0]["lr"])
        return step(task, inputs, labels)

    monkeypatch.setattr(loop, "step", watched)
    task = made(tmp_path, "optimizer=fast", "epochs=3", "rate=0.4")
    rows = [loop.one_epoch(task, epoch) for epoch in range(3)]
    expected = rates(task.config.optimizer, 3, task.steps)
    assert task.steps == 2
    assert seen == pytest.approx(expected)
    assert [row["lr"] for row in rows] == pytest.approx(expected[::2])


def test_label_smoothing_spreads_the_label(tmp_path: Path, few: None) -> None:
    outputs, labels = torch.tensor([[2.0, 0.0, -1.0]]), torch.tensor([0])
    logs = outputs.log_softmax(1)[0]
    task = made(tmp_path, "optimizer.label_smoothing=0.3")
    assert task.loss(outputs, labels) == pytest.approx(float(-0.7 * logs[0] - 0.1 * logs.sum()))
    plain = made(tmp_path)
    assert plain.loss(outputs, labels) == pytest.approx(float(-logs[0]))
