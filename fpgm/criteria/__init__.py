"""Criteria: from a convolution's weight, and what else it looks at, to one score for each filter.

CRITERIA holds them by name; each is called with a weight (N, C, kH, kW) and gives (N,) float64,
lowest pruned first. A new one is a function marked with @criterion in a file of this package and a
YAML in configs/criterion.
"""

from __future__ import annotations

from fpgm.criteria.criterion import CRITERIA, Criterion, collect, criterion, named, tie_rate
from fpgm.criteria.views import (
    Contributions,
    Gate,
    MapGradients,
    Maps,
    Preferred,
    Readers,
    Scale,
    WeightGradients,
    Worth,
)

__all__ = [
    "CRITERIA", "Contributions", "Criterion", "Gate", "MapGradients", "Maps", "Preferred",
    "Readers", "Scale", "WeightGradients", "Worth", "criterion", "named", "tie_rate",
]  # fmt: skip

collect(__name__)
