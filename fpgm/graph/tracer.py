"""Python code to a torch.fx graph, with a sample image that runs along.

torch.fx alone knows no shapes: `if x.shape[-1] < k`, `for part in x.split(8, 1)` and a view of
channels into groups end there. Here every operation is also run on the meta device, where tensors
have shapes and no values, so that sizes have values where the code asks for them, and later steps
know the shape of every result. Sizes stay operations of the graph all the same: what is made of it
takes images of any size.
"""

from __future__ import annotations

import copy
import inspect
import operator
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.node import map_aggregate
from torch.utils._pytree import tree_map_only

from fpgm.errors import GraphError, first_line
from fpgm.graph.operations import check_way
from fpgm.graph.probes import normalises, plain
from fpgm.networks.layers import BorderConv2d, Expand, Pick, SameConv2d

Image = tuple[int, int, int]  # (C, H, W)

BATCH = 2  # of the sample: one image would hide what mixes images
PIXELS = (64, 224, 32, 28, 299)  # that are tried where nobody says
_KNOWN = ("ndim", "dim", "dtype", "device", "is_floating_point")  # for every image
_INPLACE = ("iadd", "isub", "imul", "itruediv", "ipow", "ifloordiv", "imod")


@dataclass(frozen=True)
class Shape:
    """Of the tensor that an operation gives for the sample. varies: the dimensions that are others
    for another image."""

    sizes: tuple[int, ...]
    varies: frozenset[int] = frozenset()


class SizeError(GraphError):
    """The code asks for a size that depends on the image, and nobody has said what image."""


def traced(model: nn.Module, image: Image | None) -> tuple[fx.GraphModule, dict[fx.Node, Any]]:
    """A network in eval mode as a graph, and what each node is for a sample: a Shape for a tensor,
    a number or a tuple as it is; no samples where no image is given and none fits.

    image: what the network is given; None: what it says itself (timm's pretrained_cfg), or sizes
    that are usual, by which no path through the code is chosen.
    Raises GraphError where control flow depends on the data, or on the image and none is given, and
    where the network refuses the image.
    """
    known = image or stated(model)
    # A small image first: most networks ask for no size, and run on any.
    small, *others = [*_usual(model, image), None]
    attempts = [(small, False)] + ([(known, True)] if known else [(o, False) for o in others])
    for sample, decides in attempts:
        tracer = SampleTracer(model, sample, decides)
        try:
            return tracer.run(model)
        except SizeError:
            if not known:
                raise
        except RefusedError as error:
            if decides:
                name, asked = type(model).__name__, "x".join(map(str, sample or ()))
                raise GraphError(
                    f"{name} refuses images of {asked}{where(error.cause)}: "
                    f"{first_line(error.cause)}; give another image=(C, H, W)"
                ) from error.cause
    raise AssertionError("the last attempt has no sample that could be refused")


def stated(model: nn.Module) -> Image | None:
    """The image (C, H, W) that a network says it is made for, as timm's do."""
    for attribute in ("pretrained_cfg", "default_cfg"):
        config = getattr(model, attribute, None)
        size = config.get("input_size") if isinstance(config, dict) else None
        if isinstance(size, tuple | list) and len(size) == 3:
            return int(size[0]), int(size[1]), int(size[2])
    return None


def where(error: BaseException) -> str:
    """The line of the network's own code that an error came up in."""
    tracing = (str(Path(torch.__file__).parent), str(Path(__file__).parent))
    frames = traceback.extract_tb(error.__traceback__)
    lines = [frame for frame in frames if not frame.filename.startswith(tracing)]
    return f" at {lines[-1].filename}:{lines[-1].lineno} ({lines[-1].line})" if lines else ""


class RefusedError(Exception):
    """An operation does not take the sample."""

    def __init__(self, cause: Exception) -> None:
        super().__init__(str(cause))
        self.cause = cause


def _usual(model: nn.Module, image: Image | None) -> Iterator[Image]:
    """Images that a network may be made for, judged by its first convolution, small ones first."""
    first = next((m for m in model.modules() if isinstance(m, nn.Conv2d)), None)
    weight = next((p for p in model.parameters() if p.dim() == 4), None)
    if image is not None:
        yield image[0], PIXELS[0], PIXELS[0]
    elif first is not None or weight is not None:
        channels = first.in_channels if first is not None else weight.shape[1]  # type: ignore[union-attr]
        yield from ((channels, pixels, pixels) for pixels in PIXELS)


def _defaults(model: nn.Module) -> dict[str, Any] | None:
    """The values of what a network takes beside images, where it has some."""
    parameters = list(inspect.signature(model.forward).parameters.values())[1:]
    given = {p.name: p.default for p in parameters if p.default is not p.empty}
    return given or None


