"""How long a convolution takes, by the channels that it reads and writes, in one runtime.

Every kind of layer of a network is timed by itself at some widths, BatchNorm folded and ReLU
behind, and interpolated in between. What lone layers do not show (adds, reorders between them) is a
matter for the scale by which shipping.widths corrects them. The times are kept in a file: what was
measured once is not measured again, so that a run that starts anew chooses the same.
"""

from __future__ import annotations

import contextlib
import json
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import fx, nn
from tqdm import tqdm

from fpgm.errors import ShippingError
from fpgm.graph import operations as ops
from fpgm.graph.trace import ChannelGraph
from fpgm.machine.device import environment
from fpgm.runs.files import write_text
from fpgm.shipping.latency import side_by_side
from fpgm.shipping.lone import LAYERS
from fpgm.shipping.runtimes import Target, package

LEVELS = 6  # widths at which a layer is timed, on each side
SECONDS = 1.5  # for all widths of one kind of layer


@dataclass(frozen=True)
class Kind:
    """What a convolution's time depends on beside its widths. image: pixels that it reads."""

    kernel: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]
    depthwise: bool
    image: tuple[int, int]

    def layer(self, inputs: int, outputs: int) -> nn.Conv2d:
        """Such a layer with so many channels."""
        return nn.Conv2d(
            inputs, outputs, self.kernel, self.stride, self.padding, self.dilation,
            groups=inputs if self.depthwise else 1,
        )  # fmt: skip

    def key(self, inputs: int, outputs: int) -> str:
        """The name of its time in the table."""
        what = "depthwise" if self.depthwise else "conv"
        sides = [f"{a}x{b}" for a, b in (self.kernel, self.stride, self.padding, self.dilation)]
        pixels = f"{self.image[0]}x{self.image[1]}"
        return f"{what} {' '.join(sides)} at {pixels}: {inputs} -> {outputs}"


@dataclass
class TimeTable:
    """Measured times. machine: where and with what they were; ms: name -> milliseconds."""

    machine: dict[str, Any]
    ms: dict[str, float] = field(default_factory=dict)

    def save(self, path: Path) -> None:
        """Write it whole. Raises OSError."""
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, json.dumps(asdict(self), indent=1) + "\n")


def fingerprint(target: Target) -> dict[str, Any]:
    """What must be the same for times to be comparable."""
    here = environment(torch.device("cpu"), None)
    return {
        "processor": here["processor"],
        "cores": here["cores"],
        "threads": target.threads,
        "runtime": target.runtime,
        "version": version(package(target.runtime)),
        "batch": target.batch,
    }


def read(path: Path, target: Target) -> tuple[TimeTable, str | None]:
    """The table of a file, an empty one where it is not there or of another machine; and what is
    wrong with it, if anything."""
    machine = fingerprint(target)
    with contextlib.suppress(FileNotFoundError):
        try:
            content = json.loads(path.read_text())
            there, ms = dict(content["machine"]), dict(content["ms"])
        except (ValueError, KeyError, TypeError):
            return TimeTable(machine), f"{path}: no table of times; it is measured again"
        differing = [
            f"{k} {there.get(k)}, here {v}" for k, v in machine.items() if there.get(k) != v
        ]
        if differing:
            return TimeTable(machine), (
                f"{path}: was measured elsewhere ({'; '.join(differing)}); it is measured again"
            )
        return TimeTable(machine, ms), None
    return TimeTable(machine), None


def kinds(graph: ChannelGraph, image: tuple[int, int, int]) -> dict[str, Kind]:
    """Convolution -> its kind, on images of (C, H, W)."""
    found: dict[str, Kind] = {}
    shapes = _Shapes(graph.module)
    device = next(graph.module.parameters()).device
    with torch.no_grad():
        shapes.run(torch.zeros(1, *image, device=device))
    for node, name in graph.convolutions():
        conv = graph.called(node)
        assert isinstance(conv, nn.Conv2d)
        height, width = shapes.seen[node.all_input_nodes[0]]
        padding = conv.padding if isinstance(conv.padding, tuple) else _padding(conv)
        found[name] = Kind(
            _pair(conv.kernel_size), _pair(conv.stride), _pair(padding), _pair(conv.dilation),
            graph.kinds[node] == ops.DEPTHWISE, (height, width),
        )  # fmt: skip
    return found


