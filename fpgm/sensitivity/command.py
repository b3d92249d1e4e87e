"""`fpgm-sensitivity`: what accuracy is left when one layer alone loses filters, layer by layer."""

from __future__ import annotations

import argparse
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from fpgm.errors import Error

if TYPE_CHECKING:
    from fpgm.sensitivity.examine import Settings, Study

EPILOG = """\
fpgm-sensitivity outputs/baseline --criteria l1,gm
fpgm-sensitivity outputs/baseline --budget macs=0.5     and rates, for fpgm-train rates=FILE
"""
RATES = "0.1,0.2,0.3,0.4,0.5,0.6,0.7,0.8,0.9"


def parser() -> argparse.ArgumentParser:
    """The command line."""
    words = argparse.ArgumentParser(
        prog="fpgm-sensitivity", description=__doc__, epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    add = words.add_argument
    add("run", type=Path, metavar="RUN", help="a finished run, of an unpruned network as a rule")
    add("--criteria", metavar="NAME,...", help="by which filters go, default: the run's")
    add("--rates", default=RATES, metavar="RATE,...", help="of a layer, default: 0.1 to 0.9")
    add("--residual", default="independent", help="what goes together, as in fpgm-train")
    add("--images", type=int, default=2000, metavar="N", help="to measure on, default: 2000")
    add("--bn-batches", type=int, default=10, metavar="N",
        help="of training images to estimate BatchNorm on again, default: 10")  # fmt: skip
    add("--budget", metavar="macs=SHARE", help="write rates.yaml: rates under a share of the MACs")
    add("--align", type=int, default=1, metavar="N",
        help="with --budget: kept counts are multiples of it, default: 1")  # fmt: skip
    add("--out", type=Path, metavar="DIR", help="default: sensitivity/ in the run directory")
    return words


def settings(words: argparse.Namespace) -> Settings:
    """What is asked for. Raises Error."""
    from fpgm.graph.groups import RESIDUAL
    from fpgm.sensitivity.examine import Settings

    for flag, value in (
        ("--images", words.images), ("--bn-batches", words.bn_batches), ("--align", words.align),
    ):  # fmt: skip
        if value < 1:
            raise Error(f"{flag} {value}: must be at least 1")
    if words.residual not in RESIDUAL:
        raise Error(f"--residual {words.residual}: choose one of {', '.join(RESIDUAL)}")
    names = () if words.criteria is None else tuple(map(str.strip, words.criteria.split(",")))
    return Settings(
        tuple(dict.fromkeys(names)), _rates(words.rates), words.residual, words.images,
        words.bn_batches, _limit(words.budget), words.align,
    )  # fmt: skip


def _rates(words: str) -> tuple[float, ...]:
    try:
        rates = sorted({float(word) for word in words.split(",")})
    except ValueError:
        rates = [0.0]
    if not all(0 < rate < 1 for rate in rates):
        raise Error(f"--rates {words}: shares above 0 and below 1, for example --rates 0.2,0.4,0.6")
    return tuple(rates)


def _limit(words: str | None) -> float | None:
    if words is None:
        return None
    key, _, value = words.partition("=")
    try:
        share = float(value)
    except ValueError:
        share = 0.0
    if key != "macs" or not 0 < share <= 1:
        raise Error(f"--budget {words}: a share of the dense MACs, for example --budget macs=0.5")
    return share


def write(study: Study, directory: Path) -> list[Path]:
    """sensitivity.csv, sensitivity.html, and rates.yaml where there was a budget. Returns their
    paths. Raises OSError."""
    from fpgm.report.table import comma_separated
    from fpgm.runs.files import write_text
    from fpgm.sensitivity.drawing import html

    files = {"sensitivity.html": html(study), "sensitivity.csv": comma_separated(study.table)}
    files |= {"rates.yaml": study.rates} if study.rates else {}
    directory.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        write_text(directory / name, text)
    return [directory / name for name in files]


def sensitivity(words: argparse.Namespace, command: str) -> list[str]:
    """Measure a run's layers and write what was found. Returns what is to be said of it.

    Raises Error and OSError.
    """
    asked = settings(words)
    from fpgm.sensitivity.examine import examine
    from fpgm.sensitivity.subject import find

    study = examine(find(words.run), asked, command)
    page, *others = write(study, words.out or words.run / "sensitivity")
    lines = [*study.summary, f"{page} shows it all, beside it {', '.join(p.name for p in others)}"]
    if study.plan is not None:
        about = "".join(f" {key}={value}" for key, value in study.about.items())
        lines.append(f"fpgm-train{about} rates={others[-1]} prunes so")
    return lines


def main(argv: list[str] | None = None) -> None:
    """Entry point of fpgm-sensitivity."""
    given = sys.argv[1:] if argv is None else argv
    words = parser().parse_args(given)
    try:
        lines = sensitivity(words, shlex.join(["fpgm-sensitivity", *given]))
    except (Error, OSError) as error:
        print(f"fpgm-sensitivity: {error}", file=sys.stderr)
        sys.exit(1)
    print("\n".join(lines))
