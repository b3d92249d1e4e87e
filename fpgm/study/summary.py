"""A study in ten lines of words, from its plain data alone."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

from fpgm.study.tables import Row, Study, grouped, mean


def lines(study: Study) -> list[str]:
    """Ten lines in words. study: with the tables `pairs` and `criteria`."""
    layers = study["layers"]
    zero = sum(row["zero"] for row in layers)
    left = study["left_out"]
    filters = sum(row["live"] for row in layers)
    return [
        f"Network: {study['network']}; {len(layers)} layers, {filters:,} filters"
        + (f", and {zero:,} that are all zero and counted apart." if zero else "."),
        "Left out: " + ("; ".join([*_left(left), *study["notes"]]) or "nothing") + ".",
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
    known = [row for row in rows if row["spearman"] is not None]
    if not known:
        return "Layer by layer: no pair compared.", "Where they part: no pair compared."
    by = {kind: [r for r in known if r["relation"] == kind] for kind in RELATIONS}
    parts = [f"{RELATIONS[kind]} {_names(found)}" for kind, found in by.items() if found]
    least = min(known, key=lambda row: row["least"])
    return (
        "Layer by layer (mean Spearman / null): " + "; ".join(parts) + ".",
        f"Where they part: the least alike are {least['a']} and {least['b']} in "
        f"{least['least_layer']}, {least['least']:.2f}; {_least_and_largest(known)}.",
    )


RELATIONS = {
    "above": "more alike than their null",
    "as": "as alike as their null",
    "below": "less alike than their null",
}


def _names(rows: Sequence[Row]) -> str:
    shown = sorted(rows, key=lambda row: -abs(row["spearman"] - row["spearman_null"]))[:4]
    text = ", ".join(
        f"{r['a']}-{r['b']} {r['spearman']:.2f} / {r['spearman_null']:.2f}" for r in shown
    )
    return text + (f" and {len(rows) - 4} more" if len(rows) > 4 else "")


def _least_and_largest(rows: Sequence[Row]) -> str:
    weights = [row["spearman"] for row in rows if row["null"] == "gaussian"]
    data = [row["spearman"] for row in rows if row["null"] == "chance"]
    parts = []
    if weights:
        parts.append(f"weight-only pairs {min(weights):.2f} to {max(weights):.2f} on average")
    if data:
        parts.append(f"pairs with another criterion {min(data):.2f} to {max(data):.2f}")
    return ", ".join(parts)


def _over_network(rows: Sequence[Row]) -> str:
    both = [r for r in rows if r["global"] is not None and r["spearman"] is not None]
    if not both:
        return "Over the network: not asked for beside the layers."
    far = sorted(both, key=lambda r: -abs(r["global"] - r["spearman"]))[:3]
    text = ", ".join(
        f"{r['a']}-{r['b']} {r['global']:.2f} (layers {r['spearman']:.2f}, null "
        f"{r['global_null']:.2f})"
        for r in far
    )
    change = mean(r["global"] - r["spearman"] for r in both) or 0.0
    word = "as much as" if abs(change) < 0.02 else "less than" if change < 0 else "more than"
    return (
        f"Over the network criteria agree {word} in its layers (mean {change:+.2f}); largest "
        f"changes: {text}."
    )


def _overlap(study: Study) -> str:
    rates = study["settings"]["rates"]
    rate = min(rates, key=lambda r: abs(r - 0.4))
    scope = "layer" if "layer" in study["settings"]["scopes"] else "global"
    found = [r for r in study["overlap"] if r["rate"] == rate and r["scope"] == scope]
    means = {
        pair: (mean(r["jaccard"] for r in rows), mean(r["jaccard_null"] for r in rows))
        for pair, rows in grouped(found, "a", "b").items()
    }
    known = sorted(((v, n, p) for p, (v, n) in means.items() if v is not None), key=lambda x: x[0])
    if not known:
        return f"Pruned sets at {100 * rate:g} %: no pair compared."
    texts = [f"{p[0]}-{p[1]} {v:.2f} (null {n:.2f})" for v, n, p in (known[0], known[-1])]
    return f"Pruned sets at {100 * rate:g} % overlap (Jaccard) between {texts[0]} and {texts[-1]}."


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
    for (name,), found in grouped(rows, "criterion").items():
        lost = [row for row in found if row["collapsed"]]
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
    others = ", ".join(f"{verdict} in {count}" for verdict, count in counts.most_common())
    return f"FPGM's diagnosis: a norm criterion suits {suits} of {len(rows)} layers" + (
        f"; {others}." if others else "."
    )


def _left(rows: Sequence[Row]) -> Iterable[str]:
    for (reason,), found in grouped(rows, "reason").items():
        yield f"{_some([row['layer'] for row in found])} ({reason})"


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
