"""`fpgm-report`: many runs as one table, the papers' figures beside ours. No torch."""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Sequence
from pathlib import Path

from fpgm import page
from fpgm.errors import Error
from fpgm.report import controls, standings, sweep
from fpgm.report.cells import Cell, baseline_of, cells
from fpgm.report.collect import collect, missing
from fpgm.report.drawing import html
from fpgm.report.table import Together, aligned, comma_separated, markdown, numbers, rows
from fpgm.runs.files import write_bytes, write_text


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point. Exit status: 0 done, 1 an error in one line."""
    parser = argparse.ArgumentParser(
        prog="fpgm-report",
        description="A table of runs, mean ± std over seeds, beside the papers' figures; written "
        "as summary.md, summary.csv and summary.html too.",
    )
    parser.add_argument("directories", nargs="+", type=Path, metavar="DIR", help="of runs")
    parser.add_argument(
        "--x", metavar="KEY", help="also show the accuracy over a key, such as schedule.interval"
    )
    parser.add_argument("--out", type=Path, help="where the files go (default: the first DIR)")
    options = parser.parse_args(arguments)
    try:
        print(report(options.directories, options.out or options.directories[0], options.x))
    except Error as error:
        sys.exit(str(error))
    except OSError as error:
        sys.exit(f"{error.filename}: {error.strerror}; choose another place with --out")


def report(directories: Sequence[Path], out: Path, key: str | None = None) -> str:
    """Write the files into `out`; returns the terminal's table. key: of the configuration, over
    which the accuracy is shown too. Raises Error, OSError."""
    runs = collect(directories)
    table, lacking = cells(runs), missing(directories, runs)
    swept = sweep.sweep(table, key) if key else None
    by_key = (swept.key, sweep.rows(swept)) if swept else None
    beside = _held_together(table)
    out.mkdir(parents=True, exist_ok=True)
    write_text(
        out / "summary.csv",
        comma_separated([numbers(cell, baseline_of(cell, table)) for cell in table]),
    )
    write_text(out / "summary.md", markdown(table, runs, lacking, by_key, beside))
    write_text(out / "summary.html", html(table, runs, lacking, swept, beside))
    lines = [*(aligned(*rows(table)) if table else ["no run is done yet"]), ""]
    for title, _, held in beside:
        lines += [f"{title.lower()}:", *aligned(*held), ""]
    lines += [f"not counted: {run.directory}: {run.problem}" for run in runs if run.problem]
    lines += [f"missing: {one.command}   ({one.state})" for one in lacking]
    files = ["summary.html", "summary.md", "summary.csv"]
    if swept and by_key:
        files.append(re.sub(r"[^\w.-]", "_", f"by_{swept.key}.svg"))
        write_bytes(out / files[-1], page.svg(sweep.figure(swept), swept.key).encode())
        lines += [*aligned(*by_key[1]), ""]
    return "\n".join([*lines, f"written: {out}/{', '.join(files)}"])


def _held_together(table: Sequence[Cell]) -> list[Together]:
    """The cells beside their controls, and in order where there is one to make."""
    compared, ordered = controls.comparisons(table), standings.standings(table)
    found: list[Together] = []
    if compared:
        found.append(("Against the controls", controls.NOTE, controls.rows(compared)))
    if ordered:
        found.append(("In order", standings.NOTE, standings.rows(ordered)))
    return found
