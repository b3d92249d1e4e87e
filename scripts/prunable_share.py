"""What pruning reaches: the tables of docs/choosing.md (residual) and docs/exactness.md (networks).

python scripts/prunable_share.py
"""

import warnings

import torch
import torchvision

import fpgm
from fpgm.graph.groups import RESIDUAL, prunable
from fpgm.graph.trace import trace
from fpgm.networks.layers import Expand

TORCHVISION = (
    "resnet18", "resnet50", "vgg11", "densenet121", "googlenet", "mobilenet_v2",
    "mobilenet_v3_small", "efficientnet_b0", "efficientnet_v2_s", "mnasnet0_5", "squeezenet1_0",
    "inception_v3", "shufflenet_v2_x0_5", "regnet_y_400mf", "resnext50_32x4d", "convnext_tiny",
)  # fmt: skip


def share(model: torch.nn.Module, residual: str, criterion: str, rate: float, size: int) -> str:
    """Layers pruned, MACs left, and scatters of one residual mode."""
    image = (3, size, size)
    tied, dense = prunable(trace(model), residual), fpgm.cost(model, image)
    small = fpgm.compact(model, fpgm.select(model, criterion, rate, residual))
    left = 100 * fpgm.cost(small, image).macs / dense.macs
    scatters = sum(isinstance(module, Expand) for module in small.modules())
    layers = f"{len(tied.layers)} of {len(dense.layers)}"
    return f"{residual} {layers} layers, {left:.1f} % of the MACs, {scatters} scatters"


def main() -> None:
    torch.manual_seed(0)
    warnings.simplefilter("ignore")
    resnet56 = fpgm.model("resnet56")
    for residual in RESIDUAL:
        print("resnet56, gm at 40 %:", share(resnet56, residual, "gm", 0.4, 32), flush=True)
    for name in TORCHVISION:
        options = {"aux_logits": False} if name in ("googlenet", "inception_v3") else {}
        model = torchvision.models.get_model(name, weights=None, num_classes=10, **options).eval()
        for residual in RESIDUAL[:2]:
            print(f"{name}, random half:", share(model, residual, "random", 0.5, 96), flush=True)


if __name__ == "__main__":
    main()
