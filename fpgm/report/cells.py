"""Runs that differ in nothing but the seed are one cell of the table. No torch."""

from __future__ import annotations

import re
import statistics
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fpgm.keys import flatten, network_words
from fpgm.report.collect import Found, changed
from fpgm.report.paper import Published, counterpart, deviations, layers_named

# How a run is made, not what it is.
_NO_MATTER = {
    "seed", "device", "compile", "dataset.root", "dataset.workers", "dataset.on_error",
    "schedule.train_compact", "latency_table",
}  # fmt: skip
_OF_PRUNING = ("criterion.", "schedule.", "residual", "align", "scope", "floor", "rates", "ignore",
               "widths", "rounding", "threshold", "latency_t", "macs_target")  # fmt: skip
# What runs of older versions do not have, as if they had.
_SINCE: dict[str, Any] = {
    "rates": None, "ignore": [], "widths": None, "rounding": "pruned", "threshold": None,
    "scope_cost": "none", "latency_target": None, "latency_table": None,
}  # fmt: skip
_SINCE_BELOW = {
    "dataset.validation": 0.0, "optimizer.schedule": "step", "optimizer.label_smoothing": 0.0,
}  # fmt: skip
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

    @property
    def first_zeroing(self) -> Spread | None:
        """Accuracy right after it."""
        return self.known("accuracy", "first_zeroing")

    def known(self, part: str, key: str) -> Spread | None:
        """Of an entry of report.json that older runs do not have; None where some run has none."""
        values = [run.entry(part).get(key) for run in self.runs]
        return None if None in values else Spread.of(values)

    def times(self, *batches: int, of: str = "compact_ms") -> list[Spread | None]:
        """By batch, the compact network's time in ONNX Runtime, as a share of the dense one's; None
        where fpgm-latency has not measured some run. of: compact_int8_ms for int8."""
        known = [
            {row["batch"]: row[of] / row["dense_ms"] for row in run.times if of in row}
            for run in self.runs
        ]
        return [
            Spread.of([times[batch] for times in known])
            if all(batch in times for times in known)
            else None
            for batch in batches
        ]

    @property
    def int8(self) -> Spread | None:
        """Accuracy of the compact network in int8; None where some run has not been asked."""
        values = [run.int8 for run in self.runs if run.int8 is not None]
        return Spread.of(values) if len(values) == len(self.runs) else None

    @property
    def packed(self) -> Spread | None:
        """Bytes of the packed network; None where some run's weights have too many values."""
        files = [run.entry("compact").get("packed") for run in self.runs]
        return Spread.of([file["bytes"] for file in files]) if all(files) else None

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
            groups[tuple(sorted(identity(run).items()))].append(run)
    alike: defaultdict[tuple[str, str, str, str], list[Identity]] = defaultdict(list)
    for values, same in groups.items():
        alike[look(same[0].config)].append(values)
    made = []
    for seen, identities in alike.items():
        words = told_apart([dict(values) for values in identities])
        for values, also in zip(identities, words, strict=True):
            same = groups[values]
            made.append(Cell(*seen, also, tuple(same), _twice(same)))
    return sorted(made, key=_order)


def told_apart(identities: Sequence[Mapping[str, str]]) -> list[str]:
    """What each has that not all of them have, in words."""
    return [
        " ".join(
            f"{key}={value}"
            for key, value in values.items()
            if len({other.get(key) for other in identities}) > 1
        )
        for values in identities
    ]


def baseline_of(cell: Cell, table: Iterable[Cell]) -> Cell | None:
    """The unpruned cell that a pruned one is held against: of the same network and start, trained
    in the same way; of what was pretrained, else the one that it started from. None where there is
    none, or more than one."""
    if cell.problem or not cell.prunes:
        return None
    unpruned = [c for c in table if c.network == cell.network and not (c.prunes or c.problem)]
    found = [c for c in unpruned if c.start == cell.start and _training(c) == _training(cell)]
    if not found and cell.start == "pretrained":
        begun = {Path(run.config["pretrained"]).name for run in cell.runs}
        found = [c for c in unpruned if begun <= {run.directory.name for run in c.runs}]
    if not found and cell.start != "scratch":
        found = [c for c in unpruned if c.start == cell.start]
    return found[0] if len(found) == 1 else None


