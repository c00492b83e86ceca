"""Quantised graphs without the rounding of activations.

Rounding turns a difference in the last bit into one of a whole quantum, which says nothing about the graph.
Here every quantised integer that is computed becomes the float that would have been rounded, neither rounded
nor clipped, counted from its zero point. Weights keep the values that are stored. What an operator without a
form here reads is rounded again.
"""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from onnxprune.model import FLOATS, Array, copied, copied_node, subgraphs, to_array
from onnxprune.ops.real import FORMS, Real
from onnxprune.shapes import Shapes

PREFIX = "onnxprune.unrounded."
# Operators that mean the same on floats that count from a zero point: which operands are such floats.
_CARRIED: dict[str, range | tuple[int, ...]] = {
    **dict.fromkeys(("Concat", "Max", "Min", "Clip"), range(2**31)),
    **dict.fromkeys(
        (
            "DepthToSpace", "Expand", "Flatten", "Gather", "GatherElements", "GatherND", "Identity", "MaxPool",
            "Reshape", "Resize", "Slice", "SpaceToDepth", "Split", "Squeeze", "Tile", "Transpose", "Unsqueeze",
            "Upsample",
        ),
        (0,),
    ),
    "Pad": (0, 2),
    "Where": (1, 2),
}  # fmt: skip
# The same for floats that count from 0 only.
_LINEAR: dict[str, range | tuple[int, ...]] = {
    **dict.fromkeys(("Add", "Mul", "Sub", "Sum"), range(2**31)),
    **dict.fromkeys(("Neg", "ReduceSum", "Relu"), (0,)),
}
_FLOAT8 = {
    TensorProto.FLOAT8E4M3FN,
    TensorProto.FLOAT8E4M3FNUZ,
    TensorProto.FLOAT8E5M2,
    TensorProto.FLOAT8E5M2FNUZ,
}


def rounding(proto: onnx.ModelProto) -> list[str]:
    """The operators of a graph that round activations and are written without it here."""
    return sorted({node.op_type for node in proto.graph.node if _rounds(node)})


def _rounds(node: onnx.NodeProto) -> bool:
    if node.op_type in ("DynamicQuantizeLinear", "QuantizeLinear"):
        return True
    return _key(node) in FORMS or any(a.name == "accuracy_level" and a.i for a in node.attribute)


def _key(node: onnx.NodeProto) -> tuple[str, str]:
    return ("" if node.domain == "ai.onnx" else node.domain, node.op_type)


def unrounded(proto: onnx.ModelProto, shapes: Shapes) -> onnx.ModelProto:
    """The graph in floats. `shapes` are those of the original, which has the same tensors."""
    return _Floats(proto, shapes).result()


class _Unknown(Exception):
    """A node has no form in floats; it stays, on rounded operands."""


