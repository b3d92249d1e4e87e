"""What a study found: its rows (fpgm.study.tables) summed up by pair and by criterion."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

Row = dict[str, Any]
Study = Mapping[str, Any]
SURE = 3.0  # standard deviations from its null at which a pair is called above or below it
SEEN = 0.01  # in a correlation: a smaller difference is not worth a word, however sure


def pairs(study: Study) -> list[Row]:
    """A row for each pair of criteria: its mean over layers beside its null, and over the network.

    z: how far the mean lies from its null, in standard deviations; relation: see below. Of layers
    that follow the null 2.5 % lie above its interval.
    """
    shapes = {row["layer"]: row["shape"] for row in study["layers"]}
    rows = []
    for (a, b), found in grouped(study["similarity"], "a", "b").items():
        layers = [row for row in found if row["scope"] == "layer" and row["spearman"] is not None]
        over = next((row for row in found if row["scope"] == "global"), None)
        least = min(layers, key=lambda row: row["spearman"], default=None)
        mean_, null = (mean(row[key] for row in layers) for key in ("spearman", "spearman_null"))
        z, z_over = distance(layers, shapes), distance([over] if over else [], {"": ""})
        one, one_null = (over[k] if over else None for k in ("spearman", "spearman_null"))
        rows.append(
            {
                "a": a, "b": b, "null": found[0]["null"], "layers": len(layers),
                "spearman": mean_, "spearman_null": null,
                "z": z, "relation": relation(mean_, null, z),
                "layers_above": sum(row["spearman"] > row["spearman_high"] for row in layers),
                "layers_below": sum(row["spearman"] < row["spearman_low"] for row in layers),
                "least": least and least["spearman"], "least_layer": least and least["layer"],
                "kendall": mean(row["kendall"] for row in layers),
                "kendall_null": mean(row["kendall_null"] for row in layers),
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
    known = [row for row in rows if row["z"] is not None]
    if not known:
        return None
    draws = {shapes[row["layer"]]: row["draws"] for row in known}
    counts = Counter(shapes[row["layer"]] for row in known)
    variance = sum(m + (m * m / draws[s] if draws[s] else 0) for s, m in counts.items())
    return float(sum(row["z"] for row in known) / variance**0.5)


def criteria(study: Study) -> list[Row]:
    """A row for each criterion: medians over layers of its spread, and how its choice holds."""
    rows = []
    held = grouped(study["cuts"], "criterion")
    for (name,), found in grouped(study["applicability"], "criterion").items():
        layers = [row for row in found if row["scope"] == "layer"] or found
        cuts = [row for row in held[(name,)] if row["scope"] == layers[0]["scope"]]
        rows.append(
            {
                "criterion": name, "scope": layers[0]["scope"], "rankings": len(layers),
                "cv": median(row["cv"] for row in layers),
                "cv_null": median(row["cv_null"] for row in layers),
                "range_over_mean": median(row["range_over_mean"] for row in layers),
                "tie_rate": mean(row["tie_rate"] for row in layers),
                "gap_over_std": median(row["gap_over_std"] for row in cuts),
                "stability": mean(row["stability"] for row in cuts),
                "perturbed": cuts[0]["perturbed"],
            }
        )  # fmt: skip
    return rows


def relation(correlation: float | None, null: float | None, z: float | None) -> str | None:
    """`above` or `below` its null where |z| > SURE and the difference can be SEEN, else `as`."""
    if correlation is None or null is None or z is None:
        return None
    if abs(correlation - null) < SEEN or abs(z) <= SURE:
        return "as"
    return "above" if z > 0 else "below"


def grouped(rows: Iterable[Row], *keys: str) -> dict[tuple[Any, ...], list[Row]]:
    groups: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        groups.setdefault(tuple(row[key] for key in keys), []).append(row)
    return groups


def mean(values: Iterable[float | None]) -> float | None:
    """Of those that are defined, None where none is."""
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if known else None


def median(values: Iterable[float | None]) -> float | None:
    """Of those that are defined, None where none is."""
    known = [value for value in values if value is not None]
    return float(np.median(known)) if known else None
