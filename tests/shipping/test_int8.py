"""int8 is what was measured, on training images only, and nothing that loses is delivered."""

from __future__ import annotations

import json
import os
import platform
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from commands import compose
from torch import Tensor, nn

import fpgm
from fpgm.data import sets
from fpgm.data.memory import Data
from fpgm.errors import DataError, ShippingError
from fpgm.machine import device
from fpgm.machine.apart import contained
from fpgm.runs import checkpoint
from fpgm.shipping import export as exporting
from fpgm.shipping import int8, latency

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")

IMAGE = (1, 8, 8)


def digits(**keys: object) -> Data:
    images = sets.load(torch.device("cpu"), name="digits", **keys)
    assert isinstance(images, Data)
    return images


def learnt() -> nn.Module:
    """A small network that tells digits apart, with filters whose BatchNorms emit constants."""
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for before, after, stride in ((1, 8, 1), (8, 16, 2), (16, 16, 1)):
        conv = nn.Conv2d(before, after, 3, stride, 1, bias=False)
        layers += [conv, nn.BatchNorm2d(after), nn.ReLU()]
    model = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 10))
    for module in model:
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.bias, 0.2, 0.6)
    optimiser = torch.optim.Adam(model.parameters(), 0.01)
    keep = fpgm.select(model, "gm", rate=0.25, image=IMAGE)
    for epoch in range(6):
        for x, y in digits().epoch(64, epoch):
            optimiser.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimiser.step()
            fpgm.zero_(model, keep)
    return fpgm.compact(model.eval(), keep, image=IMAGE)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[bool, bytes]:
    """The network, exported: whether for any batch -> ONNX bytes."""
    path, network = tmp_path_factory.mktemp("models") / "compact.onnx", learnt()
    found = {}
    for dynamic in (True, False):
        exporting.export(network, path, IMAGE, dynamic)
        found[dynamic] = path.read_bytes()
    return found


@pytest.fixture
def path(tmp_path: Path, models: dict[bool, bytes], monkeypatch: pytest.MonkeyPatch) -> Path:
    """compact.onnx in a directory of its run; no OpenVINO."""
    config = compose("dataset=digits", "residual=shared")
    (tmp_path / "config.yaml").write_text(json.dumps(config))
    checkpoint.write(tmp_path / "compact.pt", {"preprocessing": digits().preprocessing()})
    (tmp_path / "compact.onnx").write_bytes(models[True])
    monkeypatch.setattr(int8, "find_spec", lambda name: None)
    return tmp_path / "compact.onnx"


def outputs(path: Path, images: Tensor, single: bool = False) -> np.ndarray:
    """Answers of a file (n,), by onnxruntime alone."""
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    (name,) = [one.name for one in session.get_inputs()]
    parts = np.split(images.numpy(), len(images)) if single else [images.numpy()]
    return np.concatenate([session.run(None, {name: part})[0] for part in parts]).argmax(1)


def unseen(images: Data) -> tuple[Tensor, np.ndarray]:
    """All test images, normalised here, and their labels."""
    x = images.test_images.float() / 255
    x = (x - images.mean.view(1, -1, 1, 1)) / images.std.view(1, -1, 1, 1)
    return x.contiguous(), images.test_labels.numpy()


@pytest.mark.parametrize("dynamic", [True, False], ids=["any batch", "one image"])
def test_accuracy_and_agreement_are_those_of_the_files(
    path: Path, models: dict[bool, bytes], dynamic: bool
) -> None:
    path.write_bytes(models[dynamic])
    int8.deliver(path, digits(), "shared", max_loss=100)
    found = json.loads((path.parent / "int8.json").read_text())
    x, labels = unseen(digits())
    full = outputs(path, x, not dynamic)
    small = outputs(path.parent / "compact.int8.onnx", x, not dynamic)
    assert found["test_images"] == len(labels) == 360
    right = {"float": 100 * (full == labels).mean(), "int8": 100 * (small == labels).mean()}
    assert found["accuracy"] == pytest.approx(right)
    assert right["float"] > 60
    assert found["agreement"] == pytest.approx((full == small).mean())
    assert found["agreement"] > 0.9
    sizes = {"float": path.stat().st_size}
    sizes["int8"] = (path.parent / "compact.int8.onnx").stat().st_size
    assert found["bytes"] == sizes
    assert found["calibration"]["images"] == 512


