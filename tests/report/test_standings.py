"""Methods in order: who is the best, and who cannot be told from it."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest
from finished import a_run
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from fpgm.report.cells import cells
from fpgm.report.collect import collect
from fpgm.report.command import report
from fpgm.report.standings import residual, standings

SEEDS = st.lists(st.lists(st.floats(80, 90), min_size=3, max_size=3), min_size=2, max_size=6)


@pytest.fixture(autouse=True)
def no_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fpgm.report.command.html", lambda *_: "")


def study(where: Path, **methods: list[float]) -> None:
    for name, values in methods.items():
        for seed, value in enumerate(values):
            words = ("rate=0.4", f"criterion={name}", "epochs=3", f"seed={seed}")
            a_run(where / f"{name},seed={seed}", *words, top1=value)


def places(where: Path) -> dict[str, str]:
    (found,) = standings(cells(collect([where])))
    return {one.cell.method.split()[0]: one.words for one in found}


@given(SEEDS)
def test_the_spread_is_the_residual_of_a_block_design(values: list[list[float]]) -> None:
    table = np.array(values)
    left = table - table.mean(0) - table.mean(1, keepdims=True) + table.mean()
    freedom = (len(table) - 1) * (table.shape[1] - 1)
    spread, degrees = residual([dict(enumerate(row)) for row in values])
    assert degrees == freedom
    assert spread == pytest.approx(np.sqrt((left**2).sum() / freedom), abs=1e-9)


def test_a_method_without_other_seeds_adds_nothing_to_the_spread() -> None:
    both = [{0: 80.0, 1: 81.0}, {0: 82.0, 1: 82.4}]
    assert residual([*both, {0: 70.0}]) == pytest.approx(residual(both))
    assert residual([{0: 80.0}, {0: 81.0}]) == (0.0, 0)


def test_who_is_far_behind_is_worse_and_who_is_near_cannot_be_told(tmp_path: Path) -> None:
    study(tmp_path, gm=[85.0, 85.4, 85.2], l2=[84.9, 85.5, 85.0], l1=[80.0, 80.5, 80.3], whc=[79.0])
    assert places(tmp_path) == {"gm": "best", "l2": "cannot tell", "l1": "worse", "whc": "worse"}
    text = report([tmp_path], tmp_path)
    assert "in order:" in text
    assert "## In order" in (tmp_path / "summary.md").read_text()


def test_one_seed_of_each_tells_nothing(tmp_path: Path) -> None:
    study(tmp_path, gm=[85.0], l2=[80.0], l1=[70.0])
    assert set(places(tmp_path).values()) == {"best", "cannot tell: one seed"}


def test_two_equal_differences_are_no_certainty(tmp_path: Path) -> None:
    """By itself each pair has no spread at all."""
    study(tmp_path, gm=[85.0, 86.0], l2=[84.9, 85.9], l1=[84.0, 86.0], whc=[85.3, 84.1])
    assert places(tmp_path)["l2"] == "cannot tell"


def test_who_is_told_from_the_best_is_wrong_once_in_twenty_tables() -> None:
    """Of methods that are all alike, in 300 tables."""
    from fpgm.report import standings as module

    wrong, generator = 0, np.random.default_rng(0)
    for _ in range(300):
        table = generator.standard_normal((8, 3)) + generator.standard_normal(3)
        values = [dict(enumerate(map(float, row))) for row in table]
        spread, freedom = residual(values)
        half = module._quantile(freedom, 7) * spread * np.sqrt(2 / 3)
        # One that was named before looking, against the others.
        wrong += any(
            abs(a - b) > half for a, b in itertools.product(table[1:].mean(1), [table[0].mean()])
        )
    assert stats.binom.cdf(wrong, 300, 0.05) > 0.001
    assert stats.binom.sf(wrong, 300, 0.05) > 0.001


def test_other_budgets_are_not_held_together(tmp_path: Path) -> None:
    study(tmp_path, gm=[85.0], l2=[80.0])
    a_run(tmp_path / "more", "rate=0.3", "criterion=l1", "epochs=3", top1=99.0)
    a_run(tmp_path / "longer", "rate=0.4", "criterion=l1", "epochs=9", top1=99.0)
    assert standings(cells(collect([tmp_path]))) == []
