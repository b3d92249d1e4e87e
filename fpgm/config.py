"""What a run is asked for: typed and checked, all mistakes at once. Defaults live in configs/.

The options of criteria and methods are not here: each declares its own by its signature, which
`checked` holds them against.
"""

from __future__ import annotations

import json
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, create_model
from pydantic.fields import FieldInfo

from fpgm.errors import Error, first_line
from fpgm.keys import network, network_words, suggestion


class _Section(BaseModel):
    """Values as they are: '1' is no number, and no key that is not declared."""

    model_config = ConfigDict(frozen=True, strict=True, extra="forbid")


class _Named(BaseModel):
    """A name, and options that whatever has this name declares itself."""

    model_config = ConfigDict(frozen=True, strict=True, extra="allow")
    name: str

    @property
    def options(self) -> dict[str, Any]:
        return dict(self.model_extra or {})


class Dataset(_Section):
    """name: what to read; root: where it lies or goes; image_size: pixels (image_folder, imagenet);
    pad, flip: the training augmentation, zeros added on each side before the crop, mirroring; mean,
    std: of each channel, of pixels in 0..1 or 0..255, null: measured (imagenet: published);
    validation: share of the training images that is held out, the same ones for every seed;
    imagenet only: workers, processes that decode, null for one a core, and on_error, what to do
    with an image that cannot be read."""

    name: Literal["digits", "mnist", "cifar10", "cifar100", "image_folder", "imagenet"]
    root: str | None
    image_size: int | None = Field(ge=1, le=1024, examples=["32"])
    pad: int = Field(ge=0, le=64, examples=["4"])
    flip: bool
    mean: list[float] | None = None
    std: list[float] | None = None
    validation: float = Field(0.0, ge=0, le=0.9, examples=["0.1"])
    workers: int | None = Field(ge=0, le=1024, examples=["8"])
    on_error: Literal["stop", "skip"]


class Criterion(_Named):
    """name: an entry of criteria.CRITERIA, or module:function of your own; batches: of training
    images, without augmentation, that a criterion which reads images is shown at each selection."""

    batches: int | None = Field(None, ge=1, examples=["10"])


class Method(_Named):
    """name: an entry of methods.METHODS, or module:Class of your own."""


class Optimizer(_Section):
    """SGD. schedule: how lr moves (see training.recipe); milestones: shares of the epochs after
    which it is multiplied by gamma (schedule=step); warmup_epochs: the first ones, at a tenth of lr
    (step) or up to it (cosine); label_smoothing: share of each label that is spread over all
    classes."""

    lr: float = Field(ge=1e-12, examples=["0.1"])
    momentum: float = Field(ge=0, lt=1, examples=["0.9"])
    nesterov: bool
    schedule: Literal["step", "cosine", "onecycle"]
    weight_decay: float = Field(ge=0, examples=["5e-4"])
    milestones: list[float]
    gamma: float = Field(ge=0, le=1, examples=["0.2"])
    warmup_epochs: int = Field(ge=0, examples=["1"])
    label_smoothing: float = Field(ge=0, lt=1, examples=["0.1"])


