"""Concrete shapes and integer values of every tensor, at chosen sizes of the dynamic dimensions.

Dynamic dimensions get unusual sizes (3, 7, 224 and 160, ...), so that none is mistaken for a product
of others, and a second set of sizes tells static extents from dynamic ones. onnx's own inference does
most; what it leaves open is filled node by node, with integer shape arithmetic evaluated on the way,
and at last by one run in onnxruntime.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np
import onnx

from onnxprune.errors import UserError
from onnxprune.model import FLOATS, Array, Model, Node, copy_without_weights
from onnxprune.ops import NodeView, Unknown, lookup
from onnxprune.ops.spec import Shape
from onnxprune.runtime import LARGEST, RunError, Session, make_feeds
from onnxprune.sizes import Sizes, assignments, dim_key, dynamic_dims, is_dynamic

SMALL = 4096  # elements of integer tensors whose values are followed
SMALL_FLOAT = 64
INTEGERS = 10**6  # elements of an integer tensor beyond which onnx must not follow values


@dataclass
class Shapes:
    """Shapes and known values at one assignment of sizes; `other` holds those at a second one."""

    sizes: Sizes
    shapes: dict[str, Shape] = field(default_factory=dict)
    values: dict[str, Array] = field(default_factory=dict)
    elements: dict[str, int] = field(default_factory=dict)  # element types (TensorProto.DataType)
    other: Shapes | None = None

    def is_dynamic(self, name: str, axis: int) -> bool:
        """Whether the extent changes with the sizes of the inputs."""
        if self.other is None:
            return False
        shape, other = self.shapes.get(name), self.other.shapes.get(name)
        return shape is None or other is None or len(shape) != len(other) or shape[axis] != other[axis]

    def static_entries(self, name: str) -> Array:
        """Mask over a known integer value: which entries do not depend on the inputs' sizes."""
        value = self.values[name]
        if self.other is None:
            return np.ones(value.shape, dtype=bool)
        other = self.other.values.get(name)
        if other is None or other.shape != value.shape:
            return np.zeros(value.shape, dtype=bool)
        return np.asarray(value == other)

    def view(self, model: Model, node: Node) -> NodeView:
        """The node as its declaration sees it."""

        def value(i: int) -> Array | None:
            return self.values.get(node.inputs[i])

        def fixed(i: int) -> bool:
            name = node.inputs[i]
            return (
                not name
                or name in model.constants
                or (name in self.values and bool(self.static_entries(name).all()))
            )

        return NodeView(
            node.op,
            model.opset(node.domain),
            node.attributes,
            tuple(self.shapes.get(i) if i else None for i in node.inputs),
            tuple(self.shapes.get(o) if o else None for o in node.outputs),
            value,
            fixed,
        )


def analyse(model: Model) -> Shapes:
    """Shapes at the first assignment of sizes that is consistent, with a second one beside it."""
    keys = dynamic_dims(model)
    base = skeleton(model)
    first: Shapes | None = None
    for sizes in assignments(keys):
        proto = _infer(base, model, sizes, strict=True)
        if proto is None:
            continue
        shapes = _complete(model, proto, sizes)
        if not _consistent(model, shapes):
            continue
        if first is None:
            first = shapes
            if not keys:
                return first
        elif all(sizes[k] != first.sizes[k] for k in keys):
            first.other = shapes
            return first
    if first is None:  # no assignment satisfies strict inference: take what can be had
        _refuse_invalid(model)
        sizes = next(assignments(keys))
        proto = _infer(base, model, sizes, strict=False)
        first = _complete(model, proto or base, sizes)
        _run(model, first, [o for node in model.nodes for o in node.outputs if o])
    if keys and first.other is None:
        first.other = Shapes(first.sizes)  # nothing is known to be static
    return first


