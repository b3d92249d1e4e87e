"""What a user loses when one of these fails: whether similar rankings give similar networks."""

from __future__ import annotations

import csv
import itertools
import json
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from commands import CONFIGS
from finished import a_run
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

import fpgm
from fpgm.runs import checkpoint, grid
from fpgm.study.alike import follows, in_words, mantel, shared
from fpgm.study.command import main

WEIGHTS = ("l1", "l2", "gm", "fermat", "whc")
WHAT = ("Spearman and Jaccard", "overlap and |difference|", "Spearman and |difference|")
SAME = ("pretrained=base", "schedule=hard", "rate=0.4", "residual=inner", "dataset=digits")


def of_seed(where: Path, seed: int, names: tuple[str, ...], *words: str) -> None:
    """A baseline and what criteria leave of it; the accuracy follows what is kept."""
    torch.manual_seed(seed)
    model = fpgm.model("resnet20", in_channels=1)
    base = f"base,seed={seed}"
    if not (where / base).exists():
        a_run(where / base, "rate=0", "dataset=digits", f"seed={seed}", top1=91)
        write(where / base, model, {})
    for name in names:
        keep = fpgm.select(model, name, 0.4, residual="inner")
        values = {n: i % 7 for n in keep for i in keep[n].tolist()}
        top1 = 85 + sum(values.values()) / 20 + (2 if name == "random" else 0)
        place = where / ",".join([name, *words, f"seed={seed}"])
        run = a_run(place, f"criterion={name}", *SAME, *words, f"seed={seed}", top1=top1)
        config = yaml.safe_load((run / "config.yaml").read_text())
        config["pretrained"] = str(where / base)
        (run / "config.yaml").write_text(yaml.safe_dump(config))
        write(run, model, keep)
        report = json.loads((run / "report.json").read_text())
        report["layers"] = [
            {"name": n, "filters": len(m.weight), "kept": len(keep.get(n, m.weight))}
            for n, m in model.named_modules() if isinstance(m, torch.nn.Conv2d)
        ]  # fmt: skip
        (run / "report.json").write_text(json.dumps(report))