def _shadow(model: nn.Module) -> nn.Module:
    """The same network on the meta device; nothing of its weights is copied."""
    tensors = [*model.parameters(), *model.buffers()]
    return copy.deepcopy(model, {id(t): t.to("meta") for t in tensors})


def _is_shape(node: Any) -> bool:
    """Whether it is a tensor's shape, and no part of one."""
    if not isinstance(node, fx.Node):
        return False
    attribute = node.target is getattr and node.args[1] == "shape"
    return bool(attribute or (node.target == "size" and len(node.args) == 1))


def _counts_images(node: fx.Node) -> bool:
    """Whether a number is made from the size of the batch."""
    first = len(node.args) == 2 and node.args[1] == 0
    if first and node.target is operator.getitem:
        return _is_shape(node.args[0])
    if first and node.target == "size":
        return True
    return any(_counts_images(n) for n in node.all_input_nodes if n.op == "call_function")


def _shape(value: Any, other: Any) -> Any:
    """What is told of a value. other: the same for a larger image, None where it is not known."""
    if isinstance(value, Tensor):
        larger = other.shape if isinstance(other, Tensor) else [0] * value.dim()
        changed = (place for place, size in enumerate(value.shape) if larger[place] != size)
        return Shape(tuple(value.shape), frozenset(changed))
    if isinstance(value, tuple | list):
        others = other if isinstance(other, tuple | list) else [None] * len(value)
        return tuple(_shape(*both) for both in zip(value, others, strict=False))
    return value if isinstance(value, int | float | str | torch.dtype | slice) else None


class SampleProxy(fx.Proxy):
    """Knows what is so for every image, and records `x += y` as what it is: torch.fx's own proxy
    takes some of these for `x = x + y`."""

    def __getattr__(self, name: str) -> Any:
        tracer: SampleTracer = self.tracer  # type: ignore[assignment]
        value = tracer.values.get(self.node)
        if isinstance(value, Tensor) and name in _KNOWN:
            # Only the sample is on the meta device.
            return tracer.device if name == "device" else getattr(value, name)
        if name == "shape":
            return tracer.create_proxy("call_function", getattr, (self, "shape"), {})
        return super().__getattr__(name)

    def __getitem__(self, index: Any) -> Any:
        value = self.tracer.values.get(self.node)  # type: ignore[attr-defined]
        # How many channels there are is so for every image.
        if _is_shape(self.node) and value is not None and _of_channels(index, len(value)):
            return value[index]
        several = isinstance(value, tuple | list) and not isinstance(value, torch.Size)
        if several and isinstance(index, slice):
            return [self[place] for place in range(len(value))[index]]
        return self.tracer.create_proxy("call_function", operator.getitem, (self, index), {})

    def __len__(self) -> int:
        value = self.tracer.values.get(self.node)  # type: ignore[attr-defined]
        if isinstance(value, tuple | list):
            return len(value)
        return int(super().__len__())

    def __index__(self) -> int:
        return operator.index(self.tracer.number(self))  # type: ignore[attr-defined]

    def __int__(self) -> int:
        return int(self.tracer.number(self))  # type: ignore[attr-defined]

    def __float__(self) -> float:
        return float(self.tracer.number(self))  # type: ignore[attr-defined]


def _of_channels(place: Any, dims: int) -> bool:
    """Whether a tensor of so many dimensions has its channels there."""
    return (dims, place) in ((4, 1), (4, -3), (2, 1), (2, -1))


def _recorded(target: Callable[..., Any]) -> Any:
    def method(self: fx.Proxy, other: Any) -> fx.Proxy:
        return self.tracer.create_proxy("call_function", target, (self, other), {})

    return method


for _name in _INPLACE:
    setattr(SampleProxy, f"__{_name}__", _recorded(getattr(operator, _name)))


