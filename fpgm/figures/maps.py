"""FPGM's figure 5 (He et al., CVPR 2019): the feature maps of a layer, those of pruned filters
framed, and how well the kept ones explain them.

A map is what the convolution gives: a BatchNorm behind it changes no R^2.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from fpgm.data.images import Images
from fpgm.errors import Error
from fpgm.figures.layer import Filters, by_chance, chosen, filters, listed, names, pruned
from fpgm.figures.replaceable import Products, explained, products
from fpgm.networks.modes import evaluating, exact
from fpgm.networks.weights import weight_of
from fpgm.study.subject import Subject

SEED = 0
BATCH = 32
LEAST_IMAGES = 16
PIXELS = 32  # for each map, by default: so many that R^2 is not near 1 whatever they hold
LEAST_PIXELS = 10  # for each map: with fewer it is an error
ROWS = ("trained", "gaussian")


@dataclass(frozen=True)
class Maps:
    """A layer seen through images. shown: which test image `image` is, (C, H, W) in 0..1; maps:
    (n, h, w) of it; pruned: criterion -> places among `filters` (of one that goes by chance its
    first draw); rows: R^2 of each pruned filter, see `measured`; images, pixels: that the maps were
    regressed over."""

    filters: Filters
    shown: int
    image: Tensor
    maps: Tensor
    pruned: dict[str, Tensor]
    rows: list[dict[str, Any]]
    images: int
    pixels: int

    def mean(self, weights: str, criterion: str, key: str) -> float | None:
        """The mean R^2 of a criterion's pruned filters; weights: one of ROWS, key: r2_maps or
        r2_filters."""
        values = [
            row[key]
            for row in self.rows
            if (row["weights"], row["criterion"]) == (weights, criterion)
        ]
        return None if None in values else sum(values) / len(values)


def look(
    subject: Subject,
    layer: str | None,
    criteria: Sequence[str],
    rate: float,
    count: int | None = None,
    shown: int = 0,
    draws: int = 10,
) -> Maps:
    """See one layer through the images of a subject.

    layer: by default the first that fpgm prunes; count: training images for the R^2, by default 16
    or as many as give PIXELS for each map; shown: which test image is drawn; draws: of a criterion
    that goes by chance, and of layers of Gaussian filters. Raises Error.
    """
    if subject.images is None:
        raise Error(f"no images to look at the network with: {subject.no_images}")
    images, model = subject.images, subject.model.to(subject.images.device)
    of = filters(model, names(model, None if layer is None else [layer])[0])
    places = chosen(of, criteria, rate)
    image = _test_image(images, shown)
    # Grad mode off, and yet not inference mode: what a hook keeps may be used like any tensor.
    with evaluating(model), exact(), torch.no_grad():
        ((_, maps),) = _calls(model, of.layer, [image[None]])
        size = maps.shape[2] * maps.shape[3]
        count = _images(count, len(of), size, images.counts[0], of.layer)
        null = [gaussian(model, of.layer, draw) for draw in range(draws)]
        trained, others = _covariances(model, of, null, _batches(images, count))
    rows = measured(of.weight, trained.covariance(), criteria, rate, draws, ROWS[0])
    for draw, (weight, sums) in enumerate(zip(null, others, strict=True)):
        rows += measured(
            weight[of.indices].cpu(), sums.covariance(), criteria, rate, 1, ROWS[1], draw
        )
    for row in rows:
        row["filter"] = int(of.indices[row["filter"]])
    about = images.preprocessing()
    mean, std = (torch.tensor(about[key]).view(-1, 1, 1) for key in ("mean", "std"))
    pixels = (image.cpu() * std + mean).clamp(0, 1)
    drawn = maps[0].float().cpu()[of.indices]
    return Maps(of, shown, pixels, drawn, places, rows, trained.pixels // size, trained.pixels)


def measured(
    weight: Tensor, covariance: Tensor, criteria: Sequence[str], rate: float, draws: int,
    weights: str, draw: int = 0,
) -> list[dict[str, Any]]:  # fmt: skip
    """A row for each pruned filter of each criterion: weights, criterion, draw, filter (its place),
    r2_maps and r2_filters.

    weight: (n, C, kH, kW), covariance: (n, n) of their maps; draws: of a criterion that goes by
    chance, numbered from `draw`. r2_filters is None where the kept filters are no fewer than the
    weights of one: they span all that there are, and explain anything.
    """
    rows = []
    of_filters = products(weight)
    for criterion in criteria:
        for each in range(draw, draw + (draws if by_chance(criterion) else 1)):
            gone = pruned(weight, criterion, rate, each)
            spanned = len(weight) - len(gone) >= weight[0].numel()
            by_maps, by_filters = explained(covariance, gone), explained(of_filters, gone)
            for place, maps, others in zip(gone, by_maps, by_filters, strict=True):
                rows.append({
                    "weights": weights, "criterion": criterion, "draw": each, "filter": int(place),
                    "r2_maps": float(maps), "r2_filters": None if spanned else float(others),
                })  # fmt: skip
    return rows


def gaussian(model: nn.Module, layer: str, draw: int) -> Tensor:
    """Filters of a layer's shape, iid N(0, 1): (N, C, kH, kW), on the network's device."""
    weight = weight_of(model, layer)
    generator = torch.Generator().manual_seed(SEED + draw)
    return torch.randn(weight.shape, generator=generator).to(weight)


def _calls(
    model: nn.Module, layer: str, batches: Iterable[Tensor]
) -> Iterator[tuple[Tensor, Tensor]]:
    """What goes into a convolution and what comes out, for each batch (B, C, H, W)."""
    last: list[Tensor] = []

    def keep(_: nn.Module, inputs: tuple[Tensor, ...], outputs: Tensor) -> None:
        # A copy: what comes after may overwrite it.
        last[:] = inputs[0].clone(), outputs.clone()

    hook = model.get_submodule(layer).register_forward_hook(keep)
    try:
        for batch in batches:
            model(batch)
            yield last[0], last[1]
    finally:
        hook.remove()


def _covariances(
    model: nn.Module, of: Filters, null: Sequence[Tensor], batches: Iterator[Tensor]
) -> tuple[Products, list[Products]]:
    """Of the layer's maps, and of those that other filters would give in its place."""
    trained, others = Products(), [Products() for _ in null]
    conv = model.get_submodule(of.layer)
    assert isinstance(conv, nn.Conv2d)
    for inputs, outputs in _calls(model, of.layer, batches):
        live = of.indices.to(outputs.device)
        trained.add(outputs[:, live])
        for weight, sums in zip(null, others, strict=True):
            # Padded and grouped as the layer is.
            sums.add(conv._conv_forward(inputs, weight, None)[:, live])
    return trained, others


