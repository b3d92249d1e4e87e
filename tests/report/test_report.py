"""A table that can be believed: every figure is a run's, every run is accounted for."""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import statistics
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest
import yaml
from finished import a_run, composed, seeds, summary
from hypothesis import given
from hypothesis import strategies as st

from fpgm import page
from fpgm.errors import Error
from fpgm.report import paper
from fpgm.report.cells import Spread, cells
from fpgm.report.collect import collect
from fpgm.report.command import main, report
from fpgm.report.drawing import pareto, share
from fpgm.report.table import numbers, rows, text
from fpgm.runs import grid


@pytest.fixture(autouse=True)
def pictures(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Drawn only where a test is about the page: they take seconds."""
    if not {"table", "page_of"} & set(request.fixturenames):
        monkeypatch.setattr("fpgm.report.command.html", _lines_of_the_page)


def _lines_of_the_page(*_: object) -> str:
    return ""


def test_cell_is_mean_and_sample_deviation_beside_the_papers_figure(tmp_path: Path) -> None:
    seeds(tmp_path, "arch=resnet20", "rate=0.4")
    text = report([tmp_path], tmp_path)
    (row,) = summary(tmp_path)
    assert float(row["top1_mean"]) == statistics.fmean([90.2, 90.5, 90.8])
    assert float(row["top1_std"]) == statistics.stdev([90.2, 90.5, 90.8])
    assert (row["paper_top1"], row["paper_std"]) == ("90.44", "0.2")
    assert row["verdict"] == "within both spreads"
    assert "90.50 ± 0.30" in text
    assert "+0.06" in text
    assert "90.44 ± 0.20" in text
    assert "0,1,2" in text


@given(st.lists(st.floats(0, 100), min_size=2, max_size=9))
def test_spread_is_of_a_sample(values: list[float]) -> None:
    spread = Spread.of(values)
    mean = math.fsum(values) / len(values)
    deviation = math.sqrt(math.fsum((v - mean) ** 2 for v in values) / (len(values) - 1))
    assert spread.std == pytest.approx(deviation, abs=1e-6)


def test_every_figure_of_a_row_is_the_runs_or_the_papers(tmp_path: Path) -> None:
    for seed, (top1, agreement) in enumerate([(90.2, 1.0), (90.6, 0.99999)]):
        place = a_run(tmp_path / str(seed), "rate=0.4", f"seed={seed}", top1=top1)
        content = json.loads((place / "report.json").read_text())
        content["equivalence"]["agreement"] = agreement
        content["accuracy"]["best"]["zeroed"] = 91 + 3 * seed
        (place / "report.json").write_text(json.dumps(content))
    (cell,) = cells(collect([tmp_path]))
    header, (shown,) = rows([cell])
    assert dict(zip(header, map(text, shown), strict=True)) == {
        "network": "cifar10 resnet20", "method": "gm frozen", "rate": "0.4", "start": "scratch",
        "seeds": "0,1", "top-1 %": "90.40 ± 0.28", "best %": "92.50 ± 2.12",
        "paper %": "90.44 ± 0.20", "difference": "-0.04", "verdict": "within both spreads",
        "MACs": "-54.4 %", "paper's": "-54.0 %", "same answer": "99.99 %",
    }  # fmt: skip
    row = numbers(cell)
    assert row["top1_std"] == pytest.approx(0.4 / math.sqrt(2))
    assert row["best_std"] == pytest.approx(3 / math.sqrt(2))
    assert (row["macs"], row["params"]) == (18_488_502, 124_079)
    assert (row["macs_reduction"], row["paper_macs_reduction"]) == (
        pytest.approx(54.41, abs=0.01),
        54.0,
    )
    assert (row["agreement"], row["max_abs_diff"]) == (pytest.approx(0.999995), 1e-6)


def test_published_macs_are_as_printed_or_by_the_printed_reduction() -> None:
    macs = {(p.arch, p.method, p.rate): p.macs for p in paper.published()}
    assert macs["resnet56", "FPGM-only", 0.4] == 5.94e7
    assert macs["resnet18", "FPGM-only", 0.3] == pytest.approx(0.582 * 1_814_073_344)
    assert macs["resnet18", "baseline", 0] == 1_814_073_344


def test_share_of_the_pruned_is_in_percent() -> None:
    assert share({"pruned": 264.0, "revived": 66.0}, "revived") == 25
    assert share({"pruned": 0.0, "revived": 0.0}, "revived") == 0


def test_run_with_a_cut_history_is_not_counted(tmp_path: Path) -> None:
    a_run(tmp_path / "a", "rate=0.4", epochs=199)
    (run,) = collect([tmp_path])
    assert run.problem == "its history.csv has 199 of 200 epochs"


def test_far_from_the_paper_is_said(tmp_path: Path) -> None:
    seeds(tmp_path, "arch=resnet20", "rate=0.4", top1=(80.0, 80.1, 80.2))
    report([tmp_path], tmp_path)
    assert summary(tmp_path)[0]["verdict"] == "outside both spreads"


@pytest.mark.parametrize(
    ("words", "verdict"),
    [
        (("rate=0.4", "epochs=12"), "not comparable: epochs=12 (200 there)"),
        (("rate=0.4", "optimizer.lr=0.5"), "not comparable: optimizer.lr=0.5 (0.1 there)"),
        (("rate=0.4", "tune=true"), "not comparable: tune=True (False there)"),
        (("rate=0.4", "pretrained=x"), "not comparable: pretrained=x (None there)"),
        (
            ("arch=resnet110", "rate=0.4", "optimizer.warmup_epochs=0"),
            "not comparable: optimizer.warmup_epochs=0 (1 there)",
        ),
        (
            ("rate=0.4", "optimizer.warmup_epochs=2"),
            "not comparable: optimizer.warmup_epochs=2 (0 there)",
        ),
        (
            ("arch=resnet56", "rate=0.4", "pretrained=torchvision", "optimizer=finetune_paper"),
            "not comparable: pretrained=torchvision (baseline there)",
        ),
        (
            ("rate=0.4", "optimizer.schedule=cosine"),
            "not comparable: optimizer.schedule=cosine (step there)",
        ),
        (
            ("rate=0.3", "criterion=l2", "schedule=printed"),
            "not comparable: schedule.zero_at_start=False (True there)",
        ),
        (("rate=0.4", "schedule=printed"), ""),
        (("rate=0.4", "schedule=soft"), ""),
        (("rate=0.3", "criterion=l2"), ""),
        (
            ("rate=0.4", "method=slimming"),
            "not comparable: method.slimming.strength=0.0001 (None there)",
        ),
        (
            ("arch=resnet56", "rate=0.4", "pretrained=x"),
            "not comparable: optimizer.lr=0.1 (0.01 there)",
        ),
        (
            ("method=slimming", "method.slimming.strength=1e-4", "rate=0"),
            "not comparable: method.slimming.strength=0.0001 (None there)",
        ),
        (("rate=0.3", "criterion=l2", "schedule=soft", "schedule.settle=0.6"), ""),
        (
            ("rate=0.4", "schedule.zero_at_start=false"),
            "not comparable: schedule.zero_at_start=False (True there)",
        ),
        (
            ("rate=0.4", "scope=global", "scope_norm=l2"),
            "not comparable: scope=global scope_norm=l2 (layer there)",
        ),
        (("rate=0.4", "criterion=mix"), "not to be trusted: authors: log is not correct"),
        (("rate=0.4", "residual=shared"), ""),
        (("rate=0.4", "criterion=gm", "criterion.distance=l1"), ""),
        (("rate=0.4", "dataset=digits"), ""),
        (("rate=0.37",), ""),
    ],
)
def test_only_what_the_paper_did_is_held_against_it(
    words: tuple[str, ...], verdict: str, tmp_path: Path
) -> None:
    seeds(tmp_path, *words)
    (cell,) = cells(collect([tmp_path]))
    assert cell.verdict() == verdict


IMAGENET = ("dataset=imagenet", "dataset.root=x", "optimizer=imagenet", "epochs=100",
            "batch_size=256", "arch=resnet18")  # fmt: skip


@pytest.mark.parametrize(
    ("words", "verdict"),
    [
        (("criterion=gm", "rate=0.3"), "the paper prints no spread"),
        (("criterion=mix", "rate=0.3"), ""),  # 7.5 + 22.5 %, which no table states
        (("criterion=mix", "rate=0.3", "criterion.norm_share=0.333"), "the paper prints no spread"),
        (
            ("criterion=mix", "rate=0.3", "criterion.norm_share=0.6667"),
            "the paper prints no spread",
        ),
        (("criterion=mix", "rate=0.3", "criterion.norm_share=0.33"), ""),
        (
            ("criterion=gm", "rate=0.3", "pretrained=outputs/x", "optimizer.lr=0.01"),
            "not comparable: pretrained=outputs/x (torchvision there)",
        ),
        (
            ("criterion=gm", "rate=0.3", "pretrained=torchvision", "optimizer.lr=0.01"),
            "the paper prints no spread",
        ),
        (
            ("arch=resnet101", "criterion=gm", "rate=0.3"),
            "not comparable: optimizer.lr=0.1 (0.01 there), pretrained=None (torchvision there)",
        ),
    ],
)
def test_table_2_is_held_against_runs_of_its_stated_splits_and_starts(
    words: tuple[str, ...], verdict: str, tmp_path: Path
) -> None:
    seeds(tmp_path, *IMAGENET, *words)
    (cell,) = cells(collect([tmp_path]))
    assert cell.verdict() == verdict


@pytest.mark.parametrize(
    ("share", "held"), [("0.25", True), ("0.2504", True), ("0.3333", False), ("0.5", False)]
)
def test_table_1_is_held_against_runs_of_its_stated_split(share: str, held: bool) -> None:
    words = ("arch=resnet56", "rate=0.4", "criterion=mix", f"criterion.norm_share={share}")
    assert (paper.counterpart(composed(*words)) is not None) == held


def test_bf16_is_no_recipe_of_the_papers_and_decided_by_what_was_really_used(
    tmp_path: Path,
) -> None:
    a_run(tmp_path / "a", "rate=0.4", "precision=auto", precision="bf16")
    a_run(tmp_path / "b", "rate=0.4", "seed=1", precision="float32, convolutions in TF32")
    a_run(tmp_path / "c", "rate=0.4", "seed=2", "precision=float32")
    half, full = sorted(cells(collect([tmp_path])), key=lambda cell: len(cell.runs))
    assert half.verdict() == "not comparable: precision=bf16 (float32 there)"
    assert full.seeds == (1, 2)
    assert full.verdict() == "outside both spreads"
    assert half.also == "precision=bf16"


def test_method_is_called_by_its_names_and_options_that_are_not_the_defaults(
    tmp_path: Path,
) -> None:
    rows = {
        "gm frozen": ["rate=0.4"],
        "gm distance=l1 frozen": ["rate=0.4", "criterion.distance=l1"],
        "mix norm_share=0.5 frozen": ["rate=0.4", "criterion=mix", "criterion.norm_share=0.5"],
        "gm soft settle=0.6": ["rate=0.4", "schedule=soft", "schedule.settle=0.6"],
        "gm frozen slimming shared align 8 global": [
            "rate=0.4", "method=slimming", "residual=shared", "align=8", "scope=global"],
        "gm frozen slimming strength=0.01": [
            "rate=0.4", "method=slimming", "method.slimming.strength=1e-2"],
        "baseline slimming": ["rate=0", "method=slimming"],
        "baseline": ["rate=0"],
    }  # fmt: skip
    for index, words in enumerate(rows.values()):
        a_run(tmp_path / str(index), *words)
    made = cells(collect([tmp_path]))
    assert {cell.method for cell in made} == set(rows)
    assert [cell.also for cell in made] == [""] * len(rows)
    assert [cell.prunes for cell in made] == [False, False] + [True] * 6


def test_fast_path_of_a_schedule_is_no_difference(tmp_path: Path) -> None:
    a_run(tmp_path / "a", "rate=0.4", "schedule.train_compact=false")
    a_run(tmp_path / "b", "rate=0.4", "seed=1")
    (cell,) = cells(collect([tmp_path]))
    assert (cell.method, cell.verdict()) == ("gm frozen", "outside both spreads")


def test_configuration_of_an_earlier_version_is_named(tmp_path: Path) -> None:
    place = a_run(tmp_path / "a", "rate=0.4")
    config = yaml.safe_load((place / "config.yaml").read_text())
    del config["scope"]
    (place / "config.yaml").write_text(yaml.safe_dump(config))
    (run,) = collect([tmp_path])
    assert run.problem == "cannot be read: config.yaml is not one of a run of this version"


def test_every_cell_of_table_1_that_is_ok_is_met_by_its_run() -> None:
    rows = [p for p in paper.published() if p.source == "FPGM table 1" and p.trust == "ok"]
    own = [p for p in rows if p.method in ("SFP", "FPGM-only", "FPGM-mix", "baseline")]
    assert len(own) == 4 + 15
    how = {"SFP": ("criterion=l2", "schedule=soft"), "FPGM-mix": ("criterion=mix",)}
    for row in own:
        config = composed(*how.get(row.method, ()))
        config |= {
            "arch": row.arch,
            "rate": row.rate,
            "pretrained": "x" if row.pretrained else None,
        }
        assert paper.counterpart(config) == row


def test_run_cut_off_in_the_middle_is_shown_and_never_averaged_in(tmp_path: Path) -> None:
    seeds(tmp_path, "rate=0.4", top1=(90.0, 91.0))
    a_run(tmp_path / "late", "rate=0.4", "seed=2", "epochs=200", top1=10.0, epochs=7, done=False)
    text = report([tmp_path], tmp_path)
    (row,) = summary(tmp_path)
    assert (row["seeds"], float(row["top1_mean"])) == ("0 1", 90.5)
    assert f"not counted: {tmp_path / 'late'}: cut off at epoch 7 of 200" in text
    assert "cut off at epoch 7 of 200" in (tmp_path / "summary.md").read_text()


def test_runs_that_differ_are_never_averaged_whatever_their_directories_say(tmp_path: Path) -> None:
    a_run(tmp_path / "a" / "rate=0.4,seed=0", "rate=0.4", "seed=0")
    a_run(tmp_path / "b" / "rate=0.4,seed=1", "rate=0.4", "seed=1", "optimizer.lr=0.05")
    report([tmp_path], tmp_path)
    assert [row["also"] for row in summary(tmp_path)] == ["optimizer.lr=0.05", "optimizer.lr=0.1"]


@pytest.mark.parametrize(
    ("a", "b"),
    [
        (["pretrained=o/epochs=9,rate=0,seed=0"], ["pretrained=o/epochs=1,rate=0,seed=1"]),
        (["rate=0"], ["rate=0", "method=slimming", "method.slimming.strength=1e-4"]),
        (
            ["dataset=image_folder", "dataset.root=/x/i"],
            ["dataset=image_folder", "dataset.root=/y/i"],
        ),
    ],
)
def test_runs_from_other_starts_penalties_or_images_are_never_averaged(
    a: list[str], b: list[str], tmp_path: Path
) -> None:
    quote = [[re.sub(r"pretrained=(.*)", r"pretrained='\1'", w) for w in words] for words in (a, b)]
    a_run(tmp_path / "a", "seed=0", *quote[0])
    a_run(tmp_path / "b", "seed=1", *quote[1])
    report([tmp_path], tmp_path)
    assert [row["seeds"] for row in summary(tmp_path)] in (["0", "1"], ["1", "0"])


def test_runs_that_hold_other_shares_of_images_out_are_told_apart(tmp_path: Path) -> None:
    a_run(tmp_path / "a", "seed=0", "rate=0.4")
    a_run(tmp_path / "b", "seed=1", "rate=0.4", "dataset.validation=0.1")
    older = yaml.safe_load(
        (a_run(tmp_path / "c", "seed=2", "rate=0.4") / "config.yaml").read_text()
    )
    del older["dataset"]["validation"]  # there was none: all images were trained on
    (tmp_path / "c" / "config.yaml").write_text(yaml.safe_dump(older))
    report([tmp_path], tmp_path)
    found = {row["also"]: row["seeds"] for row in summary(tmp_path)}
    assert found == {"dataset.validation=0.0": "0 2", "dataset.validation=0.1": "1"}
    (held,) = [cell for cell in cells(collect([tmp_path])) if cell.seeds == (1,)]
    assert held.deviations == ["dataset.validation=0.1 (0.0 there)"]


def test_baselines_of_several_seeds_are_one_start(tmp_path: Path) -> None:
    for seed in (0, 1):
        words = ["rate=0.4", f"seed={seed}", f"pretrained='outputs/g/rate=0,seed={seed}'"]
        a_run(tmp_path / str(seed), *words)
    report([tmp_path], tmp_path)
    assert [row["seeds"] for row in summary(tmp_path)] == ["0 1"]


@pytest.mark.parametrize(
    ("difference", "std", "verdict"),
    [
        (1.0, 2.0, "within one spread"),  # ours is wide, the paper's is 0.20
        (0.15, 0.1, "within one spread"),
        (0.15, 0.3, "within both spreads"),
        (1.0, 0.05, "outside both spreads"),
    ],
)
def test_wide_spread_of_ours_alone_does_not_reach_the_paper(
    difference: float, std: float, verdict: str, tmp_path: Path
) -> None:
    centre = 90.44 + difference
    seeds(tmp_path, "rate=0.4", top1=(centre - std, centre, centre + std))
    report([tmp_path], tmp_path)
    assert summary(tmp_path)[0]["verdict"] == verdict


def test_two_runs_of_one_seed_are_named_and_not_averaged(tmp_path: Path) -> None:
    a_run(tmp_path / "a", "rate=0.4", top1=90.0)
    a_run(tmp_path / "b", "rate=0.4", top1=92.0)
    report([tmp_path], tmp_path)
    (row,) = summary(tmp_path)
    assert row["top1_mean"] == ""
    assert re.fullmatch(r"seed 0 is there 2 times \(.*/a, .*/b\): leave one", row["problem"])


@pytest.mark.parametrize(
    ("content", "why"),
    [
        ('{"schema": 2}', "schema 2 of its report.json, this fpgm reads 1"),
        ('{"schema": 1', "its report.json is damaged"),
        ("[]", "its report.json is damaged"),
        ('{"schema": 1}', "its report.json is damaged"),
    ],
)
def test_report_that_cannot_be_read_is_named(tmp_path: Path, content: str, why: str) -> None:
    seeds(tmp_path, "rate=0.4")
    (a_run(tmp_path / "x", "rate=0.4", "seed=9") / "report.json").write_text(content)
    text = report([tmp_path], tmp_path)
    assert f"{tmp_path / 'x'}: {why}" in text
    assert summary(tmp_path)[0]["seeds"] == "0 1 2"


def test_missing_runs_are_listed_with_the_command_for_each(tmp_path: Path) -> None:
    jobs = {f"rate=0.4,seed={s}": ["rate=0.4", f"seed={s}", "experiment=e"] for s in range(3)}
    grid.remember(tmp_path, jobs)
    a_run(tmp_path / "rate=0.4,seed=0", "rate=0.4", "seed=0")
    a_run(tmp_path / "rate=0.4,seed=1", "rate=0.4", "seed=1", "epochs=9", epochs=2, done=False)
    text = report([tmp_path], tmp_path)
    assert "missing: fpgm-train experiment=e rate=0.4 seed=1   (cut off at epoch 2 of 9)" in text
    assert "missing: fpgm-train experiment=e rate=0.4 seed=2   (not started)" in text
    assert "seed=0   (" not in text


@pytest.mark.parametrize("kind", ["empty", "absent", "unwritable"])
def test_bad_places_get_one_line(
    tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "empty").mkdir()
    seeds(tmp_path / "runs", "rate=0.4", top1=(90.0,))
    (tmp_path / "file").write_text("")
    words = {
        "empty": ["empty"],
        "absent": ["absent"],
        "unwritable": ["runs", "--out", "file/there"],
    }[kind]
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stopped:
        main(words)
    assert capsys.readouterr().out == ""
    expected = {
        "empty": "empty: no runs there; each has a config.yaml",
        "absent": "absent: no such directory; give a run or a folder of runs",
        "unwritable": "file/there: Not a directory; choose another place with --out",
    }[kind]
    assert stopped.value.code == expected  # to stderr, with exit status 1


def test_a_report_needs_no_torch(tmp_path: Path) -> None:
    a_run(tmp_path / "a", "rate=0.4", top1=90.5)
    code = (
        "import sys; sys.modules['torch'] = None\n"
        f"from fpgm.report.command import main; main([{str(tmp_path)!r}])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "no spread: one seed" in done.stdout


@given(st.lists(st.tuples(st.integers(1, 30), st.integers(1, 30)), min_size=1))
def test_no_run_beats_one_on_the_front_in_both(points: list[tuple[float, float]]) -> None:
    front = pareto(points)
    assert set(front) <= set(points)
    for macs, top1 in points:
        beaten = any(m <= macs and a >= top1 and (m, a) != (macs, top1) for m, a in points)
        assert ((macs, top1) in front) == (not beaten)


class Links(HTMLParser):
    """What a page would fetch."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []
        self.ids: list[str] = []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        for key, value in attributes:
            if key in ("src", "href", "xlink:href") and not str(value).startswith("#"):
                self.found.append(f"{tag} {value}")
            if key == "id":
                self.ids.append(str(value))


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A part of table 1, with something of everything in it."""
    tmp_path = tmp_path_factory.mktemp("table")
    seeds(tmp_path, "arch=resnet20", "rate=0", top1=(92.1, 92.3))
    seeds(tmp_path, "arch=resnet20", "rate=0.4")
    seeds(tmp_path, "arch=resnet20", "rate=0.4", "criterion=mix", top1=(91.0, 90.6, 90.9))
    seeds(tmp_path, "arch=resnet20", "rate=0.3", "criterion=l2", "schedule=soft", top1=(89.0, 89.9))
    seeds(tmp_path, "arch=resnet56", "rate=0")
    a_run(tmp_path / "cut", "rate=0.4", "seed=7", "epochs=200", done=False)
    grid.remember(tmp_path, {"rate=0.4,seed=9": ["rate=0.4", "seed=9", "experiment=fpgm_table1"]})
    main([str(tmp_path)])
    return tmp_path


def test_page_is_whole_by_itself(table: Path) -> None:
    html = (table / "summary.html").read_text()
    links = Links()
    links.feed(html)
    assert links.found == []
    assert len(set(links.ids)) == len(links.ids)
    assert not re.search(r"@import|url\((?!#)", html)
    assert html.count("<svg") == 8
    for shown in (
        "13 of 15 runs done",
        "cut off at epoch",
        "experiment=fpgm_table1 rate=0.4 seed=9",
    ):
        assert shown in html
    assert '<tr class="marked"><td>cifar10 resnet20</td><td>mix frozen</td>' in html
    assert "FPGM-mix</td>" in html  # published, not run here


def test_what_runs_are_called_cannot_become_markup() -> None:
    html = page.page("<x>", "<y>", [("<z>", [page.table(["<a>"], [["<b>"]]), page.text("<c>")])])
    assert not re.search("<[xyzabc]>", html)


BROWSER = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)


@pytest.mark.skipif(BROWSER is None, reason="needs chromium")
def test_page_opens_in_a_browser_and_its_table_sorts(table: Path, tmp_path: Path) -> None:
    html = (table / "summary.html").read_text()
    click = """<script>
      const th = [...document.querySelectorAll("th")].find(t => t.textContent === "top-1 %");
      th.firstChild.click();
      const values = [...th.closest("table").tBodies[0].rows]
        .map(r => parseFloat(r.cells[th.cellIndex].dataset.value));
      document.title = JSON.stringify({values, wide: document.documentElement.scrollWidth,
        drawn: [...document.querySelectorAll("svg")].map(s => s.getBoundingClientRect().width)});
    </script>"""
    (tmp_path / "clicked.html").write_text(html.replace("</body>", click + "</body>"))
    done = subprocess.run(
        [str(BROWSER), "--headless", "--no-sandbox", "--disable-gpu", "--window-size=400,800",
         f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom", str(tmp_path / "clicked.html")],
        capture_output=True, text=True, timeout=120, env={**os.environ, "HOME": str(tmp_path)},
    )  # fmt: skip
    found = re.search(r"<title>(.*?)</title>", done.stdout)
    assert found, done.stderr
    seen = json.loads(found[1])
    assert seen["values"] == sorted(seen["values"])
    assert len(seen["values"]) == 5
    assert seen["wide"] <= 500  # chromium has no narrower window; nothing sticks out of it
    assert len(seen["drawn"]) == 8
    assert all(0 < width <= 500 for width in seen["drawn"])


def test_unreadable_config_is_named_not_fatal(tmp_path: Path) -> None:
    seeds(tmp_path, "rate=0.4")
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "config.yaml").write_text("{")
    runs = collect([tmp_path])
    (broken,) = [run for run in runs if run.problem]
    assert broken.problem.startswith("cannot be read: ")
    assert len(cells(runs)) == 1


def test_directory_given_twice_counts_once(tmp_path: Path) -> None:
    seeds(tmp_path, "rate=0.4")
    assert len(collect([tmp_path, tmp_path])) == 3
    with pytest.raises(Error):
        collect([tmp_path, tmp_path / "none"])
