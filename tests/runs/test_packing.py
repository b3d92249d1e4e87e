"""What is unpacked is what was packed, bit for bit, and few values take few bits."""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fpgm.networks.kernels import inverse, moves
from fpgm.runs import checkpoint, packing

DTYPES = (
    torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.int64, torch.int32,
    torch.uint8, torch.bool,
)  # fmt: skip


def same(a: object, b: object) -> bool:
    """In kind, shape and bits, whatever nests them."""
    if isinstance(a, Tensor):
        assert isinstance(b, Tensor)
        if a.dtype != b.dtype or a.shape != b.shape:
            return False
        return (
            a.contiguous().numpy(force=True).tobytes() == b.numpy(force=True).tobytes()
            if (a.dtype != torch.bfloat16)
            else same(a.view(torch.int16), b.view(torch.int16))
        )
    if isinstance(a, dict):
        return list(a) == list(b) and all(same(v, b[k]) for k, v in a.items())
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


@st.composite
def tensors(draw: st.DrawFn) -> Tensor:
    """Of any type and shape, with few or many values, with -0, infinity and NaN among them."""
    g = torch.Generator().manual_seed(draw(st.integers(0, 999)))
    shape = draw(st.sampled_from([(), (0,), (7,), (33, 5), (4, 3, 3, 3), (6, 1, 3, 3), (300, 2)]))
    dtype = draw(st.sampled_from(DTYPES))
    values = torch.randn(shape, generator=g) * draw(st.sampled_from([1, 1000]))
    if draw(st.booleans()):
        values = values.round().clamp(-2, 2)
    if dtype.is_floating_point and draw(st.booleans()):
        odd = torch.tensor([-0.0, 0.0, math.inf, math.nan])
        values = torch.where(values > 0.5, odd[torch.randint(4, shape, generator=g)], values)
    tensor = values.nan_to_num().to(dtype) if not dtype.is_floating_point else values.to(dtype)
    return tensor.transpose(0, 1) if tensor.dim() == 2 and draw(st.booleans()) else tensor


@given(st.lists(tensors(), max_size=5))
@settings(max_examples=150, deadline=None)
def test_nothing_changes(found: list[Tensor]) -> None:
    content = {"a": {"b": list(found)}, "words": ["x", 1, None, 2.5], "none": {}, **{
        str(i): t for i, t in enumerate(found)}}  # fmt: skip
    packed, _ = packing.pack(content)
    assert same(packing.unpack(packed), content)


@given(st.integers(1, 40), st.integers(0, 99), st.booleans())
@settings(max_examples=40, deadline=None)
def test_turned_kernels_are_one_kernel(distinct: int, seed: int, few_values: bool) -> None:
    g = torch.Generator().manual_seed(seed)
    palette = torch.randn(distinct, 9, generator=g)
    if few_values:
        palette = palette.sign() * 0.5
    which = torch.randint(distinct, (40 * 20,), generator=g)
    turns = moves(3)[torch.randint(8, (800,), generator=g)]
    kernels = palette[which].gather(1, turns).view(40, 20, 3, 3)
    content = {"first": kernels[:30], "other": torch.randn(11, generator=g), "second": kernels[30:]}
    packed, bits = packing.pack(content)
    assert same(packing.unpack(packed), content)
    code = max(1, math.ceil(math.log2(max(2, distinct)))) + 3
    if not few_values and distinct > 1:
        assert bits <= code
    most = math.ceil(600 * code / 8) + math.ceil(200 * code / 8) + distinct * 36 + 11 * 4
    assert len(packed["data"]) <= most


@pytest.mark.parametrize(("values", "bits"), [(2, 1), (3, 2), (17, 5), (33, 6), (256, 8)])
def test_a_code_has_the_bits_that_its_values_need(values: int, bits: int) -> None:
    weight = torch.randn(values)[torch.arange(40 * values) % values]
    packed, found = packing.pack({"weight": weight, "bias": torch.randn(9)})
    assert found == bits
    assert len(packed["data"]) == values * 4 + math.ceil(40 * values * bits / 8) + 9 * 4


def test_a_network_of_many_weights_has_no_code() -> None:
    content = {"weight": torch.randn(8, 8, 3, 3), "few": torch.zeros(100)}
    assert packing.pack(content)[1] == 0


def test_the_eight_moves_are_all_there_are_and_are_taken_back() -> None:
    for size in (2, 3, 5):
        kernel = torch.randn(size, size)
        found = {tuple(kernel.flatten()[move].tolist()) for move in moves(size)}
        flips = [kernel.rot90(t).flatten() for t in range(4)]
        flips += [kernel.T.rot90(t).flatten() for t in range(4)]
        assert found == {tuple(flip.tolist()) for flip in flips}
        for move, back in zip(moves(size), inverse(size), strict=True):
            assert torch.equal(kernel.flatten()[move][moves(size)[back]], kernel.flatten())


def test_every_reader_takes_a_packed_file(tmp_path: Path) -> None:
    content = {"arch": {"name": "x"}, "keep": {"a": torch.tensor([1, 4])}, "state_dict": {
        "a.weight": torch.tensor([1.0, 2.0]).repeat(50)}}  # fmt: skip
    packed, _ = packing.pack(content)
    checkpoint.write(tmp_path / "weights.b1", {"packed": packed})
    assert same(checkpoint.read(tmp_path / "weights.b1", ("arch", "keep", "state_dict")), content)
    packed["data"] = packed["data"][:5]
    checkpoint.write(tmp_path / "damaged", {"packed": packed})
    with pytest.raises(checkpoint.CheckpointError, match="damaged"):
        checkpoint.read(tmp_path / "damaged")


def test_names_and_shapes_take_less_than_the_weights() -> None:
    names = [f"layer{i}.{j}.conv{k}.weight" for i in range(3) for j in range(20) for k in range(2)]
    weights = {
        name: torch.randn(5)[torch.arange(16 * 16 * 9) % 5].view(16, 16, 9) for name in names
    }
    packed, _ = packing.pack({"state_dict": weights})
    assert len(packed["about"]) < 30 * len(names)  # 110 as torch writes them


class Runs:
    """What an unpickler that trusts a file would run."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, ("touch ran",)


def test_what_a_packed_file_hides_is_not_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    packed, _ = packing.pack({"weight": torch.zeros(100)})
    packed["about"] = packing._deflated([Runs(), []])
    checkpoint.write(tmp_path / "hidden", {"packed": packed})
    with pytest.raises(checkpoint.CheckpointError):
        checkpoint.read(tmp_path / "hidden")
    assert not Path("ran").exists()
