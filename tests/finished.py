"""Run directories as fpgm-train leaves them, with figures of one's own and nothing trained."""

from __future__ import annotations

import copy
import csv
import functools
import json
from pathlib import Path

import yaml
from commands import compose

from fpgm.runs import grid


@functools.cache
def _composed(*words: str) -> dict:
    return compose(*words)


def composed(*words: str) -> dict:
    return copy.deepcopy(_composed(*words))


def a_run(
    where: Path,
    *words: str,
    top1: float = 91.0,
    epochs: int | None = None,
    done: bool = True,
    precision: str = "float32",
    first_zeroing: float | None = None,
) -> Path:
    """A run directory as fpgm-train leaves it, with these figures."""
    where.mkdir(parents=True)
    values = dict(word.partition("=")[::2] for word in words)
    config = composed(*(word for word in words if not word.startswith("seed=")))
    config["seed"] = int(values.get("seed", 0))
    (where / "config.yaml").write_text(yaml.safe_dump(config))
    row = {"lr": 0.1, "train_loss": 1.0, "accuracy_before": top1, "churn": 0.1, "revived": 3,
           "accuracy_after": top1, "pruned": 264, "dead": 5, "seconds": 1.0}  # fmt: skip
    with (where / "history.csv").open("w") as file:
        writer = csv.DictWriter(file, ["epoch", *row])
        writer.writeheader()
        epochs = config["epochs"] if epochs is None else epochs
        writer.writerows({"epoch": epoch + 1, **row} for epoch in range(epochs))
    macs = 40_551_040 if config["rate"] == 0 else 18_488_502
    content = {
        "schema": 1,
        "config": config,
        "environment": {"precision": precision},
        "accuracy": {
            "compact_last": top1,
            "best": {"zeroed": top1 + 0.5},
            **({} if first_zeroing is None else {"first_zeroing": first_zeroing}),
        },
        "compact": {"macs": macs, "params": 124_079},
        "reduction": {"macs": 100 * (1 - macs / 40_551_040)},
        "equivalence": {"agreement": 1.0, "max_abs_diff": 1e-6},
        "layers": [{"name": f"conv{i}", "filters": 16, "kept": 10} for i in range(19)],
    }
    if done:
        (where / "report.json").write_text(json.dumps(content))
    return where


def seeds(where: Path, *words: str, top1: tuple[float, ...] = (90.2, 90.5, 90.8)) -> None:
    for seed, value in enumerate(top1):
        a_run(where / f"{grid.run_name(words)},seed={seed}", *words, f"seed={seed}", top1=value)


def summary(where: Path) -> list[dict[str, str]]:
    with (where / "summary.csv").open(newline="") as file:
        return list(csv.DictReader(file))
