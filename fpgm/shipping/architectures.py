"""Networks to time by their names, before anything is trained: what FPGM's table 5 measures.

The weights are drawn at random, and so is all that a BatchNorm holds: a fresh one shifts nothing,
and compaction would have no constants to carry, which a trained network has.
"""

from __future__ import annotations

import csv
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fpgm.compaction.compact import compact
from fpgm.errors import Error, ShippingError, first_line
from fpgm.graph.cost import cost, paper_reduction
from fpgm.graph.groups import RESIDUAL, prunable
from fpgm.graph.trace import trace
from fpgm.networks import models
from fpgm.selection.select import select

PIXELS = {True: 224, False: 32}  # of an image: torchvision's networks, the others
CLASSES = {True: 1000, False: 10}
RATE = 0.3


@dataclass(frozen=True)
class Request:
    """A network by name and how it is pruned. image: pixels on a side, None for what its data set
    has; residual, align: as in fpgm.select."""

    arch: str
    rate: float
    residual: str = RESIDUAL[0]
    align: int = 1
    image: int | None = None

    @property
    def shape(self) -> tuple[int, int, int]:
        """(C, H, W)."""
        pixels = self.image or PIXELS[self.arch in models.TORCHVISION]
        return 3, pixels, pixels


@dataclass(frozen=True)
class Pair:
    """The network of a request at full width and compact. macs: of one image, dense and compact;
    closed_form: percent saved by the papers' formula, None where they have none for it."""

    request: Request
    dense: nn.Module
    small: nn.Module
    macs: tuple[int, int]
    closed_form: float | None


@dataclass(frozen=True)
class PublishedTime:
    """A row of FPGM's table 5: milliseconds of a batch, reductions in percent (realised: of the
    time, theoretical: of the MACs)."""

    baseline_ms: float
    pruned_ms: float
    realised_reduction: float
    theoretical_reduction: float
    note: str


def named(words: str) -> list[str]:
    """'resnet18,34' -> ['resnet18', 'resnet34']: a bare number is a ResNet. Raises ShippingError
    with the choices."""
    names = [word.strip() for word in words.split(",")]
    names = [f"resnet{name}" if re.fullmatch(r"\d+", name) else name for name in names]
    for name in names:
        if name not in models.MODELS:
            raise ShippingError(f"--arch {name}: choose from {', '.join(models.MODELS)}")
    return names


def rates(words: str, count: int) -> list[float]:
    """A rate for each of `count` networks, from one for all or from as many. Raises
    ShippingError."""
    try:
        values = [float(word) for word in words.split(",")]
    except ValueError:
        raise ShippingError(f"--rate {words}: numbers with commas, as in 0.3,0.4") from None
    for value in values:
        if not 0 < value < 1:
            raise ShippingError(f"--rate {value:g}: must be above 0 and below 1, for example 0.3")
    if len(values) not in (1, count):
        raise ShippingError(
            f"--rate {words}: {len(values)} rates for {count} networks; one for each, or one for "
            "all"
        )
    return values * count if len(values) == 1 else values


def pair(request: Request, seed: int = 0) -> Pair:
    """Build a network, choose its filters by the geometric median, and compact it. Both are in
    eval mode. Raises ShippingError for an image that it does not take, Error for what cannot be
    pruned so."""
    torchvisions = request.arch in models.TORCHVISION
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        dense = models.model(request.arch, CLASSES[torchvisions])
        shake(dense)
    try:
        with torch.inference_mode():
            dense(torch.zeros(1, *request.shape))
    except RuntimeError as error:
        usual, given = PIXELS[torchvisions], request.shape[1]
        raise ShippingError(
            f"--image {given}: {request.arch} does not take it ({first_line(error)}); try "
            + (f"--image {usual}" if given != usual else "--image with the size it is made for")
        ) from error
    try:
        keep = select(
            dense, rate=request.rate, residual=request.residual, align=request.align,
            image=request.shape,
        )  # fmt: skip
    except Error as error:
        raise ShippingError(f"--arch {request.arch}: {error}") from error
    small = compact(dense, keep, image=request.shape)
    before, after = (cost(network, request.shape) for network in (dense, small))
    closed_form = None
    if (request.residual, request.align) == (RESIDUAL[0], 1):
        layers = {layer.name: layer.macs for layer in before.layers}
        graph = trace(dense, request.shape)
        rates = dict.fromkeys(prunable(graph).layers, request.rate)
        closed_form = paper_reduction(graph, layers, rates)
    return Pair(request, dense, small, (before.macs, after.macs), closed_form)