class Pruning(_Section):
    """What goes, by which rule and when. rate: share of each layer's filters to prune; macs_target:
    share of the dense network's MACs, in place of rate; latency_target: of its time; rates, widths,
    rounding, threshold, scope, scope_norm, scope_cost, floor, align: see selection.rule.Rule;
    ignore, residual: see graph.groups; schedule: the method that owns the selection; method: what
    else is done to the filters; epochs: 0 prunes a trained network and trains nothing; seed: of
    chance."""

    criterion: Criterion
    schedule: Method
    method: dict[str, Method]
    rate: float = Field(ge=0, lt=1, examples=["0.4"])
    macs_target: float | None = Field(ge=0.001, le=1, examples=["0.5"])
    latency_target: float | None = Field(ge=0.001, le=1, examples=["0.5"])
    rates: dict[str, float] | None = Field(examples=["{layer1*: 0.3, conv1: 0}"])
    ignore: list[str] = Field(examples=["[conv1]"])
    widths: list[int] | dict[str, int] | None = Field(examples=["[16,32,64]"])
    rounding: Literal["pruned", "kept"]
    threshold: float | None = Field(examples=["0.5"])
    residual: Literal["independent", "shared", "inner"]
    align: int = Field(ge=1, le=1024, examples=["8"])
    scope: Literal["layer", "global", "isomorphic"]
    scope_norm: Literal["none", "mean", "l2", "rank"]
    scope_cost: Literal["none", "macs", "memory"]
    floor: float = Field(ge=0, lt=1, examples=["0.1"])
    epochs: int = Field(ge=0, examples=["200"])
    seed: int = Field(ge=0, le=2**31 - 1, examples=["0"])

    @property
    def by_hand(self) -> bool:
        """Whether something else than one rate says how much of each layer goes."""
        return bool(self.rates or self.widths) or self.threshold is not None

    @property
    def prunes(self) -> bool:
        budget = self.macs_target is not None or self.latency_target is not None
        return self.rate > 0 or budget or self.by_hand


class Config(Pruning):
    """One run. latency_target: on `target` with batches of target_batch images; latency_table:
    times that were measured before (shipping.timetable);
    arch: a network by name, or a table {source: timm, name: ...}, {source: own, build:
    module:function}, either with keyword arguments;
    pretrained: a run directory or a checkpoint to start from, torchvision or timm; tune: whether
    the compact network gets the form that is fastest on `target` with batches of target_batch
    images; compile: train with torch.compile."""

    dataset: Dataset
    arch: str | dict[str, Any]
    optimizer: Optimizer
    latency_table: str | None
    batch_size: int = Field(ge=1, examples=["128"])
    device: Literal["auto", "cpu", "cuda"]
    precision: Literal["auto", "float32", "bf16"]
    compile: bool
    pretrained: str | None
    tune: bool
    target: Literal["torch", "onnxruntime", "openvino", "onnxruntime_int8", "openvino_int8"]
    target_batch: int = Field(ge=1, examples=["1"])

    @property
    def network(self) -> str:
        """What fpgm.model calls it: resnet20, timm:NAME, package.module:function."""
        return network(self.arch)

    def as_dict(self) -> dict[str, Any]:
        """Nested plain values, as written to config.yaml."""
        values = self.model_dump()
        if self.criterion.batches is None:
            del values["criterion"]["batches"]
        return values


P = TypeVar("P", bound=Pruning)


def read(values: Mapping[str, Any], kind: type[P]) -> tuple[P | None, list[str]]:
    """The configuration, None where a key is wrong, and a line for each mistake there is. kind:
    Config, or what there is of it beside a training loop of one's own."""
    try:
        config = kind.model_validate(dict(values))
    except ValidationError as error:
        return None, _lines(kind, error, values, "")
    problems = list(_contradictions(config)) if isinstance(config, Config) else []
    return config, problems + list(_said_twice(config))


def with_tables(values: Mapping[str, Any]) -> dict[str, Any]:
    """The same with what a file holds in place of its name: rates=FILE, widths=RUN.

    Raises Error where it cannot be read, or is of another network.
    """
    rates, widths = values.get("rates"), values.get("widths")
    found = dict(values)
    if isinstance(rates, str):
        found["rates"] = _rates(rates, values)
    if isinstance(widths, str):
        # What the other run kept whole stays whole.
        found |= {"widths": _widths(widths, values), "rate": 0.0}
    return found


def _rates(given: str, values: Mapping[str, Any]) -> Any:
    """The table under `rates:` of a file."""
    path = Path(given).expanduser()
    try:
        content = yaml.safe_load(path.read_text())
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise Error(
            f"rates={given}: cannot be read ({first_line(error)}); a table is written as "
            "'rates={PATTERN: RATE}', a file of one by fpgm-sensitivity"
        ) from error
    if not isinstance(content, dict) or not isinstance(content.get("rates"), dict):
        raise Error(f"rates={given}: has no table under `rates:`, as in 'rates: {{conv1: 0.3}}'")
    _same_network(f"rates={given}", content, values)
    return content["rates"]