def test_disagreement_is_counted(models: dict[bool, bytes]) -> None:
    """Against a model that always answers 3."""
    model = onnx.load_from_string(models[True])
    bias = max(model.graph.initializer, key=lambda one: list(one.dims) == [10])
    values = onnx.numpy_helper.to_array(bias).copy()
    values[3] += 1e3
    bias.CopyFrom(onnx.numpy_helper.from_array(values, bias.name))
    found = int8.checked(models[True], model.SerializeToString(), digits())
    threes = 100 * (digits().test_labels == 3).double().mean()
    assert found["accuracy"]["int8"] == pytest.approx(float(threes))
    assert found["loss"] == pytest.approx(found["accuracy"]["float"] - float(threes))
    assert found["agreement"] < 0.2


def test_products_are_of_bytes_and_constants_of_pruned_filters_stay_float(
    models: dict[bool, bytes],
) -> None:
    made = int8.quantise(models[True], int8.calibration(digits()))
    graph = onnx.load_from_string(made.model).graph
    values = {one.name: onnx.numpy_helper.to_array(one) for one in graph.initializer}
    maker = {name: node for node in graph.node for name in node.output}
    original = {
        tuple(one.dims): onnx.numpy_helper.to_array(one)
        for one in onnx.load_from_string(models[True]).graph.initializer
    }
    products = [node for node in graph.node if node.op_type in ("Conv", "Gemm")]
    assert [node.op_type for node in products] == ["Conv"] * 3 + ["Gemm"]
    for node in products:
        images, weights = (maker[name] for name in node.input[:2])
        assert images.op_type == weights.op_type == "DequantizeLinear"
        assert values[images.input[2]].dtype == np.uint8
        stored, scale, zero = (values[name] for name in weights.input)
        assert stored.dtype == np.int8
        assert scale.shape == (len(stored),)
        assert not zero.any()
        wide = scale.reshape(-1, *[1] * (stored.ndim - 1))
        near = np.abs(stored * wide - original[stored.shape])
        assert (near <= 0.501 * wide).all()
    # The maps at the borders: of two layers, as float32 and as they were.
    adds = [node for node in graph.node if node.name in made.kept_float]
    assert [node.op_type for node in adds] == ["Add", "Add"]
    for node in adds:
        (constant,) = [values[name] for name in node.input if name in values]
        assert constant.dtype == np.float32
        assert constant.shape[0] == 1
        assert min(constant.shape[2:]) > 1


def test_maps_that_are_still_computed_stay_float_too() -> None:
    """As the exporter leaves those that are too large to be stored, and nodes without names."""
    helper = onnx.helper
    values = [
        onnx.numpy_helper.from_array(np.ones(shape, np.float32), name)
        for name, shape in {"ones": (1, 1, 8, 8), "border": (4, 1, 3, 3), "w": (4, 1, 3, 3)}.items()
    ]
    nodes = [
        helper.make_node("Conv", ["x", "w"], ["y"], name="conv"),
        helper.make_node("Conv", ["ones", "border"], ["map"]),
        helper.make_node("Relu", ["map"], ["positive"], name="relu"),
        helper.make_node("Add", ["y", "positive"], ["z"]),
        helper.make_node("Add", ["z", "y"], ["out"], name="sum"),
    ]
    graph = helper.make_graph(nodes, "g", [], [], values)
    assert int8.constants(graph) == ["node 1", "relu", "node 3"]
    assert [node.name for node in graph.node] == ["conv", "node 1", "relu", "node 3", "sum"]


