"""The widths that `latency_target` asks for: found once a run, from times that a file keeps."""

from __future__ import annotations

import copy
import hashlib
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from fpgm.graph.groups import Group
from fpgm.selection.rule import Rule
from fpgm.shipping import timetable, widths
from fpgm.shipping.runtimes import Target
from fpgm.shipping.timetable import TimeTable
from fpgm.shipping.widths import Found, Wanted

FILE = "latency_table.json"  # in the run directory


@dataclass(frozen=True)
class Latency:
    """share: of the dense network's milliseconds on `target`; directory: of the run, where the
    times are kept; given: a table of times to begin with."""

    share: float
    target: Target
    directory: Path
    given: Path | None = None

    def table(self, warn: Callable[[str], None]) -> TimeTable:
        """The run's own times; else those given, else those that another run measured here."""
        places = [self.directory / FILE, *([self.given] if self.given else []), self.shared]
        for place in places:
            if place.exists():
                table, problem = timetable.read(place, self.target)
                if problem is None:
                    return table
                warn(problem)
        return TimeTable(timetable.fingerprint(self.target))

    @property
    def shared(self) -> Path:
        """Where the times of this machine, runtime and batch lie for all runs."""
        what = json.dumps(timetable.fingerprint(self.target), sort_keys=True)
        home = Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser()
        return home / "fpgm" / "latency" / f"{hashlib.sha256(what.encode()).hexdigest()[:24]}.json"


def find(
    model: nn.Module,
    groups: Sequence[Group],
    scores: Sequence[Tensor],
    latency: Latency,
    rule: Rule,
    warn: Callable[[str], None],
    silent: bool = False,
) -> Found:
    """Widths at which the network takes its share of the dense one's time. scores: (n,) for each
    group, comparable over groups where the rule has one ranking; silent: see Wanted. Writes the
    times that were measured. Raises BudgetError, ShippingError, OSError."""
    wanted = Wanted(latency.share, latency.target, rule.align, rule.floor, silent, rule.one_ranking)
    model, table = with_constants(model), latency.table(warn)
    lows = [_low(values) for values in scores]
    lows = [min(lows)] * len(lows) if rule.one_ranking else lows
    positive = [_positive(values, low) for values, low in zip(scores, lows, strict=True)]
    found, table = widths.found_apart(model, groups, positive, wanted, table)
    for place in (latency.directory / FILE, latency.shared):
        table.save(place)
    if abs(found.share / latency.share - 1) > widths.TOLERANCE:
        warn(
            f"latency_target={latency.share:g}: the nearest network found takes "
            f"{found.share:.3f} of the time; a smaller align gives finer steps"
        )
    return found


def with_constants(model: nn.Module) -> nn.Module:
    """A copy on the CPU in which every BatchNorm shifts: what a pruned filter leaves costs time,
    and at a random start it is not there yet."""
    twin = copy.deepcopy(model).cpu()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for module in twin.modules():
            if isinstance(module, nn.BatchNorm2d) and module.affine and not module.bias.any():
                module.bias.normal_(0, 0.1, generator=generator)
    return twin


def _low(scores: Tensor) -> float:
    """The lowest score, where it is negative."""
    finite = scores[scores.isfinite()]
    return min(float(finite.min()), 0.0) if len(finite) else 0.0


def _positive(scores: Tensor, low: float) -> Tensor:
    """Scores from 0 on, 0 where there is none."""
    return (scores - low).masked_fill(~scores.isfinite(), 0.0)
