"""What a criterion may look at beside the weight: views of a convolution, each a declaration.

A view is a small frozen class that says what a convolution must have to be looked at, and makes the
collector that gathers it; fpgm.criteria.evidence runs all collectors that are asked for in one pass
over the images. A new kind of view is one file here, and nothing else knows of it.
"""

from fpgm.criteria.views.batchnorm import Gate, Scale
from fpgm.criteria.views.contributions import Contributions
from fpgm.criteria.views.feature_maps import Maps
from fpgm.criteria.views.gradients import MapGradients, WeightGradients
from fpgm.criteria.views.preferred import Preferred
from fpgm.criteria.views.readers import Readers, Worth
from fpgm.criteria.views.view import Collector, View

__all__ = [
    "Collector", "Contributions", "Gate", "MapGradients", "Maps", "Preferred", "Readers", "Scale",
    "View", "WeightGradients", "Worth",
]  # fmt: skip
