"""From a network to all numbers of its study, as plain data: what becomes study.json."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict
from typing import Any

import numpy as np

from fpgm.study import summary
from fpgm.study.scores import Layer, scored_layers, watched
from fpgm.study.settings import Settings
from fpgm.study.statistics import tables
from fpgm.study.statistics.agreement import (
    Array,
    Shape,
    count_draws,
    draw,
    figures,
    in_one_ranking,
    shares,
    tie_order,
    weight_only,
    whole_network,
)  # fmt: skip
from fpgm.study.statistics.weights import assumption, diagnose, untestable
from fpgm.study.subject import Subject

SCHEMA = 2
NETWORKS = 200  # of Gaussian filters that one ranking over the network is compared with
Result = dict[str, Any]


def examine(subject: Subject, settings: Settings) -> Result:
    """All numbers of a study, ready for JSON. Raises Error."""
    notes: list[str] = []
    layers, criteria, left = scored_layers(subject, settings, notes)
    result: Result = {
        "schema": SCHEMA,
        "network": subject.source,
        "settings": asdict(settings) | {"criteria": list(criteria)},
        "layers": [
            {
                "layer": layer.name, "depth": depth, "shape": "x".join(map(str, layer.shape)),
                "filters": layer.filters, "live": layer.shape[0],
                "zero": layer.filters - layer.shape[0],
            }
            for depth, layer in enumerate(layers)
        ],
        "left_out": [{"layer": name, "reason": reason} for name, reason in left.items()],
        "similarity": [], "overlap": [], "applicability": [], "stability": [], "collapse": [],
        "ranks": [
            row for layer in layers
            for row in tables.ranks(layer.name, layer.order.tolist(), layer.scores)
        ],
        **_weights(layers, settings, notes),
        "notes": notes,
    }  # fmt: skip
    nulls = _nulls(layers, weight_only(criteria), settings)
    of_shape = {shape: figures(drawn, settings.rates) for shape, drawn in nulls.items()}
    for layer in watched(layers, "statistics"):
        names = [name for name in criteria if name in layer.scores]
        gaussian = of_shape[layer.shape], len(nulls[layer.shape])
        ranking = _ranking(layer.name, names, layer.matrix(names), *gaussian, settings)
        _add(result, ranking)
        again = {name: layer.again[name] for name in names if name in layer.again}
        result["stability"] += tables.held(ranking, again, settings.seed)
    _over_network(result, layers, criteria, nulls, settings)
    result.update(pairs=tables.pairs(result), criteria=tables.criteria(result))
    result["summary"] = summary.lines(result)
    return result


def _nulls(layers: list[Layer], names: list[str], settings: Settings) -> dict[Shape, Array]:
    """Scores of Gaussian filters of every shape there is, enough for its layers to differ."""
    shapes = Counter(layer.shape for layer in layers)
    return {
        shape: draw(
            shape, names, count_draws(shape, max(settings.draws, shapes[shape])), settings.seed
        )
        for shape in watched(list(shapes), "Gaussian null")
    }


def _over_network(
    result: Result,
    layers: list[Layer],
    criteria: list[str],
    nulls: dict[Shape, Array],
    settings: Settings,
) -> None:
    """Add the rows of one ranking over all filters."""
    names = [name for name in criteria if all(name in layer.scores for layer in layers)]
    for name in sorted(set(criteria) - set(names)):
        result["notes"].append(f"{name} over the network (some layers lack it)")
    if not names:
        return
    rates, how = settings.rates, settings.normalise
    scores = in_one_ranking([layer.matrix(names) for layer in layers], how)
    lost = shares(scores, [layer.shape[0] for layer in layers], rates)
    result["collapse"] += tables.collapse(names, [layer.name for layer in layers], lost, rates)
    plain = weight_only(names)
    deviations = [float(layer.weight.std()) for layer in layers]
    shapes = [layer.shape for layer in layers]
    generator = np.random.default_rng(settings.seed)
    networks = np.stack(
        [
            in_one_ranking(whole_network(shapes, deviations, plain, nulls, generator), how)
            for _ in range(max(settings.draws, NETWORKS))
        ]
    )
    _add(result, _ranking("", names, scores, figures(networks, rates), len(networks), settings))


def _ranking(
    layer: str, names: list[str], scores: Array, gaussian: dict[str, Array], draws: int,
    settings: Settings,
) -> tables.Ranking:  # fmt: skip
    """Of a layer or (its name is empty) of the network."""
    where = {"scope": "layer" if layer else "global", "layer": layer}
    ties = tie_order(names, layer, (scores.shape[1],), settings.seed)
    return tables.Ranking(where, names, settings.rates, scores, ties, gaussian, draws)


def _add(result: Result, ranking: tables.Ranking) -> None:
    result["similarity"] += tables.similarity(ranking)
    result["overlap"] += tables.overlaps(ranking)
    result["applicability"] += tables.applicability(ranking)


def _weights(layers: list[Layer], settings: Settings, notes: list[str]) -> Result:
    """The assumption on the weights, and FPGM's diagnosis of their norms."""
    tested, diagnoses = [], []
    for layer in watched(layers, "the assumption"):
        weight = layer.weight.double().numpy()
        why = untestable(weight)
        if why is None:
            found = assumption(weight, settings.alpha, settings.seed)
            tested.append({"layer": layer.name, **found})
        else:
            notes.append(f"the assumption in {layer.name} ({why})")
        norms = np.linalg.norm(weight.reshape(len(weight), -1), axis=1)
        diagnosis = diagnose(norms, weight[0].size, settings.min_cv, settings.max_minimum)
        counts = {"layer": layer.name, "live": len(norms), "zero": layer.filters - len(norms)}
        diagnoses.append(counts | diagnosis)
    return {"assumption": tested, "diagnosis": diagnoses}
