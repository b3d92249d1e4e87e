"""What FPGM (He et al., CVPR 2019) prints in its tables 1 and 2, for what was run. No torch."""

from __future__ import annotations

import csv
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

DENSE_MACS = {  # of the networks with one linear layer, convolutions included
    "resnet20": 40_551_040,
    "resnet32": 68_862_592,
    "resnet56": 125_485_696,
    "resnet110": 252_887_680,
}
EPOCHS = {"cifar10": 200, "imagenet": 100}
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
            _number(row["macs"]),
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
    plain = config["criterion"].get("distance") in (None, "l2")
    method = _METHODS.get((config["criterion"]["name"], config["schedule"]["name"]))
    if config["rate"] == 0:
        method = "baseline"
    elif (
        not plain or config["schedule"]["interval"] != 1 or config.get("scope", "layer") != "layer"
    ):
        return None
    wanted = (
        config["dataset"]["name"], config["arch"], method, config["rate"],
        config["pretrained"] is not None,
    )  # fmt: skip
    for row in published():
        if (row.dataset, row.arch, row.method, row.rate, row.pretrained) == wanted:
            return row
    return None


def _number(text: str) -> float | None:
    return float(text) if text else None
