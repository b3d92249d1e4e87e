"""`fpgm-evaluate`: what a run's networks are worth, on its own test images or on others."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import hydra
import torch
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf
from torch import nn

from fpgm import config
from fpgm.cli.command import quoted
from fpgm.cli.explain import explain
from fpgm.compaction.compact import load
from fpgm.data import sets
from fpgm.data.images import Images
from fpgm.errors import Error, told
from fpgm.graph.cost import cost
from fpgm.keys import CONFIGS
from fpgm.machine.device import choose_device
from fpgm.networks import models
from fpgm.runs import checkpoint
from fpgm.runs.run import read_config
from fpgm.training.evaluate import accuracy, logits

EXAMPLES = """\
fpgm-evaluate RUN                                            both networks of a finished run
fpgm-evaluate RUN/compact.pt dataset.root=DIR                its data set, from another place
fpgm-evaluate RUN dataset=image_folder dataset.root=DIR      other images of the same classes
"""
_OF_RUNS = ("compact.pt", "zeroed.pt")
_STATES = ("last.pt", "previous.pt")  # of a run that is not done


@dataclass(frozen=True)
class Row:
    """A checkpoint's accuracy on all test images in percent, MACs for one image, the file's
    bytes."""

    file: str
    accuracy: float
    macs: int
    params: int
    bytes: int


@dataclass(frozen=True)
class Result:
    """dataset: its name; image: (C, H, W); images: how many; notes: what is to be known."""

    dataset: str
    image: tuple[int, int, int]
    images: int
    rows: list[Row]
    notes: list[str]


def evaluate(where: Path, words: Sequence[str]) -> Result:
    """A run directory's networks, or a checkpoint, on the data set that the words name, else on the
    run's own; normalised as the network has been trained. Raises Error and those of what it reads.
    """
    paths = _checkpoints(where)
    contents = [checkpoint.read(path, ("arch", "preprocessing")) for path in paths]
    made = contents[0]["preprocessing"]
    given = _given(words)
    values = _dataset(paths[0].parent, given, made)
    images = sets.load(choose_device("auto"), **config.dataset(values).model_dump())
    notes = _differences(made, images)
    if not given.keys() & {"mean", "std"}:
        images = images.normalised_by(made["mean"], made["std"])
    rows = []
    for path, content in zip(paths, contents, strict=True):
        network = _network(path, content)
        _check(path, network, images)
        rows.append(_row(path, network, images))
    return Result(values["name"], images.image_shape, images.counts[1], rows, notes)


def _checkpoints(where: Path) -> list[Path]:
    """The networks of a finished run, of another the state that it stands at; or the file."""
    if not where.is_dir():
        return [where]
    read_config(where)
    for names in (_OF_RUNS, _STATES[:1]):
        there = [where / name for name in names if (where / name).exists()]
        if there:
            return there
    raise Error(f"{where}: no {', '.join((*_OF_RUNS, _STATES[0]))} there: nothing is trained yet")


def _network(path: Path, content: Mapping[str, Any]) -> nn.Module:
    """In eval mode: what was shipped, or the network at full width as an epoch has left it."""
    if "model" not in content:
        return load(path)
    network = models.model(**content["arch"])
    checkpoint.fit(network, content["model"], str(path))
    return network.eval()


def _row(path: Path, network: nn.Module, images: Images) -> Row:
    counted = cost(network, images.image_shape)
    on_device = network.to(images.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    top1 = accuracy(*logits(on_device, images))
    return Row(str(path), top1, counted.macs, counted.params, path.stat().st_size)


def _given(words: Sequence[str]) -> dict[str, Any]:
    """Keys of a data set and their values; "" is the one that is chosen. Raises Error."""
    given = {}
    for word in OverridesParser.create().parse_overrides([quoted(word) for word in words]):
        group, _, key = word.key_or_group.partition(".")
        if group != "dataset" or word.is_sweep_override() or word.is_delete():
            raise Error(f"{word.input_line}: give dataset=NAME and dataset.KEY=VALUE")
        given[key] = word.value()
    return given


def _dataset(directory: Path, given: Mapping[str, Any], made: Mapping[str, Any]) -> dict[str, Any]:
    """All keys: of the data set that is named, else of the run's own, and those given. Images that
    have no size of their own get that which the network was trained on."""
    if "" in given:
        values = _composed(f"dataset={given['']}")
    elif (directory / "config.yaml").exists():
        values = dict(read_config(directory)["dataset"])
    else:
        raise Error(f"{directory}: no config.yaml beside it; on which images? dataset=NAME")
    if values["name"] in ("image_folder", "imagenet"):
        values["image_size"] = made["image_shape"][1]
    return values | {key: value for key, value in given.items() if key}


def _composed(word: str) -> dict[str, Any]:
    GlobalHydra.instance().clear()
    with hydra.initialize_config_dir(str(CONFIGS), version_base="1.3"):
        composed = hydra.compose("config", overrides=[word])
    return dict(OmegaConf.to_container(composed.dataset, resolve=True))  # type: ignore[arg-type]


def _differences(made: Mapping[str, Any], images: Images) -> list[str]:
    """What is other than where the network was trained. Raises Error for other classes, and for
    another number of channels."""
    theirs, ours = list(made["classes"]), list(images.classes)
    if len(theirs) != len(ours) or (theirs != ours and sorted(theirs) == sorted(ours)):
        order = " in another order" if len(theirs) == len(ours) else ""
        raise Error(
            f"the network tells {len(theirs)} classes ({_few(theirs)}), the data set has "
            f"{len(ours)} ({_few(ours)}){order}; give one of the same classes with dataset="
        )
    notes = []
    if theirs != ours:
        notes.append(f"classes are called {_few(ours)} here, {_few(theirs)} where it was trained")
    shape = tuple(made["image_shape"])
    if shape[0] != images.image_shape[0]:
        raise Error(
            f"the network takes images of {shape[0]} channels, the data set has "
            f"{images.image_shape[0]}; give one of the same images with dataset="
        )
    if shape != images.image_shape:
        notes.append(f"images of {_by(images.image_shape)}, trained on {_by(shape)}")
    return notes


def _check(path: Path, network: nn.Module, images: Images) -> None:
    """Raise Error where the network does not take these images."""
    try:
        with torch.inference_mode():
            network(torch.zeros(1, *images.image_shape))
    except Exception as error:  # a network of one's own may raise anything
        raise Error(
            f"{path}: does not take images of {_by(images.image_shape)} ({told(error)})"
        ) from error


def _few(names: Sequence[str]) -> str:
    return ", ".join(names) if len(names) <= 4 else f"{', '.join(names[:3])}, ..."


def _by(shape: Sequence[int]) -> str:
    return "x".join(map(str, shape))


def text(result: Result) -> str:
    """A line for each network, below what it was asked."""
    head = f"{result.images} test images of {result.dataset}, {_by(result.image)}"
    table = [["", "accuracy", "MACs", "parameters", "bytes"]]
    for row in result.rows:
        counts = [f"{count:,}" for count in (row.macs, row.params, row.bytes)]
        table.append([row.file, f"{row.accuracy:.2f} %", *counts])
    widths = [max(len(line[i]) for line in table) for i in range(5)]
    lines = [
        "  ".join([line[0].ljust(widths[0]), *(line[i].rjust(widths[i]) for i in range(1, 5))])
        for line in table
    ]
    return "\n".join([head, *(f"note: {note}" for note in result.notes), *lines])


def main(argv: list[str] | None = None) -> None:
    """Entry point of fpgm-evaluate."""
    parser = argparse.ArgumentParser(
        "fpgm-evaluate", description=f"{__doc__}\n\n{EXAMPLES}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("where", type=Path, metavar="RUN|CHECKPOINT", help="a run directory: all")
    parser.add_argument("words", nargs="*", metavar="dataset=...", help="as for fpgm-train")
    parser.add_argument("--json", action="store_true", help="the same as JSON")
    words = parser.parse_intermixed_args(argv)
    try:
        result = evaluate(words.where, words.words)
    except Exception as error:
        print(f"fpgm-evaluate: {explain(error)}", file=sys.stderr)
        sys.exit(1)
    print(json.dumps(asdict(result), indent=2) if words.json else text(result))
