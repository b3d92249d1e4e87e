"""What compaction knows of one tensor of the zeroed network."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor, fx


@dataclass(frozen=True)
class Channels:
    """The channels of one tensor of the zeroed network.

    total: how many there are; live: which of them the compact tensor holds, sorted, in its order;
    constant: (total,) float64, the value of each channel that is the same whatever the image, NaN
    where it is not. All that are not live are constant; one that is live may be, too.
    After a flatten a channel may be a run of features.
    """

    total: int
    live: Tensor
    constant: Tensor

    @property
    def whole(self) -> bool:
        return len(self.live) == self.total

    @property
    def absent(self) -> Tensor:
        """The constants of the channels that are not live, 0 for the others. (total,)"""
        return self.constant.index_fill(0, self.live, 0)

    def map(self, function: Callable[[Tensor], Tensor]) -> Channels:
        """Apply an elementwise function of (1, C, 1, 1) to the constants."""
        constant = function(self.constant.view(1, -1, 1, 1).clone()).flatten()
        # Not every activation hands NaN on.
        return replace(self, constant=constant.masked_fill(self.constant.isnan(), torch.nan))

    def features(self, size: int) -> Channels:
        """The same seen as `size` features, size / total in a run for each channel."""
        run = size // self.total
        places = torch.arange(run, device=self.live.device)
        live = (self.live[:, None] * run + places).flatten()
        return Channels(size, live, self.constant.repeat_interleave(run))


@dataclass(frozen=True)
class Expansion:
    """An Expand in front of `reader`: `missing` of the `width` channels of `source` are absent."""

    reader: fx.Node
    source: fx.Node
    missing: Tensor
    width: int
