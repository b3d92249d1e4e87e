"""Are a layer's weights Gaussian, and its filters alike in every coordinate?

The assumption of "Convolution-Weight-Distribution Assumption: Rethinking the Criteria of Channel
Pruning" (Huang et al., NeurIPS 2021): filters follow N(0, S), S with nearly equal variances and
small correlations, those inside one kernel the largest. Where it holds, norms and distances
concentrate and most criteria rank alike.

Large samples reject every distribution, so a layer is called not Gaussian only if the test rejects
*and* an effect is large.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from scipy import stats

from fpgm.study.agreement import Array

SAMPLE = 5000  # weights that are tested
CHANNELS = 48  # input channels whose correlations are computed


def battery(weight: Array, seed: int) -> dict[str, Any]:
    """All figures of one layer. weight: (N, C, kH, kW), its live filters.

    skew and excess_kurtosis are effects on all weights, 0 for a Gaussian; ks (largest distance of
    the distribution functions, an effect, too), anderson (A^2) and p (D'Agostino and Pearson's
    test) are of `sampled` weights; None where undefined. The values expected of iid weights stand
    beside the others.
    """
    n, d = len(weight), weight[0].size
    values = weight.ravel()
    std = float(values.std())
    if std == 0:
        return {"weights": values.size, "sampled": 0, **dict.fromkeys(FIGURES)}
    sample = values
    if values.size > SAMPLE:
        sample = np.random.default_rng([seed, values.size]).choice(values, SAMPLE, replace=False)
    found = {
        "weights": values.size,
        "sampled": sample.size,
        "p": stats.normaltest(sample).pvalue if sample.size >= 8 else None,
        "anderson": anderson(sample),
        "skew": stats.skew(values),
        "excess_kurtosis": stats.kurtosis(values),
        "ks": stats.ks_1samp(sample, stats.norm(sample.mean(), sample.std()).cdf).statistic,
        "mean_over_std": abs(values.mean()) / std,
        **_coordinates(weight.reshape(n, d)),
        **_correlations(weight),
        "cosine": _cosine(weight.reshape(n, d)),
        "cosine_iid": math.sqrt(2 / (math.pi * d)),
    }
    return {key: None if value is None else _plain(value) for key, value in found.items()}


FIGURES = (
    "p", "anderson", "skew", "excess_kurtosis", "ks", "mean_over_std", "variance_cv",
    "variance_cv_iid", "correlation_inside", "correlation_between", "correlation_iid", "cosine",
    "cosine_iid",
)  # fmt: skip


def verdict(figures: dict[str, Any], alpha: float, max_skew: float, max_kurtosis: float) -> str:
    """gaussian, not gaussian, or constant (no two weights differ).

    Not gaussian: D'Agostino's test rejects at alpha, and |skew| or |excess kurtosis| is above its
    limit.
    """
    if figures["skew"] is None:
        return "constant"
    large = abs(figures["skew"]) > max_skew or abs(figures["excess_kurtosis"]) > max_kurtosis
    rejected = figures["p"] is not None and figures["p"] < alpha
    return "not gaussian" if large and rejected else "gaussian"


def anderson(sample: Array) -> float:
    """Anderson and Darling's A^2 against a Gaussian of the sample's mean and deviation (ddof 1).

    The same as scipy.stats.anderson, whose p-values change between its versions.
    """
    ordered = (np.sort(sample) - sample.mean()) / sample.std(ddof=1)
    i = np.arange(1, len(ordered) + 1)
    terms = stats.norm.logcdf(ordered) + stats.norm.logsf(ordered[::-1])
    return float(-len(ordered) - ((2 * i - 1) / len(ordered) * terms).sum())


def _coordinates(filters: Array) -> dict[str, Any]:
    """Coefficient of variation of the d coordinates' variances over N filters (N, d)."""
    n = len(filters)
    variances = filters.var(0, ddof=1)
    if len(variances) < 2 or variances.mean() == 0:
        return {"variance_cv": None, "variance_cv_iid": None}
    return {
        "variance_cv": variances.std() / variances.mean(),
        "variance_cv_iid": math.sqrt(2 / (n - 1)),  # Var(s^2) = 2 sigma^4 / (n - 1)
    }


def _correlations(weight: Array) -> dict[str, Any]:
    """Mean |correlation| of two positions, over filters: of one kernel, and of different ones."""
    n, c = weight.shape[:2]
    some = np.unique(np.linspace(0, c - 1, min(c, CHANNELS)).astype(int))
    positions = weight[:, some].reshape(n, len(some), -1)
    area = positions.shape[2]
    flat = positions.reshape(n, -1) - positions.reshape(n, -1).mean(0)
    length = np.sqrt((flat**2).sum(0))
    flat = flat / np.where(length > 0, length, np.nan)
    size = np.abs(flat.T @ flat)
    kernel = np.repeat(np.arange(len(some)), area)
    same = kernel[:, None] == kernel
    inside = size[same & ~np.eye(len(size), dtype=bool)]
    between = size[~same]
    return {
        "correlation_inside": _mean(inside),
        "correlation_between": _mean(between),
        "correlation_iid": math.sqrt(2 / (math.pi * (n - 1))),
    }


def _cosine(filters: Array) -> float | None:
    """Mean |cosine| of the angle between two filters (N, d)."""
    unit = filters / np.linalg.norm(filters, axis=1, keepdims=True)
    cosines = np.abs(unit @ unit.T)
    n = len(unit)
    return float((cosines.sum() - np.trace(cosines)) / (n * (n - 1)))


def _mean(values: Array) -> float | None:
    known = values[~np.isnan(values)]
    return float(known.mean()) if known.size else None


def _plain(value: Any) -> float | int:
    return value if isinstance(value, int) else float(value)
