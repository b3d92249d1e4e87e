"""The images that a network sees: the right ones, augmented as in the papers, read once."""

from __future__ import annotations

import itertools
import pickle
from pathlib import Path
from urllib.error import URLError

import numpy as np
import pytest
import torch
import torchvision
from commands import compose
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from tasks import whole

from fpgm.data import memory
from fpgm.data.images import divided, spaced, steps
from fpgm.data.sets import _moments, load
from fpgm.errors import DataError
from fpgm.machine.ranks import Ranks
from fpgm.training.asked import asked

CPU = torch.device("cpu")


def images(name: str, root: Path | None = None, size: int | None = None, **more) -> memory.Data:
    return load(CPU, name=name, root=root and str(root), image_size=size, pad=4, flip=True, **more)


def test_images_that_do_not_fit_into_the_gpu_get_a_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(torch.Tensor, "to", full)
    with pytest.raises(DataError, match=r"dataset=digits: 0\.0 GiB .* dataset=imagenet reads"):
        images("digits")


@pytest.fixture
def photos(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two classes, three training and two test images each, JPEG and PNG, of several sizes."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    root = tmp_path / "photos"
    for part, count in (("train", 3), ("test", 2)):
        for label, name in enumerate(("cat", "dog")):
            (root / part / name).mkdir(parents=True)
            for i in range(count):
                pixels = np.full((20 + 4 * i, 24, 3), 60 + 100 * label + i, np.uint8)
                Image.fromarray(pixels).save(root / part / name / f"{i}.{'png' if i else 'jpg'}")
    return root


def test_digits_are_all_there_in_a_fixed_stratified_split() -> None:
    digits = images("digits")
    assert digits.train_images.shape == (1437, 1, 8, 8)
    assert digits.test_images.shape == (360, 1, 8, 8)
    assert digits.train_images.dtype == torch.uint8
    assert digits.train_images.max() == 255
    shares = [y.bincount().double() / len(y) for y in (digits.train_labels, digits.test_labels)]
    assert (shares[0] - shares[1]).abs().max() < 0.005
    again = images("digits")
    assert torch.equal(digits.train_images, again.train_images)
    pixels = digits.normalise(digits.train_images)
    assert pixels.mean().abs() < 1e-5
    assert pixels.std() == pytest.approx(1, abs=1e-3)


@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
def test_cifar_is_read_through_torchvision_from_its_own_files(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cls = {"cifar10": torchvision.datasets.CIFAR10, "cifar100": torchvision.datasets.CIFAR100}[name]
    rng = np.random.default_rng(0)
    folder = tmp_path / cls.base_folder
    folder.mkdir()
    key = "labels" if name == "cifar10" else "fine_labels"
    pixels = {}
    for file, _ in [*cls.train_list, *cls.test_list]:
        pixels[file] = rng.integers(0, 256, (20, 3072), np.uint8)
        batch = {"data": pixels[file], key: [i % 10 for i in range(20)]}
        (folder / file).write_bytes(pickle.dumps(batch))
    names = [f"class {i}" for i in range(10)]
    meta = {cls.meta["key"]: names}
    (folder / cls.meta["filename"]).write_bytes(pickle.dumps(meta))
    # The files are made here, so their checksums are the only thing that is not the real one.
    monkeypatch.setattr("torchvision.datasets.utils.check_md5", lambda *_, **__: True)
    constants = {key: compose(f"dataset={name}")["dataset"][key] for key in ("mean", "std")}
    found = images(name, tmp_path, **constants)
    assert found.train_images.shape == (20 * len(cls.train_list), 3, 32, 32)
    first = pixels[cls.train_list[0][0]][0].reshape(3, 32, 32)
    assert np.array_equal(found.train_images[0].numpy(), first)
    assert found.test_labels.tolist() == [i % 10 for i in range(20)]
    assert found.classes == tuple(names)
    published = {
        "cifar10": ([125.3, 123.0, 113.9], [63.0, 62.1, 66.7]),
        "cifar100": ([129.3, 124.1, 112.4], [68.2, 65.4, 70.4]),
    }[name]
    assert (255 * found.mean).tolist() == pytest.approx(published[0])
    assert (255 * found.std).tolist() == pytest.approx(published[1])


@pytest.fixture
def digits28(tmp_path: Path) -> Path:
    """MNIST's four files as torchvision unpacks them, 30 + 20 images: magic number and sizes as
    big-endian integers, then bytes."""
    rng = np.random.default_rng(0)
    raw = tmp_path / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for part, count in (("train", 30), ("t10k", 20)):
        for kind, values in (
            ("images-idx3", rng.integers(0, 256, (count, 28, 28))),
            ("labels-idx1", np.arange(count) % 10),
        ):
            header = np.array([0x0800 + values.ndim, *values.shape], ">i4")
            path = raw / f"{part}-{kind}-ubyte"
            path.write_bytes(header.tobytes() + values.astype(np.uint8).tobytes())
    return tmp_path


def test_mnist_is_read_through_torchvision_from_its_own_files(digits28: Path) -> None:
    constants = {key: compose("dataset=mnist")["dataset"][key] for key in ("mean", "std")}
    found = images("mnist", digits28, **constants)
    assert found.train_images.shape == (30, 1, 28, 28)
    assert found.test_images.shape == (20, 1, 28, 28)
    written = (digits28 / "MNIST/raw/train-images-idx3-ubyte").read_bytes()[16:]
    assert found.train_images.numpy().tobytes() == written
    assert found.test_labels.tolist() == [i % 10 for i in range(20)]
    assert found.test_labels.dtype == torch.int64
    assert len(found.classes) == 10
    assert (found.mean.tolist(), found.std.tolist()) == (
        pytest.approx([0.1307]), pytest.approx([0.3081])
    )  # fmt: skip


def test_mnist_is_neither_mirrored_nor_moved() -> None:
    dataset = asked(compose("dataset=mnist")).dataset
    assert (dataset.flip, dataset.pad) == (False, 0)


@pytest.mark.parametrize("length", [0, 3, 20])
@pytest.mark.parametrize("file", ["train-images-idx3-ubyte", "t10k-labels-idx1-ubyte"])
def test_mnist_that_was_cut_off_says_what_to_delete(digits28: Path, file: str, length: int) -> None:
    path = digits28 / "MNIST" / "raw" / file
    path.write_bytes(path.read_bytes()[:length])
    with pytest.raises(DataError, match=r"dataset=mnist: the files in .*raw are damaged .*delete"):
        images("mnist", digits28)


def test_lenet5_trains_on_mnist_and_ships_an_equal_network(digits28: Path) -> None:
    root = f"dataset.root={digits28}"
    report = whole(digits28 / "r", "arch=lenet5", "dataset=mnist", root, "epochs=1", "rate=0.5")
    assert report["status"] == "done"
    assert report["equivalence"]["agreement"] == 1
    assert report["dense"]["macs"] == 2_293_000
    widths = {layer["name"]: layer["kept"] for layer in report["layers"]}
    assert (widths["conv1"], widths["conv2"]) == (10, 25)


@pytest.mark.parametrize("arch", ["vgg11", "vgg13", "vgg16", "vgg19"])
def test_vgg_on_cifar10_has_its_own_constants_and_recipe(arch: str) -> None:
    config = asked(compose(f"arch={arch}"))
    assert config.arch == arch
    assert config.dataset.mean == [0.4914, 0.4822, 0.4465]
    assert config.dataset.std == [0.2023, 0.1994, 0.2010]
    assert (config.epochs, config.batch_size) == (160, 64)
    o = config.optimizer
    assert (o.lr, o.gamma, o.milestones) == (0.1, 0.1, [0.5, 0.75])
    assert (o.weight_decay, o.nesterov) == (1e-4, False)
    word = f"arch={arch}"
    assert compose(word, "dataset=cifar100")["dataset"]["mean"] == [129.3, 124.1, 112.4]
    assert compose(word, "dataset=image_folder")["dataset"]["mean"] is None
    assert compose("experiment=quick", word)["dataset"]["mean"] == [0.4914, 0.4822, 0.4465]


def test_constants_are_read_in_either_scale_and_for_each_channel(photos: Path) -> None:
    bytes_ = images("image_folder", photos, mean=[51, 102, 153], std=[51, 51, 51])
    shares = images("image_folder", photos, mean=[0.2, 0.4, 0.6], std=[0.2, 0.2, 0.2])
    assert torch.allclose(bytes_.mean, shares.mean)
    assert torch.allclose(bytes_.std, shares.std)
    assert bytes_.preprocessing()["mean"] == pytest.approx([0.2, 0.4, 0.6])
    with pytest.raises(DataError, match=r"dataset.mean.*\[0.5\] for images of 3 channels"):
        images("image_folder", photos, mean=[0.5], std=[0.5])


@pytest.mark.parametrize(
    ("name", "file"),
    [("cifar10", "cifar-10-python.tar.gz"), ("mnist", "train-images-idx3-ubyte.gz, train-labels")],
)
def test_missing_images_without_a_network_are_told_what_to_do(
    name: str, file: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def offline(*_: object, **__: object) -> None:
        raise URLError("Name or service not known")

    module, place = ("mnist", tmp_path / "MNIST" / "raw") if name == "mnist" else ("cifar", "there")
    monkeypatch.setattr(f"torchvision.datasets.{module}.download_and_extract_archive", offline)
    with pytest.raises(DataError) as caught:
        images(name, tmp_path)
    for part in (f"dataset={name}: not in dataset.root={tmp_path}", file, str(place), "=digits"):
        assert part in str(caught.value)
    assert "\n" not in str(caught.value)


def test_image_folder_finds_classes_and_size_and_is_decoded_once(
    photos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = images("image_folder", photos)
    assert found.classes == ("cat", "dog")
    assert found.train_images.shape == (6, 3, 20, 20)
    assert found.train_labels.tolist() == [0, 0, 0, 1, 1, 1]
    assert (found.train_images[3:].float().mean() - 161).abs() < 2
    monkeypatch.setattr("fpgm.data.folder._square", None)  # decoding again would fail now
    again = images("image_folder", photos)
    assert torch.equal(found.train_images, again.train_images)
    with pytest.raises(TypeError):
        images("image_folder", photos, size=10)


def test_changed_image_is_decoded_again(photos: Path) -> None:
    images("image_folder", photos)
    Image.fromarray(np.zeros((30, 30, 3), np.uint8)).save(photos / "train" / "cat" / "1.png")
    assert images("image_folder", photos).train_images[1].max() == 0


def test_damaged_cache_is_decoded_again(photos: Path) -> None:
    found = images("image_folder", photos)
    for cache in photos.parent.glob("cache/fpgm/decoded/*.npy"):
        cache.write_bytes(cache.read_bytes()[:100])
    again = images("image_folder", photos)
    assert torch.equal(found.train_images, again.train_images)


def test_images_are_scaled_by_the_shorter_side_and_cut_in_the_middle(photos: Path) -> None:
    wide = np.zeros((40, 80, 3), np.uint8)
    wide[:, 20:60] = 255  # exactly the middle square
    Image.fromarray(wide).save(photos / "train" / "cat" / "1.png")
    assert images("image_folder", photos, size=16).train_images[1].min() > 200


def test_val_serves_where_there_is_no_test(photos: Path) -> None:
    (photos / "test").rename(photos / "val")
    assert len(images("image_folder", photos).test_images) == 4


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda p: (p / "train/dog/2.png").write_bytes(b"no image"), "dog/2.png: not a readable"),
        (lambda p: [f.unlink() for f in (p / "train/dog").iterdir()], "train/dog: no images"),
        (lambda p: (p / "test/dog").rename(p / "test/bird"), "differing in bird, dog"),
        (lambda p: (p / "train").rename(p / "training"), "needs a folder of images for each class"),
    ],
    ids=["unreadable image", "empty class", "other classes", "no classes"],
)
def test_bad_folder_is_named_with_the_trouble(photos: Path, damage, message: str) -> None:
    damage(photos)
    with pytest.raises(DataError, match=message):
        images("image_folder", photos)


def test_images_that_cannot_fit_in_memory_are_refused_before_they_are_decoded(photos: Path) -> None:
    with pytest.raises(DataError, match=r"try dataset\.image_size="):
        images("image_folder", photos, size=2_000_000)


@given(seed=st.integers(0, 1000), pad=st.integers(1, 4), flip=st.booleans())
@settings(deadline=None, max_examples=30)
def test_augmentation_is_a_crop_of_the_raw_image_in_black_and_a_mirror(
    seed: int, pad: int, flip: bool
) -> None:
    g = torch.Generator().manual_seed(seed)
    images = torch.randint(1, 256, (6, 3, 7, 9), dtype=torch.uint8, generator=g)
    out = memory.augment(images, pad, flip, g)
    assert out.shape == images.shape
    for image, result in zip(images, out, strict=True):
        mirrored = [image, image.flip(2)] if flip else [image]
        padded = [torch.nn.functional.pad(m, (pad, pad, pad, pad)) for m in mirrored]
        crops = [
            p[:, y : y + 7, x : x + 9] for p in padded
            for y in range(2 * pad + 1) for x in range(2 * pad + 1)
        ]  # fmt: skip
        assert any(torch.equal(result, crop) for crop in crops)


def test_each_image_gets_its_own_place_and_coin() -> None:
    image = torch.arange(1, 50, dtype=torch.uint8).view(1, 1, 7, 7).expand(4000, 1, 7, 7)
    out = memory.augment(image, 2, True, torch.Generator().manual_seed(0))
    counts = out.flatten(1).unique(dim=0, return_counts=True)[1]
    assert len(counts) == 50  # 5 x 5 places, mirrored or not
    assert counts.min() > 40  # 80 expected


def test_epoch_sees_every_image_once_and_follows_from_its_seed() -> None:
    digits = images("digits")
    batches = list(digits.epoch(64, seed=5, augmented=False))
    assert len(batches) == steps(len(digits.train_images), 64) == 23
    labels = torch.cat([y for _, y in batches])
    assert torch.equal(labels.bincount(), digits.train_labels.bincount())
    again = list(digits.epoch(64, seed=5, augmented=False))
    assert all(torch.equal(a, b) for (a, _), (b, _) in zip(batches, again, strict=True))
    other = next(digits.epoch(64, seed=6, augmented=False))
    assert not torch.equal(batches[0][1], other[1])


@given(count=st.integers(3, 400), share=st.floats(0.34, 0.9))
def test_held_out_images_and_those_trained_on_are_all_images_once(count: int, share: float) -> None:
    if int(count * share + 1e-9) > count - 2:
        with pytest.raises(
            DataError, match=rf"^dataset\.validation={share}: holds out .* of {count}"
        ):
            divided(count, share)
        return
    stay, held = divided(count, share)
    assert len(held) == int(count * share + 1e-9)
    assert sorted([*stay.tolist(), *held.tolist()]) == list(range(count))
    assert stay.tolist() == sorted(stay.tolist())


def test_no_image_is_held_out_unless_it_is_asked_for() -> None:
    digits, zero = images("digits"), images("digits", validation=0.0)
    assert torch.equal(digits.train_images, zero.train_images)
    assert torch.equal(digits.mean, zero.mean)
    assert zero.held_out_count == 0
    assert list(zero.held_out(64)) == []
    with pytest.raises(DataError, match=r"^dataset\.validation=0\.0001: holds out 0 of 1437"):
        images("digits", validation=0.0001)


def test_held_out_images_are_never_trained_on_whatever_the_seed() -> None:
    whole, part = images("digits"), images("digits", validation=0.2)
    assert part.counts == (1437 - 287, 360)
    assert part.held_out_count == 287
    held = list(part.held_out(100))
    assert [len(labels) for _, labels in held] == [100, 100, 87]
    # By what they are: normalised by what is measured on the images that stay.
    assert torch.equal(part.mean, _moments(part.train_images)[0])
    shown = torch.cat([pixels for pixels, _ in held])
    assert torch.equal(shown, part.normalise(part.held_images))
    places = [
        (whole.train_images == image).flatten(1).all(1).nonzero()[0].item()
        for image in part.held_images
    ]
    assert places == sorted(places)
    assert torch.equal(whole.train_labels[places], torch.cat([labels for _, labels in held]))
    out = {image.numpy().tobytes() for image in part.held_images}
    for seed in (0, 1):
        seen = torch.cat([pixels for pixels, _ in part.epoch(64, seed, augmented=False)])
        assert len(seen) == len(part.train_images)
    assert not out & {image.numpy().tobytes() for image in part.train_images}
    assert torch.equal(images("digits", validation=0.2).held_images, part.held_images)


@given(count=st.integers(0, 300), at_most=st.none() | st.integers(1, 400))
def test_some_of_the_held_out_images_are_from_all_over(count: int, at_most: int | None) -> None:
    some = spaced(count, at_most).tolist()
    assert len(some) == (count if at_most is None else min(count, at_most))
    assert some == sorted(set(some))
    ends = [-1, *some, count]  # as images may lie by class, none is left out in a long run
    assert max(b - a for a, b in itertools.pairwise(ends)) <= max(1, -(-count // max(len(some), 1)))


def test_at_most_so_many_held_out_images_are_read() -> None:
    part = images("digits", validation=0.2)
    (pixels, labels), *others = part.held_out(100, at_most=41)
    assert (others, len(labels)) == ([], 41)
    assert torch.equal(labels, part.held_labels[spaced(287, 41)])
    assert torch.equal(pixels, part.normalise(part.held_images[spaced(287, 41)]))


def test_ranks_share_the_held_out_images() -> None:
    part = images("digits", validation=0.2)
    labels = [y for rank in range(2) for _, y in part.held_out(64, Ranks(rank, 2))]
    assert torch.equal(torch.cat(labels), part.held_labels)


def test_single_image_left_over_is_no_batch() -> None:
    digits = images("digits")
    sizes = [len(y) for _, y in digits.epoch(1436, seed=0, augmented=False)]
    assert sizes == [1436]
    assert steps(len(digits.train_images), 1436) == 1
