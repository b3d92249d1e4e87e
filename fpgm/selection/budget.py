"""The rate that meets a budget, found on the compact network that it leads to."""

from __future__ import annotations

from collections.abc import Callable

from fpgm.errors import BudgetError

STEPS = 14  # halvings of [0, 1): finer than one filter of 2048 in the largest layer
LARGEST = 0.999


def rate_under(limit: float, macs_at: Callable[[float], int]) -> float:
    """The least rate at which the network has at most `limit` MACs: the largest that fits.

    macs_at: rate -> MACs of the compact network, falling with the rate. Raises BudgetError.
    """
    if macs_at(0.0) <= limit:
        return 0.0
    if macs_at(LARGEST) > limit:
        raise BudgetError(
            f"the smallest network has {macs_at(LARGEST):,} MACs, more than {limit:,.0f}"
        )
    low, high = 0.0, LARGEST
    for _ in range(STEPS):
        middle = (low + high) / 2
        low, high = (low, middle) if macs_at(middle) <= limit else (middle, high)
    return high


def rate_nearest(wanted: float, macs_at: Callable[[float], int]) -> float:
    """The rate at which the network's MACs are nearest to `wanted`."""
    if macs_at(LARGEST) > wanted:
        return LARGEST
    fits = rate_under(wanted, macs_at)
    above = max(0.0, fits - LARGEST / 2**STEPS)
    nearest: float = min(fits, above, key=lambda rate: abs(macs_at(rate) - wanted))
    return nearest
