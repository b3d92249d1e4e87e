"""A run directory: one owner, one configuration, nothing half written, nothing executed."""

from __future__ import annotations

import contextlib
import csv
import io
import json
import multiprocessing
import os
import pickle
import queue
import signal
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import fpgm
from fpgm.errors import CheckpointError, Error
from fpgm.runs import checkpoint
from fpgm.runs.files import uninterrupted, write_text
from fpgm.runs.run import Run

CONFIG = {"rate": 0.4, "optimizer": {"lr": 0.1}}


def state(epoch: int) -> dict:
    weights = {"w": torch.full((3,), float(epoch))}
    return {"model": weights, "optimizer": {}, "methods": [], "history": [{"epoch": epoch}]}


def test_same_directory_with_another_configuration_lists_the_differing_keys(tmp_path: Path) -> None:
    with Run(tmp_path, {"rate": 7}):
        pass  # nothing was trained: the corrected words may follow
    with Run(tmp_path, CONFIG):
        checkpoint.save_epoch(tmp_path, state(1))
    with Run(tmp_path, CONFIG):
        pass
    other = {"rate": 0.3, "optimizer": {"lr": 0.1}, "seed": 1}
    with pytest.raises(Error, match=r"rate: 0.4 -> 0.3; seed: None -> 1"), Run(tmp_path, other):
        pass


def hold(directory: Path, held: multiprocessing.Event, done: multiprocessing.Event) -> None:
    with Run(directory, CONFIG):
        held.set()
        done.wait(30)


