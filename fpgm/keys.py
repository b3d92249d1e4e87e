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


SHIPPED = "fpgm.compaction.shipped:network"  # what builds arch=compact


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


def network(arch: str | Mapping[str, Any]) -> str:
    """A configuration's `arch` as the one word that fpgm.model takes: resnet20,
    timm:mobilenetv3_large_100, package.module:function."""
    if isinstance(arch, str):
        return arch
    if arch.get("source") == "compact":
        return SHIPPED
    return str(arch.get("build")) if arch.get("source") == "own" else f"timm:{arch.get('name')}"


def arch_word(arch: str | Mapping[str, Any]) -> str:
    """What follows arch= on a command line, as far as one word says it."""
    name = network(arch)
    return "compact" if name == SHIPPED else name


def network_options(arch: str | Mapping[str, Any]) -> dict[str, Any]:
    """The keyword arguments that it is built with beside classes and channels."""
    keys = ("source", "name", "build")
    return {} if isinstance(arch, str) else {k: v for k, v in arch.items() if k not in keys}


def network_words(arch: str | Mapping[str, Any]) -> str:
    """Both, as a table names the network: resnet20, my_nets:tiny width=8, compact run=RUN_DIR."""
    options = [f"{key}={value}" for key, value in flatten(network_options(arch)).items()]
    return " ".join([arch_word(arch), *options])