class _Shapes(fx.Interpreter):
    """Sees the pixels of every map."""

    def __init__(self, module: fx.GraphModule) -> None:
        super().__init__(module)
        self.seen: dict[fx.Node, tuple[int, int]] = {}

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        if isinstance(result, torch.Tensor) and result.dim() == 4:
            self.seen[n] = (result.shape[2], result.shape[3])
        return result


def _pair(values: Sequence[int]) -> tuple[int, int]:
    return values[0], values[1]


def _padding(conv: nn.Conv2d) -> tuple[int, int]:
    """Of padding="same" or "valid", as numbers."""
    if conv.padding == "valid":
        return 0, 0
    high, wide = (d * (k - 1) // 2 for d, k in zip(conv.dilation, conv.kernel_size, strict=True))
    return high, wide


def levels(filters: int, align: int) -> list[int]:
    """Widths at which a layer of so many channels is timed: LEVELS of them, and the least."""
    step = align * -(-filters // (align * LEVELS))
    return sorted({min(align, filters), *range(step, filters, step), filters})


def measure(
    table: TimeTable,
    wanted: Mapping[Kind, tuple[Iterable[int], Iterable[int]]],
    target: Target,
) -> None:
    """Time what the table lacks. wanted: kind -> the widths that it reads and writes.

    Raises ShippingError where the runtime cannot run a layer.
    """
    make = LAYERS[target.runtime]
    bar = tqdm(wanted.items(), f"layers in {target.runtime}", leave=False, disable=None)
    for kind, (inputs, outputs) in bar:
        if kind.depthwise:
            pairs = [(width, width) for width in sorted({*inputs, *outputs})]
        else:
            pairs = [(i, o) for i in sorted(set(inputs)) for o in sorted(set(outputs))]
        pairs = [(i, o) for i, o in pairs if kind.key(i, o) not in table.ms]
        if not pairs:
            continue
        try:
            runners = [
                make(kind.layer(i, o), kind.image, target.batch, target.threads) for i, o in pairs
            ]
            seconds = side_by_side(runners, torch.empty(0), SECONDS)
        except Exception as error:  # every runtime has its own kinds
            raise ShippingError(
                f"target_batch={target.batch}: {target.runtime} cannot run {kind.key(*pairs[0])} "
                f"({str(error).splitlines()[0]})"
            ) from error
        for pair, times in zip(pairs, seconds, strict=True):
            table.ms[kind.key(*pair)] = 1e3 * statistics.median(times)


class Surface:
    """The time of one kind of layer over (channels read, channels written), in microseconds.

    A narrower layer never takes longer: where the clock says so, the wider one could be run in its
    place with filters of zeros.
    """

    def __init__(
        self, kind: Kind, inputs: Sequence[int], outputs: Sequence[int], table: TimeTable
    ) -> None:
        self._depthwise = kind.depthwise
        self._inputs, self._outputs = np.array(sorted(set(inputs))), np.array(sorted(set(outputs)))
        if kind.depthwise:
            widths = sorted({*inputs, *outputs})
            self._inputs = self._outputs = np.array(widths)
            us = np.array([[1e3 * table.ms[kind.key(w, w)] for w in widths]])
        else:
            us = np.array(
                [[1e3 * table.ms[kind.key(i, o)] for o in self._outputs] for i in self._inputs]
            )
        self._us = envelope(us)

    def __call__(self, inputs: float, outputs: float) -> float:
        columns = [np.interp(outputs, self._outputs, row) for row in self._us]
        return float(columns[0] if self._depthwise else np.interp(inputs, self._inputs, columns))


def envelope(times: np.ndarray) -> np.ndarray:
    """The least time of any layer that is as wide or wider on both sides. (I, O) -> (I, O)."""
    flipped = times[::-1, ::-1]
    least = np.minimum.accumulate(np.minimum.accumulate(flipped, 0), 1)
    return np.asarray(least[::-1, ::-1])