class _Floats:
    def __init__(self, proto: onnx.ModelProto, shapes: Shapes) -> None:
        self.proto = proto
        self.shapes = shapes
        self.nodes: list[onnx.NodeProto] = []
        self.added: list[TensorProto] = []
        self.constants: dict[str, TensorProto] = {t.name: t for t in proto.graph.initializer}
        self.values: dict[str, Real] = {}  # integers of the graph, as floats
        self.restored: set[str] = set()

    def result(self) -> onnx.ModelProto:
        for node in self.proto.graph.node:
            kept, made = len(self.nodes), len(self.added)
            try:
                self._node(node)
            except _Unknown:
                del self.nodes[kept:], self.added[made:]
                self._keep(node)
        result = copied(self.proto)
        for output in result.graph.output:
            value = self.values.get(output.name)
            if value is not None and output.name not in self.restored:  # as floats, so that they are compared
                self.nodes.append(helper.make_node("Identity", [value.name], [output.name]))
                output.type.tensor_type.elem_type = TensorProto.FLOAT
        del result.graph.node[:]
        result.graph.node.extend(self.nodes)
        result.graph.initializer.extend(self.added)
        if result.ir_version < 4:
            result.graph.input.extend(
                helper.make_tensor_value_info(t.name, t.data_type, list(t.dims)) for t in self.added
            )
        gone = self.values.keys() - self.restored  # or of another type
        stated = [value for value in result.graph.value_info if value.name not in gone]
        del result.graph.value_info[:]
        result.graph.value_info.extend(stated)
        return result

    # ------------------------------------------------------------------------------------- nodes

    def _node(self, node: onnx.NodeProto) -> None:
        view = _View(self, node)
        if node.op_type == "Constant" and len(node.attribute) == 1 and node.attribute[0].name == "value":
            self.constants[node.output[0]] = node.attribute[0].t
            self.nodes.append(node)
        elif node.op_type == "QuantizeLinear":
            self._quantize(view)
        elif node.op_type == "DequantizeLinear":
            self._dequantize(view)
        elif node.op_type == "DynamicQuantizeLinear":
            self._measure(view)
        elif _key(node) in FORMS:
            self._state(node.output[0], FORMS[_key(node)](view))
        elif any(a.name == "accuracy_level" for a in node.attribute):
            precise = copied_node(node)
            del precise.attribute[:]
            precise.attribute.extend(a for a in node.attribute if a.name != "accuracy_level")
            self._keep(precise)
        elif any(name in self.values for name in node.input):
            self._carry(view)
        else:
            self._keep(node)

    def _keep(self, node: onnx.NodeProto) -> None:
        for name in (*node.input, *sorted(_captured(node))):
            self._restore(name)
        self.nodes.append(node)

    def _state(self, output: str, value: Real) -> None:
        """Say what an output of the graph is."""
        if value.zero is not None:
            self.values[output] = value
            return
        element = self.shapes.elements.get(output) or TensorProto.FLOAT
        self.nodes.append(helper.make_node("Cast", [value.name], [output], to=element))

    def _restore(self, name: str) -> None:
        """The integers of the graph under their own name, rounded."""
        value = self.values.get(name)
        if value is None or name in self.restored:
            return
        self.restored.add(name)
        assert value.zero is not None
        element = helper.np_dtype_to_tensor_dtype(value.zero.dtype)
        x = self.shifted(value, np.zeros_like(value.zero))
        if element not in _FLOAT8 and value.zero.dtype.kind != "f":
            limits = ml_dtypes.iinfo(value.zero.dtype)  # type: ignore[no-untyped-call]
            x = self.emit("Floor", self.emit("Add", x, self.number(0.5)))
            x = self.emit("Max", self.emit("Min", x, self.number(limits.max)), self.number(limits.min))
        self.nodes.append(helper.make_node("Cast", [x], [name], to=element))

    def _quantize(self, q: _View) -> None:
        if q.node.input[0] in self.constants:  # equal numbers are rounded alike
            raise _Unknown
        shape = q.along(q.node.input[1])
        zero = q.zero(2)
        if zero.size > 1:
            zero = zero.reshape(shape)
        self._state(q.node.output[0], Real(self.emit("Div", q.floats(0), q.scale(1, shape)), _one(zero)))

    def _dequantize(self, q: _View) -> None:
        if q.node.input[0] not in self.values:
            raise _Unknown
        shape = q.along(q.node.input[1])
        self._state(q.node.output[0], Real(self.emit("Mul", q.counted(0, 2, shape), q.scale(1, shape))))

    def _measure(self, q: _View) -> None:
        """Any scale will do, as nothing is rounded: 1, from a zero point of 0."""
        y, scale, zero = (*q.node.output, "", "")[:3]
        self.values[y] = Real(q.operand(0), np.zeros((), np.uint8))
        for name, value in ((scale, np.float32(1)), (zero, np.uint8(0))):
            if name:
                tensor = numpy_helper.from_array(np.asarray(value), name)
                self.constants[name] = tensor
                self.added.append(tensor)

    def _carry(self, q: _View) -> None:
        """A node that does to integers what it does to floats."""
        node = q.node
        if node.domain not in ("", "ai.onnx") or _captured(node):
            raise _Unknown
        if node.op_type == "Cast":
            self._cast(q)
            return
        carried = {**_CARRIED, **_LINEAR}.get(node.op_type)
        if carried is None:
            raise _Unknown
        floats = [i for i, name in enumerate(node.input) if name and i in carried]
        first = next((self.values[node.input[i]] for i in floats if node.input[i] in self.values), None)
        if first is None or first.zero is None or first.zero.size > 1:
            raise _Unknown
        if node.op_type in _LINEAR and first.zero.any():
            raise _Unknown
        if node.op_type == "Pad" and len(node.input) < 3 and first.zero.any():
            raise _Unknown
        if any(name in self.values and i not in floats for i, name in enumerate(node.input)):
            raise _Unknown
        written = copied_node(node)
        for i in floats:
            written.input[i] = self.shifted(q.integers(i), first.zero)
        for i, output in enumerate(node.output):
            if output and not (node.op_type == "MaxPool" and i):
                written.output[i] = f"{PREFIX}tensor.{output}"
                self.values[output] = Real(written.output[i], first.zero)
        self.nodes.append(written)

    def _cast(self, q: _View) -> None:
        target = int(q.attr("to"))
        value = q.integers(0)
        x = self.shifted(value, np.zeros((), np.int32))
        if target in FLOATS:
            self._state(q.node.output[0], Real(x))
        elif target in (TensorProto.INT32, TensorProto.INT64, TensorProto.INT16):
            zero = np.zeros((), helper.tensor_dtype_to_np_dtype(target))
            self._state(q.node.output[0], Real(x, zero))
        else:
            raise _Unknown

    # ------------------------------------------------------------------------------------ tensors

    def emit(self, op: str, *inputs: str, domain: str = "", **attributes: Any) -> str:
        """Add a node with one output of its own name."""
        name = f"{PREFIX}node.{len(self.nodes)}"
        given = {key: value for key, value in attributes.items() if value is not None}
        self.nodes.append(helper.make_node(op, inputs, [name], name=name, domain=domain, **given))
        return name

    def number(self, value: Any) -> str:
        """A constant, float unless it is an array of something else."""
        array = value if isinstance(value, np.ndarray) else np.asarray(value, np.float32)
        name = f"{PREFIX}constant.{len(self.added)}"
        self.added.append(numpy_helper.from_array(array, name))
        return name

    def element(self, name: str) -> int:
        """The element type of a tensor; 0 if it is not known."""
        stored = self.constants.get(name)
        return self.shapes.elements.get(name, 0) if stored is None else stored.data_type

    def single(self, name: str) -> str:
        """A tensor in single precision."""
        return (
            name if self.element(name) == TensorProto.FLOAT else self.emit("Cast", name, to=TensorProto.FLOAT)
        )

    def shifted(self, value: Real, zero: Array) -> str:
        """Floats that count from one zero point, counted from another."""
        assert value.zero is not None
        apart = value.zero.astype(np.float32) - zero.astype(np.float32)
        return self.emit("Add", value.name, self.number(apart)) if apart.any() else value.name