@torch.no_grad()
def shake(model: nn.Module) -> None:
    """Draw all that BatchNorms hold, and put the network into eval mode.

    Near 1 and near 0, as trained ones are: no activation of a deep network overflows or gets so
    small that a processor computes it in another way.
    """
    for module in model.eval().modules():
        if isinstance(module, nn.BatchNorm2d | nn.BatchNorm1d):
            assert module.running_mean is not None
            assert module.running_var is not None
            module.weight.uniform_(0.5, 1.5)
            module.bias.normal_(0, 0.3)
            module.running_mean.normal_(0, 0.3)
            module.running_var.uniform_(0.5, 1.5)


@cache
def published_times() -> Mapping[tuple[str, float], PublishedTime]:
    """FPGM's table 5 by network and rate."""
    with (Path(__file__).parent / "paper_latency.csv").open(newline="") as file:
        return {
            (row["arch"], float(row["rate"])): PublishedTime(
                float(row["baseline_ms"]), float(row["pruned_ms"]),
                float(row["realised_reduction"]), float(row["theoretical_reduction"]), row["note"],
            )
            for row in csv.DictReader(file)
        }  # fmt: skip


def published(request: Request) -> PublishedTime | None:
    """The published row of this network at this rate."""
    return next(
        (
            time
            for (arch, rate), time in published_times().items()
            if arch == request.arch and math.isclose(rate, request.rate)
        ),
        None,
    )


def row(two: Pair, timed: Mapping[str, Any]) -> dict[str, Any]:
    """What is known of a network, and a row of latency.measure, as one row; reductions in
    percent."""
    request, there = two.request, published(two.request)
    return {
        "arch": request.arch, "rate": request.rate, "residual": request.residual,
        "align": request.align, "image": list(request.shape),
        "macs": {"dense": two.macs[0], "compact": two.macs[1]},
        "macs_reduction": 100 * (1 - two.macs[1] / two.macs[0]),
        "paper_macs": two.closed_form,
        **timed,
        "realised_reduction": 100 * (1 - timed["compact_ms"] / timed["dense_ms"]),
        "published": None if there is None else dict(vars(there)),
    }  # fmt: skip


def markdown(result: Mapping[str, Any]) -> str:
    """latency_table5.md."""
    machine, rows = result["environment"], result["rows"]
    threads = f", {result['threads']} threads" if machine["device"] == "cpu" else ""
    precision = "float32" if machine["device"] == "cpu" else machine["precision"]
    lines = [
        f"Forward pass, {precision}, weights at random; {machine['processor']}{threads}, torch "
        f"{machine['torch']}; dense and compact in turn, medians. Reductions in percent.",
        "",
        "| network | rate | runtime | batch | MACs saved | closed form | dense, ms | compact, ms | "
        "time saved | published: dense, ms | compact, ms | time saved | MACs saved |",
        "|---|---:|---|---:" + "|---:" * 9 + "|",
    ]
    for line in rows:
        closed = "" if line["paper_macs"] is None else f"{line['paper_macs']:.1f}"
        there = line["published"]
        theirs = ("", "", "", "")
        if there is not None:
            theirs = (
                f"{there['baseline_ms']:.2f}", f"{there['pruned_ms']:.2f}",
                f"{there['realised_reduction']:.1f}", f"{there['theoretical_reduction']:.1f}",
            )  # fmt: skip
        cells = (
            line["arch"], f"{line['rate']:g}", line["runtime"], str(line["batch"]),
            f"{line['macs_reduction']:.1f}", closed, f"{line['dense_ms']:.2f}",
            f"{line['compact_ms']:.2f}", f"{line['realised_reduction']:.1f}", *theirs,
        )  # fmt: skip
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join([*lines, *_notes(rows), ""])


def _notes(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """What a reader of the published columns must know; a paragraph each."""
    notes = dict.fromkeys(row["published"]["note"] for row in rows if row["published"])
    lines = [f"Published: FPGM (He et al., CVPR 2019), table 5; {note}." for note in notes]
    for arch in dict.fromkeys(row["arch"] for row in rows if not row["published"]):
        elsewhere = [f"{rate:g}" for name, rate in published_times() if name == arch]
        if elsewhere:
            lines.append(f"{arch} is published at --rate {', '.join(elsewhere)}.")
    return [line for paragraph in lines for line in ("", paragraph)]
