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
    from fpgm.networks.models import model
    from fpgm.selection.select import select, zero_

__version__ = "0.1.0"
__all__ = [
    "Error",
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
    "Error": "errors",
    "compact": "compaction.compact",
    "cost": "graph.cost",
    "criteria": "criteria",
    "equivalence": "compaction.compact",
    "evidence": "criteria.evidence",
    "load": "compaction.compact",
    "model": "networks.models",
    "select": "selection.select",
    "zero_": "selection.select",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'fpgm' has no attribute {name!r}")
    module = importlib.import_module(f"fpgm.{_HOME[name]}")
    return module if module.__name__.endswith(f".{name}") else getattr(module, name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
