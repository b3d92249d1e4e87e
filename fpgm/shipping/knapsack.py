"""Which width each group gets, so that what is kept is worth most within a time: arithmetic alone.

A multiple-choice knapsack by dynamic programming over integer microseconds, as HALP (Shen et al.,
NeurIPS 2022) has it. A layer's time depends on two widths, what it reads and what it writes, so the
choice is made with all neighbours at today's width, again and again until it stays.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from fpgm.errors import BudgetError

STEPS = 12  # from the dense time down to the budget
ROUNDS = 12  # at the budget, until nothing changes
CELLS = 100_000  # of the dynamic programme: coarser than a microsecond for times beyond

Widths = tuple[int, ...]
Times = Callable[[Widths], float]  # of a network with these widths, microseconds


def knapsack(
    costs: Sequence[Sequence[float]], values: Sequence[Sequence[float]], capacity: float
) -> list[int] | None:
    """One choice for each group with the largest sum of values and a sum of costs within capacity.

    costs: microseconds, rounded to whole ones. Returns indices; None where nothing fits.
    """
    least = [min(row) for row in costs]
    room = round(capacity) - sum(round(cost) for cost in least)
    if room < 0:
        return None
    # Room that nobody can use is no room, and what is left is counted in whole cells.
    room = min(
        room, sum(round(max(row)) - round(low) for row, low in zip(costs, least, strict=True))
    )
    unit = max(1, -(-room // CELLS))
    cells = room // unit
    best = np.zeros(cells + 1)
    taken = []
    for row, low, worth in zip(costs, least, values, strict=True):
        totals = np.full((len(row), cells + 1), -np.inf)
        for choice, (cost, value) in enumerate(zip(row, worth, strict=True)):
            size = -(-(round(cost) - round(low)) // unit)  # up: what is found always fits
            if size <= cells:
                totals[choice, size:] = best[: cells + 1 - size] + value
        taken.append(totals.argmax(0))
        best = totals.max(0)
    chosen, cell = [], cells
    for row, low, choices in zip(reversed(costs), reversed(least), reversed(taken), strict=True):
        choice = int(choices[cell])
        chosen.append(choice)
        cell -= -(-(round(row[choice]) - round(low)) // unit)
    return chosen[::-1]


def widths_within(
    budget: float,
    options: Sequence[Sequence[int]],
    values: Sequence[Sequence[float]],
    times: Times,
) -> Widths:
    """A width for each group so that the network takes at most `budget` microseconds.

    options: for each group the widths it may have, rising; values: what each is worth. Starts at
    full width and comes down in steps, so that every choice is made beside neighbours that are
    nearly what they will be. Raises BudgetError where the narrowest network takes longer.
    """
    now = full = tuple(row[-1] for row in options)
    least = tuple(row[0] for row in options)
    if times(full) <= budget:
        return full
    if times(least) > budget:
        raise BudgetError(f"the narrowest network takes {times(least) / 1e3:.3f} ms")
    best, best_value = least, _worth(least, options, values)
    steps = np.geomspace(times(full), budget, STEPS + 1)[1:]
    seen: set[Widths] = set()
    for limit in [*steps, *[budget] * ROUNDS]:
        now = _once(float(limit), now, options, values, times)
        value = _worth(now, options, values)
        if times(now) <= budget and value > best_value:
            best, best_value = now, value
        if limit == budget and now in seen:
            break
        seen |= {now} if limit == budget else set()
    return _filled(budget, best, options, times)


def _once(
    budget: float,
    now: Widths,
    options: Sequence[Sequence[int]],
    values: Sequence[Sequence[float]],
    times: Times,
) -> Widths:
    """The best choice where each group's time is what the network takes with the others as now."""
    costs = [
        [times((*now[:group], width, *now[group + 1 :])) for width in row]
        for group, row in enumerate(options)
    ]
    today = times(now)
    # The sum of what each choice changes is to bring today's time to the budget.
    capacity = budget - today + today * len(options)
    chosen = knapsack(costs, values, capacity)
    if chosen is None:
        # Not in one step as the times stand: each group to what takes least beside the others.
        return tuple(row[int(np.argmin(cost))] for row, cost in zip(options, costs, strict=True))
    return tuple(row[choice] for row, choice in zip(options, chosen, strict=True))


def _filled(
    budget: float, widths: Widths, options: Sequence[Sequence[int]], times: Times
) -> Widths:
    """With every width as large as the budget lets it be: filters that cost no time stay."""
    grown = True
    while grown:
        grown = False
        for group, row in enumerate(options):
            wider = [w for w in row if w > widths[group]]
            for width in wider[:1]:
                tried = (*widths[:group], width, *widths[group + 1 :])
                if times(tried) <= budget:
                    widths, grown = tried, True
    return widths


def _worth(
    widths: Widths, options: Sequence[Sequence[int]], values: Sequence[Sequence[float]]
) -> float:
    return sum(
        row[list(choices).index(width)]
        for width, choices, row in zip(widths, options, values, strict=True)
    )
