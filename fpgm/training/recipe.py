"""The learning rate, as a pure function of how far a run has come.

torch's schedulers give the same curves (the tests hold these against them), but each is bound to
one optimizer and carries a state: here two may be stepped in turn, and any epoch is resumed from.
"""

from __future__ import annotations

import math

from fpgm.config import Optimizer

_RISE = 0.25  # of all steps, in one cycle
_FIRST, _LAST = 25, 1e4  # it begins at lr / 25 and ends at a ten thousandth of that
_WARMING = 0.1  # of lr, where a warm-up begins


def learning_rate(
    optimizer: Optimizer, epoch: int, epochs: int, step: int = 0, steps: int = 1
) -> float:
    """That of a step: `step` of the `steps` of an epoch, both counted from 0.

    schedule=step: times gamma from the first epoch on that lies behind a milestone (shares of the
    epochs), a tenth during the warm-up, as the papers have it. cosine: from lr to 0 along half a
    cosine (Loshchilov & Hutter, ICLR 2017, eq. 5, one period), during the warm-up a straight line
    from lr / 10. onecycle: half a cosine up to lr in the first quarter of the steps, another down
    (Smith & Topin, 2018, with torch's constants).
    """
    now, last = epoch * steps + step, epochs * steps
    if optimizer.schedule == "step":
        passed = sum(epoch + 1e-9 >= share * epochs for share in optimizer.milestones)
        warming = epoch < optimizer.warmup_epochs
        return optimizer.lr * optimizer.gamma**passed * (_WARMING if warming else 1.0)
    if optimizer.schedule == "onecycle":
        first, top, end = optimizer.lr / _FIRST, _RISE * last - 1, last - 1
        if now <= top:
            return _between(first, optimizer.lr, now / top if top > 0 else 1.0)
        return _between(optimizer.lr, first / _LAST, (now - top) / (end - top))
    warm = min(optimizer.warmup_epochs, epochs) * steps
    if now < warm:
        return optimizer.lr * (_WARMING + (1 - _WARMING) * now / warm)
    return _between(optimizer.lr, 0.0, (now - warm) / (last - warm))


def _between(start: float, end: float, share: float) -> float:
    """Along half a cosine."""
    return end + (start - end) * (1 + math.cos(math.pi * share)) / 2