def _widths(given: str, values: Mapping[str, Any]) -> dict[str, int]:
    """The filters that a finished run kept, by layer; layers that lost none are left out."""
    path = Path(given).expanduser() / "report.json"
    try:
        report = json.loads(path.read_text())
        layers, config = report["layers"], report["config"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise Error(
            f"widths={given}: no finished run ({first_line(error)}); give a run directory, a list "
            "or a table of widths"
        ) from error
    _same_network(f"widths={given}", config, values)
    widths = {one["name"]: one["kept"] for one in layers if one["kept"] < one["filters"]}
    if not widths:
        raise Error(f"widths={given}: nothing is pruned there")
    return widths


def _same_network(given: str, theirs: Mapping[str, Any], ours: Mapping[str, Any]) -> None:
    for key in ("arch", "residual"):
        if key in theirs and theirs[key] != ours.get(key):
            there, here = (network_words(one.get(key) or "") for one in (theirs, ours))
            raise Error(f"{given}: is for {key}={there}, not {key}={here}")


def checked(
    options: Mapping[str, tuple[Any, Any]], values: Mapping[str, Any], prefix: str
) -> list[str]:
    """A line for each of `values` that does not fit a signature. options: name -> (annotation,
    default)."""
    model = create_model("Options", __base__=_Section, **dict(options))  # type: ignore[call-overload]
    try:
        model.model_validate(dict(values))
    except ValidationError as error:
        return _lines(model, error, values, prefix)
    return []


def dataset(values: Mapping[str, Any]) -> Dataset:
    """A data set by itself. Raises Error."""
    try:
        return Dataset.model_validate(dict(values))
    except ValidationError as error:
        raise Error("\n".join(_lines(Dataset, error, values, "dataset."))) from error


def choices() -> dict[str, tuple[str, ...]]:
    """The values of the keys that take one of a few: {'residual': ('independent', ...), ...}."""
    sections: dict[str, type[BaseModel]] = {
        "": Config,
        "dataset.": Dataset,
        "optimizer.": Optimizer,
    }
    offered: dict[str, tuple[str, ...]] = {}
    for prefix, section in sections.items():
        for name, info in section.model_fields.items():
            if typing.get_origin(info.annotation) is Literal:
                offered[f"{prefix}{name}"] = typing.get_args(info.annotation)
            elif info.annotation is bool:
                offered[f"{prefix}{name}"] = ("true", "false")
    return offered


def _contradictions(config: Config) -> Iterator[str]:
    if config.optimizer.nesterov and config.optimizer.momentum == 0:
        yield "optimizer.nesterov=true: needs momentum, for example optimizer.momentum=0.9"
    if config.dataset.name in ("image_folder", "imagenet") and config.dataset.root is None:
        yield "dataset.root=null: where the images lie, dataset.root=DIR with train/CLASS/*"
    if not all(0 < m <= 1 for m in config.optimizer.milestones):
        yield (
            f"optimizer.milestones={config.optimizer.milestones}: shares of the epochs, "
            "each above 0 and at most 1, for example [0.3,0.6,0.8]"
        )
    if config.optimizer.schedule == "onecycle" and config.optimizer.warmup_epochs:
        yield (
            f"optimizer.warmup_epochs={config.optimizer.warmup_epochs}: "
            "optimizer.schedule=onecycle has a warm-up of its own; leave one out"
        )
    if config.epochs == 0 and config.pretrained is None:
        yield "epochs=0: nothing is trained; name a trained network with pretrained=RUN_DIR"


def _said_twice(config: Pruning) -> Iterator[str]:
    over = config.rate > 1 - config.floor + 1e-9
    if config.macs_target is not None and (config.widths or config.threshold is not None):
        key = "widths" if config.widths else "threshold"
        yield f"macs_target={config.macs_target}: {key} says already how much goes; leave one out"
    if config.latency_target is not None:
        others = {"macs_target": config.macs_target is not None, "rates": bool(config.rates),
                  "widths": bool(config.widths), "threshold": config.threshold is not None,
                  "scope_cost": config.scope_cost != "none",
                  "scope=isomorphic": config.scope == "isomorphic"}  # fmt: skip
        for key in (key for key, given in others.items() if given):
            yield (
                f"latency_target={config.latency_target}: {key} says already how much of a layer "
                "goes; leave one out"
            )
    if config.scope != "layer" and config.macs_target is None and over:
        yield (
            f"rate={config.rate}: scope={config.scope} floor={config.floor} leaves at most "
            f"rate={1 - config.floor:.4g}; a smaller floor lets more go"
        )


def _lines(
    model: type[BaseModel], error: ValidationError, values: Mapping[str, Any], prefix: str
) -> list[str]:
    """pydantic's findings as one line each: the key, the value, what would do."""
    return [
        _line(model, prefix, [str(p) for p in e["loc"]], e["type"], e["input"])
        for e in error.errors(include_url=False)
    ]


_OF_UNIONS = ("constrained-float", "str")  # parts of pydantic's paths that are no keys


def _line(model: type[BaseModel], prefix: str, path: list[str], kind: str, given: Any) -> str:
    key, section = prefix + ".".join(path), model
    info: FieldInfo | None = None
    field = key
    for place, part in enumerate(path):  # down to the field; deeper, a list's or table's entry
        if part not in section.model_fields:
            field = prefix + ".".join(path[:place])
            break
        info = section.model_fields[part]
        if isinstance(info.annotation, type) and issubclass(info.annotation, BaseModel):
            section = info.annotation
    if kind == "missing":
        return f"{key}: missing"
    if kind == "extra_forbidden":
        siblings = list(section.model_fields)
        return f"{key}: no such key, {suggestion(path[-1], siblings)}"
    # Of a value that may be a list or a table pydantic names both, as list[int].
    key = prefix + ".".join(p for p in path if "[" not in p and p not in _OF_UNIONS)
    table = kind == "dict_type" and (info is None or typing.get_origin(info.annotation) is dict)
    if table or kind in ("model_type", "model_attributes_type") or info is None:
        return f"{key}={given}: must be a group of keys ({key}.KEY=VALUE)"
    return f"{key}={'null' if given is None else given}: {_wanted(kind, field, info)}"


def _wanted(kind: str, key: str, info: FieldInfo) -> str:
    """What a field takes, in words."""
    annotation: Any = info.annotation
    words, numbers = _either(annotation)
    if words and numbers:
        example = f", for example {key}={info.examples[0]}" if info.examples else ""
        return f"must be {' or '.join(words)}, or {_range(numbers)}{example}"
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        annotation = next(a for a in typing.get_args(annotation) if a is not type(None))
    if typing.get_origin(annotation) is Literal:
        return f"choose one of {', '.join(map(str, typing.get_args(annotation)))}"
    example = f", for example {key}={info.examples[0]}" if info.examples else ""
    if kind.startswith(("greater", "less")):
        return f"must be {_range(info.metadata)}{example}"
    names = {float: "a number", int: "a whole number", bool: "true or false", str: "a word",
             list[str]: "a list of words", dict[str, float]: "a table of numbers",
             list[int]: "whole numbers, a list or a table"}  # fmt: skip
    return f"must be {names.get(annotation, 'a list of numbers')}{example}"


def _range(metadata: Sequence[Any]) -> str:
    """The limits of a number, in words."""
    names = ("ge", "gt", "le", "lt")
    limits = {n: getattr(m, n) for m in metadata for n in names if getattr(m, n, None) is not None}
    words = {"ge": "at least", "gt": "above", "le": "at most", "lt": "below"}
    return " and ".join(f"{words[n]} {limits[n]:g}" for n in names if n in limits)


def _either(annotation: Any) -> tuple[tuple[str, ...], Sequence[Any]]:
    """Of a field that takes a word or a number: the words, and the number's limits."""
    words: tuple[str, ...] = ()
    numbers: Sequence[Any] = ()
    for part in typing.get_args(annotation):
        if typing.get_origin(part) is Literal:
            words = typing.get_args(part)
        elif typing.get_origin(part) is typing.Annotated:
            numbers = part.__metadata__[0].metadata
    return words, numbers
