"""Python code to a torch.fx graph, with a sample image that runs along.

torch.fx alone knows no shapes: `if x.shape[-1] < k`, `for part in x.split(8, 1)` and a view of
channels into groups end there. Here every operation is also run on an image of zeros, so that sizes
have values where the code asks for them, and later steps know the shape of every result. Sizes
stay operations of the graph all the same: what is made of it takes images of any size.
"""

from __future__ import annotations

import operator
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn

from fpgm.errors import GraphError, first_line
from fpgm.graph.probes import normalises, plain
from fpgm.networks.layers import BorderConv2d, Expand, Pick, SameConv2d

Image = tuple[int, int, int]  # (C, H, W)

BATCH = 2  # of the sample: one image would hide what mixes images
PIXELS = (64, 224, 32, 28, 299)  # that are tried where nobody says
_INPLACE = ("iadd", "isub", "imul", "itruediv", "ipow", "ifloordiv", "imod")


@dataclass(frozen=True)
class Shape:
    """Of the tensor that an operation gives for the sample."""

    sizes: tuple[int, ...]
    dtype: torch.dtype


class SizeError(GraphError):
    """The code asks for a size that depends on the image, and nobody has said what image."""


def traced(model: nn.Module, image: Image | None) -> tuple[fx.Graph, dict[fx.Node, Any]]:
    """The graph of a network in eval mode, and what each node is for a sample: a Shape for a
    tensor, a number or a tuple as it is. No samples where no image is given and none fits.

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
        tracer = SampleTracer(sample, decides)
        try:
            with torch.no_grad(), torch.random.fork_rng(devices=[]):
                graph = tracer.trace(model, _defaults(model))
            return graph, {node: _shape(tracer.values.get(node)) for node in graph.nodes}
        except SizeError:
            if not known:
                raise
        except Refused as error:
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


class Refused(Exception):
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
    import inspect

    parameters = list(inspect.signature(model.forward).parameters.values())[1:]
    given = {p.name: p.default for p in parameters if p.default is not p.empty}
    return given or None


def _shape(value: Any) -> Any:
    if isinstance(value, Tensor):
        return Shape(tuple(value.shape), value.dtype)
    if isinstance(value, tuple | list):
        return tuple(_shape(one) for one in value)
    return value if isinstance(value, int | float | str | torch.dtype | slice) else None


class SampleProxy(fx.Proxy):
    """Knows the number of dimensions, and records `x += y` as what it is: torch.fx's own proxy
    takes some of these for `x = x + y`."""

    def __getattr__(self, name: str) -> Any:
        value = self.tracer.values.get(self.node)  # type: ignore[attr-defined]
        if isinstance(value, Tensor) and name in ("ndim", "dim"):
            return value.dim() if name == "ndim" else value.dim
        if isinstance(value, Tensor) and name == "is_sparse":
            return False
        return super().__getattr__(name)

    def __getitem__(self, index: Any) -> Any:
        value = self.tracer.values.get(self.node)  # type: ignore[attr-defined]
        # How many channels there are is so for every image.
        if isinstance(value, torch.Size) and _of_channels(index, len(value)):
            return value[index]
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
    """torch.fx's tracer beside an image of zeros. decides: whether the code may be led by what it
    is, and not only by what is so for every image."""

    record_stack_traces = True

    def __init__(self, image: Image | None, decides: bool) -> None:
        super().__init__()
        self.values: dict[fx.Node, Any] = {}
        self._image, self._decides = image, decides
        self._running = False  # a layer on the sample, of which nothing is to be recorded

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
            dims = self.values[node.args[0]].dim()
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
            return iter([obj[place] for place in range(len(value))])
        return super().iter(obj)

    def number(self, proxy: fx.Proxy) -> Any:
        """The value of a size. Raises SizeError where that depends on an image nobody has given,
        TraceError for what is computed from pixels."""
        value = self.values.get(proxy.node)
        if not isinstance(value, int | float):
            return super().to_bool(proxy)
        if not self._decides:
            raise SizeError("the way through its code depends on the images' size")
        return value

    def _run(self, node: fx.Node) -> None:
        """The node on the sample. Raises Refused."""
        if self._image is None or node.op == "output":
            return
        if node.op == "placeholder":
            parameter = next(self.root.parameters(), torch.zeros(()))
            options = {"dtype": parameter.dtype, "device": parameter.device}
            first = not self.values
            default = node.args[0] if node.args else None
            self.values[node] = torch.zeros(BATCH, *self._image, **options) if first else default  # type: ignore[arg-type]
            return
        self._running = True
        try:
            for source in node.all_input_nodes:
                if source.op == "get_attr" and source not in self.values:  # buffers come unasked
                    self.values[source] = self._result(source, (), {})
            if all(source in self.values for source in node.all_input_nodes):
                values = self.values.__getitem__
                args, kwargs = (fx.node.map_arg(given, values) for given in (node.args, node.kwargs))
                self.values[node] = self._result(node, args, kwargs)
        except Exception as error:
            raise Refused(error) from error
        finally:
            self._running = False

    def _result(self, node: fx.Node, args: Any, kwargs: Any) -> Any:
        target: Any = node.target
        if node.op == "get_attr":
            return operator.attrgetter(target)(self.root)
        if node.op == "call_module":
            # Its hooks are the user's, and not meant for an image of zeros.
            return self.root.get_submodule(target).forward(*args, **kwargs)
        if node.op == "call_method":
            return getattr(args[0], target)(*args[1:], **kwargs)
        return target(*args, **kwargs)
