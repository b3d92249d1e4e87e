"""Methods in order: which is the best under one budget, and which of them can be told from it. No
torch.

Three seeds of each say little of their spread, twenty methods by three seeds say much: methods are
rows and seeds columns of a randomised block design, whose residual is the spread of them all, and
as many methods are held against the best, the confidence is shared among them (Bonferroni).
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from fpgm.report.cells import Cell
from fpgm.report.controls import accuracy_by_seed, epochs_in_all, of_task
from fpgm.report.table import Rows

NOTE = (
    "Cells of one network, on the same images, with the same share to go and after as many epochs "
    "in all, their baseline's among them; by the mean of top-1. behind the best: the mean "
    "difference over the seeds that both have, with the half-width of a 95 % confidence interval "
    "for all cells together (Bonferroni), of the spread that they have in common (the residual of "
    "cells and seeds, taken to be the same for all). They cannot be told apart where that interval "
    "holds 0. The best of many is flattered by chance."
)
HEADER = ["network", "rate", "place", "method", "start", "seeds", "top-1 %", "behind the best",
          "in words"]  # fmt: skip
LEAST = 3  # cells that are worth an order
_ALPHA = 0.05


@dataclass(frozen=True)
class Standing:
    """place: 1 is the best by the mean; behind: points of accuracy; half: half
    the width of the interval. None where it is not known."""

    cell: Cell
    place: int
    mean: float
    behind: float | None = None
    half: float | None = None

    @property
    def difference(self) -> str:
        if self.behind is None:
            return ""
        return f"{round(self.behind, 2) + 0.0:+.2f}" + (f" ± {self.half:.2f}" if self.half else "")

    @property
    def words(self) -> str:
        if self.place == 1:
            return "best"
        if self.behind is None:
            return "cannot tell: no seed in common"
        if self.half is None:
            return "cannot tell: one seed"
        return "worse" if -self.behind > self.half else "cannot tell"


def standings(table: Sequence[Cell]) -> list[list[Standing]]:
    """Of every set of pruned cells that may be held against each other, best first."""
    sets: defaultdict[tuple[object, ...], list[Cell]] = defaultdict(list)
    for cell in table:
        if cell.prunes and not cell.problem:
            task = tuple(sorted(of_task(cell).items()))
            sets[cell.network, cell.rate, epochs_in_all(cell, table), task].append(cell)
    return [_ordered(cells) for cells in sets.values() if len(cells) >= LEAST]


def _ordered(cells: Sequence[Cell]) -> list[Standing]:
    values = [accuracy_by_seed(cell) for cell in cells]
    means = [sum(own.values()) / len(own) for own in values]
    # Among equals those with more seeds, which say more.
    order = sorted(range(len(cells)), key=lambda i: (-means[i], -len(values[i])))
    best, (spread, freedom) = values[order[0]], residual(values)
    found = []
    for place, i in enumerate(order, 1):
        shared = best.keys() & values[i].keys()
        behind, half = None, None
        if place > 1 and shared:
            behind = sum(values[i][seed] - best[seed] for seed in shared) / len(shared)
            if freedom:
                half = _quantile(freedom, len(cells) - 1) * spread * math.sqrt(2 / len(shared))
        found.append(Standing(cells[i], place, means[i], behind, half))
    return found


def residual(values: Sequence[Mapping[int, float]]) -> tuple[float, int]:
    """Standard deviation of what neither the row nor the seed explains, by least squares, and its
    degrees of freedom, 0 where there are none. values: seed -> value, by row."""
    import numpy as np

    seeds = sorted({seed for own in values for seed in own})
    cells = [(row, seeds.index(seed)) for row, own in enumerate(values) for seed in own]
    y = np.array([value for own in values for value in own.values()])
    design = np.zeros((len(cells), len(values) + len(seeds)))
    for line, (row, seed) in enumerate(cells):
        design[line, [row, len(values) + seed]] = 1
    fitted, _, rank, _ = np.linalg.lstsq(design, y, rcond=None)
    freedom = len(cells) - int(rank)
    if freedom == 0:
        return 0.0, 0
    left = y - design @ fitted
    return math.sqrt(float(left @ left) / freedom), freedom


def _quantile(freedom: int, comparisons: int) -> float:
    from scipy import stats  # half a second: only where there is something to tell

    return float(stats.t.ppf(1 - _ALPHA / 2 / comparisons, freedom))


def rows(found: Sequence[Sequence[Standing]]) -> Rows:
    """The header and a row for each."""
    return HEADER, [
        [
            one.cell.network, one.cell.rate, (float(one.place), str(one.place)),
            f"{one.cell.method} {one.cell.also}".strip(), one.cell.start,
            ",".join(map(str, one.cell.seeds)),
            (one.mean, str(one.cell.spread("accuracy", "compact_last"))),
            "" if one.behind is None else (one.behind, one.difference), one.words,
        ]
        for standing in found
        for one in standing
    ]  # fmt: skip
