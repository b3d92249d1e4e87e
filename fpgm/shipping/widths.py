"""Widths that bring a network to a share of its time, measured on the machine that it is for.

Times of lone layers (timetable) say what each width costs, a knapsack chooses among them, and the
whole network, built and timed, says how far off that was: adds, reorders and constants at the
borders are in no table. So the prediction is scaled by what was measured, and the choice is made
again until the network takes the time it is to take.
"""

from __future__ import annotations

import copy
import hashlib
import math
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from fpgm.compaction.compact import compact
from fpgm.compaction.constants import Keep
from fpgm.errors import BudgetError
from fpgm.graph.flow import tails
from fpgm.graph.groups import Group
from fpgm.graph.owners import Reads, channels
from fpgm.graph.trace import ChannelGraph, trace
from fpgm.networks.modes import evaluating
from fpgm.networks.weights import parameters_of, weight_of
from fpgm.selection.ranking import ascending, least_kept
from fpgm.selection.zero import pruned
from fpgm.shipping.knapsack import Times, Widths, widths_within
from fpgm.shipping.latency import side_by_side
from fpgm.shipping.runtimes import TARGETS, Target, apart
from fpgm.shipping.timetable import Kind, Surface, TimeTable, kinds, levels, measure

TOLERANCE = 0.05  # of the target
ROUNDS = 8  # networks built and timed


@dataclass(frozen=True)
class Found:
    """groups: kept channels of each; all times in milliseconds; predicted: by the table as it was
    scaled before this network was timed; free: layer -> how many of its kept filters cost none."""

    groups: tuple[int, ...]
    dense: float
    predicted: float
    measured: float
    rounds: list[dict[str, float]]
    free: dict[str, int]

    @property
    def share(self) -> float:
        """Of the dense network's time."""
        return self.measured / self.dense

    def summary(self) -> dict[str, Any]:
        """Plain values, for checkpoints and reports."""
        return {
            "dense_ms": self.dense, "predicted_ms": self.predicted, "measured_ms": self.measured,
            "rounds": self.rounds, "free": self.free,
        }  # fmt: skip


@dataclass(frozen=True)
class Wanted:
    """share: of the dense network's time; align: widths are multiples of it; floor: share of each
    group's channels that stays; silent: what is pruned leaves no constants, as the schedule takes
    along what stands behind its filters; added: scores may be compared over layers."""

    share: float
    target: Target
    align: int
    floor: float
    silent: bool = False
    added: bool = False


def found_apart(
    model: nn.Module,
    groups: Sequence[Group],
    scores: Sequence[Tensor],
    wanted: Wanted,
    table: TimeTable,
) -> tuple[Found, TimeTable]:
    """`found` in a process of its own where the runtime may crash; see runtimes.apart. Returns the
    table with what was measured. Raises BudgetError, ShippingError."""
    return apart(wanted.target, _with_table, model, groups, scores, wanted, table)


def both_apart(model: nn.Module, keep: Keep, ballast: Keep, target: Target) -> tuple[float, float]:
    """Milliseconds of a network at full width and of its compact one, in turn; where the runtime
    may crash, in a process of its own. Raises ShippingError."""
    return apart(target, _both, model, keep, ballast, target)


def _both(model: nn.Module, keep: Keep, ballast: Keep, target: Target) -> tuple[float, float]:
    everything = {name: torch.arange(len(w)) for name, w in _weights(model, keep)}
    dense = compact(model, everything, image=target.image)
    networks = dense, compact(model, keep, ballast, target.image)
    make = TARGETS[target.runtime]
    runners = [make(network, target.image, target.threads) for network in networks]
    seconds = side_by_side(runners, torch.randn(target.batch, *target.image))
    full, small = (1e3 * statistics.median(times) for times in seconds)
    return full, small


def _weights(model: nn.Module, keep: Keep) -> Iterator[tuple[str, Tensor]]:
    for name in keep:
        weight = weight_of(model, name)
        yield name, weight


def _with_table(
    model: nn.Module,
    groups: Sequence[Group],
    scores: Sequence[Tensor],
    wanted: Wanted,
    table: TimeTable,
) -> tuple[Found, TimeTable]:
    torch.set_num_threads(wanted.target.threads)
    return found(model, groups, scores, wanted, table), table


