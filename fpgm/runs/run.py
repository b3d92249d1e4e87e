"""One run directory: claimed by one process, resumable, its result written last.

No torch at import: a run that is done prints its report at once.
"""

from __future__ import annotations

import contextlib
import csv
import importlib
import io
import json
import logging
import math
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import yaml
from filelock import FileLock, Timeout

from fpgm.errors import Error
from fpgm.keys import differences, flatten
from fpgm.runs.files import uninterrupted, write_text

log = logging.getLogger("fpgm")

SCHEMA = 1
LOW_RANK = "low_rank.json"  # beside a network that fpgm-compress has written
_ELSEWHERE = "choose another directory with hydra.run.dir= (of a sweep: hydra.sweep.dir=)"


def read_config(directory: Path) -> dict[str, Any]:
    """The configuration that a run was started with. Raises Error."""
    path = directory / "config.yaml"
    if not path.exists():
        raise Error(f"{directory}: no config.yaml, so it is no run directory")
    return dict(yaml.safe_load(path.read_text()))


def read_report(directory: Path) -> dict[str, Any] | None:
    """The result of a run, None while it is not done. Raises Error."""
    path = directory / "report.json"
    if not path.exists():
        return None
    report = json.loads(path.read_text())
    if report["schema"] != SCHEMA:
        raise Error(
            f"{path}: schema {report['schema']}, this fpgm reads {SCHEMA}; install the version "
            f"that wrote it or {_ELSEWHERE}"
        )
    return dict(report)


def require_done(directory: Path) -> None:
    """Raise Error where there is no finished run."""
    if (directory / LOW_RANK).exists():
        raise Error(
            f"{directory}: a network of fpgm-compress and no run; make it one with: fpgm-train "
            f"arch=compact pretrained={directory} rate=0 (epochs=0 leaves it as it is)"
        )
    if not (directory / "report.json").exists():
        raise Error(f"{directory}: no report.json, so that run is not done; finish it first")


def result_of(directory: Path, config: Mapping[str, Any]) -> dict[str, Any] | None:
    """What the run of just this configuration has come to, None where it is not done."""
    report = read_report(directory)
    return report if report and not differences(read_config(directory), config) else None


