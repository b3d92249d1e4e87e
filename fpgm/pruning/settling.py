"""When a selection is fixed for good: at a given moment, or when it has come to rest."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor

Share = Annotated[float, Field(ge=0, le=1, examples=["0.6"])]
Settle = Annotated[
    Annotated[float, Field(ge=0, le=1)] | Literal["auto"], Field(examples=["0.6", "auto"])
]
Keep = Mapping[str, Tensor]

SAME = 0.999  # of what is kept, from selection to selection
OF = 3  # selections, over which that is averaged


class Settling:
    """share: of the epochs after which the selection stays, 1: never; or auto: once it has stopped
    changing (OCSPruner, Ghimire et al., 2023: what is kept is held against that of one and of two
    selections ago), `latest` of the epochs at the latest. end: the epoch by whose beginning it is
    fixed in any case, None: none.

    epoch: how many epochs were done when it was fixed, None while it is not; rest: how much of it
    was the same over the last selections, 0..1, None before there are enough of them.
    """

    def __init__(
        self, share: float | str, latest: float, epochs: int, end: int | None = None
    ) -> None:
        self.auto = share == "auto"
        self.rest: float | None = None
        self._last = latest if self.auto else float(share)
        self._epochs, self._end = epochs, end
        self._found: int | None = None
        self._before: list[Keep] = []  # the last two selections
        self._similar: list[float] = []  # of the last ones, to those before each

    @property
    def epoch(self) -> int | None:
        return self._found if self._found is not None else self._fallback

    @property
    def came_to_rest(self) -> bool:
        """Whether it was fixed as it had stopped changing."""
        return self._found is not None

    @property
    def _fallback(self) -> int | None:
        given = math.ceil(self._last * self._epochs) if self._last < 1 else None
        return min((epoch for epoch in (given, self._end) if epoch is not None), default=None)

    def by(self, epoch: int) -> bool:
        """Whether the selection is fixed when `epoch` begins."""
        return self.epoch is not None and epoch >= self.epoch

    def see(self, epoch: int, keep: Keep) -> None:
        """A selection at the full rate, made after `epoch`."""
        if not self.auto or self.by(epoch + 1):
            return
        if len(self._before) == 2:
            self._similar.append(statistics.fmean(alike(keep, other) for other in self._before))
            recent = self._similar[-OF:]
            self._similar, self.rest = recent, statistics.fmean(recent)
            if len(recent) == OF and self.rest >= SAME:
                self._found = epoch + 1
        self._before = [*self._before, {name: kept.clone() for name, kept in keep.items()}][-2:]

    def state(self) -> dict[str, Any]:
        """Plain values and tensors."""
        names = ("rest", "_found", "_before", "_similar")
        return {name: getattr(self, name) for name in names}

    def resume(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state` gave."""
        for name, value in state.items():
            setattr(self, name, value)


def alike(a: Keep, b: Keep) -> float:
    """Jaccard index of what two selections keep, mean over the layers: 1 where they are the same,
    0 where no layer keeps a filter in both."""
    shares = []
    for name, kept in a.items():
        both = int(torch.isin(kept, b[name]).sum())
        shares.append(both / (len(kept) + len(b[name]) - both))
    return statistics.fmean(shares)
