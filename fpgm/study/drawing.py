"""study.html: what a study found, from its plain data: the answer, three pictures, the tables.

matplotlib is imported when something is drawn.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jinja2 import Environment, FileSystemLoader
from markupsafe import Markup

from fpgm.page import COLOURS, bullets, curves, figure, folded, page, table, text
from fpgm.study.statistics.tables import BESIDE, CHANCE, FIRST, Row, Study, first, grouped, mean

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def html(study: Study) -> str:
    """The page."""
    template = Environment(loader=FileSystemLoader(Path(__file__).parent), autoescape=True)
    zero = sum(row["zero"] for row in study["layers"])
    terms = {"s": study["settings"], "zero": zero, "first": FIRST}
    explained = vars(template.get_template("explained.html").make_module(terms))
    tables = {
        "Similarity": _table(study["pairs"]),
        "Pruned sets": _overlap(study),
        "First filters": _first(study),
        "Applicability": _table(study["criteria"]),
        "One ranking": _table(study["collapse"], "layers"),
        "The assumption": _table(study["assumption"], "failed"),
        "Norms": _table(study["diagnosis"], "suits_norm"),
        "Settings": table(
            ("setting", "value"), ((k, _plain(v)) for k, v in study["settings"].items())
        ),
    }
    shown = [
        folded(name, [explained.get(name.replace(" ", "_"), Markup("")), content])
        for name, content in tables.items()
        if content is not None
    ]
    rest = text("All rows, by layer and rate: study.json and the CSV files beside this page.")
    return page(
        f"Study of {study['network']}",
        "Which pruning criterion? Whether criteria rank this network's filters alike, whether "
        "their scores tell filters apart, and why.",
        (("Answer", [bullets(study["summary"])]), ("Pictures", _pictures(study)),
         ("Tables", [*shown, rest])),
    )  # fmt: skip


def overview(lines: Sequence[str], rows: Sequence[Row], pages: Sequence[str]) -> str:
    """The page of several networks. pages: where each one's own lies."""
    cells = [
        [Markup('<a href="%s">%s</a>') % (where, row["network"]), *list(row.values())[1:]]
        for where, row in zip(pages, rows, strict=True)
    ]
    return page(
        f"Study of {len(rows)} networks",
        "Effects are medians over a network's layers. Spearman: of the pairs of criteria of the "
        "weights alone that all networks share. Each network's own page explains the figures.",
        (("Answer", [bullets(lines)]), ("Networks", [table(headings(rows), cells)])),
    )


def likeness(found: Mapping[str, Any]) -> str:
    """The page of runs that differ in the criterion (fpgm.study.alike.compare)."""
    sections: list[tuple[str, Sequence[Markup]]] = []
    for name, lines in found["lines"].items():
        of = [[r for r in found[key] if r["runs"] == name] for key in ("criteria", "pairs")]
        caption = (
            f"{name}: a dot for each pair of criteria. Left: do similar rankings prune similar "
            "filters? Right: do similar sets end at similar accuracy?"
        )
        tables = [
            folded(words, [table(headings(rows), (list(row.values()) for row in rows))])
            for words, rows in zip(("Criteria", "Pairs"), of, strict=True)
        ]
        sections.append((name, [bullets(lines), figure(_scatters(of[1]), caption), *tables]))
    return page(
        "Do similar rankings give similar pruned networks?",
        "Runs from one baseline that differ in the criterion alone. Spearman: of the rankings, the "
        "mean over layers; Jaccard: overlap of the pruned sets; difference: of top-1 in points.",
        sections,
    )


# Pictures.


def _scatters(pairs: Sequence[Row]) -> Figure:
    from matplotlib.figure import Figure

    drawing = Figure(figsize=(8, 3.4), layout="constrained")
    left, right = drawing.subplots(1, 2)
    for axes, across, up in ((left, "spearman", "jaccard"), (right, "jaccard", "difference")):
        defined = [(r[across], r[up]) for r in pairs if None not in (r[across], r[up])]
        axes.plot([x for x, _ in defined], [abs(y) for _, y in defined], "o", color=COLOURS[0])
        axes.grid(color="#e6e8eb", linewidth=0.8)
        axes.spines[["top", "right"]].set_visible(False)
    left.set(xlabel="Spearman of the rankings", ylabel="overlap of what is pruned")
    right.set(xlabel="overlap of what is pruned", ylabel="|difference| in top-1, points")
    return drawing


