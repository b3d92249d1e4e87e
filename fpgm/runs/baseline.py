"""The unpruned run that a pruned one starts from, found beside it. No torch."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from fpgm.errors import Error
from fpgm.keys import flatten, network_words
from fpgm.runs.run import read_config

# What a baseline need not share with the run that starts from it.
_OF_PRUNING = (
    "criterion", "schedule", "optimizer", "pretrained", "rate", "macs_target", "residual", "align",
    "scope", "scope_norm", "scope_cost", "floor", "tune", "target", "target_batch", "layers",
    "rates", "ignore", "widths", "rounding", "threshold", "latency_target", "latency_table",
    "preset",
)  # fmt: skip
_AMOUNTS = ("macs_target", "rates", "widths", "threshold", "latency_target")  # beside rate


def is_baseline(pretrained: str | None) -> bool:
    """Whether pretrained= means the baseline beside a run: baseline, or baseline+METHOD+..., the
    one that was trained with these methods."""
    return pretrained is not None and re.fullmatch(r"baseline(\+\w+)*", pretrained) is not None


def find_baseline(directory: Path, config: Mapping[str, Any], words: Iterable[str]) -> Path:
    """The finished baseline of the same data set, network and seed that lies beside `directory`.

    With pretrained=baseline+METHOD it is one that was trained with that method (in Network Slimming
    a penalty), and no other; else with those of the run itself, or if there is none, with none.

    words: the command line, for the command that would make one. Of several, the one that this
    run has begun with, or the only one of as many epochs. Raises Error where there is none, and
    where it is not clear which is meant.
    """
    given = str(config.get("pretrained"))
    methods = given.split("+")[1:]
    arch = config.get("arch")
    if isinstance(arch, Mapping) and arch.get("run") == given:  # of arch=compact
        raise Error(
            f"pretrained={given}: arch=compact is the network of a run, which is to be named, with "
            "arch.run=RUN_DIR or with pretrained=RUN_DIR itself"
        )
    finished: dict[Path, bool] = {}  # whether it was trained as long
    plain: dict[Path, bool] = {}  # the same of those that were trained with no method
    for other in sorted(path.parent for path in directory.parent.glob("*/report.json")):
        theirs = read_config(other)
        whole = theirs["rate"] == 0 and all(theirs.get(key) in (None, [], {}) for key in _AMOUNTS)
        if methods and set(theirs["method"]) != set(methods):
            continue
        ours = {**config, "method": theirs["method"]}
        if whole and not theirs["pretrained"] and _identity(theirs) == _identity(ours):
            # Methods that are named here count, whatever this run's own are.
            same = methods or _identity(theirs) == _identity(config)
            if same or not theirs["method"]:
                (finished if same else plain)[other] = theirs["epochs"] == config.get("epochs")
    finished = finished or plain
    begun = directory / "config.yaml"
    before = Path(str(read_config(directory)["pretrained"])) if begun.exists() else None
    if before in finished:
        return before
    as_long = [other for other, same in finished.items() if same] or list(finished)
    if len(as_long) == 1:
        return as_long[0]
    if as_long:
        raise Error(
            f"pretrained={given}: could be any of {', '.join(map(str, as_long))}; name the one "
            "with pretrained=DIR"
        )
    network = f"arch={network_words(config.get('arch') or '')} seed={config.get('seed')}"
    raise Error(
        f"pretrained={given}: no finished run at rate=0 of {network} in {directory.parent}; make "
        f"it with: {_command(words, methods)}"
    )


def _command(words: Iterable[str], methods: Sequence[str]) -> str:
    """What would make the baseline of a command line."""
    kept = [w for w in words if w.partition("=")[0].split(".")[0].lstrip("+") not in _OF_PRUNING]
    kept = [word for word in kept if not word.startswith("method")]
    if methods:
        kept.append(
            f"method={methods[0]}" if len(methods) == 1 else f"'method=[{','.join(methods)}]'"
        )
    kept.sort(key=lambda word: not word.startswith("experiment="))
    return " ".join(["fpgm-train", *kept, "rate=0"])


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
