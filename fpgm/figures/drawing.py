"""The two figures, drawn. Colours are told apart by colour-blind readers; what a colour says, a
marker, a line's style or a word says too. matplotlib is imported when something is drawn."""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

from fpgm.figures.layer import by_chance
from fpgm.figures.maps import ROWS, Maps
from fpgm.figures.norms import Norms, density
from fpgm.page import COLOURS, MARKERS
from fpgm.runs.files import write_bytes

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure, SubFigure

COLUMNS = 3  # of layers
MOST_MAPS = 64  # drawn: the pruned ones, and kept ones by their index
GREY, LIGHT = COLOURS[6], "#e6e8eb"
FRAMES = (COLOURS[1], COLOURS[0], COLOURS[2], COLOURS[3])
LINES = ("-", (0, (3, 1.5)), ":")  # of a frame, by criterion
DOTS = 150  # to the inch


def save(drawing: Figure, directory: Path, name: str) -> list[Path]:
    """Write NAME.png and NAME.svg; the same drawing gives the same SVG. Raises OSError."""
    import matplotlib

    paths = []
    for kind, metadata in (("png", None), ("svg", {"Date": None})):
        buffer = io.BytesIO()
        with matplotlib.rc_context({"svg.hashsalt": name, "svg.fonttype": "none"}):
            drawing.savefig(buffer, format=kind, dpi=DOTS, metadata=metadata)
        paths.append(directory / f"{name}.{kind}")
        write_bytes(paths[-1], buffer.getvalue())
    return paths


def norms(found: Sequence[Norms], source: str, rate: float) -> Figure:
    """Of each layer: the density of its norms beside the ideal one, and below a tick for each
    filter and a mark for those that each criterion prunes."""
    from matplotlib.figure import Figure

    columns = min(COLUMNS, len(found))
    lines = math.ceil(len(found) / columns)
    drawing = Figure(figsize=(0.6 + 3.8 * columns, 0.7 + 3.5 * lines), layout="constrained")
    drawing.suptitle(f"Norms of filters, {source}; {100 * rate:g} % pruned", fontsize=11)
    parts: Any = drawing.subfigures(lines, columns, squeeze=False)
    for part, layer in zip(parts.flat, found, strict=False):
        _layer(part, layer)
    handles, labels = parts.flat[0].axes[0].get_legend_handles_labels()
    drawing.legend(handles, labels, loc="outside lower center", ncols=2, frameon=False)
    return drawing


def _layer(part: SubFigure, layer: Norms) -> None:
    names = list(layer.pruned)
    above, below = part.subplots(
        2, 1, sharex=True, gridspec_kw={"height_ratios": [3, 0.4 * (1 + len(names))]}
    )
    lengths, said = layer.filters.norms, layer.diagnosis
    at = np.linspace(0, 1.25 * lengths.max(), 300)
    real = density(lengths, at)
    above.plot(
        at, density(layer.ideal, at), color=GREY, linestyle="--",
        label="ideal for a norm criterion: wide, and from 0 on",
    )  # fmt: skip
    above.plot(at, real, color=COLOURS[0], label="this layer")
    above.fill_between(at, real, color=COLOURS[0], alpha=0.12)
    above.set_title(
        f"{layer.filters.layer}, {len(lengths)} filters\n{said['verdict']}\n"
        f"std / mean {said['cv']:.2f}, min / median {said['min_over_median']:.2f}",
        fontsize=9,
    )
    above.set(ylabel="density", yticks=[])
    above.set_ylim(bottom=0)
    below.plot(lengths, [0.0] * len(lengths), "|", color=GREY, markersize=9)
    for row, name in enumerate(names, 1):
        gone = lengths[layer.pruned[name].numpy()]
        look = {"color": COLOURS[row], "marker": MARKERS[row - 1]}
        below.plot(gone, [row] * len(gone), linestyle="", markersize=5, alpha=0.7, **look)
    below.set_yticks(range(1 + len(names)), ["all", *(f"{name} prunes" for name in names)])
    below.tick_params(axis="y", length=0, labelsize=8)
    below.set_ylim(len(names) + 0.6, -0.6)
    below.set_xlim(-0.02 * lengths.max(), at[-1])
    below.set_xlabel("L2 norm of a filter")
    below.grid(axis="y", color=LIGHT)
    below.set_axisbelow(True)
    for axes in (above, below):
        axes.spines[["top", "right", "left"]].set_visible(False)


def maps(seen: Maps, source: str, rate: float) -> Figure:
    """The image and how well the kept maps and filters explain the pruned ones to the left, the
    maps to the right, those pruned framed."""
    from matplotlib.figure import Figure

    framed = _framed(seen.pruned)
    shown = _shown(len(seen.filters), framed)
    columns = 8 if len(shown) > 16 else 4
    lines = math.ceil(len(shown) / columns)
    drawing = Figure(figsize=(5 + 0.9 * columns, max(1.1 * lines + 1.2, 5.8)), layout="constrained")
    drawing.suptitle(
        f"Feature maps of {seen.filters.layer}, {source}; {100 * rate:g} % pruned", fontsize=11
    )
    sides: Any = drawing.subfigures(1, 2, width_ratios=(4.6, 0.9 * columns))
    left, right = sides
    picture, by_maps, by_filters = left.subplots(3, 1, gridspec_kw={"height_ratios": [3, 2, 2]})
    pixels = seen.image.movedim(0, -1).numpy()
    picture.imshow(pixels.squeeze(-1) if pixels.shape[-1] == 1 else pixels, cmap="gray")
    picture.set_title(f"test image {seen.shown}", fontsize=9)
    picture.axis("off")
    _explained(by_maps, seen, "r2_maps", "R² of pruned maps by kept maps: mean (Gaussian)")
    _explained(
        by_filters, seen, "r2_filters", "R² of pruned filters by kept filters: mean (Gaussian)"
    )
    handles, labels = by_maps.get_legend_handles_labels()
    left.legend(handles, labels, loc="outside lower left", ncols=3, frameon=False, fontsize=8)
    _grid(right, seen, shown, framed, (lines, columns))
    return drawing


