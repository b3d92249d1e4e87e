"""What goes wrong, worded for the person at the keyboard: what was given and what would do.

Every error that fpgm raises on purpose is an Error, one line (a configuration's, a line for each
mistake); the other kinds are those that somebody catches.
"""

from __future__ import annotations

import importlib
import traceback
from pathlib import Path
from typing import Any


class Error(Exception):
    """Something that cannot be done as it was asked for, and what would do."""


class GraphError(Error):
    """A network that cannot be traced or compacted."""


class DataError(Error):
    """Images that are not there or cannot be read."""


class CheckpointError(Error):
    """A checkpoint that is missing, damaged, unsafe or of another network."""


class BudgetError(Error):
    """A budget that no rate meets."""


class ShippingError(Error):
    """A network that cannot be exported, timed or tuned here."""


def first_line(error: Exception) -> str:
    """The first line of an error's text, its kind where it has none."""
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__


def told(error: Exception) -> str:
    """An error out of somebody's own code, in a line: its kind, what it says, and the last line of
    theirs that led to it."""
    if isinstance(error, SyntaxError) and error.filename:
        return f"SyntaxError: {error.msg}, at {error.filename}:{error.lineno}"
    frames = traceback.extract_tb(error.__traceback__)
    theirs = [f for f in frames if not _NOT_THEIRS.intersection(Path(f.filename).parts)]
    last = [*frames, *theirs][-1]
    what = first_line(error).rstrip(".")
    return f"{type(error).__name__}: {what}, at {last.filename}:{last.lineno}"


_NOT_THEIRS = {"torch", "fpgm", "importlib", "<frozen importlib._bootstrap>"}


def imported(key: str, name: str) -> Any:
    """What a name of one's own means, package.module:attribute. Raises Error that names the key,
    and the line of a module that fails."""
    module, _, attribute = name.partition(":")
    try:
        return getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise Error(
            f"{key}={name}: cannot be imported ({error}); PYTHONPATH=. finds the modules of this "
            "directory"
        ) from error
    except Exception as error:  # whatever stands at the top of somebody's module
        raise Error(f"{key}={name}: cannot be imported ({told(error)})") from error