def test_seven_bits_where_sums_of_bytes_saturate(
    models: dict[bool, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    largest = {}
    for exact in (True, False):
        monkeypatch.setattr(int8, "adds_bytes_exactly", lambda exact=exact: exact)
        made = int8.quantise(models[True], int8.calibration(digits())[:1])
        assert made.reduced is not exact
        graph = onnx.load_from_string(made.model).graph
        arrays = [onnx.numpy_helper.to_array(one) for one in graph.initializer]
        weights = [a for a in arrays if a.dtype == np.int8 and a.ndim == 4]
        largest[exact] = max(int(np.abs(a.astype(int)).max()) for a in weights)
    assert largest == {True: 127, False: 64}


@pytest.mark.parametrize(
    ("machine", "flags", "exact"),
    [
        ("x86_64", "flags : avx2 avx512f avx512_vnni", True),
        ("x86_64", "flags : avx2 avx_vnni", True),
        ("x86_64", "flags : avx2 avx512f", False),
        ("AMD64", None, False),
        ("aarch64", None, True),
    ],
)
def test_vnni_is_read_from_the_processor(
    machine: str, flags: str | None, exact: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def read(self: Path, *_: object) -> str:
        if flags is None:
            raise OSError
        return flags

    monkeypatch.setattr(platform, "machine", lambda: machine)
    monkeypatch.setattr(Path, "read_text", read)
    assert device.adds_bytes_exactly() is exact


def test_calibration_reads_training_images_as_they_are_and_no_test_image() -> None:
    images = digits(pad=2, flip=True, validation=0.2)

    class Guarded:
        """Its training images may be had, nothing else."""

        def epoch(self, *given, **named):
            return images.epoch(*given, **named)

    batches = int8.calibration(Guarded())  # type: ignore[arg-type]
    assert sum(map(len, batches)) == 512
    trained = {image.numpy().tobytes() for image in images.normalise(images.train_images)}
    found = [image.numpy().tobytes() for batch in batches for image in batch]
    assert set(found) <= trained
    assert len(set(found)) > 500
    again = int8.calibration(Guarded())  # type: ignore[arg-type]
    assert all(torch.equal(a, b) for a, b in zip(batches, again, strict=True))


def test_calibration_takes_all_where_there_are_few(images: Path) -> None:
    streamed = sets.load(
        torch.device("cpu"), name="imagenet", root=str(images), image_size=32, flip=True, workers=0
    )
    first, second = ([b.clone() for b in int8.calibration(streamed)] for _ in range(2))
    assert sum(map(len, first)) == 18
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_the_same_images_give_the_same_bytes(models: dict[bool, bytes]) -> None:
    first, second, other = (
        int8.quantise(models[True], [scale * b for b in int8.calibration(digits())]).model
        for scale in (1, 1, 2)
    )
    assert first == second != other


def too_narrow(images: Data) -> list[Tensor]:
    """Images without contrast: every range is too narrow for those with."""
    return [0.02 * batch for batch, _ in images.epoch(32, 0, augmented=False)][:16]


def exported(path: Path) -> object:
    difference = {"max_abs_diff": 0.0, "max_abs_logit": 1.0, "images": 256, "agreement": 1.0}
    return lambda *_: (path, difference)


def test_what_loses_more_than_a_point_is_refused_and_leaves_nothing(
    path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(exporting, "export_run", exported(path))
    exporting.main([str(path.parent), "--int8", "--max-loss", "10"])
    there = {"config.yaml", "compact.pt", "compact.onnx"}
    assert {file.name for file in path.parent.iterdir()} == {*there, int8.FILE, int8.REPORT}
    assert "of 360 test images" in capsys.readouterr().out
    monkeypatch.setattr(int8, "calibration", too_narrow)
    with pytest.raises(SystemExit) as status:
        exporting.main([str(path.parent), "--int8"])
    assert status.value.code == 1
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.startswith("fpgm-export: --max-loss 1: int8 answers ")
    assert said.err.count("\n") == 1
    assert {file.name for file in path.parent.iterdir()} == there  # the earlier one is gone too
    offered = said.err.split("--max-loss ")[-1].split()[0]
    exporting.main([str(path.parent), "--int8", "--max-loss", offered])
    found = json.loads((path.parent / int8.REPORT).read_text())
    assert 1 < found["loss"] <= float(offered) < found["loss"] + 0.011
    assert (path.parent / int8.FILE).exists()


def test_no_images_to_calibrate_with_is_a_line_that_names_the_root(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    class Empty:
        def epoch(self, *_: object, **__: object):
            return iter(())

    with pytest.raises(DataError, match=r"dataset\.root: no training images to calibrate int8"):
        int8.calibration(Empty())  # type: ignore[arg-type]
    words = ("dataset=image_folder", f"dataset.root={tmp_path}/gone")
    (tmp_path / "config.yaml").write_text(json.dumps(compose(*words)))
    (tmp_path / "report.json").write_text("{}")
    with pytest.raises(SystemExit):
        exporting.main([str(tmp_path), "--int8"])
    said = capsys.readouterr().err
    assert f"dataset.root={tmp_path}/gone: no such directory" in said
    assert said.count("\n") == 1


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--int8", "--format", "pt2"], "--format pt2: int8 is made by ONNX Runtime's quantiser"),
        (["--max-loss", "2"], "--max-loss 2: only with --int8"),
        (["--int8", "--max-loss", "-1"], "--max-loss -1: points of accuracy, 0 or more"),
        (["--int8", "--max-loss", "nan"], "--max-loss nan: points of accuracy, 0 or more"),
    ],
)
def test_bad_words_are_named_before_anything_is_written(
    path: Path, words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    before = {file: file.stat().st_mtime_ns for file in path.parent.iterdir()}
    with pytest.raises(SystemExit):
        exporting.main([str(path.parent), *words])
    assert message in capsys.readouterr().err
    assert {file: file.stat().st_mtime_ns for file in path.parent.iterdir()} == before


def test_a_process_that_crashes_is_a_line_and_takes_nothing_with_it() -> None:
    with pytest.raises(ShippingError, match=r"^it crashes$"):
        contained("it crashes", os._exit, 11)
    assert contained("it crashes", divmod, 7, 3) == (2, 1)


@pytest.mark.parametrize(
    ("error", "why"),
    [
        (ShippingError("it crashes"), "it crashes"),
        (RuntimeError("Exception from there:\nShapes differ.\n\n"), "Shapes differ."),
    ],
)
def test_openvino_that_fails_is_a_warning_that_names_the_structure(
    path: Path, error: Exception, why: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr(int8, "find_spec", lambda name: object())
    monkeypatch.setattr(int8, "contained", fail)
    (warning,) = int8.deliver(path, digits(), "independent", 100)["warnings"]
    assert f"OpenVINO cannot run int8 of residual=independent ({why})" in warning
    assert "train with residual=shared or residual=inner" in warning
    assert (path.parent / int8.FILE).exists()
    assert "train with" not in int8.openvino_warning("compact", why, "shared")


@pytest.mark.slow
def test_openvino_runs_int8_without_scatters(models: dict[bool, bytes]) -> None:
    pytest.importorskip("openvino")
    made = int8.quantise(models[True], int8.calibration(digits()))
    assert int8.refused_by_openvino(made.model, IMAGE) is None


def measured(
    model: bytes, monkeypatch: pytest.MonkeyPatch, runtimes: list[str], why: str | None = None
) -> dict:
    """fpgm-latency --int8 of a model that stands for dense and compact."""
    network = nn.Sequential(nn.Conv2d(1, 1, 1), nn.Flatten())
    run = int8._Answers  # onnxruntime in the place of OpenVINO, in this process
    monkeypatch.setitem(latency.ONNX, "openvino", lambda model, *_: run(model))
    monkeypatch.setattr(latency, "contained", lambda _, function, *given: function(*given))
    monkeypatch.setattr(int8, "refused_by_openvino", lambda *_: why)
    monkeypatch.setattr(latency, "exported", lambda *_: model)
    return latency.measure_int8(network, network, digits(), runtimes, [1, 4], 1, "independent")


def test_latency_has_dense_and_compact_in_float_and_in_int8(
    models: dict[bool, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    found = measured(models[True], monkeypatch, ["torch", "onnxruntime", "openvino"])
    in_int8 = {"dense_int8_ms", "compact_int8_ms", "int8_speed_up"}
    for row in found["rows"]:
        assert row["dense_ms"] > 0
        if row["runtime"] == "torch":
            assert not in_int8 & set(row)
            continue
        assert in_int8 <= set(row)
        assert row["int8_speed_up"] == row["dense_ms"] / row["compact_int8_ms"]
        assert set(row["quartiles"]) == {"dense_ms", "compact_ms", *in_int8} - {"int8_speed_up"}
    assert found["warnings"] == ["torch: has no int8 here, its times are of float alone"]
    assert found["int8"]["compact"]["accuracy"]["int8"] > 60
    around = {"environment": {"processor": "p", "torch": "t"}, "threads": 1}
    macs = {"macs": {"dense": 2, "compact": 1, "ratio": 2.0}}
    text = latency.markdown({**around, **macs, **found})
    rows = [line for line in text.splitlines() if line.startswith("|")]
    assert "dense int8, ms | compact int8, ms" in rows[0]
    assert len({row.count("|") for row in rows}) == 1
    assert "torch: has no int8 here" in text
    plain = latency.markdown({**around, **macs, "rows": found["rows"]})
    assert "int8" not in plain


def test_what_openvino_cannot_run_is_left_out_and_said(
    models: dict[bool, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    found = measured(models[True], monkeypatch, ["openvino"], "shapes")
    for row in found["rows"]:
        assert row["compact_ms"] > 0
        assert not {"dense_int8_ms", "compact_int8_ms", "int8_speed_up"} & set(row)
    assert found["warnings"] == [
        f"{what}: OpenVINO cannot run int8 of residual=independent (shapes); train with "
        "residual=shared or residual=inner for OpenVINO"
        for what in ("dense", "compact")
    ]


def test_latency_in_int8_needs_a_run_and_onnxruntime(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(latency, "installed", lambda name: name == "torch")
    cases = {
        ("--arch", "resnet20", "--int8"): "--arch resnet20: --int8 needs a run",
        (str(tmp_path), "--int8"): "--int8: onnxruntime makes it; pip install 'fpgm[export]'",
    }
    for words, message in cases.items():
        with pytest.raises(SystemExit):
            latency.main([*words])
        assert message in capsys.readouterr().err


def test_a_network_that_cannot_be_quantised_is_an_error_of_one_line() -> None:
    with pytest.raises(ShippingError, match="int8: onnxruntime cannot quantise") as said:
        int8.quantise(b"no model", int8.calibration(digits())[:1])
    assert "\n" not in str(said.value)