class Run:
    """Use as a context manager: the directory is claimed on entry and released on exit."""

    def __init__(
        self,
        directory: Path,
        config: Mapping[str, Any],
        keep_failed: bool = False,
        writes: bool = True,
    ) -> None:
        """keep_failed: leave the log of a start that failed before anything was trained; writes:
        false in all processes of the run but one, which claim and write nothing."""
        self.directory = directory
        self.config = config
        self._keep_failed = keep_failed
        self._writes = writes
        self._lock = FileLock(directory / ".lock")
        self._handlers: list[logging.Handler] = []
        self._board: Any = None

    def __enter__(self) -> Run:
        if not self._writes:
            log.setLevel(logging.ERROR)
            return self
        self.directory.mkdir(parents=True, exist_ok=True)
        self._claim()
        try:
            self._compare()
            self._start_log()
        except BaseException:
            self.__exit__(None, None, None)  # nothing is discarded: it may be another run's
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._board is not None:
            with uninterrupted():
                self._board.close()
        for handler in self._handlers:
            log.removeHandler(handler)
            handler.close()
        if error is not None and self._writes and not self._keep_failed:
            self._discard()
        self._lock.release()  # a killed process's goes with it; the file that stays does no harm

    @property
    def report(self) -> dict[str, Any] | None:
        """The result, None while the run is not done."""
        return read_report(self.directory) if self._writes else None

    def get_ready(self) -> None:
        """Import what `record` needs now: Ctrl-C in the middle of TensorBoard's imports is not
        always seen as what it is."""
        importlib.import_module("torch.utils.tensorboard")

    # An interrupt inside TensorBoard's queue leaves its thread waiting, and close() with it.
    @uninterrupted()
    def record(
        self,
        history: Sequence[Mapping[str, Any]],
        scores: Mapping[str, Any] | None = None,
        columns: Sequence[str] = (),
    ) -> None:
        """Write all epochs to history.csv and the last of them to TensorBoard. Raises OSError.

        scores: layer -> (N,), what the filters were selected by after the last epoch; columns: of
        history.csv where there is no epoch.
        """
        text = io.StringIO()
        writer = csv.DictWriter(text, fieldnames=list(history[0]) if history else columns)
        writer.writeheader()
        writer.writerows(history)
        write_text(self.directory / "history.csv", text.getvalue())
        row = history[-1] if history else {"epoch": 0}
        if self._board is None:
            from torch.utils.tensorboard import SummaryWriter

            # A killed run may have written this epoch, in part or as a whole, but no later one.
            self._board = SummaryWriter(str(self.directory), purge_step=row["epoch"])
        for key in row.keys() - {"epoch"}:
            self._board.add_scalar(key, row[key], row["epoch"])
        for layer, values in (scores or {}).items():
            self._board.add_histogram(f"score/{layer}", values, row["epoch"])
        self._board.flush()

    @uninterrupted()
    def finish(self, report: Mapping[str, Any], markdown: str) -> None:
        """Write the result; the presence of report.json means done. Raises OSError."""
        if self._board is not None:
            self._compare_in_board(report)
        write_text(self.directory / "report.md", markdown)
        plain = {**report, "config": _in_json(report["config"])}
        write_text(self.directory / "report.json", json.dumps(plain, indent=2) + "\n")

    def _compare_in_board(self, report: Mapping[str, Any]) -> None:
        """A line of TensorBoard's HParams table, where the runs of a sweep stand side by side."""
        from torch.utils.tensorboard.summary import hparams

        results = {
            "result/compact_top1": report["accuracy"]["compact_last"],
            "result/compact_macs": report["compact"]["macs"],
        }
        # add_hparams() would open a run of its own below this one for every call.
        flat = {k: v for k, v in flatten(self.config).items() if v is not None}
        plain = {k: v if isinstance(v, bool | int | float) else str(v) for k, v in flat.items()}
        for summary in hparams(plain, results):
            self._board.file_writer.add_summary(summary)
        for tag, value in results.items():
            self._board.add_scalar(tag, value, report["config"]["epochs"])

    def note_failure(self, line: str) -> None:
        """Write why the run stops into its log; the screen is the caller's."""
        record = logging.LogRecord("fpgm", logging.ERROR, "", 0, line, None, None)
        for handler in self._handlers:
            if isinstance(handler, _LogFile):
                handler.handle(record)

    def _discard(self) -> None:
        """Leave no directory behind a start that failed before anything was trained."""
        names = {path.name for path in self.directory.iterdir()}
        if names <= {".lock", ".process", "config.yaml", "train.log"}:
            with contextlib.suppress(OSError):
                for name in names:
                    (self.directory / name).unlink()
                self.directory.rmdir()

    def _claim(self) -> None:
        owner = self.directory / ".process"
        try:
            self._lock.acquire(blocking=False)
        except Timeout as error:
            process = f"process {owner.read_text()}" if owner.exists() else "another process"
            raise Error(
                f"{self.directory} is in use by {process}: wait for it, or {_ELSEWHERE}"
            ) from error
        owner.write_text(str(os.getpid()))

    def _compare(self) -> None:
        """Write config.yaml; where an epoch is done, hold it against the one that is there."""
        path = self.directory / "config.yaml"
        begun = any(
            (self.directory / n).exists() for n in ("last.pt", "previous.pt", "report.json")
        )
        if path.exists() and begun:
            changed = differences(read_config(self.directory), self.config)
            if changed:
                raise Error(
                    f"{self.directory} holds a run of another configuration ({'; '.join(changed)}):"
                    f" {_ELSEWHERE}"
                )
        else:
            write_text(path, yaml.safe_dump(dict(self.config), sort_keys=False))

    def _start_log(self) -> None:
        log.setLevel(logging.INFO)
        log.propagate = False
        screen = logging.StreamHandler(sys.stdout)
        file = _LogFile(self.directory / "train.log")
        file.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
        self._handlers = [screen, file]
        for handler in self._handlers:
            log.addHandler(handler)


def _in_json(value: Any) -> Any:
    """Of a configuration: JSON has no infinity, of which others' readers are told the word."""
    if isinstance(value, Mapping):
        return {key: _in_json(entry) for key, entry in value.items()}
    return str(value) if isinstance(value, float) and math.isinf(value) else value


class _LogFile(logging.FileHandler):
    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802
        """A full disk is reported where it stops the run, not once more for every line."""
