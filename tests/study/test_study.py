"""What a user loses when one of these fails: a study of the network that they have, as it is."""

from __future__ import annotations

import csv
import functools
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from commands import compose
from scipy import stats
from torch import Tensor, nn
from zoo import randomised

import fpgm
from fpgm.data import sets
from fpgm.errors import Error
from fpgm.runs import checkpoint
from fpgm.study.command import main, write
from fpgm.study.examine import examine
from fpgm.study.scores import live_layers
from fpgm.study.settings import Settings
from fpgm.study.subject import Subject, find

ROOT = Path(__file__).parent.parent.parent
QUICK = {"draws": 4, "rates": (0.25, 0.5)}


@pytest.fixture(autouse=True)
def few_draws(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small layers get many networks to compare with; here as many as a test asks for."""
    monkeypatch.setattr("fpgm.study.statistics.agreement.MOST", 1)


class Two(nn.Module):
    """conv -> BatchNorm -> ReLU -> conv -> BatchNorm -> ReLU -> linear."""

    def __init__(self, norm: bool = True, widths: tuple[int, int] = (12, 10)) -> None:
        super().__init__()
        a, b = widths
        self.first = nn.Conv2d(1, a, 3, padding=1)
        self.norm1 = nn.BatchNorm2d(a) if norm else nn.Identity()
        self.second = nn.Conv2d(a, b, 3, padding=1)
        self.norm2 = nn.BatchNorm2d(b) if norm else nn.Identity()
        self.fc = nn.Linear(b, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.norm1(self.first(x)))
        return self.fc(torch.relu(self.norm2(self.second(x))).mean((2, 3)))


def two(seed: int = 0, **options) -> Two:
    torch.manual_seed(seed)
    model = randomised(Two(**options), seed)
    assert isinstance(model, Two)
    return model


@torch.no_grad()
def permuted(model: Two, seed: int) -> Two:
    """The same function with the filters of both convolutions in another order."""
    generator = torch.Generator().manual_seed(seed)
    other = Two()
    state = {name: value.clone() for name, value in model.state_dict().items()}
    for conv, norm, reader in (("first", "norm1", "second"), ("second", "norm2", "fc")):
        order = torch.randperm(len(state[f"{conv}.weight"]), generator=generator)
        for name in list(state):
            if name.startswith((f"{conv}.", f"{norm}.")) and state[name].ndim:
                state[name] = state[name][order]
        state[f"{reader}.weight"] = state[f"{reader}.weight"][:, order]
    other.load_state_dict(state)
    return other.eval()


@functools.cache
def images():
    digits = compose("dataset=digits")["dataset"]
    return sets.load(torch.device("cpu"), **digits | {"pad": 0, "flip": False})


def study(model: nn.Module, with_images: bool = False, **options) -> dict:
    subject = Subject("a test", model, images() if with_images else None)
    return examine(subject, Settings(**{**QUICK, **options}))


def same(a, b) -> None:
    """Equal up to the order in which a network adds up its channels."""
    assert type(a) is type(b)
    if isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a:
            same(a[key], b[key])
    elif isinstance(a, list):
        assert len(a) == len(b)
        for one, other in zip(a, b, strict=True):
            same(one, other)
    elif isinstance(a, float):
        assert a == pytest.approx(b, rel=1e-5, abs=1e-7)
    else:
        assert a == b


@pytest.mark.parametrize("seed", range(3))
def test_study_is_the_same_whatever_the_order_of_the_filters(seed: int) -> None:
    model = two(seed)
    other = permuted(model, seed)
    batch = next(images().tests(16))[0]
    torch.testing.assert_close(model(batch), other(batch))
    weights = {"criteria": ("l1", "l2", "gm", "fermat", "random", "bn_gamma")}
    one, two_ = study(model, **weights), study(other, **weights)
    ranks = [sorted((r["layer"], r["criterion"], r["rank"], r["score"]) for r in s.pop("ranks"))
             for s in (one, two_)]  # fmt: skip
    assert one == two_  # to the last bit
    assert ranks[0] == ranks[1]
    data = {"criteria": ("l2", "taylor", "apoz"), "batches": 3, "batch_size": 64}
    one, two_ = study(model, True, **data), study(other, True, **data)
    same(
        {k: v for k, v in one.items() if k not in ("summary", "ranks")},
        {k: two_[k] for k in one if k not in ("summary", "ranks")},
    )


def test_figures_are_scipys_on_the_scores_of_the_criteria() -> None:
    model = two(1)
    found = study(model, criteria=("l1", "gm"))
    weight = model.second.weight.detach()
    scores = [fpgm.criteria.CRITERIA[name](weight).numpy() for name in ("l1", "gm")]
    row = next(r for r in found["similarity"] if r["layer"] == "second")
    assert row["spearman"] == pytest.approx(stats.spearmanr(*scores).statistic)
    spread = next(
        r for r in found["applicability"] if (r["layer"], r["criterion"]) == ("second", "gm")
    )
    assert spread["cv"] == pytest.approx(stats.variation(scores[1]))
    keep = [fpgm.select(model, name, 0.5)["second"].tolist() for name in ("l1", "gm")]
    pruned = [set(range(10)) - set(k) for k in keep]
    jaccard = next(r for r in found["overlap"] if (r["layer"], r["rate"]) == ("second", 0.5))
    assert jaccard["jaccard"] == pytest.approx(
        len(pruned[0] & pruned[1]) / len(pruned[0] | pruned[1])
    )


@pytest.mark.parametrize("normalise", ["mean", "rank"])
def test_scale_that_all_filters_share_is_not_taken_for_the_norm(normalise: str) -> None:
    model = two(widths=(64, 64))
    with torch.no_grad():  # told apart by one filter of the second layer alone
        model.norm1.weight.fill_(1)
        model.norm2.weight.fill_(1)
        model.norm2.weight[0] = 2
    found = study(model, criteria=("l2", "bn_gamma"), rates=(0.5,), normalise=normalise)
    assert {row["scope"] for row in found["overlap"]} == {"layer", "global"}
    for row in found["overlap"]:
        assert abs(row["jaccard"] - row["jaccard_null"]) < 0.2, row  # a third by chance
    over = next(row for row in found["similarity"] if row["scope"] == "global")
    assert abs(over["spearman"]) < 0.3


def test_zero_filters_are_counted_apart_and_change_no_figure() -> None:
    model = two()
    with torch.no_grad():
        model.first.weight[[1, 5, 7]] = 0
    layers, _ = live_layers(model, ["first"])
    assert layers[0].filters == 12
    assert sorted(layers[0].order.tolist()) == [0, 2, 3, 4, 6, 8, 9, 10, 11]
    found = study(model)
    first = next(r for r in found["layers"] if r["layer"] == "first")
    assert (first["live"], first["zero"]) == (9, 3)
    alone = Two(widths=(9, 10))
    alone.load_state_dict(
        dict(alone.state_dict()) | {
            "first.weight": model.first.weight.detach()[layers[0].order.sort().values]
        }
    )  # fmt: skip
    smaller = study(alone, criteria=("fermat", "gm", "l1", "l2", "lp", "whc"))
    for table in ("similarity", "overlap", "diagnosis", "assumption"):
        pick = {"a", "b", "rate", "spearman", "spearman_null", "jaccard", "cv", "mean_chi2", "live"}
        chosen = [
            [{k: v for k, v in r.items() if k in pick} for r in s[table]
             if r["layer"] == "first"
             and {"bn_gamma", "bn_beta"}.isdisjoint((r.get("a"), r.get("b")))]
            for s in (found, smaller)
        ]  # fmt: skip
        assert chosen[0] == chosen[1]
    assert "3 that are all zero" in found["summary"][0]


def test_what_cannot_be_studied_is_named_and_the_rest_goes_on() -> None:
    found = study(two(norm=False), criteria=("l1", "l2", "bn_gamma", "taylor"))
    notes = "; ".join(found["notes"])
    assert "bn_gamma in layers without BatchNorm (first, second)" in notes
    assert "taylor (no images" in notes
    assert found["settings"]["criteria"] == ["l1", "l2"]
    narrow = study(two(widths=(3, 10)), criteria=("l1", "l2"))
    assert [row["layer"] for row in narrow["layers"]] == ["second"]
    assert narrow["left_out"] == [{"layer": "first", "reason": "3 filters"}]


def test_what_cannot_be_studied_at_all_says_why() -> None:
    model = two()
    with pytest.raises(Error, match="--criteria l3: choose from fermat, gm, l1, l2"):
        study(model, criteria=("l1", "l3"))
    with pytest.raises(Error, match="mix"):
        study(model, criteria=("mix",))
    with pytest.raises(Error, match="none of them can score"):
        study(two(norm=False), criteria=("bn_gamma",))
    with pytest.raises(Error, match=r"--criteria taylor: none of them .* \(taylor \(no images"):
        study(two(), criteria=("taylor",))
    with pytest.raises(Error, match=r"no layer to study .*3 filters"):
        study(two(widths=(3, 3)))
    with torch.no_grad():
        model.second.weight[0, 0, 0, 0] = torch.nan
    with pytest.raises(Error, match="second: 1 of its 1080 weights are nan"):
        study(model)


@pytest.mark.parametrize(
    "wrong",
    [{"rates": (1.0,)}, {"draws": 1}, {"normalise": "max"}, {"criteria": ("l1", "l1")},
     {"alpha": -1.0}, {"alpha": 0.003}, {"batches": 1}, {"min_cv": float("nan")}],
)  # fmt: skip
def test_settings_out_of_range_name_their_flag(wrong: dict) -> None:
    (key,) = wrong
    with pytest.raises(Error, match="--" + key.replace("_", "-")):
        Settings(**wrong)


def test_random_start_is_called_neither_above_nor_below_its_null() -> None:
    called = []
    for seed in range(2):
        model = find(None, "resnet20", None, None, None, seed, False).model
        found = study(model, criteria=("l1", "l2", "gm"), draws=40, rates=(0.4,), resamples=1)
        called += [row["relation"] for row in found["pairs"]]
        assert sum(bool(row["failed"]) for row in found["assumption"]) <= 2
        assert len(found["summary"]) == 10
    assert called.count("as") >= len(called) - 1


def test_correlated_filters_are_told_from_the_null() -> None:
    torch.manual_seed(0)
    model = two(widths=(64, 64))
    with torch.no_grad():  # filters of very different length: norms decide for every criterion
        model.second.weight *= torch.linspace(0.01, 3, 64)[torch.randperm(64)].view(-1, 1, 1, 1)
        model.first.weight *= torch.linspace(0.01, 3, 64)[torch.randperm(64)].view(-1, 1, 1, 1)
    found = study(model, criteria=("l1", "l2"), draws=40)
    assert found["pairs"][0]["relation"] == "above"
    assert {row["verdict"] for row in found["diagnosis"]} == {"suits a norm"}


# The command


@pytest.fixture
def run_directory(tmp_path: Path) -> Path:
    """What a run leaves for a study: its configuration, and the network at full width."""
    torch.manual_seed(0)
    model = fpgm.model("resnet20", in_channels=1)
    keep = fpgm.select(model, "gm", 0.4)
    fpgm.zero_(model, keep)
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(compose("dataset=digits", "rate=0.4")))
    arch = {"name": "resnet20", "num_classes": 10, "in_channels": 1}
    content = {"arch": arch, "keep": keep, "state_dict": model.state_dict()}
    checkpoint.write(tmp_path / "zeroed.pt", content)
    return tmp_path


def test_run_is_studied_with_all_criteria_into_files_that_agree(
    run_directory: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = "--batches 2 --batch-size 32 --draws 3 --resamples 2 --rates 0.4,0.6"
    main([str(run_directory), *flags.split()])
    out = run_directory / "study"
    found = json.loads((out / "study.json").read_text())
    assert found["schema"] == 2
    assert set(found["settings"]["criteria"]) == {
        "l1", "l2", "lp", "gm", "fermat", "taylor", "apoz", "hrank", "whc", "cpmc", "chip",
        "entropy", "group_fisher", "taylor_act", "taylor_weight",
    }  # fmt: skip
    assert any("bn_gamma (all filters of a layer have one score)" in n for n in found["notes"])
    assert sum(row["zero"] for row in found["layers"]) == 264
    assert capsys.readouterr().out.splitlines()[:10] == found["summary"]
    for name in ("similarity", "overlap", "applicability", "stability", "collapse", "assumption",
                 "diagnosis", "pairs", "criteria"):  # fmt: skip
        with open(out / f"{name}.csv", newline="") as file:
            rows = list(csv.DictReader(file))
        texts = [{k: "" if v is None else str(v) for k, v in row.items()} for row in found[name]]
        assert rows == texts, name
    page = (out / "study.html").read_text()
    assert not re.search(r'(src|href)="(?!#|data:)', page)  # nothing from elsewhere
    for name in ("layer3.2.conv2", "Jaccard", "<svg", "Bartlett", "fermat"):
        assert name in page


def test_two_pages_of_one_study_have_the_same_bytes(tmp_path: Path) -> None:
    for name in ("a", "b"):
        write(study(two(), criteria=("l1", "l2")), tmp_path / name)
    for file in ("study.json", "study.html", "similarity.csv", "ranks.csv"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()


def test_tables_of_an_earlier_study_do_not_stay_beside_the_new_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fpgm.study.drawing.html", lambda _: "")
    both = study(two(), criteria=("l1", "l2"))
    one = study(two(), criteria=("l1",))
    write(both, tmp_path)
    (tmp_path / "mine.csv").write_text("kept\n")
    before = {path.stem for path in tmp_path.glob("*.csv")}
    write(one, tmp_path)
    gone = before - {path.stem for path in tmp_path.glob("*.csv")}
    assert gone == {"similarity", "overlap", "pairs"}
    assert (tmp_path / "mine.csv").read_text() == "kept\n"


def test_plain_checkpoint_is_read_with_the_name_of_its_network(tmp_path: Path) -> None:
    torch.manual_seed(3)
    model = fpgm.model("resnet20", num_classes=7)
    torch.save(model.state_dict(), tmp_path / "plain.pt")
    found = find(tmp_path / "plain.pt", "resnet20", None, None, None, 0, True)
    assert found.images is None
    for name, value in model.state_dict().items():
        assert torch.equal(found.model.state_dict()[name], value)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ((), "give a run directory, a checkpoint, or --arch"),
        (("--arch", "resnet21"), "--arch resnet21: choose one of resnet20"),
        (("nowhere.pt",), "nowhere.pt: no such file"),
        (("plain.pt",), "name it, as in --arch"),
        (("plain.pt", "--arch", "resnet32"), "another network"),
        (("plain.pt", "--arch", "resnet20", "--weights", "torchvision"), "--weights torchvision"),
        (
            ("--arch", "resnet20", "--weights", "mine.pt"),
            "--weights mine.pt: no such run directory",
        ),
        (("--arch", "resnet20", "--weights", "torchvision"), "no network called resnet20"),
        (("--arch", "resnet20", "--data", "nowhere"), "--data nowhere: no such directory"),
        (("--arch", "resnet20", "--rates", "0.4,1.5"), "--rates 1.5"),
        (("--arch", "resnet20", "--draws", "0"), "--draws 0: must be at least 3"),
        (("--alike", "runs", "--criteria", "l1"), "--criteria: not with --alike"),
    ],
)
def test_errors_are_one_line_that_says_what_would_do(
    words: tuple[str, ...], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    torch.save(fpgm.model("resnet20").state_dict(), "plain.pt")
    with pytest.raises(SystemExit) as stopped:
        main(list(words))
    assert stopped.value.code == 1
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert said in lines[0]


def test_several_networks_become_one_table_and_what_fails_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for epoch in range(2):  # as an epoch leaves it
        torch.manual_seed(epoch)
        (tmp_path / f"run.{epoch}").mkdir()
        state = {"model": fpgm.model("resnet20").state_dict(), "history": []}
        checkpoint.write(tmp_path / f"run.{epoch}" / "last.pt", state)
    plain = fpgm.model("resnet20").state_dict()
    with torch.no_grad():
        plain["conv1.weight"].fill_(0.1)
    torch.save(plain, tmp_path / "constant.pt")
    (tmp_path / "broken.pt").write_bytes(b"none")
    files = ["run.0/last.pt", "run.1/last.pt", "constant.pt", "broken.pt"]
    words = [str(tmp_path / file) for file in files]
    flags = ["--arch", "resnet20", "--criteria", "l1,gm", "--draws", "3", "--rates", "0.4"]
    out = tmp_path / "out"
    main([*words, *flags, "--out", str(out)])
    said, errors = capsys.readouterr()
    assert "broken is left out: " in errors
    assert len(said.splitlines()) == 4
    with (out / "networks.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    names = ["last", "last-2", "constant"]
    assert [Path(row["network"].split(",")[0]).stem for row in rows] == ["last", "last", "constant"]
    page = (out / "networks.html").read_text()
    for name, row in zip(names, rows, strict=True):
        alone = json.loads((out / name / "study.json").read_text())
        assert f'href="{name}/study.html"' in page
        (pair,) = alone["pairs"]
        assert float(row["spearman"]) == pair["spearman"]
        assert int(row["tested"]) == len(alone["assumption"])
        failed = [one for one in alone["assumption"] if "variances" in one["failed"]]
        assert int(row["fail_variances"]) == len(failed)
        median = np.median([one["cv_norms"] for one in alone["assumption"]])
        assert float(row["cv_norms"]) == pytest.approx(median)
    assert [int(row["tested"]) for row in rows] == [19, 19, 18]
    assert "the assumption in conv1 (constant weights)" in "".join(alone["notes"])


@pytest.mark.parametrize("kind", ["sparse", "of two values"])
def test_weights_that_are_far_from_gaussian_are_studied_too(kind: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = two(widths=(16, 16))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 4:
                few = parameter * (torch.rand_like(parameter) > 0.9)
                parameter.copy_(few if kind == "sparse" else parameter.sign())
    found = study(model, criteria=("l1", "gm"))
    write(found, tmp_path)
    assert all("normality" in row["failed"] for row in found["assumption"])


def test_networks_that_share_no_criterion_say_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--criteria", "l1", "--draws", "3", "--out", str(tmp_path)]
    main(["--arch", "resnet20,resnet32", *flags])
    said = capsys.readouterr().out
    assert "No two criteria of the weights were compared in all networks (resnet20" in said
    with pytest.raises(SystemExit):
        main(["--arch", "resnet20,resnet32", "--criteria", "l3", "--out", str(tmp_path / "none")])
    assert "none of the networks can be studied" in capsys.readouterr().err
    assert not (tmp_path / "none").exists()


def test_weights_may_come_from_a_run(run_directory: Path) -> None:
    found = find(None, "resnet20", str(run_directory), None, None, 0, False)
    assert "conv1.weight" in found.model.state_dict()
    saved = checkpoint.read(run_directory / "zeroed.pt")["state_dict"]
    assert torch.equal(found.model.state_dict()["conv1.weight"], saved["conv1.weight"])


def test_weights_that_cannot_be_downloaded_say_what_else_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")
    monkeypatch.setenv("no_proxy", "")
    with pytest.raises(SystemExit):
        main(["--arch", "squeezenet1_1", "--weights", "torchvision"])
    said = capsys.readouterr().err.splitlines()
    assert "the download failed" in said[-1]


def test_help_answers_without_torch() -> None:
    code = (
        "import sys; sys.modules.update(dict.fromkeys(('torch', 'scipy', 'matplotlib')));"
        "sys.argv = ['fpgm-study', '--help']; import fpgm.study.__main__"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stderr
    assert "--criteria" in done.stdout


def test_grouped_and_torchvision_networks_are_studied_too() -> None:
    model = find(None, "squeezenet1_1", None, None, None, 0, False).model
    found = study(model, criteria=("l1", "gm", "bn_gamma"), draws=3)
    assert len(found["layers"]) > 20
    assert any("bn_gamma" in note for note in found["notes"])
    everything = study(two(), criteria=("l1",), layers="all")
    assert [row["layer"] for row in everything["layers"]] == ["first", "second"]
    assert np.isfinite([row["cv"] for row in everything["applicability"]]).all()
