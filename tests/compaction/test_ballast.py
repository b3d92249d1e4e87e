"""Which zero filters stay, and that the network is the same function with them."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from zoo import FAMILIES, Odd, error, random_keep, randomised

import fpgm
from fpgm.compaction.ballast import everything, rounded, streams, widened
from fpgm.compaction.compact import compact
from fpgm.graph.groups import RESIDUAL, prunable
from fpgm.graph.trace import trace
from fpgm.networks.layers import BorderConv2d, Expand


def pruned(model: nn.Module, residual: str, rate: float = 0.5, seed: int = 0):
    model = randomised(model, seed, torch.float64)
    keep = random_keep(model, rate, seed, residual)
    fpgm.zero_(model, keep)
    graph = trace(model)
    return model, keep, graph, prunable(graph, residual).groups


def expands(network: nn.Module) -> int:
    return sum(isinstance(module, Expand) for module in network.modules())


def maps(network: nn.Module) -> int:
    borders = [m.border for m in network.modules() if isinstance(m, BorderConv2d)]
    return sum(border is not None for border in borders)


NETWORKS = {
    "resnet20": lambda: fpgm.model("resnet20"),
    "odd": Odd,
    **{name: FAMILIES[name] for name in ("resnet", "densenet", "shufflenet", "regnet")},
}


@pytest.mark.parametrize(
    ("name", "residual"), [(name, RESIDUAL[i % 3]) for i, name in enumerate(NETWORKS)]
)
def test_every_form_computes_the_same_function(name: str, residual: str) -> None:
    model, keep, graph, groups = pruned(NETWORKS[name](), residual)
    wide = widened(graph, keep, {}, streams(graph, keep))
    x = torch.randn(2, 3, 40, 44, dtype=torch.float64)
    for ballast in (
        wide,
        everything(graph, keep),
        rounded(graph, keep, {}, groups, 8),
        rounded(graph, keep, wide, groups, 1),
    ):
        assert error(model, compact(model, keep, ballast), x) <= 1e-12


def test_widened_adds_need_no_scatter_and_a_carrier_no_map() -> None:
    model, keep, graph, groups = pruned(fpgm.model("resnet20"), "independent")
    cut = compact(model, keep)
    every = streams(graph, keep)
    assert every == [("add", 16), ("add", 32), ("add", 64)]
    wide = widened(graph, keep, {}, every)
    carried = rounded(graph, keep, wide, groups, 1)
    assert expands(cut) > 2
    assert maps(cut) > 2
    forms = [compact(model, keep, ballast) for ballast in (wide, carried)]
    assert expands(forms[0]) == 2  # the zeros of the two shortcuts A
    assert maps(forms[1]) == 0
    macs = [fpgm.cost(n, (3, 32, 32)).macs for n in (cut, *forms, model)]
    assert macs == sorted(set(macs))
    one = widened(graph, keep, {}, every[1:2])  # what comes into stage 2 from stage 1 as well
    assert {name.split(".")[0] for name in one} == {"layer1", "layer2"}
    assert 2 < expands(compact(model, keep, one)) < expands(cut)


@pytest.mark.parametrize("multiple", [1, 4, 5])
def test_widths_are_rounded_up_and_never_beyond_the_layer(multiple: int) -> None:
    model, keep, graph, groups = pruned(fpgm.model("resnet20"), "inner", 0.3)
    ballast = rounded(graph, keep, {}, groups, multiple)
    for name, filters in keep.items():
        width, full = len(ballast.get(name, filters)), graph.filters(name)
        # One more than is kept, to carry the constants of the rest.
        assert width == min(-(-(len(filters) + 1) // multiple) * multiple, full)
        assert set(filters.tolist()) <= set(ballast[name].tolist())
    x = torch.randn(2, 3, 17, 19, dtype=torch.float64)
    assert error(model, compact(model, keep, ballast), x) <= 1e-12


def test_the_largest_constant_stays() -> None:
    model = nn.Sequential(nn.Conv2d(3, 6, 1), nn.ReLU(), nn.Conv2d(6, 2, 3, padding=1))
    model[0].bias.data = torch.tensor([0.0, 2.0, -9.0, 3.0, 1.0, 0.0])
    graph = trace(model)
    groups = prunable(graph).groups
    keep = {"0": torch.tensor([0, 5])}
    for multiple, there in ((1, [0, 3, 5]), (2, [0, 1, 3, 5]), (3, [0, 3, 5]), (8, [*range(6)])):
        assert rounded(graph, keep, {}, groups, multiple)["0"].tolist() == there
    # Where no constant is left, nothing has to carry one.
    model[0].bias.data.zero_()
    assert rounded(graph, keep, {}, groups, 2) == {}
    assert rounded(graph, keep, {"0": torch.tensor([0, 1, 5])}, groups, 3)["0"].tolist() == [
        0,
        1,
        5,
    ]


def test_filters_that_stay_as_zeros_are_zero_whether_or_not_the_network_was_zeroed() -> None:
    model = randomised(fpgm.model("resnet20"), 0, torch.float64)
    keep = fpgm.select(model, "l2", 0.5)
    ballast = {name: torch.arange(len(model.get_submodule(name).weight)) for name in keep}
    small = fpgm.compact(model, keep, ballast)  # at full width, of a network as it was
    fpgm.zero_(model, keep)
    x = torch.randn(2, 3, 16, 16, dtype=torch.float64)
    with torch.no_grad():
        torch.testing.assert_close(small(x), model.eval()(x), rtol=1e-12, atol=1e-12)
