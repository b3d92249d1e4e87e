"""The rate that meets a budget, on costs that fall as a network's do: in steps."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fpgm.errors import BudgetError
from fpgm.selection.budget import LARGEST, STEPS, rate_nearest, rate_under

FINEST = LARGEST / 2**STEPS


def macs_at(rate: float) -> int:
    """Two layers in a row, of 64 and of 100 filters."""
    first, second = 64 - int(64 * rate + 1e-9), 100 - int(100 * rate + 1e-9)
    return 27 * first + 9 * first * second


FULL, LEAST = macs_at(0), macs_at(LARGEST)


@given(st.integers(LEAST, FULL - 1))
def test_the_least_rate_under_the_limit_is_found_to_a_filter(limit: int) -> None:
    rate = rate_under(limit, macs_at)
    assert macs_at(rate) <= limit < macs_at(rate - 1.01 * FINEST)


@pytest.mark.parametrize("limit", [FULL, FULL + 1, 10 * FULL])
def test_what_fits_already_loses_nothing(limit: int) -> None:
    assert rate_under(limit, macs_at) == 0


def test_the_smallest_network_is_offered_where_the_limit_is_its_size() -> None:
    assert macs_at(rate_under(LEAST, macs_at)) == LEAST
    with pytest.raises(BudgetError, match=rf"^the smallest network has {LEAST:,} MACs, more than"):
        rate_under(LEAST - 1, macs_at)


@given(st.integers(LEAST, FULL))
def test_the_nearest_may_lie_above_what_is_wanted(wanted: int) -> None:
    distance = abs(macs_at(rate_nearest(wanted, macs_at)) - wanted)
    assert distance == min(abs(macs_at(i / 3200) - wanted) for i in range(3197))


def test_nearest_to_more_or_less_than_there_is_are_the_ends() -> None:
    assert rate_nearest(FULL + 1000, macs_at) == 0
    assert rate_nearest(LEAST - 1, macs_at) == LARGEST
