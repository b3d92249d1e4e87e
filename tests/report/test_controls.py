"""A pruned network beside its controls: which those are, and what may be said."""

from __future__ import annotations

import statistics
from pathlib import Path

import pytest
from finished import a_run, summary
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from fpgm.report.cells import cells
from fpgm.report.collect import collect
from fpgm.report.command import report
from fpgm.report.controls import comparisons, interval

PRUNED = ("rate=0.4", "criterion=gm", "epochs=3", "optimizer=finetune")
CONTROL = ("rate=0.4", "criterion=random", "epochs=18", "optimizer=fast")


@pytest.fixture(autouse=True)
def no_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fpgm.report.command.html", lambda *_: "")


def runs(where: Path, name: str, words: tuple[str, ...], top1: list[float], *more: str) -> None:
    for seed, value in enumerate(top1):
        start = [f"{word}/base,seed={seed}'" for word in more]
        a_run(where / f"{name},seed={seed}", *words, *start, f"seed={seed}", top1=value)


def study(where: Path, ours: list[float], control: list[float], by_chance: list[float]) -> None:
    start = f"pretrained='{where}"
    runs(where, "base", ("rate=0", "epochs=15"), [90.0] * len(ours))
    runs(where, "gm", PRUNED, ours, start)
    random = ("rate=0.4", "criterion=random", *PRUNED[2:])
    runs(where, "random", random, by_chance, start)
    runs(where, "control", CONTROL, control)


@given(st.lists(st.floats(-5, 5), min_size=2, max_size=9))
def test_the_interval_is_students(values: list[float]) -> None:
    mean, half = interval(values)
    assert half is not None
    if statistics.stdev(values) > 1e-6:
        low, high = stats.t.interval(0.95, len(values) - 1, mean, stats.sem(values))
        assert (mean - half, mean + half) == pytest.approx((low, high))


def test_one_seed_tells_nothing(tmp_path: Path) -> None:
    study(tmp_path, [85.0], [80.0], [70.0])
    found = comparisons(cells(collect([tmp_path])))
    assert {one.words for one in found} == {"cannot tell: one seed"}


def test_each_pruned_cell_stands_beside_its_controls_in_words(tmp_path: Path) -> None:
    study(tmp_path, [85.0, 85.3, 85.2], [84.0, 84.2, 84.3], [85.1, 85.0, 85.3])
    text = report([tmp_path], tmp_path)
    found = {
        (o.cell.method.split()[0], o.against): o for o in comparisons(cells(collect([tmp_path])))
    }
    assert set(found) == {
        ("gm", "random"),
        ("gm", "from scratch (18 of 18 epochs)"),
        ("random", "from scratch (18 of 18 epochs)"),
    }
    best = found["gm", "from scratch (18 of 18 epochs)"]
    assert best.mean == pytest.approx(1.0)
    assert best.words == "better"
    assert found["gm", "random"].words == "cannot tell"
    assert best.difference in text
    assert "against the controls:" in text
    assert "## Against the controls" in (tmp_path / "summary.md").read_text()
    assert len(summary(tmp_path)) == 4


def test_what_loses_is_said_too(tmp_path: Path) -> None:
    study(tmp_path, [83.0, 83.3, 83.2], [84.0, 84.2, 84.3], [85.1, 85.0, 85.3])
    found = comparisons(cells(collect([tmp_path])))
    ours = [one for one in found if one.cell.method.startswith("gm")]
    assert [one.words for one in ours] == ["worse", "worse"]


def test_seeds_are_paired(tmp_path: Path) -> None:
    """The spread of the seeds is not that of the difference."""
    study(tmp_path, [80.0, 85.0, 90.0], [79.0, 84.1, 88.9], [70.0, 70.0, 70.0])
    found = comparisons(cells(collect([tmp_path])))
    control = next(o for o in found if o.cell.method.startswith("gm") and "scratch" in o.against)
    assert control.words == "better"


def test_other_widths_are_no_control(tmp_path: Path) -> None:
    import json

    study(tmp_path, [85.0, 85.3], [84.0, 84.2], [70.0, 70.0])
    for place in tmp_path.glob("control*/report.json"):
        content = json.loads(place.read_text())
        content["layers"][3]["kept"] = 11
        place.write_text(json.dumps(content))
    found = comparisons(cells(collect([tmp_path])))
    assert {one.against for one in found} == {"random"}


def test_times_stand_in_the_table_once_they_are_measured(tmp_path: Path) -> None:
    import json

    study(tmp_path, [85.0, 85.3], [84.0, 84.2], [70.0, 70.0])
    before = report([tmp_path], tmp_path)
    for seed, time in enumerate((5.0, 6.0)):
        times = {"dense_ms": 10.0, "compact_ms": time, "compact_int8_ms": time / 2}
        rows = [{"runtime": "onnxruntime", "batch": batch, **times} for batch in (1, 128)]
        int8 = {"compact": {"accuracy": {"float": 84.0, "int8": 83.5 + seed}}}
        place = tmp_path / f"gm,seed={seed}"
        (place / "latency.json").write_text(json.dumps({"rows": rows, "int8": int8}))
        content = json.loads((place / "report.json").read_text())
        content["compact"]["packed"] = {"file": "weights.b5", "bytes": 1000 + seed, "bits": 5}
        (place / "report.json").write_text(json.dumps(content))
    after = report([tmp_path], tmp_path)
    for column in ("time, batch 1", "int8 top-1 %", "int8 time", "packed"):
        assert column not in before
        assert column in after
    assert "84.00 ± 0.71  0.28       1,000" in after
    row = next(row for row in summary(tmp_path) if row["time_1"])
    assert float(row["time_128"]) == pytest.approx(0.55)
    assert (float(row["int8_top1"]), float(row["packed_bytes"])) == (84.0, 1000.5)
