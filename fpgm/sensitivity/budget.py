"""How many filters each layer loses under a budget: one threshold on what it costs in accuracy."""

from __future__ import annotations

import bisect
import math
from collections.abc import Callable, Sequence

from fpgm.errors import BudgetError

Widths = Sequence[int]  # of each layer, its place in the layer's list of widths, the widest first


def degradation(points: Sequence[tuple[int, float]]) -> list[float]:
    """What losing 0, 1, 2, ... filters costs, from what was measured of some of these numbers.

    points: (pruned filters, accuracy in percent), ascending, the first of 0 filters, which is the
    dense network's. In between the accuracy is interpolated; the loss of a width is the largest
    of all that are as wide or wider, so that it never falls (FastNAS). Returns one number for each
    count up to the last that was measured: points of accuracy, the first 0.
    """
    lost, worst = [], 0.0
    dense = points[0][1]
    for (start, before), (stop, after) in zip(points, [*points[1:], points[-1]], strict=True):
        for count in range(start, max(stop, start + 1)):
            step = (count - start) / (stop - start) if stop > start else 0.0
            worst = max(worst, dense - (before + step * (after - before)))
            lost.append(worst)
    return lost


def narrowest(
    degrade: Sequence[Sequence[float]], cost: Callable[[Widths], float], limit: float
) -> tuple[float, list[int]]:
    """One threshold for all layers, the smallest at which the network costs at most `limit`.

    degrade: of each layer, what its widths lose, from the widest down and never falling; cost: of
    a network of these widths, never rising with their places. Each layer takes the narrowest width
    whose loss is within the threshold; the threshold is found by bisection over all losses there
    are (FastNAS, ModelOpt), and is -inf where nothing has to go. Returns it and the widths' places.
    Raises BudgetError where the narrowest network costs more.
    """

    def within(threshold: float) -> list[int]:
        return [max(bisect.bisect_right(losses, threshold) - 1, 0) for losses in degrade]

    thresholds = [-math.inf, *sorted({loss for losses in degrade for loss in losses})]
    least = cost(within(thresholds[-1]))
    if least > limit:
        raise BudgetError(f"the narrowest network costs {least:,.0f}, more than {limit:,.0f}")
    place = bisect.bisect_left(thresholds, True, key=lambda t: cost(within(t)) <= limit)
    return thresholds[place], within(thresholds[place])
