"""What a layer's weights look like: are they Gaussian, and can a norm tell its filters apart?

Gaussian: the assumption of "Convolution-Weight-Distribution Assumption: Rethinking the Criteria of
Channel Pruning" (Huang et al., NeurIPS 2021): filters follow N(0, S), S with nearly equal variances
and small correlations, those inside one kernel the largest. Where it holds, norms and distances
concentrate and most criteria rank alike. Large samples reject every distribution, so a layer is
called not Gaussian only if the test rejects *and* an effect is large.

Norms: pruning by them (FPGM, He et al., CVPR 2019, section 3.2) needs (1) norms that deviate
widely, else small and large mean nothing, and (2) a smallest norm near zero, else what goes
contributes, too. The paper gives no thresholds; ours are in fpgm.study.settings.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from scipy import stats

from fpgm.study.agreement import Array

SAMPLE = 5000  # weights that are tested
CHANNELS = 48  # input channels whose correlations are computed
POINTS = 120  # of a density
FIGURES = (
    "p", "anderson", "skew", "excess_kurtosis", "ks", "mean_over_std", "variance_cv",
    "variance_cv_iid", "correlation_inside", "correlation_between", "correlation_iid", "cosine",
    "cosine_iid",
)  # fmt: skip
VERDICTS = {
    (True, True): "suits a norm",
    (False, True): "norms too alike",
    (True, False): "no norm near zero",
    (False, False): "too alike, none near zero",
}


def battery(weight: Array, seed: int) -> dict[str, Any]:
    """All figures of one layer. weight: (N, C, kH, kW), its live filters.

    skew and excess_kurtosis are effects on all weights, 0 for a Gaussian; ks (largest distance of
    the distribution functions, an effect, too), anderson (A^2) and p (D'Agostino and Pearson's
    test) are of `sampled` weights; None where undefined. The values expected of iid weights stand
    beside the others.
    """
    filters, values = weight.reshape(len(weight), -1), weight.ravel()
    n, d = filters.shape
    std = float(values.std())
    if std == 0:
        return {"weights": values.size, "sampled": 0, **dict.fromkeys(FIGURES)}
    sample = values
    if values.size > SAMPLE:
        sample = np.random.default_rng([seed, values.size]).choice(values, SAMPLE, replace=False)
    variances = filters.var(0, ddof=1)
    spread = d > 1 and variances.mean() > 0
    inside, between = _correlations(weight)
    figures = {
        "p": stats.normaltest(sample).pvalue if sample.size >= 8 else None,
        "anderson": anderson(sample),
        "skew": stats.skew(values),
        "excess_kurtosis": stats.kurtosis(values),
        "ks": stats.ks_1samp(sample, stats.norm(sample.mean(), sample.std()).cdf).statistic,
        "mean_over_std": abs(values.mean()) / std,
        "variance_cv": stats.variation(variances) if spread else None,
        # Var(s^2) = 2 sigma^4 / (n - 1)
        "variance_cv_iid": math.sqrt(2 / (n - 1)) if spread else None,
        "correlation_inside": inside,
        "correlation_between": between,
        "correlation_iid": math.sqrt(2 / (math.pi * (n - 1))),
        "cosine": _cosine(filters),
        "cosine_iid": math.sqrt(2 / (math.pi * d)),
    }
    plain = {key: None if value is None else float(value) for key, value in figures.items()}
    return {"weights": values.size, "sampled": sample.size, **plain}


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


def _correlations(weight: Array) -> tuple[float | None, float | None]:
    """Mean |correlation| of two positions, over filters: of one kernel, and of different ones."""
    n, c = weight.shape[:2]
    some = np.unique(np.linspace(0, c - 1, min(c, CHANNELS)).astype(int))
    positions = weight[:, some].reshape(n, -1)
    with np.errstate(invalid="ignore", divide="ignore"):  # positions that are constant: nan
        size = np.abs(np.atleast_2d(np.corrcoef(positions, rowvar=False)))
    kernel = np.repeat(np.arange(len(some)), positions.shape[1] // len(some))
    same = kernel[:, None] == kernel
    return _mean(size[same & ~np.eye(len(size), dtype=bool)]), _mean(size[~same])


def _cosine(filters: Array) -> float:
    """Mean |cosine| of the angle between two filters (N, d)."""
    unit = filters / np.linalg.norm(filters, axis=1, keepdims=True)
    return float(np.abs(unit @ unit.T)[~np.eye(len(unit), dtype=bool)].mean())


def _mean(values: Array) -> float | None:
    defined = values[~np.isnan(values)]
    return float(defined.mean()) if defined.size else None


def diagnose(norms: Array, weights: int, min_cv: float, max_minimum: float) -> dict[str, Any]:
    """FPGM's two requirements on the norms (N,) of a layer's live filters of `weights` weights.

    cv: standard deviation / mean; cv_iid: that of iid Gaussian filters (chi distribution).
    """
    figures = {
        "min": norms.min(), "median": np.median(norms), "max": norms.max(), "mean": norms.mean(),
        "std": norms.std(), "span": np.ptp(norms), "cv": stats.variation(norms),
        "cv_iid": stats.chi(weights).std() / stats.chi(weights).mean(),
        "min_over_median": norms.min() / np.median(norms),
    }  # fmt: skip
    deviates = bool(figures["cv"] >= min_cv)
    near_zero = bool(figures["min_over_median"] <= max_minimum)
    return {
        **{key: float(value) for key, value in figures.items()},
        "deviates": deviates, "near_zero": near_zero, "verdict": VERDICTS[deviates, near_zero],
    }  # fmt: skip


def density(values: Array) -> dict[str, list[float]]:
    """Gaussian kernel density (Scott's bandwidth) on a grid; empty where all values are equal."""
    span = np.ptp(values)
    if span <= 1e-9 * np.abs(values).max():
        return {"x": [], "y": []}
    grid = np.linspace(values.min() - 0.15 * span, values.max() + 0.15 * span, POINTS)
    return {"x": grid.tolist(), "y": stats.gaussian_kde(values)(grid).tolist()}
