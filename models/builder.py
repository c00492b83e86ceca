"""A small fluent builder for ONNX graphs with seeded random weights.

    g = Graph(seed=0)
    x = g.input("batch", 3, 32, 32)
    y = g.conv_bn(x, 16, 3, stride=2)
    y = g.gemm(g.flatten(g.gap(y)), 10)
    model = g.model(y)

Every method returns a `Tensor` that knows its own shape, so no caller repeats input widths. The
shapes come from ONNX's own per-node inference; where an operator's shape depends on a computed
tensor, pass `shape=`. The operator set is fixed when the graph is made, because it decides
whether axes, sizes and bounds are attributes or inputs.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import onnx
from numpy.typing import ArrayLike, DTypeLike, NDArray
from onnx import (
    GraphProto,
    ModelProto,
    NodeProto,
    TensorProto,
    TypeProto,
    helper,
    numpy_helper,
)

Dim = int | str
Array = NDArray[Any]
Storage = Literal["initializer", "constant", "input"]

UNKNOWN = "?"
"""An extent that shape inference could not tell."""

_SMALL = 256
"""Constants up to this many elements are shown to shape inference."""

_WEIGHTED = frozenset({"Conv", "ConvTranspose", "Gemm", "MatMul", "BatchNormalization", "PRelu"})


@dataclass(frozen=True)
class Tensor:
    """A named value of a graph under construction."""

    name: str
    shape: tuple[Dim, ...]
    dtype: int = TensorProto.FLOAT

    @property
    def rank(self) -> int:
        """The number of axes."""
        return len(self.shape)

    @property
    def channels(self) -> int:
        """The extent of axis 1."""
        return self.extent(1)

    @property
    def spatial(self) -> tuple[int, ...]:
        """The extents behind the channel axis."""
        return tuple(self.extent(axis) for axis in range(2, self.rank))

    def extent(self, axis: int) -> int:
        """The extent of `axis`, which must be a number."""
        dim = self.shape[axis]
        if isinstance(dim, str):
            raise TypeError(f"axis {axis} of {self.name!r} is {dim!r}, not a number")
        return dim

    def value_info(self) -> onnx.ValueInfoProto:
        """The declaration of this tensor as an input, output or intermediate value."""
        dims = [None if dim == UNKNOWN else dim for dim in self.shape]
        return helper.make_tensor_value_info(self.name, self.dtype, dims)


class Graph:
    """An ONNX graph under construction.

    `storage` says where weights go: graph initializers, `Constant` nodes, or initializers that
    are graph inputs as well (which IR versions below 4 require).
    """

    def __init__(
        self,
        name: str = "graph",
        *,
        opset: int = 17,
        ir: int = 8,
        seed: int = 0,
        storage: Storage = "initializer",
    ) -> None:
        self.name = name
        self.opset = opset
        self.ir = ir
        self.storage: Storage = storage
        self.rng = np.random.default_rng(seed)
        self.nodes: list[NodeProto] = []
        self.inputs: list[Tensor] = []
        self.initializers: list[TensorProto] = []
        self._names: Counter[str] = Counter()
        self._scope: list[str] = []
        self._known: dict[str, TensorProto] = {}
        self._domains: set[str] = set()

    # Names, inputs and constants

    @contextmanager
    def scope(self, name: str) -> Iterator[None]:
        """Prefix the names made inside with `name` and a dot."""
        self._scope.append(name)
        try:
            yield
        finally:
            self._scope.pop()

    def fresh(self, hint: str) -> str:
        """A new name such as `layer1.conv_2` for the hint `conv`."""
        stem = ".".join([*self._scope, hint])
        self._names[stem] += 1
        return f"{stem}_{self._names[stem]}"

    def input(self, *shape: Dim, name: str = "input", dtype: int = TensorProto.FLOAT) -> Tensor:
        """Declare a graph input."""
        tensor = Tensor(name, shape, dtype)
        self.inputs.append(tensor)
        return tensor

    def store(self, name: str, array: Array, storage: Storage | None = None) -> Tensor:
        """Add a constant tensor under exactly this name."""
        proto = numpy_helper.from_array(array, name)
        tensor = Tensor(name, array.shape, proto.data_type)
        where = storage or self.storage
        if where == "constant":
            node = helper.make_node("Constant", [], [name], name=f"{name}.constant", value=proto)
            self.nodes.append(node)
        else:
            self.initializers.append(proto)
        if where == "input":
            self.inputs.append(tensor)
        if array.size <= _SMALL:
            self._known[name] = proto
        return tensor

    def const(self, value: ArrayLike, dtype: DTypeLike = np.int64, *, name: str | None = None) -> Tensor:
        """Add a constant; integers unless told otherwise, as shapes and axes are."""
        return self.store(name or self.fresh("const"), np.asarray(value, dtype))

    def normal(self, *shape: int, scale: float = 1.0, mean: float = 0.0) -> NDArray[np.float32]:
        """Normally distributed float32 numbers."""
        draw = self.rng.standard_normal(shape, dtype=np.float32)
        return draw * np.float32(scale) + np.float32(mean)

    def uniform(self, low: float, high: float, *shape: int) -> NDArray[np.float32]:
        """Uniformly distributed float32 numbers."""
        return self.rng.uniform(low, high, shape).astype(np.float32)

    def he(self, *shape: int, fan_in: int) -> NDArray[np.float32]:
        """Weights that keep the variance of what passes through them and a ReLU."""
        return self.normal(*shape, scale=math.sqrt(2.0 / fan_in))

    # Any operator

    def op(
        self,
        op_type: str,
        *inputs: Tensor | None,
        domain: str = "",
        name: str | None = None,
        shape: Sequence[Dim] | None = None,
        dtype: int | None = None,
        **attributes: Any,
    ) -> Tensor:
        """Add a node with one output; `None` stands for an absent optional input.

        `shape` and `dtype` (that of the first input by default) take the place of inference.
        """
        node, present = self._emit(op_type, inputs, 1, domain, name, attributes)
        if shape is not None:
            return Tensor(node.output[0], tuple(shape), dtype or present[0].dtype)
        return self._infer(node, present)[0]

    def ops(self, op_type: str, *inputs: Tensor | None, outputs: int, **attributes: Any) -> list[Tensor]:
        """Add a node of the default domain with several outputs."""
        return self._infer(*self._emit(op_type, inputs, outputs, "", None, attributes))

    def _emit(
        self,
        op_type: str,
        inputs: Sequence[Tensor | None],
        outputs: int,
        domain: str,
        name: str | None,
        attributes: dict[str, Any],
    ) -> tuple[NodeProto, list[Tensor]]:
        name = name or self.fresh(op_type.lower())
        results = [f"{name}.output"] if outputs == 1 else [f"{name}.{i}" for i in range(outputs)]
        operands = ["" if tensor is None else tensor.name for tensor in inputs]
        node = helper.make_node(op_type, operands, results, name=name, domain=domain, **attributes)
        self.nodes.append(node)
        self._domains.add(domain)
        return node, [tensor for tensor in inputs if tensor is not None]

    def _infer(self, node: NodeProto, inputs: list[Tensor]) -> list[Tensor]:
        types = onnx.shape_inference.infer_node_outputs(
            onnx.defs.get_schema(node.op_type, self.opset, node.domain),
            node,
            {tensor.name: tensor.value_info().type for tensor in inputs},
            {name: self._known[name] for name in node.input if name in self._known},
            opset_imports=[helper.make_opsetid(node.domain, self.opset)],
            ir_version=self.ir,
        )
        return [_typed(name, types.get(name), node.op_type) for name in node.output]

    # Operators with weights

    def conv(
        self,
        x: Tensor,
        cout: int = 0,
        k: int | Sequence[int] = 3,
        *,
        stride: int | Sequence[int] = 1,
        group: int = 1,
        dilation: int = 1,
        pad: int | Sequence[int] | None = None,
        bias: bool | Tensor = True,
        weight: Tensor | None = None,
    ) -> Tensor:
        """A convolution over all axes behind the channels, padded to keep them unless told.

        Give `weight` to use an existing tensor; `cout` and `k` are then read off its shape.
        """
        dims = x.rank - 2
        name = self.fresh("conv")
        if weight is None:
            kernel = _per_axis(k, dims)
            per_group = x.channels // group
            array = self.he(cout, per_group, *kernel, fan_in=per_group * math.prod(kernel))
            weight = self.store(f"{name}.weight", array)
        kernel = [weight.extent(axis) for axis in range(2, weight.rank)]
        operands = [x, weight, *self._bias(name, weight.extent(0), bias)]
        attributes: dict[str, Any] = {"kernel_shape": kernel, "pads": _pads(kernel, dilation, pad)}
        if stride != 1:
            attributes["strides"] = _per_axis(stride, dims)
        if dilation != 1:
            attributes["dilations"] = [dilation] * dims
        if group != 1:
            attributes["group"] = group
        return self.op("Conv", *operands, name=name, **attributes)

    def conv_transpose(
        self,
        x: Tensor,
        cout: int,
        k: int = 2,
        *,
        stride: int = 2,
        group: int = 1,
        pad: int = 0,
        bias: bool | Tensor = True,
    ) -> Tensor:
        """A transposed convolution; the weight is (in, out / group, ...)."""
        dims = x.rank - 2
        name = self.fresh("convtranspose")
        fan_in = max(1, x.channels // group * k**dims // stride**dims)
        array = self.he(x.channels, cout // group, *[k] * dims, fan_in=fan_in)
        weight = self.store(f"{name}.weight", array)
        return self.op(
            "ConvTranspose",
            x,
            weight,
            *self._bias(name, cout, bias),
            name=name,
            kernel_shape=[k] * dims,
            strides=[stride] * dims,
            pads=[pad] * (2 * dims),
            group=group,
        )

    def _bias(self, name: str, width: int, bias: bool | Tensor) -> list[Tensor]:
        if isinstance(bias, Tensor):
            return [bias]
        return [self.store(f"{name}.bias", self.normal(width, scale=0.1))] if bias else []

    def bn(self, x: Tensor, *, eps: float = 1e-5, gain: float = 1.0) -> Tensor:
        """A batch normalisation whose scales, shifts, means and variances are all non-trivial.

        `gain` scales the output: below one on residual branches, so that deep sums stay small.
        """
        name = self.fresh("bn")
        width = x.channels
        parts = {
            "scale": self.uniform(0.6 * gain, 1.4 * gain, width),
            "bias": self.normal(width, scale=0.2 * gain),
            "mean": self.normal(width, scale=0.2),
            "var": self.uniform(0.5, 1.5, width),
        }
        vectors = [self.store(f"{name}.{part}", array) for part, array in parts.items()]
        return self.op("BatchNormalization", x, *vectors, name=name, epsilon=eps)

    def conv_bn(
        self,
        x: Tensor,
        cout: int,
        k: int | Sequence[int] = 3,
        *,
        stride: int = 1,
        group: int = 1,
        pad: int | Sequence[int] | None = None,
        act: str | None = "relu",
        eps: float = 1e-5,
        gain: float = 1.0,
    ) -> Tensor:
        """A convolution without bias, a batch normalisation and an activation."""
        y = self.conv(x, cout, k, stride=stride, group=group, pad=pad, bias=False)
        return self.act(self.bn(y, eps=eps, gain=gain), act)

    def gemm(
        self,
        x: Tensor,
        cout: int,
        *,
        bias: bool | Tensor = True,
        weight: Tensor | None = None,
        trans_a: bool = False,
        trans_b: bool = True,
        alpha: float = 1.0,
        beta: float = 1.0,
    ) -> Tensor:
        """A Gemm with a stored second operand, (out, in) unless `trans_b` is off."""
        name = self.fresh("gemm")
        cin = x.extent(0 if trans_a else 1)
        if weight is None:
            array = self.he(*((cout, cin) if trans_b else (cin, cout)), fan_in=cin)
            weight = self.store(f"{name}.weight", array)
        attributes: dict[str, Any] = {}
        if trans_a:
            attributes["transA"] = 1
        if trans_b:
            attributes["transB"] = 1
        if alpha != 1.0:
            attributes["alpha"] = alpha
        if beta != 1.0:
            attributes["beta"] = beta
        return self.op("Gemm", x, weight, *self._bias(name, cout, bias), name=name, **attributes)

    def matmul(self, x: Tensor, cout: int, *, bias: bool = False) -> Tensor:
        """A MatMul with a stored matrix on the right, then an Add if `bias`."""
        name = self.fresh("matmul")
        cin = x.extent(-1)
        weight = self.store(f"{name}.weight", self.he(cin, cout, fan_in=cin))
        y = self.op("MatMul", x, weight, name=name)
        return self.op("Add", y, *self._bias(name, cout, True)) if bias else y

    # Operators without weights

    def act(self, x: Tensor, kind: str | None) -> Tensor:
        """An activation by name: relu, relu6, silu, hardswish, hardsigmoid, sigmoid, or none."""
        match kind:
            case None:
                return x
            case "relu":
                return self.op("Relu", x)
            case "relu6":
                return self.clip(x, 0.0, 6.0)
            case "silu":
                return self.mul(x, self.op("Sigmoid", x))
            case "hardswish":
                return self.op("HardSwish", x)
            case "hardsigmoid":
                return self.op("HardSigmoid", x, alpha=1 / 6)
            case "sigmoid":
                return self.op("Sigmoid", x)
        raise ValueError(f"unknown activation {kind!r}")

    def relu(self, x: Tensor) -> Tensor:
        """max(x, 0)."""
        return self.op("Relu", x)

    def add(self, *xs: Tensor) -> Tensor:
        """The sum of two or more tensors by nested Add nodes."""
        total = xs[0]
        for x in xs[1:]:
            total = self.op("Add", total, x)
        return total

    def mul(self, x: Tensor, y: Tensor) -> Tensor:
        """The product of two tensors."""
        return self.op("Mul", x, y)

    def concat(self, *xs: Tensor, axis: int = 1) -> Tensor:
        """Tensors side by side."""
        return self.op("Concat", *xs, axis=axis)

    def split(self, x: Tensor, parts: int | Sequence[int], axis: int = 1) -> list[Tensor]:
        """Equal parts, or parts of the given sizes, in the form of the graph's operator set."""
        if isinstance(parts, int):
            attributes: dict[str, Any] = {"axis": axis}
            if self.opset >= 18:
                attributes["num_outputs"] = parts
            return self.ops("Split", x, outputs=parts, **attributes)
        if self.opset < 13:
            return self.ops("Split", x, outputs=len(parts), axis=axis, split=parts)
        return self.ops("Split", x, self.const(parts), outputs=len(parts), axis=axis)

    def reshape(self, x: Tensor, *dims: int, shape: Sequence[Dim] | None = None) -> Tensor:
        """A Reshape to constant dims, among them 0 (copy) and -1 (the rest).

        A -1 that stands for a symbolic extent needs `shape`.
        """
        return self.op("Reshape", x, self.const(dims), shape=shape)

    def transpose(self, x: Tensor, *perm: int) -> Tensor:
        """The axes of `x` in another order."""
        return self.op("Transpose", x, perm=perm)

    def flatten(self, x: Tensor) -> Tensor:
        """(n, c, ...) to (n, everything else)."""
        return self.op("Flatten", x, axis=1)

    def gap(self, x: Tensor) -> Tensor:
        """The mean over space, (n, c, 1, 1)."""
        return self.op("GlobalAveragePool", x)

    def max_pool(
        self, x: Tensor, k: int, *, stride: int | None = None, pad: int = 0, ceil: bool = False
    ) -> Tensor:
        """A max pooling; the stride is the kernel unless told."""
        return self._pool("MaxPool", x, k, stride, pad, ceil)

    def avg_pool(self, x: Tensor, k: int, *, stride: int | None = None, pad: int = 0) -> Tensor:
        """An average pooling; the stride is the kernel unless told."""
        return self._pool("AveragePool", x, k, stride, pad, ceil=False)

    def _pool(self, op_type: str, x: Tensor, k: int, stride: int | None, pad: int, ceil: bool) -> Tensor:
        dims = x.rank - 2
        attributes: dict[str, Any] = {
            "kernel_shape": [k] * dims,
            "strides": [stride or k] * dims,
            "pads": [pad] * (2 * dims),
        }
        if ceil:
            attributes["ceil_mode"] = 1
        return self.op(op_type, x, **attributes)

    def clip(self, x: Tensor, low: float, high: float) -> Tensor:
        """A Clip; bounds are attributes below operator set 11."""
        if self.opset < 11:
            return self.op("Clip", x, min=low, max=high)
        return self.op("Clip", x, self.const(low, np.float32), self.const(high, np.float32))

    def dropout(self, x: Tensor, ratio: float = 0.5) -> Tensor:
        """An inference-time Dropout; the ratio is an attribute below operator set 12."""
        if self.opset < 12:
            return self.op("Dropout", x, ratio=ratio)
        return self.op("Dropout", x, self.const(ratio, np.float32))

    def pad(self, x: Tensor, before: Sequence[int], after: Sequence[int], mode: str = "constant") -> Tensor:
        """A Pad of every axis; sizes are attributes below operator set 11."""
        pads = [*before, *after]
        if self.opset < 11:
            return self.op("Pad", x, pads=pads, mode=mode)
        return self.op("Pad", x, self.const(pads), mode=mode)

    def slice(
        self,
        x: Tensor,
        starts: Sequence[int],
        ends: Sequence[int],
        axes: Sequence[int],
        steps: Sequence[int] | None = None,
    ) -> Tensor:
        """A Slice; bounds are attributes below operator set 10."""
        if self.opset < 10:
            return self.op("Slice", x, starts=starts, ends=ends, axes=axes)
        bounds = [self.const(starts), self.const(ends), self.const(axes)]
        return self.op("Slice", x, *bounds, *([self.const(steps)] if steps else []))

    def squeeze(self, x: Tensor, *axes: int) -> Tensor:
        """A Squeeze; axes are an attribute below operator set 13."""
        return self._with_axes("Squeeze", x, axes, attribute=self.opset < 13)

    def unsqueeze(self, x: Tensor, *axes: int) -> Tensor:
        """An Unsqueeze; axes are an attribute below operator set 13."""
        return self._with_axes("Unsqueeze", x, axes, attribute=self.opset < 13)

    def reduce(self, op_type: str, x: Tensor, *axes: int, keepdims: bool = True) -> Tensor:
        """A reduction; axes are an attribute below operator set 18 (13 for ReduceSum)."""
        attribute = self.opset < (13 if op_type == "ReduceSum" else 18)
        return self._with_axes(op_type, x, axes, attribute=attribute, keepdims=int(keepdims))

    def _with_axes(
        self, op_type: str, x: Tensor, axes: Sequence[int], *, attribute: bool, **others: Any
    ) -> Tensor:
        if attribute:
            return self.op(op_type, x, axes=axes, **others)
        return self.op(op_type, x, self.const(axes), **others)

    def resize(
        self,
        x: Tensor,
        *,
        scales: Sequence[float] | None = None,
        sizes: Sequence[int] | None = None,
        shape: Sequence[Dim] | None = None,
        mode: str = "nearest",
    ) -> Tensor:
        """A Resize by factors or to sizes; exactly one of them, one number per axis."""
        coordinates = "asymmetric" if mode == "nearest" else "half_pixel"
        attributes: dict[str, Any] = {
            "mode": mode,
            "coordinate_transformation_mode": coordinates,
        }
        if mode == "nearest":
            attributes["nearest_mode"] = "floor"
        if sizes is not None:
            extents = self.const(sizes)
            return self.op("Resize", x, None, None, extents, shape=shape, **attributes)
        factors = self.const(scales or [], np.float32)
        return self.op("Resize", x, None, factors, shape=shape, **attributes)

    def upsample(self, x: Tensor, factor: int = 2) -> Tensor:
        """Nearest-neighbour upsampling of both spatial axes."""
        return self.resize(x, scales=[1, 1, factor, factor])

    def channel_shuffle(self, x: Tensor, groups: int) -> Tensor:
        """Reshape to (groups, c / groups), swap, and reshape back."""
        height, width = x.spatial
        y = self.reshape(x, 0, groups, x.channels // groups, height, width)
        return self.reshape(self.transpose(y, 0, 2, 1, 3, 4), 0, x.channels, height, width)

    # The result

    def subgraph(self) -> Graph:
        """An empty graph for a body of If, Loop or Scan, which may read this graph's tensors."""
        body = Graph(self.fresh("body"), opset=self.opset, ir=self.ir)
        body.rng, body._names, body._known = self.rng, self._names, self._known
        body._scope = [*self._scope, body.name]
        return body

    def graph(self, *outputs: Tensor) -> GraphProto:
        """The graph with these outputs, under their own names."""
        return helper.make_graph(
            self.nodes,
            self.name,
            [tensor.value_info() for tensor in self.inputs],
            [tensor.value_info() for tensor in outputs],
            self.initializers,
        )

    def model(self, *outputs: Tensor, names: Sequence[str] = ()) -> ModelProto:
        """The finished model; outputs are called `output`, or `output_0` and so on, or `names`."""
        if not names:
            single = len(outputs) == 1
            names = ["output"] if single else [f"output_{i}" for i in range(len(outputs))]
        graph = self.graph(*outputs)
        renamed = {tensor.name: name for tensor, name in zip(outputs, names, strict=True)}
        for node in graph.node:
            for names_of in (node.input, node.output):
                names_of[:] = [renamed.get(name, name) for name in names_of]
        for info in graph.output:
            info.name = renamed[info.name]
        opsets = [helper.make_opsetid("", self.opset)]
        opsets += [helper.make_opsetid(domain, 1) for domain in sorted(self._domains - {""})]
        return helper.make_model(
            graph, producer_name="onnxprune-models", opset_imports=opsets, ir_version=self.ir
        )


def parameters(model: ModelProto) -> int:
    """The number of trained numbers: what weighted layers read, less BatchNorm statistics."""
    sizes = {tensor.name: math.prod(tensor.dims) for tensor in model.graph.initializer}
    for node in model.graph.node:
        if node.op_type == "Constant" and node.attribute[0].name == "value":
            sizes[node.output[0]] = math.prod(node.attribute[0].t.dims)
    read = {
        name
        for node in model.graph.node
        if node.op_type in _WEIGHTED
        for name in node.input[1 : 3 if node.op_type == "BatchNormalization" else None]
    }
    return sum(sizes.get(name, 0) for name in read)


def macs(model: ModelProto) -> int:
    """Multiply-accumulates of Conv, ConvTranspose and Gemm nodes for a batch of one."""
    inferred = onnx.shape_inference.infer_shapes(model).graph
    shapes = {
        info.name: [dim.dim_value or 1 for dim in info.type.tensor_type.shape.dim]
        for info in [*inferred.value_info, *inferred.input, *inferred.output]
    }
    shapes.update((tensor.name, list(tensor.dims)) for tensor in inferred.initializer)
    total = 0
    for node in inferred.node:
        if node.op_type == "Conv":
            total += math.prod(shapes[node.output[0]]) * math.prod(shapes[node.input[1]][1:])
        elif node.op_type == "ConvTranspose":
            total += math.prod(shapes[node.input[0]]) * math.prod(shapes[node.input[1]][1:])
        elif node.op_type == "Gemm":
            total += math.prod(shapes[node.input[1]])
    return total


def _typed(name: str, inferred: TypeProto | None, op_type: str) -> Tensor:
    if inferred is None or not inferred.tensor_type.HasField("shape"):
        raise ValueError(f"the shape of {name!r} ({op_type}) cannot be inferred: pass shape=")
    dims = inferred.tensor_type.shape.dim
    shape = [dim.dim_value if dim.HasField("dim_value") else dim.dim_param or UNKNOWN for dim in dims]
    return Tensor(name, tuple(shape), inferred.tensor_type.elem_type)


def _per_axis(value: int | Sequence[int], dims: int) -> list[int]:
    return [value] * dims if isinstance(value, int) else list(value)


def _pads(kernel: Sequence[int], dilation: int, pad: int | Sequence[int] | None) -> list[int]:
    if pad is None:
        half = [dilation * (size - 1) // 2 for size in kernel]
        return half + half
    return [pad] * (2 * len(kernel)) if isinstance(pad, int) else list(pad)