class SampleTracer(fx.Tracer):
    """torch.fx's tracer beside a sample. decides: whether the code may be led by what it
    is, and not only by what is so for every image."""

    record_stack_traces = True

    def __init__(self, model: nn.Module, image: Image | None, decides: bool) -> None:
        super().__init__()
        self.values: dict[fx.Node, Any] = {}
        self._image, self._decides = image, decides
        self._shadow = _shadow(model)
        self.device = next((p.device for p in model.parameters()), torch.device("cpu"))
        self._running = False  # a layer on the sample, of which nothing is to be recorded

    def run(self, model: nn.Module) -> tuple[fx.GraphModule, dict[fx.Node, Any]]:
        """The traced network, and what each node is for the sample. The model is left as it is.
        Raises RefusedError, SizeError."""
        before = set(vars(model))
        try:
            with torch.no_grad(), torch.random.fork_rng(devices=[]):
                graph = self.trace(model, _defaults(model))
            for node in graph.nodes:
                node.type = None  # annotations; torch 2.6 cannot pickle those that are strings
            return fx.GraphModule(model, graph), self._samples(graph)
        finally:
            for name in set(vars(model)) - before:
                delattr(model, name)

    def _samples(self, graph: fx.Graph) -> dict[fx.Node, Any]:
        """The values, with what changes in them for an image of another size."""
        if self._image is None:
            return {}
        values, (channels, height, width) = self.values, self._image
        self.values, self._image = {}, (channels, height + 32, width + 64)
        try:
            for node in graph.nodes:
                self._run(node)
        except RefusedError:
            pass  # a network of one size: from there on nothing is known to stay
        larger, self.values = self.values, values
        return {node: _shape(value, larger.get(node)) for node, value in values.items()}

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        """torch's own layers, and those of a network that is compact already."""
        ours = isinstance(m, SameConv2d | BorderConv2d | Expand | Pick)
        self._running = True
        proven = plain(m) is not None or normalises(m) is not None
        self._running = False
        return ours or proven or super().is_leaf_module(m, module_qualified_name)

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return SampleProxy(node, self)

    def create_proxy(self, kind: str, target: Any, *args: Any, **more: Any) -> Any:
        proxy = super().create_proxy(kind, target, *args, **more)
        node = proxy.node
        self._run(node)
        asks = node.op == "call_method" and target == "size" and len(node.args) == 2
        if asks and node in self.values:
            dims = self.values[node.all_input_nodes[0]].dim()
            return self.values[node] if _of_channels(node.args[1], dims) else proxy
        return proxy

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, Any]) -> Any:
        if self._running:
            return attr_val
        return super().getattr(attr, attr_val, parameter_proxy_cache)

    def call_module(
        self, m: nn.Module, forward: Callable[..., Any], args: Any, kwargs: dict[str, Any]
    ) -> Any:
        if self._running:
            return forward(*args, **kwargs)
        return super().call_module(m, forward, args, kwargs)

    def to_bool(self, obj: fx.Proxy) -> bool:
        return bool(self.number(obj))

    def iter(self, obj: fx.Proxy) -> Iterator[Any]:
        value = self.values.get(obj.node)
        if isinstance(value, tuple | list):
            return iter([operator.getitem(obj, place) for place in range(len(value))])
        return super().iter(obj)

    def number(self, proxy: fx.Proxy) -> Any:
        """The value of a size. Raises SizeError where that depends on an image nobody has given,
        TraceError for what is computed from pixels."""
        value = self.values.get(proxy.node)
        if not isinstance(value, int | float):
            return super().to_bool(proxy)
        if not self._decides:
            raise SizeError("the way through its code depends on the images' size")
        if _counts_images(proxy.node):
            raise GraphError("the way through its code depends on how many images there are")
        # Other sizes may go another way, and then must hear of it.
        self.create_node("call_function", check_way, (proxy.node, value), {})
        return value

    def _run(self, node: fx.Node) -> None:
        """The node on the sample. Raises RefusedError."""
        if self._image is None or node.op == "output" or node.target is check_way:
            return
        if node.op == "placeholder":
            dtype = next((p.dtype for p in self.root.parameters()), None)
            images = torch.empty(BATCH, *self._image, dtype=dtype, device="meta")
            default = node.args[0] if node.args else None
            self.values[node] = default if self.values else images
            return
        self._running = True
        try:
            for source in node.all_input_nodes:
                if source.op == "get_attr" and source not in self.values:  # buffers come unasked
                    self.values[source] = self._attribute(str(source.target))
            if all(source in self.values for source in node.all_input_nodes):
                self.values[node] = self._result(node)
        except Exception as error:
            raise RefusedError(error) from error
        finally:
            self._running = False

    def _result(self, node: fx.Node) -> Any:
        if node.op == "get_attr":
            return self._attribute(str(node.target))
        # What the code makes by itself may lie elsewhere.
        args: Any = map_aggregate(node.args, self._given)
        kwargs: Any = map_aggregate(node.kwargs, self._given)
        target: Any = node.target
        if node.op == "call_module":
            # Its hooks are the user's, and not meant for a sample.
            value = self._shadow.get_submodule(target).forward(*args, **kwargs)
        elif node.op == "call_method":
            value = getattr(args[0], target)(*args[1:], **kwargs)
        else:
            value = target(*args, **kwargs)
        if isinstance(value, torch.Size):
            return value
        return tree_map_only(Tensor, lambda made: made.to("meta"), value)

    def _given(self, argument: Any) -> Any:
        if isinstance(argument, fx.Node):
            return self.values[argument]
        return torch.device("meta") if isinstance(argument, torch.device) else argument

    def _attribute(self, name: str) -> Any:
        made = name.startswith("_tensor_constant")  # by torch.fx, of the code's own tensors
        value = operator.attrgetter(name)(self.root if made else self._shadow)
        return value.to("meta") if isinstance(value, Tensor) else value
