"""Whether a criterion tells filters apart: how far its scores lie, and whether its choice holds.

Scores are `(..., N)`, filters last; nan stands for what is undefined.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from fpgm.ranking import normalised, pruned_count
from fpgm.study.agreement import Array, jaccard, pruned, tie_rate


def spread(scores: Array) -> dict[str, Array]:
    """How far scores (..., N) lie from each other. Each figure is (...).

    std divides by N; cv: std / |mean| (scipy.stats.variation); range_over_mean: (max - min) /
    |mean|; tie_rate: share of the pairs of filters with one score.
    """
    mean, std = scores.mean(-1), scores.std(-1)
    size = np.where(mean == 0, np.nan, np.abs(mean))
    return {
        "mean": mean,
        "std": std,
        "cv": std / size,
        "range_over_mean": np.ptp(scores, axis=-1) / size,
        "tie_rate": tie_rate(scores),
    }


def gaps(scores: Array, rates: Sequence[float]) -> Array:
    """The step from the last pruned score to the first kept one, in standard deviations.

    (..., N) -> (R, ...). 0 is a tie at the cut; nan where nothing is pruned or all are equal.
    """
    ordered = np.sort(scores, axis=-1)
    std = scores.std(-1)
    scale = np.where(std > 0, std, np.nan)
    found = np.full((len(rates), *scores.shape[:-1]), np.nan)
    for i, rate in enumerate(rates):
        k = pruned_count(scores.shape[-1], rate)
        if k:
            found[i] = (ordered[..., k] - ordered[..., k - 1]) / scale
    return found


def stability(scores: Array, again: Array, rates: Sequence[float]) -> Array:
    """Mean Jaccard overlap of the pruned set with those under perturbation; 1: nothing changes.

    scores (..., N), again (D, ..., N) -> (R, ...).
    """
    held: Array = jaccard(pruned(scores, rates)[:, None], pruned(again, rates)).mean(1)
    return held


def comparable(scores: Array, how: str) -> Array:
    """Every ranking of (..., N) normalised as fpgm.select(scope="global") does, by itself."""
    rows = torch.from_numpy(scores).reshape(-1, scores.shape[-1])
    done: Array = torch.stack([normalised(row, how) for row in rows]).numpy()
    return done.reshape(scores.shape)


def shares(layers: Sequence[Array], rates: Sequence[float]) -> Array:
    """Share of each layer that one ranking over all of them prunes. L of (K, N_l) -> (R, K, L)."""
    masks = pruned(np.concatenate(layers, axis=-1), rates)
    ends = np.cumsum([layer.shape[-1] for layer in layers])
    return np.stack([part.mean(-1) for part in np.split(masks, ends[:-1], axis=-1)], axis=-1)
