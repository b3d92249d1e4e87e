"""`fpgm-study`: do pruning criteria agree on a network, and can they tell its filters apart?"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fpgm.errors import Error
from fpgm.study.settings import LAYERS, NORMALISE, Settings, numbers

TABLES = (
    "layers", "left_out", "pairs", "criteria", "similarity", "overlap", "applicability",
    "stability", "collapse", "assumption", "diagnosis", "ranks",
)  # fmt: skip
EPILOG = """\
fpgm-study outputs/my_run                            a finished run, data-driven criteria included
fpgm-study checkpoint.pt --arch resnet56             a checkpoint of fpgm, or a plain state_dict
fpgm-study --arch resnet50 --weights torchvision     torchvision's; without --weights a random start
fpgm-study run_a run_b run_c --out DIR               several networks, and one table over them
fpgm-study --arch resnet18,vgg16_bn --out DIR        the same of several architectures
fpgm-study --alike outputs/criteria                  do similar rankings give similar networks?
"""


def write(study: Mapping[str, Any], directory: Path) -> None:
    """study.json, study.html, and the tables. Raises OSError."""
    from fpgm.runs.files import write_text
    from fpgm.study.drawing import html

    _written(directory, "study.html", html(study), {name: study[name] for name in TABLES})
    # A row for each filter and criterion is for the CSV alone.
    plain = {key: value for key, value in study.items() if key != "ranks"}
    write_text(directory / "study.json", json.dumps(plain, indent=1, allow_nan=False) + "\n")


def parser() -> argparse.ArgumentParser:
    """The command line; names and defaults of most flags are those of Settings."""
    words = argparse.ArgumentParser(
        prog="fpgm-study", description=__doc__, epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    add = words.add_argument
    add("networks", nargs="*", type=Path, metavar="RUN", help="run directories, or checkpoints")
    add(
        "--arch",
        type=_names,
        default=(),
        metavar="NAME,...",
        help="network of a plain state_dict, or those to build",
    )
    add(
        "--weights",
        metavar="random|torchvision|RUN",
        help="of --arch: a random start (default), torchvision's, or those of a run or checkpoint",
    )
    add("--alike", action="store_true", help="compare runs that differ in the criterion instead")
    add("--criteria", type=_names, help="default: all that the network and its images can serve")
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


def _rates(words: str) -> tuple[float, ...]:
    try:
        return tuple(sorted(float(word) for word in words.split(",")))
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{words}: shares, for example 0.1,0.4") from error


def _names(words: str) -> tuple[str, ...]:
    return tuple(word.strip() for word in words.split(","))


def study(words: argparse.Namespace) -> Path:
    """Examine the networks and write the study; returns its page. Prints the ten lines of one
    network, or a line for each of several: what cannot be studied is named and left out."""
    if words.alike:
        return _alike(words)
    values = {field.name: getattr(words, field.name) for field in dataclasses.fields(Settings)}
    settings = Settings(**{name: value for name, value in values.items() if value is not None})
    asked = _asked(words)
    run = asked[0][0] if asked[1:] == [] and asked[0][0] and asked[0][0].is_dir() else None
    directory: Path = words.out or (run / "study" if run else Path("study"))
    from fpgm.study.drawing import overview
    from fpgm.study.statistics.tables import networks
    from fpgm.study.summary import several

    if not asked[1:]:
        only = _examine(words, *asked[0], settings)
        write(only, directory)
        print("\n".join(only["summary"]))
        return directory / "study.html"
    done: dict[str, Mapping[str, Any]] = {}
    for path, arch in asked:
        name = _unused(_name(path) if path else str(arch), done)
        try:
            result = _examine(words, path, arch, settings)
        except (Error, OSError) as error:
            print(f"{name} is left out: {error}", file=sys.stderr)
            continue
        write(result, directory / name)
        # What the table over the networks reads.
        keys = ("network", "layers", "settings", "pairs", "assumption", "diagnosis")
        done[name] = {key: result[key] for key in keys}
    if not done:
        raise Error("none of the networks can be studied")
    rows = networks([*done.values()])
    lines = several(rows, [*done.values()])
    print("\n".join(lines))
    page = overview(lines, rows, [f"{name}/study.html" for name in done])
    return _written(directory, "networks.html", page, {"networks": rows})


def _alike(words: argparse.Namespace) -> Path:
    from fpgm.study.alike import compare
    from fpgm.study.drawing import likeness

    for flag in ("arch", "weights", "criteria", "rates", "normalise", "layers", "image_size"):
        if getattr(words, flag):
            given = flag.replace("_", "-")
            raise Error(f"--{given}: not with --alike, where the runs say what was pruned and how")
    if not words.networks:
        raise Error("--alike: give the folder of runs, as in fpgm-study --alike outputs/criteria")
    found = compare(words.networks, words.data)
    for name, lines in found["lines"].items():
        print("\n".join([f"{name}:", *lines]))
    out = words.out or words.networks[0] / "alike"
    tables = {name: found[name] for name in ("criteria", "pairs")}
    return _written(out, "alike.html", likeness(found), tables)


def _written(directory: Path, name: str, page: str, tables: Mapping[str, Any]) -> Path:
    """The page and a CSV for each table that is not empty; one of that name that was left by
    something earlier is removed. Raises OSError."""
    from fpgm.report.table import comma_separated
    from fpgm.runs.files import write_text

    directory.mkdir(parents=True, exist_ok=True)
    for table, rows in tables.items():
        if rows:
            write_text(directory / f"{table}.csv", comma_separated(rows))
        else:
            (directory / f"{table}.csv").unlink(missing_ok=True)
    write_text(directory / name, page)
    return directory / name


def _asked(words: argparse.Namespace) -> list[tuple[Path | None, str | None]]:
    """The path and the architecture of each network. Raises Error."""
    if words.networks and words.arch[1:]:
        raise Error(f"--arch {','.join(words.arch)}: one name for all of the checkpoints given")
    if words.networks:
        return [(path, *words.arch) if words.arch else (path, None) for path in words.networks]
    return [(None, arch) for arch in words.arch] or [(None, None)]


def _examine(
    words: argparse.Namespace, path: Path | None, arch: str | None, settings: Settings
) -> dict[str, Any]:
    from fpgm.criteria import CRITERIA
    from fpgm.study.examine import examine
    from fpgm.study.subject import find

    seeing = {n for n, c in CRITERIA.items() if c.reads_images or c.needs_image}
    wanted = not settings.criteria or bool(seeing.intersection(settings.criteria))
    found = find(path, arch, words.weights, words.data, words.image_size, settings.seed, wanted)
    return examine(found, settings)


def _name(path: Path) -> str:
    return path.name if path.is_dir() else path.stem


def _unused(name: str, taken: Mapping[str, Any]) -> str:
    """A directory's name that no other network has."""
    others = (f"{name}-{count}" for count in itertools.count(2))
    return next(each for each in itertools.chain([name], others) if each not in taken)


def main(argv: list[str] | None = None) -> None:
    """Entry point of fpgm-study."""
    words = parser().parse_args(argv)
    try:
        page = study(words)
    except (Error, OSError) as error:
        print(f"fpgm-study: {error}", file=sys.stderr)
        sys.exit(1)
    print(f"{page} shows it all; the files beside it hold the numbers")
