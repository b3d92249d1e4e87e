"""The study's numbers as tidy rows: one dictionary for each figure, None where it is undefined.

scope: `layer` or `global` (one ranking over the network; its `layer` is empty). *_null, *_low,
*_high: mean and 95 % interval of the null; `null` names which one, `draws` is from how many
networks, None for chance; z: how many of the null's standard deviations Spearman's rho lies
above it, after Fisher's transformation.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy import stats

from fpgm.selection.ranking import pruned_count
from fpgm.study.statistics.agreement import (
    Array,
    by_chance,
    fisher,
    overlap,
    spearman,
    spread,
    stability,
    tie_order,
    weight_only,
)  # fmt: skip
from fpgm.study.statistics.weights import PARTS

Row = dict[str, Any]
Study = Mapping[str, Any]
GAUSSIAN, CHANCE = "gaussian", "chance"
COLLAPSED = 0.9  # of a layer's filters: from here on little passes through it
FIRST = 8  # filters of a layer that are listed, as in Huang et al.
BESIDE = {  # effects of the assumption, and what Gaussian filters give; these can be divided
    "|mean| / std": ("mean_over_std", "mean_over_std_null"),
    "max / min variance": ("variance_ratio", "variance_ratio_null"),
    "|r| inside a kernel": ("correlation_inside", "correlation_null"),
    "|r| between kernels": ("correlation_between", "correlation_null"),
    "std / mean of norms": ("cv_norms", "cv_null"),
    "std / mean of distances": ("cv_distances", "cv_null"),
}
EFFECTS = (
    "normality_rejected", "excess_kurtosis", "excess_kurtosis_null",
    *dict.fromkeys(key for row in BESIDE.values() for key in row),
)  # fmt: skip
SURE = 3.0  # standard deviations from its null at which a pair is called above or below it
SEEN = 0.01  # in a correlation: a smaller difference is not worth a word, however sure


@dataclass(frozen=True)
class Ranking:
    """The filters of a layer, or of the network, in the order of each criterion.

    where: scope and layer, at the front of every row; names: the criteria; scores and ties (K, N);
    gaussian: the null's figures (see agreement.figures) of the criteria that look at the
    weight alone, from `draws` networks.
    """

    where: Row
    names: Sequence[str]
    rates: tuple[float, ...]
    scores: Array
    ties: Array
    gaussian: Mapping[str, Array]
    draws: int

    @property
    def filters(self) -> int:
        return int(self.scores.shape[1])

    @property
    def plain(self) -> list[str]:
        return weight_only(self.names)

    @property
    def pairs(self) -> list[tuple[tuple[int, str], tuple[int, str]]]:
        return list(itertools.combinations(enumerate(self.names), 2))

    def null(self, a: str, b: str) -> tuple[str, dict[str, Array]]:
        """What stands beside the figures of a pair: Gaussian where both look at the weight alone,
        else chance. Figure -> (3,), (R, 3) of `overlap`, mean and deviation (2,) of `fisher`."""
        if a not in self.plain or b not in self.plain:
            return CHANCE, by_chance(self.filters, self.rates)
        i, j = self.plain.index(a), self.plain.index(b)
        figures = ("spearman", "overlap", "fisher")
        return GAUSSIAN, {key: self.gaussian[key][..., i, j].T for key in figures}


def number(value: Any) -> float | None:
    """A plain number, None for nan."""
    return None if np.isnan(value) else float(value)


def interval(name: str, values: Array) -> Row:
    """(3,) mean, low and high of the null -> three columns."""
    ends = ("null", "low", "high")
    return {f"{name}_{end}": number(value) for end, value in zip(ends, values, strict=True)}


def similarity(r: Ranking) -> list[Row]:
    """A row for each pair of criteria."""
    rho, rows = spearman(r.scores), []
    for (i, a), (j, b) in r.pairs:
        kind, null = r.null(a, b)
        centre, deviation = null["fisher"]
        above = fisher(rho[i, j], r.filters) - centre
        rows.append(
            {
                **r.where, "a": a, "b": b, "filters": r.filters, "null": kind,
                "draws": r.draws if kind == GAUSSIAN else None,
                "spearman": number(rho[i, j]), **interval("spearman", null["spearman"]),
                "z": number(above / deviation if deviation > 0 else np.nan),
            }
        )  # fmt: skip
    return rows


def overlaps(r: Ranking) -> list[Row]:
    """A row for each pair of criteria and rate."""
    shared, rows = overlap(r.scores, r.rates, r.ties), []
    for (i, a), (j, b) in r.pairs:
        kind, null = r.null(a, b)
        rows += [
            {
                **r.where, "a": a, "b": b, "rate": rate, "pruned": pruned_count(r.filters, rate),
                "null": kind, "jaccard": number(shared[k, i, j]),
                **interval("jaccard", null["overlap"][k]),
            }
            for k, rate in enumerate(r.rates)
        ]  # fmt: skip
    return rows


def applicability(r: Ranking) -> list[Row]:
    """A row for each criterion."""
    figures, rows = spread(r.scores), []
    for i, name in enumerate(r.names):
        row: Row = {**r.where, "criterion": name, "filters": r.filters}
        row.update({key: number(values[i]) for key, values in figures.items()})
        null = r.gaussian["cv"][:, r.plain.index(name)] if name in r.plain else np.full(3, np.nan)
        row.update(interval("cv", null))
        rows.append(row)
    return rows


def held(r: Ranking, again: Mapping[str, Array], seed: int) -> list[Row]:
    """A row for each rate and criterion of `again`: (D, N) its scores from other batches."""
    layer, rows = r.where["layer"], []
    for name, others in again.items():
        ties = tie_order([name], layer, (1 + len(others), r.filters), seed)[:, 0]
        shares = stability(r.scores[r.names.index(name)], others, r.rates, ties)
        rows += [
            {"layer": layer, "criterion": name, "rate": rate, "stability": number(share)}
            for rate, share in zip(r.rates, shares, strict=True)
        ]
    return rows


def collapse(
    names: Sequence[str], layers: Sequence[str], shares: Array, rates: Sequence[float]
) -> list[Row]:
    """A row for each criterion and rate of a global ranking. shares: (R, K, L) pruned."""
    return [
        {
            "criterion": name, "rate": rate, "largest_share": float(shares[r, i].max()),
            "layers": int((shares[r, i] >= COLLAPSED).sum()),
            "collapsed": ", ".join(np.array(layers)[shares[r, i] >= COLLAPSED]),
        }
        for i, name in enumerate(names)
        for r, rate in enumerate(rates)
    ]  # fmt: skip


def ranks(layer: str, filters: Sequence[int], scores: Mapping[str, Array]) -> list[Row]:
    """A row for each criterion and live filter of a layer. filters: (n,) their indices in the
    layer; scores: criterion -> (n,); rank: 1 goes first, equal ones share the least."""
    return [
        {"layer": layer, "criterion": name, "filter": filters[i], "score": float(values[i]),
         "rank": int(places[i])}
        for name, values in scores.items()
        for places in [stats.rankdata(values, method="min")]
        for i in np.argsort(filters)
    ]  # fmt: skip


# Summed up, by pair and by criterion.


def pairs(study: Study) -> list[Row]:
    """A row for each pair of criteria: its mean over layers beside its null, and over the network.

    z: how far the mean lies from its null, in standard deviations; relation: see below. Of layers
    that follow the null 2.5 % lie above its interval.
    """
    shapes = {row["layer"]: row["shape"] for row in study["layers"]}
    rows = []
    for (a, b), both in grouped(study["similarity"], "a", "b").items():
        layers = [row for row in both if row["scope"] == "layer" and row["spearman"] is not None]
        over = [row for row in both if row["scope"] == "global"]
        least = min(layers, key=lambda row: row["spearman"], default=None)
        average, null = (mean(row[key] for row in layers) for key in ("spearman", "spearman_null"))
        one, one_null = (over[0][k] if over else None for k in ("spearman", "spearman_null"))
        z, z_over = distance(layers, shapes), distance(over, {"": ""})
        rows.append(
            {
                "a": a, "b": b, "null": both[0]["null"], "layers": len(layers),
                "spearman": average, "spearman_null": null,
                "z": z, "relation": relation(average, null, z),
                "layers_above": sum(row["spearman"] > row["spearman_high"] for row in layers),
                "layers_below": sum(row["spearman"] < row["spearman_low"] for row in layers),
                "least": least and least["spearman"], "least_layer": least and least["layer"],
                "global": one, "global_null": one_null,
                "global_z": z_over, "global_relation": relation(one, one_null, z_over),
            }
        )  # fmt: skip
    return rows


def distance(rows: Sequence[Row], shapes: Mapping[str, str]) -> float | None:
    """How many standard deviations some rankings lie above their null on average.

    Layers of one shape share the draws that their null was estimated from: m of them and D draws
    give the sum of their deviations the variance m + m^2 / D.
    """
    defined = [row for row in rows if row["z"] is not None]
    if not defined:
        return None
    draws = {shapes[row["layer"]]: row["draws"] for row in defined}
    counts = Counter(shapes[row["layer"]] for row in defined)
    variance = sum(m + (m * m / draws[s] if draws[s] else 0) for s, m in counts.items())
    return float(sum(row["z"] for row in defined) / variance**0.5)


def relation(correlation: float | None, null: float | None, z: float | None) -> str | None:
    """`above` or `below` its null where |z| > SURE and the difference can be SEEN, else `as`."""
    if correlation is None or null is None or z is None:
        return None
    if abs(correlation - null) < SEEN or abs(z) <= SURE:
        return "as"
    return "above" if z > 0 else "below"


def criteria(study: Study) -> list[Row]:
    """A row for each criterion: medians over layers of its spread, and how its choice holds."""
    rows = []
    held = grouped(study["stability"], "criterion")
    for (name,), every in grouped(study["applicability"], "criterion").items():
        rankings = [row for row in every if row["scope"] == "layer"] or every
        scope = rankings[0]["scope"]
        rows.append(
            {
                "criterion": name, "scope": scope, "rankings": len(rankings),
                "cv": median(row["cv"] for row in rankings),
                "cv_null": median(row["cv_null"] for row in rankings),
                "tie_rate": mean(row["tie_rate"] for row in rankings),
                "stability": mean(row["stability"] for row in held.get((name,), ())),
            }
        )  # fmt: skip
    return rows


def first(study: Study) -> tuple[str, dict[str, list[int]]]:
    """The middle layer, and of each criterion the filters of it that go first."""
    layer = study["layers"][len(study["layers"]) // 2]["layer"]
    rows = sorted((r for r in study["ranks"] if r["layer"] == layer), key=lambda r: r["rank"])
    by = grouped(rows, "criterion")
    return layer, {name: [r["filter"] for r in of[:FIRST]] for (name,), of in by.items()}


# Several networks.


def shared_pairs(studies: Sequence[Study]) -> list[tuple[str, str]]:
    """Pairs of criteria of the weights alone that were compared in every network."""
    compared = [
        {(row["a"], row["b"]) for row in study["pairs"]
         if row["null"] == GAUSSIAN and row["spearman"] is not None}
        for study in studies
    ]  # fmt: skip
    return sorted(set.intersection(*compared))


def networks(studies: Sequence[Study]) -> list[Row]:
    """A row for each network: how many layers fail each part of the assumption, effects as medians
    over its layers, and how far the criteria agree that all networks have."""
    shared, rows = shared_pairs(studies), []
    for study in studies:
        tested, pairs = study["assumption"], study["pairs"]
        of = [row for row in pairs if (row["a"], row["b"]) in shared]
        rows.append(
            {
                "network": study["network"], "layers": len(study["layers"]),
                "filters": sum(row["live"] for row in study["layers"]), "tested": len(tested),
                **{f"fail_{part}": sum(part in row["failed"].split(", ") for row in tested)
                   for part in PARTS},
                **{key: median(row[key] for row in tested) for key in EFFECTS},
                "pairs": len(of), "spearman": mean(row["spearman"] for row in of),
                "spearman_null": mean(row["spearman_null"] for row in of),
                "least": min((row["least"] for row in of), default=None),
                "suits_norm": sum(row["suits_norm"] for row in study["diagnosis"]),
            }
        )  # fmt: skip
    return rows


def grouped(rows: Iterable[Row], *keys: str) -> dict[tuple[Any, ...], list[Row]]:
    groups: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        groups.setdefault(tuple(row[key] for key in keys), []).append(row)
    return groups


def mean(values: Iterable[float | None]) -> float | None:
    """Of those that are defined, None where none is."""
    defined = [value for value in values if value is not None]
    return float(np.mean(defined)) if defined else None


def median(values: Iterable[float | None]) -> float | None:
    """Of those that are defined, None where none is."""
    defined = [value for value in values if value is not None]
    return float(np.median(defined)) if defined else None
