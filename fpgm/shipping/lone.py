"""One layer by itself in each runtime, as it runs inside a network: BatchNorm folded, ReLU behind.

Made without the exporter, which takes seconds where this takes milliseconds: a table of times has
hundreds of layers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
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


def _onnxruntime_int8(conv: nn.Conv2d, image: tuple[int, int], batch: int, threads: int) -> Runner:
    call, inputs = session(int8_model(conv, image, batch), threads), _bytes(conv, image, batch)
    return lambda _: call(inputs)


def _openvino(conv: nn.Conv2d, image: tuple[int, int], batch: int, threads: int) -> Runner:
    return _in_openvino(onnx_model(conv, image, batch), _inputs(conv, image, batch), threads)


def _openvino_int8(conv: nn.Conv2d, image: tuple[int, int], batch: int, threads: int) -> Runner:
    return _in_openvino(int8_model(conv, image, batch), _bytes(conv, image, batch), threads)


def _in_openvino(model: bytes, inputs: np.ndarray, threads: int) -> Runner:
    import openvino

    compiled = openvino.compile_model(openvino.Core().read_model(model), "CPU", hints(threads))
    return lambda _: compiled(inputs)


LAYERS: dict[str, Maker] = {
    "torch": _torch,
    "onnxruntime": _onnxruntime,
    "openvino": _openvino,
    "onnxruntime_int8": _onnxruntime_int8,
    "openvino_int8": _openvino_int8,
}


def _inputs(conv: nn.Conv2d, image: tuple[int, int], batch: int) -> np.ndarray:
    shape = (batch, conv.in_channels, *image)
    return np.random.default_rng(0).standard_normal(shape, dtype=np.float32)


def _bytes(conv: nn.Conv2d, image: tuple[int, int], batch: int) -> np.ndarray:
    shape = (batch, conv.in_channels, *image)
    return np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)


def onnx_model(conv: nn.Conv2d, image: tuple[int, int], batch: int) -> bytes:
    """The layer as an ONNX model: `images` (batch, C, H, W) in."""
    from onnx import TensorProto, helper

    assert conv.bias is not None
    nodes = [
        helper.make_node("Conv", ["images", "weight", "bias"], ["mapped"], **_options(conv)),
        helper.make_node("Relu", ["mapped"], ["maps"]),
    ]
    parts = {"weight": conv.weight.detach().numpy(), "bias": conv.bias.detach().numpy()}
    return _model(nodes, parts, [batch, conv.in_channels, *image], TensorProto.FLOAT)


def int8_model(conv: nn.Conv2d, image: tuple[int, int], batch: int) -> bytes:
    """The layer as it runs inside a network in int8 (shipping.int8): bytes in, `images` (batch, C,
    H, W) between 0 and 1, and bytes out, between 0 and 4."""
    from onnx import TensorProto, helper

    assert conv.bias is not None
    weight, bias = conv.weight.detach().numpy(), conv.bias.detach().numpy()
    read = np.float32(1 / 255)
    steps = np.abs(weight).max((1, 2, 3)).clip(1e-8) / 127
    parts = {
        "weight": np.rint(weight / steps[:, None, None, None]).astype(np.int8),
        "bias": np.rint(bias / (steps * read)).astype(np.int32),
        "read": read, "written": np.float32(4 / 255), "zero": np.uint8(0),
        "steps": steps, "sums": steps * read,
        "zeros": np.zeros(len(steps), np.int8), "no_sums": np.zeros(len(steps), np.int32),
    }  # fmt: skip
    dequantised = {
        "image": ["images", "read", "zero"],
        "filters": ["weight", "steps", "zeros"],
        "shifts": ["bias", "sums", "no_sums"],
    }
    nodes = [
        helper.make_node("DequantizeLinear", given, [name], axis=0 if name != "image" else 1)
        for name, given in dequantised.items()
    ]
    nodes += [
        helper.make_node("Conv", ["image", "filters", "shifts"], ["mapped"], **_options(conv)),
        helper.make_node("Relu", ["mapped"], ["positive"]),
        helper.make_node("QuantizeLinear", ["positive", "written", "zero"], ["maps"]),
    ]
    return _model(nodes, parts, [batch, conv.in_channels, *image], TensorProto.UINT8)


def _options(conv: nn.Conv2d) -> dict[str, Any]:
    return {
        "kernel_shape": conv.kernel_size, "strides": conv.stride, "dilations": conv.dilation,
        "group": conv.groups, "pads": [*conv.padding, *conv.padding],
    }  # fmt: skip


def _model(
    nodes: Sequence[Any], parts: Mapping[str, np.ndarray], shape: Sequence[int], kind: int
) -> bytes:
    """ONNX bytes. kind: of what goes in and comes out."""
    import onnx
    from onnx import helper, numpy_helper

    graph = helper.make_graph(
        nodes, "layer",
        [helper.make_tensor_value_info("images", kind, shape)],
        [helper.make_tensor_value_info("maps", kind, None)],
        [numpy_helper.from_array(np.asarray(value), name) for name, value in parts.items()],
    )  # fmt: skip
    imports = [helper.make_opsetid("", OPSET)]
    made: bytes = onnx.ModelProto.SerializeToString(
        helper.make_model(graph, opset_imports=imports, ir_version=10)
    )
    return made
