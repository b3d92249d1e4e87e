"""Accuracy over any key: the right cells on one line, at the right place, or a line that helps."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from finished import a_run, seeds, summary

from fpgm.errors import Error
from fpgm.report import sweep
from fpgm.report.cells import baseline_of, cells
from fpgm.report.collect import collect
from fpgm.report.command import main, report
from fpgm.report.table import error_reduction


def swept(where: Path, key: str) -> sweep.Sweep:
    return sweep.sweep(cells(collect([where])), key)


def shape(found: sweep.Sweep) -> dict[str, list[Any]]:
    """line -> [(value, mean accuracy)]."""
    means = {
        line.name: [
            (value, round(cell.spread("accuracy", "compact_last").mean, 6))
            for value, cell in line.points
        ]
        for line in found.lines
    }
    return dict(sorted(means.items()))


def test_numbers_are_in_their_order_and_each_method_has_its_line(tmp_path: Path) -> None:
    for interval in (10, 2, 1):
        for schedule, bonus in (("soft", 0), ("frozen", 5)):
            words = ("rate=0.4", f"schedule={schedule}", f"schedule.interval={interval}")
            seeds(tmp_path, *words, top1=(80.0 + interval + bonus, 82.0 + interval + bonus))
    seeds(tmp_path, "rate=0")  # to which the key means nothing
    found = swept(tmp_path, "schedule.interval")
    assert found.numeric
    assert shape(found) == {
        "gm frozen 0.4": [(1, 87), (2, 88), (10, 96)],
        "gm soft 0.4": [(1, 82), (2, 83), (10, 91)],
    }


def test_words_are_categories_and_the_published_figure_stands_beside(tmp_path: Path) -> None:
    words = ("arch=resnet110", "rate=0.4", "optimizer.warmup_epochs=1")
    for distance in ("l2", "l1", "cosine"):
        seeds(tmp_path, *words, f"criterion.distance={distance}")
    found = swept(tmp_path, "criterion.distance")
    assert not found.numeric
    assert found.values == ("cosine", "l1", "l2")
    assert [value for value, _ in found.lines[0].points] == ["cosine", "l1", "l2"]
    header, rows = sweep.rows(found)
    assert header[:2] == ["line", "criterion.distance"]
    assert [row[4] for row in rows] == [
        (93.56, "93.56 ± 0.13"), (93.87, "93.87 ± 0.22"), (93.73, "93.73 ± 0.23"),
    ]  # fmt: skip
    assert [row[5].partition(":")[0] for row in rows] == ["not to be trusted"] * 2 + [
        "outside both spreads"
    ]


def test_group_alone_means_its_name_and_takes_its_options_along(tmp_path: Path) -> None:
    for criterion in ("gm", "l2", "mix"):
        seeds(tmp_path, "rate=0.4", f"criterion={criterion}")
    found = swept(tmp_path, "criterion")
    assert found.key == "criterion.name"
    assert [[value for value, _ in line.points] for line in found.lines] == [["gm", "l2", "mix"]]


def test_networks_of_their_own_baselines_are_one_line(tmp_path: Path) -> None:
    for arch in ("resnet20", "resnet56"):
        start = f"pretrained='outputs/arch={arch},rate=0,seed=0'"
        seeds(tmp_path, "rate=0.4", f"arch={arch}", start)
    (line,) = swept(tmp_path, "arch").lines
    assert (line.name, [value for value, _ in line.points]) == (
        "gm frozen 0.4 pretrained", ["resnet20", "resnet56"],
    )  # fmt: skip


def test_lines_that_look_alike_say_what_tells_them_apart(tmp_path: Path) -> None:
    for rate in (0.3, 0.4):
        for lr in (0.1, 0.05):
            a_run(tmp_path / f"{rate}{lr}", f"rate={rate}", f"optimizer.lr={lr}")
    names = sorted(line.name for line in swept(tmp_path, "rate").lines)
    assert names == ["gm frozen optimizer.lr=0.05", "gm frozen optimizer.lr=0.1"]


@pytest.mark.parametrize(
    ("key", "why"),
    [
        ("schedule.settle", "is the same in all runs; what varies is rate"),
        ("schedule.intervall", "no such key of these runs; what varies is rate"),
        ("seed", "no such key of these runs; what varies is rate"),
    ],
)
def test_key_that_shows_nothing_is_one_line_with_those_that_would(
    tmp_path: Path, key: str, why: str, capsys: pytest.CaptureFixture[str]
) -> None:
    seeds(tmp_path / "r", "rate=0.3")
    seeds(tmp_path / "r", "rate=0.4")
    with pytest.raises(SystemExit) as stopped:
        main([str(tmp_path / "r"), "--x", key, "--out", str(tmp_path / "out")])
    assert stopped.value.code == f"--x {key}: {why}"
    assert not (tmp_path / "out").exists()
    assert capsys.readouterr().out == ""


def test_sweep_is_in_every_file_and_a_picture_of_its_own(tmp_path: Path) -> None:
    for rate in (0.2, 0.3, 0.4):
        seeds(tmp_path, "arch=resnet20", f"rate={rate}", top1=(91 - rate, 91.2 - rate))
    text = report([tmp_path], tmp_path, "rate")
    assert f"{tmp_path}/summary.html, summary.md, summary.csv, by_rate.svg" in text
    assert "gm frozen  0.3" in text
    drawing = (tmp_path / "by_rate.svg").read_text()
    for shown in ("<svg", ">rate<", ">gm frozen<", ">published: FPGM-only<"):
        assert shown in drawing
    page = (tmp_path / "summary.html").read_text()
    assert "By rate" in page
    assert "accuracy over rate" in page
    assert "| gm frozen | 0.2 | 0,1 | 90.90 ± 0.14 |  |  |" in (tmp_path / "summary.md").read_text()


def test_error_reduction_is_as_in_fpgms_abstract(tmp_path: Path) -> None:
    a_run(tmp_path / "a", "arch=resnet110", "rate=0", top1=93.68)
    a_run(tmp_path / "b", "arch=resnet110", "rate=0.4", top1=93.85)
    table = cells(collect([tmp_path]))
    baseline, pruned = table
    assert baseline_of(pruned, table) is baseline
    assert error_reduction(pruned, baseline) == pytest.approx(2.69, abs=0.005)
    assert "+2.69 %" in report([tmp_path], tmp_path)
    assert float(summary(tmp_path)[1]["error_reduction"]) == pytest.approx(100 * 0.17 / 6.32)
    assert summary(tmp_path)[0]["error_reduction"] == ""


@pytest.mark.parametrize(
    ("words", "held"),
    [
        (("rate=0.4",), "base"),
        (("rate=0.4", "epochs=12"), None),  # trained otherwise
        (("rate=0.4", "arch=resnet56"), None),  # another network
        (("rate=0.4", "method=slimming"), None),
        (("rate=0.4", "optimizer=finetune", "pretrained=outputs/base"), "base"),
        (("rate=0.4", "epochs=0", "pretrained=outputs/base"), "base"),
        (("rate=0.4", "pretrained=outputs/other"), None),
        (("rate=0.4", "pretrained=torchvision"), None),
        (("layers=pfec_resnet56_a", "arch=resnet20", "criterion=l1"), "base"),
        (("threshold=1", "rate=0"), "base"),
        (("macs_target=0.5",), "base"),
    ],
)
def test_only_the_unpruned_run_of_the_same_training_or_that_it_began_with_is_the_baseline(
    tmp_path: Path, words: tuple[str, ...], held: str | None
) -> None:
    a_run(tmp_path / "base", "rate=0", top1=92.0)
    a_run(tmp_path / "pruned", *words, top1=91.0)
    table = cells(collect([tmp_path]))
    (pruned,) = (cell for cell in table if cell.prunes)
    found = baseline_of(pruned, table)
    assert (found.runs[0].directory.name if found else None) == held


def test_of_two_baselines_none_is_guessed(tmp_path: Path) -> None:
    start = "pretrained=torchvision"
    a_run(tmp_path / "pruned", "rate=0.4", start)
    a_run(tmp_path / "base", "rate=0", start, "epochs=0")
    (pruned,) = (cell for cell in cells(collect([tmp_path])) if cell.prunes)
    assert baseline_of(pruned, cells(collect([tmp_path]))) is not None
    a_run(tmp_path / "other", "rate=0", start, "epochs=1")
    assert baseline_of(pruned, cells(collect([tmp_path]))) is None


def test_accuracy_after_the_first_zeroing_is_a_column_where_it_is_known(tmp_path: Path) -> None:
    for seed, value in enumerate((20.0, 22.0)):
        words = ("rate=0.4", "pretrained=x", f"seed={seed}")
        a_run(tmp_path / str(seed), *words, first_zeroing=value)
    a_run(tmp_path / "scratch", "rate=0.4")
    text = report([tmp_path], tmp_path)
    assert "first zeroing %" in text
    assert "21.00 ± 1.41" in text
    known = {row["start"]: row["first_zeroing_mean"] for row in summary(tmp_path)}
    assert known == {"scratch": "", "pretrained": "21.0"}
    a_run(tmp_path / "older", "rate=0.4", "pretrained=x", "seed=2")  # of before it was measured
    assert "first zeroing %" not in report([tmp_path], tmp_path)


def test_runs_without_epochs_are_counted_and_drawn(tmp_path: Path) -> None:
    a_run(tmp_path / "a", "rate=0.4", "epochs=0", "pretrained=x", first_zeroing=20.0)
    (run,) = collect([tmp_path])
    assert run.problem is None
    report([tmp_path], tmp_path)
    assert json.loads((tmp_path / "a" / "report.json").read_text())["config"]["epochs"] == 0
    assert "<svg" in (tmp_path / "summary.html").read_text()
    with pytest.raises(Error, match="nothing varies here"):
        swept(tmp_path, "rate")