def test_second_process_in_the_same_directory_is_refused(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    held, done = context.Event(), context.Event()
    owner = context.Process(target=hold, args=(tmp_path, held, done))
    owner.start()
    assert held.wait(60)
    with pytest.raises(Error, match=f"in use by process {owner.pid}"), Run(tmp_path, CONFIG):
        pass
    owner.kill()  # a killed owner leaves no claim behind
    owner.join()
    with Run(tmp_path, CONFIG):
        pass


def test_history_and_report_are_written_as_promised(tmp_path: Path) -> None:
    rows = [{"epoch": 1, "loss": 0.5}, {"epoch": 2, "loss": 0.25}]
    with Run(tmp_path, CONFIG) as run:
        assert run.report is None
        run.record(rows[:1])
        run.record(rows)
        result = {
            "schema": 1, "status": "done", "config": {"epochs": 2},
            "accuracy": {"compact_last": 90.0}, "compact": {"macs": 1000},
        }  # fmt: skip
        run.finish(result, "# done\n")
        assert run.report == result
    with (tmp_path / "history.csv").open() as file:
        assert list(csv.DictReader(file)) == [{k: str(v) for k, v in row.items()} for row in rows]
    assert json.loads((tmp_path / "report.json").read_text())["status"] == "done"
    assert list(tmp_path.glob("events.out.tfevents.*"))
    assert not list(tmp_path.glob("*.part"))


def test_report_is_json_that_others_can_read(tmp_path: Path) -> None:
    def refused(word: str) -> None:
        raise AssertionError(word)  # Python's own, which no other reader knows

    config = {"epochs": 2, "criterion": {"name": "lp", "p": float("inf")}}
    result = {"schema": 1, "config": config, "accuracy": {"compact_last": 90.0},
              "compact": {"macs": 1}}  # fmt: skip
    with Run(tmp_path, config) as run:
        run.finish(result, "")
    report = json.loads((tmp_path / "report.json").read_text(), parse_constant=refused)
    assert report["config"] == {"epochs": 2, "criterion": {"name": "lp", "p": "inf"}}


def test_report_of_a_newer_schema_is_not_misread(tmp_path: Path) -> None:
    with Run(tmp_path, CONFIG) as run:
        write_text(tmp_path / "report.json", '{"schema": 99}')
        with pytest.raises(Error, match="schema 99, this fpgm reads 1"):
            _ = run.report


def test_write_that_fails_leaves_the_old_file_and_no_rubbish(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_text(tmp_path / "a", "old")

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left on device") as caught:
        write_text(tmp_path / "a", "new")
    assert caught.value.filename == str(tmp_path / "a")
    assert (tmp_path / "a").read_text() == "old"
    assert os.listdir(tmp_path) == ["a"]


@pytest.fixture
def interrupts() -> Iterator[None]:
    """Ctrl-C raises, also where a shell started the tests in its background, which ignores it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def interrupted(done: list[str]) -> None:
    with uninterrupted():
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)
        done.append("all of it")


@pytest.mark.usefixtures("interrupts")
def test_ctrl_c_waits_for_the_end_of_what_must_not_be_cut() -> None:
    done: list[str] = []
    with pytest.raises(KeyboardInterrupt):
        interrupted(done)
    assert done == ["all of it"]
    with pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGINT)  # afterwards as before


def test_ctrl_c_that_a_background_job_ignores_stays_ignored() -> None:
    done: list[str] = []
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        interrupted(done)
    finally:
        signal.signal(signal.SIGINT, before)
    assert done == ["all of it"]


def test_threads_may_write_without_a_handler_of_their_own() -> None:
    done = []

    def work() -> None:
        with uninterrupted():
            done.append("all of it")

    thread = threading.Thread(target=work)
    thread.start()
    thread.join(10)
    assert done == ["all of it"]


@pytest.mark.usefixtures("interrupts")
def test_ctrl_c_inside_tensorboard_neither_hangs_nor_loses_an_epoch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Cut while the writer's queue is locked, its thread waits for ever, and the run with it."""
    right = queue.Queue._put

    def cut(self: queue.Queue, item: object) -> None:
        signal.raise_signal(signal.SIGINT)
        right(self, item)

    with Run(tmp_path, CONFIG) as run:
        run.get_ready()
        monkeypatch.setattr(queue.Queue, "_put", cut)
        with pytest.raises(KeyboardInterrupt):
            run.record([{"epoch": 1, "loss": 0.5}])
        monkeypatch.undo()
    events = EventAccumulator(str(tmp_path)).Reload()
    assert [(e.step, e.value) for e in events.Scalars("loss")] == [(1, 0.5)]


def test_truncated_checkpoint_falls_back_to_the_one_before_and_says_so(tmp_path: Path) -> None:
    for epoch in (1, 2):
        checkpoint.save_epoch(tmp_path, state(epoch))
    assert checkpoint.restore_epoch(tmp_path)[0]["history"] == [{"epoch": 2}]
    last = tmp_path / "last.pt"
    whole = last.read_bytes()
    for size in (0, 10, len(whole) // 2, len(whole) - 10):
        last.write_bytes(whole[:size])
        found, problem = checkpoint.restore_epoch(tmp_path)
        assert found["history"] == [{"epoch": 1}]
        assert "last.pt: truncated or damaged" in problem
        assert problem.endswith("going back to the epoch before")
    # Set aside: saving again must not push it over the good one.
    assert not last.exists()
    assert checkpoint.restore_epoch(tmp_path)[0]["history"] == [{"epoch": 1}]
    checkpoint.save_epoch(tmp_path, state(2))
    (tmp_path / "last.pt").write_bytes(b"")
    assert checkpoint.restore_epoch(tmp_path)[0]["history"] == [{"epoch": 1}]
    (tmp_path / "previous.pt").write_bytes(b"")
    found, problem = checkpoint.restore_epoch(tmp_path)
    assert found is None
    assert problem.endswith("starting over")


@given(st.integers(0, 2**31), st.integers(0, 255), st.booleans())
@settings(deadline=None, max_examples=150)
def test_damaged_bytes_never_cause_more_than_a_checkpoint_error(
    place: int, byte: int, legacy: bool
) -> None:
    buffer = io.BytesIO()
    torch.save(state(1), buffer, _use_new_zipfile_serialization=not legacy)
    content = bytearray(buffer.getvalue())
    content[place % len(content)] = byte
    with tempfile.NamedTemporaryFile() as file:
        file.write(content)
        file.flush()
        with contextlib.suppress(CheckpointError):
            checkpoint.read(Path(file.name))


def test_tensorboard_and_history_get_the_epochs_that_a_killed_run_had_not_written(
    tmp_path: Path,
) -> None:
    rows = [{"epoch": 1, "loss": 0.5}, {"epoch": 2, "loss": 0.25}]
    with Run(tmp_path, CONFIG) as run:
        run.record(rows[:1])
    with Run(tmp_path, CONFIG) as run:  # killed before it could record epoch 2
        run.record(rows)
    events = EventAccumulator(str(tmp_path)).Reload()
    assert [(event.step, event.value) for event in events.Scalars("loss")] == [(1, 0.5), (2, 0.25)]
    assert len((tmp_path / "history.csv").read_text().splitlines()) == 3


class Malicious:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return os.system, (f"touch {self.path}",)


@pytest.mark.parametrize("protocol", ["torch", "plain"])
def test_malicious_pickle_is_refused_and_never_executed(tmp_path: Path, protocol: str) -> None:
    trap, file = tmp_path / "executed", tmp_path / "x.pt"
    content = {"state_dict": Malicious(trap)}
    if protocol == "torch":
        torch.save(content, file)
    else:
        file.write_bytes(pickle.dumps(content))
    for load in (checkpoint.read, fpgm.load, lambda f: checkpoint.load_weights(None, f)):
        with pytest.raises(CheckpointError, match=r"refused|damaged"):
            load(file)
    assert not trap.exists()


def test_malicious_last_checkpoint_is_not_executed_either(tmp_path: Path) -> None:
    torch.save({"model": Malicious(tmp_path / "executed")}, tmp_path / "last.pt")
    found, problem = checkpoint.restore_epoch(tmp_path)
    assert found is None
    assert "refused" in problem
    assert not (tmp_path / "executed").exists()


def test_checkpoint_of_another_network_names_the_first_mismatch(tmp_path: Path) -> None:
    file = tmp_path / "x.pt"
    torch.save(fpgm.model("resnet32").state_dict(), file)
    with pytest.raises(CheckpointError, match=r"layer1.3.conv1.weight is not in this one"):
        checkpoint.load_weights(fpgm.model("resnet20"), file)
    torch.save(fpgm.model("resnet20").state_dict(), file)
    with pytest.raises(CheckpointError, match=r"it has no layer1.3.conv1.weight"):
        checkpoint.load_weights(fpgm.model("resnet32"), file)
    with pytest.raises(CheckpointError, match=r"fc.weight is \(10, 64\) there, \(100, 64\) here"):
        checkpoint.load_weights(fpgm.model("resnet20", num_classes=100), file)


def test_weights_saved_by_others_are_read(tmp_path: Path) -> None:
    theirs, ours = fpgm.model("resnet20"), fpgm.model("resnet20")
    weights = {f"module.{name}": value for name, value in theirs.state_dict().items()}
    torch.save({"epoch": 3, "state_dict": weights}, tmp_path / "x.pt")
    checkpoint.load_weights(ours, tmp_path / "x.pt")
    assert torch.equal(ours.fc.weight, theirs.fc.weight)


@pytest.mark.parametrize("content", [[1, 2], {"state_dict": [1]}, {"a": 1}, torch.zeros(2)])
def test_file_that_holds_no_weights_says_so(tmp_path: Path, content: object) -> None:
    torch.save(content, tmp_path / "x.pt")
    with pytest.raises(CheckpointError, match=r"holds (a|no) "):
        checkpoint.load_weights(fpgm.model("resnet20"), tmp_path / "x.pt")


@pytest.mark.parametrize("content", [{"a": 1}, [1, 2], torch.zeros(3)])
def test_file_that_is_no_compact_network_says_so(tmp_path: Path, content: object) -> None:
    torch.save(content, tmp_path / "x.pt")
    with pytest.raises(CheckpointError, match="not written by fpgm"):
        fpgm.load(tmp_path / "x.pt")


def test_missing_checkpoint_says_so(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no such file"):
        fpgm.load(tmp_path / "x.pt")
    with pytest.raises(CheckpointError, match="give a run directory or a checkpoint"):
        checkpoint.pretrained_file(str(tmp_path / "x.pt"))
    with pytest.raises(CheckpointError, match=r"no zeroed\.pt there"):
        checkpoint.pretrained_file(str(tmp_path))
