"""Typed dataclasses from nested plain values: every field checked, every problem one line."""

from __future__ import annotations

import difflib
import math
import types
import typing
from collections.abc import Iterable, Mapping
from dataclasses import MISSING, field, fields, is_dataclass
from typing import Any, TypeVar

T = TypeVar("T")


def number(low: float, high: float = math.inf, *, below: bool = False, example: str) -> Any:
    """A number in [low, high], or [low, high) if `below`."""
    return field(metadata={"low": low, "high": high, "below": below, "example": example})


def choice(*choices: str) -> Any:
    return field(metadata={"choices": choices})


def build(cls: type[T], values: Mapping[str, Any], prefix: str, errors: list[str]) -> T | None:
    """A dataclass from nested values; adds to `errors` and returns None where one is wrong."""
    before = len(errors)
    types_ = typing.get_type_hints(cls)
    names = [f.name for f in fields(cls)]  # type: ignore[arg-type]
    built: dict[str, Any] = {}
    for key in values:
        if key not in names:
            errors.append(f"{prefix}{key}: no such key, {suggestion(key, names)}")
    for f in fields(cls):  # type: ignore[arg-type]
        name, wanted = f"{prefix}{f.name}", types_[f.name]
        value = values.get(f.name, MISSING)
        if value is MISSING:
            errors.append(f"{name}: missing")
        elif is_dataclass(wanted):
            if isinstance(value, Mapping):
                built[f.name] = build(wanted, value, f"{name}.", errors)  # type: ignore[arg-type]
            else:
                errors.append(f"{name}={value}: must be a group of keys ({name}.{f.name}=...)")
        else:
            try:
                built[f.name] = _converted(wanted, value)
                _in_range(built[f.name], f.metadata)
            except (TypeError, ValueError) as error:
                errors.append(f"{name}={_shown(value)}: {error}{_example(name, f.metadata)}")
    return cls(**built) if len(errors) == before else None


def _converted(wanted: Any, value: Any) -> Any:
    """`value` as the wanted type, without guessing: 1 is a float, '1' is no number."""
    options = typing.get_args(wanted) if isinstance(wanted, types.UnionType) else (wanted,)
    if value is None and type(None) in options:
        return None
    kind = next(o for o in options if o is not type(None))
    if typing.get_origin(kind) is tuple:
        if not isinstance(value, list | tuple):
            raise TypeError("must be a list of numbers")
        return tuple(_converted(typing.get_args(kind)[0], v) for v in value)
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if type(value) is not kind:
        names = {float: "a number", int: "a whole number", bool: "true or false", str: "a word"}
        raise TypeError(f"must be {names[kind]}")
    return value


def _in_range(value: Any, rule: Mapping[str, Any]) -> None:
    if value is None:
        return
    if "choices" in rule and value not in rule["choices"]:
        raise ValueError(f"choose one of {', '.join(rule['choices'])}")
    if "low" in rule:
        low, high, below = rule["low"], rule["high"], rule["below"]
        if not (low <= value <= high) or (below and value == high):
            upper = "" if high == math.inf else f" and {'below' if below else 'at most'} {high:g}"
            raise ValueError(f"must be at least {low:g}{upper}")


def _example(name: str, rule: Mapping[str, Any]) -> str:
    return f", for example {name}={rule['example']}" if "example" in rule else ""


def _shown(value: Any) -> str:
    return "null" if value is None else str(value)


def suggestion(key: str, known: Iterable[str]) -> str:
    """'did you mean ...?' for a mistyped key: by the whole of it, else by its last part."""
    known = list(known)
    near = difflib.get_close_matches(key, known, n=1, cutoff=0.6)
    near = near or [k for k in known if k.split(".")[-1] == key.split(".")[-1]][:1]
    return f"did you mean {near[0]}?" if near else f"the keys are {', '.join(sorted(known))}"
