"""`fpgm-train`: words in, one typed Config out, errors in a line. Hydra stays here.

Nothing heavy at import: help, shell completion and the result of a run that is done come at once.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
import sys
import traceback
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import hydra
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

import fpgm
from fpgm.cli import completion, presets
from fpgm.cli.explain import explain
from fpgm.errors import Error
from fpgm.keys import CONFIGS
from fpgm.machine import processes
from fpgm.runs import grid
from fpgm.runs.baseline import find_baseline, is_baseline
from fpgm.runs.run import Run, result_of

if TYPE_CHECKING:
    from fpgm.config import Config
    from fpgm.machine.ranks import Ranks

_PATHS = (
    "pretrained", "method.distillation.teacher", "dataset.root", "rates", "widths", "latency_table",
    "hydra.run.dir", "hydra.sweep.dir",
)  # fmt: skip
# main() sets HYDRA_FULL_ERROR for Hydra; what the user has set is kept here, for the jobs of a
# launcher too, which run in processes of their own.
_TRACEBACK = "FPGM_TRACEBACK"


def quoted(word: str) -> str:
    """A path such as outputs/criterion=gm,rate=0.4 put in quotes, as Hydra's grammar wants it.

    What is a path as a whole is one; else, if its parts between commas all are, it is a sweep.
    """
    key, _, value = word.partition("=")
    if key not in _PATHS or re.match("['\"${[]|$", value):
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


@hydra.main(config_path=str(CONFIGS), config_name="config", version_base="1.3")
def job(composed: DictConfig) -> None:
    """One run. An error is printed at once; in a sweep Hydra hands it on to the sweeper, which goes
    on with the others."""
    directory = _output_directory()
    try:
        run_job(OmegaConf.to_container(composed, resolve=True), directory)  # type: ignore[arg-type]
    except Exception as error:
        line = explain(error)
        if os.environ.get(_TRACEBACK) == "1":
            traceback.print_exc()
        print(f"{processes.speaker()}{line}", file=sys.stderr)
        empty = directory.is_dir() and not any(directory.iterdir())
        if _sweeping() and processes.first() and empty:
            (directory / "train.log").write_text(f"ERROR {line}\n")  # before there was a run
        with contextlib.suppress(OSError):
            directory.rmdir()  # Hydra made it; nothing was written into it yet
        if _sweeping() and processes.alone():
            raise Error(f"{directory}: {line}".replace("\n", "; ")) from None
        # Of several processes the others may wait for this one: none begins the next run.
        sys.exit(1)


def run_job(values: dict[str, Any], directory: Path) -> None:
    """Print the result of a run that is done, or train it from where it stands."""
    from fpgm.config import with_tables  # pydantic: help need not wait for it

    values = with_tables(values)
    preset = _preset()
    finished = processes.alone() and (directory / "report.json").exists()
    if not finished:
        _asked(values)  # a mistake in the words is told before a baseline is looked for
    if is_baseline(values.get("pretrained")):
        given = HydraConfig.get().overrides
        place = [word for word in given.hydra if word.startswith("hydra.sweep.dir=")]
        values["pretrained"] = str(find_baseline(directory, values, [*given.task, *place]))
    report = result_of(directory, values) if finished else None  # at once: no torch is needed
    if report is not None:
        _show(report, directory)
        return
    config = _asked(values)
    with Run(directory, config.as_dict(), _sweeping(), processes.first()) as run:
        if run.report is not None:
            _show(run.report, directory)
        try:
            from fpgm.machine.ranks import together

            job = partial(train, config, run, preset)
            together(config.device, job, wanted=run.report is None)
        except Exception as error:
            run.note_failure(explain(error))
            raise


def _preset() -> str | None:
    """The preset that was chosen, in words. Raises Error where there is none of its name, and where
    the command line contradicts it."""
    hydra_config = HydraConfig.get()
    for group in ("layers", "preset"):  # Hydra passes over an optional choice that is not there
        choice = hydra_config.runtime.choices.get(group)
        offered = GlobalHydra.instance().config_loader().get_group_options(group)
        if choice is not None and choice not in offered:
            raise Error(f"{group}={choice}: choose one of {', '.join(offered)}")
    chosen = hydra_config.runtime.choices.get("preset")
    if chosen is None:
        return None
    problems = list(presets.contradictions(chosen, hydra_config.overrides.task))
    if problems:
        raise Error("\n".join(problems))
    return f"preset={chosen}: {presets.words(chosen)}"


def train(config: Config, run: Run, preset: str | None, ranks: Ranks) -> None:
    """Prepare, train, finish: the run from where it stands to its report."""
    from fpgm.training import loop
    from fpgm.training.finish import finish
    from fpgm.training.result import table
    from fpgm.training.task import prepare

    task = prepare(config, run.directory, ranks)
    if preset and ranks.first:
        task.say(preset)
    loop.train(task, run)
    if ranks.first:
        report = finish(task, run)
        logging.getLogger("fpgm").info(table(report, str(run.directory)))


def _asked(values: dict[str, Any]) -> Config:
    from fpgm.training.asked import asked  # torch: a run that is done need not wait for it

    return asked(values)


def _show(report: dict[str, Any], directory: Path) -> None:
    from fpgm.training.result import result_line, table

    shown = result_line(report) if _sweeping() else table(report, str(directory))
    print(f"{directory} is done already", shown, sep=": " if _sweeping() else "\n", flush=True)


def main() -> None:
    """Entry point. Exit status: 0 done, 1 an error in one line, 130 interrupted."""
    if sys.argv[1:] == ["--version"]:
        print(f"fpgm {fpgm.__version__}")
        return
    sys.argv[1:] = [quoted(grid.opened(word)) for word in sys.argv[1:]]
    completion.offer_choices()
    os.environ[_TRACEBACK] = os.environ.get("HYDRA_FULL_ERROR", "0")
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra's own errors come through to here
    try:
        job()
    except KeyboardInterrupt as stop:
        print("\ninterrupted: the same command goes on after the last epoch", file=sys.stderr)
        _list(stop.args)
        sys.exit(130)
    except grid.FailedRunsError as failures:
        _list(failures.args)
        sys.exit(1)
    except Exception as error:
        if os.environ[_TRACEBACK] == "1":
            raise
        print(explain(error), file=sys.stderr)
        sys.exit(1)
    if not processes.alone():
        from fpgm.machine.ranks import leave

        leave()


def _list(failures: tuple[str, ...]) -> None:
    if failures:
        print("failed:", *failures, sep="\n  ", file=sys.stderr)


def _sweeping() -> bool:
    return HydraConfig.get().mode is RunMode.MULTIRUN


def _output_directory() -> Path:
    """The run directory, relative to here where it lies below."""
    output = Path(HydraConfig.get().runtime.output_dir)
    relative = Path(os.path.relpath(output))
    return output if ".." in relative.parts else relative
