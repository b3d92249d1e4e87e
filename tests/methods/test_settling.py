"""When a selection is fixed: by its share, at rest, or at the latest."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tasks import Noise, cut_short, few, steps, whole
from torch import Tensor

from fpgm.methods.schedules.papers import Soft
from fpgm.pruning.settling import Settling, alike

__all__ = ["few"]  # a fixture

SETS = st.sets(st.integers(0, 9), min_size=1)


def keep(*layers: set[int]) -> dict[str, Tensor]:
    return {str(i): torch.tensor(sorted(kept)) for i, kept in enumerate(layers)}


@given(st.lists(st.tuples(SETS, SETS), min_size=1, max_size=4))
def test_alike_is_the_mean_jaccard_index(pairs: list[tuple[set[int], set[int]]]) -> None:
    expected = sum(len(a & b) / len(a | b) for a, b in pairs) / len(pairs)
    a, b = keep(*(p[0] for p in pairs)), keep(*(p[1] for p in pairs))
    assert alike(a, b) == pytest.approx(expected)
    assert alike(b, a) == pytest.approx(expected)
    assert alike(a, a) == 1


def test_it_settles_when_three_selections_were_like_both_before() -> None:
    settling = Settling("auto", 0.9, 20)
    same, other = keep({0, 1}), keep({0, 2})
    for epoch, selection in enumerate([same, other, other, other, other, other, other]):
        settling.see(epoch, selection)
        # Of the third selection on there are two before it; `other` is like both from the fourth.
        assert settling.came_to_rest == (epoch >= 5)
    assert settling.epoch == 6
    assert not settling.by(5)
    assert settling.by(6)


def test_a_set_that_comes_and_goes_is_not_at_rest() -> None:
    """Alike at distance two, not at distance one."""
    settling = Settling("auto", 0.9, 20)
    for epoch in range(12):
        settling.see(epoch, keep({0, 1 + epoch % 2}))
    assert not settling.came_to_rest
    assert settling.rest == pytest.approx((1 / 3 + 1) / 2)


def test_at_the_latest_it_is_fixed() -> None:
    settling = Settling("auto", 0.6, 5)
    assert [settling.by(epoch) for epoch in range(5)] == [False, False, False, True, True]
    assert not settling.came_to_rest


def test_a_given_share_needs_no_selections() -> None:
    assert Settling(0.5, 0.6, 4).epoch == 2
    assert Settling(1.0, 0.6, 4).epoch is None
    assert Settling(0.0, 0.6, 4).by(0)


def test_a_run_that_never_settles_says_where_it_was_fixed() -> None:
    task = Noise(epochs=5)
    steps(task, Soft(task, settle="auto", latest=0.6))
    assert len(task.warnings) == 1
    assert task.warnings[0].startswith(
        "schedule.settle=auto: the selections still change after epoch 3 ("
    )
    assert "schedule.latest" in task.warnings[0]


def test_a_run_at_rest_says_so_and_the_report_has_the_epoch(
    tmp_path: Path, few: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ("epochs=7", "schedule.settle=auto", "schedule.latest=0.9")  # frozen: nothing moves
    report = whole(tmp_path / "a", *words)
    assert report["pruning"]["settled"] == {"epoch": 5, "at_rest": True}
    assert "at rest after epoch 5" in (tmp_path / "a" / "train.log").read_text()
    cut_short(tmp_path / "b", monkeypatch, *words)
    again = whole(tmp_path / "b", *words)
    assert again["pruning"] == report["pruning"]
    assert again["accuracy"] == report["accuracy"]
