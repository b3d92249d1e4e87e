"""Runs as they lie on the disk, done or not. No torch."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from fpgm.errors import Error
from fpgm.runs import grid
from fpgm.runs.run import SCHEMA


@dataclass(frozen=True)
class Found:
    """A run directory. report: None unless the run is done and can be read; history: its epochs so
    far; problem: why its result is not counted, None if it is."""

    directory: Path
    config: dict[str, Any]
    report: dict[str, Any] | None
    history: list[dict[str, float]]
    problem: str | None


@dataclass(frozen=True)
class Missing:
    """A run that a grid is to have and that is not done: where, how far it is, what makes it."""

    directory: Path
    state: str
    command: str


def collect(directories: Sequence[Path]) -> list[Found]:
    """All runs in and below the directories, each once. Raises Error where one has none."""
    found: dict[Path, Found] = {}
    for directory in directories:
        if not directory.is_dir():
            raise Error(f"{directory}: no such directory; give a run or a folder of runs")
        runs = [path.parent for path in sorted(directory.rglob("config.yaml"))]
        if not runs and not grid.remembered(directory):
            raise Error(f"{directory}: no runs there; each has a config.yaml")
        for run in runs:
            found.setdefault(run.resolve(), read(run))
    return list(found.values())


def read(directory: Path) -> Found:
    """One run directory, whatever state it is in."""
    try:
        content = yaml.safe_load((directory / "config.yaml").read_text())
        if not isinstance(content, dict) or not {"epochs", "seed", "rate"} <= content.keys():
            raise ValueError("config.yaml is not one of a run")
        config = content
        history = _history(directory / "history.csv")
    except (OSError, ValueError, TypeError, yaml.YAMLError) as error:
        line = str(error).splitlines()[0]
        return Found(directory, {}, None, [], f"cannot be read: {line}")
    path = directory / "report.json"
    if not path.exists():
        epochs = config.get("epochs")
        return Found(
            directory, config, None, history, f"cut off at epoch {len(history)} of {epochs}"
        )
    try:
        report = json.loads(path.read_text())
        schema = report["schema"]
    except (ValueError, KeyError, TypeError):
        return Found(directory, config, None, history, "its report.json is damaged")
    if schema != SCHEMA:
        problem = f"schema {schema} of its report.json, this fpgm reads {SCHEMA}: another version"
        return Found(directory, config, None, history, problem)
    if not all(part in report for part in _PARTS):
        return Found(directory, config, None, history, "its report.json is damaged")
    if len(history) != config["epochs"]:
        problem = f"its history.csv has {len(history)} of {config['epochs']} epochs"
        return Found(directory, config, None, history, problem)
    return Found(directory, config, report, history, None)


_PARTS = ("accuracy", "compact", "reduction", "equivalence", "layers")


def _history(path: Path) -> list[dict[str, float]]:
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return [{key: float(value) for key, value in row.items()} for row in csv.DictReader(file)]


def missing(directories: Iterable[Path], runs: Iterable[Found]) -> list[Missing]:
    """What the grids below the directories lack, by what their sweeps noted."""
    by_place = {run.directory.resolve(): run for run in runs}
    found: dict[Path, Missing] = {}
    for file in sorted(file for directory in directories for file in directory.rglob(grid.FILE)):
        jobs = grid.remembered(file.parent)
        for name, words in jobs.items():
            place = file.parent / name
            run = by_place.get(place.resolve())
            if run is None or run.problem is not None:
                state = "not started" if run is None else str(run.problem)
                command = grid.command(words, jobs.values())
                found[place.resolve()] = Missing(place, state, command)
    return list(found.values())
