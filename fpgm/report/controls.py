"""Whether pruning was worth it: each pruned cell beside its controls, in words. No torch.

Two questions are put to every pruned network. Would any filters have done: the same run with
criterion=random? And would its architecture have done: the same widths, trained from scratch (Liu
et al., Rethinking the Value of Network Pruning, ICLR 2019)?
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from fpgm.report.cells import Cell, identity
from fpgm.report.table import Rows

NOTE = (
    "difference: ours minus the control's, paired by seed, with the half-width of its 95 % "
    "confidence interval (Student's t). random: the same run, its filters chosen by chance. "
    "from scratch: a network of the same widths, trained from random weights; its epochs are in "
    "brackets, beside those of the pruned run and its baseline together. They cannot be told apart "
    "where that interval holds 0, and one seed tells nothing."
)
HEADER = ["network", "method", "rate", "start", "against", "seeds", "difference", "in words"]
_CONFIDENCE = 0.95
_TASK = ("dataset.", "batch_size", "precision")


@dataclass(frozen=True)
class Comparison:
    """cell against a control, in points of accuracy: mean of the differences over the seeds that
    both have; half: half the width of its confidence interval, None of one seed."""

    cell: Cell
    against: str
    seeds: tuple[int, ...]
    mean: float
    half: float | None

    @property
    def difference(self) -> str:
        mean = round(self.mean, 2) + 0.0  # nothing is +0.00, whichever side it comes from
        return f"{mean:+.2f}" + ("" if self.half is None else f" ± {self.half:.2f}")

    @property
    def words(self) -> str:
        if self.half is None:
            return "cannot tell: one seed"
        if abs(self.mean) <= self.half:
            return "cannot tell"
        return "better" if self.mean > 0 else "worse"


def comparisons(table: Sequence[Cell]) -> list[Comparison]:
    """Of every pruned cell, in the order of the table, with each control that is there."""
    counted = [cell for cell in table if cell.prunes and not cell.problem]
    found = []
    for cell in counted:
        for against, other in _controls(cell, counted, table):
            one = compared(cell, against, other)
            if one is not None:
                found.append(one)
    return found


def compared(cell: Cell, against: str, other: Cell) -> Comparison | None:
    """None where they have no seed in common."""
    ours, theirs = accuracy_by_seed(cell), accuracy_by_seed(other)
    seeds = tuple(sorted(ours.keys() & theirs.keys()))
    if not seeds:
        return None
    mean, half = interval([ours[seed] - theirs[seed] for seed in seeds])
    return Comparison(cell, against, seeds, mean, half)


def interval(values: Sequence[float]) -> tuple[float, float | None]:
    """Mean, and half the width of its 95 % confidence interval, None of one value."""
    mean = statistics.fmean(values)
    if len(values) < 2:
        return mean, None
    from scipy import stats  # half a second: only where there is something to tell

    quantile = float(stats.t.ppf((1 + _CONFIDENCE) / 2, len(values) - 1))
    return mean, quantile * statistics.stdev(values) / math.sqrt(len(values))


def rows(found: Sequence[Comparison]) -> Rows:
    """The header and a row for each."""
    return HEADER, [
        [
            one.cell.network, f"{one.cell.method} {one.cell.also}".strip(), one.cell.rate,
            one.cell.start, one.against, ",".join(map(str, one.seeds)),
            (one.mean, one.difference), one.words,
        ]
        for one in found
    ]  # fmt: skip


def _controls(
    cell: Cell, counted: Iterable[Cell], table: Sequence[Cell]
) -> Iterable[tuple[str, Cell]]:
    if _criterion(cell) == "random":
        if cell.start == "scratch":
            return
    else:
        for other in counted:
            if _criterion(other) == "random" and _but_for_criterion(other) == _but_for_criterion(
                cell
            ):
                yield "random", other
    if cell.start == "scratch":
        return
    in_all = epochs_in_all(cell, table)
    total = "" if in_all is None else f" of {in_all}"
    for other in counted:
        alike = other.network == cell.network and other.start == "scratch"
        if alike and _criterion(other) == "random" and _same_task(cell, other):
            yield f"from scratch ({_epochs(other)}{total} epochs)", other


def accuracy_by_seed(cell: Cell) -> Mapping[int, float]:
    """Of the compact network after the last epoch, in percent."""
    return {run.config["seed"]: float(run.entry("accuracy", "compact_last")) for run in cell.runs}


def _criterion(cell: Cell) -> str:
    return str(cell.runs[0].config["criterion"]["name"])


def _epochs(cell: Cell) -> int:
    return int(cell.runs[0].config["epochs"])


def epochs_in_all(cell: Cell, table: Iterable[Cell]) -> int | None:
    """A cell's and those of the unpruned run that its runs start from, None where that is not in
    the table."""
    if cell.start == "scratch":
        return _epochs(cell)
    given = str(cell.runs[0].config["pretrained"]).rstrip("/").rpartition("/")[2]
    for other in table:
        if any(run.directory.name == given for run in other.runs):
            return _epochs(cell) + _epochs(other)
    return None


def _but_for_criterion(cell: Cell) -> dict[str, str]:
    return {k: v for k, v in identity(cell.runs[0]).items() if not k.startswith("criterion.")}


def _same_task(cell: Cell, other: Cell) -> bool:
    """Whether both were trained on the same images, in the same precision, and came to the same
    widths with every seed that both have."""
    ours, theirs = _widths(cell), _widths(other)
    both = ours.keys() & theirs.keys()
    return of_task(cell) == of_task(other) and all(ours[seed] == theirs[seed] for seed in both)


def of_task(cell: Cell) -> dict[str, str]:
    """What its networks are trained on, and how exactly."""
    return {k: v for k, v in identity(cell.runs[0]).items() if k.startswith(_TASK)}


def _widths(cell: Cell) -> dict[int, list[tuple[str, int]]]:
    """By seed."""
    return {
        run.config["seed"]: [(layer["name"], layer["kept"]) for layer in run.entry("layers")]
        for run in cell.runs
    }
