"""What a channel costs is what the compact network is cheaper by without it."""

from __future__ import annotations

import copy

import pytest
import torch
from zoo import FAMILIES

import fpgm
from fpgm.compaction.constants import analyse
from fpgm.graph.cost import cost
from fpgm.graph.groups import RESIDUAL, prunable
from fpgm.graph.trace import trace
from fpgm.graph.worth import by_filter, worths

IMAGE = (3, 64, 64)
NETWORKS = {
    "resnet20": lambda: fpgm.model("resnet20"),
    **{name: FAMILIES[name] for name in ("resnet", "mobilenet_v2", "densenet")},
}


@pytest.mark.parametrize("residual", RESIDUAL)
@pytest.mark.parametrize("name", NETWORKS)
def test_macs_of_a_channel_are_what_is_saved_without_it(name: str, residual: str) -> None:
    graph = trace(NETWORKS[name]())
    dense, tied = cost(graph.module, IMAGE), prunable(graph, residual)
    everything = {layer: torch.arange(graph.filters(layer)) for layer in tied.layers}
    for group, worth in list(zip(tied.groups, worths(graph, tied.groups, dense), strict=True))[:25]:
        keep = dict(everything)
        for layer, filters in group.members:
            keep[layer] = keep[layer][keep[layer] != filters[0]]
        assert worth.macs == pytest.approx(dense.macs - analyse(graph, keep).macs(dense))


def test_memory_of_a_channel_is_the_pixels_that_its_filters_write() -> None:
    graph = trace(fpgm.model("resnet20"))
    tied = prunable(graph)
    found = worths(graph, tied.groups, cost(graph.module, (3, 32, 32)))
    memory = {g.members[0][0]: w.memory for g, w in zip(tied.groups, found, strict=True)}
    assert memory["conv1"] == memory["layer1.2.conv2"] == 32 * 32
    assert memory["layer2.0.conv1"] == 16 * 16
    assert memory["layer3.2.conv2"] == 8 * 8


@pytest.mark.parametrize("residual", RESIDUAL)
@pytest.mark.parametrize("name", ["resnet20", "mobilenet_v2"])
def test_parameters_of_a_channel_are_what_is_saved_without_it(name: str, residual: str) -> None:
    """Filters, what stands behind them, and whoever reads them; nothing has to be folded in, as a
    BatchNorm that has seen nothing makes zeros of zeros."""
    model = NETWORKS[name]()
    graph = trace(model)
    dense, tied = cost(graph.module, IMAGE), prunable(graph, residual)
    everything = {layer: torch.arange(graph.filters(layer)) for layer in tied.layers}
    some = list(zip(tied.groups, worths(graph, tied.groups, dense), strict=True))[:24:5]
    for group, worth in some:
        keep = dict(everything)
        for layer, filters in group.members:
            keep[layer] = keep[layer][keep[layer] != filters[0]]
        zeroed = copy.deepcopy(model)
        fpgm.zero_(zeroed, keep)
        small = cost(fpgm.compact(zeroed, keep, image=IMAGE), IMAGE)
        assert worth.params == pytest.approx(dense.params - small.params), group.members[0][0]


@pytest.mark.parametrize("name", NETWORKS)
def test_filters_that_write_one_channel_share_what_goes_with_it(name: str) -> None:
    graph = trace(NETWORKS[name]())
    dense, tied = cost(graph.module, IMAGE), prunable(graph, "shared")
    alone = by_filter(graph, dense)
    for group, worth in zip(tied.groups, worths(graph, tied.groups, dense), strict=True):
        if len(group.members) > 2:
            continue  # streams: what their layers read of each other goes but once
        parts = [alone[layer][int(filters[0])] for layer, filters in group.members]
        assert sum(part.memory for part in parts) == pytest.approx(worth.memory)
        assert sum(part.macs for part in parts) == pytest.approx(worth.macs)
        assert sum(part.params for part in parts) == pytest.approx(worth.params)
