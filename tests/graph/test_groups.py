"""Which filters go together, in each residual mode."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from zoo import FAMILIES, Gated, Mysterious, Odd, Spelled

import fpgm
from fpgm.graph.groups import RESIDUAL, prunable
from fpgm.graph.trace import trace


def members(model: nn.Module, residual: str) -> list[dict[str, list[int]]]:
    groups = prunable(trace(model), residual).groups
    return [{name: filters.tolist() for name, filters in group.members} for group in groups]


def together(model: nn.Module, residual: str) -> set[tuple[str, ...]]:
    return {tuple(group) for group in members(model, residual)}


@pytest.mark.parametrize("name", FAMILIES)
def test_every_convolution_is_pruned_or_its_reason_is_given(name: str) -> None:
    model = FAMILIES[name]()
    graph = trace(model)
    for residual in RESIDUAL:
        tied = prunable(graph, residual)
        names = {n for n, m in model.named_modules() if isinstance(m, nn.Conv2d)}
        if name == "convnext":  # and the hidden units of its MLPs
            names |= {n for n, m in model.named_modules() if n.endswith("block.3")}
        assert set(tied.layers) | set(tied.kept_full) == names
        assert not set(tied.layers) & set(tied.kept_full)
        for group in tied.groups:  # each filter in one group, all members as long as it
            assert {len(filters) for _, filters in group.members} == {len(group)}
        every = [(n, i) for g in tied.groups for n, f in g.members for i in f.tolist()]
        assert (
            len(every)
            == len(set(every))
            == sum(len(model.get_parameter(f"{n}.weight")) for n in tied.layers)
        )


BLOCKS = [f"layer{i}.0.conv1" for i in (2, 3, 4)] + ["layer1.0.conv1", "layer1.1.conv1"]
DOWN = [f"layer{i}.0.downsample.0" for i in (2, 3, 4)]


def test_shared_ties_all_that_write_into_a_stream() -> None:
    first = ("conv1", "layer1.0.conv2", "layer1.1.conv2")
    others = {(f"layer{i}.0.conv2", f"layer{i}.0.downsample.0") for i in (2, 3, 4)}
    assert together(FAMILIES["resnet"](), "shared") == {first, *others, *((n,) for n in BLOCKS)}


def test_independent_leaves_each_to_itself_and_projections_whole() -> None:
    ends = ["conv1", "layer1.1.conv2", *(f"layer{i}.0.conv2" for i in (1, 2, 3, 4))]
    model = FAMILIES["resnet"]()
    assert together(model, "independent") == {(name,) for name in ends + BLOCKS}
    kept = prunable(trace(model), "independent").kept_full
    assert kept == dict.fromkeys(DOWN, "a projection shortcut, which the papers do not prune")


def test_inner_leaves_the_streams_whole() -> None:
    tied = prunable(trace(FAMILIES["resnet"]()), "inner")
    assert set(tied.layers) == set(BLOCKS)
    assert tied.kept_full["conv1"] == "writes into a residual stream"
    assert "projection" in tied.kept_full[DOWN[0]]


def test_padded_shortcuts_tie_the_channels_that_come_through() -> None:
    groups = [group for group in members(fpgm.model("resnet20"), "shared") if len(group) > 1]
    # A stage has the channels of the one before and as many zeros behind them.
    assert [next(iter(group)) for group in groups] == ["conv1", "layer2.0.conv2", "layer3.0.conv2"]
    for group, channels in zip(groups, (range(16), range(16, 32), range(32, 64)), strict=True):
        assert all(filters == list(channels) for filters in group.values())
    assert [len(group) for group in groups] == [10, 6, 3]


def test_channels_that_a_shortcut_lacks_are_those_of_the_other_side() -> None:
    class Appended(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = (nn.Conv2d(3, width, 1) for width in (2, 5, 5))
            self.fc = nn.Linear(5, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = F.pad(self.a(x), (0, 0, 0, 0, 1, 2)) + self.b(x)
            return self.fc((y + self.c(x)).mean((2, 3)))

    assert members(Appended(), "shared") == [
        {"a": [0, 1], "b": [1, 2], "c": [1, 2]},
        {"b": [0, 3, 4], "c": [0, 3, 4]},
    ]


def test_depthwise_filters_go_with_what_they_read() -> None:
    groups = together(FAMILIES["mobilenet_v2"](), "independent")
    assert ("features.2.conv.0.0", "features.2.conv.1.0") in groups


@pytest.mark.parametrize("residual", RESIDUAL)
def test_the_factors_of_a_product_go_together(residual: str) -> None:
    assert ("a", "gate") in together(Gated(), residual)


def test_what_is_tied_to_a_convolution_kept_whole_is_kept() -> None:
    class Kept(Gated):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.gate(x := self.a(x)) * x  # an output of the network

    kept = prunable(trace(Kept())).kept_full
    assert kept["a"] == kept["gate"] == "its filters are outputs of the network"

    class Tied(Gated):
        def __init__(self) -> None:
            super().__init__()
            self.d = nn.Conv2d(6, 6, 3, groups=6)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.a(x)
            return self.fc(self.b(self.d(x)).mean((2, 3))) + self.fc.bias * x.softmax(1).mean()

    kept = prunable(trace(Tied())).kept_full
    assert "softmax" in kept.pop("a")
    assert kept["d"].startswith("tied to a, which is kept: its channels go into softmax")
    assert "b" not in kept


def test_channels_side_by_side_are_pruned_apart() -> None:
    assert together(Odd(), "shared") == {
        (n,) for n in ("a", "b", "reflect", "valid", "dilated", "point")
    }


def test_a_value_met_by_itself_is_no_stream() -> None:
    class Doubled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.fc = nn.Conv2d(3, 4, 1), nn.Linear(4, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.a(x)
            return self.fc((x + x).mean((2, 3)))

    assert together(Doubled(), "inner") == {("a",)}


def test_what_sizes_are_asked_of_does_not_hide_channels() -> None:
    assert ("d",) not in together(Spelled(), "shared")
    assert prunable(trace(Mysterious()), "shared").layers == ("free", "fed", "grouped")


def test_unknown_mode_lists_the_choices() -> None:
    with pytest.raises(ValueError, match="choose one of independent, shared, inner"):
        prunable(trace(Gated()), "both")
