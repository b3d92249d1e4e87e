"""What a criterion may look at beside the weight: views of a convolution, each a declaration.

fpgm.criteria.evidence gathers them in one pass over the images; a new criterion that looks at one
of these in its own way hands its view a function.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from torch import Tensor


@dataclass(frozen=True)
class Scale:
    """The absolute scale of the BatchNorm behind, |gamma|. (N,)"""

    part: Literal["BatchNorm", "ReLU"] = "BatchNorm"
    reads_images: bool = False


@dataclass(frozen=True)
class Gate:
    """What `measure` makes of the loss's gradient by a gate z = 1 on the BatchNorm's output, by
    minibatch: (N,) float64 -> (N,); summed over the minibatches."""

    measure: Callable[[Tensor], Tensor]
    part: Literal["BatchNorm", "ReLU"] = "BatchNorm"
    reads_images: bool = True


@dataclass(frozen=True)
class Maps:
    """What `measure` makes of the feature maps behind the ReLU, (B, N, H, W) -> (B, N); the mean
    over the images."""

    measure: Callable[[Tensor], Tensor]
    part: Literal["BatchNorm", "ReLU"] = "ReLU"
    reads_images: bool = True


View = Scale | Gate | Maps
