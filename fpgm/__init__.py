"""fpgm: prune the filters of a CNN by geometric median and ship a network that is really smaller.

The public names load on first use (PEP 562), so that `import fpgm` and the command line's help do
not wait for torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fpgm import criteria
    from fpgm.compaction.compact import compact, equivalence, load
    from fpgm.criteria import evidence
    from fpgm.errors import Error
    from fpgm.graph.cost import cost
    from fpgm.loops.lightning import PruneFilters as PruneFilters  # not in __all__: an extra's
    from fpgm.loops.pruner import Pruner
    from fpgm.networks.models import model
    from fpgm.selection.select import select
    from fpgm.selection.zero import zero_

__all__ = [
    "Error",
    "Pruner",
    "compact",
    "cost",
    "criteria",
    "equivalence",
    "evidence",
    "load",
    "model",
    "select",
    "zero_",
]

_MODULES = {"criteria": "fpgm.criteria", "evidence": "fpgm.criteria.evidence"}
_HOME = {
    "Error": "fpgm.errors",
    "PruneFilters": "fpgm.loops.lightning",
    "Pruner": "fpgm.loops.pruner",
    "compact": "fpgm.compaction.compact",
    "cost": "fpgm.graph.cost",
    "equivalence": "fpgm.compaction.compact",
    "load": "fpgm.compaction.compact",
    "model": "fpgm.networks.models",
    "select": "fpgm.selection.select",
    "zero_": "fpgm.selection.zero",
}


def __getattr__(name: str) -> Any:
    if name == "__version__":
        return importlib.import_module("importlib.metadata").version("fpgm")
    if name in _MODULES:
        return importlib.import_module(_MODULES[name])
    if name in _HOME:
        return getattr(importlib.import_module(_HOME[name]), name)
    raise AttributeError(f"module 'fpgm' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
