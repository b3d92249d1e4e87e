"""The report as a page: the table, accuracy against MACs, and what pruning did epoch by epoch.

No torch; matplotlib is imported when something is drawn.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

from markupsafe import Markup

from fpgm import page
from fpgm.report import sweep
from fpgm.report.cells import Cell
from fpgm.report.collect import Found, Missing
from fpgm.report.paper import Published, published
from fpgm.report.sweep import Sweep
from fpgm.report.table import NOTE, Together, rows

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Section = tuple[str, Sequence[Markup]]
Numbered = Mapping[int, Cell]  # a cell has its number's colour in every picture


def html(
    table: Sequence[Cell],
    runs: Sequence[Found],
    lacking: Sequence[Missing],
    swept: Sweep | None = None,
    beside: Sequence[Together] = (),
) -> str:
    """summary.html. swept: what the cells are also shown by; beside: them held against each
    other."""
    counted = [cell for cell in table if cell.problem is None]
    uncounted = [[str(run.directory), run.problem] for run in runs if run.problem]
    done = len(runs) - len(uncounted)
    waiting = {*(str(m.directory) for m in lacking), *(place for place, _ in uncounted)}
    sections: list[Section] = []
    if table:
        header, body = rows(table)
        doubtful = [
            i for i, c in enumerate(table) if c.problem or (c.paper and c.paper.trust != "ok")
        ]
        sections.append(("Results", [page.table(header, body, doubtful), page.text(NOTE)]))
    sections += [(title, [page.table(*held), page.text(note)]) for title, note, held in beside]
    if swept:
        drawing = page.figure(sweep.figure(swept), f"accuracy over {swept.key}; {sweep.HOLLOW}")
        sections.append((f"By {swept.key}", [drawing, page.table(*sweep.rows(swept))]))
    for network in dict.fromkeys(cell.network for cell in counted):
        of_network = [cell for cell in counted if cell.network == network]
        sections.append((network, _pictures(network, dict(enumerate(of_network)))))
    if lacking:
        lines = [
            [str(m.directory), m.state, Markup("<code>%s</code>") % m.command] for m in lacking
        ]
        sections.append(("Missing", [page.table(["run", "state", "command"], lines)]))
    if uncounted:
        sections.append(("Not counted", [page.table(["run", "why"], uncounted)]))
    others = _elsewhere(counted)
    if others:
        sections.append(("Published, not run here", [_papers(others)]))
    lead = f"{done} of {done + len(waiting)} runs done"
    return page.page("fpgm: what pruning gave", lead, sections)


def _pictures(network: str, cells: Numbered) -> list[Markup]:
    pruned = {index: cell for index, cell in cells.items() if cell.prunes}
    papers = [p for p in published() if f"{p.dataset} {p.arch}" == network and p.top1 and p.macs]
    hollow = " Hollow: published, MACs by the paper's closed form." if papers else ""
    drawings = {
        f"accuracy against MACs; bars: standard deviation over seeds.{hollow}": accuracy_by_macs(
            cells, papers
        ),
    }
    trained = {index: cell for index, cell in cells.items() if cell.runs[0].history}
    if trained:
        drawings["test accuracy of the zeroed network after each epoch."] = _by_epoch(
            trained, "top-1, %", lambda row: row["accuracy_after"], floor=False
        )
    if pruned:
        drawings["filters kept, layer by layer, of the first seed."] = _kept_by_layer(pruned)
    pruned = {index: cell for index, cell in pruned.items() if index in trained}
    if pruned:
        drawings |= {
            "churn, the share of pruned filters that were not pruned the epoch before.": _by_epoch(
                pruned, "churn", lambda row: row["churn"]
            ),
            "pruned filters whose weight had left zero at the end of the epoch.": _by_epoch(
                pruned, "revived, % of the pruned", lambda row: share(row, "revived")
            ),
            "pruned filters that no gradient reached during the epoch.": _by_epoch(
                pruned, "dead, % of the pruned", lambda row: share(row, "dead")
            ),
        }
    return [page.figure(drawing, f"{network}: {what}") for what, drawing in drawings.items()]


def share(row: Mapping[str, float], key: str) -> float:
    """Of the pruned filters of an epoch, in percent."""
    return 100 * row[key] / max(row["pruned"], 1)


def pareto(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Of (MACs, accuracy) those that no other beats in both, by MACs."""
    front: list[tuple[float, float]] = []
    for macs, accuracy in sorted(points, key=lambda point: (point[0], -point[1])):
        if not front or accuracy > front[-1][1]:
            front.append((macs, accuracy))
    return front


