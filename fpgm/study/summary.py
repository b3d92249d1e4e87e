"""A study in ten lines of words, from its plain data alone."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

from fpgm.study.tables import CHANCE, GAUSSIAN, Row, Study, grouped, mean

RELATIONS = {
    "above": "more alike than their null",
    "as": "as alike as their null",
    "below": "less alike than their null",
}


def lines(study: Study) -> list[str]:
    """Ten lines in words. study: with the tables `pairs` and `criteria`."""
    layers = study["layers"]
    zero = sum(row["zero"] for row in layers)
    filters = sum(row["live"] for row in layers)
    reasons = [
        f"{_some([row['layer'] for row in rows])} ({reason})"
        for (reason,), rows in grouped(study["left_out"], "reason").items()
    ]
    return [
        f"Network: {study['network']}; {len(layers)} layers, {filters:,} filters"
        + (f", and {zero:,} that are all zero and counted apart." if zero else "."),
        "Left out: " + ("; ".join([*reasons, *study["notes"]]) or "nothing") + ".",
        *_similarity(study["pairs"]),
        _over_network(study["pairs"]),
        _overlap(study),
        _applicability(study["criteria"]),
        _collapse(study),
        _distribution(study["distribution"]),
        _diagnosis(study["diagnosis"]),
    ]


def _similarity(rows: Sequence[Row]) -> tuple[str, str]:
    """What agrees more than chance alone gives, and where criteria part."""
    compared = [row for row in rows if row["spearman"] is not None]
    if not compared:
        return "Layer by layer: no pair compared.", "Where they part: no pair compared."
    by = grouped(compared, "relation")
    parts = [f"{words} {_pairs(by[(kind,)])}" for kind, words in RELATIONS.items() if (kind,) in by]
    least = min(compared, key=lambda row: row["least"])
    ranges = []
    for (kind,), of_kind in sorted(grouped(compared, "null").items(), reverse=True):
        values = [row["spearman"] for row in of_kind]
        ranges.append(f"{KINDS[kind].format(min(values), max(values))}")
    return (
        "Layer by layer (mean Spearman / null): " + "; ".join(parts) + ".",
        f"Where they part: the least alike are {least['a']} and {least['b']} in "
        f"{least['least_layer']}, {least['least']:.2f}; {', '.join(ranges)}.",
    )


KINDS = {
    GAUSSIAN: "weight-only pairs {:.2f} to {:.2f} on average",
    CHANCE: "pairs with another criterion {:.2f} to {:.2f}",
}


def _pairs(rows: Sequence[Row]) -> str:
    shown = sorted(rows, key=lambda row: -abs(row["spearman"] - row["spearman_null"]))
    return _some(
        [f"{r['a']}-{r['b']} {r['spearman']:.2f} / {r['spearman_null']:.2f}" for r in shown], 4
    )


def _over_network(rows: Sequence[Row]) -> str:
    both = [r for r in rows if r["global"] is not None and r["spearman"] is not None]
    if not both:
        return "Over the network: not asked for beside the layers."
    text = ", ".join(
        f"{r['a']}-{r['b']} {r['global']:.2f} (layers {r['spearman']:.2f}, null "
        f"{r['global_null']:.2f})"
        for r in sorted(both, key=lambda r: -abs(r["global"] - r["spearman"]))[:3]
    )
    change = mean(r["global"] - r["spearman"] for r in both) or 0.0
    word = "as much as" if abs(change) < 0.02 else "less than" if change < 0 else "more than"
    return (
        f"Over the network criteria agree {word} in its layers (mean {change:+.2f}); largest "
        f"changes: {text}."
    )


def _overlap(study: Study) -> str:
    settings = study["settings"]
    rate = min(settings["rates"], key=lambda r: abs(r - 0.4))
    scope = "layer" if "layer" in settings["scopes"] else "global"
    rows = [r for r in study["overlap"] if r["rate"] == rate and r["scope"] == scope]
    texts = {}
    for (a, b), of_pair in grouped(rows, "a", "b").items():
        value = mean(r["jaccard"] for r in of_pair)
        if value is not None:
            null = mean(r["jaccard_null"] for r in of_pair)
            texts[f"{a}-{b} {value:.2f} (null {null:.2f})"] = value
    if not texts:
        return f"Pruned sets at {100 * rate:g} %: no pair compared."
    ends = " and ".join(end(texts, key=texts.__getitem__) for end in (min, max))
    return f"Pruned sets at {100 * rate:g} % overlap (Jaccard) between {ends}."


def _applicability(rows: Sequence[Row]) -> str:
    parts = [
        f"{r['criterion']} {100 * r['cv']:.1f} % "
        + ("(" if r["cv_null"] is None else f"(null {100 * r['cv_null']:.1f}, ")
        + (f"{r['stability']:.2f})" if r["stability"] is not None else "-)")
        for r in sorted((r for r in rows if r["cv"] is not None), key=lambda r: r["cv"])
    ]
    return (
        "Spread of the scores, median std / mean (and mean Jaccard of the choice under a small "
        f"perturbation): {', '.join(parts) or 'none'}."
    )


def _collapse(study: Study) -> str:
    how = study["settings"]["normalise"]
    rows = [r for r in study["collapse"] if r["normalise"] == how]
    if not rows:
        return "Layer collapse: no ranking over the network."
    alike: dict[tuple[Any, ...], list[str]] = {}
    for (name,), of_criterion in grouped(rows, "criterion").items():
        lost = [row for row in of_criterion if row["collapsed"]]
        rate = min((row["rate"] for row in lost), default=None)
        layers = tuple(row["layer"] for row in lost if row["rate"] == rate)
        alike.setdefault((rate, layers), []).append(name)
    text = [
        f"{', '.join(names)}: " + (f"from {100 * rate:g} % on {_some(layers)}" if rate else "none")
        for (rate, layers), names in alike.items()
    ]
    limit = 100 * study["settings"]["collapse"]
    return f"Layers that lose {limit:g} % in one ranking (normalise={how}): {'; '.join(text)}."


def _distribution(rows: Sequence[Row]) -> str:
    odd = [row for row in rows if row["verdict"] == "not gaussian"]
    text = f"Weights look Gaussian in {len(rows) - len(odd)} of {len(rows)} layers"
    if odd:
        worst = max(odd, key=lambda row: abs(row["excess_kurtosis"]))
        text += (
            f"; not in {_some([row['layer'] for row in odd])} (furthest {worst['layer']}, excess "
            f"kurtosis {worst['excess_kurtosis']:.1f}, skew {worst['skew']:.1f})"
        )
    return text + "."


def _diagnosis(rows: Sequence[Row]) -> str:
    counts = Counter(row["verdict"] for row in rows)
    suits = counts.pop("suits a norm", 0)
    others = "; " + ", ".join(f"{verdict} in {count}" for verdict, count in counts.most_common())
    return f"FPGM's diagnosis: a norm criterion suits {suits} of {len(rows)} layers" + (
        f"{others if counts else ''}."
    )


def _some(names: Iterable[str], most: int = 3) -> str:
    names = list(names)
    more = len(names) - most
    return ", ".join(names[:most]) + (f" and {more} more" if more > 0 else "")
