"""Counts that add up: to the digit, and from the network that is really there."""

from __future__ import annotations

import csv
import io

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from zoo import Mysterious, zeroed

import fpgm
from fpgm.compaction.compact import compact
from fpgm.graph.cost import cost, paper_reduction
from fpgm.graph.trace import trace

CIFAR = (3, 32, 32)
DENSE = {
    "resnet20": 40_551_040,
    "resnet32": 68_862_592,
    "resnet56": 125_485_696,
    "resnet110": 252_887_680,
}
# Whole filters, the residual stream at full width: what an exact network cannot exceed.
UPPER_AT_40 = {
    "resnet20": 19_585_728,
    "resnet32": 33_797_952,
    "resnet56": 62_222_400,
    "resnet110": 126_177_408,
}
# FPGM, table 1 (rates .3 and .4) and table 2 (.3), reductions in percent as published.
PUBLISHED = """
resnet20,0.3,42.2
resnet20,0.4,54.0
resnet32,0.3,41.5
resnet32,0.4,53.2
resnet56,0.4,52.6
resnet110,0.3,40.8
resnet110,0.4,52.3
resnet34,0.3,41.1
"""


def closed_form(arch: str, rate: float) -> float | None:
    imagenet = arch in ("resnet18", "resnet34", "resnet50")
    model = fpgm.model(arch, num_classes=1000 if imagenet else 10)
    dense = cost(model, (3, 224, 224) if imagenet else CIFAR)
    return paper_reduction(trace(model), {layer.name: layer.macs for layer in dense.layers}, rate)


@pytest.mark.parametrize("arch", DENSE)
def test_dense_macs_are_right_to_the_digit(arch: str) -> None:
    assert cost(fpgm.model(arch), CIFAR).macs == DENSE[arch]


@pytest.mark.parametrize(("arch", "rate", "published"), csv.reader(io.StringIO(PUBLISHED.strip())))
def test_closed_form_gives_the_published_reductions(arch: str, rate: str, published: str) -> None:
    assert f"{closed_form(arch, float(rate)):.1f}" == published


def test_closed_form_has_the_known_digits_at_30_and_40_percent() -> None:
    for rate, expected in (
        (0.3, (42.22, 41.51, 41.06, 40.78)),
        (0.4, (53.96, 53.16, 52.63, 52.31)),
    ):
        for arch, reduction in zip(DENSE, expected, strict=True):
            assert closed_form(arch, rate) == pytest.approx(reduction, abs=0.006)


def test_closed_form_is_not_offered_where_the_papers_have_none() -> None:
    model = Mysterious()
    macs = {layer.name: layer.macs for layer in cost(model, CIFAR).layers}
    assert paper_reduction(trace(model), macs, 0.4) is None


@pytest.mark.parametrize("arch", [*DENSE, "vgg16", "resnet18", "resnet50"])
@pytest.mark.parametrize("rate", [0.3, 0.4])
def test_compact_macs_equal_an_independent_count(arch: str, rate: float) -> None:
    model, keep = zeroed(0, rate, fpgm.model(arch))
    small = compact(model, keep)
    counted = cost(small, CIFAR)
    # Independent: torch's counter sees the operations, not the layers, and so the maps too. The
    # difference between two batch sizes is what one more image costs.
    flops = []
    for batch in (1, 2):
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            small(torch.zeros(batch, *CIFAR))
        flops.append(counter.get_total_flops())
    assert flops[1] - flops[0] == 2 * counted.macs
    assert flops[0] == 2 * (counted.macs + counted.macs_per_batch)
    assert sum(layer.macs for layer in counted.layers) == counted.macs


@pytest.mark.parametrize("arch", DENSE)
def test_compact_macs_stay_below_the_full_width_stream(arch: str) -> None:
    model = fpgm.model(arch)
    small = cost(compact(model, fpgm.select(model, "gm", 0.4)), CIFAR)
    convolutions = sum(layer.macs for layer in small.layers if layer.name != "fc")
    assert 0.8 * UPPER_AT_40[arch] < convolutions <= UPPER_AT_40[arch]


def test_parameters_of_a_compact_network_include_its_constants() -> None:
    model, keep = zeroed(0, 0.4, fpgm.model("resnet20"))
    small = compact(model, keep)
    counters = sum(n.endswith("num_batches_tracked") for n in small.state_dict())
    running = sum(
        v.numel()
        for n, v in small.state_dict().items()
        if n.endswith(("running_mean", "running_var"))
    )
    everything = sum(v.numel() for v in small.state_dict().values())
    assert cost(small, CIFAR).params == everything - running - counters


def test_counting_leaves_no_hook_and_the_mode_as_it_was() -> None:
    model = fpgm.model("resnet20").train()
    cost(model, CIFAR)
    assert model.training
    assert not any(module._forward_hooks for module in model.modules())
