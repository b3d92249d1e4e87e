"""What may crash, in a process of its own. No torch."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context
from typing import ParamSpec, TypeVar

from fpgm.errors import ShippingError

P = ParamSpec("P")
T = TypeVar("T")


def contained(crashed: str, function: Callable[P, T], *given: P.args, **named: P.kwargs) -> T:
    """What a function returns, called in a new process. Raises what it raises, and ShippingError
    with the line `crashed` where the process dies."""
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        try:
            return pool.submit(function, *given, **named).result()
        except BrokenProcessPool as error:
            raise ShippingError(crashed) from error
