"""A network of timm's or one's own is trained, pruned, resumed, loaded and reported like any."""

from __future__ import annotations

import importlib
import re
import sys
from pathlib import Path

import pytest
import timm
import torch
import yaml
from commands import compose, numbers, run
from finished import a_run
from tasks import cut_short, few, made, whole
from torch import nn

import fpgm
from fpgm.errors import CheckpointError, Error
from fpgm.networks.elsewhere import build
from fpgm.networks.modes import partly_read
from fpgm.report.cells import cells
from fpgm.report.collect import collect
from fpgm.report.command import main as fpgm_report
from fpgm.report.sweep import sweep
from fpgm.runs.grid import opened, runs
from fpgm.runs.run import read_config
from fpgm.shipping.export import export_run
from fpgm.training.asked import asked

__all__ = ["few"]  # a fixture

TINY = ("arch=own", "arch.build=own_networks:tiny")
SMALL = ("arch=timm", "arch.name=mobilenetv3_small_050")
DIGITS = ("dataset=digits", "precision=float32", "device=cpu")


@pytest.mark.parametrize("words", [(*TINY, "++arch.width=6"), SMALL])
def test_a_network_from_elsewhere_resumes_loads_and_exports(
    words: tuple[str, ...], tmp_path: Path, few: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole(tmp_path / "a", *words)
    cut_short(tmp_path / "b", monkeypatch, *words)
    whole(tmp_path / "b", *words)
    assert numbers(tmp_path / "a") == numbers(tmp_path / "b")
    networks = [fpgm.load(tmp_path / "a" / name) for name in ("compact.pt", "zeroed.pt")]
    images = torch.randn(4, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    small, full = (network(images) for network in networks)
    assert (small - full).abs().max() <= 1e-5 * full.abs().max()
    measured = numbers(tmp_path / "a")
    assert fpgm.cost(networks[0], (1, 8, 8)).macs == measured["compact"]["macs"]
    path, difference = export_run(tmp_path / "a", "pt2", dynamic=False)
    assert path.exists()
    assert difference["agreement"] == 1


def test_own_network_goes_through_the_commands_with_its_arguments(tmp_path: Path) -> None:
    words = ("dataset=digits", "epochs=1", "arch=own", "arch.build=own_networks:tiny")
    status, out, err = run(tmp_path, "--multirun", *words, "arch.width=4,6", "rate=0.5")
    assert status == 0, err
    assert "own_networks:tiny width=4 on digits" in out
    name = "arch.build=own_networks_tiny,arch.width={},arch=own,dataset=digits,epochs=1,rate=0.5"
    places = [tmp_path / "outputs" / name.format(width) for width in (4, 6)]
    assert [next(fpgm.load(p).parameters()).shape[0] for p in places] == [2, 3]
    assert read_config(places[0])["arch"] == {
        "source": "own", "build": "own_networks:tiny", "width": 4,
    }  # fmt: skip
    status, out, _ = run(tmp_path, *words, "rate=0.5", "arch.width=4")
    assert (status, "is done already" in out) == (0, True)
    fpgm_report([str(tmp_path / "outputs")])
    table = (tmp_path / "outputs" / "summary.md").read_text()
    assert "digits own_networks:tiny width=4" in table
    assert "digits own_networks:tiny width=6" in table


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["arch=own"], "arch.build=null: which network? arch=timm arch.name=NAME or arch=own"),
        (["arch=timm"], "arch.name=null: which network?"),
        (["arch=timm", "arch.name=mobilenetv3_larg_100"], "did you mean mobilenetv3_large_100,"),
        (["arch=timm", "arch.name=zzz"], "timm.list_models() has the names"),
        ([*SMALL[:1], f"{SMALL[1]}.x"], "choose one of mobilenetv3_small_050.lamb_in1k"),
        ([*SMALL, "arch.foo=1"], "arch.foo=1: timm says MobileNetV3.__init__() got an unexpected"),
        ([*SMALL, "arch.pretrained=true"], "arch.pretrained=True: not an option here, weights"),
        ([*SMALL, "+arch.build=a:b"], "arch.build=a:b: not with arch=timm"),
        ([*SMALL, "pretrained=torchvision"], "torchvision has no weights for arch=timm:mobilenet"),
        (["arch=timm", "arch.name=vit_tiny_patch16_224"], "images of 1x8x8 make it raise Assert"),
        (["arch=own", "arch.build=no_such:net"], "cannot be imported (No module named 'no_such')"),
        (["arch=own", "arch.build=own_networks"], "write package.module:function"),
        (["arch=own", "arch.build=own_networks:net"], "has no attribute 'net'"),
        (["arch=own", "arch.build=own_networks:thing"], "is an int, not a function or class"),
        (["arch=own", "arch.build=own_networks:nothing"], "returned a list, not a torch.nn.Module"),
        (["arch=own", "arch.build=own_networks:fixed"], "gives (1, 7) for one image, not (1, 10)"),
        (["arch=own", "arch.build=own_networks:large"], "images of 1x8x8 make it raise Runtime"),
        (["arch=own", "arch.build=own_networks:wants"], "arch.depth: missing, own_networks:wants"),
        (["arch=own", "arch.build=own_networks:linear"], "nothing of it can be pruned (no conv"),
        ([*TINY, "ignore=['*']"], "nothing of it can be pruned (0: ignore=*); rate=0 trains it"),
        ([*TINY, "arch.widht=3"], "arch.widht=3: own_networks:tiny takes no such argument, did you "
         "mean width?"),
        ([*TINY, "arch.num_classes=3"], "arch.num_classes=3: not an option here, the images say"),
        ([*TINY, "pretrained=timm"], "pretrained=timm: only with arch=timm arch.name=NAME"),
        (["arch.width=3"], "arch.width=3: only with arch=timm arch.name=NAME or arch=own"),
        (["arch=resnet20", "pretrained=timm"], "pretrained=timm: only with arch=timm"),
    ],
    ids=lambda value: " ".join(value[-1:]) if isinstance(value, list) else "",
)  # fmt: skip
def test_a_network_that_is_not_there_is_said_in_one_line(
    words: list[str], message: str, tmp_path: Path, few: None
) -> None:
    with pytest.raises(Error) as error:
        made(tmp_path, *map(opened, words))
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_the_line_of_ones_own_code_is_named_where_it_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "wrong_at_the_top.py").write_text("x = 1\ny = x / 0\n")
    (tmp_path / "no_python.py").write_text("x = 1\nx = = 2\n")
    source = importlib.import_module("own_networks").__file__
    lines = Path(str(source)).read_text().splitlines()
    place = 1 + next(i for i, line in enumerate(lines) if "groups=7" in line)
    wanted = {
        "wrong_at_the_top:net": rf"ZeroDivisionError: .*, at {tmp_path}/wrong_at_the_top.py:2\)",
        "no_python:net": rf"SyntaxError: .*, at {tmp_path}/no_python.py:2\)",
        "own_networks:broken": rf"building raised ValueError: .*, at {source}:{place}$",
    }
    for name, message in wanted.items():
        with pytest.raises(Error, match=f"^arch.build={name}: .*{message}"):
            build(name, 10, 1, {})


