"""What a study is asked for, checked. No torch: the command's help answers at once."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from fpgm.errors import Error

NORMALISE = ("none", "mean", "l2", "rank")
SCOPES = ("layer", "global")
LAYERS = ("prunable", "all")


@dataclass(frozen=True, kw_only=True)
class Settings:
    """criteria: empty for all that the network and the data can serve; scopes: rankings by layer,
    over the network, or both; rates: shares of filters pruned; normalise: how layers are made
    comparable in the ranking over the network (see fpgm.selection.ranking); layers: those that fpgm
    would prune, or all convolutions.

    draws: Gaussian networks of the null, at least (39 make a 95 % interval); perturbations: times
    that a choice is made again; noise: added then to every weight, in standard deviations of the
    layer's weights; batches of batch_size training images are read once.

    The thresholds are ours, no paper gives any. alpha, max_skew, max_kurtosis: a layer is called
    not Gaussian if D'Agostino's test rejects at alpha and an effect is above its limit; min_cv,
    max_minimum: a norm can tell filters apart if norms deviate by at least min_cv of their mean
    (iid Gaussian filters: 0.13 in a 3x3 layer with 3 inputs, 0.04 with 32) and the smallest is at
    most max_minimum of the median; collapse: share of a layer that a ranking over the network may
    prune before it is called collapsed.
    """

    criteria: tuple[str, ...] = ()
    scopes: tuple[str, ...] = SCOPES
    rates: tuple[float, ...] = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7)
    normalise: str = "mean"
    layers: str = "prunable"
    seed: int = 0
    draws: int = 40
    perturbations: int = 10
    noise: float = 0.01
    batches: int = 32
    batch_size: int = 32
    alpha: float = 0.01
    max_skew: float = 0.5
    max_kurtosis: float = 1.0
    min_cv: float = 0.2
    max_minimum: float = 0.1
    collapse: float = 0.9

    def __post_init__(self) -> None:
        problem = next(_problems(self), None)
        if problem is not None:
            raise Error(problem)


def _problems(s: Settings) -> Iterator[str]:
    for flag, chosen, choices in (
        ("--scope", s.scopes, SCOPES),
        ("--normalise", (s.normalise,), NORMALISE),
        ("--layers", (s.layers,), LAYERS),
    ):
        for value in chosen:
            if value not in choices:
                yield f"{flag} {value}: choose from {', '.join(choices)}"
    for rate in s.rates:
        if not 0 < rate < 1:
            yield f"--rates {rate:g}: must be above 0 and below 1, for example 0.4"
    for flag, several in (("--criteria", s.criteria), ("--scope", s.scopes), ("--rates", s.rates)):
        if len(set(several)) < len(several):
            yield f"{flag} {','.join(map(str, several))}: names one twice"
    if not s.scopes or not s.rates:
        yield "--scope and --rates: give one of each at least, for example --scope layer"
    for flag, count, least in (
        ("--draws", s.draws, 3), ("--perturbations", s.perturbations, 1),
        ("--batches", s.batches, 2), ("--batch-size", s.batch_size, 2), ("--seed", s.seed, 0),
    ):  # fmt: skip
        if count < least:
            yield f"{flag} {count}: must be at least {least}"
    for flag, limit, most in (
        ("--noise", s.noise, 10), ("--alpha", s.alpha, 1), ("--max-skew", s.max_skew, 1e3),
        ("--max-kurtosis", s.max_kurtosis, 1e3), ("--min-cv", s.min_cv, 1e3),
        ("--max-minimum", s.max_minimum, 1), ("--collapse", s.collapse, 1),
    ):  # fmt: skip
        if not 0 < limit <= most:
            yield f"{flag} {limit:g}: must be above 0 and at most {most:g}"
