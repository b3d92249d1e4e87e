"""Counts that add up: to the digit, and from the network that is really there."""

from __future__ import annotations

import csv
import io

import pytest
import torch
import zoo
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from zoo import FAMILIES, Functional, Mysterious, zeroed

import fpgm
from fpgm.compaction.compact import compact
from fpgm.compaction.constants import analyse
from fpgm.graph.cost import Cost, cost, paper_reduction
from fpgm.graph.groups import prunable
from fpgm.graph.trace import trace
from fpgm.networks.models import MODELS, ONE_SIZE

CIFAR = (3, 32, 32)
SIZES = {"Mixed": (3, 8, 8), "Spelled": (3, 8, 8), "Mysterious": (3, 8, 8), "Odd": (3, 47, 52)}
DENSE = {
    "resnet20": 40_551_040,
    "resnet32": 68_862_592,
    "resnet56": 125_485_696,
    "resnet110": 252_887_680,
}
# Whole filters, the residual stream at full width: what an exact network cannot exceed.
UPPER_AT_40 = {"resnet20": 19_585_728, "resnet32": 33_797_952}
# FPGM, table 1 (rates .3 and .4) and table 2 (.3), reductions in percent as published, and with one
# more digit.
PUBLISHED = """
resnet20,0.3,42.2,42.22
resnet20,0.4,54.0,53.96
resnet32,0.3,41.5,41.51
resnet32,0.4,53.2,53.16
resnet56,0.4,52.6,52.63
resnet110,0.3,40.8,40.78
resnet110,0.4,52.3,52.31
resnet34,0.3,41.1,41.11
"""


@pytest.fixture(scope="module")
def papers() -> dict[str, tuple[int, object, dict[str, int]]]:
    """Architecture -> MACs, graph and MACs of its layers."""
    made = {}
    for arch in (*DENSE, "resnet34"):
        with torch.device("meta"):
            model = fpgm.model(arch, num_classes=1000 if arch == "resnet34" else 10)
        dense = cost(model, (3, 224, 224) if arch == "resnet34" else CIFAR)
        made[arch] = dense.macs, trace(model), {layer.name: layer.macs for layer in dense.layers}
    return made


@pytest.mark.parametrize("arch", DENSE)
def test_dense_macs_are_right_to_the_digit(arch: str, papers) -> None:
    assert papers[arch][0] == DENSE[arch]


@pytest.mark.parametrize(
    ("arch", "rate", "published", "digits"), csv.reader(io.StringIO(PUBLISHED.strip()))
)
def test_closed_form_gives_the_published_reductions(
    arch: str, rate: str, published: str, digits: str, papers
) -> None:
    graph, macs = papers[arch][1:]
    rates = dict.fromkeys(prunable(graph).layers, float(rate))
    reduction = paper_reduction(graph, macs, rates)
    assert f"{reduction:.1f}" == published
    assert f"{reduction:.2f}" == digits


@pytest.mark.parametrize("network", [Mysterious, FAMILIES["densenet"], FAMILIES["mobilenet_v2"]])
def test_closed_form_is_not_offered_where_the_papers_have_none(network) -> None:
    model = network()
    macs = {layer.name: layer.macs for layer in cost(model, CIFAR).layers}
    assert paper_reduction(trace(model), macs, dict.fromkeys(macs, 0.4)) is None


def counted(model: nn.Module, image: tuple[int, int, int]) -> list[int]:
    """By torch's own counter, which sees operations: for one image and for two."""
    flops = []
    for batch in (1, 2):
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            model.eval()(torch.zeros(batch, *image))
        flops.append(counter.get_total_flops())
    return flops


def check(model: nn.Module, image: tuple[int, int, int]) -> Cost:
    ours, (one, two) = cost(model, image), counted(model, image)
    assert two - one == 2 * ours.macs  # what one more image costs
    assert one == 2 * (ours.macs + ours.macs_per_batch)
    assert sum(layer.macs for layer in ours.layers) == ours.macs
    return ours


ZOO = ("Odd", "Overwrites", "Spelled", "Mixed", "Mysterious", "Gated", "Functional")


@pytest.mark.parametrize("name", MODELS)
def test_every_model_costs_what_torch_counts(name: str) -> None:
    with torch.device("meta"):  # nothing is computed: only shapes count
        model = fpgm.model(name)
    size = ONE_SIZE.get(name, 32)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model.eval()(torch.zeros(1, 3, size, size, device="meta"))
    assert counter.get_total_flops() == 2 * cost(model, (3, size, size)).macs


@pytest.mark.parametrize("name", [*ZOO, *FAMILIES, "resnet20"])
def test_every_kind_of_network_costs_what_torch_counts(name: str) -> None:
    make = FAMILIES.get(name) or getattr(zoo, name, None) or (lambda: fpgm.model(name))
    image = SIZES.get(name, CIFAR)
    model, keep = zeroed(0, 0.4, make())
    dense, small = check(model, image), compact(model, keep)
    compacted = check(small, image)
    assert analyse(trace(model), keep).macs(dense) == compacted.macs
    assert [layer.name for layer in compacted.layers] == [layer.name for layer in dense.layers]
    widths = {layer.name: layer.filters for layer in compacted.layers}
    assert all(widths[name] == len(kept) for name, kept in keep.items())


def test_functions_count_as_layers_do() -> None:
    layers = cost(Functional(), (3, 9, 11)).layers
    assert [(layer.name, layer.filters, layer.macs) for layer in layers] == [
        ("stem", 8, 3 * 8 * 9 * 9 * 11),
        ("plain", 12, 8 * 12 * 9 * 4 * 5),
        ("grouped", 8, 12 // 2 * 8 * 9 * 2 * 3),
        ("kernel", 6, 8 * 6 * 2 * 3),
        ("table", 5, 6 * 5),
        ("table_1", 6, 6 * 5),
        ("table_2", 5, 6 * 5),
    ]


@pytest.mark.parametrize("arch", UPPER_AT_40)
def test_compact_macs_stay_below_the_full_width_stream(arch: str) -> None:
    model = fpgm.model(arch)
    small = cost(compact(model, fpgm.select(model, "l2", 0.4)), CIFAR)
    convolutions = sum(layer.macs for layer in small.layers if layer.name != "fc")
    assert 0.8 * UPPER_AT_40[arch] < convolutions <= UPPER_AT_40[arch]


def test_parameters_of_a_compact_network_include_its_constants() -> None:
    model, keep = zeroed(0, 0.4, fpgm.model("resnet20"))
    small = compact(model, keep)
    statistics = ("running_mean", "running_var", "num_batches_tracked")
    state = small.state_dict().items()
    expected = sum(value.numel() for name, value in state if not name.endswith(statistics))
    assert any(name.endswith(".border") for name, _ in state)
    assert cost(small, CIFAR).params == expected


def test_counting_leaves_no_hook_and_the_mode_as_it_was() -> None:
    class Fails(nn.Sequential):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            raise ArithmeticError(super().forward(x))

    model = Fails(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).train()
    with pytest.raises(ArithmeticError):
        cost(model, CIFAR)
    assert model.training
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert torch.equal(model[1].running_mean, torch.zeros(4))
