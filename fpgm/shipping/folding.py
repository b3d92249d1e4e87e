"""BatchNorm folded into the convolution before it: what runs faster and computes the same."""

from __future__ import annotations

import copy

import torch
from torch import fx, nn
from torch.nn.utils.fusion import fuse_conv_bn_weights

from fpgm.graph.trace import trace
from fpgm.networks.layers import BorderConv2d, SameConv2d


@torch.no_grad()
def fold(model: nn.Module) -> fx.GraphModule:
    """A copy of a dense or compact network, in eval mode, without the BatchNorms that follow a
    convolution nobody else reads. Raises GraphError where the network cannot be traced."""
    network = copy.deepcopy(trace(model).module).eval()
    modules = dict(network.named_modules())
    nodes = [node for node in network.graph.nodes if node.op == "call_module"]
    calls = [str(node.target) for node in nodes]
    for node in nodes:
        norm, before = modules[str(node.target)], node.all_input_nodes[0]
        conv = modules.get(str(before.target)) if before.op == "call_module" else None
        once = calls.count(str(node.target)) == calls.count(str(before.target)) == 1
        if not (type(norm) is nn.BatchNorm2d and once and len(before.users) == 1):
            continue
        if type(conv) not in (nn.Conv2d, SameConv2d, BorderConv2d) or norm.running_mean is None:
            continue
        assert isinstance(conv, nn.Conv2d)
        _fold_into(conv, norm)
        node.replace_all_uses_with(before)
        network.graph.erase_node(node)
    network.delete_all_unused_submodules()
    network.recompile()
    return network


def _fold_into(conv: nn.Conv2d, norm: nn.BatchNorm2d) -> None:
    mean, var = norm.running_mean, norm.running_var
    assert mean is not None
    assert var is not None
    if isinstance(conv, BorderConv2d) and conv.border is not None:
        # The map of the constants goes through the same BatchNorm, without its shift.
        scale = (var + norm.eps).rsqrt() * (1 if norm.weight is None else norm.weight)
        conv.border = conv.border * scale[:, None, None, None]
    conv.weight, conv.bias = fuse_conv_bn_weights(
        conv.weight, conv.bias, mean, var, norm.eps, norm.weight, norm.bias
    )