def _pictures(study: Study) -> list[Markup]:
    """Three: whether criteria agree, whether filters are Gaussian, whether scores lie apart."""
    pictures = []
    if study["pairs"]:
        drawing = heatmap(study["pairs"], study["settings"]["criteria"])
        pictures.append(
            figure(
                drawing,
                "Do criteria agree? Mean Spearman of the layers: below the diagonal in this "
                "network, above it on Gaussian filters, where both look at the weights alone.",
            )
        )
    if study["assumption"]:
        depths = {row["layer"]: row["depth"] for row in study["layers"]}
        lines = {
            words: [(depths[r["layer"]], r[key] and r[key] / r[null]) for r in study["assumption"]]
            for words, (key, null) in BESIDE.items()
        } | {
            "kurtosis": [
                (depths[r["layer"]], (3 + r["excess_kurtosis"]) / (3 + r["excess_kurtosis_null"]))
                for r in study["assumption"]
            ]
        }
        across = "layer, in the order of execution"
        pictures.append(
            figure(
                curves(lines, across, "times that of Gaussian filters", log=True),
                "Are filters Gaussian? By layer, each effect over what Gaussian filters of its "
                "shape give: 1 where the assumption holds.",
            )
        )
    caption = (
        "Can each criterion tell filters apart? Dots: median std / mean of its scores in a layer; "
        "rings: of Gaussian filters."
    )
    return [*pictures, figure(spreads(study["criteria"]), caption)]


def heatmap(pairs: Sequence[Row], names: Sequence[str]) -> Figure:
    """Spearman of every pair of criteria below the diagonal, and of its null above it."""
    from matplotlib.figure import Figure

    place = {name: index for index, name in enumerate(names)}
    grid = [[1.0 if a == b else float("nan") for a in names] for b in names]
    for row in pairs:
        low, high = sorted((place[row["a"]], place[row["b"]]))
        grid[high][low] = float("nan") if row["spearman"] is None else row["spearman"]
        grid[low][high] = float("nan") if row["null"] == CHANCE else row["spearman_null"]
    size = 0.5 * len(names) + 1.5
    drawing = Figure(figsize=(size + 0.8, size), layout="constrained")
    axes = drawing.add_subplot()
    image = axes.imshow(grid, vmin=-1, vmax=1, cmap="RdBu_r")
    for i, values in enumerate(grid):
        for j, value in enumerate(values):
            label = "" if value != value or i == j else f"{value:.2f}".replace("0.", ".")
            colour = "white" if abs(value) > 0.6 else "black"
            axes.text(j, i, label, ha="center", va="center", color=colour)
    axes.set_xticks(range(len(names)), names, rotation=45, ha="right")
    axes.set_yticks(range(len(names)), names)
    drawing.colorbar(image, ax=axes, shrink=0.6, label="Spearman")
    return drawing


def spreads(criteria: Sequence[Row]) -> Figure:
    """A row for each criterion: how far its scores lie apart, and those of Gaussian filters."""
    from matplotlib.figure import Figure

    rows = sorted((r for r in criteria if r["cv"]), key=lambda row: row["cv"])
    drawing = Figure(figsize=(6, 0.28 * len(rows) + 0.8))
    axes = drawing.add_subplot()
    for at, row in enumerate(rows):
        axes.plot(row["cv"], at, "o", color=COLOURS[0])
        if row["cv_null"]:
            axes.plot(row["cv_null"], at, "o", fillstyle="none", color=COLOURS[1], markersize=9)
    axes.set(xscale="log", xlabel="std / mean of the scores")
    axes.set_yticks(range(len(rows)), [row["criterion"] for row in rows])
    axes.grid(color="#e6e8eb", linewidth=0.8)
    axes.spines[["top", "right"]].set_visible(False)
    return drawing


# Tables.


def _overlap(study: Study) -> Markup | None:
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
    header = ("pair", "ranking", *(f"{100 * rate:g} %" for rate in rates))
    return table(header, rows) if rows else None


def _first(study: Study) -> Markup:
    layer, filters = first(study)
    rows = [(name, ", ".join(map(str, chosen))) for name, chosen in filters.items()]
    return table(("criterion", f"filters of {layer} that go first"), rows)


def _table(rows: Sequence[Row], marked: str = "") -> Markup | None:
    """All columns of some rows. marked: the key of those that stand out."""
    some = [i for i, row in enumerate(rows) if row.get(marked)]
    return table(headings(rows), (list(row.values()) for row in rows), some) if rows else None


def headings(rows: Sequence[Row]) -> list[str]:
    return [key.replace("_", " ") for key in rows[0]]


def _plain(value: Any) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