def test_keys_of_a_network_that_has_none_are_refused_on_the_command_line(tmp_path: Path) -> None:
    status, _, err = run(tmp_path, "arch.name=mobilenetv3_small_050")
    assert status == 1
    assert err.strip() == (
        "arch.name: only with arch=timm arch.name=NAME or arch=own arch.build=MODULE:NAME"
    )


def test_without_timm_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(Error, match=r"^arch=timm: needs timm .* pip install 'fpgm\[timm\]'"):
        asked(compose(*SMALL))


def test_classes_and_channels_go_to_those_who_take_them() -> None:
    assert build("own_networks:plain", 5, 3, {})[-1].out_features == 5
    assert build("own_networks:narrow", 5, 3, {})[0].out_channels == 4
    assert build("own_networks:handed_on", 5, 3, {})[0].in_channels == 1
    assert build("own_networks:tiny", 5, 3, {})[0].in_channels == 3
    assert build("own_networks:tiny", 5, 3, {})[-1].out_features == 5
    assert fpgm.model("timm:mobilenetv3_small_050.lamb_in1k", 7, 2).conv_stem.in_channels == 2
    assert fpgm.model("torchvision.models:mobilenet_v2", 7).classifier[1].out_features == 7
    with pytest.raises(Error, match=r"^arch=resnet20: takes no width"):
        fpgm.model("resnet20", width=3)


def test_a_network_from_elsewhere_is_read_without_unpickling_it(tmp_path: Path, few: None) -> None:
    whole(tmp_path / "a", *TINY, "++arch.width=4", "epochs=1")
    arch = torch.load(tmp_path / "a" / "compact.pt", weights_only=True)["arch"]
    assert arch == {
        "name": "own_networks:tiny", "num_classes": 10, "in_channels": 1, "width": 4,
    }  # fmt: skip


