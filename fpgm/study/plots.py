"""The pictures of a study, from its plain data. matplotlib is imported when something is drawn."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from fpgm.report.plots import style

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Row = Mapping[str, Any]
RUG = 200  # ticks at most under one density: evenly spaced among the sorted norms


def heatmaps(
    titles: Sequence[str], values: Sequence[Mapping[tuple[str, str], float | None]],
    names: Sequence[str],
) -> Figure:  # fmt: skip
    """Spearman of every pair of criteria, one matrix for each title, on one scale -1..1."""
    from matplotlib.figure import Figure

    size = 0.62 * len(names) + 1.2
    columns = 2
    lines = -(-len(titles) // columns)
    figure = Figure(figsize=(columns * size, lines * size), layout="constrained")
    for index, (title, pairs) in enumerate(zip(titles, values, strict=True)):
        axes = figure.add_subplot(lines, columns, index + 1)
        axes.set_title(title, fontsize=10)
        grid = [
            [1.0 if a == b else _known(pairs.get((a, b), pairs.get((b, a)))) for b in names]
            for a in names
        ]
        image = axes.imshow(grid, vmin=-1, vmax=1, cmap="RdBu_r")
        for i, row in enumerate(grid):
            for j, value in enumerate(row):
                shown = "" if value != value else f"{value:.2f}"
                colour = "white" if abs(value) > 0.6 else "black"
                axes.text(j, i, shown, ha="center", va="center", fontsize=8, color=colour)
        axes.set_xticks(range(len(names)), names, rotation=45, ha="right", fontsize=8)
        axes.set_yticks(range(len(names)), names, fontsize=8)
    figure.colorbar(image, ax=figure.axes, shrink=0.6, label="Spearman")
    return figure


def over_depth(
    series: Mapping[str, Sequence[tuple[int, float | None]]], label: str, log: bool = False
) -> Figure:
    """One line for each name, by depth; undefined values leave a gap."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(8, 3.6), layout="constrained")
    axes = figure.add_subplot()
    for index, (name, points) in enumerate(series.items()):
        depths = [depth for depth, _ in points]
        look = style(index)
        axes.plot(depths, [_known(v) for _, v in points], label=name, markersize=3, **look)
    axes.set(xlabel="layer, in the order of execution", ylabel=label)
    if log:
        axes.set_yscale("log")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(alpha=0.3)
    axes.legend(fontsize=7, loc="center left", bbox_to_anchor=(1, 0.5), frameon=False)
    return figure


def densities(entries: Sequence[Row], log: bool) -> Figure:
    """The norms of each layer's live filters: kernel density, and a tick for each filter below."""
    from matplotlib.figure import Figure

    columns = min(4, len(entries))
    lines = -(-len(entries) // columns)
    figure = Figure(figsize=(2.5 * columns, 1.7 * lines), layout="constrained")
    for index, entry in enumerate(entries):
        axes = figure.add_subplot(lines, columns, index + 1)
        curve = entry["log10" if log else "linear"]
        x = [10**value for value in curve["x"]] if log else curve["x"]
        axes.plot(x, curve["y"], color="#0072B2", linewidth=1)
        norms = entry["norms"]
        step = max(len(norms) / RUG, 1.0)
        ticks = [norms[int(i * step)] for i in range(int(len(norms) / step))]
        axes.plot(ticks, [0.0] * len(ticks), "|", color="#D55E00", markersize=6, alpha=0.6)
        if log:
            axes.set_xscale("log")
            few = [norms[0], norms[len(norms) // 2], norms[-1]]
            axes.set_xticks(few, [f"{norm:.2g}" for norm in few])
            axes.set_xticks([], minor=True)
        else:
            axes.set_xlim(left=0)
        axes.set_title(entry["layer"], fontsize=7)
        axes.tick_params(labelsize=6)
        axes.set_yticks([])
    return figure


def _known(value: float | None) -> float:
    return float("nan") if value is None else value
