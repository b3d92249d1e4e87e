"""The line of somebody's code that an operation of a traced network comes from."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import fx

from fpgm.keys import PACKAGE

_FRAME = re.compile(
    r'File "(?P<file>[^"]+)", line (?P<line>\d+), in (?P<function>\S+)(?:\n +(?P<code>.+))?'
)
_TORCH = f"{Path(torch.__file__).parent}/"
_OURS = f"{PACKAGE}/"
_NETWORKS = f"{_OURS}networks/"  # which are somebody's code, too
# Parts that networks are put together from: the line that calls one says more than one inside it.
_PLUMBING = ("/torchvision/ops/", "/timm/layers/")


@dataclass(frozen=True)
class Place:
    """file: its path; code: the line as it stands there, empty where it is not known."""

    file: str
    line: int
    code: str

    def __str__(self) -> str:
        """As short as it is unmistakable: from here, or from where Python finds the package."""
        file = Path(self.file)
        roots = sorted([Path.cwd(), *map(Path, filter(None, sys.path))], key=_depth, reverse=True)
        root = next((root for root in roots if file.is_relative_to(root)), None)
        return f"{file.relative_to(root) if root else file}:{self.line}"


def place(node: fx.Node, *, inside: bool = False) -> Place | None:
    """Where a node was traced, None where nothing but torch called it (a bare nn.Sequential).

    inside: the line itself, even within a building block of torchvision or timm; else the innermost
    line that calls it, or the block that it is in.
    """
    frames = list(_frames(node.stack_trace or ""))
    outside = [f for f in frames if not any(part in f.file for part in _PLUMBING)]
    return next(iter((frames if inside else outside) or frames), None)


def _frames(trace: str) -> Iterator[Place]:
    """The frames of the network's own code, the innermost first."""
    for match in reversed(list(_FRAME.finditer(trace))):
        file = match["file"]
        ours = file.startswith(_OURS) and not file.startswith(_NETWORKS)
        if ours and match["function"] == "trace":
            return  # further out is only who asked for it
        if not ours and not file.startswith(_TORCH):
            yield Place(file, int(match["line"]), (match["code"] or "").strip())


def _depth(path: Path) -> int:
    return len(path.parts)