def test_kernels_wider_than_their_maps_are_not_trained_in_bf16_on_a_cpu(
    tmp_path: Path, few: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """torch leaves the gradient of taps that meet only padding as memory has it: NaN, at times."""
    monkeypatch.setattr("fpgm.machine.device.has_bf16", lambda _: True)
    assert made(tmp_path / "a", *SMALL, "precision=auto").precision is None
    assert made(tmp_path / "b", *TINY, "precision=auto").precision is torch.bfloat16
    with pytest.raises(Error, match=r"^precision=bf16: the kernel of blocks.1.0.conv_dw is wider"):
        made(tmp_path / "c", *SMALL, "precision=bf16")
    small = timm.create_model("mobilenetv3_small_050")
    assert partly_read(small, (3, 224, 224)) is None
    assert partly_read(nn.Conv2d(2, 2, 3, 2, padding=1, groups=2), (2, 1, 4)) == ""
    assert partly_read(nn.Conv2d(2, 2, 3, 2, padding=1), (2, 1, 4)) is None


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("os:system", "is a part of Python, not a network"),
        ("subprocess:Popen", "is a part of Python"),
        (
            "torch.hub:load",
            "does not say that it returns a torch.nn.Module, as installed code must",
        ),
        ("own_networks:run", "does not say that it returns"),
        ("own_networks:Popen", "is a class, and not a torch.nn.Module"),
        ("own_networks:no_attribute", "has no attribute"),
    ],
)
def test_a_checkpoint_cannot_make_load_run_something_else(
    name: str, message: str, tmp_path: Path
) -> None:
    arch = {"name": name, "num_classes": 10, "in_channels": 1, "args": ["touch", str(tmp_path)]}
    torch.save({"arch": arch, "keep": {}, "state_dict": {}}, tmp_path / "evil.pt")
    with pytest.raises(Error, match=f"^arch.build={name}: .*{message}"):
        fpgm.load(tmp_path / "evil.pt")


@pytest.fixture
def weights(tmp_path: Path) -> str:
    """Weights of timm's for 1000 classes, in place of its download."""
    torch.manual_seed(1)
    theirs = timm.create_model("mobilenetv3_small_050")
    for value in theirs.state_dict().values():
        if value.is_floating_point():
            value.uniform_(0.5, 1)
    torch.save(theirs.state_dict(), tmp_path / "theirs.pth")
    return f"++arch.pretrained_cfg_overlay.file={tmp_path / 'theirs.pth'}"


def folder(images: Path) -> tuple[str, ...]:
    words = ("dataset=image_folder", f"dataset.root={images}", "dataset.image_size=32")
    return (*words, "batch_size=6", "epochs=1", "optimizer.lr=1e-6")


def test_weights_and_constants_of_timm_are_started_from(
    images: Path, weights: str, tmp_path: Path
) -> None:
    words = (*folder(images), *SMALL, weights)
    task = made(tmp_path / "a", *words, "pretrained=timm")
    theirs = torch.load(tmp_path / "theirs.pth", weights_only=True)
    ours = made(tmp_path / "a", *words, "pretrained=timm", "rate=0").full.network.state_dict()
    body = [name for name in theirs if not name.startswith("classifier.")]
    assert all(torch.equal(ours[name], theirs[name]) for name in body)
    assert ours["classifier.weight"].shape[0] == 2
    wanted = pytest.approx([0.485, 0.456, 0.406])
    assert task.preprocessing["mean"] == wanted
    assert made(tmp_path / "b", *words).preprocessing["mean"] != wanted  # at random: the images'
    chosen = ("dataset.mean=[0.5,0.5,0.5]", "dataset.std=[0.25,0.25,0.25]", "pretrained=timm")
    assert made(tmp_path / "c", *words, *chosen).preprocessing["mean"] == [0.5, 0.5, 0.5]
    # What is trained from there goes on with the same constants, also where it is resumed.
    whole(tmp_path / "d", *words, "pretrained=timm", "rate=0")
    (tmp_path / "theirs.pth").unlink()
    assert made(tmp_path / "d", *words, "pretrained=timm", "rate=0").preprocessing["mean"] == wanted
    begun = (tmp_path / "e", *words, f"pretrained={tmp_path / 'd'}", "rate=0")
    whole(*begun)
    (tmp_path / "d").rename(tmp_path / "gone")
    assert made(*begun).preprocessing["mean"] == wanted
    with pytest.raises(CheckpointError, match=r"^pretrained=timm: no weights for arch.name=mobile"):
        made(tmp_path / "f", *words, "pretrained=timm")


