"""What a criterion is: a function that scores filters, what it looks at, and its options.

    @criterion(gamma=Scale())
    def bn_gamma(weight: Tensor, *, gamma: Tensor) -> Tensor: ...

The decorator declares which parameters are handed evidence, and of which view; `seed` and `rate`
are handed by the selection to those that have such a parameter; all others are options, and their
annotations say what is allowed (Literal, Annotated[float, Field(...)]). There is no list to edit:
every function so marked in a module of fpgm.criteria is in CRITERIA.
"""

from __future__ import annotations

import importlib
import inspect
import pkgutil
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from fpgm.config import checked
from fpgm.criteria.views import View
from fpgm.errors import Error, imported

GIVEN = ("seed", "rate")  # by the selection, to the criteria that have such a parameter


@dataclass(frozen=True)
class Criterion:
    """function: weight (N, C, kH, kW) -> (N,) float64, lowest pruned first; views: parameter ->
    what it is handed; joint: what it looks at adds up over layers that are decided together, before
    it is scored; places: it gives an order of pruning in a layer and no scores that could be
    compared with another layer's; pruned: (filters, rate, **options) -> how many of a layer's
    filters go, where that is not floor(filters * rate)."""

    name: str
    function: Callable[..., Tensor]
    views: Mapping[str, View] = field(default_factory=dict)
    joint: bool = False
    places: bool = False
    pruned: Callable[..., int] | None = None

    @property
    def options(self) -> dict[str, Any]:
        """Name -> default, of what the user may set."""
        parameters = inspect.signature(self.function).parameters
        taken = {"weight", *GIVEN, *self.views}
        return {name: p.default for name, p in parameters.items() if name not in taken}

    @property
    def given(self) -> set[str]:
        """Which of GIVEN it takes."""
        return set(GIVEN) & set(inspect.signature(self.function).parameters)

    @property
    def reads_images(self) -> bool:
        return any(view.reads_images for view in self.views.values())

    @property
    def needs_image(self) -> bool:
        """Whether it must know the images' size."""
        return any(view.needs_image for view in self.views.values())

    @property
    def needs_part(self) -> str | None:
        """What must stand behind a convolution that it can score."""
        return next((view.part for view in self.views.values() if view.part), None)

    def check(self, options: Mapping[str, Any], prefix: str = "criterion.") -> list[str]:
        """A line for each option that is unknown or has a value it does not take."""
        hints = typing.get_type_hints(self.function, include_extras=True)
        defaults = self.options
        return checked({name: (hints[name], defaults[name]) for name in defaults}, options, prefix)

    def __call__(self, weight: Tensor, **arguments: Any) -> Tensor:
        """(N, C, kH, kW) -> (N,) float64. One that looks at more than the weight gives a filter
        that is all zero -inf: what BatchNorm makes of it is no measure beside that of live filters,
        and a filter that is pruned and has not grown back must never push out one that works.

        Raises Error for evidence of another number of filters.
        """
        for name in self.views:
            values = arguments[name]
            if values.shape[:1] != (len(weight),):
                raise Error(
                    f"{name}: needs a value for each of the {len(weight)} filters, has the shape "
                    f"{tuple(values.shape)}"
                )
            arguments[name] = values.detach().to(weight.device).double()
        scores = self.function(weight, **arguments)
        return below_live(scores, weight) if self.views else scores


CRITERIA: dict[str, Criterion] = {}


def criterion(
    *,
    joint: bool = False,
    places: bool = False,
    pruned: Callable[..., int] | None = None,
    **views: View,
) -> Callable[[Callable[..., Tensor]], Criterion]:
    """Mark a function as a criterion that goes by its name. views: parameter -> what it is handed;
    joint, places, pruned: see Criterion."""

    def mark(function: Callable[..., Tensor]) -> Criterion:
        return Criterion(function.__name__, function, views, joint, places, pruned)

    return mark


def collect(package: str) -> None:
    """Put the criteria of every module of a package into CRITERIA: those of the weight first."""
    path = importlib.import_module(package).__path__
    modules = [importlib.import_module(f"{package}.{m.name}") for m in pkgutil.iter_modules(path)]
    marked = {v.name: v for m in modules for v in vars(m).values() if isinstance(v, Criterion)}
    order = sorted(marked, key=lambda name: (bool(marked[name].views), name))
    CRITERIA.update((name, marked[name]) for name in order)


def named(name: str) -> Criterion:
    """The criterion of a name in CRITERIA, or package.module:function of your own. Raises Error."""
    if name in CRITERIA:
        return CRITERIA[name]
    if ":" not in name:
        raise Error(
            f"criterion={name}: choose one of {', '.join(CRITERIA)}, or module:function of yours"
        )
    marked = imported("criterion", name)
    if not isinstance(marked, Criterion):
        raise Error(f"criterion={name}: is no criterion; mark it with @fpgm.criteria.criterion()")
    return replace(marked, name=name)


def below_live(scores: Tensor, weight: Tensor) -> Tensor:
    """Scores with -inf for filters whose weight is all zero. (N,), (N, C, kH, kW) -> (N,)."""
    return scores.masked_fill(~weight.detach().flatten(1).any(1), -torch.inf)


def tie_rate(scores: Tensor) -> Tensor:
    """Share of the filters whose score another filter has as well, 0..1. (..., N) -> (...)."""
    ordered = scores.sort(dim=-1).values
    equal = ordered[..., 1:] == ordered[..., :-1]
    edge = equal.new_zeros((*scores.shape[:-1], 1))
    shared = torch.cat((edge, equal), dim=-1) | torch.cat((equal, edge), dim=-1)
    return shared.double().mean(-1)
