"""A study in ten lines of words, from its plain data alone."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence

from fpgm.study.statistics.tables import (
    BESIDE,
    CHANCE,
    COLLAPSED,
    EFFECTS,
    GAUSSIAN,
    Row,
    Study,
    grouped,
    mean,
    median,
    shared_pairs,
)  # fmt: skip
from fpgm.study.statistics.weights import PARTS

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
        _overlap(study),
        *_similarity(study["pairs"]),
        _over_network(study["pairs"]),
        _applicability(study["criteria"]),
        _collapse(study),
        _assumption(study["assumption"], study["settings"]["alpha"]),
        _diagnosis(study["diagnosis"]),
        "Left out: " + ("; ".join([*reasons, *study["notes"]]) or "nothing") + ".",
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
        return "Over the network: no pair compared."
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
    """The answer: how much of what is pruned depends on the criterion."""
    rate = min(study["settings"]["rates"], key=lambda r: abs(r - 0.4))
    rows = [r for r in study["overlap"] if r["rate"] == rate and r["scope"] == "layer"]
    parts = []
    for kind, words in ((GAUSSIAN, "of the weights alone"), (CHANCE, "one that sees more")):
        of = [row for row in rows if row["null"] == kind and row["jaccard"] is not None]
        pairs = grouped(of, "a", "b")
        by = {"-".join(pair): mean(r["jaccard"] for r in each) or 0 for pair, each in pairs.items()}
        if by:
            least, most = min(by, key=by.__getitem__), max(by, key=by.__getitem__)
            parts.append(
                f"{words} {mean(by.values()):.2f} (null {mean(r['jaccard_null'] for r in of):.2f}; "
                f"{least} {by[least]:.2f} to {most} {by[most]:.2f})"
            )
    if not parts:
        return f"In short: no pair of criteria compared at {100 * rate:g} %."
    return (
        f"In short: the sets that two criteria prune at {100 * rate:g} % overlap (Jaccard, 1 where "
        f"they are the same) by, {', '.join(parts)}."
    )


def _applicability(rows: Sequence[Row]) -> str:
    parts = [
        f"{r['criterion']} {100 * r['cv']:.1f} %"
        + ("" if r["cv_null"] is None else f" (null {100 * r['cv_null']:.1f})")
        for r in sorted((r for r in rows if r["cv"] is not None), key=lambda r: r["cv"])
    ]
    held = [f"{r['criterion']} {r['stability']:.2f}" for r in rows if r["stability"] is not None]
    return f"Spread of the scores, median std / mean: {', '.join(parts) or 'none'}." + (
        f" What is pruned is the same from other batches (Jaccard) by: {', '.join(held)}."
        if held
        else ""
    )


def _collapse(study: Study) -> str:
    how, rows = study["settings"]["normalise"], study["collapse"]
    if not rows:
        return "Layer collapse: no ranking over the network."
    alike: dict[tuple[float, str] | None, list[str]] = {}
    for (name,), of_criterion in grouped(rows, "criterion").items():
        least = min((r for r in of_criterion if r["layers"]), key=lambda r: r["rate"], default=None)
        first = (least["rate"], least["collapsed"]) if least else None
        alike.setdefault(first, []).append(name)
    text = [
        f"{', '.join(names)}: "
        + (f"from {100 * first[0]:g} % on {_some(first[1].split(', '))}" if first else "none")
        for first, names in alike.items()
    ]
    limit = f"{100 * COLLAPSED:g} %"
    return f"Layers that lose {limit} in one ranking (normalise={how}): {'; '.join(text)}."


def _assumption(rows: Sequence[Row], alpha: float) -> str:
    """How many layers fail each part of the assumption, and the effects beside the null."""
    if not rows:
        return "The assumption of Gaussian filters: no layer can be tested."
    failed = Counter(part for row in rows for part in row["failed"].split(", "))
    counts = ", ".join(f"{part} in {failed[part]}" for part in PARTS)
    middle = {key: median(row[key] for row in rows) for key in EFFECTS}
    effects = [
        f"{words} {middle[key]:.2g} ({middle[null]:.2g})"
        for words, (key, null) in BESIDE.items()
        if middle[key] is not None
    ]
    return (
        f"The assumption of Gaussian filters fails, of {len(rows)} layers, by {counts} ("
        f"{alpha * len(rows):.2g} of each by chance). Medians (and of Gaussian filters): excess "
        f"kurtosis {middle['excess_kurtosis']:.2g} (0), {', '.join(effects)}."
    )


def _diagnosis(rows: Sequence[Row]) -> str:
    counts = Counter(row["verdict"] for row in rows)
    suits = counts.pop("suits a norm", 0)
    others = "; " + ", ".join(f"{verdict} in {count}" for verdict, count in counts.most_common())
    return f"FPGM's diagnosis: a norm criterion suits {suits} of {len(rows)} layers" + (
        f"{others if counts else ''}."
    )


def several(rows: Sequence[Row], studies: Sequence[Study]) -> list[str]:
    """A line for each of several networks, from its row (fpgm.study.statistics.tables.networks)."""
    lines = []
    for row in rows:
        failed = ", ".join(f"{part} in {row[f'fail_{part}']}" for part in PARTS)
        agree = (
            f"; the {row['pairs']} pairs of criteria that all share agree by {row['spearman']:.2f} "
            f"(null {row['spearman_null']:.2f})"
        ) if row["pairs"] else ""  # fmt: skip
        lines.append(
            f"{row['network']}: of {row['tested']} layers the assumption fails by {failed}"
            f"{agree}; a norm criterion suits {row['suits_norm']} of {row['layers']}."
        )
    if not shared_pairs(studies):
        by = [f"{s['network']}: {', '.join(s['settings']['criteria'])}" for s in studies]
        lines.append(
            f"No two criteria of the weights were compared in all networks ({'; '.join(by)}), so "
            "how far they agree is left out."
        )
    return lines


def _some(names: Iterable[str], most: int = 3) -> str:
    names = list(names)
    more = len(names) - most
    return ", ".join(names[:most]) + (f" and {more} more" if more > 0 else "")
