"""`fpgm-train`: the only file that knows Hydra. Words in, one typed Config out, errors in a line.

Nothing heavy at import: help and shell completion must answer at once.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import re
import sys
import zlib
from collections.abc import Sequence
from pathlib import Path

import hydra
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import (
    ConfigCompositionException,
    HydraException,
    MissingConfigException,
    OverrideParseException,
)
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

import fpgm
from fpgm.config import Config, flatten
from fpgm.typed import suggestion

HERE = Path(__file__).resolve().parent
# Inside a wheel the configs are part of the package, in a checkout they are beside it.
CONFIGS = HERE / "configs" if (HERE / "configs").is_dir() else HERE.parent / "configs"


def run_name(overrides: Sequence[str]) -> str:
    """A readable, stable name for the words of a command line: criterion=gm,rate=0.4.

    Paths are shortened to their last part, and what is left that a file system minds becomes _.
    """
    parts = []
    for override in overrides:
        key, _, value = override.partition("=")
        value = value.strip("'\"")
        if "/" in value:
            path = Path(value)  # a checkpoint says little without its run
            value = f"{path.parent.name}_{path.name}" if path.suffix == ".pt" else path.name
        parts.append(re.sub(r"[^\w.,=+\-\[\]]", "_", f"{key.lstrip('+')}={value}"))
    name = ",".join(sorted(parts)) or "default"
    # File systems end at 255 bytes.
    return name if len(name) <= 200 else f"{name[:190]},{zlib.crc32(name.encode()):08x}"


def quoted(word: str) -> str:
    """A path such as outputs/criterion=gm,rate=0.4 put in quotes, as Hydra's grammar wants it.

    What is a path as a whole is one; else, if its parts between commas all are, it is a sweep.
    """
    key, _, value = word.partition("=")
    if key not in ("pretrained", "dataset.root", "hydra.run.dir") or re.match("['\"$]|$", value):
        return word
    parts = value.split(",")
    sweep = not _exists(value) and len(parts) > 1 and all(map(_exists, parts))
    if sweep:
        return f"{key}=" + ",".join(f"'{part}'" for part in parts)
    return f"{key}='{value}'" if _exists(value) or re.search(r"[=~ ]", value) else word


def _exists(path: str) -> bool:
    return os.path.exists(os.path.expanduser(path))


OmegaConf.register_new_resolver("run_name", lambda words: run_name(list(words)), replace=True)

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
        if not _remember(f"{directory}: {line}"):
            raise  # the launcher hands it to main(), if to nobody else
        with contextlib.suppress(OSError):
            directory.rmdir()  # Hydra made it; nothing was written into it yet


def run_job(words: DictConfig, directory: Path) -> None:
    """Print the result of a run that is done, or train it from where it stands."""
    from fpgm.result import table
    from fpgm.run import Run

    config = Config.of(OmegaConf.to_container(words, resolve=True))  # type: ignore[arg-type]
    if RANK:
        follow(config, directory)
        return
    with Run(directory, config.as_dict()) as run:
        report = run.report
        if report is not None:
            print(f"{directory} is done already", table(report, str(directory)), sep="\n")
            if WORLD == 1:
                return
        from fpgm.distributed import from_first, join
        from fpgm.train import train

        ranks = join(config.device)
        if from_first(report is None, ranks):
            trained = train(config, run, ranks)
            assert trained is not None
            logging.getLogger("fpgm").info(table(trained, str(directory)))
        from_first(None, ranks)  # the others wait for the report


def follow(config: Config, directory: Path) -> None:
    """The part of the processes that torchrun starts beside the first: they write nothing."""
    from fpgm.distributed import from_first, join
    from fpgm.run import Run
    from fpgm.train import train

    logging.getLogger("fpgm").setLevel(logging.ERROR)
    ranks = join(config.device)
    if from_first(None, ranks):
        train(config, Run(directory, config.as_dict()), ranks)
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
    if failures and {"-m", "--multirun"} & set(sys.argv):
        print("failed:", *failures, sep="\n  ", file=sys.stderr)
    if status or failures:
        sys.exit(status or 1)
    if WORLD > 1:
        from fpgm.distributed import leave

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


def _output_directory() -> Path:
    """The run directory, relative to here where it lies below."""
    output = Path(HydraConfig.get().runtime.output_dir)
    relative = Path(os.path.relpath(output))
    return output if ".." in relative.parts else relative


def explain(error: Exception) -> str:
    """An error as a person at the keyboard needs it: what was given, what would do."""
    cause = error.__cause__
    if isinstance(error, MissingConfigException) and error.options:
        group, _, given = str(error.missing_cfg_file).rpartition("/")
        return f"{group}={given}: choose one of {', '.join(error.options)}"
    if isinstance(error, ConfigCompositionException):
        key = getattr(cause, "full_key", None) or _quoted(str(error))
        return f"{key}: no such key, {suggestion(key, _keys())}" if key else str(error)
    if isinstance(error, OverrideParseException):
        return f"{error.override}: not understood, write key=value, for example rate=0.4"
    if isinstance(error, OSError) and error.filename is not None:
        return f"{error.filename}: {error.strerror}{_ADVICE.get(error.errno or 0, '')}"
    if type(error).__module__.startswith("fpgm."):
        return str(error)
    if isinstance(error, HydraException | OmegaConfBaseException):
        return str(error).splitlines()[0]
    first = (str(error).splitlines() or [""])[0]
    return f"{type(error).__name__}: {first} (HYDRA_FULL_ERROR=1 shows where)"


_ELSEWHERE = "; choose another place with hydra.run.dir="
_ADVICE = {
    errno.ENOSPC: "; free some space and start the same command again, it goes on where it was",
    errno.EACCES: _ELSEWHERE,
    errno.EROFS: _ELSEWHERE,
    errno.ENOTDIR: _ELSEWHERE,
    errno.EEXIST: _ELSEWHERE,
}


def _quoted(text: str) -> str:
    """The key in Hydra's "Could not override 'rat'."."""
    match = re.search(r"'([^']+)'", text)
    return match.group(1) if match else ""


def _keys() -> list[str]:
    """Every key and group that a command line may set."""
    GlobalHydra.instance().clear()
    with hydra.initialize_config_dir(str(CONFIGS), version_base="1.3"):
        defaults = OmegaConf.to_container(hydra.compose("config"))
    assert isinstance(defaults, dict)
    flat = flatten({str(key): value for key, value in defaults.items()})
    return sorted({*flat, *(p.name for p in CONFIGS.iterdir() if p.is_dir())})


if __name__ == "__main__":
    main()
