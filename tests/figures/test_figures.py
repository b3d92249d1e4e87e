"""The two figures from one command each: what is drawn, the numbers beside it, errors in a line."""

from __future__ import annotations

import csv
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from commands import compose
from PIL import Image
from torch import nn
from zoo import randomised

import fpgm
from fpgm.data import sets
from fpgm.figures import maps as figure
from fpgm.figures.command import main
from fpgm.figures.drawing import MOST_MAPS, _shown, save
from fpgm.figures.layer import pruned
from fpgm.page import axes
from fpgm.runs import checkpoint
from fpgm.study.subject import Subject

ROOT = Path(__file__).parent.parent.parent


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a finished run on the digits leaves of its network."""
    directory = tmp_path_factory.mktemp("run")
    arch = {"name": "resnet20", "num_classes": 10, "in_channels": 1}
    model = randomised(fpgm.model(**arch), 0)
    saved = {"arch": arch, "keep": {}, "state_dict": model.state_dict()}
    checkpoint.write(directory / "zeroed.pt", saved)
    (directory / "config.yaml").write_text(json.dumps(compose("dataset=digits")))
    return directory


def digits():
    return sets.load(torch.device("cpu"), **compose("dataset=digits")["dataset"])


def subject() -> Subject:
    torch.manual_seed(0)
    model = randomised(fpgm.model("resnet20", in_channels=1), 0)
    return Subject("a test", model, digits())


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_norms_are_drawn_with_their_numbers(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["norms", str(run), "--rate", ".2"])
    out = capsys.readouterr().out.splitlines()
    paths = [run / "figures" / f"norms.{kind}" for kind in ("png", "svg", "csv")]
    assert out[-1] == ", ".join(map(str, paths))
    assert out[0].startswith("conv1: norms of 16 filters, ")
    table = rows(paths[2])
    assert len(table) == 16 + 32 + 64
    gone = [r["filter"] for r in table if r["layer"] == "conv1" and r["pruned_gm"] == "1"]
    assert f"gm prunes {', '.join(gone)};" in out[0]
    svg = paths[1].read_text()
    for word in ("conv1, 16 filters", "gm prunes", "l2 prunes", "ideal for a norm criterion"):
        assert word in svg
    assert np.asarray(Image.open(paths[0]).convert("L")).std() > 10


def test_maps_are_drawn_with_their_numbers(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["maps", str(run), "--layer", "layer1.1.conv1", "--rate", ".2", "--draws", "3"])
    out = capsys.readouterr().out.splitlines()
    paths = [run / "figures" / f"maps-layer1.1.conv1.{kind}" for kind in ("png", "svg", "csv")]
    assert out[-1] == ", ".join(map(str, paths))
    table = rows(paths[2])
    trained = [r for r in table if r["weights"] == "trained"]
    assert len([r for r in trained if r["criterion"] == "gm"]) == 3
    assert len([r for r in trained if r["criterion"] == "random"]) == 3 * 3
    assert len([r for r in table if r["weights"] == "gaussian"]) == 3 * 3 * 3
    keep = fpgm.select(fpgm.load(run / "zeroed.pt"), rate=0.2)["layer1.1.conv1"].tolist()
    gone = [int(r["filter"]) for r in trained if r["criterion"] == "gm"]
    assert gone == sorted(set(range(16)) - set(keep))
    mean = np.mean([float(r["r2_maps"]) for r in trained if r["criterion"] == "gm"])
    line = next(line for line in out if line.startswith("gm "))
    assert line.split()[1] == f"{mean:.3f}"
    svg = paths[1].read_text()
    for word in ("pruned by gm", "pruned by l2", "test image 0", "Gaussian filters"):
        assert word in svg
    assert "pruned by random" not in svg  # it chooses anew each time
    framed = {int(at) for at in re.findall(r">(\d+) gm[ <]", svg)}
    assert framed == set(gone)
    assert np.asarray(Image.open(paths[0]).convert("L")).std() > 10


def test_r2_of_maps_is_that_of_the_convolutions_outputs() -> None:
    """Gathered batch by batch in the network, computed again from all outputs at once."""
    seen = figure.look(subject(), "layer2.0.conv2", ["gm", "random"], 0.25, 50, draws=2)
    # 50 training images of 4x4 pixels behind a stride
    assert (seen.images, seen.pixels) == (50, 50 * 16)
    one = subject()
    outputs: list[torch.Tensor] = []
    one.model.layer2[0].conv2.register_forward_hook(lambda *c: outputs.append(c[2].clone()))
    with torch.no_grad():
        for batch, _ in digits().epoch(figure.BATCH, figure.SEED, augmented=False):
            one.model(batch)
    points = torch.cat(outputs)[:50].movedim(1, -1).flatten(0, -2).double().numpy()
    gone = [r["filter"] for r in seen.rows if (r["weights"], r["criterion"]) == ("trained", "gm")]
    columns = np.column_stack((np.ones(len(points)), np.delete(points, gone, axis=1)))
    for row, place in zip(seen.rows, gone, strict=False):
        target = points[:, place]
        rest = target - columns @ np.linalg.lstsq(columns, target, rcond=None)[0]
        assert row["r2_maps"] == pytest.approx(1 - rest.var() / target.var(), abs=1e-6)
    picture = next(digits().tests(1))[0]
    with torch.no_grad():
        one.model(picture)
    torch.testing.assert_close(seen.maps, outputs[-1][0])
    torch.testing.assert_close((255 * seen.image).round().to(torch.uint8), digits().test_images[0])


def test_filters_in_another_order_have_the_same_r2() -> None:
    """With the BatchNorm behind and the reader's inputs the network is the same one."""
    one, other = subject(), subject()
    order = torch.randperm(16, generator=torch.Generator().manual_seed(1))
    block = other.model.layer1[1]
    with torch.no_grad():
        block.conv1.weight.copy_(block.conv1.weight[order])
        for values in (*block.bn1.parameters(), *block.bn1.buffers()):
            if values.ndim:
                values.copy_(values[order])
        block.conv2.weight.copy_(block.conv2.weight[:, order])
    here, there = (
        figure.look(s, "layer1.1.conv1", ["gm"], 0.2, draws=1).rows for s in (one, other)
    )
    trained = {int(r["filter"]): r for r in here if r["weights"] == "trained"}
    again = {int(order[r["filter"]]): r for r in there if r["weights"] == "trained"}
    assert trained.keys() == again.keys()
    for place, row in trained.items():
        assert row["r2_maps"] == pytest.approx(again[place]["r2_maps"], abs=1e-5)
        assert row["r2_filters"] == pytest.approx(again[place]["r2_filters"], abs=1e-9)


