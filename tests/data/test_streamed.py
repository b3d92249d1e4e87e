"""ImageNet's folders: read by workers, the same whoever reads them, bad files named."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from commands import report, run

from fpgm.data.folder import open_image
from fpgm.data.images import Images
from fpgm.data.sets import load
from fpgm.errors import CheckpointError, DataError, Error
from fpgm.machine.ranks import Ranks
from fpgm.networks import models
from fpgm.training.pretrained import load_pretrained

CPU = torch.device("cpu")
WORDS = ("dataset=imagenet", "dataset.root=images", "dataset.image_size=64", "dataset.workers=1",
         "arch=resnet18", "epochs=1", "batch_size=8", "rate=0.3", "hydra.run.dir=r")  # fmt: skip


def stream_of(root: Path, workers: int = 0, flip: bool = True) -> Images:
    return load(CPU, name="imagenet", root=str(root), image_size=32, flip=flip, workers=workers)


def test_imagenet_is_trained_pruned_and_reported(images: Path, tmp_path: Path) -> None:
    status, out, err = run(tmp_path, *WORDS)
    assert status == 0, err
    r = report(tmp_path / "r")
    assert "18 + 6 images of 3x64x64, 2 classes" in out + err
    assert r["equivalence"]["images"] == 6
    assert r["equivalence"]["max_abs_diff"] <= 1e-5 * r["equivalence"]["max_abs_logit"]


def test_an_epoch_follows_from_its_seed_whoever_decodes(images: Path) -> None:
    passes = []
    for workers in (0, 2):
        stream = stream_of(images, workers)
        for _ in range(2):  # the second time by workers that are there already
            passes.append(list(stream.epoch(8, seed=5)))
    assert [len(labels) for _, labels in passes[0]] == [8, 8, 2]
    for other in passes[1:]:
        for (a, b), (c, d) in zip(passes[0], other, strict=True):
            assert torch.equal(a, c)
            assert torch.equal(b, d)
    different = next(iter(stream_of(images).epoch(8, seed=6)))
    assert not torch.equal(different[0], passes[0][0][0])


def test_an_image_s_seed_is_torch_s_and_leaves_no_trace(images: Path) -> None:
    files = stream_of(images)._loaders["train"].dataset
    before = torch.get_rng_state()
    found, _ = files[3, 7]
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(7)
    assert torch.equal(found, files._transform(open_image(files._files[3][0])))


def test_held_out_images_are_never_trained_on(images: Path) -> None:
    whole = stream_of(images)
    assert (whole.held_out_count, list(whole.held_out(4))) == (0, [])
    stream = load(CPU, name="imagenet", root=str(images), image_size=32, workers=0, validation=0.25)
    assert (stream.counts, stream.held_out_count) == ((14, 6), 4)
    files = {part: stream._loaders[part].dataset._files for part in ("train", "plain", "held")}
    assert files["train"] == files["plain"]
    assert sorted([*files["train"], *files["held"]]) == whole._loaders["train"].dataset._files
    held = list(stream.held_out(3))
    assert [len(labels) for _, labels in held] == [3, 1]  # in order, a single image too
    assert torch.cat([labels for _, labels in held]).tolist() == [
        label for _, label in files["held"]
    ]
    # Cut from the middle, as when testing, and nothing at random.
    again = torch.cat([pixels for pixels, _ in stream.held_out(4)])
    assert torch.equal(again, torch.cat([pixels for pixels, _ in held]))
    assert torch.equal(torch.cat([x for x, _ in stream.held_out(4, at_most=2)]), again[[0, 2]])
    assert sum(len(labels) for _, labels in stream.epoch(8, seed=0)) == 14


def test_ranks_read_one_batch_between_them(images: Path) -> None:
    stream = stream_of(images)
    whole = list(stream.epoch(8, seed=1))
    parts = [list(stream.epoch(8, 1, Ranks(rank, 2))) for rank in range(2)]
    for i in range(2):
        assert torch.equal(whole[i][0], torch.cat([part[i][0] for part in parts]))
    tests = [labels for rank in range(2) for _, labels in stream.tests(4, Ranks(rank, 2))]
    assert torch.cat(tests).tolist() == [0, 0, 0, 1, 1, 1]


def test_a_corrupt_image_is_named_and_stops_the_run(images: Path, tmp_path: Path) -> None:
    bad = images / "train" / "n01440764" / "n01440764_3.JPEG"
    bad.write_bytes(bad.read_bytes()[:200])
    status, _, err = run(tmp_path, *WORDS)
    assert status == 1
    assert "n01440764_3.JPEG: not a readable image" in err
    assert "dataset.on_error=skip goes on without it" in err
    assert "Traceback" not in err


def test_a_corrupt_image_is_skipped_where_that_is_asked_for(images: Path, tmp_path: Path) -> None:
    for part in ("train", "val"):
        (images / part / "n01440764" / "n01440764_1.JPEG").write_bytes(b"no image")
    status, out, err = run(tmp_path, *WORDS, "dataset.on_error=skip")
    assert status == 0, err
    for part in ("train", "val"):
        assert f"left out: images/{part}/n01440764/n01440764_1.JPEG" in out
    assert report(tmp_path / "r")["equivalence"]["images"] == 5


def test_flip_false_leaves_images_as_they_lie(images: Path) -> None:
    transforms = [
        [type(step).__name__ for step in stream._loaders["train"].dataset._transform.transforms]
        for stream in (stream_of(images, flip=flip) for flip in (True, False))
    ]
    assert "RandomHorizontalFlip" in transforms[0]
    assert "RandomHorizontalFlip" not in transforms[1]


def test_a_root_without_val_is_named(images: Path) -> None:
    (images / "val").rename(images / "validation")
    with pytest.raises(DataError, match=r"images/val: needs a folder of images for each class"):
        stream_of(images)


def test_torchvision_s_weights_are_loaded_where_they_can_be_had(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    theirs = models.model("resnet18", num_classes=1000)
    kind = type(models.torchvision.models.get_model_weights("resnet18").IMAGENET1K_V1)
    monkeypatch.setattr(kind, "get_state_dict", lambda *_, **__: theirs.state_dict())
    ours = models.model("resnet18", num_classes=1000)
    load_pretrained(ours, {"name": "resnet18"}, "torchvision")
    assert torch.equal(ours.conv1.weight, theirs.conv1.weight)
    with pytest.raises(CheckpointError, match=r"pretrained=torchvision, resnet18: .* fc.weight"):
        load_pretrained(models.model("resnet18"), {"name": "resnet18"}, "torchvision")
    with pytest.raises(Error, match=r"no weights for arch=resnet20, only for resnet18"):
        load_pretrained(models.model("resnet20"), {"name": "resnet20"}, "torchvision")

    def offline(*_: object, **__: object) -> None:
        raise OSError("<urlopen error no route>")

    monkeypatch.setattr(kind, "get_state_dict", offline)
    with pytest.raises(CheckpointError, match=r"the download failed .*no route"):
        load_pretrained(ours, {"name": "resnet18"}, "torchvision")
