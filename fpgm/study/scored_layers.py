"""Every layer of a network with its scores, and what could not be scored, by name."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
from torch import Tensor

from fpgm.criteria import CRITERIA
from fpgm.criteria.evidence import DATA, NEEDS, RANK_IMAGES, gather, missing
from fpgm.data.images import Images
from fpgm.errors import Error
from fpgm.study.scoring import Layer, convolutions, live_layers, score, score_with
from fpgm.study.settings import Settings
from fpgm.study.subject import Subject

Watch = Callable[[str, list[Any]], Iterable[Any]]  # shows how far a loop is, as tqdm does


def scored_layers(
    subject: Subject, settings: Settings, notes: list[str], watch: Watch
) -> tuple[list[Layer], list[str], dict[str, str]]:
    """The layers with their scores, the criteria that tell filters apart, and why other layers are
    left out. `notes` gets a line for all else that is left out.

    Raises Error.
    """
    names, left = convolutions(subject.model, settings.layers == "all")
    layers, few = live_layers(subject.model, names)
    left.update(few)
    if not layers:
        raise Error(
            f"no layer to study ({_reasons(left)}); --layers all takes every convolution with 4 "
            "filters or more"
        )
    criteria = _chosen(settings, subject, notes)
    _score(subject, layers, criteria, settings, notes, watch)
    return layers, _telling(layers, criteria, notes), left


def _reasons(left: dict[str, str]) -> str:
    """The commonest reason why layers are left out."""
    if not left:
        return "no convolutions"
    reason, count = Counter(left.values()).most_common(1)[0]
    return f"{count} of {len(left)}: {reason}"


def _chosen(settings: Settings, subject: Subject, notes: list[str]) -> list[str]:
    """The criteria to compute; what cannot be is named in `notes`."""
    for name in settings.criteria:
        if name not in CRITERIA:
            choices = ", ".join(c for c in CRITERIA if c != "mix")
            raise Error(f"--criteria {name}: choose from {choices}")
    wanted = settings.criteria or tuple(name for name in CRITERIA if name not in ("mix", "random"))
    without = [name for name in wanted if name in DATA and subject.images is None]
    if without:
        notes.append(f"{', '.join(without)} (no images: {subject.no_images})")
    return [name for name in wanted if name not in without]


def _score(
    subject: Subject,
    layers: list[Layer],
    criteria: list[str],
    settings: Settings,
    notes: list[str],
    watch: Watch,
) -> None:
    """Fill in every layer's scores; `notes` gets what could not be scored."""
    needing = [name for name in criteria if name in NEEDS]
    for name in needing:
        lacking = missing(subject.model, name, [layer.name for layer in layers])
        if lacking:
            part = "BatchNorm" if name in ("bn_gamma", "taylor") else "ReLU"
            notes.append(f"{name} in layers without {part} ({', '.join(lacking)})")
    evidence = _evidence(subject, layers, needing, settings, watch) if needing else []
    plain = [name for name in criteria if name not in NEEDS]
    how = settings.seed, settings.noise, settings.perturbations
    for layer in watch("criteria", layers):
        score(layer, plain, *how)
        for name in needing:
            if any(NEEDS[name] in found[layer.name] for found in evidence):
                score_with(layer, name, NEEDS[name], evidence, *how)


def _evidence(
    subject: Subject, layers: list[Layer], needing: list[str], settings: Settings, watch: Watch
) -> list[Any]:
    """One dictionary for each batch, each batch read once; BatchNorm's scale comes first, alone."""
    names = [layer.name for layer in layers]
    found: list[Any] = []
    if "bn_gamma" in needing:
        found.append(gather(subject.model, ["bn_gamma"], layers=names))
    reading = [name for name in needing if name in DATA]
    if reading and subject.images is not None:
        model = subject.model.to(subject.images.device)
        batches = _first(_unaugmented(subject.images, settings), settings.batches)
        for i, batch in enumerate(watch("images", list(batches))):
            # Slow, and gather stops at as many in one call; two, so that there is a bootstrap.
            ranks_done = i >= max(2, RANK_IMAGES / settings.batch_size)
            now = [name for name in reading if not (name == "hrank" and ranks_done)]
            found.append(gather(model, now, [batch], names))
    return found


def _unaugmented(images: Images, settings: Settings) -> Iterator[Any]:
    size = min(settings.batch_size, images.counts[0])
    return images.epoch(size, settings.seed, augmented=False)


def _telling(layers: list[Layer], criteria: list[str], notes: list[str]) -> list[str]:
    """The criteria that tell any two filters of a layer apart; the others are named."""
    some = []
    for name in criteria:
        scored = [layer.scores[name] for layer in layers if name in layer.scores]
        if any(np.ptp(scores) > 0 for scores in scored):
            some.append(name)
        elif scored:
            notes.append(f"{name} (all filters of a layer have one score)")
    if not some:
        raise Error(
            f"--criteria {','.join(criteria)}: none of them can score this network; try l1,l2,gm"
        )
    return some


def _first(batches: Iterator[tuple[Tensor, Tensor]], count: int) -> Iterator[tuple[Tensor, Tensor]]:
    """At most `count` batches, those that are full only: unequal ones have unequal gradients."""
    size = None
    for _, (images, labels) in zip(range(count), batches, strict=False):
        if size is not None and len(images) < size:
            return
        size = len(images)
        yield images, labels
