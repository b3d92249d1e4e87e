"""int8 by ONNX Runtime's own quantiser: of an exported network, checked on all test images.

Static QDQ: unsigned bytes for activations, between the least and the largest value that training
images give; signed ones for weights, symmetric, a scale for each filter. What stands for pruned
filters, constants and their maps at the borders, stays float: it is added, and costs no products.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from importlib.util import find_spec
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fpgm.data import sets
from fpgm.data.images import Images
from fpgm.errors import DataError, Error, ShippingError, first_line
from fpgm.graph.groups import RESIDUAL
from fpgm.machine.apart import contained
from fpgm.machine.device import adds_bytes_exactly, environment
from fpgm.runs.checkpoint import preprocessing
from fpgm.runs.files import write_bytes, write_text
from fpgm.runs.run import read_config

CALIBRATED, BATCH = 512, 32  # training images, in all and at once
SEED = 0  # of which they are: any constant would do
MAX_LOSS = 1.0  # points of accuracy
FILE, REPORT = "compact.int8.onnx", "int8.json"
TEST_PIXELS = 1_024_000  # of a batch: bounds the memory


@dataclass(frozen=True)
class Quantised:
    """model: ONNX bytes; images: how many it was calibrated on; reduced: weights of 7 bits, for a
    processor whose sums of bytes saturate; kept_float: names of the nodes that stay float."""

    model: bytes
    images: int
    reduced: bool
    kept_float: list[str]


def images_of(run: Path, device: torch.device | None = None) -> Images:
    """A finished run's images, normalised as its network has been trained; on the CPU where no
    device is given. Raises Error, DataError, CheckpointError."""
    images = sets.load(device or torch.device("cpu"), **read_config(run)["dataset"])
    made = preprocessing(str(run))
    return images.normalised_by(made["mean"], made["std"])


def calibration(images: Images) -> list[Tensor]:
    """512 training images, or all there are, as they are, in batches (B, C, H, W): the same each
    time. Raises DataError where there are none."""
    passed = images.epoch(BATCH, SEED, augmented=False)
    batches = [batch.contiguous() for batch, _ in islice(passed, CALIBRATED // BATCH)]
    if not batches:
        raise DataError(
            "dataset.root: no training images to calibrate int8 with; it needs those that the run "
            "was trained on"
        )
    return batches


def quantise(model: bytes, batches: Sequence[Tensor]) -> Quantised:
    """An ONNX model in int8. batches: what `calibration` gives. Raises ShippingError."""
    try:
        import onnx
        from onnxruntime.quantization import QuantType, quantize_static
        from onnxruntime.quantization.shape_inference import quant_pre_process
    except ImportError as error:
        raise ShippingError(f"int8: {error}; pip install 'fpgm[export]'") from error
    reduced = not adds_bytes_exactly()
    with tempfile.TemporaryDirectory() as directory:
        prepared, made = Path(directory) / "prepared.onnx", Path(directory) / "int8.onnx"
        try:
            quant_pre_process(onnx.load_from_string(model), prepared)
            network = onnx.load(prepared)
            kept_float = constants(network.graph)
            quantize_static(
                network, made, _Reader(_fitting(model, batches)), per_channel=True,
                reduce_range=reduced, activation_type=QuantType.QUInt8,
                weight_type=QuantType.QInt8, nodes_to_exclude=kept_float,
            )  # fmt: skip
        except Exception as error:  # onnxruntime has its own kinds
            raise ShippingError(
                f"int8: onnxruntime cannot quantise the network ({first_line(error)})"
            ) from error
        return Quantised(made.read_bytes(), sum(map(len, batches)), reduced, kept_float)


def constants(graph: Any) -> list[str]:
    """Names of the nodes that compute, or add, what does not depend on the image. graph: an ONNX
    graph; its nodes get a name where they have none."""
    fixed = {value.name for value in graph.initializer}
    names = []
    for index, node in enumerate(graph.node):
        node.name = node.name or f"node {index}"
        known = [name in fixed for name in node.input if name]
        if all(known):
            fixed.update(node.output)
        if all(known) or (node.op_type == "Add" and any(known)):
            names.append(node.name)
    return names


class _Reader:
    """As onnxruntime asks for images: batch after batch, None at the end."""

    def __init__(self, batches: Iterator[Tensor]) -> None:
        self._batches = batches

    def get_next(self) -> dict[str, np.ndarray] | None:
        batch = next(self._batches, None)
        return None if batch is None else {"images": batch.numpy()}


def _fitting(model: bytes, batches: Sequence[Tensor]) -> Iterator[Tensor]:
    """The batches, in such that the model takes."""
    single = _Answers(model).single
    return (part for batch in batches for part in batch.split(1 if single else len(batch)))


class _Answers:
    """An ONNX model in ONNX Runtime: images (n, C, H, W) -> (n, classes)."""

    def __init__(self, model: bytes) -> None:
        import onnxruntime

        self._session = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
        self.single = self._session.get_inputs()[0].shape[0] == 1

    def __call__(self, images: Tensor) -> Tensor:
        parts = images.contiguous().split(1 if self.single else len(images))
        outputs = [self._session.run(None, {"images": part.numpy()})[0] for part in parts]
        return torch.from_numpy(np.concatenate(outputs))


def checked(full: bytes, small: bytes, images: Images) -> dict[str, Any]:
    """What a float and an int8 model say of all test images: accuracies in percent, agreement: the
    share of equal answers."""
    _, height, width = images.image_shape
    size = max(1, min(1000, TEST_PIXELS // (height * width)))
    models = _Answers(full), _Answers(small)
    count, right, same = 0, [0, 0], 0
    for batch, labels in images.tests(size):
        first, second = (model(batch).argmax(1) for model in models)
        count += len(labels)
        right = [right[0] + int((first == labels).sum()), right[1] + int((second == labels).sum())]
        same += int((first == second).sum())
    return {
        "test_images": count,
        "accuracy": {"float": 100 * right[0] / count, "int8": 100 * right[1] / count},
        "loss": 100 * (right[0] - right[1]) / count,
        "agreement": same / count,
    }


def deliver(
    path: Path, images: Images, residual: str, max_loss: float = MAX_LOSS
) -> dict[str, Any]:
    """Write compact.int8.onnx and int8.json beside an exported network; returns what is in it.

    residual: the run's, for what is said of OpenVINO; max_loss: points of accuracy. Raises
    ShippingError where more is lost: then neither file is there; DataError.
    """
    target, report = path.with_name(FILE), path.with_name(REPORT)
    full = path.read_bytes()
    made = quantise(full, calibration(images))
    found = checked(full, made.model, images)
    if not found["loss"] <= max_loss + 1e-9:
        for file in (target, report):  # of an earlier export: no longer what was asked for
            file.unlink(missing_ok=True)
        accuracy = found["accuracy"]
        raise ShippingError(
            f"--max-loss {max_loss:g}: int8 answers {accuracy['int8']:.2f} % of "
            f"{found['test_images']} test images right, float {accuracy['float']:.2f} %; no {FILE} "
            f"is written, --max-loss {found['loss'] + 0.005:.2f} would"
        )
    why = refused_by_openvino(made.model, images.image_shape)
    result = {
        "environment": {**environment(torch.device("cpu"), None), **_versions()},
        "file": FILE,
        "bytes": {"float": len(full), "int8": len(made.model)},
        **found,
        "max_loss": max_loss,
        "calibration": {"method": "MinMax", "images": made.images},
        "reduce_range": made.reduced,
        "kept_float": made.kept_float,
        "warnings": [] if why is None else [openvino_warning(FILE, why, residual)],
    }
    write_bytes(target, made.model)
    write_text(report, json.dumps(result, indent=2) + "\n")
    return result


def _versions() -> dict[str, str]:
    return {name: version(name) for name in ("onnx", "onnxruntime")}


def told(result: Mapping[str, Any], target: Path) -> str:
    """A line about what was delivered."""
    accuracy, sizes = result["accuracy"], result["bytes"]
    return (
        f"{target}: {sizes['int8']:,} bytes, {accuracy['int8']:.2f} % of {result['test_images']} "
        f"test images (float {accuracy['float']:.2f} %), same answer on "
        f"{100 * result['agreement']:.2f} %, calibrated on {result['calibration']['images']} "
        "training images"
    )


def refused_by_openvino(model: bytes, image: tuple[int, int, int]) -> str | None:
    """Why OpenVINO does not run an int8 model, None where it does, or is not installed. In a
    process of its own: with some models it crashes."""
    if find_spec("openvino") is None:
        return None
    try:
        contained("it crashes", _in_openvino, model, image)
    except Error as error:
        return str(error)
    except Exception as error:  # what went wrong is in the last line, the way there above it
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        return lines[-1] if lines else type(error).__name__
    return None


def _in_openvino(model: bytes, image: tuple[int, int, int]) -> None:
    import openvino

    network = openvino.Core().read_model(model)
    network.reshape([1, *image])
    openvino.compile_model(network, "CPU")(np.zeros((1, *image), np.float32))


def openvino_warning(what: str, why: str, residual: str) -> str:
    """What to do where OpenVINO does not run an int8 network. residual: of its run."""
    others = " or ".join(f"residual={name}" for name in RESIDUAL if name != RESIDUAL[0])
    advice = f"; train with {others} for OpenVINO" if residual == RESIDUAL[0] else ""
    return f"{what}: OpenVINO cannot run int8 of residual={residual} ({why}){advice}"