def _one(zero: Array) -> Array:
    """A zero point that is the same everywhere as one number."""
    return (
        zero.reshape(-1)[0] * np.ones((), zero.dtype) if zero.size and (zero == zero.flat[0]).all() else zero
    )


def _captured(node: onnx.NodeProto) -> set[str]:
    """Names that the node's subgraphs mention."""
    found: set[str] = set()
    for graph in subgraphs(node):
        for inner in graph.node:
            found |= {*inner.input, *_captured(inner)}
        found |= {output.name for output in graph.output}
    return found


class _View:
    """A node as its form sees it (`ops.real.Quantised`)."""

    def __init__(self, graph: _Floats, node: onnx.NodeProto) -> None:
        self.graph = graph
        self.node = node
        self.attributes = {a.name: helper.get_attribute_value(a) for a in node.attribute}

    @property
    def rank(self) -> int:
        """Of the first output; unknown where the original's analysis does not know it."""
        shape = self.graph.shapes.shapes.get(self.node.output[0])
        if shape is None:
            raise _Unknown
        return len(shape)

    def attr(self, name: str, default: Any = None) -> Any:
        return self.attributes.get(name, default)

    def has(self, i: int) -> bool:
        return i < len(self.node.input) and bool(self.node.input[i])

    def operand(self, i: int) -> str:
        name = self.node.input[i]
        if name in self.graph.values:
            raise _Unknown
        return name

    def floats(self, i: int) -> str:
        name = self.node.input[i]
        if name in self.graph.values:
            return self.graph.shifted(self.graph.values[name], np.zeros((), np.int32))
        return self.graph.single(name)

    def integers(self, i: int) -> Real:
        name = self.node.input[i]
        known = self.graph.values.get(name)
        if known is not None:
            return known
        element = self.graph.element(name) or TensorProto.INT32
        zero = np.zeros((), helper.tensor_dtype_to_np_dtype(element))
        return Real(self.graph.emit("Cast", name, to=TensorProto.FLOAT), zero)

    def counted(self, i: int, zero: int | None = None, shape: tuple[int, ...] = ()) -> str:
        offset = self.zero(zero)
        if offset.size > 1 and shape:
            offset = offset.reshape(shape)
        return self.graph.shifted(self.integers(i), _one(offset))

    def zero(self, i: int | None = None) -> Array:
        if i is None or not self.has(i):
            element = self.graph.shapes.elements.get(self.node.output[0], TensorProto.INT32)
            return np.zeros((), helper.tensor_dtype_to_np_dtype(element))
        tensor = self.graph.constants.get(self.node.input[i])
        if tensor is None:
            raise _Unknown
        array = to_array(tensor)
        return array.reshape(()) if array.size == 1 else array

    def scale(self, i: int, shape: tuple[int, ...] = ()) -> str:
        name = self.node.input[i]
        tensor = self.graph.constants.get(name)
        if tensor is None:
            name = self.graph.single(name)
            return self.graph.emit("Reshape", name, self.graph.number(np.array(shape))) if shape else name
        array = to_array(tensor).astype(np.float32)
        if array.size == 1:
            shape = ()
        return self.graph.number(array.reshape(shape) if shape or array.size == 1 else array)

    def emit(self, op: str, *inputs: str, domain: str = "", **attributes: Any) -> str:
        return self.graph.emit(op, *inputs, domain=domain, **attributes)

    def along(self, parameter: str) -> tuple[int, ...]:
        """The shape of a vector over the quantised axis; empty for one number."""
        if self.attr("block_size", 0):
            raise _Unknown
        shape = self.graph.shapes.shapes.get(parameter)
        tensor = self.graph.constants.get(parameter)
        given = shape if tensor is None else tuple(tensor.dims)
        if given is None:
            raise _Unknown
        if given in ((), (1,)):
            return ()
        axis = int(self.attr("axis", 1)) % self.rank
        return tuple(-1 if i == axis else 1 for i in range(self.rank))
