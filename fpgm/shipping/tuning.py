"""The fastest form of a compact network on the runtime that it is for, found by the clock.

All forms compute the same function; they differ in which pruned filters stay as zeros
(compaction.ballast). The network at full width is one of them: none that is slower is ever chosen.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from fpgm.compaction.ballast import Stream, everything, rounded, streams, widened
from fpgm.compaction.compact import compact
from fpgm.errors import ShippingError
from fpgm.graph.cost import cost
from fpgm.graph.groups import Group, prunable
from fpgm.graph.trace import ChannelGraph, trace
from fpgm.networks.modes import evaluating
from fpgm.shipping.latency import side_by_side
from fpgm.shipping.runtimes import TARGETS, Target, apart

MULTIPLES = (1, 4, 8, 16)  # 1: no more than the filter that carries the constants
WORTH = 0.98  # full width must be more than the noise faster to be preferred

Ballast = dict[str, Tensor]


@dataclass(frozen=True, eq=False)  # each is itself alone: tensors have no truth
class Form:
    """A compact network with `ballast`; streams: whose adds the convolutions write in full."""

    name: str
    streams: tuple[Stream, ...]
    ballast: Ballast


@dataclass(frozen=True)
class Tuned:
    """ballast: what `fpgm.compact` takes beside `keep`; rows: {round, form, macs, ms} of all that
    was tried, the times of a round taken in turn; form: the one chosen."""

    target: Target
    ballast: Ballast
    form: str
    rows: list[dict[str, Any]]

    def summary(self) -> dict[str, Any]:
        """For report.json."""
        target = {"target": self.target.runtime, "batch": self.target.batch}
        return {**target, "threads": self.target.threads, "form": self.form, "tried": self.rows}


def tune_apart(
    model: nn.Module, keep: Mapping[str, Tensor], target: Target, groups: Sequence[Group]
) -> Tuned:
    """`tune` where a runtime may crash; see runtimes.apart."""
    return apart(target, tune, model, keep, target, groups)


def tune(
    model: nn.Module,
    keep: Mapping[str, Tensor],
    target: Target,
    groups: Sequence[Group] | None = None,
) -> Tuned:
    """Time the forms of the compact network of (model, keep) and choose the fastest.

    groups: what was decided together in the selection, by default each layer alone. Two rounds:
    which adds get a widened convolution and which keep the scatter; then, on the best of these,
    which widths to round up. Raises ShippingError, and ShippingError for too large a batch.
    """
    with evaluating(model):
        graph = trace(model, target.image)
        keep = {name: kept.cpu() for name, kept in keep.items()}
        groups = prunable(graph, "independent").groups if groups is None else groups
        full = Form("full width", (), everything(graph, keep))
        forms = _distinct(_widened(graph, keep))
        first = _timed(model, keep, [full, *forms], target)
        best = min(forms, key=lambda form: first[form.name]["ms"])
        again = [best]
        # Widths that suit the runtime may only pay where no scatter breaks its layout.
        for base in dict.fromkeys((best, forms[min(1, len(forms) - 1)])):
            for multiple in MULTIPLES:
                ballast = rounded(graph, keep, base.ballast, groups, multiple)
                ballast = widened(graph, keep, ballast, base.streams)
                again.append(Form(f"{base.name}, widths to {multiple}", base.streams, ballast))
        again = _distinct(again)
        second = _timed(model, keep, [full, *again], target)
    fastest = min(again, key=lambda form: second[form.name]["ms"])
    if second[full.name]["ms"] < WORTH * second[fastest.name]["ms"]:
        fastest = full
    rows = [{"round": 1, **row} for row in first.values()]
    rows += [{"round": 2, **row} for row in second.values()]
    return Tuned(target, fastest.ballast, fastest.name, rows)


def _widened(graph: ChannelGraph, keep: Mapping[str, Tensor]) -> Iterator[Form]:
    """As cut, with all adds widened, and with those of one stream."""
    every = tuple(streams(graph, keep))
    yield Form("as cut", (), {})
    if every:
        yield Form("all adds widened", every, widened(graph, keep, {}, every))
    for stream in every if len(every) > 1 else ():
        ballast = widened(graph, keep, {}, [stream])
        yield Form(f"{stream[0]} of {stream[1]} widened", (stream,), ballast)


def _distinct(forms: Iterable[Form]) -> list[Form]:
    """Without those of an earlier one's ballast: some channels no convolution writes."""
    seen: dict[tuple[tuple[str, int], ...], Form] = {}
    for form in forms:
        seen.setdefault(tuple(sorted((n, len(f)) for n, f in form.ballast.items())), form)
    return list(seen.values())


def _timed(
    model: nn.Module, keep: Mapping[str, Tensor], forms: Iterable[Form], target: Target
) -> dict[str, dict[str, Any]]:
    """The forms' times, taken in turn: {form, macs, ms} by name."""
    networks = {form.name: compact(model, keep, form.ballast, target.image) for form in forms}
    make = TARGETS[target.runtime]
    bar = tqdm(networks.values(), f"forms for {target.runtime}", leave=False, disable=None)
    runners = [make(network, target.image, target.threads) for network in bar]
    try:
        seconds = side_by_side(runners, torch.randn(target.batch, *target.image))
    except Exception as error:  # every runtime has its own kinds
        raise ShippingError(
            f"target_batch={target.batch}: {target.runtime} cannot run it "
            f"({str(error).splitlines()[0]}); try target_batch={max(target.batch // 2, 1)}"
        ) from error
    return {
        name: {
            "form": name,
            "macs": cost(network, target.image).macs,
            "ms": 1e3 * statistics.median(times),
        }
        for (name, network), times in zip(networks.items(), seconds, strict=True)
    }
