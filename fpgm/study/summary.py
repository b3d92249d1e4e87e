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

KINDS = {  # by the null of a pair: what it is of, and what the null is
    GAUSSIAN: ("of the weights alone", "on Gaussian filters"),
    CHANCE: ("where one sees more", "by chance"),
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
    """What agrees more than its null, and where criteria part."""
    compared = [row for row in rows if row["spearman"] is not None]
    if not compared:
        return "Ranks in layers: no pair compared.", "Where they part: no pair compared."
    by, parts = grouped(compared, "null"), []
    for kind, (words, null) in KINDS.items():
        if of := by.get((kind,)):
            counts = Counter(row["relation"] for row in of)
            average, beside = (
                mean(row[key] for row in of) for key in ("spearman", "spearman_null")
            )
            parts.append(
                f"of {len(of)} pairs {words} {counts['above']} agree more than {null}, "
                f"{counts['below']} less (mean Spearman {average:.2f}, {null} {beside:.2f})"
            )
    parted = [f"{r['a']}-{r['b']} {r['spearman']:.2f}" for r in _by(compared, "spearman")]
    least = _by(compared, "least")[0]
    return (
        f"Ranks in layers: {'; '.join(parts)}.",
        f"Where they part: on average {', '.join(parted[:3])}; in one layer {least['a']}-"
        f"{least['b']} {least['least']:.2f} ({least['least_layer']}).",
    )


def _by(rows: Iterable[Row], key: str) -> list[Row]:
    return sorted((row for row in rows if row[key] is not None), key=lambda row: row[key])


def _over_network(rows: Sequence[Row]) -> str:
    both = [r for r in rows if r["global"] is not None and r["spearman"] is not None]
    if not both:
        return "In one ranking over the network: no pair compared."
    most = max(both, key=lambda r: abs(r["global"] - r["spearman"]))
    change = mean(r["global"] - r["spearman"] for r in both) or 0.0
    word = "as much as" if abs(change) < 0.02 else "less than" if change < 0 else "more than"
    return (
        f"In one ranking over the network they agree {word} in layers (mean {change:+.2f}); most "
        f"apart: {most['a']}-{most['b']} {most['global']:.2f}, in layers {most['spearman']:.2f}."
    )


def _overlap(study: Study) -> str:
    """The answer: how much of what is pruned depends on the criterion."""
    rate = min(study["settings"]["rates"], key=lambda r: abs(r - 0.4))
    rows = [
        row for row in study["overlap"]
        if row["rate"] == rate and row["scope"] == "layer" and row["jaccard"] is not None
    ]  # fmt: skip
    by = {
        "-".join(pair): mean(r["jaccard"] for r in of) or 0.0
        for pair, of in grouped(rows, "a", "b").items()
    }
    if not by:
        return f"Does the criterion matter? No pair compared at {100 * rate:g} %."
    least, most = min(by, key=by.__getitem__), max(by, key=by.__getitem__)
    parts = [
        f"by {mean(r['jaccard'] for r in of):.2f} for two {KINDS[kind][0]} "
        f"({mean(r['jaccard_null'] for r in of):.2f} {KINDS[kind][1]})"
        for (kind,), of in grouped(rows, "null").items()
    ]
    return (
        f"Does the criterion matter? Sets pruned at {100 * rate:g} % overlap (Jaccard, 1: the "
        f"same) {', '.join(parts)}; {most} {by[most]:.2f}, {least} {by[least]:.2f}."
    )


def _applicability(rows: Sequence[Row]) -> str:
    spread = [
        f"{r['criterion']} {100 * r['cv']:.1f} %"
        + ("" if r["cv_null"] is None else f" ({100 * r['cv_null']:.1f} on Gaussian filters)")
        for r in _by(rows, "cv")
    ]
    some = [*spread[:3], f"... {spread[-1]}"] if len(spread) > 4 else spread
    held = _by(rows, "stability")
    return f"Spread of the scores, median std / mean: {', '.join(some) or 'none'}." + (
        f" From other batches the pruned set stays by {held[0]['stability']:.2f} "
        f"({held[0]['criterion']}, Jaccard) to {held[-1]['stability']:.2f}."
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
        f"{_some(names)} from {100 * first[0]:g} % on {_some(first[1].split(', '))}"
        if first
        else f"none by {_some(names)}"
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
        f"kurtosis {middle['excess_kurtosis']:.2g} ({middle['excess_kurtosis_null']:.2g}), "
        f"{', '.join(effects)}."
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