def found(
    model: nn.Module,
    groups: Sequence[Group],
    scores: Sequence[Tensor],
    wanted: Wanted,
    table: TimeTable,
) -> Found:
    """Widths for each group at which the compact network takes `wanted.share` of the dense one's
    time. scores: (n,) for each group, not negative, larger is worth more.

    What is worth most: the largest product, over the layers, of the share of its scores that a
    layer keeps, so that none is starved for the others (ours); or, where scores may be `added`, the
    largest sum of all that is kept (Shen et al., NeurIPS 2022). Nothing of the model is changed.
    Raises BudgetError that names what can be reached, ShippingError.
    """
    with evaluating(model):
        target, share = wanted.target, wanted.share
        graph = trace(model, target.image)
        options = [_options(group, wanted) for group in groups]
        worth = _sums if wanted.added else _shares
        values = worth(groups, scores, options)
        times = predicted(graph, groups, options, wanted, table)
        full, least = tuple(row[-1] for row in options), tuple(row[0] for row in options)
        clock = _Clock(model, groups, scores, wanted, table)
        dense = clock(full)
        narrowed = partial(widths_within, options=options, values=values, times=times)
        tries = _search(narrowed, clock, times, share * dense, dense / times(full), least)
        best = min(tries, key=lambda one: abs(one.measured / dense / share - 1))
        missed = best.measured > (1 + TOLERANCE) * share * dense
        if missed and clock(least) > share * dense:
            raise _missed(share, target, min(best.measured, clock(least)), dense)
    rounds = [{"predicted_ms": one.predicted, "measured_ms": one.measured} for one in tries]
    free = _free(groups, options, best.widths, times)
    return Found(best.widths, dense, best.predicted, best.measured, rounds, free)


@dataclass(frozen=True)
class _Try:
    """A network that was built and timed; milliseconds."""

    widths: Widths
    predicted: float
    measured: float


def _search(
    narrowed: Callable[[float], Widths],
    clock: Times,
    times: Times,
    target: float,
    scale: float,
    least: Widths,
) -> list[_Try]:
    """Networks on the way to `target` milliseconds, the last one there or as near as it comes.

    narrowed: the widths within so much of the table's time; scale: the clock's milliseconds for one
    of the table's microseconds, corrected after each network.
    """
    tries: list[_Try] = []
    budget, low, high = target / scale, 0.0, math.inf
    for _ in range(ROUNDS):
        try:
            widths = narrowed(budget)
        except BudgetError:
            widths = least  # the clock has the last word
        tries.append(_Try(widths, scale * times(widths), clock(widths)))
        slow = tries[-1].measured > target
        if abs(tries[-1].measured / target - 1) <= TOLERANCE or (slow and widths == least):
            break
        scale = tries[-1].measured / times(widths)
        # Times go in steps: a scale that leads out of what is known to enclose the target would
        # jump from one side of it to the other.
        low, high = (low, budget) if slow else (budget, high)
        budget = target / scale
        if not low < budget < high and low > 0 and high < math.inf:
            budget = math.sqrt(low * high)
    return tries


def _missed(share: float, target: Target, fastest: float, dense: float) -> BudgetError:
    reached = math.ceil(1e3 * fastest / dense) / 1e3
    could = f"the least is latency_target={reached:g}"
    if reached >= 1:
        could = "nothing is faster than the dense network: residual=shared, a larger target_batch"
    return BudgetError(
        f"latency_target={share:g}: the fastest network found takes {fastest:.3f} of {dense:.3f} "
        f"ms in {target.runtime} with target_batch={target.batch}; {could}"
    )


