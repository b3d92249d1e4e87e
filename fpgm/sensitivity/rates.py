"""Rates by layer under a budget of MACs, and the file that fpgm-train takes them from."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import yaml
from torch import nn

from fpgm.compaction.constants import analyse
from fpgm.errors import BudgetError
from fpgm.graph.cost import cost
from fpgm.graph.trace import trace
from fpgm.selection.rule import Rule
from fpgm.sensitivity.budget import Widths, degradation, narrowest
from fpgm.sensitivity.curves import Row, points
from fpgm.sensitivity.units import Choice, Keep, Unit

DIGITS = 6  # of a rate


@dataclass(frozen=True)
class Plan:
    """threshold: what no layer alone loses more of, in points of accuracy; pruned: of every layer;
    rates: the same as shares; losses: of each unit; macs, dense: of one image."""

    threshold: float
    pruned: dict[str, int]
    rates: dict[str, float]
    losses: dict[str, float]
    macs: int
    dense: int


def share(pruned: int, filters: int) -> float:
    """The least rate of six digits at which floor(filters * rate) filters go: rounded up."""
    return float(-(-pruned * 10**DIGITS // filters) / 10**DIGITS)


def plan(
    model: nn.Module,
    image: tuple[int, int, int],
    units: Sequence[Unit],
    choose: Choice,
    rule: Rule,
    rows: Sequence[Row],
    limit: float,
) -> Plan:
    """The rates at which the compact network has at most the share `limit` of the dense MACs.

    choose, rule: of one criterion, with the alignment that counts are to have; rows: its curves,
    beyond the last of whose points no layer goes. Raises BudgetError that names the least.
    """
    # On the CPU: the analysis looks at every small result.
    graph = trace(copy.deepcopy(model).cpu(), image)
    dense = cost(graph.module, image)
    widths = [_widths(unit, choose, points(rows, unit.name, rule.criterion)) for unit in units]

    def keep(places: Widths) -> Keep:
        chosen = [of[place][1] for of, place in zip(widths, places, strict=True)]
        return {name: kept for one in chosen for name, kept in one.items()}

    def macs(places: Widths) -> int:
        return analyse(graph, keep(places)).macs(dense)

    losses = [[loss for loss, _ in of] for of in widths]
    try:
        threshold, places = narrowest(losses, macs, limit * dense.macs)
    except BudgetError as error:
        least = macs([len(of) - 1 for of in widths])
        raise BudgetError(
            f"--budget macs={limit:g}: {error}; the least is "
            f"macs={math.ceil(1e3 * least / dense.macs) / 1e3:g}, as no layer loses more than the "
            "largest of --rates"
        ) from error
    final = keep(places)
    filters = {name: graph.filters(name) for name in final}
    pruned = {name: filters[name] - len(kept) for name, kept in final.items()}
    rates = {name: _rate(rule, filters[name], count) for name, count in pruned.items()}
    lost = {u.name: of[at][0] for u, of, at in zip(units, widths, places, strict=True)}
    return Plan(threshold, pruned, rates, lost, macs(places), dense.macs)


def text(made: Plan, command: str, about: Mapping[str, str]) -> str:
    """rates.yaml: the command, what it leads to, `about` (arch, residual, criterion), the rates."""
    share = 100 * made.macs / made.dense
    head = f"# {command}\n# {made.macs:,} of {made.dense:,} MACs ({share:.1f} %)\n"
    return head + yaml.safe_dump({**about, "rates": made.rates}, sort_keys=False)


def _widths(
    unit: Unit, choose: Choice, measured: Sequence[tuple[int, float]]
) -> list[tuple[float, Keep]]:
    """What each number of filters costs in accuracy and which stay then, the widest first."""
    losses = degradation(measured)
    found: dict[int, tuple[float, Keep]] = {}
    for count in range(len(losses)):
        keep = choose(unit, share(count, unit.filters))
        gone = unit.pruned(keep)
        if gone < len(losses):
            found.setdefault(gone, (losses[gone], keep))
    return [found[gone] for gone in sorted(found)]


def _rate(rule: Rule, filters: int, pruned: int) -> float:
    """At which so many filters go, by a criterion's own way of counting if it has one."""
    rates = (share(count, filters) for count in range(pruned, filters))
    return next(rate for rate in rates if rule.pruned(filters, rate) == pruned)
