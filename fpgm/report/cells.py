"""Runs that differ in nothing but the seed are one cell of the table. No torch."""

from __future__ import annotations

import re
import statistics
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fpgm.keys import flatten
from fpgm.report.collect import Found, changed
from fpgm.report.paper import Published, counterpart, deviations

# How a run is made, not what it is.
_NO_MATTER = {
    "seed", "device", "compile", "dataset.root", "dataset.workers", "dataset.on_error",
    "schedule.train_compact",
}  # fmt: skip
_OF_PRUNING = ("criterion.", "schedule.", "residual", "align", "scope", "floor")
Identity = tuple[tuple[str, str], ...]


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
    runs: tuple[Found, ...]
    problem: str | None

    @property
    def prunes(self) -> bool:
        return not _is_baseline(self.runs[0].config)

    @property
    def name(self) -> str:
        words = [self.method, self.rate if self.prunes else "", self.also]
        if self.start != "scratch":
            words.append(self.start)
        return " ".join(word for word in words if word)

    @property
    def seeds(self) -> tuple[int, ...]:
        return tuple(sorted(run.config["seed"] for run in self.runs))

    def spread(self, *keys: str) -> Spread:
        """Of an entry of report.json, over the seeds."""
        return Spread.of([float(run.entry(*keys)) for run in self.runs])

    @property
    def paper(self) -> Published | None:
        return counterpart(self.runs[0].config)

    @property
    def deviations(self) -> list[str]:
        """From the recipe of the paper's row, if there is one."""
        paper, run = self.paper, self.runs[0]
        return [] if paper is None else deviations(paper, run.config, run.precision)

    @property
    def comparable(self) -> bool:
        """Whether the paper's figure is one that can be trusted, by the same recipe."""
        return self.paper is not None and self.paper.trust == "ok" and not self.deviations

    def verdict(self) -> str:
        """How the accuracy stands to the paper's, in words; empty where it prints none.

        Within a spread: the difference of the means is at most that standard deviation.
        """
        paper = self.paper
        if paper is None or paper.top1 is None or self.problem:
            return ""
        if paper.trust != "ok":
            return f"not to be trusted: {paper.note}"
        if self.deviations:
            return f"not comparable: {', '.join(self.deviations)}"
        ours = self.spread("accuracy", "compact_last")
        if ours.std is None or paper.std is None:
            return "no spread: one seed" if ours.std is None else "the paper prints no spread"
        within = sum(abs(ours.mean - paper.top1) <= std for std in (ours.std, paper.std))
        return ("outside both spreads", "within one spread", "within both spreads")[within]


def cells(runs: Iterable[Found]) -> list[Cell]:
    """The finished runs, by what they are."""
    groups: defaultdict[Identity, list[Found]] = defaultdict(list)
    for run in runs:
        if run.problem is None:
            groups[tuple(sorted(_identity(run).items()))].append(run)
    alike: defaultdict[tuple[str, str, str, str], list[Identity]] = defaultdict(list)
    for identity, same in groups.items():
        alike[_look(same[0].config)].append(identity)
    made = []
    for look, identities in alike.items():
        flat = [dict(identity) for identity in identities]
        for identity, values in zip(identities, flat, strict=True):
            also = [key for key in values if len({other.get(key) for other in flat}) > 1]
            same = groups[identity]
            words = " ".join(f"{key}={values[key]}" for key in also)
            made.append(Cell(*look, words, tuple(same), _twice(same)))
    return sorted(made, key=_order)


def _order(cell: Cell) -> tuple[Any, ...]:
    name, number = re.fullmatch(r"(.*?)(\d*)", cell.network).groups()  # type: ignore[union-attr]
    return (name, int(number or 0), cell.start != "scratch", cell.prunes, cell.method, cell.rate,
            cell.also)  # fmt: skip


def _twice(runs: Sequence[Found]) -> str | None:
    """Two runs of one seed are one run too many: which of them counts is not for us to say."""
    for seed, count in Counter(run.config["seed"] for run in runs).items():
        if count > 1:
            places = [str(run.directory) for run in runs if run.config["seed"] == seed]
            return f"seed {seed} is there {count} times ({', '.join(places)}): leave one"
    return None


def _identity(run: Found) -> dict[str, str]:
    """What a run is, as text by key."""
    config = run.config
    flat = {key: value for key, value in flatten(config).items() if key not in _NO_MATTER}
    if _is_baseline(config):
        flat = {key: value for key, value in flat.items() if not key.startswith(_OF_PRUNING)}
    if config["dataset"]["name"] == "image_folder":  # of the others the name says what they hold
        flat["dataset.root"] = config["dataset"]["root"]
    # The runs of a cell start from baselines that differ in the seed alone.
    flat["pretrained"] = re.sub(r"seed=\d+", "seed=N", str(config["pretrained"]))
    flat["precision"] = run.precision
    flat.setdefault("dataset.validation", 0.0)  # which runs of older versions do not have
    return {key: str(value) for key, value in flat.items()}


def _is_baseline(config: Mapping[str, Any]) -> bool:
    return bool(config["rate"] == 0 and config["macs_target"] is None)


def _look(config: Mapping[str, Any]) -> tuple[str, str, str, str]:
    """network, method, rate, start."""
    given = config["pretrained"]
    start = {None: "scratch", "torchvision": "torchvision"}.get(given, "pretrained")
    network = f"{config['dataset']['name']} {config['arch']}"
    beside = [_named("method", {"name": n, **options}) for n, options in config["method"].items()]
    if _is_baseline(config):
        return network, " ".join(["baseline", *beside]), "0", start
    words = [_named(group, config[group]) for group in ("criterion", "schedule")] + beside
    words += [config["residual"]] if config["residual"] != "independent" else []
    words += [f"align {config['align']}"] if config["align"] > 1 else []
    words += ["global"] if config["scope"] == "global" else []
    target = config["macs_target"]
    rate = f"{config['rate']:g}" if target is None else f"MACs {target:g}"
    return network, " ".join(words), rate, start


def _named(group: str, options: Mapping[str, Any]) -> str:
    """A criterion, schedule or method by its name, and those of its options that are not as its
    YAML has them."""
    different = {k: v for k, v in changed(group, options).items() if k != "train_compact"}
    return " ".join([options["name"], *(f"{key}={value}" for key, value in different.items())])
