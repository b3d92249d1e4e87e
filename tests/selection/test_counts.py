"""How many filters a rate keeps, and the rate that meets a budget."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import fpgm
from fpgm.compaction.constants import analyse
from fpgm.errors import BudgetError
from fpgm.graph.groups import RESIDUAL, prunable
from fpgm.graph.trace import trace
from fpgm.selection.budget import rate_nearest, rate_under
from fpgm.selection.rule import Rule
from fpgm.selection.select import highest, kept_counts, score


@given(st.integers(1, 2048), st.floats(0, 0.999), st.sampled_from([1, 8, 16, 32]))
def test_aligned_counts_are_multiples_nearest_to_the_rate_and_never_empty(
    filters: int, rate: float, align: int
) -> None:
    kept = Rule(align=align).kept(filters, rate)
    assert 1 <= kept <= filters
    assert kept % align == 0 or kept == filters
    if align > 1 and filters % align == 0:
        assert abs(kept - filters * (1 - rate)) <= max(align / 2, align - filters * (1 - rate))


@given(st.floats(0, 0.95), st.sampled_from([1, 8, 16]), st.sampled_from(RESIDUAL))
@settings(deadline=None, max_examples=30)
def test_every_layer_gets_its_count_also_where_it_is_made_of_several_groups(
    rate: float, align: int, residual: str
) -> None:
    groups = prunable(trace(RESNET20), residual).groups
    rule = Rule("l2", align=align)
    keep = highest(score(RESNET20, rule, rate, groups), rule, rate, groups)
    for name, kept in keep.items():
        filters = RESNET20.get_submodule(name).out_channels
        assert len(kept) == rule.kept(filters, rate)
        assert torch.equal(kept, kept.unique())
    assert all(c <= len(b) for b, c in zip(groups, kept_counts(groups, rule, rate), strict=True))


RESNET20 = fpgm.model("resnet20")


def macs_at(residual: str, align: int):
    graph, dense = trace(RESNET20), fpgm.cost(RESNET20, (3, 32, 32))
    groups = prunable(graph, residual).groups

    def macs(rate: float) -> int:
        rule = Rule("gm", align=align)
        keep = highest(score(RESNET20, rule, rate, groups), rule, rate, groups)
        return analyse(graph, keep).macs(dense)

    return macs


@pytest.mark.parametrize(("residual", "align"), [("shared", 1), ("shared", 8), ("inner", 1)])
@pytest.mark.parametrize("target", [0.4, 0.5, 0.7])
def test_budget_gives_the_largest_network_under_it(
    residual: str, align: int, target: float
) -> None:
    macs, limit = macs_at(residual, align), target * 40_551_040
    rate = rate_under(limit, macs)
    assert macs(rate) <= limit
    # No smaller rate fits: just below, some layer has one filter (or one multiple) more.
    assert macs(max(0.0, rate - 1e-4)) > limit


def test_budget_that_cannot_be_met_says_what_can() -> None:
    with pytest.raises(BudgetError, match=r"the smallest network has [\d,]+ MACs"):
        rate_under(1000, macs_at("shared", 8))
    assert rate_under(10**9, macs_at("shared", 8)) == 0


def test_alignment_stays_nearest_to_the_reduction_asked_for() -> None:
    wanted, macs = macs_at("shared", 1)(0.3), macs_at("shared", 8)
    reached = macs(rate_nearest(wanted, macs))
    possible = {macs(i / 200) for i in range(199)}
    assert abs(reached - wanted) == min(abs(other - wanted) for other in possible)
