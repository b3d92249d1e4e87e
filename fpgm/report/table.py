"""Cells as text: for the terminal, Markdown and CSV. No torch."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from typing import Any

from fpgm.report.cells import Cell, Spread, baseline_of
from fpgm.report.collect import Found, Missing

HEADER = (
    "network", "method", "rate", "start", "seeds", "first zeroing %", "held-out %", "top-1 %",
    "best %", "error reduction", "paper %", "difference", "verdict", "MACs", "paper's",
    "time, batch 1", "time, batch 128", "int8 top-1 %", "int8 time", "packed", "same answer",
)  # fmt: skip
NOTE = (
    "top-1: of the compact network after the last epoch, mean ± sample standard deviation over the "
    "seeds. first zeroing: of a trained network right after it was first pruned, before any "
    "training. held-out: on training images that were held out, of the last epoch. best: of the "
    "best epoch, chosen on these, and where there are none on the test images as the papers chose "
    "theirs. "
    "error reduction: (error of the baseline - error) / error of the baseline, of the means. "
    "difference: ours after the last epoch minus the paper's; within a spread: no larger "
    "than that standard deviation. MACs: reduction, counted on the "
    "compact network; the paper's is its closed form with fractional channels. time: the compact "
    "network's in ONNX Runtime, of the dense one's, where fpgm-latency has measured it; int8: of "
    "the compact network in int8 (fpgm-latency --int8), its time for a batch of 128 of the dense "
    "one's in float. packed: bytes of weights.bN, where the weights have few values. same "
    "answer: of the compact network and the zeroed one, share of the test images."
)
Shown = str | tuple[float, str]  # what it is sorted by, and how it is shown
Rows = tuple[list[str], list[list[Shown]]]  # header and body
Together = tuple[str, str, Rows]  # cells held against each other: a title, a note, a table


def rows(table: Sequence[Cell]) -> Rows:
    """The header and a row for each cell, without columns that are empty throughout."""
    full = [_row(cell, baseline_of(cell, table)) for cell in table]
    used = [i for i in range(len(HEADER)) if any(row[i] for row in full)]
    return [HEADER[i] for i in used], [[row[i] for i in used] for row in full]


def error_reduction(cell: Cell, baseline: Cell | None) -> float | None:
    """(error of the baseline - error) / error of the baseline, in percent, as in FPGM's abstract:
    (6.32 - 6.15) / 6.32 = 2.69 %."""
    if baseline is None:
        return None
    ours, theirs = (100 - c.spread("accuracy", "compact_last").mean for c in (cell, baseline))
    return 100 * (theirs - ours) / theirs if theirs else None


def _row(cell: Cell, baseline: Cell | None) -> tuple[Shown, ...]:
    paper = cell.paper
    head = (cell.network, f"{cell.method} {cell.also}".strip(), cell.rate, cell.start)
    published: Shown = ""
    if paper is not None and paper.top1 is not None:
        published = (paper.top1, str(Spread(paper.top1, paper.std)))
    cut = "" if paper is None or paper.macs_reduction is None else _percent(-paper.macs_reduction)
    if cell.problem:
        return (*head, "", "", "", cell.problem, "", "", published, "", "", "", cut, *[""] * 6)
    last, best = cell.spread("accuracy", "compact_last"), cell.spread("accuracy", "best", "zeroed")
    difference: Shown = ""
    if paper is not None and paper.top1 is not None and cell.comparable:
        value = _rounded(last.mean - paper.top1, 2)
        difference = (value, f"{value:+.2f}")
    held = cell.known("accuracy", "validation_last")
    first, fewer = cell.first_zeroing, error_reduction(cell, baseline)
    same = cell.spread("equivalence", "agreement").mean
    return (
        *head, ",".join(map(str, cell.seeds)), (first.mean, str(first)) if first else "",
        (held.mean, str(held)) if held else "", (last.mean, str(last)), (best.mean, str(best)),
        "" if fewer is None else _percent(fewer, 2), published, difference, cell.verdict(),
        _percent(-cell.spread("reduction", "macs").mean), cut, *map(_share, cell.times(1, 128)),
        (cell.int8.mean, str(cell.int8)) if cell.int8 else "",
        *map(_share, cell.times(128, of="compact_int8_ms")),
        (cell.packed.mean, f"{cell.packed.mean:,.0f}") if cell.packed else "",
        # 100 % only where it is all of them
        (same, "100 %" if same == 1 else f"{min(100 * same, 99.99):.2f} %"),
    )  # fmt: skip


def _share(time: Spread | None) -> Shown:
    return "" if time is None else (time.mean, f"{time.mean:.2f}")


def _percent(change: float, digits: int = 1) -> tuple[float, str]:
    return change, f"{_rounded(change, digits):+.{digits}f} %"


def _rounded(value: float, digits: int) -> float:
    """Nothing is +0.00, whichever side it comes from."""
    return round(value, digits) + 0.0


def text(shown: Shown) -> str:
    return shown if isinstance(shown, str) else shown[1]


def aligned(header: Sequence[str], body: Sequence[Sequence[Shown]]) -> list[str]:
    """Lines with the columns one below the other."""
    lines = [list(header), *([text(cell) for cell in row] for row in body)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    form = "  ".join(f"{{:{width}}}" for width in widths)
    return [form.format(*line).rstrip() for line in lines]


def markdown(
    table: Sequence[Cell],
    runs: Sequence[Found],
    lacking: Sequence[Missing],
    swept: tuple[str, Rows] | None = None,
    beside: Sequence[Together] = (),
) -> str:
    """summary.md. swept: what the cells are also shown by, and how; beside: them held against each
    other."""
    lines = ["# Runs", "", NOTE, "", *_lines(*rows(table))]
    for title, note, held in beside:
        lines += ["", f"## {title}", "", note, "", *_lines(*held)]
    if swept:
        key, by_key = swept
        lines += ["", f"## By {key}", "", *_lines(*by_key)]
    uncounted = [f"- `{run.directory}`: {run.problem}" for run in runs if run.problem]
    if uncounted:
        lines += ["", "## Not counted", "", *uncounted]
    if lacking:
        lines += ["", "## Missing", ""]
        lines += [f"- `{one.command}` ({one.state})" for one in lacking]
    return "\n".join([*lines, ""])


def _lines(header: Sequence[str], body: Sequence[Sequence[Shown]]) -> list[str]:
    """A table of Markdown."""
    lines = [f"| {' | '.join(header)} |", "|" + "---|" * len(header)]
    for row in body:
        lines.append("| " + " | ".join(text(cell).replace("|", "\\|") for cell in row) + " |")
    return lines


def comma_separated(rows: Sequence[Mapping[str, Any]]) -> str:
    """Rows with the keys of the first, numbers with all digits; what is undefined is empty."""
    content = io.StringIO()
    writer = csv.DictWriter(content, list(rows[0]) if rows else [], lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return content.getvalue()


def numbers(cell: Cell, baseline: Cell | None = None) -> dict[str, Any]:
    """A row of summary.csv. baseline: what the cell is held against."""
    last, best = ("accuracy", "compact_last"), ("accuracy", "best", "zeroed")
    means = {
        "top1_mean": last, "best_mean": best, "macs": ("compact", "macs"),
        "macs_reduction": ("reduction", "macs"), "params": ("compact", "params"),
        "agreement": ("equivalence", "agreement"), "max_abs_diff": ("equivalence", "max_abs_diff"),
    }  # fmt: skip
    ours: dict[str, Any] = {}
    if cell.problem is None:
        ours = {key: cell.spread(*entry).mean for key, entry in means.items()}
        ours |= {"top1_std": cell.spread(*last).std, "best_std": cell.spread(*best).std}
        ours["first_zeroing_mean"] = cell.first_zeroing and cell.first_zeroing.mean
        held, times = cell.known("accuracy", "validation_last"), cell.times(1, 128)
        ours["validation_mean"] = held and held.mean
        ours |= {f"time_{b}": t and t.mean for b, t in zip((1, 128), times, strict=True)}
        ours |= {"int8_top1": cell.int8 and cell.int8.mean}
        ours |= {"packed_bytes": cell.packed and cell.packed.mean}
        ours["error_reduction"] = error_reduction(cell, baseline)
    paper = cell.paper
    return {
        "network": cell.network, "method": cell.method, "rate": cell.rate, "start": cell.start,
        "also": cell.also, "seeds": " ".join(map(str, cell.seeds)),
        **{key: ours.get(key) for key in ("top1_mean", "top1_std", "best_mean", "best_std")},
        **{key: ours.get(key) for key in ("first_zeroing_mean", "error_reduction")},
        **{key: ours.get(key) for key in ("validation_mean", "time_1", "time_128")},
        **{key: ours.get(key) for key in ("int8_top1", "packed_bytes")},
        "paper_top1": paper and paper.top1, "paper_std": paper and paper.std,
        "paper_trust": paper and paper.trust, "paper_note": paper and paper.note,
        "verdict": cell.verdict(), "macs": ours.get("macs"),
        "macs_reduction": ours.get("macs_reduction"),
        "paper_macs_reduction": paper and paper.macs_reduction,
        **{key: ours.get(key) for key in ("params", "agreement", "max_abs_diff")},
        "problem": cell.problem,
        "directories": " ".join(str(run.directory) for run in cell.runs),
    }  # fmt: skip
