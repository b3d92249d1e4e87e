"""Which filters go: as many as asked, the right ones, never all."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import fpgm
from fpgm.criteria import CRITERIA
from fpgm.errors import Error
from fpgm.graph.groups import prunable
from fpgm.graph.trace import trace
from fpgm.selection.ranking import pruned_count
from fpgm.selection.select import Rule, select
from fpgm.selection.zero import pruned, zero_


class Two(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(1, 10, 3)
        self.second = nn.Conv2d(10, 10, 3)
        self.fc = nn.Linear(10, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(self.second(self.first(x).relu()).relu().mean((2, 3)))


EVIDENCE = {
    layer: {
        parameter: torch.rand(10, generator=torch.Generator().manual_seed(7))
        for criterion in CRITERIA.values()
        for parameter in criterion.views
    }
    for layer in ("first", "second")
}


@given(st.integers(1, 2048), st.integers(0, 99))
def test_count_is_the_exact_floor_of_filters_times_rate(filters: int, percent: int) -> None:
    assert pruned_count(filters, percent / 100) == filters * percent // 100


@given(st.floats(0, 1, exclude_max=True), st.sampled_from(sorted(CRITERIA)))
def test_every_criterion_prunes_the_count_asked_for(rate: float, criterion: str) -> None:
    model, gone = Two(), Rule(criterion).pruned(10, rate)
    assert gone == (pruned_count(10, rate) if criterion != "mix" else gone)
    if gone == 10:
        with pytest.raises(Error, match="would prune all 10 filters of first"):
            select(model, criterion, rate, evidence=EVIDENCE)
        return
    for kept in select(model, criterion, rate, evidence=EVIDENCE).values():
        assert len(kept) == 10 - gone
        assert torch.equal(kept, kept.unique())


def test_the_lowest_scores_go_and_ties_by_lowest_index() -> None:
    model = Two()
    norms = torch.tensor([3.0, 1, 2, 1, 5, 1, 7, 8, 9, 4])
    model.first.weight.data = norms.view(-1, 1, 1, 1).expand(-1, 1, 3, 3) / 3
    assert select(model, "l2", 0.2)["first"].tolist() == [0, 2, 4, 5, 6, 7, 8, 9]
    assert select(model, "l2", 0.5)["first"].tolist() == [4, 6, 7, 8, 9]


def test_equal_filters_are_ties_whatever_the_rounding_of_their_scores() -> None:
    for seed in range(20):
        model = Two()
        model.first.weight.data = torch.randn(
            10, 1, 3, 3, generator=torch.Generator().manual_seed(seed)
        )
        model.first.weight.data[[2, 5, 9]] = model.first.weight.data[7].clone()
        (gone,) = set(range(10)) - set(select(model, "gm", 0.1)["first"].tolist())
        assert gone not in {5, 7, 9}  # equal to 2, which comes first


@pytest.mark.parametrize(
    ("keep", "message"),
    [
        ({"none": torch.tensor([0])}, "no such layer"),
        ({"first": torch.tensor([10])}, "outside 0..9"),
    ],
)
def test_zeroing_what_is_not_there_is_refused(keep, message: str) -> None:
    with pytest.raises(Error, match=message):
        zero_(Two(), keep)


def test_random_takes_other_filters_in_each_layer_and_for_each_seed() -> None:
    keep = select(Two(), "random", 0.5, seed=0)
    assert keep["first"].tolist() != keep["second"].tolist()
    assert keep["first"].tolist() != select(Two(), "random", 0.5, seed=1)["first"].tolist()
    assert keep["first"].tolist() == select(Two(), "random", 0.5, seed=0)["first"].tolist()


def test_zeroing_touches_only_the_filters_that_are_not_kept() -> None:
    model = Two()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    keep = select(model, "gm", 0.3)
    zero_(model, keep)
    for name, mask in pruned(model, keep).items():
        weight = model.get_submodule(name).weight
        assert mask.sum() == 3
        assert not weight[mask].any()
        assert torch.equal(weight[~mask], before[f"{name}.weight"][~mask])
    for name in ("first.bias", "second.bias", "fc.weight"):
        assert torch.equal(model.state_dict()[name], before[name])


@pytest.mark.parametrize("rate", [-0.1, 1.0, 1.5, float("nan")])
def test_rate_outside_its_range_is_refused(rate: float) -> None:
    with pytest.raises(Error, match="at least 0 and below 1"):
        select(Two(), "gm", rate)


def test_unknown_criterion_lists_the_choices() -> None:
    with pytest.raises(Error, match="criterion=foo: choose one of fermat, gm, l1, l2, mix"):
        select(Two(), "foo", 0.5)


@pytest.mark.parametrize(
    ("arch", "layers", "projections"),
    [("resnet20", 19, 0), ("resnet56", 55, 0), ("vgg16", 13, 0), ("resnet18", 17, 3),
     ("resnet34", 33, 3), ("resnet50", 49, 4), ("resnet101", 100, 4)],
)  # fmt: skip
def test_all_convolutions_are_pruned_but_projection_shortcuts(
    arch: str, layers: int, projections: int
) -> None:
    tied = prunable(trace(fpgm.model(arch)))
    assert len(tied.layers) == layers
    assert all("downsample" in name and "projection" in why for name, why in tied.kept_full.items())
    assert len(tied.kept_full) == projections
