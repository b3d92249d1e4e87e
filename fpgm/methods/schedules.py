"""When to prune, how hard, whether pruned filters may move; and the learning rate.

frozen      the published FPGM code: zeroed before the first epoch, selected and zeroed again after
            every epoch, and the gradients of pruned filters masked (default)
soft        SFP, FPGM's Algorithm 1 as printed: the same, but pruned filters go on learning
asymptotic  ASFP: soft, at a rate that grows to the one asked for
hard        PFEC: selected once on a trained network, then fine-tuned with pruned filters at zero
"""

from __future__ import annotations

import math

from fpgm.config import Optimizer, Schedule


def rate_before(schedule: Schedule, rate: float) -> float | None:
    """The rate at which to prune before the first epoch, None if not at all."""
    if schedule.name == "hard" or settled(schedule, 0, 1):
        return rate
    return rate if schedule.zero_at_start and schedule.name != "asymptotic" else None


def rate_after(schedule: Schedule, epoch: int, epochs: int, rate: float) -> float | None:
    """The rate at which to select again after `epoch` (from 0), None if the selection stays."""
    if schedule.name == "hard" or settled(schedule, epoch, epochs):
        return None
    last = epoch == epochs - 1 or settled(schedule, epoch + 1, epochs)  # it stays as it is then
    if (epoch + 1) % schedule.interval and not last:
        return None
    if schedule.name == "asymptotic" and not last:
        return asymptotic(epoch, epochs - 1, rate)
    return rate


def settled(schedule: Schedule, epoch: int, epochs: int) -> bool:
    """Whether by `epoch` the selection is fixed for good (`schedule.settle`, a share of epochs)."""
    return schedule.settle < 1 and epoch >= math.ceil(schedule.settle * epochs)


def masked(schedule: Schedule, epoch: int, epochs: int) -> bool:
    """Whether pruned filters get no gradient during `epoch`."""
    return schedule.name in ("frozen", "hard") or settled(schedule, epoch, epochs)


def asymptotic(t: float, last: float, rate: float) -> float:
    """ASFP's curve P(t) = b (1 - e^(-kt)) through (0, 0), (last / 8, 3/4 rate) and (last, rate).

    With x = e^(-k last / 8) the three points say (1 - x) / (1 - x^8) = 3/4: k last = 11.08999.
    """
    if last <= 0:
        return rate
    x = 0.25
    for _ in range(50):
        x = 0.25 + 0.75 * x**8
    decay = -8 * math.log(x)
    return rate * (1 - math.exp(-decay * t / last)) / (1 - math.exp(-decay))


def learning_rate(optimizer: Optimizer, epoch: int, epochs: int) -> float:
    """Steps at the milestones (shares of the epochs); a tenth during the warm-up."""
    passed = sum(epoch + 1e-9 >= share * epochs for share in optimizer.milestones)
    warming = epoch < optimizer.warmup_epochs
    return optimizer.lr * optimizer.gamma**passed * (0.1 if warming else 1.0)
