"""Checkpoints of few different weights, in as many bits as these need.

A tensor becomes a palette of its values and a code for each place; 3x3 kernels, where many are the
same but for flips and rotations, one palette of kernels for the network and a code and a turn for
each. What is unpacked is what was packed, bit for bit; what made the weights so few need not be
known.
"""

from __future__ import annotations

import io
import math
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fpgm.networks.kernels import inverse, moves

MOST = 256  # values in the palette of a tensor
SIDE, TURN_BITS = 3, 3  # of a kernel
LOOKED_AT = 20_000  # kernels, before all are compared
_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # by their bytes
_PLAIN, _PALETTE, _KERNELS = "plain", "palette", "kernels"
_PLACE = "the tensor"  # of a tree, with its number


@dataclass(frozen=True)
class _Coded:
    """A tensor as bytes. stored: numpy's type of its values, or of its palette's, as integers;
    bits: of a code, count: entries of the palette, 0 where there is none."""

    kind: str
    data: bytes
    stored: str = ""
    bits: int = 0
    count: int = 0


def pack(content: Mapping[str, Any]) -> tuple[dict[str, Any], int]:
    """A checkpoint's content, nested as it may be, with all its tensors as one; and the bits within
    which half of the floating-point numbers have a code, 0 where fewer have one."""
    tensors: list[Tensor] = []
    tree = _without(content, tensors)
    coded = [_smallest(tensor) for tensor in tensors]
    if found := _by_kernels(tensors, coded):
        palette, kernels = found
        coded = [_smallest(palette), *(kernels.get(i, one) for i, one in enumerate(coded))]
        tensors = [palette, *tensors]
    layout = [
        [str(tensor.dtype), list(tensor.shape), one.kind, one.stored, one.bits, one.count]
        for tensor, one in zip(tensors, coded, strict=True)
    ]
    data = np.frombuffer(b"".join(one.data for one in coded), dtype=np.uint8).copy()
    packed = {"about": _deflated([tree, layout]), "data": torch.from_numpy(data)}
    pairs = zip(tensors, coded, strict=True)
    return packed, _usual([(t.numel(), c.bits) for t, c in pairs if t.is_floating_point()])


def _usual(counts: Sequence[tuple[int, int]]) -> int:
    """The median of the bits, by how many numbers have them; none is more than any, and 0."""
    half, passed = sum(count for count, _ in counts) / 2, 0
    for count, bits in sorted((pair for pair in counts if pair[1]), key=lambda pair: pair[1]):
        passed += count
        if passed >= half:
            return bits
    return 0


def unpack(packed: Mapping[str, Any]) -> dict[str, Any]:
    """The content that `pack` was given."""
    (tree, layout), data, at = _inflated(packed["about"]), packed["data"].numpy(), 0
    tensors: list[Tensor] = []
    for dtype, shape, kind, stored, bits, count in layout:
        size = math.prod(shape)
        codes = size // SIDE**2 if kind == _KERNELS else size
        head = 0 if kind == _KERNELS else (count or size) * np.dtype(stored).itemsize
        end = at + head + _bytes(codes, bits)
        coded = _from_bits(data[at + head : end], bits, codes)
        if kind == _KERNELS:
            tensor = _turned(tensors[0], coded)
        else:
            values = np.frombuffer(data[at : at + head].tobytes(), stored)
            whole = torch.from_numpy(values[coded] if count else values.copy())
            own = getattr(torch, dtype.removeprefix("torch."))
            tensor = whole.to(_INTEGERS[own.itemsize]).view(own)
        tensors.append(tensor.view(shape))
        at = end
    shared = any(kind == _KERNELS for _, _, kind, *_ in layout)
    return dict(_with(tree, tensors[1:] if shared else tensors))


def _deflated(value: Any) -> Tensor:
    """Plain values as bytes, (n,): names and shapes take more than a small network's codes else."""
    buffer = io.BytesIO()
    torch.save(value, buffer)
    data = np.frombuffer(zlib.compress(buffer.getvalue(), 9), dtype=np.uint8).copy()
    return torch.from_numpy(data)


def _inflated(data: Tensor) -> Any:
    """What _deflated was given. Nothing but tensors and plain values is unpickled."""
    return torch.load(io.BytesIO(zlib.decompress(data.numpy().tobytes())), weights_only=True)


def _without(value: Any, tensors: list[Tensor]) -> Any:
    """The same with a place for each tensor, which goes into the list."""
    if isinstance(value, Tensor):
        tensors.append(value.detach().cpu().contiguous())
        return {_PLACE: len(tensors) - 1}
    if isinstance(value, Mapping):
        return {key: _without(entry, tensors) for key, entry in value.items()}
    return [_without(v, tensors) for v in value] if isinstance(value, list | tuple) else value


