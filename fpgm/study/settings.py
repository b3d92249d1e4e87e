"""What a study is asked for, checked. No torch: the command's help answers at once."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import Field, dataclass, field, fields
from typing import Any

from fpgm.errors import Error

NORMALISE = ("none", "mean", "l2", "rank")
LAYERS = ("prunable", "all")
DRAWS = 299  # of a null of the assumption: p-values down to 1 / 300


def count(default: int, least: int, what: str) -> Any:
    return field(default=default, metadata={"least": least, "what": what})


def limit(default: float, most: float, what: str, least: float = 0) -> Any:
    return field(default=default, metadata={"most": most, "what": what, "least": least})


@dataclass(frozen=True, kw_only=True)
class Settings:
    """criteria: empty for all that the network and the data can serve; rates: shares of filters
    pruned; normalise: how layers are made comparable in the ranking over the network (see
    fpgm.selection.ranking); layers: those that fpgm would prune, or all convolutions; draws: small
    layers get more.

    The limits of norms are ours, no paper gives any: iid Gaussian filters have a std / mean of 0.13
    in a 3x3 layer with 3 inputs, of 0.04 with 32.
    """

    criteria: tuple[str, ...] = ()
    rates: tuple[float, ...] = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7)
    normalise: str = "mean"
    layers: str = "prunable"
    seed: int = count(0, 0, "of all random numbers")
    draws: int = count(10, 3, "Gaussian networks of the null, at least")
    batches: int = count(32, 2, "batches of training images to read")
    batch_size: int = count(32, 2, "images in each")
    resamples: int = count(10, 1, "times that those are drawn anew, to see if a choice holds")
    alpha: float = limit(0.01, 1, "level of the tests of the assumption", 1 / (DRAWS + 1))
    min_cv: float = limit(0.2, 1e3, "std / mean that norms need to tell filters apart")
    max_minimum: float = limit(0.1, 1, "least norm / median that counts as near zero")

    def __post_init__(self) -> None:
        problem = next(_problems(self), None)
        if problem is not None:
            raise Error(problem)


def numbers() -> dict[str, Field[Any]]:
    """The settings that are one number: flag -> what it is."""
    return {f"--{f.name.replace('_', '-')}": f for f in fields(Settings) if f.metadata}


def _problems(s: Settings) -> Iterator[str]:
    for flag, chosen, choices in (
        ("--normalise", s.normalise, NORMALISE),
        ("--layers", s.layers, LAYERS),
    ):
        if chosen not in choices:
            yield f"{flag} {chosen}: choose from {', '.join(choices)}"
    for rate in s.rates:
        if not 0 < rate < 1:
            yield f"--rates {rate:g}: must be above 0 and below 1, for example 0.4"
    for flag, several in (("--criteria", s.criteria), ("--rates", s.rates)):
        if len(set(several)) < len(several):
            yield f"{flag} {','.join(map(str, several))}: names one twice"
    if not s.rates:
        yield "--rates: give one at least, for example --rates 0.4"
    for flag, f in numbers().items():
        value, least, most = getattr(s, f.name), f.metadata.get("least"), f.metadata.get("most")
        if least is not None and value < least:
            yield f"{flag} {value}: must be at least {least:.4g}"
        if most is not None and not 0 < value <= most:
            yield f"{flag} {value:g}: must be above 0 and at most {most:g}"