def test_of_a_pruned_network_only_what_lives_is_seen() -> None:
    one, whole = subject(), subject()
    keep = fpgm.select(one.model, rate=0.4)
    for model in (one.model, whole.model):
        fpgm.zero_(model, keep)
    layer = "layer2.1.conv1"
    seen = figure.look(one, layer, ["gm"], 0.2, draws=2)
    live = keep[layer]
    assert seen.filters.indices.tolist() == live.tolist()
    assert (
        f"{len(live)} filters, {32 - len(live)} zero ones left out" in figure.summary(seen, 0.2)[0]
    )
    assert {row["filter"] for row in seen.rows} <= set(live.tolist())
    of_null = [row["filter"] for row in seen.rows if row["weights"] == "gaussian"]
    null = [figure.gaussian(one.model, layer, draw)[live] for draw in range(2)]
    assert of_null == [int(live[at]) for weight in null for at in pruned(weight, "gm", 0.2)]
    outputs: list[torch.Tensor] = []
    whole.model.layer2[1].conv1.register_forward_hook(lambda *c: outputs.append(c[2].clone()))
    with torch.no_grad():
        whole.model(next(digits().tests(1))[0])
    torch.testing.assert_close(seen.maps, outputs[0][0][live])


def test_a_duplicate_that_gm_prunes_is_replaceable() -> None:
    one = subject()
    weight = one.model.layer1[0].conv1.weight
    with torch.no_grad():
        weight[5] = weight[2] = weight.mean(0)  # nearest to all others
    seen = figure.look(one, "layer1.0.conv1", ["gm"], 1 / 16, draws=1)
    (row,) = (r for r in seen.rows if r["weights"] == "trained")
    assert row["filter"] in (2, 5)
    assert row["r2_maps"] == pytest.approx(1, abs=1e-6)
    assert row["r2_filters"] == pytest.approx(1, abs=1e-9)


def test_the_null_is_of_other_filters_on_the_same_images() -> None:
    """A layer that three filters span is all explained, Gaussian ones on its inputs are not."""
    one = subject()
    weight = one.model.layer2[0].conv1.weight
    with torch.no_grad():
        weight.copy_(torch.einsum("nk,kchw->nchw", torch.randn(32, 3), weight[:3]))
    seen = figure.look(one, "layer2.0.conv1", ["gm"], 0.1, draws=2)
    for key in ("r2_maps", "r2_filters"):
        trained, null = (seen.mean(weights, "gm", key) for weights in figure.ROWS)
        assert trained == pytest.approx(1, abs=1e-6)
        assert null < 0.95


def test_maps_are_what_the_convolution_gives_though_what_follows_overwrites_them() -> None:
    model = nn.Sequential(
        nn.Conv2d(1, 8, 3), nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(8 * 36, 10)
    )
    seen = figure.look(Subject("a test", model, digits()), "0", ["gm"], 0.2, draws=1)
    assert seen.maps.min() < 0


