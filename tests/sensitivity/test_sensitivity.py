"""What a user loses when one of these fails: how much of each layer may go, of a run they have."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from commands import run

import fpgm
from fpgm.criteria import CRITERIA
from fpgm.graph.groups import prunable
from fpgm.graph.trace import trace
from fpgm.sensitivity import examine as examined
from fpgm.sensitivity import probe
from fpgm.sensitivity.command import main
from fpgm.sensitivity.drawing import html
from fpgm.sensitivity.examine import Settings, examine
from fpgm.sensitivity.subject import SEEN, find

QUICK = ("--rates", "0.25,0.5", "--images", "60", "--bn-batches", "1")


def trained(where: Path, *words: str) -> Path:
    base = ("dataset=digits", "rate=0", "epochs=1", "batch_size=128", "precision=float32")
    status, _, err = run(where, *base, *words, "hydra.run.dir=base")
    assert status == 0, err
    return where / "base"


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that has held a tenth of its images out."""
    return trained(tmp_path_factory.mktemp("held"), "dataset.validation=0.1")


@pytest.fixture(scope="module")
def seen(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same as if it had held out none, and in the words of a version that knew of none."""
    copied = tmp_path_factory.mktemp("seen") / "base"
    shutil.copytree(base, copied, ignore=shutil.ignore_patterns("sensitivity"))
    config = yaml.safe_load((copied / "config.yaml").read_text())
    del config["dataset"]["validation"]
    (copied / "config.yaml").write_text(yaml.safe_dump(config))
    return copied


def called(*words: str, capsys: pytest.CaptureFixture[str]) -> tuple[int, str, str]:
    try:
        main([*words])
        status = 0
    except SystemExit as stop:
        status = int(stop.code or 0)
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def test_curves_page_and_rates_of_a_run(base: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = (str(base), "--criteria", "gm,l1", *QUICK, "--budget", "macs=0.7")
    status, out, err = called(*words, capsys=capsys)
    assert status == 0, err
    assert "of 60 training images are right with nothing pruned" in out
    assert "trained on these images" not in out
    assert "by gm (the first of --criteria)" in out
    with (base / "sensitivity" / "sensitivity.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == [
        "layer", "filters", "criterion", "rate", "pruned", "accuracy", "accuracy_bn",
    ]  # fmt: skip
    model = fpgm.load(base / "zeroed.pt")
    layers = prunable(trace(model)).layers
    assert [row["layer"] for row in rows[::6]] == list(layers)
    assert [(r["criterion"], r["rate"]) for r in rows[:6]] == [
        (name, rate) for name in ("gm", "l1") for rate in ("0.0", "0.25", "0.5")
    ]
    for row in rows:
        assert int(row["pruned"]) == int(int(row["filters"]) * float(row["rate"]) + 1e-9)
        if row["rate"] == "0.0":
            assert (row["accuracy"], row["accuracy_bn"]) == (
                rows[0]["accuracy"], rows[0]["accuracy_bn"],
            )  # fmt: skip
    page = (base / "sensitivity" / "sensitivity.html").read_text()
    assert page.count("<svg") == 2 * 2 + 1
    assert all(page.count(layer) >= 4 for layer in layers)
    made = yaml.safe_load((base / "sensitivity" / "rates.yaml").read_text())
    assert (made["arch"], made["residual"], made["criterion"]) == ("resnet20", "independent", "gm")
    assert list(made["rates"]) == list(layers)
    first = (base / "sensitivity" / "rates.yaml").read_text().splitlines()[0]
    assert first == f"# fpgm-sensitivity {' '.join(words)}"
    # And they lead, from this network, to what they say.
    keep = fpgm.select(model, "gm", rates=made["rates"])
    small, dense = (fpgm.cost(m, (1, 8, 8)).macs for m in (fpgm.compact(model, keep), model))
    assert f"{small:,} of {dense:,} MACs" in out
    assert small <= 0.7 * dense


def test_dense_accuracy_is_that_of_the_network_on_the_images_held_out(base: Path) -> None:
    subject = find(base)
    study = examine(subject, Settings(("l1",), (0.5,), bn_batches=1), "")
    batches = list(subject.images.held_out(1000))
    assert subject.images.held_out_count == 143
    with torch.inference_mode():
        right = sum((subject.model(x).argmax(1) == y).sum().item() for x, y in batches)
    assert study.rows[0].accuracy == 100 * right / 143
    assert study.rows[0].rate == study.rows[0].pruned == 0


def test_no_test_image_is_asked_and_none_that_is_held_out_is_learnt_from(
    base: Path, seen: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_tests(*_: object) -> None:
        raise AssertionError("test images were read")

    given: list[tuple[list, list]] = []

    class Noted:
        estimates = True

        def __init__(self, _: object, shown: list, training: list, __: object) -> None:
            given.append((shown, training))

        def accuracies(self, _: object) -> tuple[float, float]:
            return 90.0, 90.0

    monkeypatch.setattr(examined, "Probe", Noted)
    for directory, held in ((base, 143), (seen, int(1437 * SEEN))):
        subject = find(directory)
        monkeypatch.setattr(type(subject.images), "tests", no_tests)
        # More batches than there are images to learn from.
        examine(subject, Settings(("taylor",), (0.5,), bn_batches=100), "")
        shown, training = given[-1]
        sets = [{image.numpy().tobytes() for x, _ in part for image in x} for part in given[-1]]
        assert sum(len(y) for _, y in shown) == subject.images.held_out_count == held
        assert sum(len(y) for _, y in training) == 1437 - held
        assert not sets[0] & sets[1]
        # Normalised as the network was trained.
        saved = torch.load(directory / "zeroed.pt", weights_only=True)["preprocessing"]
        assert subject.images.preprocessing()["mean"] == saved["mean"]


def test_images_that_the_network_has_seen_are_said_to_be(
    seen: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    status, out, err = called(str(seen), *QUICK, "--out", str(tmp_path / "o"), capsys=capsys)
    assert status == 0, err
    assert "the network has been trained on these images: with dataset.validation=0.1" in out
    assert sorted(p.name for p in (tmp_path / "o").iterdir()) == [
        "sensitivity.csv", "sensitivity.html",
    ]  # fmt: skip
    assert not (seen / "sensitivity").exists()
    assert "by gm:" in out  # the run's own criterion


def test_the_order_of_the_layers_and_what_went_before_change_nothing(
    base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    subject, settings = find(base), Settings(("l1",), (0.3, 0.6), images=60, bn_batches=1)
    before = {key: value.clone() for key, value in subject.model.state_dict().items()}
    rows = examine(subject, settings, "").rows
    units = examined.units
    monkeypatch.setattr(examined, "units", lambda *given: units(*given)[::-1])
    again = examine(subject, settings, "").rows
    assert sorted(rows, key=str) == sorted(again, key=str)
    assert rows != again
    after = subject.model.state_dict()
    assert all(torch.equal(value, after[key]) for key, value in before.items())


def test_layers_decided_together_are_one_line(base: Path) -> None:
    study = examine(find(base), Settings(("l1",), (0.5,), "shared", 60, 1, 0.5, 4), "")
    assert study.table[0]["layer"] == "conv1"
    assert len(study.rows) == 2 * 10  # the stream, and the first convolution of nine blocks
    assert study.plan is not None
    kept = {name: study.filters[name] - gone for name, gone in study.plan.pruned.items()}
    assert all(count % 4 == 0 for count in kept.values())
    assert study.plan.macs <= 0.5 * study.plan.dense
    page = html(study)
    assert "lose the same channels together" in page
    assert page.count("layer3.2.conv2") >= 2  # among those together, and with its rate


@pytest.mark.parametrize("name", sorted(CRITERIA))
def test_every_criterion_can_be_asked(
    name: str, base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def constant(self: probe.Probe, keep: dict) -> tuple[float, float]:
        return (90.0, 91.0) if not keep else (80.0, 81.0)

    monkeypatch.setattr(probe.Probe, "accuracies", constant)
    study = examine(find(base), Settings((name,), (0.5,), images=60, bn_batches=1, limit=0.9), "")
    assert {row.accuracy_bn for row in study.rows} == {91.0, 81.0}
    assert study.plan is not None
    assert study.plan.macs <= 0.9 * study.plan.dense


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["--criteria", "l3"], r"criterion=l3: choose one of "),
        (["--rates", "0,0.5"], r"--rates 0,0.5: shares above 0 and below 1, for example"),
        (["--rates", "0.5,1"], r"--rates 0.5,1: shares above 0"),
        (["--rates", "a"], r"--rates a: shares above 0"),
        (["--budget", "0.5"], r"--budget 0.5: a share of the dense MACs, for example"),
        (["--budget", "macs=1.5"], r"--budget macs=1.5: a share"),
        (["--budget", "macs=half"], r"--budget macs=half: a share"),
        (["--residual", "both"], r"--residual both: choose one of independent, shared, inner"),
        (["--images", "0"], r"--images 0: must be at least 1"),
        (["--bn-batches", "0"], r"--bn-batches 0: must be at least 1"),
        (["--align", "0"], r"--align 0: must be at least 1"),
        (["--budget", "macs=0.01", *QUICK], r"--budget macs=0.01: the narrowest network costs "),
    ],
)
def test_bad_input_gets_one_line(
    words: list[str], line: str, base: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    status, out, err = called(str(base), *words, capsys=capsys)
    assert (status, out) == (1, "")
    assert err.startswith(f"fpgm-sensitivity: {line}")
    assert err.count("\n") == 1


def test_a_run_that_is_not_done_is_named(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    half = tmp_path / "half"
    half.mkdir()
    for directory, line in (
        (tmp_path / "nowhere", "no such directory; give that of a finished run"),
        (half, "no config.yaml, so it is no run directory"),
    ):
        _, _, err = called(str(directory), capsys=capsys)
        assert err == f"fpgm-sensitivity: {directory}: {line}\n"
    for name in ("config.yaml", "zeroed.pt"):
        (half / name).write_bytes((base / name).read_bytes())
    _, _, err = called(str(half), capsys=capsys)
    assert err == f"fpgm-sensitivity: {half}: that run is not done; finish it first\n"
    report = json.loads((base / "report.json").read_text())
    (half / "report.json").write_text(json.dumps(report))
    assert find(half).directory == half


def test_network_of_which_nothing_can_be_pruned_is_named(
    base: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(examined, "units", lambda *_: [])
    status, _, err = called(str(base), *QUICK, capsys=capsys)
    assert status == 1
    assert err == f"fpgm-sensitivity: {base}: no layer of this network can be pruned\n"


def test_network_of_one_layer_has_its_page(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    units = examined.units
    monkeypatch.setattr(examined, "units", lambda *given: units(*given)[:1])
    study = examine(find(base), Settings(("l1",), (0.5,), images=60, bn_batches=1, limit=0.99), "")
    assert [row.layer for row in study.rows] == ["conv1", "conv1"]
    assert html(study).count("<svg") == 3
