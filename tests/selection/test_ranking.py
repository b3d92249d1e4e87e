"""One ranking over a network: the lowest go wherever they are, and no layer is emptied."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from zoo import randomised

import fpgm
from fpgm.compaction.compact import compact
from fpgm.errors import Error
from fpgm.graph.groups import RESIDUAL, Group, prunable
from fpgm.graph.trace import trace
from fpgm.selection.ranking import (
    NORMALISATIONS,
    at_floor,
    group_scores,
    kept_in_one_ranking,
    least_kept,
    levelled,
    normalised,
    pruned_count,
)
from fpgm.selection.rule import Rule
from fpgm.selection.select import highest, score, select
from fpgm.selection.zero import zero_

MODEL = randomised(fpgm.model("resnet20"), 0)
GROUPS = {mode: prunable(trace(MODEL), mode).groups for mode in RESIDUAL}

seeds = st.integers(0, 2**31)
rates = st.floats(0, 0.9)
aligns = st.sampled_from([1, 4, 8])
floors = st.sampled_from([0.0, 0.05, 0.1])


def drawn(seed: int, sizes: list[int]) -> tuple[list[Group], list[torch.Tensor]]:
    """Single layers of these sizes and scores for them."""
    g = torch.Generator().manual_seed(seed)
    groups = [Group(((str(i), torch.arange(n)),)) for i, n in enumerate(sizes)]
    return groups, [torch.rand(n, generator=g, dtype=torch.float64) for n in sizes]


@given(seeds, st.lists(st.integers(1, 30), min_size=1, max_size=6), rates, floors)
def test_the_lowest_of_the_network_go_until_a_layer_is_at_its_floor(
    seed: int, sizes: list[int], rate: float, floor: float
) -> None:
    groups, scores = drawn(seed, sizes)
    counts = kept_in_one_ranking(groups, scores, rate, 1, floor)
    left, quota = list(sizes), pruned_count(sum(sizes), rate)
    pairs = sorted((float(s), i) for i, own in enumerate(scores) for s in own)
    for _, i in pairs:  # by hand: from the lowest up, passing over layers at the floor
        if quota and left[i] > least_kept(sizes[i], floor):
            left[i] -= 1
            quota -= 1
    assert counts == left


@given(seeds, rates, aligns, floors, st.sampled_from(RESIDUAL), st.sampled_from(NORMALISATIONS))
@settings(deadline=None, max_examples=60)
def test_global_selection_keeps_floor_alignment_and_count_for_any_structure(
    seed: int, rate: float, align: int, floor: float, residual: str, how: str
) -> None:
    groups = GROUPS[residual]
    rule = Rule("random", {}, "global", how, floor, align, seed)
    keep = highest(score(MODEL, rule, rate, groups), rule, rate, groups)
    filters = {name: MODEL.get_submodule(name).out_channels for name in keep}
    for name, kept in keep.items():
        assert len(kept) >= least_kept(filters[name], floor)
        assert len(kept) % align == 0
        assert torch.equal(kept, kept.unique())
    gone = sum(filters.values()) - sum(map(len, keep.values()))
    assert gone <= pruned_count(sum(filters.values()), rate)
    for group in groups:  # what is tied stays tied
        rows = [torch.isin(own, keep[name]) for name, own in group.members]
        assert all(torch.equal(row, rows[0]) for row in rows)


CRITERIA = st.sampled_from(["l2", "gm", "fermat", "bn_gamma"])
NORMS = st.sampled_from(NORMALISATIONS)


@given(seeds, st.floats(0.05, 0.9), aligns, st.sampled_from(RESIDUAL), CRITERIA, NORMS)
@settings(deadline=None, max_examples=40)
def test_what_is_zeroed_is_chosen_again_whatever_the_rest_has_learnt(
    seed: int, rate: float, align: int, residual: str, criterion: str, how: str
) -> None:
    model, groups = copy.deepcopy(MODEL), GROUPS[residual]
    rule = Rule(criterion, {}, "global", how, align=align)
    keep = highest(score(model, rule, rate, groups), rule, rate, groups)
    g = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        # Away from zero, which then is no longer near the filters' median.
        parameter.data += torch.randn(parameter.shape, generator=g) + 3 * torch.randn(
            1, generator=g
        )
    zero_(model, keep)
    again = highest(score(model, rule, rate, groups), rule, rate, groups)
    assert all(torch.equal(again[name], kept) for name, kept in keep.items())


def test_rank_normalisation_takes_the_same_share_of_every_layer() -> None:
    keep = select(MODEL, "l2", 0.5, scope="global", normalise="rank")
    by_layer = select(MODEL, "l2", 0.5)
    assert {name: kept.tolist() for name, kept in keep.items()} == {
        name: kept.tolist() for name, kept in by_layer.items()
    }


def test_layers_of_small_scores_go_first_only_without_normalisation() -> None:
    model = copy.deepcopy(MODEL)
    model.layer2[0].conv1.weight.data *= 1e-3
    keep = select(model, "l2", 0.3, scope="global", normalise="none", floor=0.25)
    assert len(keep["layer2.0.conv1"]) == 8
    for how in ("mean", "l2", "rank"):
        a, b = (select(m, "l2", 0.3, scope="global", normalise=how) for m in (model, MODEL))
        assert torch.equal(a["layer2.0.conv1"], b["layer2.0.conv1"])


@given(seeds, st.floats(1e-3, 1e3))
def test_normalised_scores_keep_their_order_and_lose_their_scale(seed: int, scale: float) -> None:
    scores = torch.randn(12, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    scores[3] = -torch.inf  # pruned already: the scale is that of the others
    live = scores[scores.isfinite()]
    torch.testing.assert_close(normalised(scores, "mean"), scores / live.abs().mean())
    torch.testing.assert_close(normalised(scores, "l2"), scores / live.square().sum().sqrt())
    assert torch.equal(normalised(scores, "none"), scores)
    for how in NORMALISATIONS:
        assert torch.equal(normalised(scores, how).argsort(), scores.argsort())
    for how in ("mean", "l2", "rank"):
        torch.testing.assert_close(normalised(scores * scale, how), normalised(scores, how))


def test_a_tied_channel_is_judged_by_the_layers_where_it_lives() -> None:
    group = Group((("a", torch.tensor([0, 1, 2])), ("b", torch.tensor([2, 1, 0]))))
    dead = -torch.inf
    scores = {"a": torch.tensor([1.0, dead, 3.0]), "b": torch.tensor([dead, dead, 4.0])}
    assert group_scores(group, scores, "none").tolist() == [2.5, dead, 3.0]
    assert group_scores(group, scores).tolist() == [0.75, dead, 1.5]  # over means of 2 and 4


def test_a_layer_alone_is_judged_by_its_scores_as_they_are() -> None:
    group = Group((("a", torch.tensor([2, 0])),))
    assert group_scores(group, {"a": torch.tensor([1.0, 8.0, 4.0])}).tolist() == [4, 1]
    assert group_scores(group, {"a": torch.tensor([1.0, 8.0, 3.0])}, "mean").tolist() == [
        0.75,
        0.25,
    ]


@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])
def test_scores_are_levelled_to_eleven_digits_and_stay_what_they_are(scale: float) -> None:
    scores = scale * torch.tensor([0.25, 0.5, 0.5 * (1 + 1e-13), -torch.inf, 0.7, 0.8]).double()
    level = levelled(scores)
    torch.testing.assert_close(level, scores, rtol=3e-11, atol=0)
    assert level[1] == level[2] < level[4] < level[5]
    for none in (torch.zeros(3), torch.full((3,), -torch.inf)):
        assert torch.equal(levelled(none), none)


def test_collapsed_layers_are_those_at_the_floor() -> None:
    groups, _ = drawn(0, [10, 20, 1])
    assert at_floor(groups, {"0": 1, "1": 3, "2": 1}, 1, 0.1) == ["0"]
    assert at_floor(groups, {"0": 8, "1": 8, "2": 1}, 8, 0.1) == ["0", "1"]


def test_order_of_the_filters_does_not_matter_to_one_ranking() -> None:
    model, order = copy.deepcopy(MODEL), torch.randperm(16)
    model.layer1[0].conv1.weight.data = model.layer1[0].conv1.weight.data[order]
    for criterion in ("l2", "gm"):
        a, b = (select(m, criterion, 0.5, scope="global") for m in (MODEL, model))
        assert sorted(order[b["layer1.0.conv1"]].tolist()) == a["layer1.0.conv1"].tolist()
        del a["layer1.0.conv1"], b["layer1.0.conv1"]
        assert all(torch.equal(a[name], b[name]) for name in a)


def test_globally_pruned_network_is_compacted_exactly() -> None:
    model = copy.deepcopy(MODEL).double()
    keep = select(model, "gm", 0.6, scope="global", normalise="none", residual="shared")
    zero_(model, keep)
    x = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    with torch.no_grad():
        torch.testing.assert_close(compact(model, keep)(x), model(x), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"scope": "all"}, "scope=all: choose one of layer, global"),
        ({"scope": "global", "normalise": "max"}, "normalise=max: choose one of none, mean"),
        ({"scope": "global", "floor": 1.0}, "floor=1.0: must be at least 0 and below 1"),
        ({"scope": "global", "rate": 0.95}, "rate=0.95: floor=0.1 lets at most 0.9 of the filters"),
        (
            {"scope": "global", "criterion": "mix"},
            "scope=global: criterion=mix is an order of pruning",
        ),
        ({"criterion": "taylor"}, "criterion=taylor: looks at images, give evidence="),
        ({"criterion": "taylor", "evidence": {}}, "the evidence has no sensitivity of conv1"),
    ],
)
def test_what_one_ranking_cannot_do_is_refused_in_a_line(options: dict, message: str) -> None:
    with pytest.raises(Error, match=message) as caught:
        select(MODEL, **options)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("criterion", ["gm", "l2", "bn_gamma", "random"])
def test_weights_that_are_no_numbers_are_named(criterion: str) -> None:
    model = copy.deepcopy(MODEL)
    model.layer2[1].conv2.weight.data[3, 1] = torch.nan
    with pytest.raises(Error, match=r"layer2.1.conv2: its weights"):
        select(model, criterion, 0.3)
