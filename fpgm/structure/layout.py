"""Where the boxes of a graph stand: in rows from top to bottom, few lines crossing.

After Gansner, Koutsofios, North and Vo (A technique for drawing directed graphs, 1993): rows by the
longest way from the top, an order in each row by the mean of the neighbours, then places across
such that lines go as little sideways as they can, by a linear program. A line that passes rows
takes a place in each of them, one for all that read the same box.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from scipy.optimize import linprog
from scipy.sparse import block_array, csr_array, eye_array

ASIDE, BELOW = 16.0, 22.0  # pixels between boxes of a row, and between rows
LANE = 4.0  # of a line that passes between boxes
SWEEPS = 12
STRAIGHT = (1.0, 2.0, 8.0)  # what a step sideways costs, by how many of its ends pass a row

Item = tuple[int, int]  # a box and the row: its own, or one that its line passes


@dataclass(frozen=True)
class Box:
    """A rectangle by its centre, in pixels."""

    x: float
    y: float
    width: float
    height: float


@dataclass(frozen=True)
class Layout:
    """boxes: as they were given; lines: each from the bottom of one rectangle to the top of one in
    the next row, of which those that are passed have no width that is seen."""

    boxes: list[Box]
    passed: list[Box]
    lines: list[tuple[Box, Box]]
    width: float
    height: float


def arranged(sizes: Sequence[tuple[float, float]], edges: Sequence[tuple[int, int]]) -> Layout:
    """Lay out boxes of (width, height). edges: (from, to) with from < to: in order of execution."""
    row = _rows(len(sizes), edges)
    links = _links(edges, row)
    above: defaultdict[Item, list[Item]] = defaultdict(list)
    below: defaultdict[Item, list[Item]] = defaultdict(list)
    for upper, lower in links:
        above[lower].append(upper)
        below[upper].append(lower)
    rows: list[list[Item]] = [[] for _ in range(max(row, default=-1) + 1)]
    for item in dict.fromkeys([*enumerate(row), *(end for link in links for end in link)]):
        rows[item[1]].append(item)
    # In each row there is a box: else those of the next one would stand in it.
    heights = [max(sizes[box][1] for box, r in items if row[box] == r) for items in rows]
    size = {
        (box, r): sizes[box] if row[box] == r else (LANE, heights[r])
        for items in rows
        for box, r in items
    }
    rows = _ordered(rows, above, below)
    across = _placed(rows, {item: width for item, (width, _) in size.items()}, links)
    left = min((across[item] - width / 2 for item, (width, _) in size.items()), default=0.0)
    top = [BELOW * (r + 1) + sum(heights[:r]) for r in range(len(rows))]
    placed = {
        item: Box(across[item] - left, top[item[1]] + heights[item[1]] / 2, *size[item])
        for item in size
    }
    return Layout(
        [placed[item] for item in enumerate(row)],
        [box for item, box in placed.items() if row[item[0]] != item[1]],
        [(placed[upper], placed[lower]) for upper, lower in links],
        max((box.x + box.width / 2 for box in placed.values()), default=0.0),
        sum(heights) + BELOW * (len(heights) + 1),
    )


def _rows(count: int, edges: Sequence[tuple[int, int]]) -> list[int]:
    """The longest way from the top to each box."""
    row = [0] * count
    for source, target in sorted(edges, key=lambda edge: edge[1]):
        row[target] = max(row[target], row[source] + 1)
    return row


def _links(edges: Sequence[tuple[int, int]], row: Sequence[int]) -> list[tuple[Item, Item]]:
    """Steps of one row each."""
    links: dict[tuple[Item, Item], None] = {}
    for source, target in edges:
        for r in range(row[source], row[target] - 1):
            links[(source, r), (source, r + 1)] = None
        links[(source, row[target] - 1), (target, row[target])] = None
    return list(links)


Neighbours = Mapping[Item, Sequence[Item]]


def _ordered(rows: list[list[Item]], above: Neighbours, below: Neighbours) -> list[list[Item]]:
    """The rows in the order, of those tried, in which the fewest lines cross."""
    best, fewest = rows, _crossings(rows, below)
    for sweep in range(SWEEPS):
        down = sweep % 2 == 0
        rows = [list(items) for items in rows]
        place = {item: index / len(items) for items in rows for index, item in enumerate(items)}
        for items in rows if down else rows[::-1]:
            wanted = {item: _mean(place, item, above if down else below) for item in items}
            items.sort(key=wanted.__getitem__)
            place.update({item: index / len(items) for index, item in enumerate(items)})
        crossings = _crossings(rows, below)
        if crossings < fewest:
            best, fewest = rows, crossings
    return best


def _mean(place: Mapping[Item, float], item: Item, near: Neighbours) -> float:
    """Where an item's neighbours are, itself where it has none."""
    places = [place[other] for other in near.get(item, ())]
    return sum(places) / len(places) if places else place[item]


def _crossings(rows: Sequence[Sequence[Item]], below: Neighbours) -> int:
    count = 0
    for upper, lower in pairwise(rows):
        place = {item: index for index, item in enumerate(lower)}
        ends = [sorted(place[other] for other in below.get(item, ())) for item in upper]
        seen: list[int] = []
        for end in ends:
            count += sum(earlier > later for later in end for earlier in seen)
            seen += end
    return count


def _placed(
    rows: Sequence[Sequence[Item]],
    width: Mapping[Item, float],
    links: Sequence[tuple[Item, Item]],
) -> dict[Item, float]:
    """The middle of each item across: the least way sideways over all lines, none overlapping."""
    number = {item: index for index, item in enumerate(i for items in rows for i in items)}
    neighbours = [pair for items in rows for pair in pairwise(items)]
    count, lines = len(number), len(links)
    ends = np.array([(number[a], number[b]) for a, b in links]).reshape(-1, 2)
    sides = np.array([(number[a], number[b]) for a, b in neighbours]).reshape(-1, 2)
    step = _differences(ends, count)
    ways = eye_array(lines)
    # Unknown: the places, and for each line at least how far it goes to either side.
    limits = block_array(
        [[step, -ways], [-step, -ways], [_differences(sides, count), None]], format="csr"
    )
    apart = [(width[a] + width[b]) / 2 + ASIDE for a, b in neighbours]
    weights = [STRAIGHT[(width[a] == LANE) + (width[b] == LANE)] for a, b in links]
    found = linprog(
        np.concatenate((np.zeros(count), weights)),
        A_ub=limits,
        b_ub=np.concatenate((np.zeros(2 * lines), -np.array(apart))),
        bounds=[(0, None)] * (count + lines),
        method="highs",
    )
    return {item: float(found.x[index]) for item, index in number.items()}


def _differences(pairs: np.ndarray, count: int) -> csr_array:
    """A matrix of a row for each pair (a, b): x -> x[a] - x[b]."""
    rows = np.arange(len(pairs))
    values = np.concatenate((np.ones(len(pairs)), -np.ones(len(pairs))))
    places = (np.concatenate((rows, rows)), pairs.T.flatten())
    return csr_array((values, places), shape=(len(pairs), count))
