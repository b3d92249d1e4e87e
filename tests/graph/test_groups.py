"""Which filters go together, how many, and what it makes of the network."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
import torchvision
from hypothesis import given, settings
from hypothesis import strategies as st
from zoo import randomised

import fpgm
from fpgm.compaction.compact import compact, equivalence
from fpgm.errors import BudgetError, Error
from fpgm.graph.groups import RESIDUAL, prunable
from fpgm.graph.trace import trace
from fpgm.networks.layers import Expand, Pick
from fpgm.selection.budget import rate_nearest, rate_under
from fpgm.selection.select import kept_count, kept_counts

TORCHVISION = (
    "resnet18", "vgg11_bn", "densenet121", "googlenet", "mobilenet_v2", "mobilenet_v3_small",
    "efficientnet_b0", "regnet_y_400mf", "mnasnet0_5", "shufflenet_v2_x0_5", "convnext_tiny",
    "squeezenet1_0",
)  # fmt: skip


def made(name: str) -> torch.nn.Module:
    options = {"aux_logits": False} if name == "googlenet" else {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torchvision.models.get_model(name, weights=None, num_classes=10, **options)


def count(model: torch.nn.Module, *kinds: type) -> int:
    return sum(isinstance(module, kinds) for module in model.modules())


@pytest.mark.parametrize("residual", RESIDUAL)
@pytest.mark.parametrize("name", TORCHVISION)
def test_any_torchvision_network_is_compacted_exactly(name: str, residual: str) -> None:
    model = randomised(made(name), 0, torch.float64)
    groups = prunable(trace(model), residual).groups
    keep = fpgm.select(model, "random", 0.5, groups=groups)
    fpgm.zero_(model, keep)
    x = torch.randn(2, 3, 64, 70, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    found = equivalence(model, compact(model, keep), x)
    assert found["max_abs_diff"] <= 1e-12 * found["max_abs_logit"]


@pytest.mark.parametrize("name", TORCHVISION)
def test_every_convolution_is_pruned_or_its_reason_is_given(name: str) -> None:
    model = made(name)
    for residual in RESIDUAL:
        tied = prunable(trace(model), residual)
        names = {n for n, m in model.named_modules() if isinstance(m, torch.nn.Conv2d)}
        assert set(tied.layers) | set(tied.kept_full) == names
        assert not set(tied.layers) & set(tied.kept_full)


@pytest.mark.parametrize("arch", ["resnet20", "resnet56", "resnet18", "resnet50"])
def test_shared_streams_are_narrow_and_need_no_scatter(arch: str) -> None:
    model = fpgm.model(arch)
    keep = fpgm.select(model, "gm", 0.5, "shared")
    small = compact(model, keep)
    # Shortcut A appends channels between two stages: the compact network has to as well.
    transitions = 2 if arch in ("resnet20", "resnet56") else 0
    assert count(small, Expand, Pick) == transitions
    widths = {m.out_channels for m in small.modules() if isinstance(m, torch.nn.Conv2d)}
    full = {m.out_channels for m in model.modules() if isinstance(m, torch.nn.Conv2d)}
    assert widths == {width // 2 for width in full}


def test_shared_members_of_a_stream_keep_the_same_channels() -> None:
    keep = fpgm.select(fpgm.model("resnet18"), "gm", 0.4, "shared")
    for first, *others in (
        ("conv1", "layer1.0.conv2", "layer1.1.conv2"),
        ("layer2.0.conv2", "layer2.0.downsample.0", "layer2.1.conv2"),
    ):
        assert all(torch.equal(keep[first], keep[other]) for other in others)
    assert not torch.equal(keep["layer1.0.conv1"], keep["layer1.1.conv1"])


def test_inner_leaves_the_streams_whole() -> None:
    tied = prunable(trace(fpgm.model("resnet18")), "inner")
    assert set(tied.layers) == {f"layer{i}.{j}.conv1" for i in (1, 2, 3, 4) for j in (0, 1)}
    assert tied.kept_full["conv1"] == "writes into a residual stream"


def test_depthwise_filters_go_with_what_they_read() -> None:
    model = made("mobilenet_v2")
    keep = fpgm.select(model, "gm", 0.5)
    expand, depthwise = keep["features.2.conv.0.0"], keep["features.2.conv.1.0"]
    assert torch.equal(expand, depthwise)


def test_squeeze_excite_gates_go_with_what_they_multiply() -> None:
    model = made("efficientnet_b0")
    keep = fpgm.select(model, "gm", 0.5)
    assert torch.equal(keep["features.2.0.block.1.0"], keep["features.2.0.block.2.fc2"])


@given(st.integers(1, 2048), st.floats(0, 0.999), st.sampled_from([1, 8, 16, 32]))
def test_aligned_counts_are_multiples_nearest_to_the_rate_and_never_empty(
    filters: int, rate: float, align: int
) -> None:
    kept = kept_count(filters, rate, align)
    assert 1 <= kept <= filters
    assert kept % align == 0 or kept == filters
    if align > 1 and filters % align == 0:
        assert abs(kept - filters * (1 - rate)) <= max(align / 2, align - filters * (1 - rate))


@given(st.floats(0, 0.95), st.sampled_from([1, 8, 16]), st.sampled_from(RESIDUAL))
@settings(deadline=None, max_examples=30)
def test_every_layer_gets_its_count_also_where_it_is_made_of_several_blocks(
    rate: float, align: int, residual: str
) -> None:
    groups = prunable(trace(RESNET20), residual).groups
    keep = fpgm.select(RESNET20, "l2", rate, align=align, groups=groups)
    for name, kept in keep.items():
        filters = RESNET20.get_submodule(name).out_channels
        assert len(kept) == kept_count(filters, rate, align)
        assert torch.equal(kept, kept.unique())
    assert all(c <= len(b) for b, c in zip(groups, kept_counts(groups, rate, align), strict=True))


RESNET20 = fpgm.model("resnet20")


def macs_at(residual: str, align: int):
    groups = prunable(trace(RESNET20), residual).groups

    def macs(rate: float) -> int:
        keep = fpgm.select(RESNET20, "gm", rate, align=align, groups=groups)
        return fpgm.cost(compact(RESNET20, keep), (3, 32, 32)).macs

    return macs


@pytest.mark.parametrize(("residual", "align"), [("shared", 1), ("shared", 8), ("inner", 1)])
@pytest.mark.parametrize("target", [0.4, 0.5, 0.7])
def test_budget_gives_the_largest_network_under_it(
    residual: str, align: int, target: float
) -> None:
    macs, limit = macs_at(residual, align), target * 40_551_040
    rate = rate_under(limit, macs)
    assert macs(rate) <= limit
    # No smaller rate fits: just below, some layer has one filter (or one multiple) more.
    assert macs(max(0.0, rate - 1e-4)) > limit


def test_budget_that_cannot_be_met_says_what_can() -> None:
    with pytest.raises(BudgetError, match=r"the smallest network has [\d,]+ MACs"):
        rate_under(1000, macs_at("shared", 8))
    assert rate_under(10**9, macs_at("shared", 8)) == 0


def test_alignment_stays_nearest_to_the_reduction_asked_for() -> None:
    wanted, macs = macs_at("shared", 1)(0.3), macs_at("shared", 8)
    reached = macs(rate_nearest(wanted, macs))
    possible = {macs(i / 200) for i in range(199)}
    assert abs(reached - wanted) == min(abs(other - wanted) for other in possible)


def test_unknown_mode_lists_the_choices() -> None:
    with pytest.raises(Error, match="choose one of independent, shared, inner"):
        fpgm.select(RESNET20, "gm", 0.4, "both")


def test_constants_of_a_gated_channel_are_products() -> None:
    """A dead channel beside a live gate, a live channel beside a dead gate, and both dead."""

    class Gated(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = torch.nn.Conv2d(3, 6, 3, padding=1)
            self.norm = torch.nn.BatchNorm2d(6)
            self.gate = torch.nn.Conv2d(6, 6, 1)
            self.b = torch.nn.Conv2d(6, 4, 3, padding=1)
            self.fc = torch.nn.Linear(4, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = torch.nn.functional.silu(self.norm(self.a(x)))
            pooled = torch.nn.functional.adaptive_avg_pool2d(x, 1)
            x = x * self.gate(pooled).sigmoid()
            return self.fc(self.b(x).mean((2, 3)))

    model = randomised(Gated(), 0, torch.float64)
    keep = {"a": torch.tensor([0, 1, 2, 3]), "gate": torch.tensor([2, 3, 4])}
    fpgm.zero_(model, keep)
    x = torch.randn(2, 3, 9, 9, dtype=torch.float64)
    found = equivalence(copy.deepcopy(model), compact(model, keep), x)
    assert found["max_abs_diff"] <= 1e-12 * found["max_abs_logit"]
