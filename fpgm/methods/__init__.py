"""What happens to filters while the network trains: METHODS, by name.

A new one is a class derived from Method, with a `name`, in a file of `schedules` where it owns
`keep` or of `beside`, and a YAML: in configs/schedule or configs/method.
"""

from __future__ import annotations

import importlib
import pkgutil

from fpgm.errors import Error, imported
from fpgm.pruning.method import Goal, Method, Schedule, Task, Trained

__all__ = ["METHODS", "Goal", "Method", "Schedule", "Task", "Trained", "named"]

METHODS: dict[str, type[Method]] = {}

for _module in pkgutil.walk_packages(__path__, f"{__name__}."):
    for _value in vars(importlib.import_module(_module.name)).values():
        if isinstance(_value, type) and issubclass(_value, Method) and "name" in vars(_value):
            METHODS[_value.name] = _value


def named(name: str, group: str) -> type[Method]:
    """The method of a name in METHODS, or package.module:Class of your own. Raises Error.

    group: `schedule` for those that own the selection, `method` for those beside them.
    """
    owners = {n: issubclass(m, Schedule) for n, m in METHODS.items()}
    fitting = sorted(n for n, owns in owners.items() if owns == (group == "schedule"))
    if name not in METHODS and ":" not in name:
        choices = ", ".join(fitting)
        raise Error(f"{group}={name}: choose one of {choices}, or module:Class of your own")
    method = METHODS[name] if name in METHODS else imported(group, name)
    if not (isinstance(method, type) and issubclass(method, Method)):
        raise Error(f"{group}={name}: is no method; derive it from fpgm.methods.Method")
    if issubclass(method, Schedule) != (group == "schedule"):
        other = "method" if group == "schedule" else "schedule"
        raise Error(f"{group}={name}: goes with {other}=; here choose one of {', '.join(fitting)}")
    return method
