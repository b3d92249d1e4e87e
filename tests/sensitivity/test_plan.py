"""A budget that is met, by the least loss that any layer alone must bear."""

from __future__ import annotations

import itertools
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fpgm.errors import BudgetError
from fpgm.sensitivity.budget import Widths, degradation, narrowest

# Of each layer: what its widths lose, and what they cost.
Layer = tuple[list[float], list[int]]


@st.composite
def layers(draw: st.DrawFn) -> list[Layer]:
    found = []
    for count in draw(st.lists(st.integers(1, 5), min_size=1, max_size=4)):
        steps = draw(st.lists(st.integers(0, 3), min_size=count - 1, max_size=count - 1))
        saved = draw(st.lists(st.integers(0, 3), min_size=count - 1, max_size=count - 1))
        losses = [float(loss) for loss in itertools.accumulate([0, *steps])]
        found.append((losses, [20 - gone for gone in itertools.accumulate([0, *saved])]))
    return found


def solved(of: list[Layer], limit: float) -> tuple[float, list[int], int]:
    """Threshold, places and cost."""

    def cost(places: Widths) -> int:
        return sum(costs[place] for (_, costs), place in zip(of, places, strict=True))

    threshold, places = narrowest([losses for losses, _ in of], cost, limit)
    return threshold, places, cost(places)


def test_fastnas_example() -> None:
    of: list[Layer] = [([0, 1, 4], [4, 3, 2]), ([0, 3, 5], [4, 3, 2])]
    assert solved(of, 6) == (3, [1, 1], 6)
    assert solved(of, 7) == (1, [1, 0], 7)  # what threshold 1 gives


@given(layers(), st.integers(0, 80))
def test_budget_is_met_with_the_least_threshold_or_refused(of: list[Layer], limit: int) -> None:
    dense, least = (sum(costs[end] for _, costs in of) for end in (0, -1))
    if limit < least:
        with pytest.raises(BudgetError, match=rf"costs {least}, more than {limit}$"):
            solved(of, limit)
        return
    threshold, places, cost = solved(of, limit)
    assert cost <= limit
    for (losses, _), place in zip(of, places, strict=True):
        assert losses[place] <= threshold or (place, limit >= dense) == (0, True)
        assert place + 1 == len(losses) or losses[place + 1] > threshold
    # Nothing less will do: not by any of the losses below.
    smaller = [loss for losses, _ in of for loss in losses if loss < threshold]
    for other in smaller:
        gone = [max(i for i, loss in enumerate(losses) if loss <= other) for losses, _ in of]
        assert sum(costs[place] for (_, costs), place in zip(of, gone, strict=True)) > limit


@given(layers(), st.integers(0, 80), st.integers(0, 80))
def test_more_of_a_budget_prunes_no_layer_more(of: list[Layer], one: int, more: int) -> None:
    least = sum(costs[-1] for _, costs in of)
    small, large = solved(of, least + one), solved(of, least + one + more)
    assert small[0] >= large[0]
    assert all(a >= b for a, b in zip(small[1], large[1], strict=True))


@given(layers())
def test_budget_of_the_dense_network_prunes_nothing_even_where_it_would_be_free(
    of: list[Layer],
) -> None:
    dense = sum(costs[0] for _, costs in of)
    assert solved(of, dense) == (-math.inf, [0] * len(of), dense)


def test_loss_is_interpolated_and_never_falls() -> None:
    # 92 % with nothing pruned, better with 2 filters gone, worse with 4, better again with 6.
    lost = degradation([(0, 92.0), (2, 93.0), (4, 90.0), (6, 91.0)])
    assert lost == pytest.approx([0, 0, 0, 0.5, 2, 2, 2])
    assert degradation([(0, 50.0)]) == [0]


@given(st.lists(st.floats(0, 100), min_size=1, max_size=8), st.integers(1, 4))
def test_loss_starts_at_none_and_covers_what_was_measured(
    accuracies: list[float], step: int
) -> None:
    lost = degradation([(step * i, value) for i, value in enumerate(accuracies)])
    assert len(lost) == step * (len(accuracies) - 1) + 1
    assert lost[0] == 0
    assert lost == sorted(lost)
    assert lost[-1] == pytest.approx(max(accuracies[0] - min(accuracies), 0))
