"""`fpgm-report`: many runs as one table, the papers' figures beside ours. No torch."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from fpgm.errors import Error
from fpgm.report.cells import cells
from fpgm.report.collect import collect, missing
from fpgm.report.drawing import html
from fpgm.report.table import aligned, comma_separated, markdown, numbers
from fpgm.runs.files import write_text


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point. Exit status: 0 done, 1 an error in one line."""
    parser = argparse.ArgumentParser(
        prog="fpgm-report",
        description="A table of runs, mean ± std over seeds, beside the papers' figures; written "
        "as summary.md, summary.csv and summary.html too.",
    )
    parser.add_argument("directories", nargs="+", type=Path, metavar="DIR", help="of runs")
    parser.add_argument("--out", type=Path, help="where the files go (default: the first DIR)")
    options = parser.parse_args(arguments)
    try:
        print(report(options.directories, options.out or options.directories[0]))
    except Error as error:
        sys.exit(str(error))
    except OSError as error:
        sys.exit(f"{error.filename}: {error.strerror}; choose another place with --out")


def report(directories: Sequence[Path], out: Path) -> str:
    """Write the files into `out`; returns the terminal's table. Raises Error, OSError."""
    runs = collect(directories)
    table, lacking = cells(runs), missing(directories, runs)
    out.mkdir(parents=True, exist_ok=True)
    write_text(out / "summary.csv", comma_separated([numbers(cell) for cell in table]))
    write_text(out / "summary.md", markdown(table, runs, lacking))
    write_text(out / "summary.html", html(table, runs, lacking))
    lines = [*(aligned(table) if table else ["no run is done yet"]), ""]
    lines += [f"not counted: {run.directory}: {run.problem}" for run in runs if run.problem]
    lines += [f"missing: {one.command}   ({one.state})" for one in lacking]
    return "\n".join([*lines, f"written: {out}/summary.html, summary.md, summary.csv"])
