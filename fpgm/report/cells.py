"""Runs that differ in nothing but the seed are one cell of the table. No torch."""

from __future__ import annotations

import re
import statistics
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fpgm.keys import flatten
from fpgm.report.collect import Found
from fpgm.report.paper import Published, counterpart, deviations

# How a run is made, not what it is.
_NO_MATTER = {
    "seed", "device", "compile", "dataset.root", "dataset.workers", "dataset.on_error",
    "schedule.train_compact",
}  # fmt: skip


@dataclass(frozen=True)
class Spread:
    """Mean and sample standard deviation (None of one value)."""

    mean: float
    std: float | None

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        return cls(statistics.fmean(values), statistics.stdev(values) if values[1:] else None)

    def __str__(self) -> str:
        return f"{self.mean:.2f}" + ("" if self.std is None else f" ± {self.std:.2f}")


@dataclass(frozen=True)
class Cell:
    """network, method, rate, start: what tells cells apart at a glance; also: the keys that do so
    among cells that look alike; runs: those counted; problem: why nothing is averaged here."""

    network: str
    method: str
    rate: str
    start: str
    also: str
    config: dict[str, Any]
    runs: tuple[Found, ...]
    problem: str | None

    @property
    def name(self) -> str:
        words = [self.method, self.rate if self.method != "baseline" else "", self.also]
        if self.start != "scratch":
            words.append(self.start)
        return " ".join(word for word in words if word)

    @property
    def seeds(self) -> tuple[int, ...]:
        return tuple(sorted(run.config["seed"] for run in self.runs))

    def spread(self, *keys: str) -> Spread:
        """Of an entry of report.json, over the seeds."""
        return Spread.of([_entry(run, keys) for run in self.runs])

    @property
    def comparable(self) -> bool:
        """Whether the paper's figure is one that can be trusted, by the same recipe."""
        return self.paper is not None and self.paper.trust == "ok" and not deviations(self.config)

    @property
    def paper(self) -> Published | None:
        return counterpart(self.config)

    def verdict(self) -> str:
        """How the accuracy stands to the paper's, in words; empty where it prints none.

        Within a spread: the difference of the means is at most that standard deviation.
        """
        paper = self.paper
        if paper is None or paper.top1 is None or self.problem:
            return ""
        if paper.trust != "ok":
            return f"not to be trusted: {paper.note}"
        if deviations(self.config):
            return f"not comparable: {', '.join(deviations(self.config))}"
        ours = self.spread("accuracy", "compact_last")
        if ours.std is None or paper.std is None:
            return "no spread: one seed" if ours.std is None else "the paper prints no spread"
        within = sum(abs(ours.mean - paper.top1) <= std for std in (ours.std, paper.std))
        return ("outside both spreads", "within one spread", "within both spreads")[within]


def _entry(run: Found, keys: Iterable[str]) -> float:
    value: Any = run.report
    for key in keys:
        value = value[key]
    return float(value)


def cells(runs: Iterable[Found]) -> list[Cell]:
    """The finished runs, by what they are."""
    groups: defaultdict[tuple[tuple[str, str], ...], list[Found]] = defaultdict(list)
    for run in runs:
        if run.problem is None:
            groups[tuple(sorted(_identity(run.config).items()))].append(run)
    looks = {identity: _look(found[0].config) for identity, found in groups.items()}
    alike: defaultdict[tuple[str, ...], list[tuple[tuple[str, str], ...]]] = defaultdict(list)
    for identity, look in looks.items():
        alike[look].append(identity)
    made = []
    for identity, found in groups.items():
        others = [dict(other) for other in alike[looks[identity]]]
        own = dict(identity)
        also = [key for key in own if len({other.get(key) for other in others}) > 1]
        made.append(
            Cell(
                *looks[identity],
                also=" ".join(f"{key}={own[key]}" for key in also),
                config=found[0].config,
                runs=tuple(found),
                problem=_twice(found),
            )
        )
    return sorted(made, key=_order)


def _order(cell: Cell) -> tuple[Any, ...]:
    number = "".join(c for c in cell.network if c.isdigit()) or "0"
    return (cell.network.rstrip("0123456789"), int(number), cell.start != "scratch",
            cell.method != "baseline", cell.method, cell.rate, cell.also)  # fmt: skip


def _twice(found: Sequence[Found]) -> str | None:
    """Two runs of one seed are one run too many: which of them counts is not for us to say."""
    for seed, count in Counter(run.config["seed"] for run in found).items():
        if count > 1:
            places = [str(run.directory) for run in found if run.config["seed"] == seed]
            return f"seed {seed} is there {count} times ({', '.join(places)}): leave one"
    return None


def _identity(config: Mapping[str, Any]) -> dict[str, str]:
    """What a run is, as text by key."""
    flat = {key: value for key, value in flatten(config).items() if key not in _NO_MATTER}
    if _is_baseline(config):
        pruning = ("criterion.", "schedule.", "residual", "align", "scope")
        own = "criterion.slimming"  # this penalty is there in training without pruning, too
        flat = {k: v for k, v in flat.items() if k == own or not k.startswith(pruning)}
    if config["dataset"]["name"] == "image_folder":  # of the others the name says what they hold
        flat["dataset.root"] = config["dataset"]["root"]
    # The runs of a cell start from baselines that differ in the seed alone.
    flat["pretrained"] = re.sub(r"seed=\d+", "seed=N", str(config["pretrained"]))
    return {key: str(value) for key, value in flat.items()}


def _is_baseline(config: Mapping[str, Any]) -> bool:
    return bool(config["rate"] == 0 and config["macs_target"] is None)


def _start(config: Mapping[str, Any]) -> str:
    given = config["pretrained"]
    return {None: "scratch", "torchvision": "torchvision"}.get(given, "pretrained")


def _look(config: Mapping[str, Any]) -> tuple[str, str, str, str]:
    """network, method, rate, start."""
    network, start = f"{config['dataset']['name']} {config['arch']}", _start(config)
    if _is_baseline(config):
        return network, "baseline", "0", start
    criterion = config["criterion"]
    distance = criterion.get("distance")
    words = [criterion["name"], distance if distance != "l2" else None, config["schedule"]["name"]]
    words += [config["residual"] if config["residual"] != "independent" else None]
    words += [f"align {config['align']}" if config["align"] > 1 else None]
    words += ["global" if config.get("scope") == "global" else None]
    target = config["macs_target"]
    rate = f"{config['rate']:g}" if target is None else f"MACs {target:g}"
    return network, " ".join(word for word in words if word), rate, start
