"""`fpgm-train`: words in, one typed Config out, errors in a line. Hydra stays here.

Nothing heavy at import: help and shell completion must answer at once.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

import fpgm
from fpgm.cli.explain import explain
from fpgm.config import CONFIGS
from fpgm.runs import grid
from fpgm.runs.baseline import find_baseline

if TYPE_CHECKING:
    from fpgm.config import Config
    from fpgm.runs.run import Run


_PATHS = ("pretrained", "dataset.root", "hydra.run.dir", "hydra.sweep.dir")


def quoted(word: str) -> str:
    """A path such as outputs/criterion=gm,rate=0.4 put in quotes, as Hydra's grammar wants it.

    What is a path as a whole is one; else, if its parts between commas all are, it is a sweep.
    """
    key, _, value = word.partition("=")
    if key not in _PATHS or re.match("['\"$]|$", value):
        return word
    parts = value.split(",")
    sweep = not _exists(value) and len(parts) > 1 and all(map(_exists, parts))
    if sweep:
        return f"{key}=" + ",".join(f"'{part}'" for part in parts)
    return f"{key}='{value}'" if _exists(value) or re.search(r"[=~ ]", value) else word


def _exists(path: str) -> bool:
    return os.path.exists(os.path.expanduser(path))


OmegaConf.register_new_resolver("run_name", lambda words: grid.run_name(words), replace=True)
for _index, _resolver in enumerate(("sweep_name", "job_name")):
    OmegaConf.register_new_resolver(
        _resolver, lambda words, rows, i=_index: grid.place(words, rows)[i], replace=True
    )

RANK, WORLD = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))

# The jobs of a sweep may run in other processes, on other machines even: what failed is written
# where all of them can, beside where the command was started.
_LEDGER = "FPGM_FAILURES"
_unwritten: list[str] = []  # where the ledger cannot be: what failed in this process
_with_traceback = os.environ.get("HYDRA_FULL_ERROR") == "1"  # before main() sets it for Hydra


@hydra.main(config_path=str(CONFIGS), config_name="config", version_base="1.3")
def job(words: DictConfig) -> None:
    """One run. An error is printed and remembered, so that the other jobs of a sweep go on."""
    directory = _output_directory()
    try:
        run_job(words, directory)
    except Exception as error:
        if _with_traceback:
            raise
        line = explain(error)
        print(f"rank {RANK}: {line}" if RANK else line, file=sys.stderr)
        if _sweeping() and not RANK and directory.is_dir() and not any(directory.iterdir()):
            (directory / "train.log").write_text(f"ERROR {line}\n")  # before there was a run
        if WORLD > 1:
            # The others may wait for this one in the middle of the job: none begins the next.
            _remember("")
            sys.exit(1)
        if not _remember(f"{directory}: {line}" if _sweeping() else ""):
            raise  # the launcher hands it to main(), if to nobody else
        with contextlib.suppress(OSError):
            directory.rmdir()  # Hydra made it; nothing was written into it yet


def run_job(words: DictConfig, directory: Path) -> None:
    """Print the result of a run that is done, or train it from where it stands."""
    from fpgm.runs.run import Run
    from fpgm.training.result import result_line, table
    from fpgm.training.task import asked

    config = asked(OmegaConf.to_container(words, resolve=True))  # type: ignore[arg-type]
    if config.pretrained == "baseline":
        given = HydraConfig.get().overrides
        place = [word for word in given.hydra if word.startswith("hydra.sweep.dir=")]
        baseline = find_baseline(directory, config.as_dict(), [*given.task, *place])
        config = config.model_copy(update={"pretrained": str(baseline)})
    if RANK:
        follow(config, directory)
        return
    sweep = _sweeping()
    with Run(directory, config.as_dict(), keep_failed=sweep) as run:
        report = run.report
        if report is not None:
            shown = result_line(report) if sweep else table(report, str(directory))
            print(f"{directory} is done already", shown, sep=": " if sweep else "\n", flush=True)
            if WORLD == 1:
                return
        try:
            lead(config, run, done=report is not None)
        except Exception as error:
            run.note_failure(explain(error))
            raise


def lead(config: Config, run: Run, done: bool) -> None:
    """Train, and tell the other processes, if there are any, whether there is anything to do."""
    from fpgm.machine.ranks import from_first, join
    from fpgm.training.finish import finish
    from fpgm.training.loop import train
    from fpgm.training.result import table
    from fpgm.training.task import prepare

    ranks = join(config.device)
    if from_first(not done, ranks):
        task = prepare(config, run.directory, ranks)
        train(task, run)
        report = finish(task, run)
        logging.getLogger("fpgm").info(table(report, str(run.directory)))
    from_first(None, ranks)  # the others wait for the report


def follow(config: Config, directory: Path) -> None:
    """The part of the processes that torchrun starts beside the first: they write nothing."""
    from fpgm.machine.ranks import from_first, join
    from fpgm.runs.run import Run
    from fpgm.training.loop import train
    from fpgm.training.task import prepare

    logging.getLogger("fpgm").setLevel(logging.ERROR)
    ranks = join(config.device)
    if from_first(None, ranks):
        train(prepare(config, directory, ranks), Run(directory, config.as_dict()))
    from_first(None, ranks)


def main() -> None:
    """Entry point. Exit status: 0 done, 1 an error in one line, 130 interrupted."""
    if sys.argv[1:] == ["--version"]:
        print(f"fpgm {fpgm.__version__}")
        return
    sys.argv[1:] = map(quoted, sys.argv[1:])
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra's own errors come through to here
    os.environ[_LEDGER] = os.path.abspath(f".fpgm-failures-{os.getpid()}")
    status = 0
    try:
        job()
    except KeyboardInterrupt:
        print("\ninterrupted: the same command goes on after the last epoch", file=sys.stderr)
        status = 130
    except Exception as error:
        if _with_traceback:
            raise
        print(explain(error), file=sys.stderr)
        status = 1
    finally:
        failures = _failures()
    if any(failures):
        print("failed:", *failures, sep="\n  ", file=sys.stderr)
    if status or failures:
        sys.exit(status or 1)
    if WORLD > 1:
        from fpgm.machine.ranks import leave

        leave()


def _remember(failure: str) -> bool:
    """Note a failed job for main(). False where that is another process and cannot be told."""
    line = failure.replace("\n", "; ")
    try:
        with open(os.environ[_LEDGER], "a") as file:
            file.write(line + "\n")
    except OSError:  # a directory that is not to be written to, a full disk
        if not os.environ[_LEDGER].endswith(f"-{os.getpid()}"):
            return False
        _unwritten.append(line)
    return True


def _failures() -> list[str]:
    """What the jobs have remembered, and the ledger removed."""
    path = Path(os.environ[_LEDGER])
    lines = path.read_text().splitlines() if path.exists() else []
    path.unlink(missing_ok=True)
    return lines + _unwritten


def _sweeping() -> bool:
    return HydraConfig.get().mode is RunMode.MULTIRUN


def _output_directory() -> Path:
    """The run directory, relative to here where it lies below."""
    output = Path(HydraConfig.get().runtime.output_dir)
    relative = Path(os.path.relpath(output))
    return output if ".." in relative.parts else relative
