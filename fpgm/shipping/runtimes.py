"""The runtimes that a network can be timed in, each as it would be deployed on a CPU in float32.

A runner is made of (network, image (C, H, W), threads) and called with a batch (B, C, H, W). Its
`by_layer` says where the time of a batch goes: (layer and operation, milliseconds), most first.
"""

from __future__ import annotations

import importlib.util
import json
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, fx, nn

from fpgm.errors import ShippingError
from fpgm.shipping.export import export
from fpgm.shipping.folding import fold

Image = tuple[int, int, int]
Times = list[tuple[str, float]]

INSTALL = {"onnxruntime": "pip install 'fpgm[export]'", "openvino": "pip install 'fpgm[latency]'"}
PROFILED = 10  # batches, after as many to warm up


class Runner(Protocol):
    def __call__(self, batch: Tensor) -> object: ...

    def by_layer(self, batch: Tensor) -> Times: ...


def installed(name: str) -> bool:
    """Whether a runtime is there, without loading it."""
    return importlib.util.find_spec(name) is not None


def require(name: str) -> None:
    """Raise ShippingError, with the command that installs it, where a runtime is not."""
    if not installed(name):
        raise ShippingError(f"target={name}: is not installed here: {INSTALL[name]}")


class Torch:
    """BatchNorm folded, channels last."""

    def __init__(self, network: nn.Module, image: Image, threads: int) -> None:
        self._network = fold(network).to(memory_format=torch.channels_last)
        self._threads = threads

    def __call__(self, batch: Tensor) -> object:
        torch.set_num_threads(self._threads)
        with torch.inference_mode():
            return self._network(batch)

    def by_layer(self, batch: Tensor) -> Times:
        spent: dict[str, float] = defaultdict(float)

        class Timed(fx.Interpreter):
            def run_node(self, n: fx.Node) -> Any:
                start = time.perf_counter()
                value = super().run_node(n)
                name = str(n.target) if n.op == "call_module" else n.name
                spent[f"{name} ({n.op.removeprefix('call_')})"] += time.perf_counter() - start
                return value

        with torch.inference_mode():
            for _ in range(2):
                spent.clear()
                for _ in range(PROFILED):
                    Timed(self._network).run(batch)
        return _most_first({name: 1e3 * own / PROFILED for name, own in spent.items()})


class OnnxRuntime:
    """The exported network, any batch."""

    def __init__(self, network: nn.Module, image: Image, threads: int) -> None:
        with _exported(network, image) as path:
            self._model = path.read_bytes()
            self._layers = _layer_names(path)
        self._threads = threads
        self._session = self._start()

    def __call__(self, batch: Tensor) -> object:
        return self._session.run(None, {"images": batch.numpy()})

    def by_layer(self, batch: Tensor) -> Times:
        with tempfile.TemporaryDirectory() as directory:
            session = self._start(profile=f"{directory}/profile")
            for _ in range(2 * PROFILED):
                session.run(None, {"images": batch.numpy()})
            events = json.loads(Path(session.end_profiling()).read_text())
        runs: dict[str, list[float]] = defaultdict(list)
        for event in events:
            if event.get("cat") == "Node" and event["name"].endswith("_kernel_time"):
                name = event["name"].removesuffix("_kernel_time")
                runs[f"{self._layers(name)} ({event['args']['op_name']})"].append(event["dur"])
        # Of several operations of one layer all count: the later half of the events.
        share = {name: sum(own[len(own) // 2 :]) / PROFILED for name, own in runs.items()}
        return _most_first({name: us / 1e3 for name, us in share.items()})

    def _start(self, profile: str | None = None) -> Any:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = self._threads
        # Else the threads of one session go on spinning while the next one is timed.
        options.add_session_config_entry("session.force_spinning_stop", "1")
        if profile is not None:
            options.enable_profiling = True
            options.profile_file_prefix = profile
        providers = ["CPUExecutionProvider"]
        return onnxruntime.InferenceSession(self._model, options, providers=providers)


class OpenVino:
    """The exported network, compiled for each batch size, in float32 as the others."""

    def __init__(self, network: nn.Module, image: Image, threads: int) -> None:
        import openvino

        with _exported(network, image) as path:
            self._model = openvino.convert_model(path)
            self._layers = _layer_names(path)
        self._image = image
        self._hints = {"INFERENCE_NUM_THREADS": threads, "INFERENCE_PRECISION_HINT": "f32",
                       "PERFORMANCE_HINT": "LATENCY"}  # fmt: skip
        self._compiled: dict[int, Any] = {}

    def __call__(self, batch: Tensor) -> object:
        if len(batch) not in self._compiled:
            self._compiled[len(batch)] = self._compile(len(batch))
        return self._compiled[len(batch)](batch.numpy())

    def by_layer(self, batch: Tensor) -> Times:
        request = self._compile(len(batch), PERF_COUNT=True).create_infer_request()
        spent: dict[str, float] = defaultdict(float)
        for done in range(2 * PROFILED):
            request.infer(batch.numpy())
            for part in request.get_profiling_info() if done >= PROFILED else ():
                name = part.node_name.split("/")[0]
                seconds = part.real_time.total_seconds()
                spent[f"{self._layers(name)} ({part.node_type})"] += seconds
        return _most_first({name: 1e3 * own / PROFILED for name, own in spent.items()})

    def _compile(self, size: int, **more: Any) -> Any:
        import openvino

        self._model.reshape([size, *self._image])
        return openvino.compile_model(self._model, "CPU", {**self._hints, **more})


RUNTIMES: dict[str, Callable[[nn.Module, Image, int], Runner]] = {
    "torch": Torch,
    "onnxruntime": OnnxRuntime,
    "openvino": OpenVino,
}


def _most_first(times: dict[str, float]) -> Times:
    return sorted(times.items(), key=lambda item: -item[1])


@contextmanager
def _exported(network: nn.Module, image: Image) -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "network.onnx"
        export(network, path, image, dynamic=True)
        yield path


def _layer_names(path: Path) -> Any:
    """From a runtime's name for an operation to the layer of the network that it comes from."""
    import onnx

    layers: dict[str, str] = {}
    for node in onnx.load(path, load_external_data=False).graph.node:
        origin = next((p.value for p in node.metadata_props if p.key == "namespace"), "")
        module = origin.split(":")[0].strip()
        # What belongs to no module, a relu or an add, is named by the layer it comes after.
        above = [layers[i] for i in node.input if i in layers]
        for name in (node.name, *node.output):
            layers[name] = module or (above[0] if above else name)

    def layer(name: str) -> str:
        plain = name.split("_nchwc")[0].split("_token_")[0]
        return str(layers.get(plain, plain))

    return layer
