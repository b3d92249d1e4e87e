"""Rates by layer: what is asked for a layer is what it gets, and what cannot be is said."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import fpgm
from fpgm.errors import Error
from fpgm.graph.groups import RESIDUAL, prunable
from fpgm.graph.trace import trace
from fpgm.selection.ranking import kept_above
from fpgm.selection.rule import Rule
from fpgm.selection.select import select

RESNET = fpgm.model("resnet20")
GRAPH = trace(RESNET)
SIZES = {name: GRAPH.filters(name) for name in prunable(GRAPH).layers}
LAYERS = list(SIZES)


def widths(keep: dict[str, torch.Tensor]) -> dict[str, int]:
    return {name: len(kept) for name, kept in keep.items()}


def test_the_first_pattern_that_fits_a_layer_counts_and_others_get_the_rate() -> None:
    table = {"layer1.0.conv1": 0.5, "layer1*": 0.25, "conv1": 0}
    kept = widths(select(RESNET, "l2", rate=0.1, rates=table))
    assert kept["layer1.0.conv1"] == 8
    assert kept["layer1.2.conv2"] == 12
    assert kept["conv1"] == 16
    assert kept["layer3.0.conv1"] == 58  # 64 less floor(6.4)


@given(st.dictionaries(st.sampled_from(LAYERS), st.floats(0, 0.95), min_size=1), st.floats(0, 0.9))
@settings(deadline=None, max_examples=25)
def test_a_layer_loses_what_its_own_rate_says_whatever_others_lose(table, rate: float) -> None:
    kept = widths(select(RESNET, "l1", rate=rate, rates=table))
    for name, size in SIZES.items():
        assert kept[name] == size - int(size * table.get(name, rate) + 1e-9)


def test_a_list_of_widths_is_a_width_for_each_layer_in_order() -> None:
    asked = [max(1, size - 3 * place) for place, size in enumerate(SIZES.values())]
    assert list(widths(select(RESNET, "gm", widths=asked)).values()) == asked
    some = widths(select(RESNET, "gm", rate=0.5, widths={"layer3.*.conv1": 5}))
    assert some["layer3.1.conv1"] == 5
    assert some["layer3.1.conv2"] == 32


@pytest.mark.parametrize("residual", RESIDUAL)
def test_an_ignored_layer_keeps_all_filters_and_so_does_what_is_tied_to_it(residual: str) -> None:
    keep = select(RESNET, "l2", rate=0.5, residual=residual, ignore=["layer3.0.conv2"])
    assert "layer3.0.conv2" not in keep
    tied = {"layer3.1.conv2", "conv1"} & keep.keys()
    assert bool(tied) == (residual == "independent")
    why = prunable(GRAPH, residual, ["layer3.0.conv2"]).kept_full
    assert "ignore=layer3.0.conv2" in why["layer3.0.conv2"] or residual == "inner"


@given(st.integers(1, 2048), st.floats(0, 0.99))
def test_pfec_rounds_what_is_kept_down_and_the_others_what_goes(filters: int, rate: float) -> None:
    kept = filters - Rule(rounding="kept").pruned(filters, rate)
    assert kept == int(filters * (1 - rate) + 1e-9)
    assert 0 <= Rule().kept(filters, rate) - kept <= 1


@pytest.mark.parametrize("criterion", ["l1", "l2", "gm"])
def test_a_threshold_prunes_the_filters_that_score_below_it_and_no_others(criterion: str) -> None:
    score = fpgm.criteria.CRITERIA[criterion]
    threshold = float(score(RESNET.layer2[0].conv1.weight).median())
    keep = select(RESNET, criterion, threshold=threshold)
    for name, kept in keep.items():
        scores = score(RESNET.get_submodule(name).weight)
        above = (scores >= threshold).nonzero().flatten()
        assert torch.equal(kept, above) or (len(above) == 0 and len(kept) == 1)
    assert len(keep["layer2.0.conv1"]) == 17  # the median is kept, and what lies above


def test_a_filter_that_is_zero_stays_pruned_by_a_threshold_that_its_score_exceeds() -> None:
    """Under gm a filter of zeros lies far from all others."""
    model = fpgm.model("resnet20")
    with torch.no_grad():
        model.conv1.weight[3] = 0
        model.conv1.weight[4:] = model.conv1.weight[5]
    gm = fpgm.criteria.CRITERIA["gm"](model.conv1.weight)
    assert gm[3] > gm[5] + 1e-9
    assert 3 not in select(model, "gm", threshold=float(gm[5]))["conv1"]


@given(
    st.lists(st.floats(-5, 5), min_size=1, max_size=40),
    st.floats(-6, 6),
    st.sampled_from([1, 4, 8]),
)
def test_alignment_never_prunes_a_filter_above_the_threshold(scores, threshold, align) -> None:
    values = torch.tensor(scores, dtype=torch.float64)
    kept = kept_above(values, threshold, align)
    above = int((values >= threshold).sum())
    assert max(above, 1) <= kept <= len(scores)
    assert kept % align == 0 or kept == len(scores)
    assert kept - max(above, 1) < align


@pytest.mark.parametrize("key", ["rates", "widths"])
def test_a_schedule_that_grows_brings_each_layer_to_its_own_rate(key: str) -> None:
    asked = {"rates": {"conv1": 0.5}, "widths": {"conv1": 8}}[key]
    rule = Rule(**{key: asked}, share=0.5).for_network(SIZES, {})
    assert rule.kept_of("conv1", 16, 0.4) == 12
    assert rule.kept_of("layer1.0.conv1", 16, 0.4) == 13  # floor(16 * .2)


def test_layers_that_are_decided_together_follow_the_one_that_is_asked_for_by_name() -> None:
    keep = widths(select(RESNET, "l2", rate=0.5, residual="shared", rates={"conv1": 0.25}))
    assert keep["conv1"] == keep["layer1.0.conv2"] == 12
    assert keep["layer3.2.conv2"] == 32  # what it is to keep in all, of all its groups


def test_isomorphic_ranks_like_layers_together_and_no_others() -> None:
    model = fpgm.model("resnet20")
    with torch.no_grad():
        for block in model.layer3:
            block.conv1.weight *= 100  # in one ranking nobody else would be left
        model.layer3[2].conv1.weight[:40] *= 1e-3
    keep = widths(select(model, "l2", 0.5, scope="isomorphic", normalise="none", floor=0.05))
    like = [keep[f"layer3.{block}.conv1"] for block in (1, 2)]
    assert sum(like) == 64  # layer3.0.conv1 reads another number of channels with another stride
    assert like[1] <= 24  # all that are small, and some more
    assert keep["layer3.0.conv1"] == 32
    assert sum(keep[f"layer1.{b}.conv1"] for b in range(3)) == 24


def test_a_channel_that_costs_much_goes_before_one_that_costs_little() -> None:
    """With scores that are all alike one ranking over the memory takes the large maps first."""
    options = {"scope": "global", "normalise": "rank", "image": (3, 32, 32), "floor": 0.1}
    even = widths(select(RESNET, "l2", 0.3, **options))
    dear = widths(select(RESNET, "l2", 0.3, cost="memory", **options))
    assert dear["layer1.1.conv1"] < even["layer1.1.conv1"]
    assert dear["layer3.1.conv1"] > even["layer3.1.conv1"]


@pytest.mark.parametrize(
    ("given", "line"),
    [
        ({"rates": {"conv9*": 0.5}}, r"rates: conv9\* fits no layer; the layers are conv1, "),
        ({"rates": {"conv1": 1.0}}, r"rates: conv1=1.0: must be at least 0 and below 1"),
        ({"rates": {"conv1": -0.1}}, r"rates: conv1=-0.1: must be at least 0"),
        ({"widths": [3, 3]}, r"widths: 2 numbers for 19 layers, which are conv1 \(16\)"),
        ({"widths": {"conv1": 17}}, r"widths: conv1=17: it has 16 filters"),
        ({"widths": {"conv1": 0}}, r"widths: conv1=0: it has 16 filters"),
        ({"ignore": ["nothing"]}, r"ignore: nothing fits no layer; the layers are conv1"),
        ({"rates": {"conv1": 0.1}, "widths": {"conv1": 3}}, r"rates and widths: one of them says"),
        ({"rates": {"conv1": 0.1}, "scope": "global"}, r"rates: goes with scope=layer"),
        ({"threshold": 1.0, "criterion": "mix"}, r"threshold=1.0: criterion=mix is an order"),
        ({"rounding": "up"}, r"rounding=up: choose one of pruned, kept"),
        ({"cost": "macs"}, r"scope_cost=macs: all filters of a layer cost the same"),
        ({"cost": "macs", "scope": "global"}, r"cost=macs: depends on the images' size"),
        (
            {"residual": "shared", "rates": {"layer1.0.conv2": 0.5, "layer1.1.conv2": 0.2}},
            r"rates: layer1.0.conv2 is to keep 8 of 16 filters and would keep 13, as it is decided "
            r"together with layer1.1.conv2: ask the same",
        ),
        ({"residual": "inner", "rates": {"conv1": 0.5}}, r"rates: conv1: conv1 is not pruned"),
    ],
)  # fmt: skip
def test_what_cannot_be_asked_for_is_said_in_one_line(given, line: str) -> None:
    with pytest.raises(Error, match=line) as error:
        select(RESNET, **{"criterion": "l2", **given})
    assert "\n" not in str(error.value)
