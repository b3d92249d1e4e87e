"""Distillation (Hinton et al., 2015): a trained network's outputs are learnt beside the labels."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from fpgm.compaction.compact import load
from fpgm.errors import CheckpointError, Error
from fpgm.pruning.method import Method, Task
from fpgm.runs.checkpoint import preprocessing
from fpgm.shipping.folding import fold

Temperature = Annotated[float, Field(gt=0, examples=["4"])]
Share = Annotated[float, Field(ge=0, le=1, examples=["0.9"])]


class Distillation(Method):
    """The loss becomes (1 - share) L + share T^2 KL(softmax(t / T) || softmax(s / T)), of the
    task's own loss L and the outputs of teacher, t, and student, s.

    teacher: a run directory or a compact.pt of its own; by default the network that the run itself
    starts from, as it was before anything was pruned. It sees the same augmented batch, in eval
    mode.
    """

    name: ClassVar[str] = "distillation"

    def __init__(
        self,
        task: Task,
        *,
        teacher: str | None = None,
        temperature: Temperature = 4.0,
        share: Share = 0.9,
    ) -> None:
        """Raises Error without a teacher and for one that was trained on something else,
        CheckpointError where it cannot be read."""
        super().__init__(task)
        self._temperature, self._share = temperature, share
        network = given(task) if teacher is None else trained_alike(teacher, task.preprocessing)
        network = network.to(task.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        self._teacher = task.accelerated(network.requires_grad_(False).eval())

    def loss(self, inputs: Tensor, outputs: Tensor, labels: Tensor) -> Tensor:
        with torch.no_grad():
            told = self._teacher(inputs)
        soft = divergence(outputs, told, self._temperature)
        # The loop adds this to a whole task's loss.
        return self._share * (soft - self.task.loss(outputs, labels))

    def still_during(self, epoch: int) -> bool:
        return True  # it asks for outputs, and does nothing to the filters


def divergence(outputs: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """T^2 KL(softmax(teacher / T) || softmax(outputs / T)), mean over the batch: T^2 keeps the size
    of the gradients whatever T is. Both (B, classes). Returns a scalar, in float32 at least."""
    exact = torch.promote_types(outputs.dtype, torch.float32)
    student = F.log_softmax(outputs.to(exact) / temperature, 1)
    target = F.log_softmax(teacher.to(exact) / temperature, 1)
    return temperature**2 * F.kl_div(student, target, reduction="batchmean", log_target=True)


def given(task: Task) -> nn.Module:
    """The network that the run starts from. Raises Error where it starts from none."""
    if task.from_scratch:
        raise Error(
            "method.distillation.teacher=null: the run starts from scratch, so that there is no "
            "teacher; name a finished run with method.distillation.teacher=RUN_DIR, or start from "
            "one with pretrained=RUN_DIR"
        )
    return fold(task.given())


def trained_alike(name: str, ours: Mapping[str, Any]) -> nn.Module:
    """The network of a finished run that has been trained on the same classes and images as `ours`,
    a run's preprocessing. Raises Error where it has not, CheckpointError."""
    key = f"method.distillation.teacher={name}"
    try:
        theirs = preprocessing(name)
        network = fold(load(name))
    except CheckpointError as error:
        raise CheckpointError(f"{key}: {error}") from error
    for word, what in (("classes", "classes"), ("image_shape", "images")):
        there, here = theirs[word], ours[word]
        if list(there) != list(here):
            raise Error(f"{key}: has other {what}, {_short(there)}, than this run, {_short(here)}")
    constants = [torch.tensor(values[k]) for values in (ours, theirs) for k in ("mean", "std")]
    if torch.equal(constants[0], constants[2]) and torch.equal(constants[1], constants[3]):
        return network
    return nn.Sequential(Renormalised(*constants), network)


class Renormalised(nn.Module):
    """Images (B, C, H, W) of one normalisation as another would have them: (x s + m - m') / s'."""

    scale: Tensor
    shift: Tensor

    def __init__(self, mean: Tensor, std: Tensor, to_mean: Tensor, to_std: Tensor) -> None:
        super().__init__()
        self.register_buffer("scale", (std / to_std).view(1, -1, 1, 1))
        self.register_buffer("shift", ((mean - to_mean) / to_std).view(1, -1, 1, 1))

    def forward(self, images: Tensor) -> Tensor:
        return images * self.scale + self.shift


def _short(values: list[Any]) -> str:
    """A few of them, and how many there are."""
    words = [str(value) for value in values]
    return ", ".join(words) if len(words) <= 5 else f"{', '.join(words[:4])}, ... ({len(words)})"