def _options(group: Group, wanted: Wanted) -> list[int]:
    """The widths that a group may have, rising: multiples of align, from the floor on, or all."""
    filters, align = len(group), wanted.align
    low = max(least_kept(filters, wanted.floor), align)
    step = align * max(1, filters // (32 * align))
    first = -(-low // step) * step
    return sorted({*range(first, filters, step), filters})


WIDER = 1e-9  # a channel is worth that much where scores say nothing, as those of zeroed filters


def _shares(
    groups: Sequence[Group], scores: Sequence[Tensor], options: Sequence[Sequence[int]]
) -> list[list[float]]:
    """What each width is worth where layers cannot be compared: the logarithm of the share of its
    scores that a group keeps, once for each layer that it decides."""
    kept = [_kept(values, row) for values, row in zip(scores, options, strict=True)]
    return [
        [
            len(group.members) * (math.log(max(total / max(row[-1], 1e-30), 1e-9)) + WIDER * width)
            for total, width in zip(row, widths, strict=True)
        ]
        for group, row, widths in zip(groups, kept, options, strict=True)
    ]


def _sums(
    groups: Sequence[Group], scores: Sequence[Tensor], options: Sequence[Sequence[int]]
) -> list[list[float]]:
    """What each width is worth where they can: as a share of the whole."""
    kept = [
        [len(group.members) * total for total in _kept(values, row)]
        for group, values, row in zip(groups, scores, options, strict=True)
    ]
    whole = max(sum(row[-1] for row in kept), 1e-30)
    return [
        [total / whole + WIDER * width for total, width in zip(row, widths, strict=True)]
        for row, widths in zip(kept, options, strict=True)
    ]


def _kept(scores: Tensor, widths: Sequence[int]) -> list[float]:
    """The sum of the scores that each width keeps, the highest: (n,), not negative."""
    ordered = scores.double().cpu()[ascending(scores).cpu()].flip(0).clamp(min=0)
    sums = ordered.cumsum(0)
    return [float(sums[width - 1]) for width in widths]


def predicted(
    graph: ChannelGraph,
    groups: Sequence[Group],
    options: Sequence[Sequence[int]],
    wanted: Wanted,
    table: TimeTable,
) -> Times:
    """The sum of all layers' times, microseconds, as a function of the groups' widths."""
    reads = channels(graph, groups)
    kind = kinds(graph, wanted.target.image)
    asked: dict[Kind, tuple[set[int], set[int]]] = {}
    for name, (inputs, outputs) in reads.items():
        sides = asked.setdefault(kind[name], (set(), set()))
        for side, (fixed, of_groups) in zip(sides, (inputs, outputs), strict=True):
            total = round(fixed + sum(each * len(groups[g]) for g, each in of_groups))
            side |= set(levels(total, wanted.align)) if of_groups else {total}
            # As narrow as it may get, so that nothing is guessed beyond what was timed.
            side.add(round(fixed + sum(each * options[g][0] for g, each in of_groups)) or 1)
    measure(table, asked, wanted.target)
    surfaces = {k: Surface(k, sorted(i), sorted(o), table) for k, (i, o) in asked.items()}
    layers = [(surfaces[kind[name]], *sides) for name, sides in reads.items()]
    memory: dict[tuple[int, float, float], float] = {}

    def width(side: Reads, widths: Widths) -> float:
        return side[0] + sum(each * widths[g] for g, each in side[1])

    def times(widths: Widths) -> float:
        total = 0.0
        for surface, inputs, outputs in layers:
            key = (id(surface), width(inputs, widths), width(outputs, widths))
            if key not in memory:
                memory[key] = surface(*key[1:])
            total += memory[key]
        return total

    return times


def highest(groups: Sequence[Group], scores: Sequence[Tensor], widths: Widths) -> Keep:
    """The filters of highest score, so many of each group."""
    kept: dict[str, list[Tensor]] = {}
    for group, values, width in zip(groups, scores, widths, strict=True):
        order = ascending(values).cpu()
        for name, filters in group.members:
            kept.setdefault(name, []).append(filters[order[len(order) - width :]])
    return {name: torch.cat(parts).sort().values for name, parts in kept.items()}


def silenced(model: nn.Module, keep: Keep, image: tuple[int, int, int]) -> nn.Module:
    """A copy in which nothing is left of the filters outside `keep`: no scale and no shift."""
    twin = copy.deepcopy(model)
    behind = tails(trace(twin, image))
    with torch.no_grad():
        for name, mask in pruned(twin, keep).items():
            for parameter in (p for norm in behind[name].norms for p in parameters_of(twin, norm)):
                parameter[mask] = 0
    return twin


class _Clock:
    """Milliseconds of the whole compact network by widths, from the table where it is there."""

    def __init__(
        self,
        model: nn.Module,
        groups: Sequence[Group],
        scores: Sequence[Tensor],
        wanted: Wanted,
        table: TimeTable,
    ) -> None:
        self._model, self._groups, self._scores, self._table = model, groups, scores, table
        self._target, self._silent = wanted.target, wanted.silent
        parts = [f"{n}:{len(g)}" for g in groups for n, _ in g.members]
        weights = sum(float(p.detach().double().abs().sum()) for p in model.parameters())
        self._name = f"{type(model).__name__} {' '.join(parts)} {weights!r} {self._target.image}"
        if self._silent:
            self._name += " silent"

    def __call__(self, widths: Widths) -> float:
        key = hashlib.sha256(f"{self._name} {widths}".encode()).hexdigest()[:16]
        if f"network {key}" not in self._table.ms:
            keep = highest(self._groups, self._scores, widths)
            model = silenced(self._model, keep, self._target.image) if self._silent else self._model
            dense_now, now = _both(model, keep, {}, self._target)
            # The machine may be slower now than when the dense network was timed.
            dense = self._table.ms.setdefault(self._dense, dense_now)
            self._table.ms[f"network {key}"] = now * dense / dense_now
        return self._table.ms[f"network {key}"]

    @property
    def _dense(self) -> str:
        return f"network {hashlib.sha256(self._name.encode()).hexdigest()[:16]} dense"


def _free(
    groups: Sequence[Group],
    options: Sequence[Sequence[int]],
    widths: Widths,
    times: Times,
) -> dict[str, int]:
    """Layer -> how many of its kept filters could go without any time saved, where there are."""
    found: dict[str, int] = {}
    now = times(widths)
    for index, (group, row) in enumerate(zip(groups, options, strict=True)):
        narrower = [w for w in row if w < widths[index]]
        cheap = [
            w for w in narrower
            if times((*widths[:index], w, *widths[index + 1 :])) >= now * (1 - 1e-9)
        ]  # fmt: skip
        if cheap:
            found[group.members[0][0]] = widths[index] - min(cheap)
    return found


def counts(groups: Sequence[Group], widths: Sequence[int]) -> dict[str, int]:
    """Layer -> kept filters, of kept channels by group."""
    total: dict[str, int] = {}
    for group, width in zip(groups, widths, strict=True):
        for name, _ in group.members:
            total[name] = total.get(name, 0) + width
    return total
