"""Distillation: its oracles, whom it learns from, and who cannot teach."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from tasks import few, made, whole
from torch import Tensor

import fpgm
from fpgm.errors import CheckpointError, Error
from fpgm.methods.beside.distillation import Distillation, Renormalised, divergence
from fpgm.training import loop
from fpgm.training.task import Task

__all__ = ["few"]  # a fixture

STUDENT, TEACHER = torch.tensor([[1.0, 0.0, -1.0]]).double(), torch.zeros(1, 3).double()
LOGITS = arrays("float64", (4, 5), elements=st.floats(-9, 9))


@pytest.mark.parametrize(("temperature", "expected"), [(1.0, 0.308994), (4.0, 0.331613)])
def test_divergence_by_hand(temperature: float, expected: float) -> None:
    found = divergence(STUDENT, TEACHER, temperature)
    assert float(found) == pytest.approx(expected, abs=1e-6)


def test_gradient_by_hand() -> None:
    student = STUDENT.clone().requires_grad_()
    divergence(student, TEACHER, 4.0).backward()
    assert student.grad is not None
    assert student.grad[0].tolist() == pytest.approx([0.343582, -0.027350, -0.316233], abs=1e-6)


@given(LOGITS, st.floats(0.5, 20))
def test_who_says_the_same_has_nothing_to_learn(logits: Any, temperature: float) -> None:
    said = torch.from_numpy(logits)
    assert float(divergence(said, said, temperature)) == pytest.approx(0, abs=1e-4)
    assert float(divergence(said, said + 3, temperature)) == pytest.approx(0, abs=1e-3)


@given(LOGITS, LOGITS)
def test_at_a_high_temperature_logits_are_matched(a: Any, b: Any) -> None:
    """The gradient tends to (s - t) / classes, for logits of mean zero."""
    s, t = (torch.from_numpy(x - x.mean(1, keepdims=True)).double() for x in (a, b))
    s.requires_grad_()
    divergence(s, t, 1e4).backward()
    assert s.grad is not None
    assert torch.allclose(s.grad * len(s), (s.detach() - t) / 5, atol=1e-2)


@given(st.floats(0.1, 3), st.floats(0.1, 3), st.floats(-1, 1), st.floats(-1, 1))
def test_images_are_as_the_teacher_knows_them(a: float, b: float, m: float, n: float) -> None:
    pixels = torch.rand(2, 1, 3, 3)
    ours, theirs = (pixels - m) / a, (pixels - n) / b
    constants = [torch.tensor([value]) for value in (m, a, n, b)]
    assert torch.allclose(Renormalised(*constants)(ours), theirs, atol=1e-4)


@pytest.fixture
def taught(tmp_path: Path, few: None) -> Path:
    """A finished run."""
    whole(tmp_path / "teacher", "rate=0", "epochs=1")
    return tmp_path / "teacher"


def distilling(directory: Path, *words: str) -> tuple[Task, Distillation]:
    task = made(directory, "method=distillation", *words)
    return task, next(m for m in task.methods if isinstance(m, Distillation))


def loss_of(task: Task, outputs: Tensor, inputs: Tensor, labels: Tensor) -> float:
    return float(task.loss(outputs, labels)) + sum(
        float(method.loss(inputs, outputs, labels)) for method in task.methods
    )


def test_the_loss_is_a_mixture_and_the_given_network_teaches_by_default(
    tmp_path: Path, taught: Path
) -> None:
    share = "method.distillation.share=0.3"
    task, _ = distilling(tmp_path / "run", f"pretrained={taught}", share)
    for method in task.methods:
        method.start()  # prunes the student, not the teacher
    inputs, labels = next(iter(task.batches(1)))
    outputs = torch.randn(len(labels), 10)
    told = fpgm.load(taught)(inputs).detach()
    expected = 0.7 * F.cross_entropy(outputs, labels) + 0.3 * divergence(outputs, told, 4.0)
    assert loss_of(task, outputs, inputs, labels) == pytest.approx(float(expected), rel=1e-4)


def test_share_zero_is_no_distillation(tmp_path: Path, taught: Path) -> None:
    words = ["method.distillation.share=0", f"method.distillation.teacher={taught}"]
    task, _ = distilling(tmp_path / "run", *words)
    inputs, labels = next(iter(task.batches(1)))
    outputs = torch.randn(len(labels), 10)
    assert loss_of(task, outputs, inputs, labels) == pytest.approx(
        float(F.cross_entropy(outputs, labels))
    )


def test_the_teacher_stays_as_it_is(tmp_path: Path, taught: Path) -> None:
    task, method = distilling(tmp_path / "run", f"method.distillation.teacher={taught}")
    network: Any = method._teacher
    before = {k: v.clone() for k, v in network.state_dict().items()}
    assert not any(p.requires_grad for p in network.parameters())
    loop.one_epoch(task, 0)
    assert not network.training
    assert all(torch.equal(before[k], v) for k, v in network.state_dict().items())
    trained = {id(p) for g in task.full.optimizer.param_groups for p in g["params"]}
    assert trained.isdisjoint(id(p) for p in network.parameters())


def test_of_other_constants_the_teacher_sees_its_own(tmp_path: Path, taught: Path) -> None:
    words = ("dataset.mean=[0.1]", "dataset.std=[0.9]", f"method.distillation.teacher={taught}")
    task, method = distilling(tmp_path / "run", *words)
    plain, _ = distilling(tmp_path / "same", words[2])
    theirs = fpgm.load(taught)(plain.images.normalise(plain.images.train_images[:8]))
    ours = method._teacher(task.images.normalise(task.images.train_images[:8]))
    assert torch.allclose(ours, theirs, atol=1e-4)


def test_without_a_teacher_it_says_what_to_name(tmp_path: Path, few: None) -> None:
    with pytest.raises(Error, match=r"^method.distillation.teacher=null: the run starts from scra"):
        distilling(tmp_path)


def test_a_teacher_that_is_no_run_is_named(tmp_path: Path, few: None) -> None:
    with pytest.raises(CheckpointError, match=r"^method.distillation.teacher=\S*none: .*no such"):
        distilling(tmp_path, f"method.distillation.teacher={tmp_path}/none")


@pytest.mark.parametrize(
    ("key", "value", "line"),
    [
        ("classes", ["cat", "dog"], "has other classes, cat, dog, than this run, 0, 1, 2, 3, ..."),
        ("image_shape", [3, 32, 32], "has other images, 3, 32, 32, than this run, 1, 8, 8"),
    ],
)
def test_who_has_learnt_something_else_cannot_teach(
    tmp_path: Path, taught: Path, key: str, value: Any, line: str
) -> None:
    saved = torch.load(taught / "compact.pt", weights_only=True)
    saved["preprocessing"][key] = value
    torch.save(saved, taught / "compact.pt")
    with pytest.raises(Error) as caught:
        distilling(tmp_path / "run", f"method.distillation.teacher={taught}")
    assert line in str(caught.value)


def test_the_compact_network_is_taught_where_it_may_be(tmp_path: Path, taught: Path) -> None:
    teacher = f"method.distillation.teacher={taught}"
    task, _ = distilling(tmp_path / "run", teacher, "rate=0.7", "residual=inner")
    for method in task.methods:
        method.start()
    for method in task.methods:
        method.before_epoch(0)
    assert task.trained is not task.full
