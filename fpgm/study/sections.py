"""study.html: what a study found, from its plain data, each word explained where it stands."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from markupsafe import Markup

from fpgm.page import figure, page, table, text
from fpgm.study import plots as study_plots
from fpgm.study.findings import grouped, mean
from fpgm.study.layers import Section, Study, densities, depths_of, norms, weights

MOST_LINES = 8  # in one drawing: those furthest from 0
RELATIONS = {"above": "above its null", "as": "like its null", "below": "below its null"}


def html(study: Study) -> str:
    """The page."""
    sections: list[Section] = [("In ten lines", [_list(study["summary"])])]
    sections += [_similarity(study), _overlap(study), _applicability(study), _collapse(study)]
    sections += [weights(study), norms(study), densities(study), _details(study)]
    return page(
        f"Study of {study['network']}",
        "Which pruning criterion? Whether criteria rank this network's filters alike, whether "
        "their scores tell filters apart, and why.",
        [section for section in sections if section[1]],
    )


def _list(lines: Iterable[str]) -> Markup:
    items = Markup("").join(Markup("<li>%s</li>") % line for line in lines)
    return Markup("<ul>%s</ul>") % items


def _similarity(study: Study) -> Section:
    pairs, names = study["pairs"], study["settings"]["criteria"]
    if not pairs:
        return "Similarity", [text("One criterion alone: nothing to compare.")]
    asked = [
        (title, key)
        for title, key in (
            ("mean of the layers", "spearman"), ("their null", "spearman_null"),
            ("one ranking over the network", "global"), ("its null", "global_null"),
        )
        if any(row[key] is not None for row in pairs)
    ]  # fmt: skip
    values = [{(row["a"], row["b"]): row[key] for row in pairs} for _, key in asked]
    drawing = study_plots.heatmaps([title for title, _ in asked], values, names)
    zero = sum(row["zero"] for row in study["layers"])
    parts = [
        text(
            "Spearman's rank correlation of two criteria over the same filters; 1: both prune in "
            "the same order. The null beside it is what the same criteria give on iid Gaussian "
            "filters of the same shapes: agreement that comes of what they compute and says "
            "nothing about this network. A criterion that looks at data or BatchNorm has no such "
            "null; two unrelated rankings stand there (0). z: how many of the null's standard "
            "deviations the layers lie above it on average (after Fisher's transformation); "
            "called above or below from 3 on, where two digits show it. Of layers that follow "
            "the null 2.5 % lie above its interval, and 2.5 % below."
            + (f" {zero:,} filters are all zero and left out; those that live were chosen by some "
               "criterion, and over a chosen part rank correlations are lower." if zero else "")
        ),
        figure(drawing, "Spearman of every pair of criteria, each beside its null."),
        table(
            ("pair", "null is", "layers", "null", "z", "relation", "layers above", "below",
             "least", "in", "Kendall tau-b", "null", "network", "null", "relation"),
            ((f"{r['a']}, {r['b']}", r["null"], _two(r["spearman"]), _two(r["spearman_null"]),
              _one(r["z"]), RELATIONS.get(r["relation"]), r["layers_above"], r["layers_below"],
              _two(r["least"]), r["least_layer"], _two(r["kendall"]), _two(r["kendall_null"]),
              _two(r["global"]), _two(r["global_null"]), RELATIONS.get(r["global_relation"]))
             for r in pairs),
        ),
        *_over_depth(study),
    ]  # fmt: skip
    return "Similarity", parts


def _over_depth(study: Study) -> Iterator[Markup]:
    """The similarity of the layers, a line for each pair of criteria."""
    depths = depths_of(study)
    layers = [row for row in study["similarity"] if row["scope"] == "layer"]
    by_pair = grouped(layers, "a", "b").items()
    for title, kind in (("weight alone", "gaussian"), ("others", "chance")):
        series = {
            f"{a}, {b}": [(depths[r["layer"]], r["spearman"]) for r in rows]
            for (a, b), rows in by_pair
            if rows[0]["null"] == kind
        }
        if series:
            size = {p: abs(mean(v for _, v in points) or 0) for p, points in series.items()}
            series = {p: series[p] for p in sorted(series, key=lambda p: -size[p])[:MOST_LINES]}
            caption = f"Spearman over depth, pairs of criteria that look at the {title}."
            if kind == "chance":
                caption = (
                    f"Spearman over depth, pairs with another criterion, {MOST_LINES} at most."
                )
            yield figure(study_plots.over_depth(series, "Spearman"), caption)


def _overlap(study: Study) -> Section:
    rates = study["settings"]["rates"]
    rows = []
    for (scope, a, b), found in grouped(study["overlap"], "scope", "a", "b").items():
        cells: list[Any] = [f"{a}, {b}", "network" if scope == "global" else "layers"]
        for rate in rates:
            own = [r for r in found if r["rate"] == rate]
            value, null = mean(r["jaccard"] for r in own), mean(r["jaccard_null"] for r in own)
            shown = None if value is None or null is None else (value, f"{value:.2f} ({null:.2f})")
            cells.append(shown)
        rows.append(cells)
    if not rows:
        return "Pruned sets", []
    return "Pruned sets", [
        text(
            "Jaccard overlap of the sets of filters that two criteria prune at a rate: filters in "
            "both over filters in either, the mean of the layers; in brackets the null. Filters of "
            "one score go in a random order, each criterion's own."
        ),
        table(("pair", "ranking", *(f"{100 * rate:g} %" for rate in rates)), rows),
    ]


def _applicability(study: Study) -> Section:
    depths = depths_of(study)
    layers = [row for row in study["applicability"] if row["scope"] == "layer"]
    parts = [
        text(
            "A criterion can only be applied where its scores differ. std / mean is the "
            "coefficient of variation of the scores of a layer, median over layers; its null is "
            "that of Gaussian filters. Gap at the cut: the step from the last pruned to the first "
            "kept score in standard deviations, median over layers and rates. Stability: mean "
            "Jaccard overlap of the pruned set with those after a small perturbation, "
            f"{study['settings']['perturbations']} times: noise of "
            f"{study['settings']['noise']:g} standard deviations on the weights or BatchNorm's "
            "scale, or a bootstrap over the batches. Ties: share of filters whose score another "
            "one has, too."
        ),
        table(
            ("criterion", "std / mean", "null", "range / mean", "ties", "gap at the cut",
             "stability", "perturbed"),
            ((r["criterion"], r["cv"], r["cv_null"], r["range_over_mean"], r["tie_rate"],
              r["gap_over_std"], _two(r["stability"]), r["perturbed"])
             for r in study["criteria"]),
        ),
    ]  # fmt: skip
    if layers:
        series = {
            name: [(depths[r["layer"]], r["cv"]) for r in rows]
            for (name,), rows in grouped(layers, "criterion").items()
        }
        drawing = study_plots.over_depth(series, "std / mean of the scores", log=True)
        parts.append(figure(drawing, "Spread of the scores over depth."))
        cuts = grouped((r for r in study["cuts"] if r["scope"] == "layer"), "criterion").items()
        series = {
            name: [
                (depths[layer], mean(r["stability"] for r in own))
                for (layer,), own in grouped(rows, "layer").items()
            ]
            for (name,), rows in cuts
        }
        drawing = study_plots.over_depth(series, "Jaccard")
        parts.append(figure(drawing, "Stability of the pruned set over depth, mean of the rates."))
    return "Applicability", parts


def _collapse(study: Study) -> Section:
    if not study["collapse"]:
        return "One ranking", []
    limit, depths = 100 * study["settings"]["collapse"], depths_of(study)
    rates = study["settings"]["rates"]
    rows = [
        (name, how,
         *(sum(r["collapsed"] for r in found if r["rate"] == rate) for rate in rates))
        for (name, how), found in grouped(study["collapse"], "criterion", "normalise").items()
    ]  # fmt: skip
    rate = min(rates, key=lambda r: abs(r - 0.5))
    how = study["settings"]["normalise"]
    own = [r for r in study["collapse"] if r["rate"] == rate and r["normalise"] == how]
    series = {
        name: [(depths[r["layer"]], 100 * r["share_pruned"]) for r in found]
        for (name,), found in grouped(own, "criterion").items()
    }
    drawing = study_plots.over_depth(series, "% of the layer pruned")
    return "One ranking", [
        text(
            "All filters of the network in one ranking, each layer's scores normalised first: "
            "none, by their mean, their Euclidean norm, or to their rank. Counted are layers that "
            f"would lose {limit:g} % or more of their filters at a rate (layer collapse); "
            "training with scope=global has a floor against it, this ranking has none."
        ),
        table(("criterion", "normalised", *(f"{100 * rate:g} %" for rate in rates)), rows),
        figure(drawing, f"Share of each layer that goes at {100 * rate:g} % (normalise={how})."),
    ]


def _details(study: Study) -> Section:
    settings = study["settings"].items()
    return "Settings", [
        table(("setting", "value"), ((k, _shown(v)) for k, v in settings)),
        text("Every figure of this page and more: study.json and the CSV files beside it."),
    ]


def _shown(value: Any) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)


def _two(value: float | None) -> tuple[float, str] | None:
    return None if value is None else (value, f"{value:.2f}")


def _one(value: float | None) -> tuple[float, str] | None:
    return None if value is None else (value, f"{value:.1f}")
