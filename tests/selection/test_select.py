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
from fpgm.graph.groups import Group, prunable
from fpgm.graph.trace import trace
from fpgm.selection.ranking import pruned_count
from fpgm.selection.rule import Rule
from fpgm.selection.select import highest, kept_counts, score, select
from fpgm.selection.zero import pruned, zero_


class Two(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(1, 10, 3)
        self.second = nn.Conv2d(10, 10, 3)
        self.fc = nn.Linear(10, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(self.second(self.first(x).relu()).relu().mean((2, 3)))


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return list(a) == list(b) and all(torch.equal(a[name], b[name]) for name in a)


SHAPES = {"contributions": (10, 10), "preferred": (10, 12)}
EVIDENCE = {
    layer: {
        parameter: torch.rand(
            (10, 3) if getattr(view, "each", False) else SHAPES.get(parameter, (10,)),
            generator=torch.Generator().manual_seed(7),
        )
        for criterion in CRITERIA.values()
        for parameter, view in criterion.views.items()
    }
    for layer in ("first", "second")
}


def test_count_is_the_exact_floor_of_filters_times_rate() -> None:
    """All of them: 100 filters at .29 lose 29, though 100 * .29 is 28.999999999999996."""
    for filters in range(1, 2049):
        for percent in range(100):
            assert pruned_count(filters, percent / 100) == filters * percent // 100


@pytest.mark.parametrize(
    ("filters", "rate", "align", "kept"),
    [(10, 0.29, 1, 8), (100, 0.29, 1, 71), (1, 0.99, 1, 1), (10, 0.99, 1, 1), (10, 0, 1, 10),
     (64, 0.4, 8, 40), (64, 0.4, 16, 32), (64, 0.99, 8, 8), (64, 0, 8, 64), (64, 0.01, 8, 64),
     (16, 0.25, 8, 8),  # as near to 8 as to 16: the smaller
     (6, 0.5, 8, 6), (8, 0.9, 8, 8), (20, 0.05, 8, 20), (20, 0.3, 8, 16), (12, 0.9, 2, 2)],
)  # fmt: skip
def test_aligned_counts_are_the_nearest_multiples_or_all(
    filters: int, rate: float, align: int, kept: int
) -> None:
    assert Rule(align=align).kept(filters, rate) == kept


def test_a_layer_made_of_several_groups_gets_its_count() -> None:
    """Each group follows its narrowest layer, and has its share of what that one still keeps."""
    wide = torch.arange(16)
    groups = [
        Group((("stem", torch.arange(4)), ("wide", wide[:4]))),
        Group((("wide", wide[4:9]),)),
        Group((("wide", wide[9:]),)),
    ]
    assert kept_counts(groups, Rule(), 0.5) == [2, 2, 4]  # of 8: 2, then 6 * 5 / 12, then the rest
    assert kept_counts(groups, Rule(align=4), 0.5) == [4, 2, 2]  # stem keeps a multiple of 4
    assert kept_counts(groups, Rule(), 0) == [4, 5, 7]
    assert kept_counts(groups[1:], Rule(), 0.5) == [2, 4]  # 6 of 12
    with pytest.raises(Error, match=r"rate=0.999999999999: would prune all 4 .* most 0.75 leaves"):
        kept_counts(groups, Rule(), 0.999999999999)


def test_indices_that_the_first_layer_has_not_are_refused_and_all_others_are_masked() -> None:
    model = Two()
    for wrong in ([-1], [10], [-1, 3], [0, 10]):
        with pytest.raises(Error, match=r"keep\['first'\] has indices outside 0..9"):
            pruned(model, {"first": torch.tensor(wrong)})
    for kept in ([], [0], [9], [0, 9], [3, 4]):
        indices = torch.tensor(kept, dtype=torch.long)
        mask = pruned(model, {"first": indices})["first"]
        assert (~mask).nonzero().flatten().tolist() == kept
    for name in ("", "fc.nothing", "relu"):
        with pytest.raises(Error, match="no such layer with a weight"):
            pruned(model, {name: torch.tensor([0])})


def test_what_is_not_said_is_what_the_help_says() -> None:
    """Rate .4 of each layer by gm, seed 0, one ranking by means that leaves a tenth of a layer."""
    model = Two()
    model.second.weight.data *= 1e-3
    plain = select(model)
    assert same(plain, select(model, "gm", 0.4, "independent", 1, 0, "layer"))
    assert same(select(model, "random"), select(model, "random", seed=0))
    ranked = {"criterion": "l2", "rate": 0.5, "scope": "global"}
    assert same(select(model, **ranked), select(model, **ranked, normalise="mean"))
    low = select(model, **ranked, normalise="none")
    assert [len(kept) for kept in low.values()] == [9, 1]  # 9 of the second, all it may lose
    groups = prunable(trace(model)).groups
    rule = Rule("l2")
    scores = score(model, rule, 0.5, groups)
    assert same(select(model, "l2", 0.5), highest(scores, rule, 0.5, groups))
    one_ranking = Rule("l2", scope="global")
    assert same(select(model, **ranked), highest(scores, one_ranking, 0.5, groups))
    none = Rule("l2", scope="global", normalise="none")
    assert same(low, highest(scores, none, 0.5, groups))


def test_a_criterion_that_finds_nothing_to_look_at_says_what_is_not_there() -> None:
    with pytest.raises(Error, match=r"criterion=bn_gamma: .*BatchNorm"):
        select(Two(), "bn_gamma", 0.3)


def test_a_floor_that_leaves_just_the_rate_is_no_contradiction() -> None:
    for floor, rate in ((0, 0.99), (0.1, 0.9), (0.7, 0.3), (0.9, 0.1)):  # 1 - .9 is below .1
        select(Two(), "l1", rate, scope="global", floor=floor)
    for floor in (-0.1, 1.0):
        with pytest.raises(Error, match=rf"floor={floor}: must be at least 0 and below 1"):
            select(Two(), "l1", 0.0, scope="global", floor=floor)
    assert [len(kept) for kept in select(Two(), "l1", 0.9, floor=0.5).values()] == [1, 1]


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
    with pytest.raises(Error, match="criterion=foo: choose one of fermat, gm, l1, l2, lp, mix"):
        select(Two(), "foo", 0.5)


@pytest.mark.parametrize(
    ("arch", "layers", "projections"),
    [("resnet20", 19, 0), ("resnet56", 55, 0), ("vgg16", 13, 0), ("resnet18", 17, 3),
     ("resnet34", 33, 3), ("resnet50", 49, 4), ("resnet101", 100, 4), ("resnet152", 151, 4),
     ("vgg11", 8, 0), ("vgg19", 16, 0), ("preresnet110", 109, 0), ("preresnet164", 163, 3),
     ("densenet40", 39, 0), ("lenet5", 2, 0)],
)  # fmt: skip
def test_all_convolutions_are_pruned_but_projection_shortcuts(
    arch: str, layers: int, projections: int
) -> None:
    tied = prunable(trace(fpgm.model(arch)))
    assert len(tied.layers) == layers
    side = "shortcut" if arch == "preresnet164" else "downsample"
    assert all(side in name and "projection" in why for name, why in tied.kept_full.items())
    assert len(tied.kept_full) == projections
