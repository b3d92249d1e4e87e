"""What a selection is asked for: how filters are chosen, and how many of each layer go."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from typing import Any

from fpgm.criteria import Criterion, named
from fpgm.errors import Error
from fpgm.selection.ranking import NORMALISATIONS, pruned_count

SCOPES = ("layer", "global", "isomorphic")
COSTS = ("none", "macs", "memory")
ROUNDINGS = ("pruned", "kept")
LISTED = 60  # layers that an error names


@dataclass(frozen=True)
class Rule:
    """How filters are chosen, and how many go.

    criterion, options: a name that criteria.named takes, and what its function is given; scope:
    `layer`, a rate for each, or one ranking, `global` over the network or `isomorphic` over each
    set of like layers, by scores normalised within each layer as `normalise` says (see
    selection.ranking), divided by what a channel costs (`cost`: graph.worth) and leaving each layer
    the share `floor` of its filters; align: kept counts are multiples of it; seed: of chance.

    rates: pattern on names of layers -> rate, the first that fits counts, other layers get the
    rate of the whole; widths: kept filters in place of rates, by pattern or one for each layer in
    order of execution; rounding: floor(N rate) filters go (`pruned`), or floor(N (1 - rate)) stay
    (`kept`, as in PFEC); threshold: in place of any rate, all filters with a score below it go;
    share: how much of all that goes by now, for schedules that begin gently.

    Raises Error for what does not exist or does not go together.
    """

    criterion: str = "gm"
    options: Mapping[str, Any] = field(default_factory=dict)
    scope: str = "layer"
    normalise: str = "mean"
    floor: float = 0.1
    align: int = 1
    seed: int = 0
    cost: str = "none"
    rates: Mapping[str, float] = field(default_factory=dict)
    widths: Mapping[str, int] | Sequence[int] = field(default_factory=dict)
    rounding: str = "pruned"
    threshold: float | None = None
    share: float = 1.0

    def __post_init__(self) -> None:
        problems = self.problems()
        if problems:
            raise Error("\n".join(problems))

    def problems(self) -> list[str]:
        """A line for each thing that is wrong."""
        problems = [
            f"{key}={value}: choose one of {', '.join(choices)}"
            for key, value, choices in (
                ("scope", self.scope, SCOPES),
                ("normalise", self.normalise, NORMALISATIONS),
                ("scope_cost", self.cost, COSTS),
                ("rounding", self.rounding, ROUNDINGS),
            )
            if value not in choices
        ]
        problems += self._contradictions()
        try:
            criterion = named(self.criterion)
        except Error as error:
            return [*problems, str(error)]
        if criterion.places and (self.one_ranking or self.threshold is not None):
            key = f"scope={self.scope}" if self.one_ranking else f"threshold={self.threshold}"
            problems.append(
                f"{key}: criterion={self.criterion} is an order of pruning within a layer "
                "and has no scores to compare layers by; criterion=gm, or scope=layer"
            )
        return problems + criterion.check(self.options)

    def _contradictions(self) -> Iterator[str]:
        if self.one_ranking and not 0 <= self.floor < 1:
            yield f"floor={self.floor}: must be at least 0 and below 1, for example 0.1"
        for pattern, rate in self.rates.items():
            if not 0 <= rate < 1:
                yield f"rates: {pattern}={rate}: must be at least 0 and below 1, for example 0.4"
        given = [key for key in ("rates", "widths") if getattr(self, key)]
        given += ["threshold"] if self.threshold is not None else []
        if len(given) > 1:
            yield f"{given[0]} and {given[1]}: one of them says how much of a layer goes"
        if given and self.one_ranking:
            yield f"{given[0]}: goes with scope=layer; scope={self.scope} finds each layer's rate"
        if self.cost != "none" and not self.one_ranking:
            yield (
                f"scope_cost={self.cost}: all filters of a layer cost the same; it goes with "
                "scope=global or scope=isomorphic"
            )

    @property
    def one_ranking(self) -> bool:
        """Whether filters of several layers are ranked together."""
        return self.scope != "layer"

    @property
    def by_hand(self) -> bool:
        """Whether layers are told apart, so that one rate does not say how much goes."""
        return bool(self.rates or self.widths) or self.threshold is not None

    @property
    def scored_by(self) -> Criterion:
        return named(self.criterion)

    def prunes(self, rate: float) -> bool:
        """Whether anything may go, where layers that nothing is said of lose `rate`."""
        asked = rate > 0 or any(self.rates.values()) or bool(self.widths)
        return self.share > 0 and (asked or self.threshold is not None)

    def for_network(self, layers: Mapping[str, int], whole: Mapping[str, str]) -> Rule:
        """The same with layers' names in place of patterns and places.

        layers: those that may be pruned, in order of execution, with their filters; whole: those
        that are kept whole, with the reason. Raises Error for what does not fit this network.
        """
        if isinstance(self.widths, Mapping):
            widths = _by_layer("widths", self.widths, layers, whole)
        elif len(self.widths) in (0, len(layers)):
            widths = dict(zip(layers, self.widths, strict=False))
        else:
            raise Error(
                f"widths: {len(self.widths)} numbers for {len(layers)} layers, which are "
                f"{_listed([f'{name} ({filters})' for name, filters in layers.items()])}"
            )
        for name, width in widths.items():
            if not 1 <= width <= layers[name]:
                raise Error(f"widths: {name}={width}: it has {layers[name]} filters, 1 to all stay")
        return replace(self, rates=_by_layer("rates", self.rates, layers, whole), widths=widths)

    def rate_of(self, layer: str, rate: float, filters: int) -> float:
        """The share of a layer's filters that goes, where others lose `rate`."""
        width = _get(self.widths, layer)
        return self.share * (self.rates.get(layer, rate) if width is None else 1 - width / filters)

    def kept_of(self, layer: str, filters: int, rate: float) -> int:
        """How many of a layer's filters stay, where layers that nothing is said of lose `rate`."""
        width = _get(self.widths, layer)
        if width is not None:
            return filters - pruned_count(filters - width, self.share)
        return self.kept(filters, self.rate_of(layer, rate, filters))

    def pruned(self, filters: int, rate: float) -> int:
        """How many of a layer's filters go at `rate`."""
        if self.rounding == "kept":
            return filters - int(filters * (1 - rate) + 1e-9)
        count = self.scored_by.pruned
        return count(filters, rate, **self.options) if count else pruned_count(filters, rate)

    def kept(self, filters: int, rate: float) -> int:
        """How many filters stay: all but those that go, or the nearest number that is aligned.

        Aligned counts are the multiples of `align`, the smallest no less than align, or all.
        """
        if self.align == 1:
            return filters - self.pruned(filters, rate)
        multiples = {*range(self.align, filters + 1, self.align), filters}
        nearest: int = min(sorted(multiples), key=lambda count: abs(count - filters * (1 - rate)))
        return nearest


def _get(widths: Mapping[str, int] | Sequence[int], layer: str) -> int | None:
    return widths.get(layer) if isinstance(widths, Mapping) else None


def fitting(pattern: str, names: Sequence[str]) -> list[str]:
    """The names that a shell-like pattern fits."""
    return [name for name in names if fnmatchcase(name, pattern)]


def _by_layer(
    key: str, table: Mapping[str, Any], layers: Mapping[str, int], whole: Mapping[str, str]
) -> dict[str, Any]:
    """layer -> the value of the first pattern that fits it. Raises Error for a pattern that fits
    none."""
    found: dict[str, Any] = {}
    for pattern, value in table.items():
        names = fitting(pattern, list(layers))
        if not names:
            kept = fitting(pattern, list(whole))
            if kept:
                raise Error(f"{key}: {pattern}: {kept[0]} is not pruned ({whole[kept[0]]})")
            raise Error(f"{key}: {pattern} fits no layer; the layers are {_listed(list(layers))}")
        for name in names:
            found.setdefault(name, value)
    return found


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - LISTED} more" if len(names) > LISTED else ""
    return ", ".join(names[:LISTED]) + more
