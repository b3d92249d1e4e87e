"""The study's numbers as tidy rows: one dictionary for each figure, None where it is undefined.

scope: `layer` or `global` (one ranking over the network; its `layer` is empty). *_null, *_low,
*_high: mean and 95 % interval of the null; `null` names which one, `draws` is from how many
networks, None for chance; z: how many of the null's standard deviations Spearman's rho lies
above it, after Fisher's transformation.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from fpgm.criteria import tie_rate
from fpgm.selection.ranking import pruned_count
from fpgm.study.agreement import Array, fisher, kendall, overlap, spearman
from fpgm.study.applicability import gaps, spread, stability

Row = dict[str, Any]
Where = Mapping[str, Any]  # scope and layer, at the front of every row
GAUSSIAN, CHANCE = "gaussian", "chance"


def number(value: Any) -> float | None:
    """A plain number, None for nan."""
    return None if np.isnan(value) else float(value)


def interval(name: str, values: Array) -> Row:
    """(3,) mean, low and high of the null -> three columns."""
    ends = ("null", "low", "high")
    return {f"{name}_{end}": number(value) for end, value in zip(ends, values, strict=True)}


class Nulls:
    """What stands beside the figures of one set of filters: Gaussian where both criteria look at
    the weight alone (names, figures of fpgm.study.gaussian_null), else chance."""

    def __init__(
        self, names: Sequence[str], gaussian: Mapping[str, Array], draws: int, chance: Where
    ) -> None:
        self._place = {name: i for i, name in enumerate(names)}
        self._gaussian, self._chance = gaussian, chance

        self.draws = draws

    def kind(self, a: str, b: str) -> str:
        return GAUSSIAN if a in self._place and b in self._place else CHANCE

    def of(self, figure: str, a: str, b: str) -> Array:
        """(3,), (R, 3) of `overlap`, mean and deviation (2,) of `fisher`."""
        if self.kind(a, b) == CHANCE:
            chance: Array = self._chance[figure]
            return chance
        found: Array = self._gaussian[figure][..., self._place[a], self._place[b]]
        return found.T


def similarity(where: Where, names: Sequence[str], scores: Array, nulls: Nulls) -> list[Row]:
    """A row for each pair of criteria. scores: (K, N)."""
    rho, tau = spearman(scores), kendall(scores)
    ties = tie_rate(torch.from_numpy(scores)).numpy()
    rows = []
    for (i, a), (j, b) in itertools.combinations(enumerate(names), 2):
        kind = nulls.kind(a, b)
        centre, deviation = nulls.of("fisher", a, b)
        transformed = fisher(rho[i, j], scores.shape[1])
        rows.append(
            {
                **where, "a": a, "b": b, "filters": scores.shape[1], "null": kind,
                "draws": nulls.draws if kind == GAUSSIAN else None,
                "spearman": number(rho[i, j]), **interval("spearman", nulls.of("spearman", a, b)),
                "z": number((transformed - centre) / deviation if deviation > 0 else np.nan),
                "kendall": number(tau[i, j]), **interval("kendall", nulls.of("kendall", a, b)),
                "tie_rate_a": number(ties[i]), "tie_rate_b": number(ties[j]),
            }
        )  # fmt: skip
    return rows


def overlaps(
    where: Where,
    names: Sequence[str],
    scores: Array,
    nulls: Nulls,
    rates: Sequence[float],
    ties: Array,
) -> list[Row]:
    """A row for each pair of criteria and rate. scores, ties: (K, N)."""
    found = overlap(scores, rates, ties)
    rows = []
    for (i, a), (j, b) in itertools.combinations(enumerate(names), 2):
        expected = nulls.of("overlap", a, b)
        for r, rate in enumerate(rates):
            rows.append(
                {
                    **where, "a": a, "b": b, "rate": rate,
                    "pruned": pruned_count(scores.shape[1], rate), "null": nulls.kind(a, b),
                    "jaccard": number(found[r, i, j]), **interval("jaccard", expected[r]),
                }
            )  # fmt: skip
    return rows


def applicability(
    where: Where, names: Sequence[str], scores: Array, known: Sequence[str], null: Where
) -> list[Row]:
    """A row for each criterion. scores: (K, N); known, null: the criteria that have a Gaussian
    null, and `cv` and `range_over_mean` of it, (3, K')."""
    found = spread(scores)
    rows = []
    for i, name in enumerate(names):
        row: Row = {**where, "criterion": name, "filters": scores.shape[1]}
        row.update({key: number(values[i]) for key, values in found.items()})
        for key in ("cv", "range_over_mean"):
            empty = np.full(3, np.nan)
            row.update(interval(key, null[key][:, known.index(name)] if name in known else empty))
        rows.append(row)
    return rows


def cuts(
    where: Where,
    names: Sequence[str],
    scores: Array,
    again: Array,
    rates: Sequence[float],
    ties: Array,
    perturbed: Mapping[str, str],
) -> list[Row]:
    """A row for each criterion and rate. scores (K, N), again (D, K, N), ties (1 + D, K, N);
    perturbed: criterion -> what the stability is against."""
    gap, held = gaps(scores, rates), stability(scores, again, rates, ties)
    return [
        {
            **where, "criterion": name, "rate": rate,
            "pruned": pruned_count(scores.shape[1], rate), "gap_over_std": number(gap[r, i]),
            "stability": number(held[r, i]), "perturbed": perturbed[name],
        }
        for i, name in enumerate(names)
        for r, rate in enumerate(rates)
    ]  # fmt: skip


def collapse(
    names: Sequence[str],
    normalise: str,
    layers: Sequence[str],
    filters: Sequence[int],
    shares: Array,
    rates: Sequence[float],
    limit: float,
) -> list[Row]:
    """A row for each criterion, rate and layer of a global ranking. shares: (R, K, L) pruned."""
    return [
        {
            "criterion": name, "normalise": normalise, "rate": rate, "layer": layer,
            "filters": filters[k], "share_pruned": float(shares[r, i, k]),
            "collapsed": bool(shares[r, i, k] >= limit),
        }
        for i, name in enumerate(names)
        for r, rate in enumerate(rates)
        for k, layer in enumerate(layers)
    ]  # fmt: skip
