"""The accuracy of a network over what each of its layers alone has lost."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from tqdm import tqdm

from fpgm.sensitivity.units import Choice, Keep, Unit


@dataclass(frozen=True)
class Row:
    """layer, filters: a unit's; rate: as asked; pruned: the filters that went; accuracy,
    accuracy_bn: in percent, with BatchNorm as it is and estimated again."""

    layer: str
    filters: int
    criterion: str
    rate: float
    pruned: int
    accuracy: float
    accuracy_bn: float


class Measure(Protocol):
    """What a change costs (probe.Probe)."""

    def accuracies(self, keep: Keep) -> tuple[float, float]: ...


def curves(
    measure: Measure, units: Iterable[Unit], choices: Mapping[str, Choice], rates: Sequence[float]
) -> list[Row]:
    """A row for each unit, criterion and rate, in this order; the first rate of each is 0.

    What several rates or criteria choose alike is measured once. Raises Error where a rate would
    leave a layer empty.
    """
    wanted = [
        (unit, name, rate, choose(unit, rate))
        for unit in units
        for name, choose in choices.items()
        for rate in (0.0, *rates)
    ]
    # By what is left, whoever chose it; what loses nothing is the dense network.
    kinds = [(unit.name, _key(keep)) if unit.pruned(keep) else None for unit, _, _, keep in wanted]
    changes = {kind: keep for kind, (*_, keep) in zip(kinds, wanted, strict=True)}
    bar = tqdm(changes.items(), "measuring", leave=False, disable=None)
    known = {kind: measure.accuracies(keep if kind else {}) for kind, keep in bar}
    return [
        Row(unit.name, unit.filters, name, rate, unit.pruned(keep), *known[kind])
        for kind, (unit, name, rate, keep) in zip(kinds, wanted, strict=True)
    ]


def points(rows: Iterable[Row], layer: str, criterion: str) -> list[tuple[int, float]]:
    """Of one curve with BatchNorm estimated again: (pruned filters, accuracy), ascending."""
    found = {
        row.pruned: row.accuracy_bn
        for row in rows
        if (row.layer, row.criterion) == (layer, criterion)
    }
    return sorted(found.items())


def _key(keep: Keep) -> tuple[tuple[str, bytes], ...]:
    return tuple((name, kept.numpy().tobytes()) for name, kept in keep.items())