def _with(value: Any, tensors: Sequence[Tensor]) -> Any:
    """What _without was given."""
    if isinstance(value, Mapping):
        if set(value) == {_PLACE}:
            return tensors[value[_PLACE]]
        return {key: _with(entry, tensors) for key, entry in value.items()}
    return [_with(entry, tensors) for entry in value] if isinstance(value, list) else value


def _integers(tensor: Tensor) -> Any:
    """A tensor's bits as whole numbers of the same size, (n,): equal are only equal bits."""
    return tensor.flatten().view(_INTEGERS[tensor.dtype.itemsize]).numpy()


def _smallest(tensor: Tensor) -> _Coded:
    """A tensor by itself: its values, as narrow as they go, or a palette and codes."""
    numbers = _integers(tensor)
    stored = numbers.dtype
    if tensor.dtype == torch.int64 and len(numbers):
        low, high = int(numbers.min()), int(numbers.max())
        kinds: tuple[Any, ...] = (np.uint8, np.int16, np.int32, np.int64)
        fits = (k for k in kinds if np.iinfo(k).min <= low and high <= np.iinfo(k).max)
        stored = np.dtype(next(fits))
    plain = _Coded(_PLAIN, numbers.astype(stored).tobytes(), stored.str)
    values, codes = np.unique(numbers, return_inverse=True)
    if not 0 < len(values) <= MOST:
        return plain
    bits = max(1, (len(values) - 1).bit_length())
    coded = values.astype(stored).tobytes() + _to_bits(codes, bits)
    if len(coded) >= len(plain.data):
        return plain
    return _Coded(_PALETTE, coded, stored.str, bits, len(values))


def _by_kernels(
    tensors: Sequence[Tensor], alone: Sequence[_Coded]
) -> tuple[Tensor, dict[int, _Coded]] | None:
    """A palette (K, 3, 3) of the kernels of all float32 convolutions, and these by it; None where
    that takes no less than each tensor alone."""
    which = [
        i
        for i, tensor in enumerate(tensors)
        if tensor.dtype == torch.float32 and tensor.dim() == 4 and tensor.shape[2:] == (SIDE, SIDE)
    ]
    if not which:
        return None
    rows = np.concatenate([_integers(tensors[i]).reshape(-1, SIDE**2) for i in which])
    some = rows[:: max(1, len(rows) // LOOKED_AT)]
    if 2 * len(np.unique(_turns(some).min(1))) > len(some):
        return None
    ids = _turns(rows)
    turn = ids.argmin(1)
    _, first, codes = np.unique(ids.min(1), return_index=True, return_inverse=True)
    table = moves(SIDE).numpy()
    palette = np.take_along_axis(rows[first], table[turn[first]], 1)
    bits = max(1, (len(first) - 1).bit_length()) + TURN_BITS
    # The turn that is kept takes the palette's kernel back to the layer's.
    words = codes * 2**TURN_BITS + inverse(SIDE).numpy()[turn]
    ends = np.cumsum([tensors[i].numel() // SIDE**2 for i in which])
    parts = np.split(words, ends[:-1])
    found = {
        i: _Coded(_KERNELS, _to_bits(part, bits), bits=bits)
        for i, part in zip(which, parts, strict=True)
    }
    entries = torch.from_numpy(palette).view(torch.float32).view(-1, SIDE, SIDE)
    together = [_smallest(entries), *found.values()]
    if sum(len(c.data) for c in together) >= sum(len(alone[i].data) for i in which):
        return None
    return entries, found


def _turns(rows: Any) -> Any:
    """(n, 9) kernels -> (n, 8) numbers of what each of the moves makes of them: the same number is
    the same kernel."""
    moved = rows[:, moves(SIDE).numpy()].reshape(-1, SIDE**2)
    _, ids = np.unique(moved, axis=0, return_inverse=True)
    return ids.reshape(len(rows), 8)


def _turned(palette: Tensor, words: Any) -> Tensor:
    """Kernels by their codes and turns."""
    codes = torch.from_numpy(words)
    turns = moves(SIDE)[codes % 2**TURN_BITS]
    return palette.flatten(1)[codes // 2**TURN_BITS].gather(1, turns)


def _bytes(count: int, bits: int) -> int:
    return -(-count * bits // 8)


def _to_bits(codes: Any, bits: int) -> bytes:
    planes = codes.reshape(-1, 1) >> np.arange(bits) & 1
    return np.packbits(planes.astype(np.uint8), bitorder="little").tobytes()


def _from_bits(data: Any, bits: int, count: int) -> Any:
    if not bits:
        return np.zeros(0, np.int64)
    planes = np.unpackbits(data, count=count * bits, bitorder="little").reshape(count, bits)
    return planes.astype(np.int64) @ (1 << np.arange(bits))
