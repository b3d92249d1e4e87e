"""On a real GPU, where there is one: whole runs, compiled as CUDA graphs, and over nccl."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")

RUN = ("dataset=digits", "device=cuda", "epochs=3", "batch_size=128", "optimizer=fast")


def train(where: Path, *words: str, processes: int = 0) -> dict:
    start = [sys.executable, "-m", "fpgm.cli"]
    if processes:
        start = ["torchrun", f"--nproc_per_node={processes}", "-m", "fpgm.cli"]
    subprocess.run([*start, *RUN, *words, f"hydra.run.dir={where}"], check=True)
    return dict(json.loads((where / "report.json").read_text()))


def equal(report: dict) -> bool:
    same = report["equivalence"]
    return same["max_abs_diff"] <= 1e-5 * same["max_abs_logit"] and same["agreement"] == 1


@pytest.mark.parametrize("precision", ["float32", "bf16"])
def test_a_run_learns_and_ships_an_equal_network(tmp_path: Path, precision: str) -> None:
    report = train(tmp_path / "run", f"precision={precision}", "epochs=6")
    assert report["environment"]["device"].startswith(torch.cuda.get_device_name())
    assert report["accuracy"]["compact_last"] > 60
    assert equal(report)


@pytest.mark.parametrize(
    "words",
    [
        "schedule=soft schedule.settle=0.5",
        "schedule=gated schedule.every=3",
        "criterion=taylor criterion.batches=2 scope=global",
    ],
)
def test_schedules_and_criteria_run_there(tmp_path: Path, words: str) -> None:
    assert equal(train(tmp_path / "run", *words.split()))


def test_from_a_trained_network_with_its_teacher(tmp_path: Path) -> None:
    train(tmp_path / "base", "rate=0", "epochs=6")
    words = (f"pretrained={tmp_path}/base", "macs_target=0.5", "preset=speed")
    where = tmp_path / "run"
    start = [sys.executable, "-m", "fpgm.cli", *RUN[:-1], *words, f"hydra.run.dir={where}"]
    subprocess.run(start, check=True)
    report = json.loads((where / "report.json").read_text())
    assert equal(report)
    assert abs(report["accuracy"]["dense"] - report["accuracy"]["zeroed_last"]) < 0.2


def test_cuda_graphs_train_the_same_network(tmp_path: Path) -> None:
    eager, compiled = (
        train(tmp_path / flag, f"compile={flag}", "epochs=6") for flag in ("false", "true")
    )
    assert equal(compiled)
    assert abs(compiled["accuracy"]["compact_last"] - eager["accuracy"]["compact_last"]) < 10


def test_nccl_carries_a_run(tmp_path: Path) -> None:
    processes = min(torch.cuda.device_count(), 2)
    assert equal(train(tmp_path / "run", processes=processes))
