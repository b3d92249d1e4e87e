"""The unpruned run that a pruned one starts from, found beside it. No torch."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from fpgm.errors import Error
from fpgm.keys import flatten
from fpgm.runs.run import read_config

# What a baseline need not share with the run that starts from it.
_OF_PRUNING = (
    "criterion", "schedule", "optimizer", "pretrained", "rate", "macs_target", "residual", "align",
    "scope", "tune", "target", "target_batch",
)  # fmt: skip


def find_baseline(directory: Path, config: Mapping[str, Any], words: Iterable[str]) -> Path:
    """The finished baseline of the same data set, network and seed that lies beside `directory`.

    words: the command line, for the command that would make one. Of several, the one that this
    run has begun with, or the only one of as many epochs. Raises Error where there is none, and
    where it is not clear which is meant.
    """
    finished = {}  # directory: whether it was trained as long
    for other in sorted(path.parent for path in directory.parent.glob("*/report.json")):
        theirs = read_config(other)
        scratch = theirs["rate"] == 0 and not theirs["macs_target"] and not theirs["pretrained"]
        if scratch and _identity(theirs) == _identity(config):
            finished[other] = theirs["epochs"] == config.get("epochs")
    begun = directory / "config.yaml"
    before = Path(str(read_config(directory)["pretrained"])) if begun.exists() else None
    if before in finished:
        return before
    as_long = [other for other, same in finished.items() if same] or list(finished)
    if len(as_long) == 1:
        return as_long[0]
    if as_long:
        raise Error(
            f"pretrained=baseline: could be any of {', '.join(map(str, as_long))}; name the one "
            "with pretrained=DIR"
        )
    kept = [w for w in words if w.partition("=")[0].split(".")[0].lstrip("+") not in _OF_PRUNING]
    kept.sort(key=lambda word: not word.startswith("experiment="))
    raise Error(
        f"pretrained=baseline: no finished run at rate=0 of arch={config.get('arch')} "
        f"seed={config.get('seed')} in {directory.parent}; make it with: "
        f"fpgm-train {' '.join([*kept, 'rate=0'])}"
    )


def _identity(config: Mapping[str, Any]) -> dict[str, Any]:
    """What a baseline and the runs that start from it have in common."""
    keys = ("dataset.", "arch", "seed", "method.")
    config = {"dataset.validation": 0.0, **flatten(config)}  # which older runs do not have
    # workers and on_error: how images are read, not which.
    return {
        key: value
        for key, value in config.items()
        if key.startswith(keys) and key not in ("dataset.workers", "dataset.on_error")
    }
