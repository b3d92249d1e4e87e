"""Networks that are not fpgm's: timm's by name, and those that a function of one's own builds."""

from __future__ import annotations

import difflib
import functools
import inspect
import sys
import sysconfig
import typing
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from fpgm.errors import CheckpointError, Error, first_line, imported, told
from fpgm.keys import network, network_options, suggestion

TIMM = "timm:"
_CHOICES = "arch=timm arch.name=NAME or arch=own arch.build=package.module:function"
_KEYS = {"timm": "name", "own": "build", "compact": "run"}  # what names the network
# Arguments of a network that `arch.` does not set, and what does.
_ELSEWHERE = {
    **dict.fromkeys(("num_classes", "in_channels", "in_chans"), "the images say that"),
    **dict.fromkeys(("pretrained", "checkpoint_path"), "weights come by pretrained=timm or =FILE"),
}


def problems(arch: str | Mapping[str, Any], pretrained: str | None) -> Iterator[str]:
    """A line for each mistake in a configuration's `arch`, as {source: timm, name: ...}."""
    source = None if isinstance(arch, str) else arch.get("source")
    if pretrained == "timm" and source != "timm":
        yield "pretrained=timm: only with arch=timm arch.name=NAME"
    if isinstance(arch, str):
        return
    key = _KEYS.get(str(source))
    if key is None:
        wrong, value = next(iter(arch.items()), ("KEY", "VALUE"))
        yield f"arch.{wrong}={value}: only with {_CHOICES}"
        return
    if not isinstance(arch.get(key), str):
        given = "null" if arch.get(key) is None else arch[key]
        choices = "pretrained=RUN_DIR or arch.run=RUN_DIR" if key == "run" else _CHOICES
        yield f"arch.{key}={given}: which network? {choices}"
        return
    options = {k: v for k, v in arch.items() if k not in ("source", key)}
    for option in options.keys() & _ELSEWHERE.keys():
        yield f"arch.{option}={options[option]}: not an option here, {_ELSEWHERE[option]}"
    for option in options.keys() & {"name", "build"}:
        yield f"arch.{option}={options[option]}: not with arch={source}; {_CHOICES}"
    try:
        if source == "timm":
            _known(network(arch).removeprefix(TIMM))
        else:
            _arguments(network(arch), _builder(network(arch)), network_options(arch))
    except Error as error:
        yield str(error)


def build(name: str, num_classes: int, in_channels: int, options: Mapping[str, Any]) -> nn.Module:
    """timm:NAME, or what package.module:function returns. Raises Error."""
    if name.startswith(TIMM):
        return _timm(name.removeprefix(TIMM), num_classes, in_channels, options, pretrained=False)
    builder = _builder(name)
    arguments = {"num_classes": num_classes, "in_channels": in_channels}
    given = _arguments(name, builder, options, arguments)
    try:
        built = builder(**given)
    except Error:
        raise
    except Exception as error:  # it is somebody else's code
        raise Error(f"arch.build={name}: building raised {told(error)}") from error
    if not isinstance(built, nn.Module):
        raise Error(f"arch.build={name}: returned {_article(built)}, not a torch.nn.Module")
    return built


def timm_weights(
    name: str, num_classes: int, in_channels: int, options: Mapping[str, Any]
) -> dict[str, Tensor]:
    """timm's weights of a network, downloaded once; another number of classes than theirs begins
    with a last layer at random, another number of channels with their first summed or repeated.

    Raises Error for a network that it has none for, CheckpointError where the download fails.
    """
    bare = name.removeprefix(TIMM)
    try:
        loaded = _timm(bare, num_classes, in_channels, options, pretrained=True)
    except (OSError, RuntimeError, ValueError) as error:
        raise CheckpointError(
            f"pretrained=timm: no weights for arch.name={bare} ({first_line(error)}); they are "
            "downloaded, with a network connection; pretrained=FILE reads a state_dict"
        ) from error
    weights: dict[str, Tensor] = loaded.state_dict()
    return weights


def constants(
    built: nn.Module, name: str, pretrained: str | None
) -> tuple[list[float], list[float]] | None:
    """Mean and deviation of each channel, of pixels in 0..1, that a network of timm's or one's own
    wants of its images: of timm's weights, or the attributes `mean` and `std`. None without any."""
    if name.startswith(TIMM):
        about = getattr(built, "pretrained_cfg", None) or {}
        pair = (about.get("mean"), about.get("std")) if pretrained == "timm" else (None, None)
    else:
        pair = (getattr(built, "mean", None), getattr(built, "std", None))
    mean, std = (p.flatten().tolist() if isinstance(p, Tensor) else p for p in pair)
    if not isinstance(mean, list | tuple) or not isinstance(std, list | tuple):
        return None
    return [float(m) for m in mean], [float(s) for s in std]


