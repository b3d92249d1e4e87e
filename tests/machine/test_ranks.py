"""Several processes are one run: same steps, same selection, one directory, and no hanging."""

from __future__ import annotations

import copy
import csv
import os
import signal
import subprocess
import sysconfig
import time
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from commands import compose, report, run, wait_for
from hypothesis import given
from hypothesis import strategies as st
from test_streamed import WORDS as STREAMED

from fpgm.config import Config
from fpgm.data.sets import load
from fpgm.errors import Error
from fpgm.machine import ranks as distributed
from fpgm.machine.ranks import Ranks, check_agreement, check_batch
from fpgm.runs.checkpoint import read
from fpgm.training.asked import asked
from fpgm.training.task import Task, prepare

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


@pytest.mark.slow
@pytest.mark.parametrize("schedule", ["gated", "fade", "iterative"])
def test_two_processes_learn_from_a_teacher_and_lose_nothing_at_the_end(
    tmp_path: Path, schedule: str
) -> None:
    base = [*DIGITS[:-1], "rate=0", "epochs=4", "optimizer=fast", "hydra.run.dir=base"]
    status, out, err = run(tmp_path, *base)
    assert status == 0, out + err
    words = ["pretrained=base", "method=distillation", f"schedule={schedule}", "epochs=3"]
    process = torchrun(tmp_path, 2, *DIGITS, *words, "optimizer=finetune")
    out, _ = process.communicate(timeout=300)
    assert process.returncode == 0, out
    found = report(tmp_path / "r")
    assert found["accuracy"]["dense"] == found["accuracy"]["zeroed_last"]
    assert found["equivalence"]["agreement"] == 1


@given(count=st.integers(0, 1000), world=st.integers(1, 9))
def test_shares_make_up_the_whole(count: int, world: int) -> None:
    shares = [range(count)[Ranks(rank, world).share(count)] for rank in range(world)]
    assert [i for share in shares for i in share] == list(range(count))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


def by_hand(config: Config, directory: Path, parts: int) -> Task:
    """An epoch in one process: each part of a batch through BatchNorm by itself, gradients
    averaged, the statistics of the first part."""
    task = prepare(config, directory)
    model, schedule = task.full.network.train(), task.schedule
    schedule.before_epoch(0)
    for images, labels in task.images.epoch(config.batch_size, seed=0):
        gradients = [torch.zeros_like(p) for p in model.parameters()]
        first = model
        for rank in reversed(range(parts)):
            part = Ranks(rank, parts).share(len(images) // parts * parts)
            first = copy.deepcopy(model)
            F.cross_entropy(first(images[part]), labels[part]).backward()
            for total, parameter in zip(gradients, first.parameters(), strict=True):
                total += parameter.grad / parts
        for parameter, total in zip(model.parameters(), gradients, strict=True):
            parameter.grad = total
        for buffer, other in zip(model.buffers(), first.buffers(), strict=True):
            buffer.copy_(other)
        schedule.after_backward()
        task.full.optimizer.step()
    return task


def test_two_processes_take_the_step_of_one_with_the_same_batch(tmp_path: Path) -> None:
    words = ["epochs=1", "batch_size=1436"]  # one step: the next ones amplify float32's last digits
    process = torchrun(tmp_path, 2, *DIGITS, *words)
    out, _ = process.communicate(timeout=300)
    assert process.returncode == 0, out
    assert out.count("epoch 1/1") == 1  # rank 0 alone speaks
    found = read(tmp_path / "r" / "last.pt")
    config = asked(compose(*DIGITS[:-1], *words))
    tasks = [by_hand(config, tmp_path / str(parts), parts) for parts in (2, 1)]
    apart = [
        max(
            float((found["model"][n] - p.detach()).abs().max())
            for n, p in task.full.network.named_parameters()
        )
        for task in tasks
    ]
    assert apart[0] < 1e-3
    assert apart[1] > 5 * apart[0]  # BatchNorm over the whole batch is something else
    schedule = found["methods"][-1]
    for name, kept in tasks[0].schedule.keep.items():
        assert torch.equal(schedule["keep"][name], kept)


@pytest.mark.slow
def test_a_batch_that_one_process_cannot_read_is_left_out_by_all(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = [*STREAMED[:-1], "hydra.run.dir=r", "dataset.on_error=skip"]
    options = compose(*STREAMED[:-1], f"dataset.root={images}")["dataset"]
    stream = load(torch.device("cpu"), **options)
    monkeypatch.setattr(stream, "_read", lambda part, batches, ranks: batches)
    first, second = stream.epoch(8, 0, Ranks(1, 2))  # of the first epoch, what rank 1 reads
    files = [path for path, _ in stream._loaders["train"].dataset._files]
    for index, _ in first[1:]:  # one is left, and BatchNorm has no variance of one
        files[index].write_bytes(b"no image")
    assert len(second) == 4
    process = torchrun(tmp_path, 2, *words)
    out, _ = process.communicate(timeout=200)
    assert process.returncode == 0, out
    assert "epoch 1/1" in out
    assert report(tmp_path / "r")["equivalence"]["agreement"] == 1


@pytest.mark.slow
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


@pytest.mark.slow
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
    with pytest.raises(Error, match=r"batch_size=128: .* for example batch_size=126"):
        check_batch(128, Ranks(0, 3))


def test_ranks_that_select_differently_are_stopped(monkeypatch: pytest.MonkeyPatch) -> None:
    def gather(found: list, own: str) -> None:
        found[:] = [own, "other"]

    monkeypatch.setattr(distributed.dist, "all_gather_object", gather)
    with pytest.raises(Error, match="rank 1 has selected other filters than rank 0"):
        check_agreement({"conv1": torch.arange(3)}, Ranks(0, 2))


def test_more_processes_than_gpus_get_a_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(Error, match=r"process 2 .* there are 1; --nproc-per-node=1"):
        distributed.join("cuda")
