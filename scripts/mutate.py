"""Mutants of a sample of places in the code, each tried against the tests of its own room.

cosmic-ray makes the mutants; here they are drawn and run. To import torch for each would take most
of the time, so this process imports what the tests need, all but fpgm, and forks for each mutant:
the child imports fpgm from a copy of the checkout that has the one fault, runs the quickest tests
of the room and stops at the first that fails.
"""

from __future__ import annotations

import ast
import contextlib
import difflib
import importlib
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import hypothesis
import parso
import pytest
from cosmic_ray.ast import ast_nodes, get_ast
from cosmic_ray.mutating import mutate_code
from cosmic_ray.operators.operator import Operator
from cosmic_ray.operators.provider import OperatorProvider

ROOT = Path(__file__).resolve().parent.parent
ROOMS = {
    name: [f"fpgm/{name}"]
    for name in ("graph", "criteria", "selection", "compaction", "methods", "training")
}
ROOMS["report"] = ["fpgm/report/cells.py", "fpgm/report/paper.py", "fpgm/report/table.py"]

PRELOADED = (
    "torch torch.fx torch.utils.tensorboard torch._dynamo torchvision numpy scipy.stats yaml hydra "
    "omegaconf PIL.Image sklearn.datasets tqdm matplotlib.figure jinja2 xml.dom.minidom"
)

BUDGET = 60  # seconds of tests that a mutant is worth: the quickest of its room

# Of cosmic-ray's replacements of one sign by another those that a hand could have written:
# most of the others only raise at once, which any test notices.
SIGNS = {
    "Add": "Sub", "Sub": "Add", "Mul": "Div Add", "Div": "Mul", "FloorDiv": "Mul Div",
    "Mod": "Mul FloorDiv", "Pow": "Mul", "BitOr": "BitAnd", "BitAnd": "BitOr",
    "Eq": "NotEq LtE GtE", "NotEq": "Eq Lt Gt", "Lt": "LtE GtE NotEq", "LtE": "Lt Gt Eq",
    "Gt": "GtE LtE NotEq", "GtE": "Gt Lt Eq", "Is": "IsNot", "IsNot": "Is", "In": "NotIn",
    "NotIn": "In", "UAdd": "USub", "USub": "UAdd", "Invert": "UAdd", "Not": "Nothing",
}  # fmt: skip


class Own(Operator):
    """What cosmic-ray does not do."""

    @classmethod
    def examples(cls) -> tuple[()]:
        return ()


class DropStatement(Own):
    """A call, an assignment to an item or an attribute, or `x += y`, is left out."""

    def mutation_positions(self, node):
        if node.type != "simple_stmt":
            return
        first = node.children[0]
        call = first.type == "atom_expr"
        set_in = first.type == "expr_stmt" and (
            first.children[0].type == "atom_expr" or (first.children[1].type == "operator"
            and first.children[1].value not in ("=", ":"))
        )  # fmt: skip
        if call or set_in:
            yield first.start_pos, first.end_pos

    def mutate(self, node, index):
        first = node.children[0]
        prefix = first.get_first_leaf().prefix
        node.children[0] = parso.python.tree.Keyword("pass", first.start_pos, prefix)
        return node


class DropTerm(Own):
    """`a + b` is `a`, and `a * b` too."""

    def mutation_positions(self, node):
        if node.type in ("arith_expr", "term"):
            yield node.children[-2].start_pos, node.end_pos

    def mutate(self, node, index):
        node.children = node.children[:-2]
        return node


class DropArgument(Own):
    """The last argument of a call is left out, if it has more than one."""

    def mutation_positions(self, node):
        if node.type == "arglist" and node.parent.type == "trailer":
            yield node.start_pos, node.end_pos

    def mutate(self, node, index):
        tail = 2 if node.children[-1].type != "operator" else 3  # a comma may come last
        node.children = node.children[:-tail]
        return node


class ConstantForName(Own):
    """A name among the arguments of a call, or in an f-string, is 0."""

    def mutation_positions(self, node):
        inside = node.parent is not None and node.parent.type in ("arglist", "fstring_expr")
        if node.type == "name" and inside:
            yield node.start_pos, node.end_pos

    def mutate(self, node, index):
        return parso.python.tree.Number("0", node.start_pos, node.prefix)


def operators() -> Iterator[Operator]:
    provider = OperatorProvider()
    for name in provider:
        if name.startswith("Variable"):
            continue
        if name.startswith(("ReplaceBinary", "ReplaceComparison", "ReplaceUnary")):
            *_, old, new = name.split("_")
            if new not in SIGNS.get(old, old).split():
                continue
        yield provider[name]()
    yield from (DropStatement(), DropTerm(), DropArgument(), ConstantForName())


