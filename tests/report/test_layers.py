"""Layers with rates of their own: what the papers cut, and never held against one rate."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import yaml
from finished import a_run, composed

import fpgm
from fpgm.compaction.constants import analyse
from fpgm.graph.cost import cost
from fpgm.graph.groups import prunable
from fpgm.graph.trace import trace
from fpgm.keys import CONFIGS
from fpgm.report import paper
from fpgm.report.cells import cells
from fpgm.report.collect import collect
from fpgm.training.asked import asked, goal_of

NAMES = sorted(path.stem for path in (CONFIGS / "layers").glob("*.yaml"))


@pytest.mark.parametrize("name", NAMES)
def test_what_is_cut_costs_what_the_paper_prints(name: str) -> None:
    arch = name.split("_")[1]
    config = asked(composed(f"arch={arch}", f"layers={name}"))
    graph = trace(fpgm.model(arch))
    groups = prunable(graph, config.residual, config.ignore)
    filters = {layer: graph.filters(layer) for layer in groups.layers}
    rule = goal_of(config).rule.for_network(filters, groups.kept_full)
    kept = {layer: rule.kept_of(layer, count, config.rate) for layer, count in filters.items()}
    dense = cost(graph.module, (3, 32, 32))
    small = analyse(graph, {layer: torch.arange(count) for layer, count in kept.items()})
    found = 100 * (1 - small.macs(dense) / dense.macs)
    printed = {row.macs_reduction for row in paper.published() if row.layers == name}
    assert [value for value in printed if abs(value - found) >= 0.1] == []  # some round down
    assert printed


HARD = ("criterion=l1", "schedule=hard", "pretrained=x")


@pytest.mark.parametrize(
    ("words", "method"),
    [
        (("arch=vgg16", "layers=pfec_vgg16_a", *HARD, "epochs=40"), "PFEC 40 epochs"),
        (("arch=vgg16", "layers=pfec_vgg16_a", *HARD, "epochs=0"), "PFEC without fine-tuning"),
        (("arch=vgg16", "layers=pfec_vgg16_a", *HARD), "PFEC 160 epochs"),
        (("arch=resnet56", "layers=pfec_resnet56_b", *HARD), "PFEC-B"),
        (("arch=resnet110", "layers=pfec_resnet56_b", *HARD), None),
        (("arch=resnet56", "layers=pfec_resnet56_b", *HARD, "rounding=pruned"), None),
        (("arch=resnet56", "layers=pfec_resnet56_b", *HARD, "rate=0.1"), None),
        (("arch=resnet56", "layers=pfec_resnet56_b", *HARD, "ignore=[]"), None),
        (("arch=resnet56", "rate=0.4", "rates={conv1: 0.2}"), None),
        (("arch=resnet56", "rate=0.4", "ignore=[conv1]"), None),
        (("arch=resnet56", "rate=0.4", "rounding=kept"), None),
        (("arch=resnet56", "rate=0.4", "threshold=0.5"), None),
        (("arch=resnet56", "rate=0", "widths={conv1: 8}"), None),
        (("arch=resnet56", "rate=0.4"), "FPGM-only"),
        (("arch=resnet56", "rate=0"), "baseline"),
    ],
)
def test_a_run_is_held_against_a_row_that_cuts_the_same_of_each_layer(
    words: tuple[str, ...], method: str | None
) -> None:
    row = paper.counterpart(composed(*words))
    assert (row and row.method) == method


def test_run_of_before_there_were_rates_by_layer_is_the_same_row_and_cell(tmp_path: Path) -> None:
    config = composed("arch=resnet56", "rate=0.4")
    for key in ("rates", "ignore", "widths", "rounding", "threshold", "scope_cost"):
        del config[key]
    row = paper.counterpart(config)
    assert row is not None
    assert row.method == "FPGM-only"
    a_run(tmp_path / "new", "arch=resnet56", "rate=0.4")
    a_run(tmp_path / "old", "arch=resnet56", "rate=0.4", "seed=1")
    (tmp_path / "old" / "config.yaml").write_text(yaml.safe_dump({**config, "seed": 1}))
    (cell,) = cells(collect([tmp_path]))
    assert cell.seeds == (0, 1)


def test_runs_by_layer_are_told_apart_from_those_of_one_rate_at_a_glance(tmp_path: Path) -> None:
    runs = {
        "0.4": ["rate=0.4"],
        "rates": ["rate=0.4", "rates={conv1: 0.2}"],
        "widths": ["rate=0.4", "widths={conv1: 8}"],
        "below 0.5": ["rate=0.4", "threshold=0.5"],
        "pfec_resnet56_a": ["layers=pfec_resnet56_a"],
        "0": ["rate=0"],
    }
    for index, words in enumerate(runs.values()):
        a_run(tmp_path / str(index), "arch=resnet56", *words)
    made = cells(collect([tmp_path]))
    assert {cell.rate for cell in made} == set(runs)
    assert [cell.prunes for cell in made] == [False] + [True] * 5
    a_run(tmp_path / "more", "arch=resnet56", "rate=0.4", "rates={conv1: 0.3}")
    names = {cell.name for cell in cells(collect([tmp_path])) if cell.rate == "rates"}
    assert names == {"gm frozen rates rates.conv1=0.2", "gm frozen rates rates.conv1=0.3"}
