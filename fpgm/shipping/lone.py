"""One layer by itself in each runtime, as it runs inside a network: BatchNorm folded, ReLU behind.

Made without the exporter, which takes seconds where this takes milliseconds: a table of times has
hundreds of layers.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import nn

from fpgm.shipping.runtimes import Runner, hints, session

OPSET = 18
# (convolution, pixels of its input, batch, threads) -> what runs it, whatever it is called with
Maker = Callable[[nn.Conv2d, tuple[int, int], int, int], Runner]


def _torch(conv: nn.Conv2d, image: tuple[int, int], batch: int, threads: int) -> Runner:
    layer = nn.Sequential(conv, nn.ReLU()).eval().to(memory_format=torch.channels_last)
    inputs = torch.randn(batch, conv.in_channels, *image).to(memory_format=torch.channels_last)

    def run(_: object) -> object:
        torch.set_num_threads(threads)
        with torch.inference_mode():
            return layer(inputs)

    return run


def _onnxruntime(conv: nn.Conv2d, image: tuple[int, int], batch: int, threads: int) -> Runner:
    call, inputs = session(onnx_model(conv, image, batch), threads), _inputs(conv, image, batch)
    return lambda _: call(inputs)


def _openvino(conv: nn.Conv2d, image: tuple[int, int], batch: int, threads: int) -> Runner:
    import openvino

    model = openvino.Core().read_model(onnx_model(conv, image, batch))
    compiled, inputs = openvino.compile_model(model, "CPU", hints(threads)), None
    inputs = _inputs(conv, image, batch)
    return lambda _: compiled(inputs)


LAYERS: dict[str, Maker] = {"torch": _torch, "onnxruntime": _onnxruntime, "openvino": _openvino}


def _inputs(conv: nn.Conv2d, image: tuple[int, int], batch: int) -> np.ndarray:
    shape = (batch, conv.in_channels, *image)
    return np.random.default_rng(0).standard_normal(shape, dtype=np.float32)


def onnx_model(conv: nn.Conv2d, image: tuple[int, int], batch: int) -> bytes:
    """The layer as an ONNX model: `images` (batch, C, H, W) in."""
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    assert conv.bias is not None
    parts = {"weight": conv.weight, "bias": conv.bias}
    weights = [numpy_helper.from_array(v.detach().numpy(), name) for name, v in parts.items()]
    options: dict[str, Any] = {
        "kernel_shape": conv.kernel_size, "strides": conv.stride, "dilations": conv.dilation,
        "group": conv.groups, "pads": [*conv.padding, *conv.padding],
    }  # fmt: skip
    nodes = [
        helper.make_node("Conv", ["images", "weight", "bias"], ["mapped"], **options),
        helper.make_node("Relu", ["mapped"], ["maps"]),
    ]
    shape = [batch, conv.in_channels, *image]
    graph = helper.make_graph(
        nodes, "layer",
        [helper.make_tensor_value_info("images", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info("maps", TensorProto.FLOAT, None)],
        weights,
    )  # fmt: skip
    imports = [helper.make_opsetid("", OPSET)]
    made: bytes = onnx.ModelProto.SerializeToString(
        helper.make_model(graph, opset_imports=imports, ir_version=10)
    )
    return made