def _framed(pruned: Mapping[str, Tensor]) -> dict[str, set[int]]:
    """The criteria whose choice is drawn: not those by chance, which choose anew each time."""
    fixed = {name: set(p.tolist()) for name, p in pruned.items() if not by_chance(name)}
    return fixed or {name: set(p.tolist()) for name, p in pruned.items()}


def _shown(count: int, framed: Mapping[str, set[int]]) -> list[int]:
    """The places that are drawn, in order: all, or the pruned ones and the first of the others."""
    gone = sorted(set().union(*framed.values()))[:MOST_MAPS]
    others = [place for place in range(count) if place not in set(gone)]
    return sorted([*gone, *others[: MOST_MAPS - len(gone)]])


def _grid(
    part: SubFigure, seen: Maps, shown: Sequence[int], framed: Mapping[str, set[int]],
    shape: tuple[int, int],
) -> None:  # fmt: skip
    from matplotlib.lines import Line2D
    from matplotlib.patches import Rectangle

    cells = part.subplots(*shape, squeeze=False)
    for axes in cells.flat:
        axes.axis("off")
    looks: dict[str, dict[str, Any]] = {
        name: {"edgecolor": FRAMES[row % len(FRAMES)], "linestyle": LINES[row % len(LINES)]}
        for row, name in enumerate(framed)
    }
    for axes, place in zip(cells.flat, shown, strict=False):
        axes.imshow(seen.maps[place].numpy(), cmap="gray")
        axes.axis("on")
        axes.set(xticks=[], yticks=[])
        axes.spines[:].set_color(LIGHT)
        by = [name for name, places in framed.items() if place in places]
        axes.set_title(
            " ".join([str(int(seen.filters.indices[place])), *by]), fontsize=7, pad=4,
            fontweight="bold" if by else "normal",
        )  # fmt: skip
        for inner, name in enumerate(by):  # one in the other where two criteria agree
            edge = 0.02 + 0.07 * inner
            frame = Rectangle(
                (edge, edge), 1 - 2 * edge, 1 - 2 * edge, transform=axes.transAxes, fill=False,
                linewidth=2.4, clip_on=False, **looks[name],
            )  # fmt: skip
            axes.add_patch(frame)
    handles = [
        Line2D([], [], color=look["edgecolor"], linestyle=look["linestyle"], linewidth=2.4)
        for look in looks.values()
    ]
    labels = [f"pruned by {name}" for name in framed]
    left_out = len(seen.filters) - len(shown)
    if left_out:
        handles.append(Line2D([], [], linestyle=""))
        labels.append(f"{left_out} kept ones not drawn")
    part.legend(handles, labels, loc="outside lower left", ncols=3, frameon=False, fontsize=8)


def _explained(axes: Axes, seen: Maps, key: str, title: str) -> None:
    """A dot for each pruned filter, its mean, and the mean of Gaussian filters."""
    names = list(seen.pruned)
    axes.set_title(title, fontsize=9)
    axes.set_xlim(-0.03, 1.03)
    axes.set_ylim(len(names) - 0.4, -0.6)
    for row, name in enumerate(names):
        values = _values(seen.rows, name, key)
        mean, null = (seen.mean(weights, name, key) for weights in ROWS)
        if mean is None or null is None:
            continue
        dots: dict[str, Any] = {"color": COLOURS[0], "markersize": 4, "alpha": 0.35}
        said = {"label": None} if row else {"label": "a pruned filter"}
        axes.plot(values, [row] * len(values), "o", **dots, **said)
        said = {"label": None} if row else {"label": "mean"}
        axes.plot([mean], [row], "|", color="black", markersize=15, markeredgewidth=2, **said)
        said = {"label": None} if row else {"label": "Gaussian filters"}
        axes.plot(
            [null], [row], "D", markerfacecolor="none", markeredgecolor=COLOURS[1], markersize=7,
            markeredgewidth=1.5, **said,
        )  # fmt: skip
        axes.text(1.06, row, f"{mean:.3f} ({null:.3f})", va="center", fontsize=8)
    if all(seen.mean(ROWS[0], name, key) is None for name in names):
        axes.text(
            0.5, 0.5, "the kept filters span all that there are:\nno filter is outside",
            transform=axes.transAxes, ha="center", va="center", fontsize=8,
        )  # fmt: skip
    axes.set_yticks(range(len(names)), names, fontsize=8)
    axes.tick_params(axis="x", labelsize=8)
    axes.tick_params(axis="y", length=0)
    axes.grid(color=LIGHT)
    axes.set_axisbelow(True)
    axes.spines[["top", "right", "left"]].set_visible(False)


def _values(rows: Sequence[Mapping[str, Any]], criterion: str, key: str) -> list[float]:
    return [
        row[key]
        for row in rows
        if (row["weights"], row["criterion"]) == (ROWS[0], criterion) and row[key] is not None
    ]
