"""FPGM's figures 2 and 3 (He et al., CVPR 2019): how the norms of a layer's filters are spread,
what a norm criterion would need, and which filters it and the geometric median take.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy import stats
from torch import Tensor, nn

from fpgm.errors import Error
from fpgm.figures.layer import Filters, chosen, filters, listed, names
from fpgm.study.settings import Settings
from fpgm.study.statistics.agreement import Array
from fpgm.study.statistics.weights import diagnose


@dataclass(frozen=True)
class Norms:
    """A layer. ideal: (n,) ascending, see `ideal`; pruned: criterion -> places among `filters`;
    diagnosis: see study.weights.diagnose."""

    filters: Filters
    ideal: Array
    pruned: dict[str, Tensor]
    diagnosis: dict[str, Any]


def ideal(norms: Array) -> Array:
    """Norms as a norm criterion needs them, as many and as long: (n,) -> (n,), ascending.

    FPGM asks for a wide deviation and a minimum near zero and draws a bell, without a formula. Here
    it is n quantiles of a normal distribution, stretched from 0 to the layer's largest norm.
    """
    quantiles = stats.norm.ppf((np.arange(len(norms)) + 0.5) / len(norms))
    spread = (quantiles - quantiles[0]) / (quantiles[-1] - quantiles[0])
    needed: Array = spread * norms.max()
    return needed


def density(norms: Array, at: Array) -> Array:
    """Gaussian kernel density (Scott's bandwidth) of norms (n,) at points (m,); none where all
    norms are equal."""
    if np.ptp(norms) <= 1e-9 * norms.max():
        return np.full(len(at), np.nan)
    values: Array = stats.gaussian_kde(norms)(at)
    return values


def layers(
    model: nn.Module, given: Sequence[str] | None, criteria: Sequence[str], rate: float
) -> list[Norms]:
    """The norms of the layers named, by default of the first, the middle and the last.

    Raises Error.
    """
    found = []
    limits = Settings()
    for name in names(model, given):
        of = filters(model, name)
        lengths = of.norms
        if not np.isfinite(lengths).all():
            raise Error(f"--layer {name}: has norms that are not finite; start from other weights")
        said = diagnose(lengths, of.weight[0].numel(), limits.min_cv, limits.max_minimum)
        found.append(Norms(of, ideal(lengths), chosen(of, criteria, rate), said))
    return found


def rows(found: Sequence[Norms]) -> list[dict[str, Any]]:
    """norms.csv: a row for each live filter. ideal: the ideal norm of the same rank; pruned_NAME:
    1 where that criterion prunes it."""
    lines = []
    for layer in found:
        lengths = layer.filters.norms
        ranks = np.argsort(np.argsort(lengths, kind="stable"))
        gone = {f"pruned_{name}": set(p.tolist()) for name, p in layer.pruned.items()}
        for place, index in enumerate(layer.filters.indices.tolist()):
            line = {"layer": layer.filters.layer, "filter": index, "norm": float(lengths[place])}
            line["ideal"] = float(layer.ideal[ranks[place]])
            lines.append(line | {key: int(place in places) for key, places in gone.items()})
    return lines


def summary(found: Sequence[Norms]) -> list[str]:
    """A line for each layer."""
    lines = []
    for layer in found:
        said, of = layer.diagnosis, layer.filters
        zero = f", {of.zero} zero ones left out" if of.zero else ""
        gone = "; ".join(
            f"{name} prunes {listed(of, places)}" for name, places in layer.pruned.items()
        )
        lines.append(
            f"{of.layer}: norms of {len(of)} filters{zero}, {said['min']:.3g} to "
            f"{said['max']:.3g}, std / mean {said['cv']:.2f}, min / median "
            f"{said['min_over_median']:.2f}: {said['verdict']}; {gone}"
        )
    return lines
