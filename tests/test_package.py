"""What is shipped: it installs, runs anywhere, and offers the names that the README gives."""

from __future__ import annotations

import importlib.metadata
import json
import os
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest

import fpgm

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bin directory of a fresh environment into which the wheel was installed."""
    where = tmp_path_factory.mktemp("wheel")
    build = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "-o", str(where)]
    subprocess.run([*build, str(ROOT)], check=True, capture_output=True)
    (wheel,) = where.glob("*.whl")
    home = where / "venv"
    venv.create(home)  # without pip of its own, which takes longer than all the rest
    python = str(home / "bin" / "python")
    pip = [sys.executable, "-m", "pip", "--python", python, "install", "--quiet"]
    subprocess.run([*pip, "--no-deps", "--no-index", str(wheel)], check=True)
    # The dependencies are gigabytes: borrow them from here, but not this checkout's fpgm, which an
    # editable install brings in by a .pth file that a borrowed directory does not run.
    (site,) = (home / "lib").glob("python*/site-packages")
    (site / "borrowed.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return home / "bin"


def test_public_names_of_the_readme_are_there() -> None:
    for name in fpgm.__all__:
        assert getattr(fpgm, name) is not None
        assert name in dir(fpgm)
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        fpgm.nothing  # noqa: B018


def test_versions_agree() -> None:
    assert importlib.metadata.version("fpgm") == fpgm.__version__


def test_configs_are_found_from_a_checkout_in_any_directory(tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    words = [sys.executable, "-m", "fpgm.cli", "--cfg", "job", "dataset=digits"]
    out = subprocess.run(words, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert out.returncode == 0, out.stderr
    assert "name: digits" in out.stdout


FIND = """
import fpgm
from importlib.metadata import entry_points
from importlib.util import find_spec

print(fpgm.__file__)
for command in entry_points(group="console_scripts"):
    if command.module.startswith("fpgm."):
        print(command.name, find_spec(command.module).origin)
"""


def test_wheel_runs_in_a_fresh_environment_without_the_checkout(
    installed: Path, tmp_path: Path
) -> None:
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    where = subprocess.run(
        [installed / "python", "-c", FIND],
        cwd=tmp_path, env=environment, check=True, capture_output=True, text=True,
    )  # fmt: skip
    home, *commands = where.stdout.splitlines()
    for path in (home, *(line.split()[1] for line in commands)):
        assert Path(path).is_relative_to(installed.parent)
    assert {line.split()[0] for line in commands} >= {
        f"fpgm-{name}" for name in ("train", "export", "latency", "report", "study", "figure")
    }
    words = [installed / "fpgm-train", "dataset=digits", "epochs=1", "hydra.run.dir=r"]
    subprocess.run(words, cwd=tmp_path, env=environment, check=True, capture_output=True)
    assert json.loads((tmp_path / "r" / "report.json").read_text())["status"] == "done"
