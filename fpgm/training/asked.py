"""What a run is asked for, held against the criterion, the methods and the network it names."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import partial
from typing import Any, TypeVar

from torch import nn

from fpgm import config as configuration
from fpgm import methods
from fpgm.config import Config, Pruning
from fpgm.criteria import named as criterion_named
from fpgm.errors import Error
from fpgm.graph.groups import Prunable, prunable
from fpgm.graph.trace import trace
from fpgm.methods import Goal
from fpgm.networks import elsewhere
from fpgm.selection.rule import Rule

P = TypeVar("P", bound=Pruning)


def asked(values: Mapping[str, Any]) -> Config:
    """The configuration of these values, held against the criterion and the methods that it names.

    Raises Error with a line for each mistake there is.
    """
    values = configuration.with_tables(values)
    config, problems = configuration.read(values, Config)
    arch = values.get("arch")
    problems += elsewhere.problems(arch, values.get("pretrained")) if arch else []
    scratch = config is None or config.pretrained is None
    return _without(problems, config, values, scratch)


def asked_by_a_loop(values: Mapping[str, Any], from_scratch: bool) -> Pruning:
    """The same of what there is without a data set and a recipe. Raises Error as `asked`."""
    config, problems = configuration.read(values, Pruning)
    return _without(problems, config, values, from_scratch)


def _without(
    problems: list[str], config: P | None, values: Mapping[str, Any], from_scratch: bool
) -> P:
    """A configuration in which nothing is wrong."""
    problems += _option_problems(values)
    if config is not None:
        problems += [*_rule_problems(config), *_method_problems(config, from_scratch)]
        if not problems:
            return config
    raise Error("\n".join(dict.fromkeys(problems)))


def aimed(
    config: Pruning, network: nn.Module, image: tuple[int, int, int] | None
) -> tuple[Goal, Prunable]:
    """How much of a network is to go, and what of it can. image: (C, H, W) that it is given, where
    that is known. Raises Error for patterns and widths that do not fit it, GraphError."""
    graph = trace(network, image)
    groups = prunable(graph, config.residual, config.ignore)
    goal = goal_of(config)
    filters = {name: graph.filters(name) for name in groups.layers}
    return replace(goal, rule=goal.rule.for_network(filters, groups.kept_full)), groups


def goal_of(config: Pruning) -> Goal:
    """How much is to go, and by which rule. Raises Error."""
    rule = Rule(
        config.criterion.name, config.criterion.options, config.scope, config.scope_norm,
        config.floor, config.align, config.seed, config.scope_cost, config.rates or {},
        config.widths or {}, config.rounding, config.threshold,
    )  # fmt: skip
    return Goal(rule, config.rate, config.macs_target, config.residual)


def _option_problems(values: Mapping[str, Any]) -> Iterator[str]:
    """Of the criterion's and the schedule's own options, also where something else is wrong."""
    schedule_named = partial(methods.named, group="schedule")
    kinds: dict[str, Any] = {"criterion": criterion_named, "schedule": schedule_named}
    for group, named in kinds.items():
        section = values.get(group)
        if isinstance(section, Mapping) and isinstance(section.get("name"), str):
            options = {k: v for k, v in section.items() if k not in ("name", "batches")}
            with contextlib.suppress(Error):  # which is said where the whole is looked at
                yield from named(section["name"]).check(options, f"{group}.")


def _rule_problems(config: Pruning) -> Iterator[str]:
    name, batches = config.criterion.name, config.criterion.batches
    try:
        criterion = goal_of(config).rule.scored_by
    except Error as error:
        yield from str(error).splitlines()
        return
    if criterion.places and config.latency_target is not None:
        yield (
            f"latency_target={config.latency_target}: criterion={name} is an order of pruning and "
            "says not what a filter is worth; criterion=gm"
        )
    if criterion.reads_images and batches is None:
        yield f"criterion.batches=null: criterion={name} looks at images, criterion.batches=10"
    if not criterion.reads_images and batches is not None:
        yield f"criterion.batches={batches}: criterion={name} looks at no images"


def _method_problems(config: Pruning, from_scratch: bool) -> Iterator[str]:
    quantising = []
    beside = {f"method.{key}.": ("method", chosen) for key, chosen in config.method.items()}
    for prefix, (group, chosen) in {"schedule.": ("schedule", config.schedule), **beside}.items():
        try:
            method = methods.named(chosen.name, group)
            goal = goal_of(config)
        except Error as error:
            yield from str(error).splitlines()
            continue
        quantising += [chosen.name] if method.quantises else []
        yield from method.check(chosen.options, prefix)
        yield from method.problems(goal, from_scratch)
    if len(quantising) > 1:
        yield (
            f"method={','.join(quantising)}: each of them says which values the weights may have; "
            f"one in a run, method={quantising[0]}"
        )
