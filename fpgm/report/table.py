"""Cells as text: for the terminal, Markdown and CSV. No torch."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Sequence
from typing import Any

from fpgm.report.cells import Cell, Spread
from fpgm.report.collect import Found, Missing

HEADER = (
    "network", "method", "rate", "start", "seeds", "top-1 %", "best %", "paper %", "difference",
    "verdict", "MACs", "paper's", "same answer",
)  # fmt: skip
NOTE = (
    "top-1: of the compact network after the last epoch, mean ± sample standard deviation over the "
    "seeds. best: of the best epoch, chosen on the test images as the papers chose theirs. "
    "difference: ours after the last epoch minus the paper's; within a spread: no larger "
    "than that standard deviation. MACs: reduction, counted on the "
    "compact network; the paper's is its closed form with fractional channels. same answer: of the "
    "compact network and the zeroed one, share of the test images."
)


def row(cell: Cell) -> tuple[str, ...]:
    """A cell as the table shows it."""
    paper = cell.paper
    head = (cell.network, f"{cell.method} {cell.also}".strip(), cell.rate, cell.start)
    published = _published(cell)
    cut = "" if paper is None or paper.macs_reduction is None else _percent(-paper.macs_reduction)
    if cell.problem:
        return (*head, "", cell.problem, "", published, "", "", "", cut, "")
    last = cell.spread("accuracy", "compact_last")
    difference = ""
    if paper is not None and paper.top1 is not None and cell.comparable:
        difference = f"{_rounded(last.mean - paper.top1, 2):+.2f}"
    return (
        *head,
        ",".join(map(str, cell.seeds)),
        str(last),
        str(cell.spread("accuracy", "best", "zeroed")),
        published,
        difference,
        cell.verdict(),
        _percent(-cell.spread("reduction", "macs").mean),
        cut,
        _share(cell.spread("equivalence", "agreement")),
    )


def _percent(change: float) -> str:
    return f"{_rounded(change, 1):+.1f} %"


def _rounded(value: float, digits: int) -> float:
    """Nothing is +0.00, whichever side it comes from."""
    return round(value, digits) + 0.0


def _published(cell: Cell) -> str:
    paper = cell.paper
    return "" if paper is None or paper.top1 is None else str(Spread(paper.top1, paper.std))


def _share(agreement: Spread) -> str:
    """100 % only where it is all of them."""
    return "100 %" if agreement.mean == 1 else f"{min(100 * agreement.mean, 99.99):.2f} %"


def left_over(runs: Iterable[Found], lacking: Iterable[Missing]) -> list[str]:
    """What the table does not count: unfinished or unreadable runs, and missing ones."""
    lines = [f"not counted: {run.directory}: {run.problem}" for run in runs if run.problem]
    return lines + [f"missing: {one.command}   ({one.state})" for one in lacking]


def aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines with the columns one below the other; empty columns are left out."""
    used = [i for i in range(len(rows[0])) if any(row[i] for row in rows[1:])]
    widths = {i: max(len(row[i]) for row in rows) for i in used}
    return ["  ".join(row[i].ljust(widths[i]) for i in used).rstrip() for row in rows]


def comma_separated(table: Iterable[Cell]) -> str:
    """One row a cell, numbers with all their digits."""
    text = io.StringIO()
    writer = csv.DictWriter(text, fieldnames=list(CSV), lineterminator="\n")
    writer.writeheader()
    writer.writerows(_numbers(cell) for cell in table)
    return text.getvalue()


CSV = (
    "network", "method", "rate", "start", "also", "seeds", "top1_mean", "top1_std", "best_mean",
    "best_std", "paper_top1", "paper_std", "paper_trust", "paper_note", "verdict", "macs",
    "macs_reduction", "paper_macs_reduction", "params", "agreement", "max_abs_diff", "problem",
    "directories",
)  # fmt: skip


def _numbers(cell: Cell) -> dict[str, Any]:
    paper = cell.paper
    values: dict[str, Any] = {
        "network": cell.network, "method": cell.method, "rate": cell.rate, "start": cell.start,
        "also": cell.also, "seeds": " ".join(map(str, cell.seeds)), "problem": cell.problem,
        "directories": " ".join(str(run.directory) for run in cell.runs),
    }  # fmt: skip
    if paper is not None:
        values |= {
            "paper_top1": paper.top1, "paper_std": paper.std, "paper_trust": paper.trust,
            "paper_note": paper.note, "paper_macs_reduction": paper.macs_reduction,
        }  # fmt: skip
    if cell.problem is None:
        last = cell.spread("accuracy", "compact_last")
        best = cell.spread("accuracy", "best", "zeroed")
        values |= {
            "top1_mean": last.mean, "top1_std": last.std, "best_mean": best.mean,
            "best_std": best.std, "verdict": cell.verdict(),
            "macs": cell.spread("compact", "macs").mean,
            "macs_reduction": cell.spread("reduction", "macs").mean,
            "params": cell.spread("compact", "params").mean,
            "agreement": cell.spread("equivalence", "agreement").mean,
            "max_abs_diff": cell.spread("equivalence", "max_abs_diff").mean,
        }  # fmt: skip
    return values


def markdown(table: Sequence[Cell], runs: Sequence[Found], lacking: Sequence[Missing]) -> str:
    """summary.md."""
    rows = [HEADER, *map(row, table)]
    used = [i for i in range(len(HEADER)) if any(r[i] for r in rows[1:])]
    lines = ["# Runs", "", NOTE, ""]
    for index, cells_ in enumerate(rows):
        lines.append("| " + " | ".join(cells_[i].replace("|", "\\|") for i in used) + " |")
        if index == 0:
            lines.append("|" + "---|" * len(used))
    uncounted = [run for run in runs if run.problem]
    if uncounted:
        lines += ["", "## Not counted", ""]
        lines += [f"- `{run.directory}`: {run.problem}" for run in uncounted]
    if lacking:
        lines += ["", "## Missing", ""]
        lines += [f"- `{one.command}` ({one.state})" for one in lacking]
    return "\n".join([*lines, ""])
