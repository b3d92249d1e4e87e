"""A grid of runs: which ones an experiment has, which of them a command line means, where they lie.

An experiment file lists rows, `{key: value or list of values}`; a row stands for all combinations
of its values. Words on the command line whose key some row has choose among the runs; all others
(and `seed`, which the rows leave open) hold for every run. No torch, no hydra.
"""

from __future__ import annotations

import itertools
import json
import re
import zlib
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from filelock import FileLock

from fpgm.errors import Error
from fpgm.runs.files import write_text

Words = list[str]
FILE = "grid.json"
_BASELINE = re.compile(r"pretrained=baseline(\+\w+)*")
_GROUPS = ("arch", "criterion", "dataset", "layers", "optimizer", "schedule")


class FailedRunsError(Error):
    """The runs of a sweep that failed, a line each."""


def run_name(words: Iterable[str]) -> str:
    """A readable, stable name for the words of a command line: criterion=gm,rate=0.4.

    Paths are shortened to their last part, and what is left that a file system minds becomes _.
    """
    parts = []
    for word in words:
        key, _, value = word.partition("=")
        value = value.strip("'\"").replace("\\:", ":")  # Hydra's sweeper has it escaped
        if "/" in value:
            path = Path(value)  # a checkpoint says little without its run
            value = f"{path.parent.name}_{path.name}" if path.suffix == ".pt" else path.name
        parts.append(re.sub(r"[^\w.,=+\-\[\]]", "_", f"{key.lstrip('+')}={value}"))
    name = ",".join(sorted(parts)) or "default"
    # File systems end at 255 bytes.
    return name if len(name) <= 200 else f"{name[:190]},{zlib.crc32(name.encode()):08x}"


def opened(word: str) -> str:
    """arch.KEY=VALUE with the ++ that Hydra wants for a key that no file has: the arguments of a
    network, which its function declares."""
    arch, _, key = word.partition("=")[0].partition(".")
    return f"++{word}" if arch == "arch" and key not in ("", "name", "build") else word


def place(words: Sequence[str], rows: Sequence[Mapping[str, Any]] | None) -> tuple[str, str]:
    """Where a run of a sweep lies: the sweep's directory below outputs/, and its own in that.

    The runs of a grid lie together, each named by what tells it from the others; what was said of
    all of them names the grid: quick,epochs=3/criterion=gm,rate=0.4,seed=0.
    """
    if not rows:
        return "", run_name(words)
    keys = {"seed", *(key for row in rows for key in row)}
    name = next(word.partition("=")[2] for word in words if word.startswith("experiment="))
    rest = [w for w in words if _key(w) not in keys and not w.startswith("experiment=")]
    return (
        f"{name},{run_name(rest)}" if rest else name,
        run_name(word for word in words if _key(word) in keys),
    )


def runs(rows: Sequence[Mapping[str, Any]]) -> list[Words]:
    """All runs of the rows, each once, as words."""
    unique: dict[frozenset[str], Words] = {}
    for row in rows:
        values = [v if isinstance(v, list) else [v] for v in row.values()]
        for combination in itertools.product(*values):
            words = [opened(f"{k}={_word(v)}") for k, v in zip(row, combination, strict=True)]
            unique.setdefault(frozenset(words), words)
    return list(unique.values())


def chosen(rows: Sequence[Mapping[str, Any]], asked: Sequence[str]) -> list[Words]:
    """The runs that `asked` (one value a key) means, with the words that hold for all of them.

    KEY=null means those that leave a key open. None, where no run has all the words together.
    Raises Error for a word that no run has.
    """
    keys = {key for row in rows for key in row}
    wanted = [word for word in asked if _key(word) in keys]
    rest = [word for word in asked if _key(word) not in keys]
    all_runs = runs(rows)
    for word in wanted:
        if not any(_says(run, word) for run in all_runs):
            there = (next((w for w in run if _same_key(w, word)), "=null") for run in all_runs)
            values = dict.fromkeys(w.partition("=")[2] for w in there)
            raise Error(f"{word}: not in this grid, choose one of {', '.join(values)}")
    return [[*run, *rest] for run in all_runs if all(_says(run, word) for word in wanted)]


def everything(rows: Sequence[Mapping[str, Any]], asked: Sequence[str]) -> list[Words]:
    """All runs of the grid that `asked` means a part of."""
    keys = {key for row in rows for key in row}
    return chosen(rows, [word for word in asked if _key(word) not in keys])


def waves(jobs: Iterable[Words]) -> list[list[Words]]:
    """In two waves where some start from a baseline that another makes."""
    jobs = [list(words) for words in dict.fromkeys(map(tuple, jobs))]
    parts = [
        [words for words in jobs if any(map(_BASELINE.fullmatch, words)) == later]
        for later in (False, True)
    ]
    return [part for part in parts if part]


def command(job: Sequence[str], jobs: Iterable[Sequence[str]]) -> str:
    """The command line that makes this one of a grid's jobs, and no other."""
    left_open: list[str] = []
    for other in jobs:
        keys = sorted({_key(word) for word in other} - {_key(word) for word in job})
        if set(job) < set(other) and not set(left_open) & set(keys):
            # Hydra takes no null for a group: another key, if there is one.
            left_open.append(min(keys, key=lambda key: key in _GROUPS))
    words = [*sorted(job, key=_place_of), *(f"{key}=null" for key in left_open)]
    return " ".join(["fpgm-train", *words])


def remember(directory: Path, jobs: Mapping[str, Words]) -> None:
    """Write into a grid's directory which runs it is to have, run directory -> words; those
    asked for before stay. Raises OSError, Error."""
    directory.mkdir(parents=True, exist_ok=True)
    with FileLock(directory / ".lock"):  # of two parts started together
        everything = {**remembered(directory), **jobs}
        write_text(directory / FILE, json.dumps(everything, indent=1) + "\n")


def remembered(directory: Path) -> dict[str, Words]:
    """What `remember` wrote, nothing where it did not. Raises Error."""
    path = directory / FILE
    try:
        return dict(json.loads(path.read_text())) if path.exists() else {}
    except ValueError as error:
        raise Error(f"{path}: damaged; delete it, the sweep's command writes it again") from error


def check_places(jobs: Sequence[Words], places: Sequence[str]) -> None:
    """Raise Error where two jobs of a sweep would write into one directory."""
    for place, count in Counter(places).items():
        if count > 1:
            a, b = [job for job, at in zip(jobs, places, strict=True) if at == place][:2]
            differ = " and ".join(sorted(set(a) ^ set(b)))
            raise Error(
                f"{differ}: would share {place}; give each a sweep of its own with hydra.sweep.dir="
            )


def _key(word: str) -> str:
    return word.partition("=")[0].lstrip("+")


def _place_of(word: str) -> bool:
    """The experiment comes first on a command line."""
    return not word.startswith("experiment=")


def _same_key(a: str, b: str) -> bool:
    return _key(a) == _key(b)


def _says(run: Sequence[str], word: str) -> bool:
    """Whether a run's words say what `word` does: rate=0.30 is rate=0.3."""
    value = next((_value(w) for w in run if _same_key(w, word)), None)
    wanted = _value(word)
    return bool(value == wanted) and isinstance(value, bool) == isinstance(wanted, bool)


def _value(word: str) -> Any:
    return yaml.safe_load(word.partition("=")[2])


def _word(value: Any) -> str:
    """A YAML value as it is written on the command line."""
    return json.dumps(value) if value is None or isinstance(value, bool) else str(value)
