"""Configurations as YAML has them: where the files lie, nested values as flat keys. No pydantic,
which help and completion need not wait for."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

PACKAGE = Path(__file__).resolve().parent
# Inside a wheel the configs are part of the package, in a checkout they are beside it.
CONFIGS = next(c for c in (PACKAGE / "configs", PACKAGE.parent / "configs") if c.is_dir())


def suggestion(key: str, choices: Iterable[str]) -> str:
    """'did you mean ...?' for a mistyped key: by the whole of it, else by its last part."""
    choices = sorted(choices)
    near = difflib.get_close_matches(key, choices, n=1, cutoff=0.6)
    near = near or [c for c in choices if c.split(".")[-1] == key.split(".")[-1]][:1]
    if near:
        return f"did you mean {near[0]}?"
    return f"the keys are {', '.join(choices)}" if choices else "there are none here"


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """Keys at which two nested configurations differ, as `key: old -> new`."""
    a, b = flatten(old), flatten(new)
    return [
        f"{key}: {a.get(key)} -> {b.get(key)}" for key in {**a, **b} if a.get(key) != b.get(key)
    ]


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """{'a': {'b': 1}} -> {'a.b': 1}."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            flat.update(flatten(value, f"{prefix}{key}."))
        else:
            flat[f"{prefix}{key}"] = value
    return flat
