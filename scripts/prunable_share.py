"""What pruning reaches: the tables of docs/choosing.md (residual) and docs/exactness.md (networks).

python scripts/prunable_share.py            # torchvision's
python scripts/prunable_share.py timm       # timm's, of which it counts those that come below 45 %
"""

import sys
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

TIMM = (
    "resnet50d", "seresnet50", "ecaresnet50t", "regnetx_008", "regnety_008", "efficientnet_b0",
    "tf_efficientnetv2_s", "mobilenetv2_100", "mobilenetv3_large_100", "mobilenetv4_conv_small",
    "ghostnet_100", "rexnet_100", "cspdarknet53", "res2net50_26w_4s", "dla34", "hrnet_w18_small",
    "inception_v3", "densenet121", "vgg16_bn", "repvgg_a2", "convnext_atto",
    # and other families
    "bat_resnext26ts", "convmixer_768_32", "convnextv2_atto", "cs3darknet_s", "cspresnext50",
    "csatv2", "darknet53", "dpn68", "eca_nfnet_l0", "edgenext_xx_small", "efficientvit_b0",
    "ese_vovnet39b",
    "fastvit_t8", "fbnetc_100", "focalnet_tiny_srf", "gernet_s", "ghostnetv3_100", "haloregnetz_b",
    "hardcorenas_a", "hgnet_tiny", "hgnetv2_b0", "inception_next_tiny", "inception_resnet_v2",
    "inception_v4", "lambda_resnet26t", "lcnet_050", "legacy_senet154", "legacy_xception",
    "mambaout_femto", "mixnet_s", "mnasnet_100", "mobilenetv4_hybrid_medium", "mobileone_s0",
    "nfnet_l0", "rdnet_tiny", "regnetz_b16", "repghostnet_050", "repvit_m0_9", "res2next50",
    "resnest14d", "resnetblur50", "resnetv2_50", "resnext26ts", "selecsls42", "skresnet18",
    "starnet_s1", "tf_mixnet_s", "tinynet_e", "tresnet_m", "xception41",
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


def left(name: str) -> float:
    """Percent of the MACs of a network of timm's, half of its filters gone at random, shared."""
    import timm

    model = timm.create_model(name, num_classes=10).eval()
    image = tuple(model.pretrained_cfg["input_size"])
    keep = fpgm.select(model, "random", 0.5, "shared")
    small = fpgm.compact(model, keep)
    return 100 * fpgm.cost(small, image).macs / fpgm.cost(model, image).macs


def timms() -> None:
    shares = {}
    for name in TIMM:
        shares[name] = left(name)
        print(f"{name}: {shares[name]:.1f} % of the MACs", flush=True)
    below = sum(value < 45 for value in shares.values())
    print(f"{below} of {len(shares)} below 45 %")


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
    timms() if sys.argv[1:] == ["timm"] else main()
