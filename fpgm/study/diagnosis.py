"""FPGM's own diagnosis: can a norm tell a layer's filters apart?

He et al., CVPR 2019, section 3.2: pruning by norm needs (1) norms that deviate widely, else small
and large mean nothing, and (2) a smallest norm near zero, else what goes contributes, too. The
paper gives no thresholds; ours are in fpgm.study.settings.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from scipy import stats

from fpgm.study.agreement import Array

POINTS = 120

VERDICTS = {
    (True, True): "suits a norm",
    (False, True): "norms too alike",
    (True, False): "no norm near zero",
    (False, False): "too alike, none near zero",
}


def diagnose(norms: Array, weights: int, min_cv: float, max_minimum: float) -> dict[str, Any]:
    """The two requirements on the norms (N,) of a layer's live filters of `weights` weights each.

    cv: standard deviation / mean; cv_iid: that of iid Gaussian filters (chi distribution).
    """
    mean, std, median = float(norms.mean()), float(norms.std()), float(np.median(norms))
    low, high = float(norms.min()), float(norms.max())
    cv, minimum = std / mean, low / median
    chi = stats.chi(weights)
    return {
        "min": low, "median": median, "max": high, "mean": mean, "std": std,
        "span": high - low,
        "cv": cv,
        "cv_iid": float(chi.std() / chi.mean()),
        "min_over_median": minimum,
        "deviates": cv >= min_cv,
        "near_zero": minimum <= max_minimum,
        "verdict": VERDICTS[cv >= min_cv, minimum <= max_minimum],
    }  # fmt: skip


def density(values: Array) -> dict[str, list[float]]:
    """Gaussian kernel density (Scott's bandwidth) on a grid; empty where all values are equal.

    A log axis is the same of log10(values).
    """
    if np.ptp(values) <= 1e-9 * np.abs(values).max():
        return {"x": [], "y": []}
    margin = 0.15 * np.ptp(values)
    grid = np.linspace(values.min() - margin, values.max() + margin, POINTS)
    return {"x": grid.tolist(), "y": stats.gaussian_kde(values)(grid).tolist()}