@dataclass(frozen=True)
class Mutant:
    path: str
    line: int
    text: str
    diff: str


def running(text: str) -> str:
    """What a file does: its tree without annotations, asserts and imports for types alone."""

    class Strip(ast.NodeTransformer):
        def visit_arg(self, node):
            node.annotation = None
            return node

        def visit_FunctionDef(self, node):
            node.returns = None
            return self.generic_visit(node)

        def visit_AnnAssign(self, node):
            node.annotation = ast.Constant(0)
            return self.generic_visit(node)

        def visit_Assert(self, node):
            return ast.Pass()

        def visit_If(self, node):
            if "TYPE_CHECKING" in ast.unparse(node.test):
                return ast.Pass()
            return self.generic_visit(node)

    return ast.dump(Strip().visit(ast.parse(text)))


def mutants(root: Path, parts: list[str], count: int, seed: int) -> list[Mutant]:
    """A sample of places, of each place one of its mutations, drawn alike for one seed."""
    paths = [
        path
        for part in parts
        for path in ([root / part] if part.endswith(".py") else sorted((root / part).rglob("*.py")))
    ]
    places: dict[tuple[str, tuple, tuple], list[tuple[Operator, int]]] = {}
    for path in paths:
        for operator in operators():
            number = 0
            for node in ast_nodes(get_ast(path.read_text())):
                for start, end in operator.mutation_positions(node):
                    where = (str(path.relative_to(root)), start, end)
                    places.setdefault(where, []).append((operator, number))
                    number += 1
    draw = random.Random(seed)
    order = sorted(places)
    draw.shuffle(order)
    drawn: list[Mutant] = []
    for name, start, _ in order:
        if len(drawn) == count:
            break
        operator, number = draw.choice(places[name, start, _])
        text = (root / name).read_text()
        other = mutate_code(text, operator, number)
        with contextlib.suppress(SyntaxError):
            if other is None or running(other) == running(text):
                continue
            changes = difflib.unified_diff(text.split("\n"), other.split("\n"), n=0, lineterm="")
            diff = "\n".join(line for line in list(changes)[2:] if not line.startswith("@@"))
            drawn.append(Mutant(name, start[0], other, diff))
    return drawn


class Quickest:
    """A pytest plugin: the quickest tests first, file by file, until the budget is spent.

    It also notes the processor's seconds of each test, which a busy machine does not lengthen.
    """

    def __init__(self, seconds: dict[str, float]) -> None:
        self.seconds = seconds
        self.measured: dict[str, float] = {}

    def pytest_collection_modifyitems(self, items) -> None:
        if not self.seconds:
            return
        chosen, spent = [], 0.0
        for item in sorted(items, key=lambda item: self.seconds.get(item.nodeid, 0)):
            spent += self.seconds.get(item.nodeid, 0)
            if spent <= BUDGET:
                chosen.append(item)
        files: dict[str, float] = {}
        for item in chosen:
            name = item.nodeid.split("::")[0]
            files[name] = files.get(name, 0) + self.seconds.get(item.nodeid, 0)
        chosen.sort(key=lambda item: files[item.nodeid.split("::")[0]])
        items[:] = chosen

    @pytest.hookimpl(hookwrapper=True)
    def pytest_runtest_protocol(self, item):
        before = sum(os.times()[:4])
        yield
        self.measured[item.nodeid] = sum(os.times()[:4]) - before


def copy_of_checkout(where: Path) -> Path:
    for name in ("fpgm", "configs", "hydra_plugins", "tests", "scripts"):
        shutil.copytree(ROOT / name, where / name)
    shutil.copy(ROOT / "pyproject.toml", where)
    shutil.copy(ROOT / "README.md", where)
    return where


