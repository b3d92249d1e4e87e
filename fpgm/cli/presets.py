"""What a preset says, and which words of a command line say something else."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import yaml

from fpgm.keys import CONFIGS, flatten


def said(preset: str) -> dict[str, Any]:
    """Keys and groups that a preset sets, with dots: {'optimizer': 'finetune', 'schedule.duration':
    0, ...}; nothing of one that lies elsewhere (--config-dir)."""
    file = CONFIGS / "preset" / f"{preset}.yaml"
    values = dict(yaml.safe_load(file.read_text())) if file.exists() else {}
    groups = {}
    for entry in values.pop("defaults", []):
        groups.update({key.rpartition("/")[2]: value for key, value in entry.items()})
    return {**groups, **flatten(values)}


def words(preset: str) -> str:
    """As they would be written on a command line."""
    return " ".join(f"{key}={_word(value)}" for key, value in said(preset).items())


def contradictions(preset: str, given: Iterable[str]) -> Iterator[str]:
    """A line for each of the words that says something else than the preset."""
    values = said(preset)
    for word in given:
        key, _, value = word.lstrip("+").partition("=")
        if key in values and _listed(yaml.safe_load(value)) != _listed(values[key]):
            yield f"{word}: preset={preset} says {key}={_word(values[key])}; leave one of them out"


def _listed(value: Any) -> Any:
    """method=distillation is 'method=[distillation]'."""
    return value if isinstance(value, list) else [value]


def _word(value: Any) -> str:
    return f"[{','.join(value)}]" if isinstance(value, list) else str(value)
