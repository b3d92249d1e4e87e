"""The widths that a time allows: the best there are, never more than the budget."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fpgm.errors import BudgetError
from fpgm.shipping.knapsack import knapsack, widths_within

COSTS = st.lists(st.lists(st.integers(0, 60), min_size=4, max_size=4), min_size=4, max_size=4)
VALUES = st.lists(st.lists(st.integers(0, 20), min_size=4, max_size=4), min_size=4, max_size=4)


def best_by_hand(costs, values, capacity) -> float | None:
    sums = [
        sum(values[g][c] for g, c in enumerate(choice))
        for choice in itertools.product(range(4), repeat=len(costs))
        if sum(costs[g][c] for g, c in enumerate(choice)) <= capacity
    ]
    return max(sums, default=None)


@given(COSTS, VALUES, st.integers(0, 200))
@settings(deadline=None, max_examples=60)
def test_knapsack_finds_what_trying_all_finds(costs, values, capacity: int) -> None:
    chosen, best = knapsack(costs, values, capacity), best_by_hand(costs, values, capacity)
    if best is None:
        assert chosen is None
        return
    assert sum(costs[g][c] for g, c in enumerate(chosen)) <= capacity
    assert sum(values[g][c] for g, c in enumerate(chosen)) == best


def test_a_time_too_long_to_count_in_microseconds_still_fits() -> None:
    costs = [[10_000_000 * c for c in range(1, 5)]] * 3
    chosen = knapsack(costs, [[0, 1, 2, 3]] * 3, 75_000_000)
    assert sum(costs[0][c] for c in chosen) == 70_000_000


OPTIONS = [[8, 16, 24, 32]] * 3
WORTH = [[1.0, 2.5, 3.5, 4.0], [1.0, 3.0, 4.0, 4.5], [2.0, 2.5, 2.8, 3.0]]


def separable(widths) -> float:
    """Each group by itself: 10, 20 and 5 microseconds a channel."""
    return sum(each * width for each, width in zip((10.0, 20.0, 5.0), widths, strict=True))


@pytest.mark.parametrize("budget", [300, 400, 500, 700, 900])
def test_where_layers_do_not_touch_each_other_the_choice_is_the_best_of_all(budget: int) -> None:
    found = widths_within(budget, OPTIONS, WORTH, separable)
    worth = {w: sum(v[o.index(x)] for v, o, x in zip(WORTH, OPTIONS, w, strict=True))
             for w in itertools.product(*OPTIONS)}  # fmt: skip
    assert worth[found] == max(v for w, v in worth.items() if separable(w) <= budget)


def chain(widths) -> float:
    """Three layers in a row: each takes what it reads times what it writes."""
    a, b, c = widths
    return 3 * a + a * b + b * c + 10 * c


@given(st.floats(0.3, 0.99))
@settings(deadline=None, max_examples=40)
def test_layers_that_touch_stay_within_the_budget_and_leave_no_room_for_another_step(
    share: float,
) -> None:
    budget = share * chain((32, 32, 32))
    found = widths_within(budget, OPTIONS, WORTH, chain)
    assert chain(found) <= budget
    for group in range(3):
        wider = (*found[:group], found[group] + 8, *found[group + 1 :])
        assert found[group] == 32 or chain(wider) > budget


def test_the_dense_networks_time_prunes_nothing() -> None:
    assert widths_within(chain((32, 32, 32)), OPTIONS, WORTH, chain) == (32, 32, 32)


def test_filters_that_cost_no_time_stay() -> None:
    """The first group takes the same whatever its width: only the others are narrowed."""
    found = widths_within(500, OPTIONS, WORTH, lambda w: 100 + 20 * w[1] + 5 * w[2])
    assert found[0] == 32


def test_a_time_below_the_least_is_refused_with_the_least() -> None:
    with pytest.raises(BudgetError, match=r"the narrowest network takes 0.280 ms"):
        widths_within(279, OPTIONS, WORTH, separable)
    assert widths_within(280, OPTIONS, WORTH, separable) == (8, 8, 8)
