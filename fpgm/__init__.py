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
    from fpgm.graph.cost import cost
    from fpgm.networks.models import model
    from fpgm.selection.select import select, zero_

__version__ = "0.1.0"
__all__ = [
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

_HOME = {
    "compact": "compaction.compact",
    "cost": "graph.cost",
    "equivalence": "compaction.compact",
    "load": "compaction.compact",
    "model": "networks.models",
    "select": "selection.select",
    "zero_": "selection.select",
}


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(importlib.import_module(f"fpgm.{_HOME[name]}"), name)
    if name in ("criteria", "evidence"):
        return importlib.import_module(
            {"evidence": "fpgm.criteria.evidence"}.get(name, "fpgm.criteria")
        )
    raise AttributeError(f"module 'fpgm' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
