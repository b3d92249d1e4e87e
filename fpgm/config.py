"""The run's configuration: one typed, checked value. Defaults live in configs/, checks here."""

from __future__ import annotations

import difflib
import math
import types
import typing
from collections.abc import Iterable, Mapping
from dataclasses import MISSING, asdict, dataclass, field, fields, is_dataclass
from typing import Any, TypeVar

T = TypeVar("T")


class ConfigError(ValueError):
    """One line for each thing that is wrong: the key, the value, what would do."""


def _number(low: float, high: float = math.inf, *, below: bool = False, example: str) -> Any:
    """A number in [low, high], or [low, high) if `below`."""
    return field(metadata={"low": low, "high": high, "below": below, "example": example})


def _choice(*choices: str) -> Any:
    return field(metadata={"choices": choices})


@dataclass(frozen=True, kw_only=True)
class Dataset:
    """name: what to read; root: where it lies or goes; image_size: pixels (image_folder only);
    pad, flip: the training augmentation, zeros added on each side before the crop, mirroring."""

    name: str = _choice("digits", "cifar10", "cifar100", "image_folder")
    root: str | None
    image_size: int | None = _number(1, 1024, example="32")
    pad: int = _number(0, 64, example="4")
    flip: bool


@dataclass(frozen=True, kw_only=True)
class Criterion:
    """name: an entry of criteria.CRITERIA; the others are options of its function."""

    name: str
    distance: str | None = _choice("l2", "l1", "cosine")
    norm_share: float | None = _number(0, 1, example="0.25")

    def options(self) -> dict[str, Any]:
        """What the criterion's function takes beside the weight."""
        own = {"distance": self.distance, "norm_share": self.norm_share}
        return {key: value for key, value in own.items() if value is not None}


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """See fpgm.schedules. interval: epochs between two selections; settle: share of the epochs
    after which the selection stays and is masked, 1 = never; recalibrate: batches of training
    images on which BatchNorm is estimated again after the last zeroing."""

    name: str = _choice("frozen", "soft", "asymptotic", "hard")
    interval: int = _number(1, example="1")
    zero_at_start: bool
    reset_momentum: bool
    settle: float = _number(0, 1, example="0.6")
    recalibrate: int = _number(0, example="100")


@dataclass(frozen=True, kw_only=True)
class Optimizer:
    """SGD. milestones: shares of the epochs after which lr is multiplied by gamma; the first
    warmup_epochs run at a tenth of lr."""

    lr: float = _number(1e-12, example="0.1")
    momentum: float = _number(0, 1, below=True, example="0.9")
    nesterov: bool
    weight_decay: float = _number(0, example="5e-4")
    milestones: tuple[float, ...]
    gamma: float = _number(0, 1, example="0.2")
    warmup_epochs: int = _number(0, example="1")


@dataclass(frozen=True, kw_only=True)
class Config:
    """One run. rate: share of each layer's filters to prune; macs_target: share of the dense
    network's MACs, in place of rate; residual: see fpgm.coupling; align: kept counts are multiples
    of it; pretrained: a run directory or a checkpoint to start from."""

    dataset: Dataset
    arch: str
    criterion: Criterion
    schedule: Schedule
    optimizer: Optimizer
    rate: float = _number(0, 1, below=True, example="0.4")
    macs_target: float | None = _number(0.001, 1, example="0.5")
    residual: str = _choice("independent", "shared", "inner")
    align: int = _number(1, 1024, example="8")
    epochs: int = _number(1, example="200")
    batch_size: int = _number(1, example="128")
    seed: int = _number(0, 2**31 - 1, example="0")
    device: str = _choice("auto", "cpu", "cuda")
    precision: str = _choice("auto", "float32", "bf16")
    pretrained: str | None

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> Config:
        """Build and check. Raises ConfigError with a line for each problem there is."""
        errors: list[str] = []
        config = _build(cls, values, "", errors)
        if config is None:
            raise ConfigError("\n".join(errors))
        errors = list(_contradictions(config))
        if errors:
            raise ConfigError("\n".join(errors))
        return config

    def as_dict(self) -> dict[str, Any]:
        """Nested plain values, as written to config.yaml."""
        values = asdict(self)
        values["optimizer"]["milestones"] = list(self.optimizer.milestones)
        return values


def _contradictions(config: Config) -> Iterable[str]:
    if config.optimizer.nesterov and config.optimizer.momentum == 0:
        yield "optimizer.nesterov=true: needs momentum, for example optimizer.momentum=0.9"
    c = config.criterion
    for key, value, owner in (("distance", c.distance, "gm"), ("norm_share", c.norm_share, "mix")):
        if value is not None and c.name != owner:
            yield f"criterion.{key}={value}: only criterion={owner} takes it"
    if config.schedule.name == "hard" and config.rate > 0 and config.pretrained is None:
        yield "schedule=hard: prunes a trained network, name it with pretrained=RUN_DIR"
    if config.dataset.name == "image_folder" and config.dataset.root is None:
        yield "dataset.root=null: where the images lie, dataset.root=DIR with train/CLASS/*"
    if not all(0 < m <= 1 for m in config.optimizer.milestones):
        yield (
            f"optimizer.milestones={list(config.optimizer.milestones)}: shares of the epochs, "
            "each above 0 and at most 1, for example [0.3,0.6,0.8]"
        )


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


def suggestion(key: str, known: Iterable[str]) -> str:
    """'did you mean ...?' for a mistyped key: by the whole of it, else by its last part."""
    known = list(known)
    near = difflib.get_close_matches(key, known, n=1, cutoff=0.6)
    near = near or [k for k in known if k.split(".")[-1] == key.split(".")[-1]][:1]
    return f"did you mean {near[0]}?" if near else f"the keys are {', '.join(sorted(known))}"


def _build(cls: type[T], values: Mapping[str, Any], prefix: str, errors: list[str]) -> T | None:
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
                built[f.name] = _build(wanted, value, f"{name}.", errors)  # type: ignore[arg-type]
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
