"""`fpgm-study`: do pruning criteria agree on a network, and can they tell its filters apart?"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fpgm.errors import Error
from fpgm.study.settings import LAYERS, NORMALISE, SCOPES, Settings, numbers

TABLES = (
    "layers", "left_out", "pairs", "criteria", "similarity", "overlap", "applicability", "cuts",
    "collapse", "distribution", "diagnosis",
)  # fmt: skip
EPILOG = """\
fpgm-study outputs/my_run                            a finished run, data-driven criteria included
fpgm-study checkpoint.pt --arch resnet56             a checkpoint of fpgm, or a plain state_dict
fpgm-study --arch resnet50 --weights torchvision     torchvision's; without --weights a random start
"""


def write(study: Mapping[str, Any], directory: Path) -> None:
    """study.json, study.html, and a CSV for each table that is not empty; one of that name that an
    earlier study left is removed. Raises OSError."""
    from fpgm.report.table import comma_separated
    from fpgm.runs.files import write_text
    from fpgm.study.drawing import html

    directory.mkdir(parents=True, exist_ok=True)
    norms = [{"layer": e["layer"], "norm": norm} for e in study["norms"] for norm in e["norms"]]
    for name, rows in {**{name: study[name] for name in TABLES}, "norms": norms}.items():
        if rows:
            write_text(directory / f"{name}.csv", comma_separated(rows))
        else:
            (directory / f"{name}.csv").unlink(missing_ok=True)
    write_text(directory / "study.html", html(study))
    write_text(directory / "study.json", json.dumps(study, indent=1, allow_nan=False) + "\n")


def parser() -> argparse.ArgumentParser:
    """The command line; names and defaults of most flags are those of Settings."""
    words = argparse.ArgumentParser(
        prog="fpgm-study", description=__doc__, epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    add = words.add_argument
    add("network", nargs="?", type=Path, metavar="RUN", help="run directory, or a checkpoint")
    add("--arch", metavar="NAME", help="network of a plain state_dict, or one to build")
    add("--weights", metavar="torchvision", help="torchvision's ImageNet weights for --arch")
    add("--criteria", type=_names, help="default: all that the network and its images can serve")
    add("--scope", type=_names, dest="scopes", help=f"default: {','.join(SCOPES)}")
    add("--rates", type=_rates, help="shares of filters to prune, default: 0.1 to 0.7")
    add("--normalise", metavar="|".join(NORMALISE), help="layers in one ranking, default: mean")
    add("--layers", metavar="|".join(LAYERS), help="default: prunable, those that fpgm prunes")
    add("--data", type=Path, metavar="DIR", help="images: a run directory, or train/CLASS/* in DIR")
    add("--image-size", type=int, metavar="PIXELS", help="that the images of DIR are scaled to")
    add("--out", type=Path, metavar="DIR", help="default: study/ in the run directory, or here")
    for flag, setting in numbers().items():
        what = f"{setting.metadata['what']}, default: {setting.default:g}"
        add(flag, type=type(setting.default), metavar="N", help=what)
    return words


def _names(words: str) -> tuple[str, ...]:
    return tuple(word.strip() for word in words.split(","))


def _rates(words: str) -> tuple[float, ...]:
    return tuple(sorted(float(word) for word in words.split(",")))


def study(words: argparse.Namespace) -> Path:
    """Examine the network and write the study; returns the directory. Prints the ten lines."""
    values = {field.name: getattr(words, field.name) for field in dataclasses.fields(Settings)}
    settings = Settings(**{name: value for name, value in values.items() if value is not None})
    run = words.network is not None and words.network.is_dir()
    directory: Path = words.out or (words.network / "study" if run else Path("study"))
    from fpgm.criteria import CRITERIA
    from fpgm.study.examine import examine
    from fpgm.study.subject import find

    reading = {name for name, criterion in CRITERIA.items() if criterion.reads_images}
    subject = find(
        words.network, words.arch, words.weights, words.data, words.image_size, settings.seed,
        not settings.criteria or bool(reading.intersection(settings.criteria)),
    )  # fmt: skip
    result = examine(subject, settings)
    write(result, directory)
    print("\n".join(result["summary"]))
    return directory


def main(argv: list[str] | None = None) -> None:
    """Entry point of fpgm-study."""
    words = parser().parse_args(argv)
    try:
        directory = study(words)
    except (Error, OSError) as error:
        print(f"fpgm-study: {error}", file=sys.stderr)
        sys.exit(1)
    print(f"{directory / 'study.html'} shows it all; study.json and the CSV files hold the numbers")
