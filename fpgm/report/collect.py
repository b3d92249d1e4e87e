"""Runs as they lie on the disk, done or not. No torch."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from fpgm.errors import Error, first_line
from fpgm.keys import CONFIGS
from fpgm.runs import grid
from fpgm.runs.run import LOW_RANK, SCHEMA


@dataclass(frozen=True)
class Found:
    """A run directory. report: None unless the run is done and can be read; history: its epochs so
    far; problem: why its result is not counted, None if it is; times: what fpgm-latency measured in
    ONNX Runtime, {batch, dense_ms, compact_ms, speed_up} each; with --int8 also compact_int8_ms,
    and int8: top-1 accuracy of the compact network in int8, in percent."""

    directory: Path
    config: dict[str, Any]
    report: dict[str, Any] | None
    history: list[dict[str, float]]
    problem: str | None
    times: list[dict[str, float]] = field(default_factory=list)
    int8: float | None = None

    def entry(self, *keys: str) -> Any:
        """Of report.json."""
        value: Any = self.report
        for key in keys:
            value = value[key]
        return value

    @property
    def precision(self) -> str:
        """What it was really trained in, whatever it was asked for: float32 or bf16."""
        return str(self.entry("environment", "precision")).partition(",")[0]


@dataclass(frozen=True)
class Missing:
    """A run that a grid is to have and that is not done: where, how far it is, what makes it."""

    directory: Path
    state: str
    command: str


def collect(directories: Sequence[Path]) -> list[Found]:
    """All runs in and below the directories, each once. Raises Error where one has none."""
    runs: dict[Path, Found] = {}
    for directory in directories:
        if not directory.is_dir():
            raise Error(f"{directory}: no such directory; give a run or a folder of runs")
        places = [path.parent for path in sorted(directory.rglob("config.yaml"))]
        places = [place for place in places if not (place / LOW_RANK).exists()]
        if not places and not grid.remembered(directory):
            raise Error(f"{directory}: no runs there; each has a config.yaml")
        for place in places:
            runs.setdefault(place.resolve(), read(place))
    return list(runs.values())


def read(directory: Path) -> Found:
    """One run directory, whatever state it is in."""
    try:
        config = _config(directory / "config.yaml")
        history = _history(directory / "history.csv")
    except (OSError, ValueError, TypeError, yaml.YAMLError) as error:
        return Found(directory, {}, None, [], f"cannot be read: {first_line(error)}")
    try:
        report = _report(directory / "report.json", len(history), config["epochs"])
    except Error as error:
        return Found(directory, config, None, history, str(error))
    times, int8 = _times(directory / "latency.json")
    return Found(directory, config, report, history, None, times, int8)


_KEYS = {
    "align", "arch", "criterion", "dataset", "epochs", "macs_target", "method", "optimizer",
    "pretrained", "rate", "residual", "schedule", "scope", "seed",
}  # fmt: skip
_PARTS = {"accuracy", "compact", "environment", "equivalence", "layers", "reduction"}


def _config(path: Path) -> dict[str, Any]:
    config = yaml.safe_load(path.read_text())
    if not isinstance(config, dict) or not config.keys() >= _KEYS:
        raise ValueError("config.yaml is not one of a run of this version")
    return config


def _history(path: Path) -> list[dict[str, float]]:
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return [{key: float(value) for key, value in row.items()} for row in csv.DictReader(file)]


def _times(path: Path) -> tuple[list[dict[str, float]], float | None]:
    """Times in ONNX Runtime, and the accuracy in int8."""
    try:
        measured = json.loads(path.read_text()) if path.exists() else {"rows": []}
        rows = [row for row in measured["rows"] if row["runtime"] == "onnxruntime"]
        int8 = measured.get("int8", {}).get("compact", {}).get("accuracy", {}).get("int8")
    except (ValueError, KeyError, TypeError, AttributeError):
        return [], None  # the run itself counts
    return rows, int8


def _report(path: Path, done: int, epochs: int) -> dict[str, Any]:
    """The result. Raises Error with why there is none that counts."""
    if not path.exists():
        raise Error(f"cut off at epoch {done} of {epochs}")
    try:
        report = dict(json.loads(path.read_text()))
        schema = report["schema"]
    except (ValueError, KeyError, TypeError) as error:
        raise Error("its report.json is damaged") from error
    if schema != SCHEMA:
        raise Error(
            f"schema {schema} of its report.json, this fpgm reads {SCHEMA}: another version"
        )
    if not report.keys() >= _PARTS:
        raise Error("its report.json is damaged")
    if done != epochs:
        raise Error(f"its history.csv has {done} of {epochs} epochs")
    return report


def missing(directories: Iterable[Path], runs: Iterable[Found]) -> list[Missing]:
    """What the grids below the directories lack, by what their sweeps noted."""
    states = {run.directory.resolve(): run.problem for run in runs}
    lacking: dict[Path, Missing] = {}
    for file in sorted(file for directory in directories for file in directory.rglob(grid.FILE)):
        jobs = grid.remembered(file.parent)
        for name, words in jobs.items():
            place = file.parent / name
            state = states.get(place.resolve(), "not started")
            if state is not None:
                command = grid.command(words, jobs.values())
                lacking[place.resolve()] = Missing(place, state, command)
    return list(lacking.values())


def changed(group: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """Those of a criterion's, schedule's, ... options that are not as configs/GROUP/NAME.yaml has
    them. options: with its `name`."""
    defaults = _defaults(group, options["name"])
    return {key: value for key, value in options.items() if value != defaults.get(key)}


@cache
def _defaults(group: str, name: str) -> dict[str, Any]:
    path = CONFIGS / group / f"{name}.yaml"
    if not path.exists():  # of your own
        return {"name": name}
    values: Any = yaml.safe_load(path.read_text())
    values = values.get(group, values.get(name, values))
    # Some files set more than their group, and of methods several may act at once.
    return {"name": name, **values}