def test_a_random_network_lies_on_the_null() -> None:
    torch.manual_seed(3)
    model = randomised(fpgm.model("resnet20", in_channels=1), 3)
    one = Subject("a test", model, digits())
    seen = figure.look(one, "layer3.0.conv1", ["random"], 0.25, draws=20)
    for key in ("r2_maps", "r2_filters"):
        trained, null = (seen.mean(weights, "random", key) for weights in figure.ROWS)
        assert trained == pytest.approx(null, abs=0.05)
    assert seen.mean("gaussian", "random", "r2_filters") == pytest.approx(48 / 288, abs=0.01)


def test_kept_filters_that_span_all_are_said_to(run: Path, capsys: pytest.CaptureFixture) -> None:
    main(["maps", str(run), "--draws", "1"])  # 15 kept filters of 3x3
    out = capsys.readouterr().out
    assert "15 kept filters of 9 weights span all that there are" in out
    table = rows(run / "figures" / "maps-conv1.csv")
    assert {row["r2_filters"] for row in table} == {""}
    assert all(float(row["r2_maps"]) > 1 - 1e-6 for row in table)
    assert "no filter is outside" in (run / "figures" / "maps-conv1.svg").read_text()


def test_by_default_there_are_pixels_enough() -> None:
    for layer, maps, size in (("layer1.0.conv1", 16, 64), ("layer3.2.conv2", 64, 4)):
        seen = figure.look(subject(), layer, ["gm"], 0.1, draws=1)
        assert seen.pixels == seen.images * size >= figure.PIXELS * maps
        assert seen.images >= figure.LEAST_IMAGES


def test_a_wide_layer_shows_its_pruned_maps_first() -> None:
    shown = _shown(300, {"gm": {7, 250}, "l2": {299}})
    assert len(shown) == MOST_MAPS
    assert {7, 250, 299} <= set(shown)
    assert shown == sorted(shown)
    assert _shown(10, {"gm": {3}}) == list(range(10))


def test_depthwise_convolutions_are_seen_too() -> None:
    model = nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1), nn.Conv2d(8, 16, 3, groups=8, bias=True), nn.Flatten(),
        nn.Linear(16 * 36, 10),
    )  # fmt: skip
    seen = figure.look(Subject("a test", model, digits()), "1", ["gm"], 0.1, draws=2)
    assert len(seen.rows) == 3


def test_the_same_drawing_gives_the_same_svg(tmp_path: Path) -> None:
    contents = set()
    for _ in "ab":
        drawing, plot = axes()
        plot.plot([1, 2], [3, 4])
        save(drawing, tmp_path, "it")
        contents.add((tmp_path / "it.svg").read_bytes())
    assert len(contents) == 1


def test_help_answers_without_torch() -> None:
    code = (
        "import sys; sys.modules.update(dict.fromkeys(('torch', 'scipy', 'matplotlib')));"
        "sys.argv = ['fpgm-figure', 'maps', '--help']; import fpgm.figures.__main__"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stderr
    assert "--layer" in done.stdout


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["norms", "RUN", "--rate", "0"], "--rate 0: must be above 0 and below 1"),
        (["maps", "RUN", "--rate", "1.5"], "--rate 1.5: must be above 0 and below 1"),
        (["norms", "RUN", "--layer", "conv2"], "--layer conv2: no such convolution; the nearest"),
        (["maps", "RUN", "--layer", "layer9"], "--layer layer9: no such convolution; the nearest"),
        (["norms", "RUN", "--criteria", "gn"], "--criteria gn: choose from"),
        (["maps", "RUN", "--criteria", "taylor"], "--criteria taylor: looks at more than"),
        (["maps", "RUN", "--criteria", "gm,gm"], "--criteria gm,gm: names one twice"),
        (["maps", "RUN", "--rate", ".01"], "prunes none of the 16 filters of conv1; try --rate"),
        (["maps", "RUN", "--image", "360"], "--image 360: must be 0 to 359, the test images"),
        (["maps", "RUN", "--images", "0"], "--images 0: must be at least 1 and at most 1437"),
        (["maps", "RUN", "--images", "9999"], "--images 9999: must be at least 1 and at most"),
        (
            ["maps", "RUN", "--layer", "layer3.0.conv1", "--images", "3"],
            "--images 3: 12 pixels for 64 maps of layer3.0.conv1: R^2 would be near 1 whatever "
            "they hold; at least --images 160",
        ),
        (["maps", "RUN", "--draws", "0"], "--draws 0: must be at least 1"),
        (["maps", "--arch", "resnet20"], "no images to look at the network with: give images"),
        (["norms"], "give a run directory, a checkpoint, or --arch"),
        (["norms", "nowhere"], "nowhere"),
    ],
)
def test_bad_words_are_named(
    run: Path, words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as status:
        main([str(run) if word == "RUN" else word for word in words])
    assert status.value.code == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("fpgm-figure: ")
    assert message in line
