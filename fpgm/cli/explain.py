"""Errors as a person at the keyboard needs them: what was given, what would do. In one line."""

from __future__ import annotations

import errno
import re

import hydra
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import (
    ConfigCompositionException,
    HydraException,
    MissingConfigException,
    OverrideParseException,
)
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from fpgm.errors import Error
from fpgm.keys import CONFIGS, flatten, suggestion


def explain(error: Exception) -> str:
    """An error as a person at the keyboard needs it: what was given, what would do."""
    cause = error.__cause__
    if isinstance(error, MissingConfigException) and error.options:
        group, _, given = str(error.missing_cfg_file).rpartition("/")
        return f"{group}={given}: choose one of {', '.join(error.options)}"
    if isinstance(error, ConfigCompositionException):
        key = getattr(cause, "full_key", None) or _quoted(str(error))
        if not key:
            return str(error)
        keys, (group, _, option) = _keys(), key.partition(".")
        if group == "arch":
            return f"{key}: only with arch=timm arch.name=NAME or arch=own arch.build=MODULE:NAME"
        if key in keys and option:  # of another choice than the one made
            return f"{key}: the chosen {group} has no such key, see fpgm-train {group}=NAME --help"
        return f"{key}: no such key, {suggestion(key, keys)}"
    if isinstance(error, OverrideParseException):
        return f"{error.override}: not understood, write key=value, for example rate=0.4"
    if isinstance(error, OSError) and error.filename is not None:
        return f"{error.filename}: {error.strerror}{_ADVICE.get(error.errno or 0, '')}"
    if isinstance(error, Error):
        return str(error)
    if isinstance(error, HydraException | OmegaConfBaseException):
        return str(error).splitlines()[0]
    first = (str(error).splitlines() or [""])[0]
    return f"{type(error).__name__}: {first} (HYDRA_FULL_ERROR=1 shows where)"


_ELSEWHERE = "; choose another place with hydra.run.dir= (of a sweep: hydra.sweep.dir=)"
_ADVICE = {
    errno.ENOSPC: "; free some space and start the same command again, it goes on where it was",
    errno.EACCES: _ELSEWHERE,
    errno.EROFS: _ELSEWHERE,
    errno.ENOTDIR: _ELSEWHERE,
    errno.EEXIST: _ELSEWHERE,
}


def _quoted(text: str) -> str:
    """The key in Hydra's "Could not override 'rat'."."""
    match = re.search(r"'([^']+)'", text)
    return match.group(1) if match else ""


def _keys() -> list[str]:
    """Every key and group that a command line may set."""
    GlobalHydra.instance().clear()
    with hydra.initialize_config_dir(str(CONFIGS), version_base="1.3"):
        defaults = OmegaConf.to_container(hydra.compose("config"))
    assert isinstance(defaults, dict)
    flat = flatten({str(key): value for key, value in defaults.items()})
    return sorted({*flat, *(p.name for p in CONFIGS.iterdir() if p.is_dir())})
