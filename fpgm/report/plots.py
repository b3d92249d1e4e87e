"""The pictures of a report. No torch; matplotlib is imported when something is drawn."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from fpgm.report.cells import Cell
from fpgm.report.collect import Found
from fpgm.report.paper import Published

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's colours, told apart by colour-blind readers too.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#7A7A7A", "#000000")
MARKERS = "os^Dv<>pP*X"

Numbered = Sequence[tuple[int, Cell]]  # a cell has its number's colour in every picture


def style(index: int) -> dict[str, Any]:
    return {
        "color": COLOURS[index % len(COLOURS)],
        "marker": MARKERS[index // len(COLOURS) % len(MARKERS)],
    }


def pareto(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Of (MACs, accuracy) those that no other beats in both, by MACs."""
    front: list[tuple[float, float]] = []
    for macs, accuracy in sorted(points, key=lambda point: (point[0], -point[1])):
        if not front or accuracy > front[-1][1]:
            front.append((macs, accuracy))
    return front


def accuracy_by_macs(cells: Numbered, papers: Sequence[Published]) -> Figure:
    """Our cells with their spread over seeds, their Pareto front, and the published points."""
    figure, axes = _one()
    points = []
    looks = {cell.paper: style(index) for index, cell in cells}
    for index, cell in cells:
        macs, top1 = (
            cell.spread("compact", "macs").mean / 1e6,
            cell.spread("accuracy", "compact_last"),
        )
        points.append((macs, top1.mean))
        axes.errorbar(
            macs, top1.mean, top1.std, label=cell.name, linestyle="", capsize=3, **style(index)
        )
    front = pareto(points)
    axes.step(*zip(*front, strict=True), where="post", color="#9aa3ad", zorder=0, label="Pareto")
    for index, paper in enumerate(papers, len(cells)):
        label = f"published: {paper.method}{'' if paper.rate is None else f' {paper.rate:g}'}"
        label += " pretrained" if paper.pretrained else ""
        label += "" if paper.trust == "ok" else f" ({paper.trust})"
        axes.errorbar(
            (paper.macs or 0) / 1e6, paper.top1 or 0, paper.std, label=label, linestyle="",
            capsize=3, mfc="none", alpha=0.8, **looks.get(paper, style(index)),
        )  # fmt: skip
    axes.set_xlabel("MACs of one image, compact network, millions")
    axes.set_ylabel("top-1 after the last epoch, %")
    return _finished(figure, axes)


def by_epoch(cells: Numbered, key: str, label: str, floor: bool = False) -> Figure:
    """A column of history.csv, a line a cell: the mean over the seeds."""

    def line(cell: Cell) -> tuple[list[float], list[float]]:
        histories = [run.history for run in cell.runs]
        epochs = [row["epoch"] for row in histories[0]]
        rows = zip(*histories, strict=True)
        return epochs, [sum(row[key] for row in at) / len(at) for at in rows]

    return _lines(cells, line, "epoch", label, floor)


def pruned_by_epoch(cells: Numbered, key: str, label: str) -> Figure:
    """revived or dead of those pruned, in percent, a line a cell."""

    def line(cell: Cell) -> tuple[list[float], list[float]]:
        rows = list(zip(*(run.history for run in cell.runs), strict=True))
        shares = [100 * sum(r[key] / max(r["pruned"], 1) for r in at) / len(at) for at in rows]
        return [at[0]["epoch"] for at in rows], shares

    return _lines(cells, line, "epoch", label, True)


def kept_by_layer(cells: Numbered) -> Figure:
    """Share of each layer's filters that stay, a line a cell: the first seed's."""

    def line(cell: Cell) -> tuple[list[float], list[float]]:
        layers = _layers(cell.runs[0])
        return list(range(1, len(layers) + 1)), [100 * n["kept"] / n["filters"] for n in layers]

    return _lines(cells, line, "layer, from the input on", "kept filters, %", True)


def _layers(run: Found) -> list[dict[str, Any]]:
    assert run.report is not None
    return list(run.report["layers"])


def _lines(
    cells: Numbered,
    line: Callable[[Cell], tuple[list[float], list[float]]],
    across: str,
    up: str,
    floor: bool,
) -> Figure:
    from matplotlib.ticker import MaxNLocator

    figure, axes = _one()
    for index, cell in cells:
        # Lines that lie on each other are both seen: the later one is dashed.
        dash = ("-", "--", ":", "-.")[index % 4]
        axes.plot(*line(cell), dash, label=cell.name, color=style(index)["color"], linewidth=1.6)
    axes.set_xlabel(across)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_ylabel(up)
    if floor:
        axes.set_ylim(bottom=0)
    return _finished(figure, axes)


def _one() -> tuple[Figure, Axes]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 3.6))
    return figure, figure.add_subplot()


def _finished(figure: Figure, axes: Axes) -> Figure:
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(color="#e6e8eb", linewidth=0.8)
    axes.set_axisbelow(True)
    # Below: beside the axes it would leave them no room on a telephone.
    axes.legend(
        loc="upper left", bbox_to_anchor=(0, -0.16), ncols=2, frameon=False, fontsize="small"
    )
    return figure