def _timm(
    name: str, num_classes: int, in_channels: int, options: Mapping[str, Any], pretrained: bool
) -> nn.Module:
    timm = _known(name)
    classes = {"num_classes": num_classes, "in_chans": in_channels}
    try:
        built: nn.Module = timm.create_model(name, pretrained=pretrained, **classes, **options)
    except TypeError as error:
        given = " ".join(f"arch.{key}={value}" for key, value in options.items())
        raise Error(f"{given or f'arch.name={name}'}: timm says {first_line(error)}") from error
    return built


def _known(name: str) -> Any:
    """timm, which has a network of that name. Raises Error."""
    try:
        import timm
    except ImportError as error:
        raise Error(
            f"arch=timm: needs timm ({error}), which pip install 'fpgm[timm]' brings"
        ) from error
    bare, _, tag = name.partition(".")
    if not timm.is_model(bare):
        near = difflib.get_close_matches(bare, timm.list_models(), n=3, cutoff=0.5)
        advice = f"did you mean {', '.join(near)}?" if near else "timm.list_models() has the names"
        raise Error(f"arch.name={name}: timm {timm.__version__} has no such network; {advice}")
    tags = timm.list_pretrained(f"{bare}.*") if tag else []
    if tag and name not in tags:
        there = f"choose one of {', '.join(tags)}" if tags else f"it is arch.name={bare}"
        raise Error(f"arch.name={name}: timm {timm.__version__} has no such weights; {there}")
    return timm


def _builder(name: str) -> Callable[..., Any]:
    module, _, attribute = name.partition(":")
    if not module or not attribute:
        raise Error(f"arch.build={name}: write package.module:function")
    # A checkpoint may name it: what runs is the user's own code, or what says that it is a network.
    if module.partition(".")[0] in sys.stdlib_module_names:
        raise Error(f"arch.build={name}: is a part of Python, not a network")
    builder = imported("arch.build", name)
    if not callable(builder):
        raise Error(f"arch.build={name}: is {_article(builder)}, not a function or class")
    if isinstance(builder, type) and not issubclass(builder, nn.Module):
        raise Error(f"arch.build={name}: is a class, and not a torch.nn.Module")
    if not isinstance(builder, type) and not _says_so(builder) and _installed(builder):
        raise Error(
            f"arch.build={name}: does not say that it returns a torch.nn.Module, as installed code "
            "must; call it in a function of your own, or fpgm.load(FILE, MODEL)"
        )
    return builder  # type: ignore[no-any-return]


def _says_so(builder: Callable[..., Any]) -> bool:
    """Whether a function is annotated to return a network."""
    try:
        returned = typing.get_type_hints(builder).get("return")
    except Exception:  # annotations that name what is not there
        return False
    return isinstance(returned, type) and issubclass(returned, nn.Module)


def _installed(builder: Callable[..., Any]) -> bool:
    """Whether a function's code is not the user's: a package's, Python's, or not to be seen."""
    while isinstance(builder, functools.partial):
        builder = builder.func
    code = getattr(inspect.unwrap(builder), "__code__", None)
    if code is None:
        return True
    place = Path(code.co_filename).resolve()
    python = Path(sysconfig.get_path("stdlib")).resolve()
    return python in place.parents or bool({"site-packages", "dist-packages"} & {*place.parts})


def _arguments(
    name: str,
    builder: Callable[..., Any],
    options: Mapping[str, Any],
    about: Mapping[str, int] | None = None,
) -> dict[str, Any]:
    """What a function is called with: the options, and of `about` the classes and channels what it
    takes. Raises Error for an option that it does not take, and for one that it lacks."""
    about = about or {"num_classes": 0, "in_channels": 0}
    parameters = inspect.signature(builder).parameters
    named = {
        k for k, p in parameters.items() if p.kind in (p.KEYWORD_ONLY, p.POSITIONAL_OR_KEYWORD)
    }
    anything = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    # **kwargs are mostly handed on to something that has classes, and not always channels.
    taken = {k: v for k, v in about.items() if k in named or (anything and k == "num_classes")}
    lacking = [k for k in named - {*options, *about} if parameters[k].default is inspect._empty]
    for option in options:
        if option not in named and not anything:
            raise Error(
                f"arch.{option}={options[option]}: {name} takes no such argument, "
                f"{suggestion(option, named - set(about))}"
            )
    if lacking:
        raise Error(f"arch.{sorted(lacking)[0]}: missing, {name} wants it")
    return {**options, **taken}


def _article(value: object) -> str:
    kind = type(value).__name__
    return f"{'an' if kind[0].lower() in 'aeiou' else 'a'} {kind}" if value is not None else "None"
