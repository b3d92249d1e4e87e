"""The runtimes that a network can be timed in, each as it would be deployed on a CPU, in float32 or
in int8, and torch on a GPU.

A runtime makes of (network, image (C, H, W), threads) what is called with a batch (B, C, H, W).
"""

from __future__ import annotations

import importlib.util
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor, nn

from fpgm.errors import ShippingError
from fpgm.machine.apart import contained
from fpgm.shipping.export import export
from fpgm.shipping.folding import fold
from fpgm.shipping.int8 import quantise

P = ParamSpec("P")
T = TypeVar("T")
Image = tuple[int, int, int]
Runner = Callable[[Tensor], object]


@dataclass(frozen=True)
class Target:
    """What the network is for. runtime: a name in runtimes.TARGETS; image: (C, H, W)."""

    runtime: str
    image: tuple[int, int, int]
    batch: int
    threads: int


INSTALL = {"onnxruntime": "pip install 'fpgm[export]'", "openvino": "pip install 'fpgm[latency]'"}
INT8 = "_int8"  # behind a runtime's name: the network in int8 there


def package(target: str) -> str:
    """What has to be installed for a target."""
    return target.removesuffix(INT8)


def installed(name: str) -> bool:
    """Whether a runtime is there, without loading it."""
    return importlib.util.find_spec(name) is not None


def require(target: str) -> None:
    """Raise ShippingError, with the command that installs it, where a target's runtime is not, or
    what makes int8 for it."""
    for name in {package(target), "onnxruntime" if target.endswith(INT8) else package(target)}:
        if not installed(name):
            raise ShippingError(f"target={target}: {name} is not installed here: {INSTALL[name]}")


def apart(target: Target, function: Callable[P, T], *given: P.args, **named: P.kwargs) -> T:
    """What a function that times in target.runtime returns, called in a process of its own, that a
    runtime may crash without the network being lost. Raises ShippingError, and what it raises.

    OpenVINO corrupts the heap on some virtual machines: glibc's MALLOC_CHECK_=3 shows it after the
    compilation of any model, and whatever runs next in the process may fall over it.
    """
    if package(target.runtime) == "torch":
        return function(*given, **named)
    crashed = f"target={target.runtime}: it crashed while it was timed"
    return contained(crashed, function, *given, **named)


def _torch(network: nn.Module, image: Image, threads: int) -> Runner:
    """BatchNorm folded, channels last."""
    folded = fold(network).to(memory_format=torch.channels_last)

    def run(batch: Tensor) -> object:
        torch.set_num_threads(threads)
        with torch.inference_mode():
            return folded(batch)

    return run


def _onnxruntime(network: nn.Module, image: Image, threads: int) -> Runner:
    """The exported network, any batch."""
    return ONNX["onnxruntime"](exported(network, image), image, threads)


def _onnxruntime_model(model: bytes, image: Image, threads: int) -> Runner:
    run = session(model, threads)
    return lambda batch: run(batch.numpy())


def session(model: bytes, threads: int) -> Callable[[Any], object]:
    """ONNX Runtime on a model's bytes: called with an array (B, C, H, W)."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    # Else the threads of one session go on spinning while the next one is timed.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    providers = ["CPUExecutionProvider"]
    made = onnxruntime.InferenceSession(model, options, providers=providers)
    return lambda batch: made.run(None, {"images": batch})


def _openvino(network: nn.Module, image: Image, threads: int) -> Runner:
    """The exported network, in float32 as the others."""
    return ONNX["openvino"](exported(network, image), image, threads)


def _openvino_model(content: bytes, image: Image, threads: int) -> Runner:
    """Compiled for each batch size."""
    import openvino

    # Not convert_model: that starts processes of its own, which would run beside what is timed.
    model = openvino.Core().read_model(content)
    compiled: dict[int, Any] = {}

    def run(batch: Tensor) -> object:
        if len(batch) not in compiled:
            model.reshape([len(batch), *image])
            compiled[len(batch)] = openvino.compile_model(model, "CPU", hints(threads))
        return compiled[len(batch)](batch.numpy())

    return run


def hints(threads: int) -> dict[str, Any]:
    """How OpenVINO is told to run."""
    return {"INFERENCE_NUM_THREADS": threads, "INFERENCE_PRECISION_HINT": "f32",
            "PERFORMANCE_HINT": "LATENCY"}  # fmt: skip


def _torch_on_gpu(network: nn.Module, image: Image, threads: int) -> Runner:
    """As on a CPU; a call begins when nothing else is running there and ends with its result.

    Convolutions are done in TF32 where the GPU has it, as is torch's default.
    """
    device = torch.device("cuda")
    folded = fold(network).to(device).to(memory_format=torch.channels_last)

    def run(batch: Tensor) -> object:
        torch.cuda.synchronize(device)
        with torch.inference_mode():
            outputs = folded(batch)
        torch.cuda.synchronize(device)
        return outputs

    return run


RUNTIMES: dict[str, Callable[[nn.Module, Image, int], Runner]] = {
    "torch": _torch,
    "onnxruntime": _onnxruntime,
    "openvino": _openvino,
}
GPU: dict[str, Callable[[nn.Module, Image, int], Runner]] = {"torch": _torch_on_gpu}
# Those that run a model of any batch from its ONNX bytes, float32 or int8.
ONNX: dict[str, Callable[[bytes, Image, int], Runner]] = {
    "onnxruntime": _onnxruntime_model,
    "openvino": _openvino_model,
}


def _in_int8(runtime: str, network: nn.Module, image: Image, threads: int) -> Runner:
    """Calibrated on noise: the clock does not see which numbers they are."""
    noise = torch.randn(8, *image, generator=torch.Generator().manual_seed(0))
    return ONNX[runtime](quantise(exported(network, image), [noise]).model, image, threads)


# What a network may be made for: target= of a run.
TARGETS: dict[str, Callable[[nn.Module, Image, int], Runner]] = {
    **RUNTIMES,
    **{f"{name}{INT8}": partial(_in_int8, name) for name in ONNX},
}


def exported(network: nn.Module, image: Image) -> bytes:
    """As an ONNX model that takes any batch."""
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "network.onnx"
        export(network, path, image, dynamic=True)
        return path.read_bytes()
