"""The house: rooms in one order, files that stay readable, names where they belong."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

from fpgm.criteria import CRITERIA

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "fpgm"

# A package imports only from those before it.
ORDER = [
    "errors", "keys", "page", "config", "networks", "machine", "graph", "data", "runs", "criteria",
    "selection", "compaction", "shipping", "compression", "pruning", "methods", "training",
    "loops", "cli", "report", "study", "figures", "sensitivity", "structure",
]  # fmt: skip

FILES, LINES, FUNCTION, TOP, LEVELS = 12, 400, 50, 24, 10

# What answers before torch is there: help, a run that is done, a report of many runs.
WITHOUT_TORCH = {"errors", "keys", "page", "config", "runs.run", "runs.grid"}

# Named for a role and not for a thing.
ROLES = {"util", "utils", "helper", "helpers", "common", "base", "manager", "handler", "misc"}

SCHEDULES = {path.stem for path in (ROOT / "configs" / "schedule").glob("*.yaml")}

# What else bears a criterion's name: the public default, the papers' tables, norms, distances.
OTHER_MEANINGS = {
    ("selection.select", "gm"),
    ("selection.rule", "gm"),
    ("loops.pruner", "gm"),
    ("report.controls", "random"),  # the control that it is
    ("report.paper", "gm"),
    ("report.paper", "l2"),
    ("report.paper", "mix"),
    ("selection.ranking", "l2"),
    ("config", "l2"),
    ("study.settings", "l2"),
    ("study.subject", "random"),  # a random start
}
# And a schedule's: the papers' tables.
OTHER_SCHEDULES = {
    ("report.paper", "soft"),
    ("report.paper", "frozen"),
    ("loops.pruner", "frozen"),  # the public default
}


def name_of(path: Path) -> str:
    """fpgm/graph/trace.py -> graph.trace, fpgm/graph/__init__.py -> graph, fpgm's own -> ''."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(part for part in parts if part != "__init__")


FILE = {name_of(path): path for path in sorted(PACKAGE.rglob("*.py"))}
MODULES = [name for name in FILE if name]


@cache
def tree(module: str) -> ast.Module:
    return ast.parse(FILE[module].read_text())


def imports(module: str, *, types_too: bool = True) -> Iterator[str]:
    """Dotted names that a file imports, wherever in it. `from a import b` may be module or name."""
    skipped: set[ast.AST] = set()
    for node in ast.walk(tree(module)):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test) and not types_too:
            skipped.update(ast.walk(node))
    for node in ast.walk(tree(module)):
        if node in skipped:
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module}: imports are absolute"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def modules_imported(module: str) -> set[str]:
    """Files of the package that a file needs when it runs."""
    needed = set()
    for name in imports(module, types_too=False):
        parts = name.split(".")
        if parts[0] == "fpgm":
            candidates = (".".join(parts[1:end]) for end in range(len(parts), 1, -1))
            needed.update([next((name for name in candidates if name in MODULES), "")])
    return needed - {"", module}


def room(module: str) -> str:
    return module.split(".")[0]


def rooms_imported() -> dict[str, set[str]]:
    """Room -> other rooms that it imports from, also for types alone."""
    arrows: dict[str, set[str]] = {room(module): set() for module in MODULES}
    for module in MODULES:
        inside = (name.split(".") for name in imports(module) if name.startswith("fpgm."))
        arrows[room(module)].update(parts[1] for parts in inside if parts[1] in arrows)
    return {name: others - {name} for name, others in arrows.items()}


def strings(module: str) -> Iterator[str]:
    """The quoted words of a file."""
    for node in ast.walk(tree(module)):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value


def test_a_package_imports_only_from_those_above_it() -> None:
    wrong = [
        f"{name} imports {other}"
        for name, others in rooms_imported().items()
        for other in sorted(others)
        if ORDER.index(other) >= ORDER.index(name)
    ]
    assert not wrong


def test_the_top_of_the_package_is_the_list_of_rooms() -> None:
    assert sorted(set(map(room, MODULES)) - set(ORDER)) == []
    assert len(set(map(room, MODULES))) <= TOP


def test_rooms_stand_on_few_levels() -> None:
    level: dict[str, int] = {}
    waiting = rooms_imported()
    while waiting:
        ready = [name for name, others in waiting.items() if others <= set(level)]
        assert ready, f"a circle among {sorted(waiting)}"
        for name in ready:
            level[name] = 1 + max((level[other] for other in waiting[name]), default=0)
        for name in ready:
            del waiting[name]
    assert max(level.values()) <= LEVELS, level


def test_imports_make_no_circle() -> None:
    waiting = {module: modules_imported(module) for module in MODULES}
    while waiting:
        free = [module for module, needs in waiting.items() if not needs & set(waiting)]
        assert free, f"a circle among {sorted(waiting)}"
        for module in free:
            del waiting[module]


def test_packages_and_files_stay_small() -> None:
    folders = [PACKAGE, *(path for path in PACKAGE.rglob("*") if path.is_dir())]
    wrong = [str(f) for f in folders if len(list(f.glob("*.py"))) > FILES]
    wrong += [f for f, path in FILE.items() if len(path.read_text().splitlines()) > LINES]
    assert not wrong


def test_functions_stay_readable() -> None:
    lengths = {
        f"{module}.{node.name}": (node.end_lineno or 0) - node.lineno + 1
        for module in FILE
        for node in ast.walk(tree(module))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    }
    # One dictionary literal: its lines are the schema.
    assert lengths.pop("training.result.report", 0) <= 75
    assert {name: lines for name, lines in lengths.items() if lines > FUNCTION} == {}


def test_no_file_is_named_for_a_role() -> None:
    parts = {part for module in MODULES for part in module.split(".")}
    assert not parts & ROLES


def test_only_the_command_line_knows_hydra() -> None:
    hydra = {"hydra", "omegaconf"}
    users = {room(m) for m in MODULES if hydra & {name.split(".")[0] for name in imports(m)}}
    assert users == {"cli"}


def test_what_answers_at_once_does_so_without_torch() -> None:
    rooms = [m for m in MODULES if m in WITHOUT_TORCH or room(m) == "report"]
    rooms.remove("report.__main__")
    code = "import importlib, sys; sys.modules['torch'] = None\n"
    code += "".join(f"importlib.import_module('fpgm.{name}')\n" for name in rooms)
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert out.returncode == 0, out.stderr


def test_criteria_are_known_by_name_only_in_their_room() -> None:
    places = {
        (module, word)
        for module in MODULES
        if room(module) != "criteria"
        for word in strings(module)
        if word in CRITERIA
    }
    assert sorted(places - OTHER_MEANINGS) == []


def test_schedules_are_known_by_name_only_in_their_room() -> None:
    places = {
        (module, word)
        for module in MODULES
        if room(module) != "methods"
        for word in strings(module)
        if word in SCHEDULES
    }
    assert sorted(places - OTHER_SCHEDULES) == []
