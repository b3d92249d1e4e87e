"""A layer's parameters by its name."""

from __future__ import annotations

from torch import nn


def parameters_of(network: nn.Module, name: str) -> list[nn.Parameter]:
    """The parameters of a layer, its weight first: those of the module of that name, or the
    parameter itself where a network calls its layers as functions. Raises AttributeError where
    there is neither."""
    holder, _, last = name.rpartition(".")
    found = getattr(network.get_submodule(holder), last)
    if isinstance(found, nn.Parameter):
        return [found]
    weight = found.weight
    if not isinstance(weight, nn.Parameter):
        raise AttributeError(f"{name}: no layer with a weight")
    return [weight, *(p for p in found.parameters(recurse=False) if p is not weight)]


def weight_of(network: nn.Module, name: str) -> nn.Parameter:
    """The weight of a layer: (N, C, kH, kW), of a linear one (N, C)."""
    return parameters_of(network, name)[0]


def weights_of(network: nn.Module) -> dict[str, nn.Parameter]:
    """The weights of all convolutions and linear layers, by the layers' names."""
    layers = (nn.Conv2d, nn.Linear)
    names = [name for name, module in network.named_modules() if isinstance(module, layers)]
    return {name: weight_of(network, name) for name in names}