def test_a_last_layer_at_random_is_no_teacher(images: Path, weights: str, tmp_path: Path) -> None:
    words = (*folder(images), *SMALL, weights, "pretrained=timm", "method=distillation")
    with pytest.raises(Error, match=r"tell 1000 classes, so that the last layer for 2 starts"):
        made(tmp_path / "a", *words)


def test_the_start_is_the_same_network_for_the_teacher(images: Path, tmp_path: Path) -> None:
    words = (*folder(images), *TINY)
    whole(tmp_path / "a", *words, "rate=0")
    task = made(tmp_path / "b", *words, f"pretrained={tmp_path / 'a'}", "rate=0")
    ours, theirs = task.full.network.state_dict(), task.given().state_dict()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_constants_are_those_that_ones_own_network_names(images: Path, tmp_path: Path) -> None:
    words = (*folder(images), "arch=own", "arch.build=own_networks:Normalised")
    named = made(tmp_path / "a", *words)
    assert named.preprocessing["mean"] == pytest.approx([0.1, 0.2, 0.3])
    assert named.preprocessing["std"] == pytest.approx([0.4, 0.5, 0.6])
    plain = made(tmp_path / "b", *folder(images), *TINY)
    for (ours, _), (usual, _) in zip(named.batches(2), plain.batches(2), strict=True):
        m, s = (torch.tensor(plain.preprocessing[key]).view(1, 3, 1, 1) for key in ("mean", "std"))
        a, b = (torch.tensor(x).view(1, 3, 1, 1) for x in (Normal.mean, Normal.std))
        torch.testing.assert_close(ours, (usual * s + m - a) / b)


class Normal:
    mean, std = (0.1, 0.2, 0.3), (0.4, 0.5, 0.6)


def test_tables_by_layer_are_for_one_network(tmp_path: Path, few: None) -> None:
    whole(tmp_path / "a", *TINY, "++arch.width=6", "epochs=1", "rate=0.5")
    widths = f"widths={tmp_path / 'a'}"
    report = whole(tmp_path / "b", *TINY, "++arch.width=6", "epochs=1", widths)
    assert [layer["kept"] for layer in report["layers"]][:2] == [3, 6]
    with pytest.raises(Error, match=r"is for arch=own_networks:tiny width=6, not arch=resnet20$"):
        asked(compose("dataset=digits", widths))
    table = {"arch": {"source": "own", "build": "own_networks:tiny"}, "rates": {"0": 0.25}}
    (tmp_path / "rates.yaml").write_text(yaml.safe_dump(table))
    rates = f"rates={tmp_path / 'rates.yaml'}"
    assert asked(compose(*DIGITS, *TINY, rates)).rates == {"0": 0.25}
    with pytest.raises(Error, match=r"is for arch=own_networks:tiny, not arch=own_net.* width=6$"):
        asked(compose(*DIGITS, *TINY, "++arch.width=6", rates))


def test_rows_of_a_grid_take_networks_and_their_arguments() -> None:
    rows = [
        {"arch": "timm", "arch.name": ["mobilenetv3_small_050", "resnet18"]},
        {"arch": "own", "arch.build": "own_networks:tiny", "arch.width": 4},
        {"arch": "resnet20"},
    ]
    networks = [asked(compose(*words)).network for words in runs(rows)]
    assert networks == [
        "timm:mobilenetv3_small_050", "timm:resnet18", "own_networks:tiny", "resnet20",
    ]  # fmt: skip


def test_a_report_sweeps_over_networks_of_timm_and_arguments_of_ones_own(tmp_path: Path) -> None:
    for width in (4, 8):
        a_run(tmp_path / "own" / f"{width}", *TINY, f"++arch.width={width}", "dataset=digits")
    for name in ("resnet18", "resnet34"):
        a_run(tmp_path / "timm" / name, "arch=timm", f"arch.name={name}", "dataset=digits")
    (line,) = sweep(cells(collect([tmp_path / "own"])), "arch.width").lines
    assert [value for value, _ in line.points] == [4, 8]
    assert not re.search("width", line.name)
    (line,) = sweep(cells(collect([tmp_path / "timm"])), "arch.name").lines
    assert [value for value, _ in line.points] == ["resnet18", "resnet34"]
    assert "resnet" not in line.name
