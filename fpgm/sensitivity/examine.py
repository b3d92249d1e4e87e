"""From a finished run to the curves of its layers, and to rates by layer under a budget."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import yaml

from fpgm.criteria import named
from fpgm.criteria.evidence import Evidence, gather, require
from fpgm.errors import Error
from fpgm.graph.groups import Prunable, prunable
from fpgm.graph.trace import trace
from fpgm.keys import CONFIGS, network_words
from fpgm.machine.device import keep_freed_memory
from fpgm.selection.rule import Rule
from fpgm.sensitivity import rates as by_layer
from fpgm.sensitivity.curves import Row, curves
from fpgm.sensitivity.probe import Probe
from fpgm.sensitivity.subject import Subject
from fpgm.sensitivity.units import Unit, choice, units

BATCHES = 10  # of images, for a criterion that reads some where no YAML says how many
MOST = 5  # layers that the summary names


@dataclass(frozen=True)
class Settings:
    """criteria: none given means the run's; rates: shares of a layer, ascending; residual: see
    graph.groups; images: to measure on, at most; bn_batches: to estimate BatchNorm on again; limit:
    share of the dense MACs; align: multiples that the counts under this budget are."""

    criteria: tuple[str, ...]
    rates: tuple[float, ...]
    residual: str = "independent"
    images: int = 2000
    bn_batches: int = 10
    limit: float | None = None
    align: int = 1


@dataclass(frozen=True)
class Study:
    """What was found. filters: of every convolution; units: what was pruned alone; rows: curve by
    curve; summary: lines for the screen; about: the network and the criterion of the plan; plan,
    rates: what the budget leads to, and rates.yaml."""

    source: str
    settings: Settings
    filters: Mapping[str, int]
    units: Sequence[Unit]
    rows: Sequence[Row]
    summary: Sequence[str]
    about: Mapping[str, str]
    plan: by_layer.Plan | None = None
    rates: str | None = None

    @property
    def table(self) -> list[dict[str, Any]]:
        return [asdict(row) for row in self.rows]


def examine(subject: Subject, settings: Settings, command: str) -> Study:
    """Measure every layer alone. command: as it was given. Raises Error."""
    keep_freed_memory()
    if not settings.criteria:
        settings = replace(settings, criteria=(str(subject.config["criterion"]["name"]),))
    graph = trace(subject.model, subject.images.image_shape)
    filters = {name: graph.filters(name) for _, name in graph.writers()}
    tied = prunable(graph, settings.residual)
    found = units(tied.groups, filters)
    if not found:
        raise Error(f"{subject.directory}: no layer of this network can be pruned")
    seed = subject.config["seed"]
    rules = {name: Rule(name, seed=seed) for name in settings.criteria}
    evidence = _gathered(subject, tied, settings.criteria)
    choices = {n: choice(subject.model, r, tied.groups, evidence) for n, r in rules.items()}
    shown = subject.shown(settings.images)
    training = list(subject.training(settings.bn_batches))
    probe = Probe(subject.model, shown, training, subject.precision)
    rows = curves(probe, found, choices, settings.rates)
    summary = _summary(subject, rows, sum(len(labels) for _, labels in shown), probe.estimates)
    about = {
        "arch": subject.config["arch"],
        "residual": settings.residual,
        "criterion": settings.criteria[0],
    }
    source = f"{subject.directory}, {network_words(about['arch'])}"
    if settings.limit is None:
        return Study(source, settings, filters, found, rows, summary, about)
    rule = replace(rules[about["criterion"]], align=settings.align)
    aligned = choice(subject.model, rule, tied.groups, evidence)
    image = subject.images.image_shape
    plan = by_layer.plan(subject.model, image, found, aligned, rule, rows, settings.limit)
    summary += _planned(plan, settings)
    rates = by_layer.text(plan, command, about)
    return Study(source, settings, filters, found, rows, summary, about, plan, rates)


def _gathered(subject: Subject, tied: Prunable, names: Sequence[str]) -> Evidence:
    """What criteria look at beside the weights. Images: as many batches as the YAML of the
    criterion among them that wants most says."""
    for name in names:
        if named(name).views:
            require(subject.model, name, tied.layers)
    counts = [_batches(name) for name in names if named(name).reads_images]
    batches = subject.training(max(counts)) if counts else None
    return gather(subject.model, names, batches, tied.layers, subject.images.image_shape)


def _batches(criterion: str) -> int:
    path = CONFIGS / "criterion" / f"{criterion}.yaml"
    values = yaml.safe_load(path.read_text()) if path.exists() else {}
    return int(values.get("batches", BATCHES))


def _summary(subject: Subject, rows: Sequence[Row], count: int, estimates: bool) -> list[str]:
    """What is to be known of the figures, and the layers that lose most."""
    dense = rows[0]
    lines = [
        f"{dense.accuracy:.2f} % of {count} training images are right with nothing pruned, "
        f"{dense.accuracy_bn:.2f} % with BatchNorm estimated again"
    ]
    if subject.seen:
        lines.append(
            "the network has been trained on these images: with dataset.validation=0.1 a run holds "
            "some out"
        )
    if not estimates:
        lines.append("there is no BatchNorm to estimate: both accuracies are the same")
    half = min({row.rate for row in rows}, key=lambda rate: abs(rate - 0.5))
    at_half = [row for row in rows if row.rate == half and row.criterion == dense.criterion]
    at_half.sort(key=lambda row: row.accuracy_bn)
    named_ = ", ".join(f"{row.layer} {row.accuracy_bn:.2f} %" for row in at_half[:MOST])
    lines.append(f"most sensitive at rate {half:g} by {dense.criterion}: {named_}")
    return lines


def _planned(plan: by_layer.Plan, settings: Settings) -> list[str]:
    """What the budget has led to."""
    more = " (the first of --criteria)" if settings.criteria[1:] else ""
    bound = f"no layer alone loses more than {plan.threshold:.2f} points"
    if plan.macs == plan.dense:
        bound = "nothing has to go"
    return [
        f"{plan.macs:,} of {plan.dense:,} MACs ({100 * plan.macs / plan.dense:.1f} %) by "
        f"{settings.criteria[0]}{more}: {bound}"
    ]
