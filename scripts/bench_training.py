"""How fast an epoch is: fpgm's loop beside one as the published code has it, on the same images.

    python scripts/bench_training.py arch=resnet20
    python scripts/bench_training.py arch=resnet56 images=5000
    python scripts/bench_training.py device=cuda workers=16 images=50000

Words, with their defaults: arch=resnet20 device=cpu images=10000 (and a fifth as many to test),
batch_size=128 workers=2 (of the reference) rate=0.4 repeats=5 root= (a folder of images; without
one, noise in CIFAR-10's shape: time does not depend on what they show).

Every loop runs in a process of its own, in turn, `repeats` times: a short epoch to warm up, then
one that counts. The reference: worker processes, PIL transforms, float32, NCHW, distances by scipy
on the host, gradients masked, two evaluations an epoch.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import hydra
import numpy as np
import torch
import torch.nn.functional as F
from omegaconf import OmegaConf
from PIL import Image
from scipy.spatial import distance
from torch import nn
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms

import fpgm
from fpgm.config import Config
from fpgm.data import memory, sets
from fpgm.machine.device import environment
from fpgm.runs import checkpoint
from fpgm.training.asked import asked
from fpgm.training.loop import one_epoch
from fpgm.training.task import prepare

DEFAULTS = {
    "arch": "resnet20", "device": "cpu", "images": "10000", "batch_size": "128", "workers": "2",
    "rate": "0.4", "repeats": "5", "root": "",
}  # fmt: skip
PARTS = ("input", "forward, backward, step", "scoring, zeroing", "evaluation", "checkpoint")
WARM_UP = 5  # batches
NARROW = ["residual=shared", "align=16", "rate=0.5"]
OURS = {  # the words that make the loop, besides the defaults
    "fpgm": [],
    "fpgm, float32": ["precision=float32"],
    f"fpgm, {' '.join(NARROW)}, full width": [*NARROW, "schedule.train_compact=false"],
    f"fpgm, {' '.join(NARROW)}": NARROW,
    "fpgm, compiled": ["compile=true"],
}


def config_of(words: dict[str, str], more: list[str]) -> Config:
    """The run's configuration, on images in memory."""
    root = words["root"] or "."
    own = [f"arch={words['arch']}", f"device={words['device']}", f"rate={words['rate']}"]
    own += [f"batch_size={words['batch_size']}", "dataset=image_folder", f"dataset.root='{root}'"]
    configs = str(Path(__file__).resolve().parent.parent / "configs")
    with hydra.initialize_config_dir(configs, version_base="1.3"):
        return asked(
            OmegaConf.to_container(hydra.compose("config", [*own, "dataset.image_size=32", *more]))
        )


def images_of(words: dict[str, str], config: Config) -> memory.Data:
    """The first `images` of the folder, in a fixed random order, or noise."""
    train, test = int(words["images"]), int(words["images"]) // 5
    g = torch.Generator().manual_seed(0)
    if words["root"]:
        found = sets.load(torch.device("cpu"), **config.dataset.model_dump())
        order = torch.randperm(len(found.train_images), generator=g)[:train]
        tests = torch.randperm(len(found.test_images), generator=g)[:test]
    else:
        noise = torch.randint(256, (train + test, 3, 32, 32), generator=g, dtype=torch.uint8)
        labels = torch.randint(10, (train + test,), generator=g)
        mean, std = torch.full((3,), 0.5), torch.full((3,), 0.3)
        names = tuple("0123456789")
        found = memory.Data(noise, labels, noise, labels, mean, std, names, 4, True)
        order, tests = torch.arange(train), torch.arange(train, train + test)
    device = torch.device(words["device"])
    return replace(
        found,
        train_images=found.train_images[order].to(device),
        train_labels=found.train_labels[order].to(device),
        test_images=found.test_images[tests].to(device),
        test_labels=found.test_labels[tests].to(device),
        mean=found.mean.to(device),
        std=found.std.to(device),
    )


def fewer(images: memory.Data, count: int) -> memory.Data:
    """The first `count` images, to train and to test."""
    part = slice(count)
    return replace(
        images, train_images=images.train_images[part], train_labels=images.train_labels[part],
        test_images=images.test_images[part], test_labels=images.test_labels[part],
    )  # fmt: skip


def ours(words: dict[str, str], more: list[str]) -> dict[str, float]:
    """Seconds of one epoch of fpgm's loop, by part."""
    config = config_of(words, [*more, "epochs=3"])
    images = images_of(words, config)
    with tempfile.TemporaryDirectory() as directory:
        task = prepare(config, Path(directory), images=images)
        task.images = fewer(images, WARM_UP * config.batch_size)
        one_epoch(task, 0)
        task.images = images
        began = time.perf_counter()
        row = one_epoch(task, 1)
        ended = time.perf_counter()
        checkpoint.save_epoch(Path(directory), task.state())
        saved = time.perf_counter()
    train = row["train_s"] - row["input_s"]
    parts = (row["input_s"], train, row["prune_s"], row["eval_s"], saved - ended)
    return {**dict(zip(PARTS, parts, strict=True)), "all": saved - began}


class Pictures(Dataset[tuple[torch.Tensor, int]]):
    """As torchvision's CIFAR10: an array, made a PIL image when it is asked for."""

    def __init__(self, images: torch.Tensor, labels: torch.Tensor, steps: list[object]) -> None:
        self.images = np.ascontiguousarray(images.permute(0, 2, 3, 1).numpy())
        self.labels = labels.tolist()
        self.transform = transforms.Compose(steps)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        return self.transform(Image.fromarray(self.images[index])), self.labels[index]


