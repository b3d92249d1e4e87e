"""Runs that choose filters by BatchNorm and data, or over the whole network."""

from __future__ import annotations

import csv
import json
import signal
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from commands import compose, numbers, report, run, start, wait_for
from test_ranks import torchrun
from test_schedules import FROZEN, GM, SOFT, config
from zoo import randomised

import fpgm
from fpgm.config import Config, Criterion, Schedule
from fpgm.criteria.evidence import NEEDS, gather
from fpgm.errors import Error
from fpgm.methods.zeroing import Pruning
from fpgm.training.task import load_images, shown

DIGITS = ("dataset=digits", "epochs=2", "rate=0.4", "device=cpu", "batch_size=512")


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two epochs of every criterion that needs evidence, frozen and soft, in one sweep."""
    where = tmp_path_factory.mktemp("runs")
    names = ",".join(sorted(NEEDS))
    status, _, err = run(where, "--multirun", f"criterion={names}", "schedule=frozen,soft", *DIGITS)
    assert status == 0, err
    return where / "outputs"


def directory(runs: Path, criterion: str, schedule: str) -> Path:
    words = [*DIGITS, f"criterion={criterion}", f"schedule={schedule}"]
    return runs / ",".join(sorted(words))


@pytest.mark.parametrize("schedule", ["frozen", "soft"])
@pytest.mark.parametrize("criterion", sorted(NEEDS))
def test_criterion_trains_prunes_and_ships_an_equal_network(
    runs: Path, criterion: str, schedule: str
) -> None:
    r = report(directory(runs, criterion, schedule))
    assert r["config"]["criterion"]["name"] == criterion
    assert r["pruning"]["pruned_filters"] == 264
    assert r["equivalence"]["max_abs_diff"] <= 1e-5 * r["equivalence"]["max_abs_logit"]
    if schedule == "frozen":
        assert r["pruning"]["churn"] == [0, 0]
        assert r["accuracy"]["dense"] == r["accuracy"]["zeroed_last"]


def test_two_processes_choose_by_the_same_images_as_one(tmp_path: Path) -> None:
    words = [*DIGITS[:1], *DIGITS[2:], "epochs=1", "criterion=taylor"]
    process = torchrun(tmp_path, 2, *words, "hydra.run.dir=two")
    out, _ = process.communicate(timeout=300)
    assert process.returncode == 0, out
    # One thread, as in each of the two: at a random start gradients nearly cancel in front of a
    # BatchNorm, and the order of their sums, which follows the threads, decides close calls.
    status, _, err = run(tmp_path, *words, "hydra.run.dir=one", OMP_NUM_THREADS="1")
    assert status == 0, err
    found, alone = (
        torch.load(tmp_path / where / "last.pt", weights_only=True)["keep"]
        for where in ("two", "one")
    )
    assert {name: kept.tolist() for name, kept in found.items()} == {
        name: kept.tolist() for name, kept in alone.items()
    }


def test_the_same_images_without_augmentation_are_shown_at_every_selection() -> None:
    c = Config.of(compose(*DIGITS, "criterion=taylor", "criterion.batches=2"))
    images = load_images(c)
    first, second = (list(shown(c, images)) for _ in range(2))
    assert len(first) == 2
    known = {image.numpy().tobytes() for image in images.normalise(images.train_images)}
    for (a, own), (b, other) in zip(first, second, strict=True):
        assert torch.equal(a, b)
        assert torch.equal(own, other)
        assert {image.numpy().tobytes() for image in a} <= known


def test_killed_while_it_selects_by_data_it_ends_with_the_same_numbers(tmp_path: Path) -> None:
    words = ["dataset=digits", "epochs=3", "device=cpu", "criterion=taylor", "schedule=soft",
             "scope=global", "batch_size=512"]  # fmt: skip
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    assert run(tmp_path, *words, f"hydra.run.dir={whole}")[0] == 0
    process = start(tmp_path, *words, f"hydra.run.dir={cut}")
    wait_for((cut / "history.csv").exists, process)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    status, out, err = run(tmp_path, *words, f"hydra.run.dir={cut}")
    assert status == 0, err
    assert "resuming after epoch" in out
    assert numbers(cut) == numbers(whole)
    assert report(cut)["pruning"]["churn"][-1] > 0


@pytest.mark.parametrize(
    "words",
    [
        ("criterion=gm", "residual=shared", "align=8", "macs_target=0.4"),
        ("criterion=l2", "scope_norm=none", "floor=0.25", "rate=0.6"),
    ],
    ids=lambda words: words[0],
)
def test_one_ranking_over_the_network_is_honoured_to_the_end(
    tmp_path: Path, words: tuple[str, ...]
) -> None:
    few = ("scope=global", "hydra.run.dir=r")
    status, out, err = run(tmp_path, *DIGITS, *few, *words)
    assert status == 0, err
    r = report(tmp_path / "r")
    c = r["config"]
    layers = [layer for layer in r["layers"] if layer["name"] != "fc"]
    assert r["pruning"]["churn"] == [0, 0]
    assert r["reduction"]["paper_macs"] is None
    assert len({layer["kept"] / layer["filters"] for layer in layers}) > 1 or c["align"] > 1
    assert all(layer["kept"] >= c["floor"] * layer["filters"] for layer in layers)
    assert all(layer["kept"] % c["align"] == 0 for layer in layers)
    if c["macs_target"]:
        assert r["compact"]["macs"] <= c["macs_target"] * r["dense"]["macs"]
    at_floor = [layer["name"] for layer in layers if layer["kept"] == c["floor"] * layer["filters"]]
    if c["align"] == 1:
        assert r["pruning"]["collapsed"] == at_floor
    for text in (out, (tmp_path / "r" / "report.md").read_text()):
        assert ("pruned down to the floor" in text) == bool(r["pruning"]["collapsed"])


def trained(criterion: Criterion, schedule: Schedule, **changes) -> tuple[list[dict], Pruning]:
    """Three epochs of three steps on noise; the criterion looks at the same two batches."""
    torch.manual_seed(0)
    model = randomised(fpgm.model("resnet20"), 0).train()
    sgd = torch.optim.SGD(model.parameters(), 0.1, 0.9, weight_decay=5e-4)
    batches = [(torch.randn(8, 3, 12, 12), torch.randint(10, (8,))) for _ in range(2)]
    c = config(schedule, criterion=criterion, epochs=3, **changes)
    pruning = Pruning(model, sgd, c, (3, 12, 12), lambda: batches)
    pruning.start()
    rows = []
    for epoch in range(3):
        pruning.start_epoch()
        for _ in range(3):
            x, y = torch.randn(8, 3, 12, 12), torch.randint(10, (8,))
            sgd.zero_grad()
            F.cross_entropy(model(x), y).backward()
            pruning.after_backward(masked=schedule.name == "frozen")
            sgd.step()
        rows.append(pruning.after_epoch(epoch))
    return rows, pruning


def of(name: str, **options) -> Criterion:
    return replace(GM, name=name, distance=None, batches=2 if name != "bn_gamma" else None,
                   **options)  # fmt: skip


@pytest.mark.parametrize(
    ("name", "residual", "align", "scope"),
    [
        ("bn_gamma", "independent", 1, "layer"),
        ("bn_gamma", "independent", 8, "global"),
        ("taylor", "shared", 8, "layer"),
        ("taylor", "shared", 1, "global"),
        ("taylor", "inner", 1, "global"),
    ],
)
def test_frozen_never_changes_its_selection(
    name: str, residual: str, align: int, scope: str
) -> None:
    rows, pruning = trained(of(name), FROZEN, residual=residual, align=align, scope=scope)
    assert pruning.count > 0
    assert [row["churn"] for row in rows] == [0, 0, 0]


@pytest.mark.parametrize("name", ["taylor", "apoz", "hrank"])
def test_every_selection_looks_at_the_weights_of_its_own_epoch(name: str) -> None:
    rows, pruning = trained(of(name), SOFT)
    assert rows[0]["revived"] > 0
    assert any(row["churn"] > 0 for row in rows)
    generator = torch.Generator().manual_seed(1)
    for parameter in pruning.model.parameters():
        parameter.data += 0.3 * torch.randn(parameter.shape, generator=generator)
    found = gather(pruning.model, [name], pruning._batches())
    expected = fpgm.select(pruning.model, name, 0.4, evidence=found)
    before = pruning.keep
    pruning.after_epoch(0)
    assert {n: kept.tolist() for n, kept in pruning.keep.items()} == {
        n: kept.tolist() for n, kept in expected.items()
    }
    assert any(not torch.equal(before[n], kept) for n, kept in expected.items())


def test_slimming_adds_its_penalty_to_the_gradients_of_all_scales_and_nothing_else() -> None:
    model = randomised(fpgm.model("resnet20"), 0).train()
    sgd = torch.optim.SGD(model.parameters(), 0.1)
    c = config(FROZEN, criterion=of("bn_gamma", slimming=0.25))
    pruning = Pruning(model, sgd, c, (3, 12, 12))
    F.cross_entropy(model(torch.randn(4, 3, 12, 12)), torch.tensor([0, 1, 2, 3])).backward()
    before = {name: p.grad.clone() for name, p in model.named_parameters()}
    pruning.after_backward(masked=False)
    for name, p in model.named_parameters():
        scale = "bn" in name and name.endswith("weight")
        added = 0.25 * p.detach().sign() if scale else torch.zeros_like(p)
        torch.testing.assert_close(p.grad, before[name] + added)


def test_slimming_runs_through_and_shrinks_the_scales(runs: Path, tmp_path: Path) -> None:
    words = ("criterion=bn_gamma", "criterion.slimming=0.1", "hydra.run.dir=r")
    status, _, err = run(tmp_path, *DIGITS, *words)
    assert status == 0, err
    sums = []
    for where in (directory(runs, "bn_gamma", "frozen"), tmp_path / "r"):
        state = torch.load(where / "zeroed.pt", weights_only=True)["state_dict"]
        sums.append(sum(v.abs().sum() for k, v in state.items() if "bn" in k and "weight" in k))
    assert sums[1] < 0.95 * sums[0]


def test_network_without_batchnorm_is_refused_before_anything_is_trained() -> None:
    model = fpgm.model("resnet20")
    model.layer1[1].bn2 = torch.nn.Identity()
    sgd = torch.optim.SGD(model.parameters(), 0.1)
    with pytest.raises(Error, match=r"there is none behind layer1.1.conv2; criterion=gm"):
        Pruning(model, sgd, config(FROZEN, criterion=of("bn_gamma")), (3, 12, 12))
    Pruning(model, sgd, config(FROZEN, criterion=of("bn_gamma"), rate=0.0), (3, 12, 12))


def test_pretrained_weights_that_are_no_numbers_are_named(tmp_path: Path) -> None:
    model = fpgm.model("resnet20", in_channels=1)
    model.layer2[0].conv1.weight.data[1, 2] = torch.nan
    torch.save(model.state_dict(), tmp_path / "broken.pt")
    status, _, err = run(tmp_path, *DIGITS, "criterion=taylor", "pretrained=broken.pt")
    assert status == 1
    assert "not finite" in err.strip().splitlines()[-1]
    assert "Traceback" not in err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["criterion=taylor", "criterion.batches=null"],
            "criterion.batches=null: criterion=taylor",
        ),
        (["criterion=gm", "criterion.batches=3"], "criterion.batches=3: only taylor, apoz, hrank"),
        (["criterion=taylor", "criterion.batches=0"], "criterion.batches=0: must be at least 1"),
        (
            ["criterion=gm", "criterion.slimming=1e-4"],
            "criterion.slimming=0.0001: only criterion=bn",
        ),
        (["criterion=mix", "scope=global"], "scope=global: criterion=mix is an order of pruning"),
        (
            ["scope=global", "rate=0.95"],
            "rate=0.95: scope=global floor=0.1 leaves at most rate=0.9",
        ),
        (["scope=network"], "scope=network: choose one of layer, global"),
        (["scope_norm=max"], "scope_norm=max: choose one of none, mean, l2, rank"),
        (["floor=1"], "floor=1: must be at least 0 and below 1"),
    ],
)
def test_contradictions_are_named(words: list[str], message: str) -> None:
    with pytest.raises(Error) as caught:
        Config.of(compose(*words))
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_history_of_a_sweep_is_whole(runs: Path) -> None:
    for name in NEEDS:
        with (directory(runs, name, "soft") / "history.csv").open() as file:
            assert len(list(csv.DictReader(file))) == 2
        text = (directory(runs, name, "soft") / "report.json").read_text()
        assert json.loads(text)["pruning"]["collapsed"] == []
