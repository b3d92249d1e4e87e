"""From a network to all numbers of its study, as plain data: what becomes study.json."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict
from typing import Any

import numpy as np

from fpgm.criteria.evidence import DATA, NEEDS
from fpgm.study import findings, summary, tables
from fpgm.study.agreement import Array, by_chance, spread_of, tie_order
from fpgm.study.applicability import comparable, in_one_ranking, shares, spread
from fpgm.study.diagnosis import density, diagnose
from fpgm.study.distribution import battery, verdict
from fpgm.study.gaussian_null import Shape, count_draws, draw, figures, whole_network
from fpgm.study.scored_layers import Watch, scored_layers
from fpgm.study.scoring import Layer
from fpgm.study.settings import NORMALISE, Settings
from fpgm.study.subject import Subject

SCHEMA = 1


def silent(_: str, items: list[Any]) -> Iterable[Any]:
    return items


def examine(subject: Subject, settings: Settings, watch: Watch = silent) -> dict[str, Any]:
    """All numbers of a study, ready for JSON. Raises Error."""
    notes: list[str] = []
    layers, criteria, left = scored_layers(subject, settings, notes, watch)
    known = [name for name in criteria if name not in NEEDS]
    nulls = _nulls(layers, known, settings, watch)
    result: dict[str, Any] = {
        "schema": SCHEMA,
        "network": subject.source,
        "settings": asdict(settings) | {"criteria": list(criteria)},
        "notes": notes,
        "layers": [
            {
                "layer": layer.name, "depth": depth, "shape": "x".join(map(str, layer.shape)),
                "filters": layer.filters, "live": layer.shape[0],
                "zero": layer.filters - layer.shape[0],
            }
            for depth, layer in enumerate(layers)
        ],
        "left_out": [{"layer": name, "reason": reason} for name, reason in left.items()],
        **{name: [] for name in ("similarity", "overlap", "applicability", "cuts", "collapse")},
    }  # fmt: skip
    if "layer" in settings.scopes:
        _by_layer(result, layers, criteria, nulls, settings, watch)
    if "global" in settings.scopes:
        _over_network(result, layers, criteria, nulls, settings)
    _shapes(result, layers, settings, watch)
    result.update(pairs=findings.pairs(result), criteria=findings.criteria(result))
    result["summary"] = summary.lines(result)
    return result


def _nulls(
    layers: list[Layer], known: list[str], settings: Settings, watch: Watch
) -> dict[Shape, Array]:
    """Draws for every shape there is: shape -> (D, K, n)."""
    shapes = Counter(layer.shape for layer in layers)
    return {
        shape: draw(
            shape, known, count_draws(shape, max(settings.draws, shapes[shape])), settings.seed
        )
        for shape in watch("Gaussian null", list(shapes))
    }


def _by_layer(
    result: dict[str, Any],
    layers: list[Layer],
    criteria: list[str],
    nulls: dict[Shape, Array],
    settings: Settings,
    watch: Watch,
) -> None:
    known = [name for name in criteria if name not in NEEDS]
    of_null = {
        shape: (figures(draws, settings.rates), _spread_of(draws))
        for shape, draws in ((s, nulls[s]) for s in watch("statistics of the null", list(nulls)))
    }
    for layer in watch("statistics", layers):
        names = [name for name in criteria if name in layer.scores]
        where = {"scope": "layer", "layer": layer.name}
        _rank(result, where, names, layer.matrix(names), layer.matrices(names),
              known, len(nulls[layer.shape]), *of_null[layer.shape], settings)  # fmt: skip


def _over_network(
    result: dict[str, Any],
    layers: list[Layer],
    criteria: list[str],
    nulls: dict[Shape, Array],
    settings: Settings,
) -> None:
    names = [name for name in criteria if all(name in layer.scores for layer in layers)]
    known = [name for name in names if name not in NEEDS]
    for name in sorted(set(criteria) - set(names)):
        result["notes"].append(f"{name} over the network (some layers lack it)")
    if not names:
        return
    rates = settings.rates
    labels = [layer.name for layer in layers], [layer.shape[0] for layer in layers]
    for how in NORMALISE:
        parts = [comparable(layer.matrix(names), how) for layer in layers]
        pruned = shares(parts, rates)
        result["collapse"] += tables.collapse(names, how, *labels, pruned, rates, settings.collapse)
    how = settings.normalise
    scores = in_one_ranking([layer.matrix(names) for layer in layers], how)
    again = in_one_ranking([layer.matrices(names) for layer in layers], how)
    deviations = [float(layer.weight.std()) for layer in layers]
    shapes = [layer.shape for layer in layers]
    generator = np.random.default_rng(settings.seed)
    networks = np.stack(
        [
            in_one_ranking(whole_network(shapes, deviations, known, nulls, generator), how)
            for _ in range(settings.draws)
        ]
    )
    where = {"scope": "global", "layer": ""}
    _rank(result, where, names, scores, again,
          known, len(networks), figures(networks, rates), _spread_of(networks),
          settings)  # fmt: skip


def _rank(
    result: dict[str, Any],
    where: dict[str, Any],
    names: list[str],
    scores: Array,
    again: Array,
    known: list[str],
    draws: int,
    gaussian: dict[str, Array],
    spread_null: dict[str, Array],
    settings: Settings,
) -> None:
    """Add the rows of one ranking, of a layer or of the network."""
    rates = settings.rates
    against = tables.Nulls(known, gaussian, draws, by_chance(scores.shape[1], rates))
    perturbed = {
        name: "batches" if name in DATA else "BatchNorm's scale" if name in NEEDS else "weights"
        for name in names
    }
    size = (1 + len(again), scores.shape[1])
    ties = tie_order(names, where["layer"], size, settings.seed)
    result["similarity"] += tables.similarity(where, names, scores, against)
    result["overlap"] += tables.overlaps(where, names, scores, against, rates, ties[0])
    result["applicability"] += tables.applicability(where, names, scores, known, spread_null)
    result["cuts"] += tables.cuts(where, names, scores, again, rates, ties, perturbed)


def _spread_of(draws: Array) -> dict[str, Array]:
    return {key: spread_of(values) for key, values in spread(draws).items()}


def _shapes(result: dict[str, Any], layers: list[Layer], settings: Settings, watch: Watch) -> None:
    """Weight distribution and FPGM's diagnosis."""
    limits = settings.alpha, settings.max_skew, settings.max_kurtosis
    result.update(distribution=[], diagnosis=[], norms=[])
    for layer in watch("distributions", layers):
        weight = layer.weight.double().numpy()
        norms = np.linalg.norm(weight.reshape(len(weight), -1), axis=1)
        found = battery(weight, settings.seed)
        result["distribution"].append(
            {"layer": layer.name, **found, "verdict": verdict(found, *limits)}
        )
        diagnosis = diagnose(norms, weight[0].size, settings.min_cv, settings.max_minimum)
        result["diagnosis"].append(
            {"layer": layer.name, "live": len(norms), "zero": layer.filters - len(norms),
             **diagnosis}
        )  # fmt: skip
        result["norms"].append(
            {"layer": layer.name, "norms": norms.tolist(), "linear": density(norms),
             "log10": density(np.log10(norms))}
        )  # fmt: skip