def reference(words: dict[str, str]) -> dict[str, float]:
    """Seconds of one epoch of a loop in the published shape, by part."""
    config = config_of(words, [])
    images = images_of({**words, "device": "cpu"}, config)
    device = torch.device(words["device"])
    cuda = device.type == "cuda"
    model = fpgm.model(words["arch"]).to(device)
    optimizer = torch.optim.SGD(model.parameters(), 0.1, 0.9, weight_decay=5e-4, nesterov=True)
    options = {"num_workers": int(words["workers"]), "pin_memory": cuda}
    tensors = [
        transforms.ToTensor(),
        transforms.Normalize(images.mean.tolist(), images.std.tolist()),
    ]
    crop = [transforms.RandomCrop(32, padding=4), transforms.RandomHorizontalFlip()]

    def loaders(part: memory.Data) -> tuple[DataLoader, DataLoader]:
        train = Pictures(part.train_images, part.train_labels, [*crop, *tensors])
        test = Pictures(part.test_images, part.test_labels, tensors)
        size = int(words["batch_size"])
        return (DataLoader(train, size, shuffle=True, **options), DataLoader(test, size, **options))

    masks = score_and_zero(model, config.rate)
    warm = fewer(images, WARM_UP * config.batch_size)
    with tempfile.TemporaryDirectory() as directory:
        for part in (warm, images):
            spent = dict.fromkeys((*PARTS, "all"), 0.0)
            began = time.perf_counter()
            train, test = loaders(part)
            train_once(model, optimizer, train, masks, device, spent)
            mark = time.perf_counter()
            evaluate(model, test, device)
            spent[PARTS[3]] += time.perf_counter() - mark
            mark = time.perf_counter()
            masks = score_and_zero(model, config.rate)
            spent[PARTS[2]] += time.perf_counter() - mark
            mark = time.perf_counter()
            evaluate(model, test, device)
            spent[PARTS[3]] += time.perf_counter() - mark
            mark = time.perf_counter()
            state = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
            torch.save(state, Path(directory) / "checkpoint.pt")
            spent[PARTS[4]] += time.perf_counter() - mark
            spent["all"] = time.perf_counter() - began
    return spent


def train_once(model, optimizer, batches, masks, device, spent) -> None:
    model.train()
    loss_sum = 0.0
    mark = time.perf_counter()
    for images, labels in batches:
        now = time.perf_counter()
        spent[PARTS[0]] += now - mark
        images, labels = images.to(device), labels.to(device)
        loss = F.cross_entropy(model(images), labels)
        optimizer.zero_grad()
        loss.backward()
        for weight, mask in masks:
            weight.grad *= mask
        optimizer.step()
        loss_sum += loss.item()
        mark = time.perf_counter()
        spent[PARTS[1]] += mark - now


@torch.no_grad()
def evaluate(model: nn.Module, batches: DataLoader, device: torch.device) -> float:
    model.eval()
    right = [
        (model(images.to(device)).argmax(1).cpu() == labels).sum().item()
        for images, labels in batches
    ]
    return sum(right) / len(batches.dataset)


@torch.no_grad()
def score_and_zero(model: nn.Module, rate: float) -> list[tuple[nn.Parameter, torch.Tensor]]:
    """The filters nearest the geometric median, layer by layer, on the host."""
    masks = []
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            filters = module.weight.flatten(1).cpu().numpy()
            sums = distance.cdist(filters, filters, "euclidean").sum(0)
            mask = torch.ones(len(filters))
            mask[torch.from_numpy(np.argsort(sums)[: int(len(filters) * rate)].copy())] = 0
            mask = mask.view(-1, 1, 1, 1).to(module.weight.device)
            module.weight *= mask
            masks.append((module.weight, mask))
    return masks


def main(argv: list[str]) -> None:
    words = {**DEFAULTS, **dict(word.split("=", 1) for word in argv if "=" in word)}
    if "--one" in argv:
        name = argv[argv.index("--one") + 1]
        print(json.dumps(reference(words) if name == "reference" else ours(words, OURS[name])))
        return
    names = ["reference", *OURS] if words["device"] == "cuda" else ["reference", *list(OURS)[:4]]
    found: dict[str, list[dict[str, float]]] = {name: [] for name in names}
    given = [f"{key}={value}" for key, value in words.items()]
    for _ in range(int(words["repeats"])):
        for name in names:
            command = [sys.executable, __file__, "--one", name, *given]
            out = subprocess.run(command, check=True, capture_output=True, text=True).stdout
            found[name].append(json.loads(out.strip().splitlines()[-1]))
    machine = environment(torch.device(words["device"]), None)
    print(f"{' '.join(given)}; {machine['processor']}, {machine['threads']} threads, "
          f"torch {machine['torch']}; medians of {words['repeats']}\n")  # fmt: skip
    print("| loop | images/s | times the reference |", " | ".join(PARTS), "|")
    print("|---|---:|---:" + "|---:" * len(PARTS) + "|")
    speeds = {
        name: statistics.median(int(words["images"]) / run["all"] for run in runs)
        for name, runs in found.items()
    }
    for name, runs in found.items():
        shares = [statistics.median(run[part] / run["all"] for run in runs) for part in PARTS]
        cells = " | ".join(f"{100 * share:.1f} %" for share in shares)
        ratio = speeds[name] / speeds["reference"]
        print(f"| {name} | {speeds[name]:.0f} | {ratio:.2f} | {cells} |")


if __name__ == "__main__":
    main(sys.argv[1:])
