"""One HTML page that holds all it shows: tables that sort, plots as SVG, nothing from a network.

Everything that is text is escaped; what is marked up is markupsafe's Markup.
"""

from __future__ import annotations

import io
import re
import zlib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jinja2 import Environment, FileSystemLoader
from markupsafe import Markup

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_TEMPLATES = Environment(loader=FileSystemLoader(Path(__file__).parent), autoescape=True)
_TABLE = _TEMPLATES.from_string("""\
<div class="scroll"><table><thead><tr>
{%- for name in header %}<th{% if loop.index0 in numbers %} class="number"{% endif %} scope="col">
{#--#}<button type="button">{{ name }}</button></th>{% endfor -%}
</tr></thead><tbody>
{% for row in rows %}<tr{% if loop.index0 in marked %} class="marked"{% endif %}>
{%- for value, shown in row %}<td{% if loop.index0 in numbers %} class="number"{% endif %}
{%- if value is not none %} data-value="{{ value }}"{% endif %}>{{ shown }}</td>{% endfor %}</tr>
{% endfor %}</tbody></table></div>""")
_LIST = _TEMPLATES.from_string("<ul>{% for line in lines %}<li>{{ line }}</li>{% endfor %}</ul>")

# Okabe and Ito's colours, told apart by colour-blind readers too.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#7A7A7A", "#000000")
MARKERS = "os^Dv<>pP*X"
Line = Sequence[tuple[float, float | None]]  # points; one that is undefined leaves a gap


def page(title: str, lead: str, sections: Iterable[tuple[str, Sequence[Markup]]]) -> str:
    """The whole page. sections: (heading, its parts in order)."""
    named = [(re.sub(r"\W+", "-", name.lower()), name, parts) for name, parts in sections]
    return _TEMPLATES.get_template("page.html").render(title=title, lead=lead, sections=named)


def text(words: str) -> Markup:
    """A paragraph."""
    return Markup("<p>%s</p>") % words


def folded(name: str, parts: Iterable[Markup]) -> Markup:
    """Parts that show when their name is clicked on."""
    return Markup("<details><summary>%s</summary>%s</details>") % (name, Markup("\n").join(parts))


def bullets(lines: Iterable[str]) -> Markup:
    """A list."""
    return Markup(_LIST.render(lines=lines))


def table(
    header: Sequence[str], rows: Iterable[Sequence[Any]], marked: Iterable[int] = ()
) -> Markup:
    """A table that is sorted by a click on a heading; wider than the screen, it scrolls by itself.

    Cells: a number, or (number, shown) to be sorted by the number, stands to the right; Markup
    stays as it is, None is empty. marked: indices of rows that stand out.
    """
    cells = [[_cell(cell) for cell in row] for row in rows]
    numbers = {i for row in cells for i, (value, _) in enumerate(row) if value is not None}
    return Markup(_TABLE.render(header=header, rows=cells, numbers=numbers, marked=set(marked)))


def _cell(cell: Any) -> tuple[float | None, Any]:
    """What it is sorted by, and what is shown."""
    if isinstance(cell, tuple):
        return cell
    if isinstance(cell, int | float):
        return cell, f"{cell:,}" if isinstance(cell, int) else f"{cell:.4g}"
    return None, "" if cell is None else cell


def svg(drawing: Figure, name: str) -> str:
    """A matplotlib figure as a file: the same drawing gives the same bytes, its text stays text."""
    import matplotlib

    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": name, "svg.fonttype": "none"}):
        drawing.savefig(buffer, format="svg", bbox_inches="tight", metadata={"Date": None})
    return buffer.getvalue()


def figure(drawing: Figure, caption: str) -> Markup:
    """A matplotlib figure as SVG, with what it shows in words, for those who cannot see it too."""
    content = svg(drawing, caption)
    content = content[content.index("<svg") :].replace("<svg", '<svg role="img"', 1)
    # Several drawings on one page must not share the names of their parts.
    mark = f"f{zlib.crc32(caption.encode()):08x}"
    content = re.sub(r'(id="|href="#|url\(#)', rf"\g<1>{mark}-", content)
    return Markup("<figure>%s<figcaption>%s</figcaption></figure>") % (Markup(content), caption)


def style(index: int) -> dict[str, Any]:
    """The look of one of many lines or points, the same in every drawing of a page."""
    marker = MARKERS[index // len(COLOURS) % len(MARKERS)]
    return {"color": COLOURS[index % len(COLOURS)], "marker": marker}


def axes() -> tuple[Figure, Axes]:
    """An empty drawing."""
    from matplotlib.figure import Figure

    drawing = Figure(figsize=(6, 3.6))
    return drawing, drawing.add_subplot()


def finish(axes: Axes, across: str, up: str) -> None:
    """Name the axes and what is drawn."""
    axes.set(xlabel=across, ylabel=up)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(color="#e6e8eb", linewidth=0.8)
    axes.set_axisbelow(True)
    # Below: beside the axes it would leave them no room on a telephone.
    axes.legend(
        loc="upper left", bbox_to_anchor=(0, -0.16), ncols=2, frameon=False, fontsize="small"
    )


def curves(
    lines: Mapping[str, Line], across: str, up: str, *, log: bool = False, floor: bool = False,
    looks: Sequence[int] | None = None,
) -> Figure:  # fmt: skip
    """A line for each name. log: the values; floor: their axis starts at 0; looks: index of each
    line's style, in turn where none is given."""
    from matplotlib.ticker import MaxNLocator

    drawing, plot = axes()
    for index, (name, points) in zip(looks or range(len(lines)), lines.items(), strict=True):
        values = [float("nan") if value is None else value for _, value in points]
        # Lines that lie on each other are both seen: the later one is dashed.
        look: dict[str, Any] = {
            "linestyle": ("-", "--", ":", "-.")[index % 4],
            "linewidth": 1.4,
            "markersize": 3,
        }
        look |= {"marker": None} if len(points) > 40 else {}
        plot.plot([at for at, _ in points], values, label=name, **style(index) | look)
    plot.xaxis.set_major_locator(MaxNLocator(integer=True))
    if log:
        plot.set_yscale("log")
    if floor:
        plot.set_ylim(bottom=0)
    finish(plot, across, up)
    return drawing
