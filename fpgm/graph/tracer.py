"""Python code to a torch.fx graph, with a sample image that runs along.

torch.fx alone knows no shapes: `if x.shape[-1] < k`, `for part in x.split(8, 1)` and a view of
channels into groups end there. Here every operation is also run on the meta device, where tensors
have shapes and no values, so that sizes have values where the code asks for them, and later steps
know the shape of every result. Sizes stay operations of the graph all the same: what is made of it
takes images of any size.
"""

from __future__ import annotations

import contextlib
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
from fpgm.graph.operations import ELEMENTWISE_MODULES, check_way, is_shape
from fpgm.graph.probes import normalises, plain
from fpgm.networks.layers import BorderConv2d, BorderMap, Expand, Pick, SameConv2d

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


def _keeps_shape(module: nn.Module, args: Any) -> bool:
    """Whether a layer is known to give what it gets the shape it has: torch's meta device takes
    longer over these than over all else of a network together."""
    if len(args) != 1 or not isinstance(args[0], Tensor):
        return False
    if type(module) is nn.BatchNorm2d:
        return args[0].dim() == 4 and args[0].shape[1] == module.num_features
    return type(module) in ELEMENTWISE_MODULES


def _counts_images(node: fx.Node) -> bool:
    """Whether a number is made from the size of the batch."""
    first = len(node.args) == 2 and node.args[1] == 0
    if first and node.target is operator.getitem:
        return isinstance(node.args[0], fx.Node) and is_shape(node.args[0])
    if first and node.target == "size":
        return True
    return any(_counts_images(n) for n in node.all_input_nodes if n.op == "call_function")


def _shape(value: Any, other: Any) -> Any:
    """What is told of a value. other: the same for a larger image, None where it is not known."""
    if isinstance(value, Tensor):
        alike = isinstance(other, Tensor) and other.dim() == value.dim()
        larger = other.shape if alike else [0] * value.dim()
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
        tracer: SampleTracer = self.tracer  # type: ignore[assignment]
        value = tracer.values.get(self.node)
        if value is not None and is_shape(self.node):
            if isinstance(index, slice) and 1 in range(len(value))[index]:
                return tuple(self[place] for place in range(len(value))[index])
            # How many channels there are is so for every image.
            if isinstance(index, int) and index % len(value) == 1 and tracer.stays(self.node, 1):
                return value[index]
        elif isinstance(value, tuple | list) and isinstance(index, slice):
            return [self[place] for place in range(tracer.parts(self.node))[index]]
        return tracer.create_proxy("call_function", operator.getitem, (self, index), {})

    def __len__(self) -> int:
        tracer: SampleTracer = self.tracer  # type: ignore[assignment]
        if isinstance(tracer.values.get(self.node), tuple | list):
            return tracer.parts(self.node)
        return int(super().__len__())

    def __index__(self) -> int:
        return operator.index(self.tracer.number(self))  # type: ignore[attr-defined]

    def __int__(self) -> int:
        return int(self.tracer.number(self))  # type: ignore[attr-defined]

    def __float__(self) -> float:
        return float(self.tracer.number(self))  # type: ignore[attr-defined]


def _recorded(target: Callable[..., Any], twin: Callable[..., Any]) -> Any:
    def method(self: fx.Proxy, other: Any) -> fx.Proxy:
        # A number is not overwritten: it gets another name.
        value = self.tracer.values.get(self.node)  # type: ignore[attr-defined]
        done = twin if isinstance(value, int | float) else target
        return self.tracer.create_proxy("call_function", done, (self, other), {})

    return method


for _name in _INPLACE:
    _targets = (getattr(operator, name) for name in (_name, _name[1:]))
    setattr(SampleProxy, f"__{_name}__", _recorded(*_targets))


