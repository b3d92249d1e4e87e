"""What FPGM (He et al., CVPR 2019) prints in its tables 1 and 2, for what was run. No torch."""

from __future__ import annotations

import csv
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from fpgm.keys import flatten

DENSE_MACS = {  # fpgm.cost: convolutions and linear layers
    "resnet20": 40_551_040,
    "resnet32": 68_862_592,
    "resnet56": 125_485_696,
    "resnet110": 252_887_680,
    "resnet18": 1_814_073_344,
    "resnet34": 3_663_761_408,
    "resnet50": 4_089_184_256,
    "resnet101": 7_801_405_440,
}
# The papers' recipes; a pretrained network is trained with a tenth of the learning rate. ResNet-110
# warms up for an epoch from scratch.
_RECIPE: dict[str, Any] = {
    "optimizer.lr": 0.1, "optimizer.momentum": 0.9, "optimizer.nesterov": True,
    "criterion.slimming": None, "tune": False, "dataset.flip": True,
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
_PRUNING = {"interval": 1, "zero_at_start": True, "settle": 1.0, "recalibrate": 0}
_METHODS = {("l2", "soft"): "SFP", ("gm", "frozen"): "FPGM-only", ("mix", "frozen"): "FPGM-mix"}


@dataclass(frozen=True)
class Published:
    """A row of a paper's table; accuracies and the reduction of MACs in percent, None where the
    paper prints none. trust: ok, suspect or invalid, with the reason in note."""

    dataset: str
    arch: str
    method: str
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
    """All rows, and a row at rate 0 for each baseline that the method rows are held against."""
    with (Path(__file__).parent / "paper_tables.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    found = [
        Published(
            row["dataset"],
            row["arch"],
            row["method"],
            _number(row["rate"]),
            row["pretrained"] == "yes",
            _number(row["top1"]),
            _number(row["top1_std"]),
            _macs(row),
            _number(row["macs_reduction"]),
            row["trust"],
            row["note"],
        )
        for row in rows
    ]
    baselines = {
        (row["dataset"], row["arch"]): Published(
            row["dataset"], row["arch"], "baseline", 0.0, False, _number(row["baseline_top1"]),
            _number(row["baseline_std"]), DENSE_MACS.get(row["arch"]), 0.0, "ok", "",
        )
        for row in rows
        if row["method"].startswith("FPGM")
    }  # fmt: skip
    return (*baselines.values(), *found)


def counterpart(config: Mapping[str, Any]) -> Published | None:
    """The row that a run's configuration reproduces, None where there is none."""
    if config["residual"] != "independent" or config["align"] != 1 or config["macs_target"]:
        return None
    criterion, schedule = config["criterion"], config["schedule"]
    plain = criterion.get("distance") in (None, "l2")
    plain = plain and criterion.get("norm_share") in (None, 0.25)
    plain = plain and all(schedule[key] == value for key, value in _PRUNING.items())
    method = _METHODS.get((criterion["name"], schedule["name"]))
    if config["rate"] == 0:
        method = "baseline"
    elif not plain or config["scope"] != "layer":
        return None
    wanted = (
        config["dataset"]["name"], config["arch"], method, config["rate"],
        config["pretrained"] is not None,
    )  # fmt: skip
    for row in published():
        if (row.dataset, row.arch, row.method, row.rate, row.pretrained) == wanted:
            return row
    return None


def deviations(config: Mapping[str, Any]) -> list[str]:
    """Where a run of the papers' method departs from their recipe, as KEY=VALUE (THEIRS there)."""
    flat, recipe = flatten(config), dict(_RECIPES[config["dataset"]["name"]])
    if config["pretrained"] is not None:
        recipe["optimizer.lr"] = 0.01
    return [
        f"{key}={flat[key]} ({value} there)" for key, value in recipe.items() if flat[key] != value
    ]


def _macs(row: Mapping[str, str]) -> float | None:
    """As printed, or by the printed reduction."""
    dense, cut = DENSE_MACS.get(row["arch"]), _number(row["macs_reduction"])
    if row["macs"] or dense is None or cut is None:
        return _number(row["macs"])
    return dense * (1 - cut / 100)


def _number(text: str) -> float | None:
    return float(text) if text else None
