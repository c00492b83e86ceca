"""One random change to a model: what a broken exporter, a wrong script or a flipped bit leaves behind."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import numpy as np
import onnx
from onnx import AttributeProto, TensorProto, helper, numpy_helper

from onnxprune.flow import subgraphs

T = TypeVar("T")
Rng = np.random.Generator
NUMBERS = (0, -1, 1, 2, 3, 5, 7, 2**31, 2**63 - 1, -(2**63))
REALS = (0.0, -1.0, 1e30, float("nan"), float("inf"))
TEXTS = (b"sideways", b"", b"\xff\xfe", b"bidirectional", b"reverse", b"Relu")
TYPES = (
    TensorProto.FLOAT,
    TensorProto.FLOAT16,
    TensorProto.DOUBLE,
    TensorProto.BFLOAT16,
    TensorProto.INT8,
    TensorProto.UINT8,
    TensorProto.INT32,
    TensorProto.INT64,
    TensorProto.BOOL,
)


def mutate(proto: onnx.ModelProto, rng: Rng) -> str:
    """Change something in place; says what."""
    graph = _pick(rng, [graph for graph in _graphs(proto.graph) if graph.node])
    change = _pick(rng, CHANGES)
    return f"{change.__name__}: {change(proto, graph, rng)}"


def _pick(rng: Rng, things: Sequence[T]) -> T:
    return things[int(rng.integers(len(things)))]


def _graphs(graph: onnx.GraphProto) -> Iterator[onnx.GraphProto]:
    yield graph
    for node in graph.node:
        for inner in subgraphs(node):
            yield from _graphs(inner)


def _node(graph: onnx.GraphProto, rng: Rng) -> onnx.NodeProto:
    return _pick(rng, list(graph.node))


def _attribute(proto: onnx.ModelProto, graph: onnx.GraphProto, rng: Rng) -> str:
    plain = [(n, a) for n in graph.node for a in n.attribute if a.type != AttributeProto.GRAPH]
    if not plain:
        return "none"
    node, attribute = _pick(rng, plain)
    name, how = attribute.name, rng.random()
    if how < 0.15:
        node.attribute.remove(attribute)
        return f"{node.op_type} loses {name}"
    if how < 0.2:
        odd: list[Any] = ["sideways", 1.5, [1, 2], 3, [0.5]]
        attribute.CopyFrom(helper.make_attribute(name, _pick(rng, odd)))
    elif attribute.type == AttributeProto.INT:
        attribute.i = int(
            _pick(rng, [*NUMBERS, *(n for n in (attribute.i - 1, attribute.i + 1) if abs(n) < 2**62)])
        )
    elif attribute.type == AttributeProto.INTS:
        values = list(attribute.ints)
        if how < 0.4:
            values.append(int(_pick(rng, NUMBERS)))
        elif how < 0.6 or not values:
            values = values[:-1]
        else:
            values[int(rng.integers(len(values)))] = int(_pick(rng, NUMBERS))
        attribute.CopyFrom(helper.make_attribute(name, values, attr_type=AttributeProto.INTS))
    elif attribute.type == AttributeProto.FLOAT:
        attribute.f = _pick(rng, REALS)
    elif attribute.type == AttributeProto.STRING:
        attribute.s = _pick(rng, TEXTS)
    elif attribute.type == AttributeProto.STRINGS:
        attribute.strings.append(b"Relu")
    elif attribute.type == AttributeProto.TENSOR:
        return _retyped(attribute.t, rng)
    return f"{node.op_type}.{name}"


def _retyped(tensor: onnx.TensorProto, rng: Rng) -> str:
    """Another type, shape, order of axes or value."""
    values, how = numpy_helper.to_array(tensor), rng.random()
    new = values
    with np.errstate(all="ignore"):
        if how < 0.25:
            new = values.astype(helper.tensor_dtype_to_np_dtype(_pick(rng, TYPES)))
        elif how < 0.4 and values.ndim > 1:
            new = values.transpose(rng.permutation(values.ndim))
        elif how < 0.75 and values.ndim and values.size:
            axis = int(rng.integers(values.ndim))
            size = values.shape[axis]
            shape = list(values.shape)
            shape[axis] = _pick(rng, [0, 1, size - 1, size + 1, 2 * size])
            new = np.resize(values, shape)
        elif how < 0.85:
            new = values.reshape(_pick(rng, [(-1,), (1, *values.shape), (*values.shape, 1)]))
        elif values.size:
            new = values.copy()
            odd: Sequence[Any] = REALS if values.dtype.kind == "f" else (0, 1, -1, 2, 3, 5, 100, 2**31 - 1)
            new.reshape(-1)[int(rng.integers(values.size))] = np.array(_pick(rng, odd)).astype(values.dtype)
    what = f"{tensor.name} {values.dtype}{list(values.shape)} as {new.dtype}{list(new.shape)}"
    tensor.CopyFrom(numpy_helper.from_array(np.array(new, order="C"), tensor.name))
    return what


def _tensor(proto: onnx.ModelProto, graph: onnx.GraphProto, rng: Rng) -> str:
    return _retyped(_pick(rng, list(graph.initializer)), rng) if graph.initializer else "none"


def _inputs(proto: onnx.ModelProto, graph: onnx.GraphProto, rng: Rng) -> str:
    node = _node(graph, rng)
    names = list(node.input)
    if not names:
        return "none"
    i, j, how = int(rng.integers(len(names))), int(rng.integers(len(names))), rng.random()
    if how < 0.25:
        names[i], names[j] = names[j], names[i]
    elif how < 0.45:
        names[i] = ""
    elif how < 0.6:
        names.pop()
    elif how < 0.8:
        others = [tensor.name for tensor in graph.initializer] + [value.name for value in graph.input]
        names[i] = _pick(rng, others + [output for other in graph.node for output in other.output])
    else:
        names.append(names[i])
    what = f"{node.op_type} {list(node.input)} as {names}"
    del node.input[:]
    node.input.extend(names)
    return what


def _outputs(proto: onnx.ModelProto, graph: onnx.GraphProto, rng: Rng) -> str:
    node = _node(graph, rng)
    if len(node.output) > 1 and rng.random() < 0.6:
        node.output[int(rng.integers(len(node.output)))] = ""
        return f"{node.op_type} less one"
    node.output.append("extra")
    return f"{node.op_type} one more"


def _given(proto: onnx.ModelProto, graph: onnx.GraphProto, rng: Rng) -> str:
    if not graph.input:
        return "none"
    value = _pick(rng, list(graph.input))
    tensor, how = value.type.tensor_type, rng.random()
    if how < 0.3 or not tensor.shape.dim:
        tensor.elem_type = _pick(rng, TYPES)
    elif how < 0.4:
        tensor.shape.dim.add().dim_value = 2
    elif how < 0.5:
        tensor.ClearField("shape")
    elif how < 0.75:
        _pick(rng, list(tensor.shape.dim)).dim_value = _pick(rng, [1, 2, 7, 2**40, -1])
    else:
        _pick(rng, list(tensor.shape.dim)).dim_param = _pick(rng, ["q", "a+b", "length", "batch", "a + a"])
    return str(value.name)


def _operator(proto: onnx.ModelProto, graph: onnx.GraphProto, rng: Rng) -> str:
    node = _node(graph, rng)
    before = f"{node.domain}.{node.op_type}"
    if rng.random() < 0.3:
        node.domain = _pick(rng, ["", "com.microsoft", "other"])
    else:
        node.op_type = _pick(rng, [*(other.op_type for other in graph.node), "Relu", "Identity"])
    return f"{before} as {node.domain}.{node.op_type}"


def _version(proto: onnx.ModelProto, graph: onnx.GraphProto, rng: Rng) -> str:
    opset = _pick(rng, list(proto.opset_import))
    opset.version = _pick(rng, [1, 7, 9, 11, 13, 17, 19, 21, 23, 24])
    return f"{opset.domain} {opset.version}"


def _results(proto: onnx.ModelProto, graph: onnx.GraphProto, rng: Rng) -> str:
    if rng.random() < 0.5 and graph.output:
        value = _pick(rng, list(graph.output))
        value.ClearField("type")
        return f"{value.name} untyped"
    name = _pick(rng, [output for node in graph.node for output in node.output if output])
    graph.output.add(name=name)
    return f"{name} besides"


def _bypass(proto: onnx.ModelProto, graph: onnx.GraphProto, rng: Rng) -> str:
    node = _node(graph, rng)
    if not node.input or not node.output or any(value.name == node.output[0] for value in graph.output):
        return "none"
    for other in graph.node:
        for i, name in enumerate(other.input):
            if name == node.output[0]:
                other.input[i] = node.input[0]
    what = str(node.op_type)
    graph.node.remove(node)
    return what


Change = Callable[[onnx.ModelProto, onnx.GraphProto, Rng], str]
CHANGES: list[Change] = [
    *[_attribute] * 4,
    *[_tensor] * 3,
    *[_inputs] * 3,
    *(_outputs, _given, _operator, _version, _results, _bypass),
]