def accuracy_by_macs(cells: Numbered, papers: Sequence[Published]) -> Figure:
    """Our cells with their spread over seeds, their Pareto front, and the published points."""
    figure, axes = page.axes()
    points = []
    for index, cell in cells.items():
        macs, top1 = (
            cell.spread("compact", "macs").mean / 1e6,
            cell.spread("accuracy", "compact_last"),
        )
        points.append((macs, top1.mean))
        look = {"linestyle": "", "capsize": 3, **page.style(index)}
        axes.errorbar(macs, top1.mean, top1.std, label=cell.name, **look)
    front = pareto(points)
    axes.step(*zip(*front, strict=True), where="post", color="#9aa3ad", zorder=0, label="Pareto")
    here = {cell.paper: index for index, cell in cells.items()}
    for index, paper in enumerate(papers, len(cells)):
        label = f"published: {paper.method}{'' if paper.rate is None else f' {paper.rate:g}'}"
        label += " pretrained" if paper.pretrained else ""
        label += "" if paper.trust == "ok" else f" ({paper.trust})"
        look = {"linestyle": "", "capsize": 3, **page.style(here.get(paper, index))}
        axes.errorbar(
            (paper.macs or 0) / 1e6, paper.top1 or 0, paper.std, label=label, mfc="none", alpha=0.8,
            **look,
        )  # fmt: skip
    page.finish(
        axes, "MACs of one image, compact network, millions", "top-1 after the last epoch, %"
    )
    return figure


def _by_epoch(
    cells: Numbered, label: str, value: Callable[[Mapping[str, float]], float], floor: bool = True
) -> Figure:
    """Of a row of history.csv, a line a cell: the mean over the seeds."""
    lines = {}
    for cell in cells.values():
        epochs = zip(*(run.history for run in cell.runs), strict=True)
        lines[cell.name] = [(at[0]["epoch"], sum(map(value, at)) / len(at)) for at in epochs]
    return page.curves(lines, "epoch", label, floor=floor, looks=list(cells))


def _kept_by_layer(cells: Numbered) -> Figure:
    """Share of each layer's filters that stay, a line a cell: the first seed's."""
    lines = {
        cell.name: [
            (place, 100 * layer["kept"] / layer["filters"])
            for place, layer in enumerate(cell.runs[0].entry("layers"), 1)
        ]
        for cell in cells.values()
    }
    across, up = "layer, from the input on", "kept filters, %"
    return page.curves(lines, across, up, floor=True, looks=list(cells))


def _elsewhere(cells: Sequence[Cell]) -> list[Published]:
    """Published rows of the same networks that no run here reproduces."""
    networks, here = {cell.network for cell in cells}, {cell.paper for cell in cells}
    return [p for p in published() if f"{p.dataset} {p.arch}" in networks and p not in here]


def _papers(rows: Sequence[Published]) -> Markup:
    header = ["source", "network", "method", "rate", "start", "top-1 %", "MACs", "trust"]
    doubtful = [index for index, paper in enumerate(rows) if paper.trust != "ok"]
    lines = [
        [
            p.source, f"{p.dataset} {p.arch}", p.method, p.layers or p.rate,
            "pretrained" if p.pretrained else "scratch", p.top1,
            p.macs_reduction and (p.macs_reduction, f"-{p.macs_reduction} %"),
            f"{p.trust}: {p.note}" if p.note else p.trust,
        ]
        for p in rows
    ]  # fmt: skip
    return page.table(header, lines, doubtful)
