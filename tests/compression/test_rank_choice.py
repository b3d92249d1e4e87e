"""A budget is met, by the ranks that keep most, and what would cost MACs is left as it is."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from own_networks import Twice
from torch import nn

import fpgm
from fpgm.compression import low_rank, ranks
from fpgm.errors import BudgetError
from fpgm.networks.layers import WAYS


@st.composite
def layers(draw: st.DrawFn) -> dict[str, ranks.Layer]:
    found = {}
    for index in range(draw(st.integers(1, 3))):
        count = draw(st.integers(2, 6))
        values = sorted((draw(st.integers(1, 50)) for _ in range(count)), reverse=True)
        energy = torch.tensor(values, dtype=torch.float64).cumsum(0) / sum(values)
        found[str(index)] = ranks.Layer(energy, draw(st.integers(5, 60)), draw(st.integers(2, 20)))
    return found


def spent(found: dict[str, ranks.Layer], chosen: dict[str, int]) -> int:
    return sum(
        chosen[name] * layer.each if name in chosen else layer.whole
        for name, layer in found.items()
    )


def kept(found: dict[str, ranks.Layer], chosen: dict[str, int]) -> float:
    return math.prod(float(found[name].energy[rank - 1]) for name, rank in chosen.items())


@given(layers(), st.floats(0.1, 1), st.integers(0, 40))
@settings(max_examples=80, deadline=None)
def test_no_other_ranks_within_the_budget_keep_more(
    found: dict[str, ranks.Layer], target: float, others: int
) -> None:
    total = others + sum(layer.whole for layer in found.values())
    options = [[0, *range(1, layer.most + 1)] for layer in found.values()]
    possible = [
        {name: rank for name, rank in zip(found, choice, strict=True) if rank}
        for choice in itertools.product(*options)
    ]
    within = [p for p in possible if others + spent(found, p) <= target * total]
    if not within:
        with pytest.raises(BudgetError, match="rank 1 in every layer"):
            ranks.by_macs(found, total, target)
        return
    chosen = ranks.by_macs(found, total, target)
    assert others + spent(found, chosen) <= target * total
    assert kept(found, chosen) == pytest.approx(max(kept(found, p) for p in within))


@given(layers(), st.floats(0.05, 1))
@settings(max_examples=60, deadline=None)
def test_the_least_rank_that_keeps_the_share_where_that_saves_macs(
    found: dict[str, ranks.Layer], share: float
) -> None:
    chosen = ranks.by_energy(found, share)
    for name, layer in found.items():
        enough = [r for r in range(1, len(layer.energy) + 1) if layer.energy[r - 1] >= share - 1e-9]
        saves = enough[0] * layer.each < layer.whole
        assert chosen.get(name) == (enough[0] if saves else None)


@pytest.mark.parametrize("way", WAYS)
def test_macs_are_those_of_the_network_that_comes_out(way: str) -> None:
    torch.manual_seed(0)
    network = nn.Sequential(
        nn.Conv2d(3, 8, (3, 5), stride=2, padding=1), nn.Conv2d(8, 6, 3, stride=(1, 2), dilation=2),
        nn.Conv2d(6, 7, 1),
    )  # fmt: skip
    image = (3, 21, 20)
    convs = low_rank.decomposable(network)
    known = low_rank.responses(network, convs, [torch.randn(2, *image)]) if way == "zhang" else {}
    spectra = {name: low_rank.spectrum(conv, known.get(name)) for name, conv in convs.items()}
    found = ranks.layers(network, spectra, image, way)
    dense = fpgm.cost(network, image)
    assert {layer.name: layer.macs for layer in dense.layers} == {
        name: layer.whole for name, layer in found.items()
    }
    for name in convs:
        small = low_rank.decomposed(network, {name: 2}, way, known)
        saved = dense.macs - fpgm.cost(small, image).macs
        assert saved == found[name].whole - 2 * found[name].each


def test_a_layer_of_zeros_keeps_all_of_nothing() -> None:
    network = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1))
    nn.init.zeros_(network[0].weight)
    spectra = {"0": low_rank.spectrum(network[0], None)}
    found = ranks.layers(network, spectra, (4, 8, 8), "tai")
    assert ranks.by_energy(found, 0.9) == {"0": 1}


@pytest.mark.parametrize("way", WAYS)
def test_a_convolution_that_is_called_twice_costs_twice(way: str) -> None:
    torch.manual_seed(0)
    network, image = Twice(10, 3), (3, 12, 12)
    convs = low_rank.decomposable(network)
    known = low_rank.responses(network, convs, [torch.randn(2, *image)]) if way == "zhang" else {}
    convs = {name: conv for name, conv in convs.items() if name in known or way == "tai"}
    spectra = {name: low_rank.spectrum(conv, known.get(name)) for name, conv in convs.items()}
    found = ranks.layers(network, spectra, image, way)
    assert found.keys() == {"first", "again", "fixed"}  # the other is never called
    small = low_rank.decomposed(network, {"again": 2}, way, known)
    saved = fpgm.cost(network, image).macs - fpgm.cost(small, image).macs
    assert saved == found["again"].whole - 2 * found["again"].each
