"""The run's configuration: one typed, checked value. Defaults live in configs/, checks here."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from fpgm.errors import Error
from fpgm.typed import build, choice, number

PACKAGE = Path(__file__).resolve().parent
# Inside a wheel the configs are part of the package, in a checkout they are beside it.
CONFIGS = next(c for c in (PACKAGE / "configs", PACKAGE.parent / "configs") if c.is_dir())

DATA_DRIVEN = ("taylor", "apoz", "hrank")  # criteria that look at training images


@dataclass(frozen=True, kw_only=True)
class Dataset:
    """name: what to read; root: where it lies or goes; image_size: pixels (image_folder, imagenet);
    pad, flip: the training augmentation, zeros added on each side before the crop, mirroring;
    imagenet only: workers, processes that decode, null for one a core, and on_error, what to do
    with an image that cannot be read."""

    name: str = choice("digits", "cifar10", "cifar100", "image_folder", "imagenet")
    root: str | None
    image_size: int | None = number(1, 1024, example="32")
    pad: int = number(0, 64, example="4")
    flip: bool
    workers: int | None = number(0, 1024, example="8")
    on_error: str = choice("stop", "skip")


@dataclass(frozen=True, kw_only=True)
class Criterion:
    """name: an entry of criteria.CRITERIA; distance, norm_share: options of its function; batches:
    of training images, without augmentation, that a criterion which looks at data is shown at each
    selection; slimming: strength of the L1 penalty on all BatchNorm scales while training
    (bn_gamma)."""

    name: str
    distance: str | None = choice("l2", "l1", "cosine")
    norm_share: float | None = number(0, 1, example="0.25")
    batches: int | None = number(1, example="10")
    slimming: float | None = number(0, example="1e-4")

    def options(self) -> dict[str, Any]:
        """What the criterion's function takes beside the weight."""
        own = {"distance": self.distance, "norm_share": self.norm_share}
        return {key: value for key, value in own.items() if value is not None}


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """See methods.schedules. interval: epochs between two selections; settle: share of the epochs
    after which the selection stays and is masked, 1 = never; train_compact: whether frozen runs
    train the compact network where that takes the same steps; recalibrate: batches of training
    images on which BatchNorm is estimated again after the last zeroing."""

    name: str = choice("frozen", "soft", "asymptotic", "hard")
    interval: int = number(1, example="1")
    zero_at_start: bool
    reset_momentum: bool
    settle: float = number(0, 1, example="0.6")
    recalibrate: int = number(0, example="100")
    train_compact: bool


@dataclass(frozen=True, kw_only=True)
class Optimizer:
    """SGD. milestones: shares of the epochs after which lr is multiplied by gamma; the first
    warmup_epochs run at a tenth of lr."""

    lr: float = number(1e-12, example="0.1")
    momentum: float = number(0, 1, below=True, example="0.9")
    nesterov: bool
    weight_decay: float = number(0, example="5e-4")
    milestones: tuple[float, ...]
    gamma: float = number(0, 1, example="0.2")
    warmup_epochs: int = number(0, example="1")


@dataclass(frozen=True, kw_only=True)
class Config:
    """One run. rate: share of each layer's filters to prune; macs_target: share of the dense
    network's MACs, in place of rate; residual: see graph.groups; align: kept counts are multiples
    of it; scope: the same rate in each layer, or one ranking over the network, by scores normalised
    as scope_norm says (selection.ranking) and with the share `floor` of each layer left alone;
    pretrained: a run directory or a checkpoint to start from; tune: whether the compact
    network gets the form that is fastest on `target` with batches of target_batch images; compile:
    train with torch.compile."""

    dataset: Dataset
    arch: str
    criterion: Criterion
    schedule: Schedule
    optimizer: Optimizer
    rate: float = number(0, 1, below=True, example="0.4")
    macs_target: float | None = number(0.001, 1, example="0.5")
    residual: str = choice("independent", "shared", "inner")
    align: int = number(1, 1024, example="8")
    scope: str = choice("layer", "global")
    scope_norm: str = choice("none", "mean", "l2", "rank")
    floor: float = number(0, 1, below=True, example="0.1")
    epochs: int = number(1, example="200")
    batch_size: int = number(1, example="128")
    seed: int = number(0, 2**31 - 1, example="0")
    device: str = choice("auto", "cpu", "cuda")
    precision: str = choice("auto", "float32", "bf16")
    compile: bool
    pretrained: str | None
    tune: bool
    target: str = choice("torch", "onnxruntime", "openvino")
    target_batch: int = number(1, example="1")

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> Config:
        """Build and check. Raises Error with a line for each problem there is."""
        errors: list[str] = []
        config = build(cls, values, "", errors)
        if config is None:
            raise Error("\n".join(errors))
        errors = list(_contradictions(config))
        if errors:
            raise Error("\n".join(errors))
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
    for key, value, owner in (
        ("distance", c.distance, "gm"),
        ("norm_share", c.norm_share, "mix"),
        ("slimming", c.slimming, "bn_gamma"),
    ):
        if value is not None and c.name != owner:
            yield f"criterion.{key}={value}: only criterion={owner} takes it"
    if c.batches is None and c.name in DATA_DRIVEN:
        yield f"criterion.batches=null: criterion={c.name} looks at images, criterion.batches=10"
    if c.batches is not None and c.name not in DATA_DRIVEN:
        yield f"criterion.batches={c.batches}: only {', '.join(DATA_DRIVEN)} look at images"
    if config.scope == "global":
        yield from _global_contradictions(config)
    if config.schedule.name == "hard" and config.rate > 0 and config.pretrained is None:
        yield "schedule=hard: prunes a trained network, name it with pretrained=RUN_DIR"
    if config.dataset.name in ("image_folder", "imagenet") and config.dataset.root is None:
        yield "dataset.root=null: where the images lie, dataset.root=DIR with train/CLASS/*"
    if not all(0 < m <= 1 for m in config.optimizer.milestones):
        yield (
            f"optimizer.milestones={list(config.optimizer.milestones)}: shares of the epochs, "
            "each above 0 and at most 1, for example [0.3,0.6,0.8]"
        )


def _global_contradictions(config: Config) -> Iterable[str]:
    if config.criterion.name == "mix":
        yield (
            "scope=global: criterion=mix is an order of pruning within a layer and has no scores "
            "to compare layers by; criterion=gm, or scope=layer"
        )
    if config.macs_target is None and config.rate > 1 - config.floor + 1e-9:
        yield (
            f"rate={config.rate}: scope=global floor={config.floor} leaves at most "
            f"rate={1 - config.floor:.4g}; a smaller floor lets more go"
        )


# Keys that runs of earlier versions do not have, with what those did.
_ADDED: dict[str, Any] = {"scope": "layer", "scope_norm": "mean", "floor": 0.1}
_ADDED_TO_CRITERION: dict[str, Any] = {"batches": None, "slimming": None}


def completed(values: Mapping[str, Any]) -> dict[str, Any]:
    """The configuration of a run of this version or an earlier one, with all keys of this one."""
    criterion = {**_ADDED_TO_CRITERION, **values.get("criterion", {})}
    return {**_ADDED, **values, "criterion": criterion}


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
