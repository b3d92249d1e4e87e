"""study.html: what a study found, from its plain data, each word explained where it stands.

matplotlib is imported when something is drawn.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jinja2 import Environment, FileSystemLoader
from markupsafe import Markup

from fpgm.page import COLOURS, Line, bullets, curves, figure, page, table, text
from fpgm.study.tables import CHANCE, GAUSSIAN, Row, Study, grouped, mean

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MOST_LINES = 8  # in one drawing: those furthest from 0
MOST_PANELS = 24  # of densities in one figure
RUG = 200  # ticks at most under one density: evenly spaced among the sorted norms
RELATIONS = {"above": "above its null", "as": "like its null", "below": "below its null"}


def html(study: Study) -> str:
    """The page."""
    sections = {
        "In ten lines": [bullets(study["summary"])],
        "Similarity": _similarity(study),
        "Pruned sets": _overlap(study),
        "Applicability": _applicability(study),
        "One ranking": _collapse(study),
        "Weights": _weights(study),
        "Norms": _norms(study),
        "Densities": _densities(study),
        "Settings": [
            table(("setting", "value"), ((k, _plain(v)) for k, v in study["settings"].items())),
            text("Every figure of this page and more: study.json and the CSV files beside it."),
        ],
    }
    template = Environment(loader=FileSystemLoader(Path(__file__).parent), autoescape=True)
    zero = sum(row["zero"] for row in study["layers"])
    terms = {"s": study["settings"], "zero": zero, "rug": RUG}
    explained = vars(template.get_template("explained.html").make_module(terms))
    return page(
        f"Study of {study['network']}",
        "Which pruning criterion? Whether criteria rank this network's filters alike, whether "
        "their scores tell filters apart, and why.",
        [
            (name, [explained.get(name.replace(" ", "_"), Markup("")), *parts])
            for name, parts in sections.items()
            if parts
        ],
    )


def _similarity(study: Study) -> list[Markup]:
    pairs, names = study["pairs"], study["settings"]["criteria"]
    if not pairs:
        return [text("One criterion alone: nothing to compare.")]
    parts = [
        figure(
            heatmaps(pairs, names), "Spearman of every pair of criteria, each beside its null."
        ),
        table(
            ("pair", "null is", "layers", "null", "z", "relation", "layers above", "below",
             "least", "in", "Kendall tau-b", "null", "network", "null", "relation"),
            ((f"{r['a']}, {r['b']}", r["null"], _digits(r["spearman"]),
              _digits(r["spearman_null"]), _digits(r["z"], 1), RELATIONS.get(r["relation"]),
              r["layers_above"], r["layers_below"], _digits(r["least"]), r["least_layer"],
              _digits(r["kendall"]), _digits(r["kendall_null"]), _digits(r["global"]),
              _digits(r["global_null"]), RELATIONS.get(r["global_relation"])) for r in pairs),
        ),
    ]  # fmt: skip
    lines = _over_depth(study, "similarity", lambda row: row["spearman"], "a", "b")
    for kind, which in (
        (GAUSSIAN, "pairs of criteria that look at the weight alone."),
        (CHANCE, f"pairs with another criterion, {MOST_LINES} at most."),
    ):
        of_kind = [f"{row['a']}, {row['b']}" for row in pairs if row["null"] == kind]
        some = sorted(
            (pair for pair in of_kind if pair in lines),
            key=lambda pair: -abs(mean(value for _, value in lines[pair]) or 0),
        )[:MOST_LINES]
        if some:
            drawing = _curves({pair: lines[pair] for pair in some}, "Spearman")
            parts.append(figure(drawing, f"Spearman over depth, {which}"))
    return parts


def _overlap(study: Study) -> list[Markup]:
    rates, rows = study["settings"]["rates"], []
    for (scope, a, b), of_pair in grouped(study["overlap"], "scope", "a", "b").items():
        cells: list[Any] = [f"{a}, {b}", "network" if scope == "global" else "layers"]
        by_rate = grouped(of_pair, "rate")
        for rate in rates:
            value = mean(r["jaccard"] for r in by_rate[(rate,)])
            null = mean(r["jaccard_null"] for r in by_rate[(rate,)])
            defined = value is not None and null is not None
            cells.append((value, f"{value:.2f} ({null:.2f})") if defined else None)
        rows.append(cells)
    if not rows:
        return []
    return [table(("pair", "ranking", *(f"{100 * rate:g} %" for rate in rates)), rows)]


def _applicability(study: Study) -> list[Markup]:
    parts = [
        table(
            ("criterion", "std / mean", "null", "range / mean", "ties", "gap at the cut",
             "stability", "perturbed"),
            ((r["criterion"], r["cv"], r["cv_null"], r["range_over_mean"], r["tie_rate"],
              r["gap_over_std"], _digits(r["stability"]), r["perturbed"])
             for r in study["criteria"]),
        ),
    ]  # fmt: skip
    spreads = _over_depth(study, "applicability", lambda row: row["cv"], "criterion")
    held = _over_depth(study, "cuts", lambda row: row["stability"], "criterion")
    if spreads:
        drawing = _curves(spreads, "std / mean of the scores", log=True)
        parts.append(figure(drawing, "Spread of the scores over depth."))
        caption = "Stability of the pruned set over depth, mean of the rates."
        parts.append(figure(_curves(held, "Jaccard"), caption))
    return parts


def _collapse(study: Study) -> list[Markup]:
    if not study["collapse"]:
        return []
    rates, how = study["settings"]["rates"], study["settings"]["normalise"]
    rows = [
        (name, each,
         *(sum(r["collapsed"] for r in losses if r["rate"] == rate) for rate in rates))
        for (name, each), losses in grouped(study["collapse"], "criterion", "normalise").items()
    ]  # fmt: skip
    rate = min(rates, key=lambda r: abs(r - 0.5))
    shown = [r for r in study["collapse"] if r["rate"] == rate and r["normalise"] == how]
    depths = _depths(study)
    lines = {
        name: [(depths[r["layer"]], 100 * r["share_pruned"]) for r in losses]
        for (name,), losses in grouped(shown, "criterion").items()
    }
    return [
        table(("criterion", "normalised", *(f"{100 * rate:g} %" for rate in rates)), rows),
        figure(
            _curves(lines, "% of the layer pruned"),
            f"Share of each layer that goes at {100 * rate:g} % (normalise={how}).",
        ),
    ]


def _weights(study: Study) -> list[Markup]:
    rows = study["distribution"]
    columns = {
        "layer": "layer", "verdict": "verdict", "weights": "weights", "p": "p",
        "anderson": "A\u00b2", "skew": "skew", "excess_kurtosis": "excess kurtosis", "ks": "KS",
        "mean_over_std": "|mean| / std", "variance_cv": "variances", "variance_cv_iid": "iid",
        "correlation_inside": "|r| inside a kernel", "correlation_between": "|r| between",
        "correlation_iid": "iid", "cosine": "|cosine|", "cosine_iid": "iid",
    }  # fmt: skip
    effects = {"skew": "skew", "excess kurtosis": "excess_kurtosis"}
    correlations = {
        "inside a kernel": "correlation_inside", "between kernels": "correlation_between",
        "iid": "correlation_iid", "cosine of filters": "cosine", "cosine, iid": "cosine_iid",
    }  # fmt: skip
    return [
        _table(rows, columns, lambda row: row["verdict"] != "gaussian"),
        figure(
            _curves(_columns(study, "distribution", effects), "effect"),
            "Skew and excess kurtosis over depth, both 0 for a Gaussian.",
        ),
        figure(
            _curves(_columns(study, "distribution", correlations), "mean size"),
            "Correlations over depth.",
        ),
    ]


def _norms(study: Study) -> list[Markup]:
    rows = study["diagnosis"]
    columns = {
        "layer": "layer", "verdict": "verdict", "live": "live", "zero": "zero", "min": "min",
        "median": "median", "max": "max", "cv": "std / mean", "cv_iid": "iid",
        "min_over_median": "min / median",
    }  # fmt: skip
    lines = {"std / mean": "cv", "iid": "cv_iid", "min / median": "min_over_median"}
    drawing = _curves(
        _columns(study, "diagnosis", lines), "L2 norms", log=all(r["min"] > 0 for r in rows)
    )
    return [
        _table(rows, columns, lambda row: row["verdict"] == "suits a norm"),
        figure(drawing, "Deviation and smallest norm over depth."),
    ]


def _densities(study: Study) -> list[Markup]:
    parts = []
    for start in range(0, len(study["norms"]), MOST_PANELS):
        part = study["norms"][start : start + MOST_PANELS]
        parts.append(figure(densities(part), f"Norms, {part[0]['layer']} to {part[-1]['layer']}."))
    return parts


def _table(
    rows: Sequence[Row], columns: Mapping[str, str], marked: Callable[[Row], bool]
) -> Markup:
    """columns: key -> heading."""
    cells = ([row[key] for key in columns] for row in rows)
    return table(list(columns.values()), cells, [i for i, r in enumerate(rows) if marked(r)])


def _depths(study: Study) -> dict[str, int]:
    """Layer -> its place in the order of execution."""
    return {row["layer"]: row["depth"] for row in study["layers"]}


def _columns(study: Study, name: str, keys: Mapping[str, str]) -> dict[str, Line]:
    """A line over depth for each column of a table with a row for each layer."""
    depths = _depths(study)
    return {
        label: [(depths[row["layer"]], row[key]) for row in study[name]]
        for label, key in keys.items()
    }


def _over_depth(
    study: Study, name: str, value: Callable[[Row], float | None], *keys: str
) -> dict[str, Line]:
    """A line over depth for each pair or criterion of a table: means of a layer's rows."""
    depths = _depths(study)
    rows = [row for row in study[name] if row["scope"] == "layer"]
    return {
        ", ".join(which): [
            (depths[layer], mean(map(value, of_layer)))
            for (layer,), of_layer in grouped(group, "layer").items()
        ]
        for which, group in grouped(rows, *keys).items()
    }


