"""Several processes are one run: same steps, same selection, one directory, and no hanging."""

from __future__ import annotations

import copy
import csv
import os
import signal
import subprocess
import sys
import sysconfig
import time
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from test_cli import report, run, wait_for
from test_config import compose

from fpgm import distributed
from fpgm.checkpoint import read
from fpgm.config import Config
from fpgm.distributed import RankError, Ranks, check_agreement, check_batch
from fpgm.job import load_images, prepare
from fpgm.schedules import learning_rate
from fpgm.train import resume

TORCHRUN = str(Path(sysconfig.get_path("scripts")) / "torchrun")
DIGITS = ("dataset=digits", "rate=0.4", "device=cpu", "precision=float32", "hydra.run.dir=r")


def torchrun(where: Path, processes: int, *words: str) -> subprocess.Popen[str]:
    count = f"--nproc-per-node={processes}"
    return subprocess.Popen(
        [TORCHRUN, "--standalone", count, "-m", "fpgm.cli", *words],
        cwd=where, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip


def epochs_done(directory: Path) -> int:
    path = directory / "history.csv"
    return len(list(csv.DictReader(path.open()))) if path.exists() else 0


@given(count=st.integers(0, 1000), world=st.integers(1, 9))
def test_shares_make_up_the_whole(count: int, world: int) -> None:
    shares = [range(count)[Ranks(rank, world).share(count)] for rank in range(world)]
    assert [i for share in shares for i in share] == list(range(count))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_two_processes_take_the_steps_of_one_with_the_same_batch(tmp_path: Path) -> None:
    words = [*DIGITS, "epochs=1", "batch_size=256"]
    process = torchrun(tmp_path, 2, *words)
    out, _ = process.communicate(timeout=300)
    assert process.returncode == 0, out
    assert out.count("epoch 1/1") == 1  # rank 0 alone speaks
    found = read(tmp_path / "r" / "last.pt")

    # By hand: each half through BatchNorm by itself, gradients averaged, statistics of the first.
    config = Config.of(compose(*words[:-3], "epochs=1", "batch_size=256"))
    job = prepare(config, tmp_path, load_images(config), fresh=True)
    resume(job, None)
    job.start_epoch(learning_rate(config.optimizer, 0, 1))
    for images, labels in job.images.epoch(256, seed=0):
        halves = [Ranks(rank, 2).share(len(images) // 2 * 2) for rank in range(2)]
        twin = copy.deepcopy(job.model)
        job.optimizer.zero_grad()
        for network, half in zip((job.model, twin), halves, strict=True):
            F.cross_entropy(network(images[half]), labels[half]).backward()
        for own, other in zip(job.model.parameters(), twin.parameters(), strict=True):
            own.grad = (own.grad + other.grad) / 2
        job.pruning.after_backward(masked=True)
        job.optimizer.step()
    assert job.images.steps(256) == 6
    for name, value in job.model.state_dict().items():
        assert torch.allclose(found["model"][name], value, rtol=1e-3, atol=1e-4), name
    for name, kept in job.pruning.keep.items():
        assert torch.equal(found["keep"][name], kept)


def test_a_run_goes_on_with_another_number_of_processes(tmp_path: Path) -> None:
    words = [*DIGITS, "epochs=12"]
    process = torchrun(tmp_path, 2, *words)
    wait_for(lambda: epochs_done(tmp_path / "r") >= 2, process)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)
    assert not (tmp_path / "r" / "report.json").exists()
    status, out, err = run(tmp_path, *words)
    assert status == 0, err
    assert "resuming after epoch" in out + err
    assert epochs_done(tmp_path / "r") == 12
    assert report(tmp_path / "r")["accuracy"]["compact_last"] > 85
    again = torchrun(tmp_path, 2, *words)
    out, _ = again.communicate(timeout=120)
    assert again.returncode == 0
    assert "is done already" in out


def test_all_stop_within_a_minute_when_one_dies(tmp_path: Path) -> None:
    process = torchrun(tmp_path, 2, *DIGITS, "epochs=100")
    wait_for(lambda: epochs_done(tmp_path / "r") >= 1, process)
    os.kill(_rank_one(process.pid), signal.SIGKILL)
    began = time.monotonic()
    out, _ = process.communicate(timeout=90)
    assert time.monotonic() - began < 60
    assert process.returncode != 0
    assert "SIGKILL" in out or "another process is lost" in out
    assert read(tmp_path / "r" / "last.pt")["history"]  # it can go on from here


def _rank_one(parent: int) -> int:
    for path in Path("/proc").glob("[0-9]*"):
        try:
            environment = (path / "environ").read_bytes().split(b"\0")
            own = int((path / "stat").read_text().rsplit(")", 1)[1].split()[1]) == parent
        except (OSError, IndexError):
            continue
        if own and b"RANK=1" in environment:
            return int(path.name)
    raise AssertionError("no rank 1")


def test_a_batch_that_cannot_be_dealt_out_is_named() -> None:
    with pytest.raises(RankError, match=r"batch_size=128: .* for example batch_size=126"):
        check_batch(128, Ranks(0, 3))


def test_ranks_that_select_differently_are_stopped(monkeypatch: pytest.MonkeyPatch) -> None:
    def gather(found: list, own: str) -> None:
        found[:] = [own, "other"]

    monkeypatch.setattr(distributed.dist, "all_gather_object", gather)
    with pytest.raises(RankError, match="rank 1 has selected other filters than rank 0"):
        check_agreement({"conv1": torch.arange(3)}, Ranks(0, 2))


def test_nothing_of_this_is_loaded_by_one_process() -> None:
    code = "import fpgm.cli, sys; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
