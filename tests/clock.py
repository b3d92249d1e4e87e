"""A machine whose times are arithmetic, for tests of what is decided by the clock."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import fpgm
from fpgm.shipping import widths
from fpgm.shipping.timetable import Kind


def macs(kind: Kind, inputs: float, outputs: float) -> float:
    """What a layer takes where time is arithmetic: a microsecond for a thousand MACs."""
    pixels = kind.image[0] * kind.image[1] / (kind.stride[0] * kind.stride[1])
    each = kind.kernel[0] * kind.kernel[1] * pixels / 1e3
    return each * (outputs if kind.depthwise else inputs * outputs)


class Clock:
    """A machine on which a network takes the sum of its layers, `overhead` times as long."""

    def __init__(
        self, monkeypatch: Any, overhead: Callable[[float], float] = lambda share: 1.0
    ) -> None:
        self.layers, self.networks = 0, 0

        def layers(table: Any, wanted: Any, target: Any) -> None:
            for kind, (inputs, outputs) in wanted.items():
                for i in inputs:
                    for o in outputs:
                        self.layers += kind.key(i, o) not in table.ms
                        table.ms[kind.key(i, o)] = macs(kind, i, o) / 1e3
                for w in {*inputs, *outputs} if kind.depthwise else ():
                    table.ms[kind.key(w, w)] = macs(kind, w, w) / 1e3

        def networks(model: Any, keep: Any, ballast: Any, target: Any) -> tuple[float, float]:
            self.networks += 1
            dense, small = fpgm.cost(model, target.image), fpgm.compact(model, keep)
            share = fpgm.cost(small, target.image).macs / dense.macs
            return dense.macs / 1e6, dense.macs / 1e6 * share * overhead(share)

        monkeypatch.setattr(widths, "measure", layers)
        monkeypatch.setattr(widths, "_both", networks)
