"""ThiNet's least squares (Luo et al., ICCV 2017): what stays makes up for what goes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn

from fpgm.criteria.evidence import look
from fpgm.criteria.views.contributions import Grams
from fpgm.criteria.views.readers import Reader, readers
from fpgm.errors import Error
from fpgm.graph.flow import tails
from fpgm.graph.trace import ChannelGraph, trace
from fpgm.machine.ranks import from_first
from fpgm.networks.weights import weight_of
from fpgm.pruning.method import Goal, Method, Task
from fpgm.pruning.silence import Silence
from fpgm.selection.zero import pruned

Batches = Annotated[int, Field(ge=1, examples=["10"])]
Positions = Annotated[int, Field(ge=1, examples=["10"])]

ENOUGH = 5  # samples for each channel: with fewer, least squares fits these and no others
SINGULAR = 1e-10  # of the largest eigenvalue: below it nothing is known of a direction


class Reconstruction(Method):
    """Once, right after the first zeroing: each layer's weights for the channels c that it still
    reads are multiplied by w_c, so that over samples m of what the given network computes
    |sum_{c kept} w_c x_mc - sum_c x_mc|^2 is least (see criteria.views.Contributions for x).

    What has gone is silenced: it says nothing any more, not even a constant. Layers that read a
    channel of which only some of the filters that write it have gone (a residual stream, unless
    residual=shared) stay as they are. Every layer is solved for by itself, on what the given
    network's layers before it compute, as if nothing of these had gone.

    batches: of training images; positions: of each image. A layer that reads C channels needs many
    more samples than C; directions of which they say nothing stay as they are.
    """

    name: ClassVar[str] = "reconstruction"

    def __init__(self, task: Task, *, batches: Batches = 10, positions: Positions = 10) -> None:
        super().__init__(task)
        self._batches, self._positions = batches, positions
        self._lost: dict[str, tuple[float, float]] = {}  # layer -> error before and after

    @classmethod
    def problems(cls, goal: Goal, from_scratch: bool) -> list[str]:
        if not from_scratch:
            return []
        line = f"method={cls.name}: keeps what a trained network computes, name it with"
        return [f"{line} pretrained=RUN_DIR (pretrained=True in Python)"]

    def start(self) -> None:
        """Raises Error where the schedule does not hold what it has pruned, and without images."""
        schedule, full = self.task.schedule, self.task.full
        if not schedule.holds:
            raise Error(
                f"method={self.name}: what schedule={getattr(schedule, 'name', '')} prunes is not "
                "gone at the start, or may come back; schedule=hard, or frozen"
            )
        given = self.task.given().to(self.task.device)
        graph = trace(given, self.task.image)
        masks = {name: mask.cpu() for name, mask in pruned(full.network, schedule.keep).items()}
        heard, left = hearing(graph, masks)
        if heard:
            solved = self._solved(given, graph, heard) if self.task.ranks.first else {}
            for name, (factors, before, after) in from_first(solved, self.task.ranks).items():
                rescale(weight_of(full.network, name), heard[name].reader, factors)
                self._lost[name] = (before, after)
            alone = tails(graph)
            gone = silent(heard.values(), left.values(), masks)
            Silence({n: m for n, m in gone.items() if n in alone}, alone, full).scale(0.0)
        self._say(list(heard), list(left))

    def still_during(self, epoch: int) -> bool:
        return True

    def closing(self, small: nn.Module) -> dict[str, Any]:
        if not self._lost:
            return {}
        before, after = (
            sum(part) / len(self._lost) for part in zip(*self._lost.values(), strict=True)
        )
        said = (
            f"{self.name}: of what {len(self._lost)} layers heard {100 * before:.1f} % was lost "
            f"(squares, before training), and {100 * after:.1f} % once they were rescaled"
        )
        return {"layers": len(self._lost), "lost": before, "lost_rescaled": after, "said": said}

    def state(self) -> dict[str, Any]:
        return {"lost": self._lost}

    def resume(self, state: Mapping[str, Any]) -> None:
        self._lost = dict(state["lost"])

    def _solved(
        self, given: nn.Module, graph: ChannelGraph, heard: Mapping[str, Hearing]
    ) -> dict[str, tuple[Tensor, float, float]]:
        """Layer -> the factors of the channels that it reads, and its error without and with."""
        outputs = {name: hearing.outputs for name, hearing in heard.items()}
        read = [hearing.reader for hearing in heard.values()]
        collector = Grams(read, self._positions, outputs)
        if not look(given, graph, collector, self.task.batches(self._batches)):
            raise Error(f"method={self.name}: looks at images, and there are none")
        samples = collector.samples()
        left = {name: int((~heard[name].gone).sum()) for name in samples}
        name = min(samples, key=lambda n: samples[n] / left[n])
        if samples[name] < ENOUGH * left[name]:
            self.task.warn(
                f"method={self.name}: {samples[name]} samples are few for the {left[name]} "
                f"channels that {name} still reads; method.{self.name}.batches="
                f"{2 * self._batches} doubles them"
            )
        return {name: solution(gram, heard[name].gone) for name, gram in collector.values().items()}

    def _say(self, heard: list[str], left: list[str]) -> None:
        what = _listed(heard, f"{len(heard)} layers rescaled, ") if heard else "no layer rescaled"
        others = _listed(left, f"; as they were, {len(left)}: ")
        self.task.say(f"{self.name}: {what}{others}")


@dataclass(frozen=True)
class Hearing:
    """A layer that reads channels which have gone. gone: (C,) bool; outputs: its own filters that
    stay, (n,)."""

    reader: Reader
    gone: Tensor
    outputs: Tensor


def hearing(
    graph: ChannelGraph, masks: Mapping[str, Tensor]
) -> tuple[dict[str, Hearing], dict[str, Reader]]:
    """The layers that read channels which have gone with all filters that write them, and those
    that cannot be rescaled. masks: layer -> (N,) bool, True for filters that have gone."""
    heard: dict[str, Hearing] = {}
    left: dict[str, Reader] = {}
    for reader in readers(graph):
        gone, partly = zip(*_states(reader, masks), strict=True)
        if not any(gone) and not any(partly):
            continue
        # A weight that is computed from a parameter is not scaled with it.
        if any(partly) or all(gone) or reader.name in graph.computed:
            left[reader.name] = reader
            continue
        everything = torch.zeros(len(reader.layer.weight), dtype=torch.bool)
        outputs = (~masks.get(reader.name, everything)).nonzero().flatten()
        heard[reader.name] = Hearing(reader, torch.tensor(gone), outputs)
    return heard, left


def _states(reader: Reader, masks: Mapping[str, Tensor]) -> Iterator[tuple[bool, bool]]:
    """Of each channel whether it has gone, and whether only a part of it has."""
    for writers in reader.writers:
        gone = [name in masks and bool(masks[name][index]) for name, index in writers]
        whole = bool(gone) and all(gone)
        yield whole, any(gone) and not whole


def silent(
    heard: Iterable[Hearing], left: Iterable[Reader], masks: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """The filters that have gone and that no layer in `left` reads. Layer -> (N,) bool."""
    found = {name: torch.zeros_like(mask) for name, mask in masks.items()}
    spared = {filters for reader in left for writers in reader.writers for filters in writers}
    for hearing in heard:
        for channel in hearing.gone.nonzero().flatten().tolist():
            for name, index in hearing.reader.writers[channel] - spared:
                found[name][index] = True
    return found


def solution(gram: Tensor, gone: Tensor) -> tuple[Tensor, float, float]:
    """ThiNet's least squares. gram: X^T X (C, C) float64; gone: (C,) bool. Returns the factors,
    (C,), 0 where a channel has gone, and the share of |X 1|^2 that is lost with factors of 1 for
    those that stay, and with these.

    w = 1 + (X_S^T X_S)^+ X_S^T X_T 1 for S kept and T gone, which is (X_S^T X_S)^-1 X_S^T X 1 where
    that exists, and of all that are as good else the one that changes least.
    """
    kept = ~gone
    missing = gram[kept][:, gone].sum(1)
    inverse = torch.linalg.pinv(gram[kept][:, kept], rtol=SINGULAR, hermitian=True)
    factors = kept.to(gram)
    plain = factors.clone()
    factors[kept] += inverse @ missing
    whole = gram.sum()
    lost = [float(d @ gram @ d / whole) if whole > 0 else 0.0 for d in (1 - plain, 1 - factors)]
    return factors, lost[0], lost[1]


@torch.no_grad()
def rescale(weight: Tensor, reader: Reader, factors: Tensor) -> None:
    """Multiply a layer's weights for each channel that it reads, (C,), in place."""
    groups = getattr(reader.layer, "groups", 1)
    run = weight.shape[1] * groups // len(factors)
    rows = factors.to(weight).repeat_interleave(run).view(groups, 1, -1)
    every = rows.expand(-1, len(weight) // groups, -1).reshape(weight.shape[:2])
    weight.mul_(every.view(*every.shape, *[1] * (weight.dim() - 2)))


def _listed(names: list[str], before: str) -> str:
    more = f" and {len(names) - 8} more" if len(names) > 8 else ""
    return f"{before}{', '.join(names[:8])}{more}" if names else ""
