"""What FPGM (He et al., CVPR 2019) prints in its tables 1 and 2, for what was run. No torch."""

from __future__ import annotations

import csv
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from fractions import Fraction
from functools import cache
from math import isclose
from pathlib import Path
from typing import Any

from fpgm.keys import flatten
from fpgm.report.collect import changed

# The papers' recipes, from scratch.
_RECIPE: dict[str, Any] = {
    "optimizer.lr": 0.1, "optimizer.momentum": 0.9, "optimizer.nesterov": True,
    "optimizer.warmup_epochs": 0, "tune": False, "dataset.flip": True, "precision": "float32",
    "scope": "layer",
}  # fmt: skip
_RECIPES: dict[str, dict[str, Any]] = {
    "cifar10": {
        **_RECIPE, "epochs": 200, "batch_size": 128, "optimizer.weight_decay": 5e-4,
        "optimizer.milestones": [0.3, 0.6, 0.8], "optimizer.gamma": 0.2, "dataset.pad": 4,
    },
    "imagenet": {
        **_RECIPE, "epochs": 100, "batch_size": 256, "optimizer.weight_decay": 1e-4,
        "optimizer.milestones": [0.3, 0.6, 0.9], "optimizer.gamma": 0.1,
        "dataset.image_size": 224,
    },
}  # fmt: skip
_WARMING_UP = ("resnet110",)  # for an epoch, from scratch
_PRETRAINED = {"cifar10": "baseline", "imagenet": "torchvision"}
# Of a schedule: how it steps faster, what the published code leaves open, what `deviations` names.
_NO_MATTER = {"train_compact", "reset_momentum", "zero_at_start"}


@dataclass(frozen=True)
class Published:
    """A row of a paper's table; accuracies and the reduction of MACs in percent, None where the
    paper prints none. criterion, schedule: what the method is called here, the schedule as the
    authors ran it; stated: an option's values that the paper states,
    KEY=A|B; trust: ok, suspect or invalid, with the reason in note."""

    dataset: str
    arch: str
    method: str
    criterion: str
    schedule: str
    stated: str
    rate: float | None
    pretrained: bool
    top1: float | None
    std: float | None
    macs: float | None
    macs_reduction: float | None
    trust: str
    note: str


@cache
def published() -> tuple[Published, ...]:
    """All rows; the MACs of a baseline are fpgm.cost's, and of a row without them by the printed
    reduction."""
    with (Path(__file__).parent / "paper_tables.csv").open(newline="") as file:
        rows = [_row(row) for row in csv.DictReader(file)]
    dense = {row.arch: row.macs for row in rows if row.method == "baseline"}
    return tuple(
        replace(row, macs=(dense[row.arch] or 0) * (1 - row.macs_reduction / 100))
        if row.macs is None and row.macs_reduction is not None
        else row
        for row in rows
    )


def _row(row: Mapping[str, str]) -> Published:
    keys = ("rate", "top1", "std", "macs", "macs_reduction")
    values: dict[str, Any] = {field.name: row[field.name] for field in fields(Published)}
    values |= {key: float(row[key]) if row[key] else None for key in keys}
    return Published(**{**values, "pretrained": row["pretrained"] == "yes"})


def counterpart(config: Mapping[str, Any]) -> Published | None:
    """The row that a run's configuration reproduces, None where there is none. A row of the other
    start stands in for one that the paper does not have; `deviations` says so."""
    if config["residual"] != "independent" or config["align"] != 1 or config["macs_target"]:
        return None
    place = config["dataset"]["name"], config["arch"], config["rate"]
    rows = [p for p in published() if (p.dataset, p.arch, p.rate) == place and _is(p, config)]
    pretrained = config["pretrained"] is not None
    return min(rows, key=lambda row: row.pretrained != pretrained, default=None)


def _is(row: Published, config: Mapping[str, Any]) -> bool:
    """Whether a run is of the row's method."""
    if config["rate"] == 0:
        return row.method == "baseline"
    criterion, schedule = config["criterion"], config["schedule"]
    if criterion["name"] != row.criterion or schedule["name"] != row.schedule:
        return False
    options, (key, _, values) = changed("criterion", criterion), row.stated.partition("=")
    if key:
        options.pop(key, None)
        stated = [float(Fraction(value)) for value in values.split("|")]
        options |= {} if any(isclose(criterion[key], v, abs_tol=1e-3) for v in stated) else {key: 0}
    return not options and changed("schedule", schedule).keys() <= _NO_MATTER


def deviations(row: Published, config: Mapping[str, Any], precision: str) -> list[str]:
    """Where a run of a row's method departs from its recipe, as KEY=VALUE (THEIRS there).
    precision: what it was really trained in."""
    start, theirs = config["pretrained"], dict(_RECIPES[row.dataset])
    ours = flatten(config) | {"precision": precision}
    if row.pretrained:
        theirs["optimizer.lr"] = 0.01  # a tenth
    elif row.arch in _WARMING_UP:
        theirs["optimizer.warmup_epochs"] = 1
    theirs["pretrained"] = _PRETRAINED[row.dataset] if row.pretrained else None
    if theirs["pretrained"] == "baseline" and start not in (None, "torchvision"):
        ours["pretrained"] = "baseline"  # which is a run's directory by now
    if config["scope"] == "global":
        ours["scope"] = f"global scope_norm={config['scope_norm']}"
    if row.method == "baseline":
        ours["scope"] = "layer"  # nothing is ranked
    else:  # as the published code does, whatever is printed
        theirs["schedule.zero_at_start"] = True
    for key, value in changed("dataset", config["dataset"]).items():
        if key in ("mean", "std"):
            theirs[f"dataset.{key}"] = "the training images'"
            ours[f"dataset.{key}"] = value
        elif key == "validation":
            theirs["dataset.validation"] = 0.0
    named = [key for key in ours if key.startswith("method.") and not key.endswith(".name")]
    theirs |= dict.fromkeys(named)
    return [
        f"{key}={ours[key]} ({theirs[key]} there)" for key in theirs if ours[key] != theirs[key]
    ]