def tested(
    copy: Path,
    tests: str,
    seconds: dict[str, float],
    output: Path,
    limit: int,
) -> int:
    """Start the tests in a child, its process group its own; returns its id.

    limit: seconds of the processor that it may take, which a busy machine does not shorten.
    """
    child = os.fork()
    if child:
        return child
    status = 2
    try:
        os.setsid()
        resource.setrlimit(resource.RLIMIT_CPU, (limit, limit))
        log = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(log, 1)
        os.dup2(log, 2)
        os.chdir(copy)
        sys.path.insert(0, str(copy))
        os.environ["PYTHONPATH"] = str(copy)  # for processes that the tests start
        # The same examples for every mutant; a failure need not be made small.
        phases = (hypothesis.Phase.explicit, hypothesis.Phase.generate)
        hypothesis.settings.register_profile(
            "mutants", derandomize=True, database=None, deadline=None, phases=phases
        )
        quickest = Quickest(seconds)
        words = ["-x", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", "--tb=line"]
        words += ["--hypothesis-profile", "mutants"]
        words += ["--basetemp", str(copy / "tmp"), "-W", "ignore"]
        status = int(pytest.main([*words, tests], plugins=[quickest]))
        if not seconds:
            lines = (f"{took} {name}\n" for name, took in quickest.measured.items())
            output.with_suffix(".seconds").write_text("".join(lines))
    finally:
        sys.stdout.flush()
        os._exit(status)


def measured(copy: Path, tests: str) -> dict[str, float]:
    """Seconds of each test where there is no fault. All must pass."""
    log = copy / "log"
    _, status = os.waitpid(tested(copy, tests, {}, log, resource.RLIM_INFINITY), 0)
    if status:
        sys.exit(f"{tests}: fail without any fault\n{log.read_text()[-3000:]}")
    lines = (line.split(" ", 1) for line in log.with_suffix(".seconds").read_text().splitlines())
    return {test: float(took) for took, test in lines}


def unnoticed(
    sample: list[Mutant], copies: list[Path], tests: str, seconds: dict[str, float], limit: int
) -> list[Mutant]:
    """Those with which all tests pass within the limit. As many at once as there are copies.

    limit: the processor's seconds, for a loop that never ends; ten times as many for a deadlock.
    """
    waiting, survivors = list(sample), []
    at_work: dict[int, tuple[Mutant, str, Path, float]] = {}
    while waiting or at_work:
        while waiting and copies:
            mutant, copy = waiting.pop(), copies.pop()
            whole = (copy / mutant.path).read_text()
            (copy / mutant.path).write_text(mutant.text)
            child = tested(copy, tests, seconds, copy / "log", limit)
            at_work[child] = (mutant, whole, copy, time.monotonic() + 10 * limit)
        for child, (mutant, whole, copy, until) in list(at_work.items()):
            ended, status = os.waitpid(child, os.WNOHANG)
            if not ended and time.monotonic() < until:
                continue
            with contextlib.suppress(ProcessLookupError):  # what takes too long, or was left behind
                os.killpg(child, signal.SIGKILL)
            if not ended:
                os.waitpid(child, 0)
            elif status == 0:
                survivors.append(mutant)
            del at_work[child]
            (copy / mutant.path).write_text(whole)
            shutil.rmtree(copy / "tmp", ignore_errors=True)
            copies.append(copy)
            left = len(waiting) + len(at_work)
            print(f"{tests}: {left} to go, {len(survivors)} survived", file=sys.stderr)
        time.sleep(0.02)
    return survivors


def room(name: str, count: int, seed: int, jobs: int) -> None:
    """Draw, try, and print how many were noticed and which were not."""
    start, tests = time.monotonic(), f"tests/{name}"
    with tempfile.TemporaryDirectory() as temporary:
        copies = [copy_of_checkout(Path(temporary) / str(i)) for i in range(jobs)]
        sample = mutants(copies[0], ROOMS[name], count, seed)
        seconds = measured(copies[0], tests)
        limit = 2 * int(min(BUDGET, sum(seconds.values()))) + 30
        survivors = unnoticed(sample, copies, tests, seconds, limit)
    noticed = len(sample) - len(survivors)
    print(
        f"{name}: {len(sample)} mutants, {noticed} noticed ({noticed / max(1, len(sample)):.0%}), "
        f"{len(survivors)} survived; {time.monotonic() - start:.0f} s (the room's tests take "
        f"{sum(seconds.values()):.0f} s, a mutant is given the quickest {BUDGET} s of them)"
    )
    for mutant in sorted(survivors, key=lambda mutant: (mutant.path, mutant.line)):
        print(f"\n{mutant.path}:{mutant.line}\n{mutant.diff}")
    print(flush=True)


def main() -> None:
    names = [word for word in sys.argv[1:] if not word.isdigit()] or list(ROOMS)
    count = next((int(word) for word in sys.argv[1:] if word.isdigit()), 40)
    unknown = [name for name in names if name not in ROOMS]
    if unknown:
        sys.exit(f"{unknown[0]}: choose one of {', '.join(ROOMS)}, and how many mutants")
    for module in PRELOADED.split():
        importlib.import_module(module)
    seed, jobs = int(os.environ.get("SEED", 0)), int(os.environ.get("JOBS", os.cpu_count() or 1))
    for name in names:
        room(name, count, seed, jobs)


if __name__ == "__main__":
    main()
