"""Figure 3: the layers that were meant, the filters that pruning would take, a true ideal."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import fpgm
from fpgm.errors import Error
from fpgm.figures import norms
from fpgm.figures.layer import filters, names, pruned
from fpgm.study.settings import Settings
from fpgm.study.statistics.weights import diagnose

CRITERIA = ["gm", "l2"]


@settings(max_examples=30, deadline=None)
@given(n=st.integers(4, 4096), length=st.floats(1e-3, 1e3), seed=st.integers(0, 1000))
def test_the_ideal_is_what_a_norm_criterion_needs(n: int, length: float, seed: int) -> None:
    lengths = length * (1 + 0.01 * np.random.default_rng(seed).random(n))
    needed = norms.ideal(lengths)
    assert (needed[0], needed[-1]) == (0, pytest.approx(lengths.max()))
    assert (np.diff(needed) >= 0).all()
    limits = Settings()
    said = diagnose(needed, 1000, limits.min_cv, limits.max_minimum)
    assert said["verdict"] == "suits a norm"


@pytest.mark.parametrize("rate", [0.1, 0.4])
def test_marked_are_the_filters_that_pruning_would_take(rate: float) -> None:
    model = fpgm.model("resnet20")
    found = norms.layers(model, None, CRITERIA, rate)
    assert [layer.filters.layer for layer in found] == [
        "conv1", "layer2.1.conv1", "layer3.2.conv2",
    ]  # fmt: skip
    rows = norms.rows(found)
    for criterion in CRITERIA:
        keep = fpgm.select(model, criterion, rate)
        for layer in found:
            name = layer.filters.layer
            gone = [r["filter"] for r in rows if r["layer"] == name and r[f"pruned_{criterion}"]]
            every = set(range(len(model.get_submodule(name).weight)))
            assert gone == sorted(every - set(keep[name].tolist()))
    weight = model.conv1.weight.detach().flatten(1)
    lengths = [row["norm"] for row in rows if row["layer"] == "conv1"]
    assert lengths == pytest.approx(weight.norm(dim=1).tolist(), rel=1e-5)
    ideal = [row["ideal"] for row in rows if row["layer"] == "conv1"]
    assert np.argsort(lengths).tolist() == np.argsort(ideal).tolist()


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10**6), criterion=st.sampled_from(["gm", "l1", "l2", "fermat", "mix"]))
def test_the_order_of_the_filters_does_not_matter(seed: int, criterion: str) -> None:
    g = torch.Generator().manual_seed(seed)
    weight = torch.randn(20, 3, 3, 3, generator=g)
    order = torch.randperm(20, generator=g)
    again = order[pruned(weight[order], criterion, 0.3)].sort().values
    assert again.tolist() == pruned(weight, criterion, 0.3).tolist()


def test_filters_that_are_zero_are_left_out_and_counted() -> None:
    model = fpgm.model("resnet20")
    keep = fpgm.select(model, rate=0.5)
    fpgm.zero_(model, keep)
    of = filters(model, "layer1.0.conv1")
    assert of.indices.tolist() == keep["layer1.0.conv1"].tolist()
    assert (len(of), of.zero) == (8, 8)
    found = norms.layers(model, ["layer1.0.conv1"], CRITERIA, 0.25)
    assert "norms of 8 filters, 8 zero ones left out" in norms.summary(found)[0]
    assert {row["filter"] for row in norms.rows(found)} == set(of.indices.tolist())


def test_a_layer_whose_norms_are_equal_is_shown_too() -> None:
    model = nn.Sequential(nn.Conv2d(2, 8, 3, padding=1), nn.Flatten(), nn.Linear(512, 2))
    weight = model[0].weight
    weight.data = nn.init.orthogonal_(torch.empty(8, 18)).view_as(weight).round(decimals=7)
    weight.data /= weight.data.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
    (layer,) = norms.layers(model, ["0"], CRITERIA, 0.25)
    assert np.isnan(norms.density(np.ones(8), np.linspace(0, 1, 5))).all()
    assert layer.diagnosis["verdict"] == "too alike, none near zero"


def test_chance_chooses_anew_at_each_draw() -> None:
    weight = torch.randn(64, 3, 3, 3)
    draws = {tuple(pruned(weight, "random", 0.2, draw).tolist()) for draw in range(10)}
    assert len(draws) == 10
    assert {len(draw) for draw in draws} == {12}


def test_a_layer_that_is_not_there_is_answered_with_the_nearest() -> None:
    model = fpgm.model("resnet20")
    with pytest.raises(Error, match=r"--layer layer1.0.conv3: no such .* layer1\.0\.conv"):
        names(model, ["conv1", "layer1.0.conv3"])
    with pytest.raises(Error, match=r"--layer fc: no such convolution; the nearest are"):
        names(model, ["fc"])


def test_a_rate_that_prunes_nothing_is_answered_with_one_that_does() -> None:
    with pytest.raises(Error, match=r"prunes none of the 16 filters of conv1; try --rate 0.063"):
        norms.layers(fpgm.model("resnet20"), ["conv1"], CRITERIA, 0.05)
    assert norms.layers(fpgm.model("resnet20"), ["conv1"], CRITERIA, 0.063)
