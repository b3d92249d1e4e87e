"""What is shipped: it installs, runs anywhere, and keeps to its own structure."""

from __future__ import annotations

import ast
import importlib.metadata
import json
import os
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import fpgm

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "fpgm"
PACKAGES = ("fpgm", "fpgm.report", "fpgm.study")
NOTHING_OF_THE_PACKAGE = {
    "typed",
    "criteria",
    "operations",
    "atomic",
    "layers",
    "channels",
    "study.settings",
}


def imports(module: str, *, types_too: bool = True) -> set[str]:
    """Names of modules that a file of the package imports, those of the package without prefix."""
    tree = ast.parse((PACKAGE / f"{module.replace('.', '/')}.py").read_text())
    skipped: set[ast.AST] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING" and not types_too:
            skipped.update(ast.walk(node))
    found: set[str] = set()
    for node in (n for n in ast.walk(tree) if n not in skipped):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module in (
            "fpgm",
            "fpgm.report",
            "fpgm.study",
        ):
            found.update(f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            found.add(str(node.module))
    return {name.removeprefix("fpgm.") for name in found}


MODULES = sorted(
    ".".join(path.relative_to(PACKAGE).with_suffix("").parts)
    for path in PACKAGE.rglob("*.py")
    if path.stem not in ("__init__", "__main__")
)


def test_modules_import_only_what_the_design_allows() -> None:
    own = {module: imports(module) & set(MODULES) for module in MODULES}
    for module in NOTHING_OF_THE_PACKAGE:
        assert own[module] == set(), module
    for module in MODULES:
        outside = {name.split(".")[0] for name in imports(module)}
        if module not in ("cli", "explanation"):
            assert not outside & {"hydra", "omegaconf"}, module
            assert "cli" not in own[module]
    assert own["config"] == {"typed"}
    assert own["graph"] == {"operations", "overwriting"}
    assert "graph" in own["selection"]
    assert own["followers"] == {"graph", "operations"}
    assert own["ranking"] == {"coupling"}
    assert own["evidence"] == {"followers", "graph"}
    assert "train" not in set().union(*(own[m] for m in MODULES if m != "cli"))
    assert not imports("result", types_too=False) & {"torch", "counting", "train"}
    # What a study shows is made of its plain data alone.
    shown = {f"study.{name}" for name in ("findings", "summary", "sections", "layers", "plots")}
    for module in shown:
        assert own[module] <= shown | {"page", "report.plots"}, module
    assert not imports("study.examine") & {"page", "study.sections", "matplotlib", "argparse"}
    without_torch = shown | {m for m in MODULES if m.startswith("report.")}
    assert not any("torch" in imports(module) for module in without_torch)


def test_imports_make_no_circle() -> None:
    own = {module: imports(module, types_too=False) & set(MODULES) for module in MODULES}
    while own:
        free = [module for module, needs in own.items() if not needs & set(own)]
        assert free, f"a circle among {sorted(own)}"
        for module in free:
            del own[module]


def test_files_and_functions_stay_readable() -> None:
    for module in MODULES:
        text = (PACKAGE / f"{module.replace('.', '/')}.py").read_text()
        assert len(text.splitlines()) <= 250, module
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef):
                length = (node.end_lineno or 0) - node.lineno + 1
                # report() is one dictionary literal: its lines are the schema.
                limit = 75 if (module, node.name) == ("result", "report") else 50
                assert length <= limit, f"{module}.{node.name}"


def test_public_names_of_the_readme_are_there() -> None:
    for name in fpgm.__all__:
        assert getattr(fpgm, name) is not None
        assert name in dir(fpgm)


def test_versions_agree() -> None:
    assert importlib.metadata.version("fpgm") == fpgm.__version__


def test_configs_are_found_from_a_checkout_in_any_directory(tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    words = [sys.executable, "-m", "fpgm.cli", "--cfg", "job", "dataset=digits"]
    out = subprocess.run(words, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert out.returncode == 0, out.stderr
    assert "name: digits" in out.stdout


def test_wheel_installs_into_a_fresh_environment_and_runs(tmp_path: Path) -> None:
    build = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "-o", str(tmp_path)]
    subprocess.run([*build, str(ROOT)], check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    home = tmp_path / "venv"
    venv.create(home, with_pip=True)
    python = home / "bin" / "python"
    install = [python, "-m", "pip", "install", "-q", "--no-deps", "--no-index", str(wheel)]
    subprocess.run(install, check=True)
    # The dependencies are gigabytes: borrow them from here, but not this checkout's fpgm, which an
    # editable install brings in by a .pth file that a borrowed directory does not run.
    (site,) = (home / "lib").glob("python*/site-packages")
    (site / "borrowed.pth").write_text(sysconfig.get_path("purelib") + "\n")
    where = subprocess.run(
        [python, "-c", "import fpgm; print(fpgm.__file__)"],
        cwd=tmp_path, check=True, capture_output=True, text=True,
    )  # fmt: skip
    assert Path(where.stdout.strip()).is_relative_to(home)
    words = [home / "bin" / "fpgm-train", "dataset=digits", "epochs=1", "hydra.run.dir=r"]
    subprocess.run(words, cwd=tmp_path, check=True, capture_output=True)
    assert json.loads((tmp_path / "r" / "report.json").read_text())["status"] == "done"