def skeleton(model: Model) -> onnx.ModelProto:
    """The model with its large constants turned into typed inputs: cheap to infer shapes on."""
    proto = onnx.ModelProto()
    copy_without_weights(model.proto, proto)
    graph = proto.graph
    del graph.value_info[:]
    for output in graph.output:
        output.type.tensor_type.ClearField("shape")
    listed = {i.name for i in graph.input}
    heavy = {name for name, t in model.constants.items() if not _followed(t)}
    nodes = [n for n in graph.node if not (n.op_type == "Constant" and n.output[0] in heavy)]
    if len(nodes) < len(graph.node):
        del graph.node[:]
        graph.node.extend(nodes)
    for name, tensor in model.constants.items():
        if name in heavy:
            if name not in listed:
                graph.input.append(
                    onnx.helper.make_tensor_value_info(name, tensor.data_type, list(tensor.dims))
                )
        elif name in model.initializers:
            graph.initializer.append(tensor)
    return proto


def _followed(tensor: onnx.TensorProto) -> bool:
    return math.prod(tensor.dims) <= (SMALL_FLOAT if tensor.data_type in FLOATS else SMALL)


def _infer(base: onnx.ModelProto, model: Model, sizes: Sizes, strict: bool) -> onnx.ModelProto | None:
    proto = onnx.ModelProto()
    proto.CopyFrom(base)
    known = set(model.constants)
    for value in proto.graph.input:
        if value.name in known:
            continue
        for axis, dim in enumerate(value.type.tensor_type.shape.dim):
            if is_dynamic(dim):
                dim.dim_value = sizes[dim_key(value.name, axis, dim)]
    try:
        return onnx.shape_inference.infer_shapes(proto, strict_mode=strict, data_prop=not _explodes(model))
    except (onnx.shape_inference.InferenceError, onnx.checker.ValidationError, RuntimeError, ValueError):
        return None


def _explodes(model: Model) -> bool:
    """Whether integers grow without bound on the way (Concat of a tensor with itself, again and again);
    inference would follow every one of them."""
    sizes = {name: math.prod(t.dims) for name, t in model.constants.items() if t.data_type not in FLOATS}
    for node in model.nodes:
        if node.op == "Concat":
            sizes[node.outputs[0]] = sum(sizes.get(name, 0) for name in node.inputs)
        elif any(name in sizes for name in node.inputs):
            largest = max(sizes.get(name, 0) for name in node.inputs)
            sizes.update(dict.fromkeys(node.outputs, largest))
    return max(sizes.values(), default=0) > INTEGERS


_CONTRADICTION = ("ShapeInferenceError", "TypeInferenceError", "Type Error", "INVALID_GRAPH")


def _refuse_invalid(model: Model) -> None:
    """Refuse a model that inference finds contradictory and onnxruntime, too."""
    try:
        Session(model.proto)
    except RunError as error:
        if any(word in str(error) for word in _CONTRADICTION) and "No Op registered" not in str(error):
            raise UserError(f"{model.name}: {error}; the model is invalid, export it again") from None


def _consistent(model: Model, shapes: Shapes) -> bool:
    """Whether every Reshape keeps the number of elements: inference does not check computed targets."""
    for node in model.nodes:
        if node.op == "Reshape" and node.domain == "":
            old, new = shapes.shapes.get(node.inputs[0]), shapes.shapes.get(node.outputs[0])
            if old is not None and new is not None and math.prod(old) != math.prod(new):
                return False
    return True


def _complete(model: Model, inferred: onnx.ModelProto, sizes: Sizes) -> Shapes:
    """Follow the graph once: take what inference found, evaluate integers, fill holes node by node."""
    graph = inferred.graph
    types = {v.name: v.type for v in (*graph.output, *graph.value_info, *graph.input)}
    result = Shapes(sizes)
    for name, type_ in types.items():
        if (shape := _shape(type_)) is not None:
            result.shapes[name] = shape
    for name, tensor in model.constants.items():
        result.shapes[name] = tuple(tensor.dims)
        if _followed(tensor):
            result.values[name] = model.array(name)
    result.elements = {n: t.tensor_type.elem_type for n, t in types.items()}
    result.elements |= {n: t.data_type for n, t in model.constants.items()}
    for node in model.nodes:
        if node.outputs and node.outputs[0] in model.constants:
            continue
        spec = lookup(node.domain, node.op, model.opset(node.domain))
        missing = any(o and o not in result.shapes for o in node.outputs)
        if missing:
            _infer_node(model, node, result)
        if spec is not None and spec.evaluate is not None:
            _evaluate(model, node, result)
    if _consistent(model, result):  # else these sizes are passed over, and not worth a run
        _run(model, result, [o for node in model.nodes for o in node.outputs if o and o not in result.shapes])
    return result


