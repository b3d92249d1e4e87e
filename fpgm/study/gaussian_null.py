"""What criteria give on filters that differ by chance alone: iid Gaussian ones of the same shape.

Whatever two criteria share on these is owed to what they compute, and says nothing about the
network. Criteria that look at data have no such null (see fpgm.study.agreement.by_chance).
"""

from __future__ import annotations

import zlib
from collections import Counter
from collections.abc import Sequence

import numpy as np
import torch

from fpgm.criteria import CRITERIA
from fpgm.selection.ranking import levelled
from fpgm.study.agreement import Array, fisher, kendall, overlap, spearman, spread_of

Shape = tuple[int, ...]
SCALE_FREE = frozenset({"random"})  # the others are proportional to the weights
WORK = 4e6  # weights drawn for a shape; small layers get more draws, as theirs scatter more
MOST = 200


def count_draws(shape: Shape, least: int) -> int:
    """How many networks are drawn for a layer of this shape, at least `least`."""
    return max(least, min(MOST, int(WORK / np.prod(shape))))


def draw(shape: Shape, names: Sequence[str], count: int, seed: int) -> Array:
    """Scores of `count` layers of iid N(0, 1) filters (N, C, kH, kW) -> (count, K, N).

    Seeded by the shape alone, so that neither the order of the layers nor other layers matter.
    """
    generator = np.random.default_rng([seed, zlib.crc32(repr(shape).encode())])
    scores = np.empty((count, len(names), shape[0]))
    for i in range(count):
        weight = torch.from_numpy(generator.standard_normal(shape, dtype=np.float32))
        for k, name in enumerate(names):
            options = {"seed": int(generator.integers(2**31))} if name == "random" else {}
            scores[i, k] = levelled(CRITERIA[name](weight, **options)).numpy()
    return scores


def figures(draws: Array, rates: Sequence[float]) -> dict[str, Array]:
    """Mean and 95 % interval of every figure of fpgm.study.agreement over the draws (D, K, N).

    Returns spearman (3, K, K), kendall (3, K, K), overlap (3, R, K, K), and mean and deviation of
    Fisher's transformation of Spearman's rho, fisher (2, K, K).
    """
    generator = np.random.default_rng(draws.shape)  # for ties, which few draws have
    rho = np.stack([spearman(scores) for scores in draws])
    transformed = fisher(rho, draws.shape[-1])
    return {
        "spearman": spread_of(rho),
        "fisher": np.stack((transformed.mean(0), transformed.std(0, ddof=1))),
        "kendall": spread_of(np.stack([kendall(scores) for scores in draws])),
        "overlap": spread_of(
            np.stack([overlap(scores, rates, generator.random(scores.shape)) for scores in draws])
        ),
    }


def whole_network(
    shapes: Sequence[Shape],
    deviations: Sequence[float],
    names: Sequence[str],
    nulls: dict[Shape, Array],
    generator: np.random.Generator,
) -> list[Array]:
    """Scores of a network of Gaussian filters, (K, N) for each layer.

    deviations: standard deviation of each layer's weights, which a ranking over layers may see.
    Layers of one shape get different ones of its draws.
    """
    scale = np.array([name not in SCALE_FREE for name in names])[:, None]
    counts = sorted(Counter(shapes).items())  # so that the order of the layers does not matter
    chosen = {
        shape: iter(generator.choice(len(nulls[shape]), count, replace=False))
        for shape, count in counts
    }
    return [
        nulls[shape][next(chosen[shape])] * np.where(scale, deviation, 1.0)
        for shape, deviation in zip(shapes, deviations, strict=True)
    ]
