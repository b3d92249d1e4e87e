"""Accuracy over any key that runs differ in: a line for each cell but for that key. No torch."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from fpgm import page
from fpgm.errors import Error
from fpgm.keys import flatten, suggestion
from fpgm.report.cells import NETWORKS, Cell, Spread, identity, look, told_apart
from fpgm.report.table import Rows, Shown

if TYPE_CHECKING:
    from matplotlib.figure import Figure

HOLLOW = "bars: standard deviation over seeds; hollow: published."


@dataclass(frozen=True)
class Line:
    """name: what its cells have in common; points: (value of the key, the cell), in order."""

    name: str
    points: tuple[tuple[Any, Cell], ...]


@dataclass(frozen=True)
class Sweep:
    """key: as config.yaml has it, nested keys joined by points; numeric: whether all its values
    are numbers, else they are categories in the order of `values`."""

    key: str
    lines: tuple[Line, ...]
    values: tuple[Any, ...]
    numeric: bool

    def place(self, value: Any) -> float:
        """Where a value stands on the axis."""
        return float(value) if self.numeric else self.values.index(value)


def sweep(table: Sequence[Cell], key: str) -> Sweep:
    """The cells by a key of the configuration; criterion means criterion.name. Raises Error that
    names the keys which vary, where this one does not."""
    counted = [cell for cell in table if cell.problem is None]
    identities = [identity(cell.runs[0]) for cell in counted]
    varying = _varying(identities)
    key = f"{key}.name" if f"{key}.name" in varying else key
    if key not in varying:
        known = any(key in values for values in identities)
        why = "is the same in all runs" if known else "no such key of these runs"
        near = suggestion(key, varying) if varying and not known else ""
        others = f"what varies is {', '.join(varying)}" if varying else "nothing varies here"
        raise Error(f"--x {key}: {why}; {others}{f' ({near})' if 'mean' in near else ''}")
    groups: defaultdict[tuple[tuple[str, str], ...], list[Cell]] = defaultdict(list)
    for cell, values in zip(counted, identities, strict=True):
        if key in values:
            groups[tuple(sorted(_rest(values, key).items()))].append(cell)
    given: list[Any] = [_value(cell, key) for same in groups.values() for cell in same]
    numeric = all(isinstance(value, int | float) and value is not True for value in given)
    ordered = sorted(set(given)) if numeric else sorted(set(map(_word, given)))
    lines = []
    for name, same in zip(_names(groups, key), groups.values(), strict=True):
        found = [(_value(cell, key), cell) for cell in same]
        points = [(value if numeric else _word(value), cell) for value, cell in found]
        lines.append(Line(name, tuple(sorted(points, key=lambda point: ordered.index(point[0])))))
    return Sweep(key, tuple(lines), tuple(ordered), numeric)


def _varying(identities: Sequence[Mapping[str, str]]) -> list[str]:
    """Keys with more than one value among those that have them."""
    seen: defaultdict[str, set[str]] = defaultdict(set)
    for values in identities:
        for key, value in values.items():
            seen[key].add(value)
    return sorted(key for key, values in seen.items() if len(values) > 1)


def _rest(values: Mapping[str, str], key: str) -> dict[str, str]:
    """What a line's cells have in common: all but the key, with a name also the options of what
    bears it, and with the network the baseline that a run has begun with."""
    options = key.removesuffix("name") if key.endswith(".name") else f"{key}."
    hidden = {key, "pretrained"} if key in (*NETWORKS, "dataset.name") else {key}
    return {k: v for k, v in values.items() if k not in hidden and not k.startswith(options)}


def _value(cell: Cell, key: str) -> Any:
    return flatten(cell.runs[0].config).get(key)


def _word(value: Any) -> str:
    return "null" if value is None else str(value)


def _names(groups: Mapping[tuple[tuple[str, str], ...], Sequence[Cell]], key: str) -> list[str]:
    """Of the lines: what is seen at a glance, and what tells apart those that look alike."""
    looks = [look(same[0].runs[0].config, without=key) for same in groups.values()]
    several = len({network for network, *_ in looks}) > 1
    shown = []
    for network, method, rate, start in looks:
        words = [network if several else "", method, rate, "" if start == "scratch" else start]
        shown.append(" ".join(word for word in words if word))
    alike: defaultdict[str, list[int]] = defaultdict(list)
    for index, name in enumerate(shown):
        alike[name].append(index)
    identities = [dict(values) for values in groups]
    for indices in alike.values():
        if indices[1:]:
            differences = told_apart([identities[index] for index in indices])
            for index, also in zip(indices, differences, strict=True):
                shown[index] = f"{shown[index]} {also}".strip()
    return shown


def rows(swept: Sweep) -> Rows:
    """Each cell with its value, mean ± std over its seeds and the paper's figure."""
    body: list[list[Shown]] = []
    for line in swept.lines:
        for value, cell in line.points:
            top1, paper = cell.spread("accuracy", "compact_last"), cell.paper
            at: Shown = (float(value), f"{value:g}") if swept.numeric else value
            printed: Shown = ""
            if paper is not None and paper.top1 is not None:
                printed = (paper.top1, str(Spread(paper.top1, paper.std)))
            seeds = ",".join(map(str, cell.seeds))
            body.append([line.name, at, seeds, (top1.mean, str(top1)), printed, cell.verdict()])
    return ["line", swept.key, "seeds", "top-1 %", "paper %", "verdict"], body


def figure(swept: Sweep) -> Figure:
    """Top-1 over the key, with its spread over seeds; hollow: published."""
    drawing, axes = page.axes()
    for index, line in enumerate(swept.lines):
        spreads = [cell.spread("accuracy", "compact_last") for _, cell in line.points]
        places = [swept.place(value) for value, _ in line.points]
        axes.errorbar(
            places, [s.mean for s in spreads], [s.std or 0 for s in spreads], label=line.name,
            capsize=3, linewidth=1.4, **page.style(index),
        )  # fmt: skip
        printed = [(p, c.paper) for p, (_, c) in zip(places, line.points, strict=True)]
        points = [(p, paper) for p, paper in printed if paper is not None and paper.top1]
        if points:
            methods = {paper.method for _, paper in points}
            what = methods.pop() if len(methods) == 1 else line.name
            axes.errorbar(
                [p for p, _ in points], [paper.top1 or 0 for _, paper in points],
                [paper.std or 0 for _, paper in points], label=f"published: {what}",
                mfc="none", linestyle="", capsize=3, alpha=0.8, **page.style(index),
            )  # fmt: skip
    if not swept.numeric:
        axes.set_xticks(range(len(swept.values)), swept.values)
    page.finish(axes, swept.key, "top-1 after the last epoch, %")
    return drawing
