"""fpgm-compress says what it cost, and what it wrote is trained on and shipped like any run."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from commands import report, run
from tasks import whole

import fpgm
from fpgm.cli.compress import main
from fpgm.cli.evaluate import main as evaluate
from fpgm.report.command import main as report_of
from fpgm.runs import checkpoint
from fpgm.shipping.export import main as export
from fpgm.shipping.int8 import images_of
from fpgm.shipping.latency import main as latency

TINY = ("arch=own", "arch.build=own_networks:tiny", "batch_size=256", "optimizer.lr=0.05")


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Path:
    where = tmp_path_factory.mktemp("compressed") / "run"
    whole(where, *TINY, "epochs=3", "rate=0.3")
    return where


def refused(capsys: pytest.CaptureFixture[str], *words: object) -> str:
    with pytest.raises(SystemExit) as stop:
        main([str(word) for word in words])
    assert stop.value.code == 1
    line = capsys.readouterr().err
    assert len(line.strip().splitlines()) == 1
    return line


@pytest.mark.parametrize("way", ["tai", "zhang"])
def test_a_compressed_network_is_what_was_said_of_it(
    way: str, done: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    main([str(done), "--decompose", way, "--macs-target", "0.8", "--out", str(tmp_path)])
    text = capsys.readouterr().out
    said = json.loads((tmp_path / "low_rank.json").read_text())
    network, image = fpgm.load(tmp_path), (1, 8, 8)
    assert fpgm.cost(network, image).macs == said["macs"]["after"] <= 0.8 * said["macs"]["before"]
    assert said["macs"]["before"] == report(done)["compact"]["macs"]
    assert said["accuracy"]["before"] == report(done)["accuracy"]["compact_last"]
    evaluate([str(tmp_path), "--json"])
    told = json.loads(capsys.readouterr().out)["rows"]
    assert [row["accuracy"] for row in told] == [said["accuracy"]["after"]]
    assert f"{said['macs']['after']:,}" in text
    assert f"arch=compact pretrained={tmp_path}" in text


def test_it_is_trained_on_without_what_it_came_from(done: Path, tmp_path: Path) -> None:
    shutil.copytree(done, tmp_path / "run")
    main([str(tmp_path / "run"), "--decompose", "zhang", "--energy", "0.7"])
    before = json.loads((tmp_path / "run" / "zhang" / "low_rank.json").read_text())
    words = ("dataset=digits", "device=cpu", "arch=compact", "rate=0", "epochs=2", "batch_size=256")
    status, _, err = run(
        tmp_path, *words, "pretrained=run/zhang", "optimizer=finetune", "hydra.run.dir=tuned"
    )
    assert status == 0, err
    after = report(tmp_path / "tuned")
    assert after["compact"]["macs"] == before["macs"]["after"]
    shutil.rmtree(tmp_path / "run")
    network = fpgm.load(tmp_path / "tuned")
    assert fpgm.cost(network, (1, 8, 8)).macs == before["macs"]["after"]
    assert report(tmp_path / "tuned")["equivalence"]["agreement"] == 1


@pytest.mark.parametrize(
    ("words", "wanted"),
    [
        (("--energy", "1.5"), "--energy 1.5: a share above 0, at most 1, for example 0.9"),
        (("--energy", "1"), "--energy 1: no layer has so much in a rank that saves MACs; --energy"),
        (("--macs-target", "0"), "--macs-target 0: a share above 0"),
        (("--macs-target", "0.001"), "or more"),
        (("--macs-target", "1"), "below 1 it gets smaller"),
    ],
)
def test_what_cannot_be_had_is_said_and_what_can(
    words: tuple[str, ...], wanted: str, done: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert wanted in refused(capsys, done, "--decompose", "tai", *words)
    assert not (done / "tai").exists()


def test_a_run_that_is_not_there_or_not_done_is_named(
    done: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    words = ("--decompose", "tai", "--energy", "0.5")
    assert "no config.yaml" in refused(capsys, tmp_path / "none", *words)
    shutil.copytree(done, tmp_path / "half", ignore=shutil.ignore_patterns("compact.pt"))
    assert "compact.pt" in refused(capsys, tmp_path / "half", *words)


def test_another_data_set_than_the_compact_network_tells_is_refused(
    done: Path, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    status, _, err = run(
        tmp_path, "dataset=digits", "arch=compact", f"arch.run={done}", "rate=0", "epochs=1",
        "device=cpu",
    )  # fmt: skip
    assert status == 0, err
    status, _, err = run(tmp_path, "dataset=digits", "arch=compact", "rate=0", "epochs=1")
    assert status == 1
    assert "arch.run=null: which network? pretrained=RUN_DIR or arch.run=RUN_DIR" in err
    assert len(err.strip().splitlines()) == 1


def test_images_are_normalised_as_the_network_has_been_trained(done: Path, tmp_path: Path) -> None:
    shutil.copytree(done, tmp_path / "run")
    saved = checkpoint.read(tmp_path / "run" / "compact.pt")
    saved["preprocessing"] |= {"mean": [0.1], "std": [0.4]}
    checkpoint.write(tmp_path / "run" / "compact.pt", saved)
    about = images_of(tmp_path / "run").preprocessing()
    assert (about["mean"], about["std"]) == (pytest.approx([0.1]), pytest.approx([0.4]))


def test_a_run_is_not_written_over(done: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = (done / "compact.pt").read_bytes()
    words = ("--decompose", "tai", "--macs-target", "0.8", "--out")
    assert f"--out {done}: is a run" in refused(capsys, done, *words, done)
    assert "is a file; give a directory" in refused(capsys, done, *words, done / "report.md")
    assert (done / "compact.pt").read_bytes() == before


def test_a_compressed_network_is_no_run_that_was_cut_off(
    done: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(done, tmp_path / "run")
    main([str(tmp_path / "run"), "--decompose", "tai", "--macs-target", "0.8"])
    made = tmp_path / "run" / "tai"
    capsys.readouterr()
    report_of([str(tmp_path / "run")])
    assert "not counted" not in "".join(capsys.readouterr())
    for command in (export, latency):
        with pytest.raises(SystemExit):
            command([str(made)])
        assert f"fpgm-train arch=compact pretrained={made} rate=0" in capsys.readouterr().err


def test_a_baseline_of_a_compact_network_is_to_be_named(tmp_path: Path) -> None:
    words = ("dataset=digits", "arch=compact", "pretrained=baseline", "rate=0", "epochs=1")
    status, _, err = run(tmp_path, *words)
    assert status == 1
    assert "is to be named, with arch.run=RUN_DIR or with pretrained=RUN_DIR itself" in err
