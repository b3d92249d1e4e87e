"""`fpgm-figure`: figures of the FPGM paper for a network of yours, with the numbers behind them."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fpgm.errors import Error

if TYPE_CHECKING:
    from matplotlib.figure import Figure

EPILOG = """\
fpgm-figure norms outputs/my_run                  figure 3: do the norms suit a norm criterion?
fpgm-figure maps outputs/my_run --layer conv1     figure 5: are pruned maps replaceable?

Each writes a PNG, an SVG and a CSV.
"""
NORMS = "the norms of filters by layer, ideal beside real, and which filters are pruned (figure 3)"
MAPS = "the feature maps of a layer, pruned ones framed, and how replaceable they are (figure 5)"


def parser() -> argparse.ArgumentParser:
    """The command line."""
    words = argparse.ArgumentParser(
        prog="fpgm-figure", description=__doc__, epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    which = words.add_subparsers(dest="figure", metavar="norms|maps", required=True)
    norms = which.add_parser("norms", help=NORMS, description=NORMS)
    maps = which.add_parser("maps", help=MAPS, description=MAPS)
    for each, layers, criteria in (
        (norms, "NAME,... ; default: the first, the middle and the last", "gm,l2"),
        (maps, "default: the first", "gm,l2,random"),
    ):
        add = each.add_argument
        add("network", nargs="?", type=Path, metavar="RUN", help="run directory, or a checkpoint")
        add("--arch", metavar="NAME", help="network of a plain state_dict, or one to build")
        add("--weights", metavar="torchvision", help="torchvision's ImageNet weights for --arch")
        add("--layer", metavar="NAME", help=f"convolution; {layers}")
        add("--rate", type=float, default=0.1, help="share of its filters; default: %(default)g")
        add("--criteria", default=criteria, help="of weights alone; default: %(default)s")
        add("--out", type=Path, metavar="DIR", help="default: figures/ in the run, or here")
    add = maps.add_argument
    add("--images", type=int, metavar="N", help="training images for the R^2; default: enough")
    add("--image", type=int, default=0, metavar="I", help="which test image is drawn; default: 0")
    add("--draws", type=int, default=10, metavar="N", help="of chance; default: %(default)s")
    add("--data", type=Path, metavar="DIR", help="images: a run directory, or train/CLASS/* in DIR")
    add("--image-size", type=int, metavar="PIXELS", help="that the images of DIR are scaled to")
    return words


def norms(words: argparse.Namespace) -> list[Path]:
    """Draw figure 3; returns what was written. Prints a line for each layer."""
    from fpgm.figures import drawing
    from fpgm.figures import norms as figure
    from fpgm.figures.layer import check
    from fpgm.study.subject import find

    criteria = _names(words.criteria)
    check(words.rate, criteria)
    subject = find(words.network, words.arch, words.weights, None, None, 0, want_images=False)
    given = None if words.layer is None else _names(words.layer)
    found = figure.layers(subject.model, given, criteria, words.rate)
    print("\n".join(figure.summary(found)))
    picture = drawing.norms(found, subject.source, words.rate)
    return write(_directory(words), "norms", picture, figure.rows(found))


def maps(words: argparse.Namespace) -> list[Path]:
    """Draw figure 5; returns what was written. Prints the mean R^2 by criterion."""
    from fpgm.figures import drawing
    from fpgm.figures import maps as figure
    from fpgm.figures.layer import check
    from fpgm.study.subject import find

    criteria = _names(words.criteria)
    check(words.rate, criteria)
    if words.draws < 1:
        raise Error(f"--draws {words.draws}: must be at least 1")
    subject = find(
        words.network, words.arch, words.weights, words.data, words.image_size, 0, want_images=True
    )
    seen = figure.look(
        subject, words.layer, criteria, words.rate, words.images, words.image, words.draws
    )
    print("\n".join(figure.summary(seen, words.rate)))
    picture = drawing.maps(seen, subject.source, words.rate)
    return write(_directory(words), f"maps-{seen.filters.layer}", picture, seen.rows)


def write(
    directory: Path, name: str, picture: Figure, rows: Sequence[Mapping[str, Any]]
) -> list[Path]:
    """NAME.png, NAME.svg and NAME.csv in a directory. Raises OSError."""
    from fpgm.figures.drawing import save
    from fpgm.report.table import comma_separated
    from fpgm.runs.files import write_text

    directory.mkdir(parents=True, exist_ok=True)
    paths = [*save(picture, directory, name), directory / f"{name}.csv"]
    write_text(paths[-1], comma_separated(rows))
    return paths


def _directory(words: argparse.Namespace) -> Path:
    run = words.network is not None and words.network.is_dir()
    where: Path = words.out or (words.network / "figures" if run else Path("figures"))
    return where


def _names(words: str) -> list[str]:
    return [word.strip() for word in words.split(",")]


def main(argv: list[str] | None = None) -> None:
    """Entry point of fpgm-figure."""
    words = parser().parse_args(argv)
    try:
        paths = {"norms": norms, "maps": maps}[words.figure](words)
    except (Error, OSError) as error:
        print(f"fpgm-figure: {error}", file=sys.stderr)
        sys.exit(1)
    print(", ".join(map(str, paths)))
