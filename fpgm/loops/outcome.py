"""What a loop's pruning has come to: the smaller network, what it saves, that it is the same."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor, nn

from fpgm.compaction.compact import compact, equivalence
from fpgm.graph.cost import Cost, cost
from fpgm.networks.weights import weight_of
from fpgm.training.finish import proven

RANDOM = 8  # images that both networks are asked about, where none are given


@dataclass(frozen=True)
class Report:
    """keep: convolution -> kept filters, of all that may be pruned; filters: how many it had;
    kept_full: convolutions that are not pruned, and why; epochs: how many were done, and of how
    many; dense, compact: for one image, None where its shape is not known; equivalence: how far
    zeroed and compact network lie apart (fpgm.equivalence), None where there was no image;
    warnings: a line for each thing to know."""

    keep: Mapping[str, Tensor]
    filters: Mapping[str, int]
    kept_full: Mapping[str, str]
    epochs: tuple[int, int]
    dense: Cost | None = None
    compact: Cost | None = None
    equivalence: Mapping[str, float] | None = None
    warnings: tuple[str, ...] = field(default=())

    @property
    def kept(self) -> dict[str, int]:
        """Convolution -> how many of its filters stay."""
        return {name: len(filters) for name, filters in self.keep.items()}

    @property
    def reduction(self) -> dict[str, float]:
        """What is saved, in percent: macs, params; empty where images' shape is not known."""
        if self.dense is None or self.compact is None:
            return {}
        pairs = {key: (getattr(self.dense, key), getattr(self.compact, key)) for key in COUNTED}
        return {key: 100 * (1 - after / before) for key, (before, after) in pairs.items()}

    def __str__(self) -> str:
        lines = [f"{sum(self.kept.values())} of {sum(self.filters.values())} filters are kept"]
        for key, saved in self.reduction.items():
            before, after = getattr(self.dense, key), getattr(self.compact, key)
            lines.append(f"{COUNTED[key]}: {before:,} -> {after:,} ({-saved:+.2f} %)")
        if self.equivalence is not None:
            same = self.equivalence
            lines.append(
                f"compact against zeroed on {same['images']} images: largest difference "
                f"{same['max_abs_diff']:.2g} of {same['max_abs_logit']:.3g}, same answer on "
                f"{100 * same['agreement']:.2f} %"
            )
        return "\n".join([*lines, *(f"warning: {line}" for line in self.warnings)])


COUNTED = {"macs": "MACs", "params": "parameters"}


def outcome(
    network: nn.Module,
    keep: Mapping[str, Tensor],
    kept_full: Mapping[str, str],
    epochs: tuple[int, int],
    images: Tensor | None,
    image: tuple[int, int, int] | None,
) -> tuple[nn.Module, Report]:
    """The compact network of one that is zeroed outside `keep`, in eval mode, and what is to be
    said of both. images: (B, C, H, W), to compare them by; image: (C, H, W), for random ones where
    there are none. Raises Error where the networks differ."""
    small = compact(network, keep, image=image)
    filters = {name: len(weight_of(network, name)) for name in keep}
    like = next(network.parameters())
    if images is None and image is not None:
        generator = torch.Generator().manual_seed(0)
        images = torch.randn(RANDOM, *image, generator=generator).to(like)
    if images is None:
        return small, Report(keep, filters, kept_full, epochs)
    images = images.to(like)
    dense, less = (cost(one, tuple(images.shape[1:])) for one in (network, small))  # type: ignore[arg-type]
    same = equivalence(network, small, images)
    warnings = proven(
        network, small, same, partial(_first, images), "both networks are as they were"
    )
    return small, Report(keep, filters, kept_full, epochs, dense, less, same, tuple(warnings))


def _first(images: Tensor) -> Tensor:
    return images[:64]
