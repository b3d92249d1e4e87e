"""A network's layers with their scores, in an order that does not depend on how it is written down.

Filters of a layer can be permuted (with the BatchNorm after them and the inputs of the next layer)
and the network is the same. So that a study of it is the same, too, down to its random numbers,
filters and input channels are sorted by their norms before anything else.
"""

from __future__ import annotations

import itertools
import zlib
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from fpgm.criteria import CRITERIA
from fpgm.criteria.evidence import gather, missing
from fpgm.errors import Error
from fpgm.graph.groups import prunable
from fpgm.graph.trace import trace
from fpgm.networks.weights import weight_of
from fpgm.selection.ranking import levelled
from fpgm.study.settings import Settings
from fpgm.study.statistics.agreement import Array, weight_only
from fpgm.study.subject import Subject

T = TypeVar("T")
LEAST = 4  # filters that a ranking needs to say anything
Evidence = Mapping[str, Mapping[str, Tensor]]  # layer -> parameter of a criterion -> (N,)


@dataclass
class Layer:
    """One convolution. filters: how many it has; order: indices of those that live, sorted by
    norm; weight: (n, C, kH, kW) theirs, float32; scores: criterion -> (n,), again: of those that
    read images -> (D, n) from batches drawn anew."""

    name: str
    filters: int
    order: Tensor
    weight: Tensor
    scores: dict[str, Array] = field(default_factory=dict)
    again: dict[str, Array] = field(default_factory=dict)

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.weight.shape)

    def matrix(self, names: Sequence[str]) -> Array:
        """(K, n)."""
        return np.stack([self.scores[name] for name in names])


def watched(items: Sequence[T], what: str) -> Iterable[T]:
    """How far a loop is, where somebody watches."""
    return tqdm(items, desc=what, leave=False, disable=None)


def scored_layers(
    subject: Subject, settings: Settings, notes: list[str]
) -> tuple[list[Layer], list[str], dict[str, str]]:
    """The layers with their scores, the criteria that tell filters apart, and why other layers are
    left out. `notes` gets a line for all else that is left out.

    Raises Error.
    """
    names, left = convolutions(subject.model, settings.layers == "all")
    layers, few = live_layers(subject.model, names)
    left.update(few)
    if not layers:
        reasons = Counter(left.values()).most_common(1)
        why = f"{reasons[0][1]} of {len(left)}: {reasons[0][0]}" if reasons else "no convolutions"
        raise Error(
            f"no layer to study ({why}); --layers all takes every convolution with {LEAST} filters "
            "or more"
        )
    criteria = _chosen(settings, subject, notes)
    _score(subject, layers, criteria, settings, notes)
    return layers, _telling(layers, criteria, notes, settings.criteria or criteria), left


def convolutions(model: nn.Module, everything: bool) -> tuple[list[str], dict[str, str]]:
    """Names of the layers to study, in the order of execution, and why the others are left out.

    everything: all convolutions, also those that fpgm would not prune. Raises GraphError for a
    network that cannot be traced, where `everything` is not asked for.
    """
    every = [name for name, module in model.named_modules() if isinstance(module, nn.Conv2d)]
    if everything:
        return every, {}
    groups = prunable(trace(model))
    left = {n: groups.kept_full.get(n, "never used") for n in every if n not in groups.layers}
    return list(groups.layers), left


def live_layers(model: nn.Module, names: Iterable[str]) -> tuple[list[Layer], dict[str, str]]:
    """The layers that can be ranked, and why the others cannot. Zero filters are left out.

    Raises Error that names the first layer with a weight that is no number.
    """
    layers, left = [], {}
    for name in names:
        weight = weight_of(model, name).detach().float().cpu()
        bad = int((~weight.isfinite()).sum())
        if bad:
            raise Error(
                f"{name}: {bad} of its {weight.numel()} weights are nan or infinite; the run that "
                "wrote them diverged, study an earlier checkpoint"
            )
        live = weight.flatten(1).any(1).nonzero().flatten()
        if len(live) < LEAST:
            zero = len(weight) - len(live)
            left[name] = f"{len(live)} filters" + (f" and {zero} zero ones" if zero else "")
            continue
        order = live[_by_norm(weight[live])]
        channels = _by_norm(weight[order].transpose(0, 1))
        layers.append(Layer(name, len(weight), order, weight[order][:, channels].contiguous()))
    return layers, left


def _by_norm(weight: Tensor) -> Tensor:
    """Indices along the first axis, least norm first. The same bits in whatever order the others
    come: their squares are sorted before they are added up."""
    values = np.sort(weight.flatten(1).abs().double().numpy(), axis=1)
    return torch.from_numpy(np.argsort(np.square(values).sum(1), kind="stable"))


