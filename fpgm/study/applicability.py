"""Whether a criterion tells filters apart: how far its scores lie, and whether its choice holds.

Scores are `(..., N)`, filters last; nan stands for what is undefined.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from scipy import stats

from fpgm.criteria import tie_rate
from fpgm.selection.ranking import normalised, pruned_count
from fpgm.study.agreement import Array, jaccard, pruned


def spread(scores: Array) -> dict[str, Array]:
    """How far scores (..., N) lie from each other. Each figure is (...).

    std divides by N; cv: std / |mean| (scipy.stats.variation); range_over_mean: (max - min) /
    |mean|; tie_rate: share of the filters whose score another has as well.
    """
    mean, std = scores.mean(-1), scores.std(-1)
    size = np.where(mean == 0, np.nan, np.abs(mean))
    return {
        "mean": mean,
        "std": std,
        "cv": std / size,
        "range_over_mean": np.ptp(scores, axis=-1) / size,
        "tie_rate": tie_rate(torch.from_numpy(scores)).numpy(),
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


def stability(scores: Array, again: Array, rates: Sequence[float], ties: Array) -> Array:
    """Mean Jaccard overlap of the pruned set with those under perturbation; 1: nothing changes.

    scores (..., N), again (D, ..., N), ties (1 + D, ..., N) -> (R, ...). What ties alone decide is
    decided anew each time, so that a score that all filters share holds as well as chance does.
    """
    masks = pruned(np.concatenate((scores[None], again)), rates, ties)
    held: Array = jaccard(masks[:, :1], masks[:, 1:]).mean(1)
    return held


def comparable(scores: Array, how: str) -> Array:
    """Every ranking of (..., N) normalised as fpgm.select(scope="global") does, by itself."""
    rows = torch.from_numpy(scores).reshape(-1, scores.shape[-1])
    done: Array = torch.stack([normalised(row, how) for row in rows]).numpy()
    return done.reshape(scores.shape)


def in_one_ranking(layers: Sequence[Array], how: str) -> Array:
    """Scores of all layers made comparable, side by side. L of (..., N_l) -> (..., sum of N_l).

    By rank, filters of a layer with one score share their mean rank: `comparable` gives them ranks
    by place, and so by norm.
    """
    if how == "rank":
        parts = [stats.rankdata(scores, axis=-1) / scores.shape[-1] for scores in layers]
    else:
        parts = [comparable(scores, how) for scores in layers]
    return np.concatenate(parts, axis=-1)


def shares(layers: Sequence[Array], rates: Sequence[float]) -> Array:
    """Share of each layer that one ranking over all of them prunes. L of (K, N_l) -> (R, K, L).

    Ties go by place, earlier layers first, as in fpgm.select.
    """
    scores = np.concatenate(layers, axis=-1)
    masks = pruned(scores, rates, np.arange(scores.shape[-1], dtype=np.float64))
    ends = np.cumsum([layer.shape[-1] for layer in layers])
    return np.stack([part.mean(-1) for part in np.split(masks, ends[:-1], axis=-1)], axis=-1)
