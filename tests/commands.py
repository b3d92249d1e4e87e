"""fpgm-train as tests call it: in a fork of the tests, or where it matters as a real process."""

from __future__ import annotations

import copy
import functools
import importlib
import json
import logging
import multiprocessing
import os
import signal
import subprocess
import sys
import sysconfig
import tempfile
import time
from pathlib import Path
from typing import IO

import hydra
from hydra.core.global_hydra import GlobalHydra
from omegaconf import OmegaConf

from fpgm.keys import CONFIGS

FPGM_TRAIN = str(Path(sysconfig.get_path("scripts")) / "fpgm-train")
# Seconds of every run, if they are not there before the fork.
SLOW_TO_IMPORT = ("fpgm.training.loop", "torch.utils.tensorboard", "sklearn.datasets",
                  "sklearn.model_selection", "torch.distributed.tensor")  # fmt: skip


def start(where: Path, *words: str, **environment: str) -> subprocess.Popen[str]:
    """A process of its own: to be killed, to be interrupted, to be timed."""
    return subprocess.Popen(
        [FPGM_TRAIN, *words], cwd=where, text=True, env={**os.environ, **environment},
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        # Started in the background of a shell, the tests would hand on that SIGINT is ignored.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip


def run_apart(where: Path, *words: str, **environment: str) -> tuple[int, str, str]:
    """As `run`, in a process of its own."""
    process = start(where, *words, **environment)
    out, err = process.communicate(timeout=600)
    return process.returncode, out, err


def run(where: Path, *words: str, **environment: str) -> tuple[int, str, str]:
    """Exit status and what was printed, by a fork of this process: torch is there already."""
    for module in SLOW_TO_IMPORT:
        importlib.import_module(module)
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        arguments = (where, words, environment, out, err)
        fork = multiprocessing.get_context("fork").Process(target=_main, args=arguments)
        fork.start()
        fork.join(300)
        if fork.is_alive():
            fork.kill()
            raise TimeoutError(" ".join(words))
        texts = [file.seek(0) or file.read() for file in (out, err)]
        assert fork.exitcode is not None
    if fork.exitcode and "Autograd-and-Fork" in texts[1]:
        # Some test before has made torch start threads for devices: nothing trains in a fork then.
        return run_apart(where, *words, **environment)
    return fork.exitcode, texts[0], texts[1]


def _main(where: Path, words: tuple[str, ...], environment: dict, *files: IO[str]) -> None:
    """In the fork: nothing of pytest, Hydra or a logger before that a new process has not."""
    for number, (name, file) in enumerate(zip(("stdout", "stderr"), files, strict=True), 1):
        os.dup2(file.fileno(), number)
        setattr(sys, name, os.fdopen(number, "w", closefd=False))
    signal.signal(signal.SIGINT, signal.default_int_handler)
    logging.root.handlers = []
    GlobalHydra.instance().clear()
    os.chdir(where)
    os.environ.update(environment)
    sys.argv = ["fpgm-train", *words]
    from fpgm.cli.command import main

    main()


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
    return copy.deepcopy(_composed(words))


@functools.cache
def _composed(words: tuple[str, ...]) -> dict:
    GlobalHydra.instance().clear()
    with hydra.initialize_config_dir(str(CONFIGS), version_base="1.3"):
        return OmegaConf.to_container(hydra.compose("config", overrides=list(words)), resolve=True)
