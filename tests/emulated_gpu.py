"""A GPU where there is none: tensors on the CPU that say they are on cuda:0.

As on a GPU an operation on tensors of both kinds is an error, and so is numpy(). What makes the
host wait for the device is counted in `waits`. Kernels, streams and speed are not emulated.
Torch's FakeTensorMode knows devices, too, but has no values: nothing could be selected or proven.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map

import fpgm.machine.device
import fpgm.training.evaluate
import fpgm.training.finish
import fpgm.training.loop
import fpgm.training.task

CPU, GPU = torch.device("cpu"), torch.device("cuda:0")
waits: Counter[str] = Counter()

WAITING = {
    Tensor.item, Tensor.__bool__, Tensor.__int__, Tensor.__float__, Tensor.__index__, Tensor.tolist,
    Tensor.nonzero, torch.nonzero, Tensor.unique, torch.unique,
}  # fmt: skip
# Copies between the two, and what computes nothing.
CROSSING = {"copy_", "set_", "backward", "type_as", "__get__", "__set__", "__setitem__"}
CROSSING.add("_has_compatible_shallow_copy_type")


class OnGpu(Tensor):
    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        return call(function, args, kwargs or {})


class Everywhere(TorchFunctionMode):
    """Factories, too, obey device=cuda."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        return call(function, args, kwargs or {})


def emulate(monkeypatch: pytest.MonkeyPatch) -> Everywhere:
    """A context in which device=cuda works."""

    def autocast(_: torch.device, dtype: torch.dtype | None) -> torch.autocast:
        return torch.autocast("cpu", dtype or torch.bfloat16, enabled=dtype is not None)

    waits.clear()
    # Parameters are replaced by such tensors; their memory cannot be swapped in place.
    future = "get_overwrite_module_params_on_conversion"
    monkeypatch.setattr(torch.__future__, future, lambda: True)
    monkeypatch.setattr(fpgm.training.task, "choose_device", torch.device)
    for module in (fpgm.training.loop, fpgm.training.evaluate):
        monkeypatch.setattr(module, "autocast", autocast)
    monkeypatch.setattr(fpgm.training.loop, "precision_name", lambda *_: "emulated")
    about = fpgm.machine.device.environment
    monkeypatch.setattr(fpgm.training.finish, "environment", lambda _, dtype: about(CPU, dtype))
    generator = torch.Generator
    monkeypatch.setattr(torch, "Generator", lambda device="cpu": generator())
    return Everywhere()


def call(function: Callable, args: tuple, kwargs: dict[str, Any]) -> Any:
    """What torch would do with tensors that lie where ours say they lie."""
    leaves = tree_leaves((args, kwargs))
    if any(isinstance(leaf, fx.Proxy) for leaf in leaves):
        return function(*args, **kwargs)
    special = SPECIAL.get(function)
    if special is not None:
        return special(args, kwargs)
    given = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
    on_gpu = any(isinstance(tensor, OnGpu) for tensor in given)
    if on_gpu and function in WAITING:
        waits[function.__name__] += 1
    if function is Tensor.__getitem__:
        _check_index(args[0], args[1])
    elif on_gpu and function.__name__ not in CROSSING:
        # A number in a tensor goes along with either.
        strangers = [t for t in given if not isinstance(t, OnGpu) and t.dim()]
        assert not strangers, f"{function.__name__}: tensors of both devices"
    asked = kwargs.get("device")
    if asked is not None and torch.device(asked).type == "cuda":
        kwargs, on_gpu = {**kwargs, "device": CPU}, True
    elif asked is not None:
        on_gpu = False
    result = plainly(function, args, kwargs)
    return tree_map(to_gpu, result) if on_gpu else result


def plainly(function: Callable, args: tuple, kwargs: dict[str, Any]) -> Any:
    with torch._C.DisableTorchFunction():
        return function(*args, **kwargs)


def to_gpu(value: Any) -> Any:
    if not isinstance(value, Tensor) or isinstance(value, OnGpu):
        return value
    return plainly(Tensor.as_subclass, (value, OnGpu), {})


def to_cpu(value: Tensor) -> Tensor:
    if not isinstance(value, OnGpu):
        return value
    return plainly(Tensor.as_subclass, (value, Tensor), {})


def _check_index(tensor: Tensor, index: Any) -> None:
    """A mask makes the host wait for how many it selects; the device of an index may be the CPU."""
    for one in index if isinstance(index, tuple) else (index,):
        if isinstance(one, OnGpu):
            assert isinstance(tensor, OnGpu), "index on the GPU into a tensor on the CPU"
        if isinstance(one, Tensor) and isinstance(tensor, OnGpu) and one.dtype == torch.bool:
            waits["mask"] += 1


def _to(args: tuple, kwargs: dict[str, Any]) -> Tensor:
    own, *rest = args
    if rest[:1] == ["meta"]:  # where tensors have no values, and no device matters
        return plainly(Tensor.to, (to_cpu(own), "meta"), {})
    target = kwargs.get("device")
    for i, one in enumerate(rest):
        if isinstance(one, str | torch.device):
            target, rest[i] = one, CPU
        elif isinstance(one, Tensor):
            target = one.device
    kwargs = {**kwargs, "device": CPU} if kwargs.get("device") is not None else kwargs
    moved = plainly(Tensor.to, (own, *rest), kwargs)
    there = isinstance(own, OnGpu) if target is None else torch.device(target).type == "cuda"
    return to_gpu(moved) if there else _cpu((moved,), {})


def _cpu(args: tuple, kwargs: dict[str, Any]) -> Tensor:
    waits["cpu"] += isinstance(args[0], OnGpu)
    return to_cpu(args[0])


def _numpy(args: tuple, kwargs: dict[str, Any]) -> Any:
    assert not isinstance(args[0], OnGpu), "numpy() of a tensor on the GPU"
    return plainly(Tensor.numpy, args, kwargs)


def _deepcopy(args: tuple, kwargs: dict[str, Any]) -> Tensor:
    own, memo = args
    if not isinstance(own, OnGpu):
        return plainly(Tensor.__deepcopy__, args, kwargs)
    if id(own) not in memo:
        new = to_gpu(plainly(Tensor.clone, (own.detach(),), {})).requires_grad_(own.requires_grad)
        if getattr(own, "_is_param", False):
            new._is_param = True
        memo[id(own)] = new
    return memo[id(own)]


SPECIAL: dict[Callable, Callable[[tuple, dict[str, Any]], Any]] = {
    Tensor.device.__get__: lambda args, _: GPU if isinstance(args[0], OnGpu) else CPU,
    Tensor.is_cuda.__get__: lambda args, _: isinstance(args[0], OnGpu),
    Tensor.to: _to,
    Tensor.cpu: _cpu,
    Tensor.numpy: _numpy,
    Tensor.__array__: _numpy,
    Tensor.__deepcopy__: _deepcopy,
}
