"""One HTML page that holds all it shows: tables that sort, plots as SVG, nothing from a network.

Everything that is text is escaped; what is marked up is markupsafe's Markup.
"""

from __future__ import annotations

import io
import re
import zlib
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from jinja2 import Environment
from markupsafe import Markup, escape

if TYPE_CHECKING:
    from matplotlib.figure import Figure

STYLE = """
:root { color-scheme: light; --line: #d5d8dd; --text: #1c2026; --soft: #5b6470; --mark: #fff4d6; }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 80rem; padding: 1rem 1.25rem 4rem; color: var(--text);
  font: 16px/1.5 system-ui, sans-serif; background: #fff; }
h1 { font-size: 1.6rem; margin: 1rem 0 .25rem; } h2 { font-size: 1.2rem; margin: 2.5rem 0 .5rem; }
p, li { max-width: 46rem; } .lead, figcaption { color: var(--soft); }
nav a { margin-right: 1rem; } a { color: #0b57a4; }
.scroll { overflow-x: auto; margin: .75rem 0; }
table { border-collapse: collapse; font-size: .9rem; font-variant-numeric: tabular-nums; }
th, td { padding: .3rem .7rem; border-bottom: 1px solid var(--line); text-align: left;
  vertical-align: top; }
td.number, th.number { text-align: right; white-space: nowrap; }
th button { font: inherit; font-weight: 600; background: none; border: 0; padding: 0;
  cursor: pointer; text-align: inherit; color: inherit; white-space: nowrap; }
td:not(.number) { min-width: 4rem; max-width: 26rem; }
th button::after { content: " \\2195"; color: #a3abb5; }
th[aria-sort=ascending] button::after { content: " \\2191"; color: inherit; }
th[aria-sort=descending] button::after { content: " \\2193"; color: inherit; }
tr.marked td { background: var(--mark); }
figure { margin: 1rem 0 2rem; break-inside: avoid; }
figure svg { width: 100%; max-width: 42rem; height: auto; }
code { font-size: .88em; overflow-wrap: anywhere; }
@media print { th button::after { content: "" !important; } body { max-width: none; }
  .scroll { overflow: visible; } h2 { break-after: avoid; } nav { display: none; } }
"""

SCRIPT = """
for (const head of document.querySelectorAll("th button")) head.onclick = () => {
  const th = head.parentElement, body = th.closest("table").tBodies[0];
  const down = th.getAttribute("aria-sort") === "ascending";
  for (const other of th.parentElement.children) other.removeAttribute("aria-sort");
  th.setAttribute("aria-sort", down ? "descending" : "ascending");
  const value = row => { const c = row.cells[th.cellIndex];
    return c.dataset.value === undefined ? c.textContent : parseFloat(c.dataset.value); };
  const order = (a, b) => { const x = value(a), y = value(b);
    return typeof x === "number" && typeof y === "number" ? x - y : `${x}`.localeCompare(`${y}`); };
  body.append(...[...body.rows].sort((a, b) => down ? order(b, a) : order(a, b)));
};
"""

_PAGE = Environment(autoescape=True).from_string("""<!doctype html>
<html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{{ title }}</title><style>{{ style }}</style></head>
<body><h1>{{ title }}</h1><p class="lead">{{ lead }}</p>
<nav>{% for id, name, _ in sections %}<a href="#{{ id }}">{{ name }}</a>{% endfor %}</nav>
{% for id, name, parts in sections %}<section id="{{ id }}"><h2>{{ name }}</h2>
{% for part in parts %}{{ part }}
{% endfor %}</section>{% endfor %}
<script>{{ script }}</script></body></html>
""")


def page(title: str, lead: str, sections: Iterable[tuple[str, Sequence[Markup]]]) -> str:
    """The whole page. sections: (heading, its parts in order)."""
    named = [(re.sub(r"\W+", "-", name.lower()), name, parts) for name, parts in sections]
    return _PAGE.render(
        title=title, lead=lead, sections=named, style=Markup(STYLE), script=Markup(SCRIPT)
    )


def text(words: str) -> Markup:
    """A paragraph."""
    return Markup("<p>%s</p>") % words


def table(
    header: Sequence[str], rows: Iterable[Sequence[Any]], marked: Iterable[int] = ()
) -> Markup:
    """A table that is sorted by a click on a heading; wider than the screen, it scrolls by itself.

    Cells: a number, or (number, shown) to be sorted by the number, stands to the right; Markup
    stays as it is, None is empty. marked: indices of rows that stand out.
    """
    rows, marked = [list(row) for row in rows], set(marked)
    numbers = {
        i for row in rows for i, cell in enumerate(row) if isinstance(cell, int | float | tuple)
    }
    head = Markup("").join(
        Markup('<th%s scope="col"><button type="button">%s</button></th>')
        % (Markup(' class="number"') if i in numbers else "", name)
        for i, name in enumerate(header)
    )
    body = Markup("").join(
        Markup("<tr%s>%s</tr>\n")
        % (
            Markup(' class="marked"') if index in marked else "",
            Markup("").join(_cell(cell, i in numbers) for i, cell in enumerate(row)),
        )
        for index, row in enumerate(rows)
    )
    return Markup(
        '<div class="scroll"><table><thead><tr>%s</tr></thead><tbody>\n%s</tbody></table></div>'
    ) % (head, body)


def _cell(cell: Any, number: bool) -> Markup:
    kind = Markup(' class="number"') if number else Markup("")
    if cell is None:
        return Markup("<td%s></td>") % kind
    if isinstance(cell, tuple):
        value, shown = cell
        return Markup('<td%s data-value="%s">%s</td>') % (kind, value, shown)
    if isinstance(cell, int | float):
        shown = f"{cell:,}" if isinstance(cell, int) else f"{cell:.4g}"
        return Markup('<td%s data-value="%s">%s</td>') % (kind, cell, shown)
    return Markup("<td%s>%s</td>") % (kind, escape(cell))


def figure(drawing: Figure, caption: str) -> Markup:
    """A matplotlib figure as SVG, with what it shows in words, for those who cannot see it too."""
    import matplotlib

    buffer = io.StringIO()
    # The same drawing gives the same bytes; its text stays text.
    with matplotlib.rc_context({"svg.hashsalt": caption, "svg.fonttype": "none"}):
        drawing.savefig(buffer, format="svg", bbox_inches="tight", metadata={"Date": None})
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :].replace("<svg", '<svg role="img"', 1)
    # Several drawings on one page must not share the names of their parts.
    mark = f"f{zlib.crc32(caption.encode()):08x}"
    svg = re.sub(r'(id="|href="#|url\(#)', rf"\g<1>{mark}-", svg)
    return Markup("<figure>%s<figcaption>%s</figcaption></figure>") % (Markup(svg), caption)