class SampleTracer(fx.Tracer):
    """torch.fx's tracer beside a sample. decides: whether the code may be led by what it
    is, and not only by what is so for every image."""

    record_stack_traces = True

    def __init__(self, model: nn.Module, image: Image | None, decides: bool) -> None:
        super().__init__()
        self.values: dict[fx.Node, Any] = {}
        self.larger: dict[fx.Node, Any] = {}  # the same for a larger image, and more of them
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
            network, told = fx.GraphModule(model, graph), self.values.items()
            return network, {node: _shape(value, self.larger.get(node)) for node, value in told}
        finally:
            for name in set(vars(model)) - before:
                delattr(model, name)

    def stays(self, shape: fx.Node, place: int) -> bool:
        """Whether a dimension is the same for images of another size."""
        other = self.larger.get(shape)
        return other is not None and bool(other[place] == self.values[shape][place])

    def parts(self, node: fx.Node) -> int:
        """How many tensors or sizes there are, for every image. Raises SizeError where that depends
        on the image and nobody has said what image."""
        value, other = self.values[node], self.larger.get(node)
        if other is None or len(other) != len(value):
            count = self.create_proxy("call_function", len, (fx.Proxy(node, self),), {})
            return int(self.number(count))
        return len(value)

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        """torch's own layers, and those of a network that is compact already."""
        ours = isinstance(m, SameConv2d | BorderConv2d | BorderMap | Expand | Pick)
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
            same = self.larger.get(node) == self.values[node]
            return self.values[node] if same and node.args[1] % dims == 1 else proxy
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
        if isinstance(self.values.get(obj.node), tuple | list):
            return iter([obj[place] for place in range(self.parts(obj.node))])  # type: ignore[index]
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
        """The node on the sample, and on a larger one of more images. Raises RefusedError."""
        if self._image is None or node.op == "output" or node.target is check_way:
            return
        channels, height, width = self._image
        self._running = True
        try:
            self._compute(node, self.values, (BATCH, *self._image))
            with contextlib.suppress(Exception):  # a network of one size
                self._compute(node, self.larger, (BATCH + 1, channels, height + 32, width + 64))
        except Exception as error:
            raise RefusedError(error) from error
        finally:
            self._running = False

    def _compute(self, node: fx.Node, values: dict[fx.Node, Any], images: tuple[int, ...]) -> None:
        """What a node is for such images, where it is known of what it takes."""
        if node.op == "placeholder":
            dtype = next((p.dtype for p in self.root.parameters()), None)
            default = node.args[0] if node.args else None
            first = torch.empty(images, dtype=dtype, device="meta")
            values[node] = default if values else first
            return
        for source in node.all_input_nodes:
            if source.op == "get_attr" and source not in values:  # buffers come unasked
                values[source] = self._attribute(str(source.target))
        if all(source in values for source in node.all_input_nodes):
            values[node] = self._result(node, values)

    def _result(self, node: fx.Node, values: dict[fx.Node, Any]) -> Any:
        if node.op == "get_attr":
            return self._attribute(str(node.target))

        def given(argument: Any) -> Any:
            if isinstance(argument, fx.Node):
                return values[argument]
            # What the code makes by itself may lie elsewhere.
            return torch.device("meta") if isinstance(argument, torch.device) else argument

        args: Any = map_aggregate(node.args, given)
        kwargs: Any = map_aggregate(node.kwargs, given)
        target: Any = node.target
        if node.op == "call_module":
            module = self._shadow.get_submodule(target)
            if _keeps_shape(module, args):
                return torch.empty_like(args[0])
            # Its hooks are the user's, and not meant for a sample.
            value = module.forward(*args, **kwargs)
        elif node.op == "call_method":
            value = getattr(args[0], target)(*args[1:], **kwargs)
        else:
            value = target(*args, **kwargs)
        if isinstance(value, torch.Size):
            return value
        return tree_map_only(Tensor, lambda made: made.to("meta"), value)

    def _attribute(self, name: str) -> Any:
        made = name.startswith("_tensor_constant")  # by torch.fx, of the code's own tensors
        value = operator.attrgetter(name)(self.root if made else self._shadow)
        return value.to("meta") if isinstance(value, Tensor) else value
