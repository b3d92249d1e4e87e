"""`fpgm-explain`: what of a network can be pruned, group by group, and what cannot, and why."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from fpgm.errors import Error

if TYPE_CHECKING:
    from fpgm.structure.parts import Structure

EPILOG = """\
fpgm-explain resnet56 --residual shared
fpgm-explain timm:mobilenetv3_large_100 --page network.html
fpgm-explain outputs/baseline --rate 0.4
PYTHONPATH=. fpgm-explain my_networks:build --image 1,28,28
"""
MODEL = """\
a network of fpgm or torchvision by its name, timm:NAME, package.module:function (yours, called
without arguments), a finished run, or a checkpoint that fpgm has written"""
RATE = 0.5


def parser() -> argparse.ArgumentParser:
    """The command line."""
    words = argparse.ArgumentParser(
        prog="fpgm-explain", description=__doc__, epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    add = words.add_argument
    add("model", metavar="MODEL", help=MODEL)
    add("--residual", default="independent", help="what goes together, as in fpgm-train")
    add("--ignore", action="append", default=[], metavar="PATTERN",
        help="layers that stay whole; may be given again")  # fmt: skip
    add("--image", metavar="C,H,W", help="default: what the network is made for")
    add("--rate", type=float, default=RATE, help=f"what it would come to at, default: {RATE}")
    add("--all", action="store_true", help="name every layer, however many a group has")
    add("--page", type=Path, metavar="FILE.html", help="write it all with the graph drawn")
    add("--json", action="store_true", help="print it as JSON")
    return words


def explain(words: argparse.Namespace) -> str:
    """What is to be printed of a network. Raises Error, also where nothing can be pruned, and
    OSError."""
    _check(words)
    from fpgm.structure.parts import take_apart, tried
    from fpgm.structure.subject import find, sized
    from fpgm.structure.text import as_json, text

    subject = find(words.model)
    image = sized(subject, words.image)
    try:
        structure = take_apart(subject, image, words.residual, words.ignore)
        if structure.bundles:
            structure = tried(structure, subject.model, words.rate)
    except Error as error:
        raise Error(f"{words.model}: {error}") from error
    written = ""
    if words.page is not None:
        from fpgm.runs.files import write_text
        from fpgm.structure.drawing import html

        words.page.parent.mkdir(parents=True, exist_ok=True)
        write_text(words.page, html(structure))
        written = f"{words.page} shows it all, with the graph drawn"
    if not structure.bundles:
        raise Error(f"{words.model}: {_nothing(structure)}{written and f'; {written}'}")
    if words.json:
        return as_json(structure)
    return "\n\n".join([text(structure, words.all), *filter(None, [written])])


def _check(words: argparse.Namespace) -> None:
    """Raise Error for a value that is none."""
    from fpgm.graph.groups import RESIDUAL

    if words.residual not in RESIDUAL:
        raise Error(f"--residual {words.residual}: choose one of {', '.join(RESIDUAL)}")
    if not 0 <= words.rate < 1:
        raise Error(f"--rate {words.rate:g}: at least 0 and below 1, for example --rate 0.4")
    if words.page is not None and words.page.suffix != ".html":
        raise Error(f"--page {words.page}: a file that ends in .html")


def _nothing(structure: Structure) -> str:
    """Why nothing can be pruned: the first reason of all."""
    if not structure.whole:
        return "nothing can be pruned: it has no convolution"
    first = structure.whole[0]
    where = f" ({first.place})" if first.place is not None else ""
    return f"nothing can be pruned, {first.layer} first: {first.reason}{where}"


def main(argv: list[str] | None = None) -> None:
    """Entry point of fpgm-explain. Exit status 1: an error, or nothing that can be pruned."""
    words = parser().parse_args(argv)
    try:
        print(explain(words))
    except (Error, OSError) as error:
        print(f"fpgm-explain: {error}", file=sys.stderr)
        sys.exit(1)