def _curves(lines: Mapping[str, Line], label: str, log: bool = False) -> Figure:
    return curves(lines, "layer, in the order of execution", label, log=log)


def heatmaps(pairs: Sequence[Row], names: Sequence[str]) -> Figure:
    """Spearman of every pair of criteria and of its null, one matrix each, on one scale -1..1."""
    from matplotlib.figure import Figure

    titles = {
        "spearman": "mean of the layers", "spearman_null": "their null",
        "global": "one ranking over the network", "global_null": "its null",
    }  # fmt: skip
    shown = [key for key in titles if any(row[key] is not None for row in pairs)]
    size, lines = 0.62 * len(names) + 1.2, -(-len(shown) // 2)
    drawing = Figure(figsize=(2 * size, lines * size), layout="constrained")
    for index, key in enumerate(shown):
        axes = drawing.add_subplot(lines, 2, index + 1)
        axes.set_title(titles[key], fontsize=10)
        values = {frozenset((row["a"], row["b"])): row[key] for row in pairs}
        values |= {frozenset((name,)): 1.0 for name in names}
        grid = [[_or_nan(values.get(frozenset((a, b)))) for b in names] for a in names]
        image = axes.imshow(grid, vmin=-1, vmax=1, cmap="RdBu_r")
        for i, row in enumerate(grid):
            for j, value in enumerate(row):
                label = "" if value != value else f"{value:.2f}"
                colour = "white" if abs(value) > 0.6 else "black"
                axes.text(j, i, label, ha="center", va="center", fontsize=8, color=colour)
        axes.set_xticks(range(len(names)), names, rotation=45, ha="right", fontsize=8)
        axes.set_yticks(range(len(names)), names, fontsize=8)
    drawing.colorbar(image, ax=drawing.axes, shrink=0.6, label="Spearman")
    return drawing


def densities(entries: Sequence[Row]) -> Figure:
    """The norms of each layer's live filters: kernel density, and a tick for each filter below."""
    from matplotlib.figure import Figure

    columns = min(4, len(entries))
    lines = -(-len(entries) // columns)
    drawing = Figure(figsize=(2.5 * columns, 1.7 * lines), layout="constrained")
    for index, entry in enumerate(entries):
        axes = drawing.add_subplot(lines, columns, index + 1)
        axes.plot(entry["linear"]["x"], entry["linear"]["y"], color=COLOURS[0], linewidth=1)
        norms = entry["norms"]
        step = max(len(norms) / RUG, 1.0)
        ticks = [norms[int(i * step)] for i in range(int(len(norms) / step))]
        axes.plot(ticks, [0.0] * len(ticks), "|", color=COLOURS[1], markersize=6, alpha=0.6)
        axes.set_xlim(left=0)
        axes.set_title(entry["layer"], fontsize=7)
        axes.tick_params(labelsize=6)
        axes.set_yticks([])
    return drawing


def _or_nan(value: float | None) -> float:
    return float("nan") if value is None else value


def _plain(value: Any) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)


def _digits(value: float | None, digits: int = 2) -> tuple[float, str] | None:
    return None if value is None else (value, f"{value:.{digits}f}")