def _chosen(settings: Settings, subject: Subject, notes: list[str]) -> list[str]:
    """The criteria to compute; what cannot be is named in `notes`."""
    scoring = [name for name, criterion in CRITERIA.items() if not criterion.places]
    for name in settings.criteria:
        if name not in scoring:
            why = "is an order of pruning and no score, " if name in CRITERIA else ""
            raise Error(f"--criteria {name}: {why}choose from {', '.join(scoring)}")
    wanted = settings.criteria or [name for name in scoring if "seed" not in CRITERIA[name].given]
    looking = [n for n in wanted if CRITERIA[n].reads_images or CRITERIA[n].needs_image]
    without = looking if subject.images is None else []
    if without:
        notes.append(f"{', '.join(without)} (no images: {subject.no_images})")
    return [name for name in wanted if name not in without]


def _telling(
    layers: list[Layer], criteria: list[str], notes: list[str], asked: Sequence[str]
) -> list[str]:
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
            f"--criteria {','.join(asked)}: none of them can score this network "
            f"({'; '.join(notes)}); try "
            + ",".join(name for name in weight_only(CRITERIA) if not CRITERIA[name].places)
        )
    return some


def _score(
    subject: Subject, layers: list[Layer], criteria: list[str], settings: Settings, notes: list[str]
) -> None:
    """Fill in every layer's scores; `notes` gets what could not be scored."""
    looking = [name for name in criteria if CRITERIA[name].views]
    lacking = {
        name: missing(subject.model, name, [layer.name for layer in layers]) for name in looking
    }
    for name, places in lacking.items():
        if places:
            part = CRITERIA[name].needs_part
            notes.append(f"{name} in layers without {part} ({', '.join(places)})")
    evidence = _evidence(subject, layers, looking, settings)
    for layer in watched(layers, "criteria"):
        seed = zlib.crc32(f"{settings.seed}/{layer.name}".encode())
        for name in weight_only(criteria):
            layer.scores[name] = scored(name, layer.weight, seed)
        for name in looking:
            if layer.name not in lacking[name]:
                score_with(layer, name, evidence, settings)


def _evidence(
    subject: Subject, layers: list[Layer], looking: list[str], settings: Settings
) -> list[Evidence]:
    """One dictionary for each batch, each batch read once; what needs no images comes first."""
    names = [layer.name for layer in layers]
    reading = [name for name in looking if CRITERIA[name].reads_images]
    still = [name for name in looking if name not in reading]
    image = subject.images.image_shape if subject.images is not None else None
    gathered: list[Evidence] = []
    if still:
        gathered.append(gather(subject.model, still, layers=names, image=image))
    if reading and subject.images is not None:
        images, model = subject.images, subject.model.to(subject.images.device)
        size = min(settings.batch_size, images.counts[0])
        epoch = images.epoch(size, settings.seed, augmented=False)
        # Full ones only: unequal batches have unequal gradients.
        full = (batch for batch in epoch if len(batch[0]) == size)
        batches = list(itertools.islice(full, settings.batches))
        gathered += [
            gather(model, reading, [batch], names, image) for batch in watched(batches, "images")
        ]
    return gathered


def score_with(layer: Layer, name: str, evidence: Sequence[Evidence], settings: Settings) -> None:
    """Fill in the scores of a criterion that takes evidence: one dictionary for each batch.

    The score is that of the mean over batches; `again` gets those of a bootstrap over them.
    """
    generator = np.random.default_rng([settings.seed, zlib.crc32(f"{layer.name}/{name}".encode())])
    of_layer = [batch[layer.name] for batch in evidence]
    views = CRITERIA[name].views
    rows = {
        key: [view.part_of(values[key], layer.order) for values in of_layer if key in values]
        for key, view in views.items()
    }

    def of(batches: Iterable[int]) -> Array:
        chosen = list(batches)
        joined = {key: views[key].joined([row[i] for i in chosen]) for key, row in rows.items()}
        return scored(name, layer.weight, 0, **joined)

    count = len(next(iter(rows.values())))
    layer.scores[name] = of(range(count))
    if count > 1:
        chosen = generator.integers(count, size=(settings.resamples, count)).tolist()
        layer.again[name] = np.stack([of(batches) for batches in chosen])


def scored(name: str, weight: Tensor, seed: int = 0, **evidence: Any) -> Array:
    """A criterion's scores, to the digits that tell filters apart. (N, C, kH, kW) -> (N,)."""
    given = {"seed": seed} if "seed" in CRITERIA[name].given else {}
    scores: Array = levelled(CRITERIA[name](weight, **given, **evidence).double()).numpy()
    return scores
