"""Rates that prune just the filters that were meant, and as many MACs as was said."""

from __future__ import annotations

import itertools
import re

import pytest
import torch
import yaml
from zoo import randomised

import fpgm
from fpgm.compaction.compact import compact
from fpgm.errors import BudgetError
from fpgm.graph.groups import prunable
from fpgm.graph.trace import trace
from fpgm.selection.ranking import pruned_count
from fpgm.selection.rule import Rule
from fpgm.sensitivity.curves import Row, curves, points
from fpgm.sensitivity.rates import Plan, plan, share, text
from fpgm.sensitivity.units import Keep, Unit, choice, units

IMAGE = (3, 16, 16)
RATES = (0.2, 0.4, 0.6, 0.8)


def test_a_rate_prunes_just_as_many_filters_as_it_was_written_for() -> None:
    for filters in range(1, 2049):
        for pruned in {*range(min(filters, 70)), *range(0, filters, 37), filters - 1}:
            rate = share(pruned, filters)
            assert rate == round(rate, 6) < 1
            assert pruned_count(filters, rate) == pruned
            assert pruned_count(filters, float(str(rate))) == pruned
    assert [share(5, 16), share(1, 10), share(1, 3), share(0, 7)] == [0.3125, 0.1, 0.333334, 0]


class Steep:
    """Deeper layers lose less: each filter costs 10 / depth points in place of a measurement."""

    def __init__(self, layers: list[Unit]) -> None:
        self.depth = {unit.name: depth for depth, unit in enumerate(layers, 1)}
        self.filters = {unit.name: unit.filters for unit in layers}
        self.calls: list[Keep] = []

    def accuracies(self, keep: Keep) -> tuple[float, float]:
        self.calls.append(keep)
        names = [name for name in keep if name in self.depth]
        lost = [(self.filters[n] - len(keep[n])) * 10 / self.depth[n] for n in names]
        return 90 - 2 * sum(lost), 90 - sum(lost)


def planned(
    limit: float, residual: str = "independent", align: int = 1, criterion: str = "l1"
) -> tuple[torch.nn.Module, list[Row], Plan]:
    torch.manual_seed(0)
    model = randomised(fpgm.model("resnet20"), 0).eval()
    graph = trace(model)
    tied = prunable(graph, residual)
    of = units(tied.groups, {name: graph.filters(name) for _, name in graph.convolutions()})
    rule = Rule(criterion)
    rows = curves(Steep(of), of, {criterion: choice(model, rule, tied.groups, {})}, RATES)
    aligned = Rule(criterion, align=align)
    choose = choice(model, aligned, tied.groups, {})
    return model, rows, plan(model, IMAGE, of, choose, aligned, rows, limit)


@pytest.mark.parametrize(
    ("residual", "align", "criterion"),
    [
        ("independent", 1, "l1"),
        ("independent", 1, "mix"),  # which counts in its own way
        ("shared", 1, "gm"),
        ("shared", 4, "l1"),
        ("inner", 8, "l1"),
    ],
)
def test_rates_lead_to_the_network_that_was_promised(
    residual: str, align: int, criterion: str
) -> None:
    model, _, made = planned(0.5, residual, align, criterion)
    keep = fpgm.select(model, criterion, residual=residual, rates=made.rates)
    graph = trace(model)
    gone = {name: graph.filters(name) - len(kept) for name, kept in keep.items()}
    assert gone == made.pruned
    assert made.rates.keys() == set(prunable(graph, residual).layers)
    assert fpgm.cost(compact(model, keep), IMAGE).macs == made.macs
    assert fpgm.cost(model, IMAGE).macs == made.dense
    assert 0.3 * made.dense < made.macs <= 0.5 * made.dense
    assert all(len(kept) % align == 0 for kept in keep.values())
    # One threshold for all: deeper layers, which lose less by a filter, lose more filters.
    assert all(loss <= made.threshold for loss in made.losses.values())
    if residual == "independent":
        assert made.pruned["layer1.0.conv1"] < made.pruned["layer1.2.conv2"]


def test_a_tighter_budget_prunes_no_layer_less() -> None:
    plans = [planned(limit)[2] for limit in (1, 0.9, 0.7, 0.5, 0.3)]
    assert set(plans[0].pruned.values()) == {0}
    for wide, narrow in itertools.pairwise(plans):
        assert wide.macs > narrow.macs
        assert all(narrow.pruned[name] >= count for name, count in wide.pruned.items())


def test_a_budget_out_of_reach_says_the_least() -> None:
    with pytest.raises(
        BudgetError, match=r"^--budget macs=0\.01: .*; the least is macs="
    ) as caught:
        planned(0.01)
    least = re.search(r"the least is macs=([\d.]+)", str(caught.value))
    assert least is not None
    made = planned(float(least[1]))[2]
    _, rows, _ = planned(1)
    assert made.pruned == {
        name: max(p for p, _ in points(rows, name, "l1")) for name in made.pruned
    }


def test_file_says_the_command_what_it_leads_to_and_for_which_network() -> None:
    made = planned(0.5)[2]
    about = {"arch": "resnet20", "residual": "independent", "criterion": "l1"}
    written = text(made, "fpgm-sensitivity RUN --budget macs=0.5", about)
    head, macs, *_ = written.splitlines()
    assert head == "# fpgm-sensitivity RUN --budget macs=0.5"
    assert macs.startswith(f"# {made.macs:,} of {made.dense:,} MACs (")
    assert yaml.safe_load(written) == {**about, "rates": made.rates}


def test_stream_is_one_unit_by_its_narrowest_first_layer() -> None:
    graph = trace(fpgm.model("resnet20"))
    filters = {name: graph.filters(name) for _, name in graph.convolutions()}
    alone = units(prunable(graph).groups, filters)
    assert [unit.name for unit in alone] == list(filters)
    stream, *inner = units(prunable(graph, "shared").groups, filters)
    assert (stream.name, stream.filters) == ("conv1", 16)
    assert set(stream.layers) == {"conv1", *(name for name in filters if "conv2" in name)}
    assert [unit.name for unit in inner] == [name for name in filters if name.endswith(".conv1")]
    model = fpgm.model("resnet20")
    keep = choice(model, Rule("l1"), stream.groups, {})(stream, 0.5)
    assert {name: len(kept) / filters[name] for name, kept in keep.items()} == dict.fromkeys(
        stream.layers, 0.5
    )
    assert torch.equal(keep["conv1"], keep["layer1.0.conv2"])  # the same channels


def test_what_is_chosen_alike_is_measured_once() -> None:
    model = fpgm.model("resnet20")
    graph = trace(model)
    tied = prunable(graph)
    of = units(tied.groups, {name: graph.filters(name) for _, name in graph.convolutions()})[:2]
    one = choice(model, Rule("l1"), tied.groups, {})
    measure = Steep(of)
    rows = curves(measure, of, {"a": one, "b": one}, (0.01, 0.1, 0.12, 0.5))
    assert [row.pruned for row in rows[:5]] == [0, 0, 1, 1, 8]
    assert len(rows) == 2 * 2 * 5
    assert len(measure.calls) == 1 + 2 * 2  # the dense network, and of each layer 1 and 8 filters
    assert rows[0].accuracy_bn == rows[1].accuracy_bn == 90
    assert [row.accuracy_bn for row in rows[:5]] == [row.accuracy_bn for row in rows[5:10]]
