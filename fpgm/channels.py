"""What compaction knows of one tensor of the zeroed network."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class Channels:
    """The channels of one tensor of the zeroed network.

    total: how many there are; live: which of them the compact tensor holds, sorted, in its order;
    constant: (total,) float64, the value of each channel that is not live, 0 where it is.
    After a flatten a channel may be a run of features.
    """

    total: int
    live: Tensor
    constant: Tensor

    @property
    def whole(self) -> bool:
        return len(self.live) == self.total

    def map(self, function: Callable[[Tensor], Tensor]) -> Channels:
        """Apply an elementwise function of (1, C, 1, 1) to the constants."""
        constant = function(self.constant.view(1, -1, 1, 1).clone()).flatten()
        return replace(self, constant=constant.index_fill(0, self.live, 0))

    def features(self, size: int) -> Channels:
        """The same seen as `size` features, size / total in a run for each channel."""
        run = size // self.total
        places = torch.arange(run, device=self.live.device)
        live = (self.live[:, None] * run + places).flatten()
        return Channels(size, live, self.constant.repeat_interleave(run))
