"""fpgm-evaluate says of a checkpoint what its run has said, and of other images what is true."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from commands import report
from PIL import Image
from tasks import cut_short, whole

import fpgm
from fpgm.cli.evaluate import main
from fpgm.data import sets

TINY = ("arch=own", "arch.build=own_networks:tiny", "batch_size=256", "optimizer.lr=0.05")


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Path:
    where = tmp_path_factory.mktemp("evaluated") / "run"
    whole(where, *TINY, "epochs=3", "rate=0.3")
    return where


def said(capsys: pytest.CaptureFixture[str], *words: object) -> dict[str, Any]:
    capsys.readouterr()
    main([str(word) for word in words] + ["--json"])
    return json.loads(capsys.readouterr().out)


def refused(capsys: pytest.CaptureFixture[str], *words: object) -> str:
    with pytest.raises(SystemExit) as stop:
        main([str(word) for word in words])
    assert stop.value.code == 1
    line = capsys.readouterr().err
    assert len(line.strip().splitlines()) == 1
    return line


def test_a_finished_run_is_worth_what_its_report_says(
    done: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    result, told = said(capsys, done), report(done)
    small, full = result["rows"]
    assert (small["file"], full["file"]) == (str(done / "compact.pt"), str(done / "zeroed.pt"))
    assert small["accuracy"] == told["accuracy"]["compact_last"] > 12
    assert full["accuracy"] == told["accuracy"]["zeroed_last"]
    for row, part in ((small, "compact"), (full, "dense")):
        for key in ("macs", "params", "bytes"):
            assert row[key] == told[part][key]
    assert (result["images"], result["image"], result["notes"]) == (360, [1, 8, 8], [])
    assert said(capsys, done / "zeroed.pt")["rows"] == [full]
    main([str(done)])
    table = capsys.readouterr().out
    assert "360 test images of digits, 1x8x8" in table
    assert f"{small['accuracy']:.2f} %" in table
    assert f"{small['macs']:,}" in table


def test_a_run_that_is_cut_short_is_worth_its_last_epoch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    cut_short(tmp_path, monkeypatch, *TINY)
    (row,) = said(capsys, tmp_path)["rows"]
    with (tmp_path / "history.csv").open() as file:
        (epoch,) = csv.DictReader(file)
    assert row["file"] == str(tmp_path / "last.pt")
    assert row["accuracy"] == pytest.approx(float(epoch["accuracy_after"]))
    assert row["macs"] == fpgm.cost(fpgm.model("own_networks:tiny", 10, 1), (1, 8, 8)).macs


@pytest.fixture
def digits(tmp_path: Path) -> Path:
    """Some of the digits as files."""
    data = sets.load(torch.device("cpu"), name="digits")
    parts = {"train": (data.train_images, data.train_labels),
             "test": (data.test_images, data.test_labels)}  # fmt: skip
    for part, (images, labels) in parts.items():
        for i in range(80):
            folder = tmp_path / "digits" / part / str(int(labels[i]))
            folder.mkdir(parents=True, exist_ok=True)
            pixels = images[i, 0].numpy()
            Image.fromarray(np.stack([pixels] * 3, 2)).save(folder / f"{i}.png")
    return tmp_path / "digits"


def test_other_images_are_normalised_as_the_network_was_trained(
    digits: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = ("dataset=image_folder", f"dataset.root={digits}")
    whole(tmp_path / "run", *TINY, *folder, "batch_size=10", "rate=0")
    (row, _) = said(capsys, tmp_path / "run")["rows"]
    moved = f"dataset.root={tmp_path / 'moved'}"
    digits.rename(tmp_path / "moved")
    for path in (tmp_path / "moved" / "train").rglob("*.png"):  # whose constants are others
        Image.fromarray(np.asarray(Image.open(path)) // 8).save(path)
    assert "no such directory" in refused(capsys, tmp_path / "run")
    assert said(capsys, tmp_path / "run", moved)["rows"][0] == row
    assert said(capsys, tmp_path / "run", folder[0], moved)["rows"][0] == row
    measured = said(capsys, tmp_path / "run", moved, "dataset.mean=null", "dataset.std=null")
    assert measured["rows"][0]["accuracy"] != row["accuracy"]
    larger = said(capsys, tmp_path / "run" / "compact.pt", moved, "dataset.image_size=16")
    assert larger["image"] == [3, 16, 16]
    assert larger["rows"][0]["macs"] > 3 * row["macs"]
    assert larger["notes"] == ["images of 3x16x16, trained on 3x8x8"]


def test_what_does_not_fit_is_said_in_one_line(
    done: Path, digits: Path, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = ("dataset=image_folder", f"dataset.root={digits}")
    line = refused(capsys, done, *folder)
    assert "the network takes images of 1 channels, the data set has 3; " in line
    line = refused(capsys, done, "dataset=image_folder", f"dataset.root={images}")
    assert "tells 10 classes (0, 1, 2, ...), the data set has 2 (n01440764, n01443537); " in line
    assert "rate=0.4: give dataset=NAME and dataset.KEY=VALUE" in refused(capsys, done, "rate=0.4")
    assert "dataset.rooot: no such key, did you mean root?" in refused(
        capsys, done, "dataset.rooot=x"
    )
    assert "dataset=digit: choose one of cifar10, " in refused(capsys, done, "dataset=digit")
    assert f"{tmp_path}: no config.yaml, so it is no run" in refused(capsys, tmp_path)
    (tmp_path / "r").mkdir()
    (tmp_path / "r" / "config.yaml").write_text(yaml.safe_dump({}))
    assert "nothing is trained yet" in refused(capsys, tmp_path / "r")
    shutil.copy(done / "compact.pt", tmp_path / "alone.pt")
    assert "no config.yaml beside it; on which images?" in refused(capsys, tmp_path / "alone.pt")
    assert said(capsys, tmp_path / "alone.pt", "dataset=digits")["rows"][0]["accuracy"] > 12
    torch.save({"weight": torch.zeros(3)}, tmp_path / "plain.pt")
    assert "not written by fpgm, has no 'arch'" in refused(capsys, tmp_path / "plain.pt")


def test_classes_in_another_order_are_other_classes(
    done: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for order, what in ((slice(None, None, -1), "in another order"), (slice(None), None)):
        content = torch.load(done / "compact.pt", weights_only=True)
        names = content["preprocessing"]["classes"][order]
        content["preprocessing"]["classes"] = names if what else [f"digit {n}" for n in names]
        torch.save(content, tmp_path / "other.pt")
        if what:
            assert what in refused(capsys, tmp_path / "other.pt", "dataset=digits")
        else:
            (note,) = said(capsys, tmp_path / "other.pt", "dataset=digits")["notes"]
            assert "called 0, 1, 2, ... here, digit 0, digit 1, digit 2, ... where" in note
