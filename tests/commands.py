"""The installed commands, as tests start them."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sysconfig
import time
from pathlib import Path

import hydra
from hydra.core.global_hydra import GlobalHydra
from omegaconf import OmegaConf

from fpgm.cli.explain import CONFIGS

FPGM_TRAIN = str(Path(sysconfig.get_path("scripts")) / "fpgm-train")


def start(where: Path, *words: str, **environment: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [FPGM_TRAIN, *words], cwd=where, text=True, env={**os.environ, **environment},
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        # Started in the background of a shell, the tests would hand on that SIGINT is ignored.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip


def run(where: Path, *words: str, **environment: str) -> tuple[int, str, str]:
    process = start(where, *words, **environment)
    out, err = process.communicate(timeout=300)
    return process.returncode, out, err


def report(directory: Path) -> dict:
    return json.loads((directory / "report.json").read_text())


def numbers(directory: Path) -> dict:
    """A report without its timings."""
    return {key: value for key, value in report(directory).items() if key != "timing"}


def wait_for(condition, process: subprocess.Popen[str], seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not condition() and process.poll() is None:
        assert time.monotonic() < end
        time.sleep(0.05)


def compose(*words: str) -> dict:
    GlobalHydra.instance().clear()
    with hydra.initialize_config_dir(str(CONFIGS), version_base="1.3"):
        return OmegaConf.to_container(hydra.compose("config", overrides=list(words)), resolve=True)
