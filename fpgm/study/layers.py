"""The part of a study's page that is about each layer by itself: its weights, and their norms."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from markupsafe import Markup

from fpgm.page import figure, table, text
from fpgm.study import plots as study_plots

Study = Mapping[str, Any]
Section = tuple[str, Sequence[Markup]]
MOST_PANELS = 24  # of densities in one figure


def depths_of(study: Study) -> dict[str, int]:
    """Layer -> its place in the order of execution."""
    return {row["layer"]: row["depth"] for row in study["layers"]}


def weights(study: Study) -> Section:
    s, rows = study["settings"], study["distribution"]
    depths = depths_of(study)
    odd = [i for i, row in enumerate(rows) if row["verdict"] != "gaussian"]
    series = {
        name: [(depths[r["layer"]], r[key]) for r in rows]
        for name, key in (
            ("inside a kernel", "correlation_inside"), ("between kernels", "correlation_between"),
            ("iid", "correlation_iid"), ("cosine of filters", "cosine"),
            ("cosine, iid", "cosine_iid"),
        )
    }  # fmt: skip
    return "Weights", [
        text(
            "Where filters are nearly Gaussian with equal variances and small correlations, norms "
            "and distances concentrate and criteria rank alike (Huang et al., NeurIPS 2021). p: "
            "D'Agostino and Pearson's test on a seeded sample; A\u00b2: Anderson and Darling; a "
            f"layer is called not Gaussian only if p < {s['alpha']:g} and |skew| > "
            f"{s['max_skew']:g} or |excess kurtosis| > {s['max_kurtosis']:g}, as large samples "
            "reject everything. KS: largest distance of the distribution functions. Variances: "
            "std / mean of the variances of a filter's coordinates; |r|: mean correlation of two "
            "positions over filters; each with the value of iid weights."
        ),
        table(
            ("layer", "verdict", "weights", "p", "A\u00b2", "skew", "excess kurtosis", "KS",
             "|mean| / std", "variances", "iid", "|r| inside a kernel", "|r| between", "iid",
             "|cosine|", "iid"),
            ((r["layer"], r["verdict"], r["weights"], r["p"], r["anderson"], r["skew"],
              r["excess_kurtosis"], r["ks"], r["mean_over_std"], r["variance_cv"],
              r["variance_cv_iid"], r["correlation_inside"], r["correlation_between"],
              r["correlation_iid"], r["cosine"], r["cosine_iid"]) for r in rows),
            marked=odd,
        ),
        figure(
            study_plots.over_depth(
                {key: [(depths[r["layer"]], r[name]) for r in rows]
                 for key, name in (("skew", "skew"), ("excess kurtosis", "excess_kurtosis"))},
                "effect",
            ),
            "Skew and excess kurtosis over depth, both 0 for a Gaussian.",
        ),
        figure(study_plots.over_depth(series, "mean size"), "Correlations over depth."),
    ]  # fmt: skip


def norms(study: Study) -> Section:
    s, rows, depths = study["settings"], study["diagnosis"], depths_of(study)
    series = {
        name: [(depths[r["layer"]], r[key]) for r in rows]
        for name, key in (
            ("std / mean", "cv"), ("iid", "cv_iid"), ("min / median", "min_over_median"),
        )
    }  # fmt: skip
    return "Norms", [
        text(
            "FPGM's argument: a norm can only tell filters apart if norms deviate widely and the "
            "smallest is near zero. The paper gives no thresholds; ours are std / mean >= "
            f"{s['min_cv']:g} (iid Gaussian filters have about 1 / sqrt(2d)) and min / median <= "
            f"{s['max_minimum']:g}. Filters that are all zero are counted apart."
        ),
        table(
            ("layer", "verdict", "live", "zero", "min", "median", "max", "std / mean", "iid",
             "min / median"),
            ((r["layer"], r["verdict"], r["live"], r["zero"], r["min"], r["median"], r["max"],
              r["cv"], r["cv_iid"], r["min_over_median"]) for r in rows),
            marked=[i for i, r in enumerate(rows) if r["verdict"] == "suits a norm"],
        ),
        figure(
            study_plots.over_depth(series, "L2 norms", log=all(r["min"] > 0 for r in rows)),
            "Deviation and smallest norm over depth.",
        ),
    ]  # fmt: skip


def densities(study: Study) -> Section:
    parts = [text(
        "Kernel density of the L2 norms of each layer's live filters and a tick for each filter "
        f"({study_plots.RUG} evenly spaced ones where there are more), from zero and on a log axis."
    )]  # fmt: skip
    entries = study["norms"]
    for start in range(0, len(entries), MOST_PANELS):
        part = entries[start : start + MOST_PANELS]
        which = f"{part[0]['layer']} to {part[-1]['layer']}"
        for log, axis in ((False, "linear"), (True, "log")):
            drawing = study_plots.densities(part, log)
            parts.append(figure(drawing, f"Norms, {axis} axis, {which}."))
    return "Densities", parts
