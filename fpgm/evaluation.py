"""What a network says about the test images."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import update_bn

from fpgm import data
from fpgm.machine import autocast

TEST_BATCH = 1000  # images; bounds the memory of an evaluation


@torch.inference_mode()
def logits(model: nn.Module, images: data.Data, dtype: torch.dtype | None = None) -> Tensor:
    """Outputs for all test images, (n, classes) float32, in eval mode. dtype: see autocast."""
    model.eval()
    device = images.test_images.device
    # TF32 keeps 10 bits of a product: too few to show two networks equal.
    exact = torch.backends.cudnn.flags(enabled=True, allow_tf32=False)
    with autocast(device, dtype), exact:
        parts = [model(batch).float() for batch, _ in data.test_batches(images, TEST_BATCH)]
    return torch.cat(parts)


def accuracy(outputs: Tensor, labels: Tensor) -> float:
    """Share of right answers in percent. (n, classes), (n,)."""
    return 100 * int((outputs.argmax(1) == labels).sum()) / len(labels)


def recalibrate(
    model: nn.Module, images: data.Data, batches: int, batch_size: int, seed: int
) -> None:
    """Estimate all BatchNorm statistics again, in place, on training images as they are."""
    stream = data.train_batches(images, batch_size, pad=0, flip=False, seed=seed)
    update_bn((inputs for inputs, _ in itertools.islice(stream, batches)), model)
