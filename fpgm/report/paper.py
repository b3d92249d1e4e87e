"""What FPGM, SFP, PFEC and Network Slimming print in their tables, for what was run. No torch."""

from __future__ import annotations

import csv
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from fractions import Fraction
from functools import cache
from math import isclose
from pathlib import Path
from typing import Any

import yaml

from fpgm.keys import CONFIGS, flatten
from fpgm.report.collect import changed

# What all recipes have in common, and what they are: of FPGM and SFP by the data set, from scratch,
# of others by the name that a row gives.
_STEPS = {"optimizer.schedule": "step", "optimizer.label_smoothing": 0.0}
_RECIPE: dict[str, Any] = {
    **_STEPS, "optimizer.lr": 0.1, "optimizer.momentum": 0.9, "optimizer.nesterov": True,
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
_BY_STEPS = {
    **_RECIPE, "epochs": 160, "batch_size": 64, "optimizer.weight_decay": 1e-4,
    "optimizer.milestones": [0.5, 0.75], "optimizer.gamma": 0.1, "dataset.pad": 4,
}  # fmt: skip
_VGG = {**_BY_STEPS, "optimizer.nesterov": False}
_CONSTANT = {"optimizer.lr": 0.001, "optimizer.milestones": []}
_RECIPES |= {
    "vgg": _VGG,
    "vgg_untuned": {"epochs": 0, "tune": False},
    "vgg_fpgm_40": {**_VGG, "epochs": 40, "optimizer.lr": 0.001},
    "vgg_pfec_40": {**_VGG, "epochs": 40, **_CONSTANT},
    "vgg_pfec_160": {**_VGG, **_CONSTANT},
    "pfec": {**_RECIPES["cifar10"], "epochs": 40, **_CONSTANT},
    "slimming": _BY_STEPS,
    "slimming_tuned": {**_BY_STEPS, "scope": "global scope_norm=none"},
}
_WARMING_UP = ("resnet110",)  # for an epoch, from scratch
_PRETRAINED = {"cifar10": "baseline", "imagenet": "torchvision"}
# Of a schedule: how it steps faster, what the published code leaves open, what `deviations` names.
_NO_MATTER = {"train_compact", "reset_momentum", "zero_at_start"}
# How much of each layer goes, in what rate does not say: as runs have it that say nothing.
_BY_LAYER: dict[str, Any] = {"rates": None, "ignore": [], "widths": None, "rounding": "pruned"}


@dataclass(frozen=True)
class Published:
    """A row of a paper's table; accuracies and the reduction of MACs in percent, None where the
    paper prints none. source: the paper and its table; criterion, schedule: what the method is
    called here, the schedule as the authors ran it; stated: an option's values that the paper
    states, KEY=A|B; layers: a file of configs/layers in place of one rate; recipe: an entry of
    _RECIPES, of FPGM and SFP empty; trust: ok, suspect or invalid, with the reason in note."""

    source: str
    dataset: str
    arch: str
    method: str
    criterion: str
    schedule: str
    stated: str
    rate: float | None
    layers: str
    pretrained: bool
    recipe: str
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
    start, or of other epochs, stands in for one that the paper does not have; `deviations` says
    so."""
    targets = ("macs_target", "threshold", "latency_target")
    if config["align"] != 1:
        return None
    if any(config.get(key) is not None for key in targets):
        return None
    layers = layers_named(config)
    place = config["dataset"]["name"], config["arch"], layers, None if layers else config["rate"]
    rows = [
        p for p in published() if (p.dataset, p.arch, p.layers, p.rate) == place and _is(p, config)
    ]
    pretrained = config["pretrained"] is not None

    def distance(row: Published) -> tuple[bool, bool]:
        epochs = _RECIPES[row.recipe or row.dataset]["epochs"]
        return row.pretrained != pretrained, epochs != config["epochs"]

    return min(rows, key=distance, default=None)


def layers_named(config: Mapping[str, Any]) -> str | None:
    """The file of configs/layers that says of each layer what a run's configuration does: its name,
    '' where one rate holds for all, None where no file does."""
    ours = _by_layer(config)
    if ours == _BY_LAYER:
        return ""
    rest = {"rate": config["rate"], **ours}
    return next((name for name, theirs in _layers().items() if rest == theirs), None)


def _by_layer(values: Mapping[str, Any]) -> dict[str, Any]:
    """Runs of older versions have none of these keys."""
    return {key: values.get(key) or none for key, none in _BY_LAYER.items()}


@cache
def _layers() -> dict[str, dict[str, Any]]:
    files = {path.stem: path for path in sorted((CONFIGS / "layers").glob("*.yaml"))}
    values = {name: yaml.safe_load(path.read_text()) for name, path in files.items()}
    return {name: {"rate": v.get("rate"), **_by_layer(v)} for name, v in values.items()}


def _is(row: Published, config: Mapping[str, Any]) -> bool:
    """Whether a run is of the row's method."""
    # Where a stream's channels are chosen by each that reads them, its own filters stay.
    structures = ("independent", "inner") if row.recipe == "slimming_tuned" else ("independent",)
    if config["residual"] not in structures:
        return False
    if config["rate"] == 0 and not row.layers:
        return row.method == "baseline"
    criterion, schedule = config["criterion"], config["schedule"]
    if criterion["name"] != row.criterion or schedule["name"] != row.schedule:
        return False
    options, (key, _, values) = changed("criterion", criterion), row.stated.partition("=")
    if key:
        options.pop(key, None)
        met = any(_same(criterion[key], value) for value in values.split("|"))
        options |= {} if met else {key: 0}
    return not options and changed("schedule", schedule).keys() <= _NO_MATTER


def _same(ours: Any, stated: str) -> bool:
    """A word, or a number that the paper states as a fraction."""
    if isinstance(ours, str):
        return ours == stated
    return isclose(ours, float(Fraction(stated)), abs_tol=1e-3)


def deviations(row: Published, config: Mapping[str, Any], precision: str) -> list[str]:
    """Where a run of a row's method departs from its recipe, as KEY=VALUE (THEIRS there).
    precision: what it was really trained in."""
    start, theirs = config["pretrained"], dict(_RECIPES[row.recipe or row.dataset])
    ours = _STEPS | flatten(config) | {"precision": precision}  # older runs know of no others
    if row.pretrained and not row.recipe:
        theirs["optimizer.lr"] = 0.01  # a tenth
    elif row.arch in _WARMING_UP and not row.pretrained:
        theirs["optimizer.warmup_epochs"] = 1
    theirs["pretrained"] = _PRETRAINED[row.dataset] if row.pretrained else None
    if theirs["pretrained"] == "baseline" and start not in (None, "torchvision"):
        ours["pretrained"] = "baseline"  # which is a run's directory by now
    if config["scope"] != "layer":
        ours["scope"] = f"{config['scope']} scope_norm={config['scope_norm']}"
    if row.method == "baseline":
        ours["scope"] = "layer"  # nothing is ranked
    elif "schedule.zero_at_start" in ours:  # as the published code does, whatever is printed
        theirs["schedule.zero_at_start"] = True
    if config["residual"] != "independent":
        theirs["residual"] = "channel selection"
    for key, value in changed("dataset", config["dataset"]).items():
        if key in ("mean", "std"):
            theirs[f"dataset.{key}"] = _constants(row).get(key, "the training images'")
            ours[f"dataset.{key}"] = value
        elif key == "validation":
            theirs["dataset.validation"] = 0.0
    named = [key for key in ours if key.startswith("method.") and not key.endswith(".name")]
    theirs |= dict.fromkeys(named)
    return [
        f"{key}={ours[key]} ({theirs[key]} there)" for key in theirs if ours[key] != theirs[key]
    ]


@cache
def _constants(row: Published) -> dict[str, list[float]]:
    """What the authors normalise images of this network by, where it is not the data set's own."""
    return _recipe_constants(f"{row.arch}_{row.dataset}")


def _recipe_constants(name: str) -> dict[str, list[float]]:
    path = CONFIGS / "recipe" / f"{name}.yaml"
    values: Any = yaml.safe_load(path.read_text()) if path.exists() else {}
    found: dict[str, list[float]] = {}
    for other in values.get("defaults", []):
        found |= {} if other == "_self_" else _recipe_constants(other)
    return {**found, **values.get("dataset", {})}
