"""What is pruned alone: a layer, or layers that are decided together."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from scipy.cluster.hierarchy import DisjointSet
from torch import Tensor, nn

from fpgm.criteria.evidence import Evidence
from fpgm.graph.groups import Group
from fpgm.selection.rule import Rule
from fpgm.selection.select import highest, score

Keep = dict[str, Tensor]
Choice = Callable[["Unit", float], Keep]  # which filters of a unit stay at a rate


@dataclass(frozen=True)
class Unit:
    """Layers that lose filters together, mostly one. name, filters: those of the narrowest, of
    several the first in the order of execution."""

    name: str
    filters: int
    groups: tuple[Group, ...]

    @property
    def layers(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(name for group in self.groups for name, _ in group.members))

    def pruned(self, keep: Mapping[str, Tensor]) -> int:
        """How many filters of the layer that it is named for go."""
        return self.filters - len(keep[self.name])


def units(groups: Sequence[Group], filters: Mapping[str, int]) -> list[Unit]:
    """Groups that have a layer in common, as those of a stream that grows, are one unit.

    filters: of every layer, in the order of execution, as are the units by their first layers.
    """
    sets = DisjointSet(range(len(groups)))
    first: dict[str, int] = {}
    for index, group in enumerate(groups):
        for name, _ in group.members:
            sets.merge(first.setdefault(name, index), index)
    order = {name: place for place, name in enumerate(filters)}
    found = []
    for places in sets.subsets():
        own = tuple(groups[place] for place in sorted(places))
        names = {name for group in own for name, _ in group.members}
        narrowest = min(names, key=lambda name: (filters[name], order[name]))
        found.append((min(order[name] for name in names), narrowest, own))
    return [Unit(name, filters[name], own) for _, name, own in sorted(found, key=lambda f: f[0])]


def choice(model: nn.Module, rule: Rule, groups: Sequence[Group], evidence: Evidence) -> Choice:
    """What a criterion keeps of the network as it stands; it is scored once, unless its scores
    depend on the rate."""
    scored: dict[float, Mapping[str, Tensor]] = {}

    def chosen(unit: Unit, rate: float) -> Keep:
        at = rate if "rate" in rule.scored_by.given else 0.0
        if at not in scored:
            scored[at] = score(model, rule, at, groups, evidence)
        return highest(scored[at], rule, rate, unit.groups)

    return chosen
