"""The report as a page: the table, accuracy against MACs, and what pruning did epoch by epoch."""

from __future__ import annotations

import re
from collections.abc import Sequence

from markupsafe import Markup

from fpgm import page
from fpgm.report import plots as plots
from fpgm.report.cells import Cell
from fpgm.report.collect import Found, Missing
from fpgm.report.paper import Published, published
from fpgm.report.table import HEADER, NOTE, row

Section = tuple[str, Sequence[Markup]]


def html(table: Sequence[Cell], runs: Sequence[Found], lacking: Sequence[Missing]) -> str:
    """summary.html."""
    counted = [cell for cell in table if cell.problem is None]
    done = sum(run.problem is None for run in runs)
    lead = (
        f"{done} of {done + len({*_unfinished(runs), *(m.directory for m in lacking)})} runs done"
    )
    networks = list(dict.fromkeys(cell.network for cell in counted))
    sections: list[Section] = []
    if table:
        sections.append(("Results", [_results(table), page.text(NOTE)]))
    for network in networks:
        own = [cell for cell in counted if cell.network == network]
        sections.append((network, _pictures(network, own)))
    if lacking:
        rows = [[str(m.directory), m.state, Markup("<code>%s</code>") % m.command] for m in lacking]
        sections.append(("Missing", [page.table(["run", "state", "command"], rows)]))
    uncounted = [[str(run.directory), run.problem] for run in runs if run.problem]
    if uncounted:
        sections.append(("Not counted", [page.table(["run", "why"], uncounted)]))
    others = _elsewhere(counted)
    if others:
        sections.append(("Published, not run here", [_papers(others)]))
    return page.page("fpgm: what pruning gave", lead, sections)


def _unfinished(runs: Sequence[Found]) -> list[object]:
    return [run.directory for run in runs if run.problem]


def _results(table: Sequence[Cell]) -> Markup:
    rows = []
    for cell in table:
        shown: list[object] = list(row(cell))
        for index in (5, 6, 7, 8, 10, 11, 12):  # sorted by their leading number
            number = re.match(r"[+-]?[\d.]+", str(shown[index]))
            shown[index] = (float(number[0]), shown[index]) if number else shown[index] or None
        rows.append(shown)
    used = [i for i in range(len(HEADER)) if any(shown[i] not in ("", None) for shown in rows)]
    doubtful = [i for i, c in enumerate(table) if c.problem or (c.paper and c.paper.trust != "ok")]
    return page.table([HEADER[i] for i in used], [[r[i] for i in used] for r in rows], doubtful)


def _pictures(network: str, cells: Sequence[Cell]) -> list[Markup]:
    numbered = list(enumerate(cells))
    pruned = [(index, cell) for index, cell in numbered if cell.method != "baseline"]
    dataset, arch = network.split(" ", 1)
    papers = [
        paper
        for paper in published()
        if (paper.dataset, paper.arch) == (dataset, arch) and paper.top1 and paper.macs
    ]
    caption = f"{network}: accuracy against MACs; bars: standard deviation over seeds."
    if papers:
        caption += " Hollow: published, MACs by the paper's closed form."
    found = [page.figure(plots.accuracy_by_macs(numbered, papers), caption)]
    found.append(
        page.figure(
            plots.by_epoch(numbered, "accuracy_after", "top-1, %"),
            f"{network}: test accuracy of the zeroed network after each epoch.",
        )
    )
    if not pruned:
        return found
    for drawing, caption in (
        (plots.kept_by_layer(pruned), "filters kept, layer by layer, of the first seed."),
        (
            plots.by_epoch(pruned, "churn", "churn", floor=True),
            "churn, the share of pruned filters that were not pruned the epoch before.",
        ),
        (
            plots.pruned_by_epoch(pruned, "revived", "revived, % of the pruned"),
            "pruned filters whose weight had left zero at the end of the epoch.",
        ),
        (
            plots.pruned_by_epoch(pruned, "dead", "dead, % of the pruned"),
            "pruned filters that no gradient reached during the epoch.",
        ),
    ):
        found.append(page.figure(drawing, f"{network}: {caption}"))
    return found


def _elsewhere(cells: Sequence[Cell]) -> list[Published]:
    """Published rows of the same networks that no run here reproduces."""
    networks = {cell.network for cell in cells}
    here = {cell.paper for cell in cells}
    return [p for p in published() if f"{p.dataset} {p.arch}" in networks and p not in here]


def _papers(rows: Sequence[Published]) -> Markup:
    header = ["network", "method", "rate", "start", "top-1 %", "MACs", "trust"]
    doubtful = [index for index, paper in enumerate(rows) if paper.trust != "ok"]
    return page.table(header, [_paper(row) for row in rows], doubtful)


def _paper(row: Published) -> list[object]:
    cut = None if row.macs_reduction is None else (row.macs_reduction, f"-{row.macs_reduction} %")
    trust = f"{row.trust}: {row.note}" if row.note else row.trust
    start = "pretrained" if row.pretrained else "scratch"
    return [f"{row.dataset} {row.arch}", row.method, row.rate, start, row.top1, cut, trust]