def _run(model: Model, result: Shapes, wanted: list[str]) -> None:
    """Shapes that inference cannot give (functions, fused operators) or gets wrong, from one run in
    onnxruntime."""
    if not wanted or any(math.prod(shape) > LARGEST for shape in result.shapes.values()):
        return
    given = {o.name for o in model.outputs}
    inner = [onnx.ValueInfoProto(name=name) for name in wanted if name not in given]
    try:
        values = Session(model.proto, expose=inner).run(make_feeds(model, result.sizes, 0, {}), wanted)
    except RunError:
        return
    for name, value in values.items():
        if isinstance(value, np.ndarray):
            result.shapes[name] = value.shape
            result.elements[name] = onnx.helper.np_dtype_to_tensor_dtype(value.dtype)


def _shape(type_: onnx.TypeProto) -> Shape | None:
    if not type_.HasField("tensor_type") or not type_.tensor_type.HasField("shape"):
        return None
    dims = type_.tensor_type.shape.dim
    if any(not d.HasField("dim_value") or d.dim_value < 0 for d in dims):
        return None
    return tuple(d.dim_value for d in dims)


def _evaluate(model: Model, node: Node, result: Shapes) -> None:
    """Integer shape arithmetic: the values of a node whose inputs are all known and small."""
    shape_only = node.op in ("Shape", "Size")
    if not shape_only and any(i and i not in result.values for i in node.inputs):
        return
    spec = lookup(node.domain, node.op, model.opset(node.domain))
    assert spec is not None
    assert spec.evaluate is not None
    inputs = [] if shape_only else [result.values[i] if i else None for i in node.inputs]
    try:
        if node.op == "ConstantOfShape" and node.outputs[0] not in result.shapes:
            result.shapes[node.outputs[0]] = tuple(int(v) for v in np.ravel(inputs[0]))  # type: ignore[arg-type]
        known = result.shapes.get(node.outputs[0])
        if known is not None and math.prod(known) > SMALL:
            return
        outputs = spec.evaluate(result.view(model, node), inputs)
    except (Unknown, ValueError, TypeError, IndexError, ZeroDivisionError, OverflowError):
        return
    for name, value in zip(node.outputs, outputs, strict=False):
        if name and value.size <= SMALL:
            result.values[name] = value
            result.shapes[name] = value.shape


def _infer_node(model: Model, node: Node, result: Shapes) -> None:
    """Shape inference of one node, with the values found so far."""
    try:
        schema = onnx.defs.get_schema(node.op, model.opset(node.domain), node.domain)
    except onnx.defs.SchemaError:
        return
    inputs: dict[str, onnx.TypeProto] = {}
    data: dict[str, onnx.TensorProto] = {}
    for name in dict.fromkeys((*node.inputs, *node.captured)):
        if not name:
            continue
        element = result.elements.get(name)
        if not element:
            return
        inputs[name] = onnx.helper.make_tensor_type_proto(element, result.shapes.get(name))
        if name in result.values:
            data[name] = onnx.numpy_helper.from_array(np.asarray(result.values[name], order="C"), name)
    try:
        outputs = onnx.shape_inference.infer_node_outputs(
            schema,
            node.proto,
            inputs,
            data,
            opset_imports=list(model.proto.opset_import),
            ir_version=model.proto.ir_version,
        )
    except (
        onnx.shape_inference.InferenceError,
        onnx.checker.ValidationError,
        KeyError,
        RuntimeError,
        ValueError,
    ):
        return
    for name, type_ in outputs.items():
        if not result.elements.get(name):
            result.elements[name] = type_.tensor_type.elem_type
        if (shape := _shape(type_)) is not None:
            result.shapes.setdefault(name, shape)