def _batches(images: Images, count: int) -> Iterator[Tensor]:
    """Training images in random order, as they are."""
    epoch = images.epoch(BATCH, SEED, augmented=False)
    left = count
    with tqdm(total=count, desc="images", leave=False, disable=None) as bar:
        for batch, _ in epoch:
            yield batch[:left]
            bar.update(len(batch[:left]))
            left -= len(batch[:left])
            if left == 0:
                return


def _images(given: int | None, maps: int, size: int, there: int, layer: str) -> int:
    """How many images to take for `maps` maps of `size` pixels. Raises Error."""
    least = math.ceil(LEAST_PIXELS * maps / size)
    if given is None:
        given = min(max(LEAST_IMAGES, math.ceil(PIXELS * maps / size)), there)
    elif given < 1 or given > there:
        raise Error(f"--images {given}: must be at least 1 and at most {there}, all that there are")
    if given < least:
        better = f"at least --images {least}" if least <= there else "a --layer nearer to the input"
        raise Error(
            f"--images {given}: {given * size} pixels for {maps} maps of {layer}: R^2 would be "
            f"near 1 whatever they hold; {better}"
        )
    return given


def _test_image(images: Images, index: int) -> Tensor:
    """(C, H, W), normalised. Raises Error."""
    if not 0 <= index < images.counts[1]:
        raise Error(f"--image {index}: must be 0 to {images.counts[1] - 1}, the test images")
    before = 0
    for batch, _ in images.tests(BATCH):
        if index < before + len(batch):
            return batch[index - before]
        before += len(batch)
    raise Error(f"--image {index}: there are only {before} test images")


def summary(seen: Maps, rate: float) -> list[str]:
    """What is printed: a table of mean R^2."""
    of, kept = seen.filters, len(seen.filters) - max(map(len, seen.pruned.values()))
    zero = f", {of.zero} zero ones left out" if of.zero else ""
    lines = [
        f"{of.layer}: {len(of)} filters{zero}, {100 * rate:g} % pruned; mean R^2 of the pruned by "
        f"the kept, beside that of Gaussian filters; {seen.images} images, {seen.pixels:,} pixels",
        f"{'':10}  {'maps':>6}  {'(null)':>8}  {'filters':>7}  {'(null)':>8}  pruned",
    ]
    for name, places in seen.pruned.items():
        cells = [seen.mean(w, name, key) for key in ("r2_maps", "r2_filters") for w in ROWS]
        maps, maps_null, weights, weights_null = (
            "" if value is None else f"{value:.3f}" for value in cells
        )
        which = listed(of, places)
        if by_chance(name):
            which = f"{1 + max(r['draw'] for r in seen.rows if r['criterion'] == name)} draws"
        lines.append(
            f"{name:10}  {maps:>6}  {_in_brackets(maps_null):>8}  {weights:>7}  "
            f"{_in_brackets(weights_null):>8}  {which}"
        )
    if kept >= of.weight[0].numel():
        lines.append(
            f"{kept} kept filters of {of.weight[0].numel()} weights span all that there are: any "
            "filter is a combination of them, and so is its map"
        )
    return lines


def _in_brackets(text: str) -> str:
    return f"({text})" if text else ""