def _training(cell: Cell) -> dict[str, str]:
    """How a cell's networks were trained, whatever was pruned."""
    values = identity(cell.runs[0])
    other = (*_OF_PRUNING, "rate", "pretrained", "tune", "target")
    return {key: value for key, value in values.items() if not key.startswith(other)}


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


def identity(run: Found) -> dict[str, str]:
    """What a run is, as text by key."""
    config = _SINCE | run.config
    flat = {key: value for key, value in flatten(config).items() if key not in _NO_MATTER}
    if _is_baseline(config):
        flat = {key: value for key, value in flat.items() if not key.startswith(_OF_PRUNING)}
    if config["dataset"]["name"] == "image_folder":  # of the others the name says what they hold
        flat["dataset.root"] = config["dataset"]["root"]
    flat["precision"] = run.precision
    flat = _SINCE_BELOW | flat
    if flat.get("schedule.settle") != "auto":
        flat.pop("schedule.latest", None)
    # The runs of a cell start from baselines, or have teachers, that differ in the seed alone.
    return {key: re.sub(r"seed=\d+", "seed=N", str(value)) for key, value in flat.items()}


def _is_baseline(config: Mapping[str, Any]) -> bool:
    others = ("macs_target", "rates", "widths", "threshold", "latency_target")
    return config["rate"] == 0 and all(config.get(key) in (None, [], {}) for key in others)


NETWORKS = ("arch", "arch.name", "arch.build")  # the keys that say which one


def look(config: Mapping[str, Any], without: str = "") -> tuple[str, str, str, str]:
    """network, method, rate, start. without: a key that is said elsewhere."""
    given = config["pretrained"]
    start = {None: "scratch", "torchvision": given, "timm": given}.get(given, "pretrained")
    arch = config["arch"]
    if isinstance(arch, Mapping):
        arch = {key: value for key, value in arch.items() if f"arch.{key}" != without}
        without = "arch" if without in NETWORKS else without
    places = {"dataset.name": config["dataset"]["name"], "arch": network_words(arch)}
    network = " ".join(value for key, value in places.items() if key != without)
    beside = [
        _named(f"method.{name}", {"name": name, **options}, without)
        for name, options in config["method"].items()
    ]
    if _is_baseline(config):
        return network, " ".join(["baseline", *beside]), "0", start
    groups = [g for g in ("criterion", "schedule") if f"{g}.name" != without]
    words = [_named(group, config[group], without) for group in groups] + beside
    plain = {"residual": "independent", "align": 1, "scope": "layer"}
    for key, usual in plain.items():
        if key != without and config[key] != usual:
            words.append(f"align {config[key]}" if key == "align" else config[key])
    return network, " ".join(words), _amount(config, without), start


def _amount(config: Mapping[str, Any], without: str) -> str:
    """How much is pruned, in a word."""
    targets = {"latency_target": "latency", "macs_target": "MACs", "threshold": "below"}
    for key, word in targets.items():
        if config.get(key) is not None:
            return "" if key == without else f"{word} {config[key]:g}"
    for key in ("widths", "rates"):
        if config.get(key):
            return "" if key == without else layers_named(config) or key
    return "" if without == "rate" else f"{config['rate']:g}"


def _named(group: str, options: Mapping[str, Any], without: str) -> str:
    """A criterion, schedule or method by its name, and those of its options that are not as its
    YAML has them."""
    different = changed(group.partition(".")[0], options)
    left_out = ("train_compact", "latest", without.removeprefix(f"{group}."))
    different = {k: v for k, v in different.items() if k not in left_out}
    return " ".join([options["name"], *(f"{key}={value}" for key, value in different.items())])
