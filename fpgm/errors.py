"""What goes wrong, worded for the person at the keyboard: what was given and what would do.

Every error that fpgm raises on purpose is an Error, one line (a configuration's, a line for each
mistake); the other kinds are those that somebody catches.
"""

from __future__ import annotations


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
