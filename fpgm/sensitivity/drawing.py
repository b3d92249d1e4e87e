"""sensitivity.html: the curves of every layer, from what was measured.

matplotlib is imported when something is drawn.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from markupsafe import Markup

from fpgm.page import COLOURS, bullets, figure, page, table, text
from fpgm.sensitivity.curves import Row
from fpgm.sensitivity.examine import Study

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MOST_PANELS = 24  # in one figure
NAMED = 5  # lines of one drawing that bear their layer's name
MODES = {"accuracy_bn": "BatchNorm estimated again", "accuracy": "BatchNorm as it is"}
EXPLAINED = (
    "Each layer is measured by itself, all others are whole. A zeroed filter still sends a "
    "constant, and the BatchNorms behind it have statistics of the whole network: with these "
    "estimated again, what is left of the loss is what the filters are missed for."
)
TOGETHER = (
    "Layers that are decided together lose the same channels together; they go by the name of the "
    "narrowest: "
)


def html(study: Study) -> str:
    """The page."""
    sections = {
        "In short": [bullets(study.summary), text(EXPLAINED), *_together(study)],
        "Rates by layer": _planned(study),
        "All layers": _overview(study),
        "Layer by layer": _panels(study),
        "Table": [
            text("Accuracy in percent with BatchNorm estimated again, by the rate of the layer."),
            _table(study),
            text("Both accuracies of every point: sensitivity.csv."),
        ],
    }
    return page(
        f"Sensitivity of {study.source}",
        "The accuracy without training when one layer alone loses filters, lowest scores first.",
        [(name, parts) for name, parts in sections.items() if parts],
    )


def _together(study: Study) -> list[Markup]:
    several = [", ".join(unit.layers) for unit in study.units if unit.layers[1:]]
    return [text(TOGETHER), bullets(several)] if several else []


def _planned(study: Study) -> list[Markup]:
    if study.plan is None:
        return []
    plan = study.plan
    of = {layer: unit for unit in study.units for layer in unit.layers}
    filters = {name: count for name, count in study.filters.items() if name in plan.pruned}
    rows = [
        (name, filters[name], count, filters[name] - count, _digits(100 * count / filters[name], 1),
         _digits(plan.losses[of[name].name]))
        for name, count in plan.pruned.items()
    ]  # fmt: skip
    header = ("layer", "filters", "go", "stay", "% goes", "points lost alone")
    return [text("As rates.yaml has them."), table(header, rows)]


def _table(study: Study) -> Markup:
    rates = study.settings.rates
    rows = [
        (unit.name, unit.filters, criterion,
         *(_digits(row.accuracy_bn) for row in _curve(study, unit.name, criterion)))
        for unit in study.units
        for criterion in study.settings.criteria
    ]  # fmt: skip
    return table(("layer", "filters", "criterion", "0", *(f"{rate:g}" for rate in rates)), rows)


def _overview(study: Study) -> list[Markup]:
    parts = []
    for criterion in study.settings.criteria:
        parts.append(
            figure(
                overview(study, criterion),
                f"A line for each layer, filters zeroed by {criterion}; named are the {NAMED} that "
                "lose most, the others are grey. Each drawing has its own scale.",
            )
        )
        parts.append(
            figure(
                losses(study, criterion),
                f"Points of accuracy lost by {criterion}, BatchNorm estimated again; the layers "
                "from left to right in the order of execution.",
            )
        )
    return parts


def _panels(study: Study) -> list[Markup]:
    names = [unit.name for unit in study.units]
    parts = []
    for start in range(0, len(names), MOST_PANELS):
        some = names[start : start + MOST_PANELS]
        caption = (
            f"{some[0]} to {some[-1]}, with the number of filters: solid with BatchNorm estimated "
            "again, dashed as it is."
        )
        parts.append(figure(panels(study, some), caption))
    return parts


def overview(study: Study, criterion: str) -> Figure:
    """A line for each layer, those that lose most in colour, with BatchNorm in both ways."""
    from matplotlib.figure import Figure

    lost = {u.name: _curve(study, u.name, criterion) for u in study.units}
    worst = sorted(lost, key=lambda name: sum(row.accuracy_bn for row in lost[name]))[:NAMED]
    looks = {name: COLOURS[index % len(COLOURS)] for index, name in enumerate(worst)}
    drawing = Figure(figsize=(8, 4.4), layout="constrained")
    both = drawing.subplots(1, 2)
    for axes, (mode, title) in zip(both, MODES.items(), strict=True):
        for name in [*(n for n in lost if n not in looks), *reversed(worst)]:
            look = {"color": "#b4bac2", "linewidth": 0.8} | (
                {"color": looks[name], "linewidth": 1.8, "label": name} if name in looks else {}
            )
            values = [getattr(row, mode) for row in lost[name]]
            axes.plot([100 * row.rate for row in lost[name]], values, **look)
        _finish(axes, title)
        axes.set_xlabel("filters zeroed, % of the layer")
    both[0].set_ylabel("accuracy, %")
    handles, names = both[0].get_legend_handles_labels()
    drawing.legend(
        handles[::-1], names[::-1], loc="outside lower center", ncols=NAMED, frameon=False,
        fontsize="small",
    )  # fmt: skip
    return drawing


def losses(study: Study, criterion: str) -> Figure:
    """A cell for each layer and rate: what is lost, in points, with BatchNorm estimated again."""
    from matplotlib.figure import Figure

    names = [unit.name for unit in study.units]
    rates = study.settings.rates
    curves = [_curve(study, name, criterion) for name in names]
    # From below: the largest rate on top.
    grid = [[rows[0].accuracy_bn - rows[i].accuracy_bn for rows in curves]
            for i in range(1, len(rates) + 1)]  # fmt: skip
    drawing = Figure(figsize=(8, 3.4), layout="constrained")
    axes = drawing.add_subplot()
    # One scale for all criteria.
    most = max(study.rows[0].accuracy_bn - row.accuracy_bn for row in study.rows)
    image = axes.imshow(grid, aspect="auto", origin="lower", cmap="magma_r", vmin=0, vmax=most)
    size = 7 if len(names) <= 30 else 5
    axes.set_xticks(range(len(names)), names, rotation=90, fontsize=size)
    axes.set_yticks(range(len(rates)), [f"{100 * rate:g}" for rate in rates], fontsize=7)
    axes.set_ylabel("filters zeroed, %")
    drawing.colorbar(image, ax=axes, label="points lost")
    return drawing


def panels(study: Study, names: Sequence[str]) -> Figure:
    """A small drawing for each layer, a colour for each criterion, on one scale."""
    from matplotlib.figure import Figure

    columns = min(4, len(names))
    lines = -(-len(names) // columns)
    drawing = Figure(figsize=(2.2 * columns, 1.5 * lines + 0.7), layout="constrained")
    grid = drawing.subplots(lines, columns, sharex=True, sharey=True, squeeze=False)
    for axes, name in zip(grid.flat, names, strict=False):
        for index, criterion in enumerate(study.settings.criteria):
            rows = _curve(study, name, criterion)
            for mode, dashes in zip(MODES, ("-", "--"), strict=True):
                axes.plot(
                    [100 * row.rate for row in rows], [getattr(row, mode) for row in rows], dashes,
                    color=COLOURS[index % len(COLOURS)], linewidth=1.2, label=criterion,
                )  # fmt: skip
        _finish(axes, f"{name} ({study.filters[name]})")
        axes.title.set_fontsize(7)
        axes.tick_params(labelsize=6)
    for axes in grid.flat[len(names) :]:
        axes.set_visible(False)
    handles, labels = grid.flat[0].get_legend_handles_labels()
    drawing.legend(
        handles[::2], labels[::2], loc="outside upper left", ncols=6, frameon=False, fontsize=8
    )
    drawing.supxlabel("filters zeroed, % of the layer", fontsize=8)
    drawing.supylabel("accuracy, %", fontsize=8)
    return drawing


def _finish(axes: Axes, title: str) -> None:
    axes.set_title(title, fontsize=10)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(color="#e6e8eb", linewidth=0.8)
    axes.set_axisbelow(True)


def _curve(study: Study, layer: str, criterion: str) -> list[Row]:
    return [row for row in study.rows if (row.layer, row.criterion) == (layer, criterion)]


def _digits(value: float, digits: int = 2) -> tuple[float, str]:
    return value, f"{value:.{digits}f}"