def write(run: Path, model: torch.nn.Module, keep: dict) -> None:
    arch = {"name": "resnet20", "num_classes": 10, "in_channels": 1}
    content = {"arch": arch, "keep": keep, "state_dict": model.state_dict()}
    checkpoint.write(run / "zeroed.pt", content)


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_runs_of_one_baseline_are_compared_pair_by_pair(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for seed in range(2):
        of_seed(tmp_path, seed, (*WEIGHTS, "random", "mix"))
    main([str(tmp_path), "--alike"])
    said = capsys.readouterr().out
    assert "mix (no scores of the filters, so in no ranking)" in said
    assert "random (decided by a seed: shown and not counted)" in said
    pairs = rows(tmp_path / "alike" / "pairs.csv")
    assert len(pairs) == 7 * 6 / 2
    by = {(row["a"], row["b"]): row for row in pairs}
    one = by["gm", "l2"]
    jaccards, rhos, differences = [], [], []
    for seed in range(2):
        keeps, tops = [], []
        for name in ("gm", "l2"):
            run = tmp_path / f"{name},seed={seed}"
            content = checkpoint.read(run / "zeroed.pt")
            keeps.append(content["keep"])
            tops.append(json.loads((run / "report.json").read_text())["accuracy"]["compact_last"])
        whole = {n: set(range(len(content["state_dict"][f"{n}.weight"]))) for n in keeps[0]}
        a, b = ({(n, i) for n in k for i in whole[n] - set(k[n].tolist())} for k in keeps)
        jaccards.append(len(a & b) / len(a | b))
        differences.append(tops[0] - tops[1])
        scores = [
            [fpgm.criteria.CRITERIA[name](content["state_dict"][f"{n}.weight"]) for n in whole]
            for name in ("gm", "l2")
        ]
        rhos.append(np.mean([stats.spearmanr(*s).statistic for s in zip(*scores, strict=True)]))
    assert float(one["jaccard"]) == pytest.approx(np.mean(jaccards))
    assert float(one["difference"]) == pytest.approx(np.mean(differences))
    assert float(one["std"]) == pytest.approx(np.std(differences, ddof=1))
    # The baseline is not pruned: the zero filters of none are left out.
    assert float(one["spearman"]) == pytest.approx(np.mean(rhos), abs=1e-6)
    assert by["l1", "mix"]["spearman"] == ""  # an order and no score
    assert abs(float(by["l1", "random"]["spearman"])) < 0.2
    assert float(by["l1", "random"]["jaccard"]) == pytest.approx(
        float(by["l1", "random"]["jaccard_null"]), abs=0.1
    )
    assert "7 criteria, 2 seeds: " in said
    assert "Do similar rankings prune similar filters? Yes: " in said
    assert "of 5 criteria's pairs" in said  # neither mix nor random
    page = (tmp_path / "alike" / "alike.html").read_text()
    assert "<svg" in page
    assert "Do similar sets of pruned filters end at similar accuracy?" in page


def test_rankings_over_the_network_stand_apart_from_those_by_layer(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    of_seed(tmp_path, 0, WEIGHTS[:4])
    of_seed(tmp_path, 0, WEIGHTS[:4], "scope=global")
    main([str(tmp_path), "--alike", "--out", str(tmp_path / "out")])
    found = rows(tmp_path / "out" / "pairs.csv")
    assert {row["runs"] for row in found} == {"scope=layer", "scope=global"}
    assert len(found) == 12
    by = {(row["runs"], row["a"], row["b"]): row["spearman"] for row in found}
    assert by["scope=layer", "gm", "l1"] != by["scope=global", "gm", "l1"]
    assert capsys.readouterr().out.count("no spread is known: one seed") == 2


def test_without_its_baseline_the_sets_are_compared_all_the_same(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    of_seed(tmp_path, 0, WEIGHTS)
    (tmp_path / "base,seed=0" / "zeroed.pt").unlink()
    main([str(tmp_path), "--alike"])
    said = capsys.readouterr().out
    assert "Unknown: it takes 4 criteria that have both figures" in said
    assert "the rankings of seed 0 (no baseline" in said
    assert float(rows(tmp_path / "alike" / "pairs.csv")[0]["jaccard"]) > 0


def test_too_few_runs_say_how_many_are_needed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    of_seed(tmp_path, 0, WEIGHTS[:3])
    for words, said in (
        ([str(tmp_path)], "at most 3 criteria in done runs that are alike in all else, 4 are"),
        ([], "--alike: give the folder of runs"),
        ([str(tmp_path / "none")], "no such directory"),
    ):
        with pytest.raises(SystemExit):
            main(["--alike", *words])
        (line,) = capsys.readouterr().err.splitlines()
        assert said in line


indices = st.sets(st.integers(0, 9))


@given(indices, indices, indices)
@settings(deadline=None, max_examples=50)
def test_overlap_is_that_of_all_that_two_runs_lack(a: set, b: set, c: set) -> None:
    widths = {"one": 10, "two": 10, "whole": 4}
    found, chance = shared({"one": a, "two": c}, {"one": b, "two": a}, widths)
    all_ = set(range(10))
    gone = [
        {("one", i) for i in all_ - one} | {("two", i) for i in all_ - two}
        for one, two in ((a, c), (b, a))
    ]
    either = gone[0] | gone[1]
    assert (found is None) == (not either)
    if either:
        assert found == len(gone[0] & gone[1]) / len(either)
        both = (10 - len(a)) * (10 - len(b)) / 10 + (10 - len(c)) * (10 - len(a)) / 10
        assert chance == pytest.approx(both / (len(gone[0]) + len(gone[1]) - both))


def test_likenesses_that_have_nothing_in_common_are_told_so_in_19_of_20_cases(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("fpgm.study.alike.PERMUTATIONS", 199)
    generator = np.random.default_rng(0)

    def likeness() -> np.ndarray:  # of points: pairs of one point are not independent
        points = generator.standard_normal((8, 2))
        return np.linalg.norm(points[:, None] - points, axis=-1)

    p = [mantel(likeness(), likeness(), seed)[1] for seed in range(200)]
    assert stats.kstest(p, "uniform").pvalue > 0.01
    one = likeness()
    rho, p_same = mantel(one, one + 1e-9 * likeness())
    assert rho > 0.99
    assert p_same < 0.01
    over = np.triu_indices(8, 1)
    other = likeness()
    assert mantel(one, other)[0] == pytest.approx(stats.spearmanr(one[over], other[over]).statistic)


def test_share_of_permuted_names_is_that_of_all_orders() -> None:
    generator = np.random.default_rng(2)
    over = np.triu_indices(5, 1)
    for _ in range(3):
        points, others = generator.standard_normal((2, 5, 2))
        points += 0.7 * others
        a, b = (np.linalg.norm(p[:, None] - p, axis=-1) for p in (points, others))
        every = [
            stats.spearmanr(a[over], [b[order[i], order[j]] for i, j in zip(*over, strict=True)])
            for order in itertools.permutations(range(5))
        ]
        found = np.abs([one.statistic for one in every])
        assert mantel(a, b)[1] == pytest.approx((found >= found[0] - 1e-9).mean(), abs=0.02)


def pairs(difference: float) -> list[dict]:
    """Criteria on a line: those that lie apart overlap less; their accuracies lie as far apart."""
    names = ("l1", "l2", "gm", "whc", "fermat", "bn_gamma", "bn_beta")
    return [
        {"a": a, "b": b, "spearman": 1 - (j - i) / 7, "jaccard": 0.9 - (j - i) / 9,
         "jaccard_null": 0.3, "difference": -difference * (j - i)}
        for i, a in enumerate(names) for j, b in enumerate(names) if i < j
    ]  # fmt: skip


def test_answer_in_words_is_what_the_pairs_say() -> None:
    criteria = [
        {"criterion": name, "seeds": 3, "accuracy": top1} for name, top1 in (("l1", 90), ("gm", 91))
    ]
    yes = in_words(criteria, pairs(0.1), 0.2, [])
    assert "3 seeds: gm ends highest, 91.00 %, l1 lowest, 90.00 %, one run's spread" in yes[0]
    for line, what in zip(yes[1:4], WHAT, strict=True):
        assert f"? Yes: {what}" in line
    reverse = [{**row, "difference": 1 / row["difference"]} for row in pairs(0.1)]
    assert "? No, the reverse: " in in_words(criteria, reverse, 0.2, [])[2]
    generator = np.random.default_rng(0)
    unrelated = [{**row, "difference": generator.normal()} for row in pairs(0.1)]
    assert "? Cannot be told: " in in_words(criteria, unrelated, 0.2, [])[2]
    few = [row for row in pairs(0.1) if {row["a"], row["b"]} <= {"l1", "l2", "gm"}]
    assert follows(few, "spearman", "jaccard") is None
    no_overlap = [{**row, "jaccard": None, "jaccard_null": None} for row in pairs(0.1)]
    assert in_words(criteria, no_overlap, 0.2, [])[1].endswith("pairs that differ.")
    # Nobody has figures with all others: what is missing is not taken for 0.
    some = [{**row, "spearman": None} if row["b"] in ("l2", "whc") and row["a"] in ("l1", "gm")
            else row for row in pairs(0.1) if {row["a"], row["b"]} <= {"l1", "l2", "gm", "whc"}
            ]  # fmt: skip
    assert follows(some, "spearman", "jaccard") is None
    equal = [{**row, "difference": 0.0} for row in pairs(0.1)]
    assert "? Unknown: " in in_words(criteria, equal, None, [])[2]


def test_runs_by_layer_are_those_of_the_sweep_over_methods() -> None:
    def jobs(name: str) -> set[tuple[str, ...]]:
        content = yaml.safe_load((CONFIGS / "experiment" / f"{name}.yaml").read_text())
        return set(map(tuple, grid.runs(content["hydra"]["sweeper"]["rows"])))

    own = {job for job in jobs("criteria") if "scope=global" not in job}
    assert len(own) == 41
    assert own <= jobs("methods")
