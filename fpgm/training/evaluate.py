"""What a network says about images that it has not seen."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fpgm.data.images import Images
from fpgm.machine.device import autocast
from fpgm.machine.ranks import ALONE, Ranks, joined
from fpgm.networks.modes import exact

TEST_PIXELS = {"cpu": 1_024_000, "cuda": 10_240_000}  # of a batch: bounds an evaluation's memory


@torch.inference_mode()
def logits(
    model: nn.Module,
    images: Images,
    dtype: torch.dtype | None = None,
    ranks: Ranks = ALONE,
    held_out: bool = False,
) -> tuple[Tensor, Tensor]:
    """Outputs for all test images, (n, classes) float32, and their labels (n,), in eval mode.

    dtype: see autocast; ranks: those that share the work, all of them get all outputs; held_out:
    the training images that are held out in place of the test images.
    """
    model.eval()
    _, height, width = images.image_shape
    pixels = TEST_PIXELS[images.device.type]
    size = max(1, min(1000, pixels // (height * width)))
    batches = images.held_out(size, ranks) if held_out else images.tests(size, ranks)
    outputs, labels = [], []
    with autocast(images.device, dtype), exact():
        for batch, answers in batches:
            outputs.append(model(batch).float())
            labels.append(answers)
    return joined(torch.cat(outputs), ranks), joined(torch.cat(labels), ranks)


def accuracy(outputs: Tensor, labels: Tensor, top: int = 1) -> float:
    """Share of the images whose label is among the `top` largest outputs, in percent.

    (n, classes), (n,).
    """
    if top == 1:
        return 100 * int((outputs.argmax(1) == labels).sum()) / len(labels)
    best = outputs.topk(top, dim=1).indices
    return 100 * int((best == labels[:, None]).any(1).sum()) / len(labels)
