"""Graphs in bfloat16 or float64 with float32 in their place: onnxruntime's CPU kernels for those are few."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import onnx

from onnxprune.model import copied, subgraphs
from onnxprune.runtime import RunError, Session
from onnxprune.stored import is_stored

FLOAT = onnx.TensorProto.FLOAT
RARE = {onnx.TensorProto.BFLOAT16: "bfloat16", onnx.TensorProto.DOUBLE: "float64"}
TYPES = {"to", "dtype"}  # attributes that name an element type


def rare(proto: onnx.ModelProto) -> list[str]:
    """The types of the graph's weights or inputs that onnxruntime may have no kernels for."""
    found = {tensor.data_type for tensor in proto.graph.initializer}
    found |= {value.type.tensor_type.elem_type for value in proto.graph.input}
    found |= {tensor.data_type for node in _nodes(proto.graph) for tensor in _tensors(node)}
    return sorted(name for element, name in RARE.items() if element in found)


def needed(proto: onnx.ModelProto) -> bool:
    """Whether onnxruntime lacks a kernel for the graph as it is."""
    try:
        Session(proto)
    except RunError as error:
        return "NOT_IMPLEMENTED" in str(error)
    return False


def widened(proto: onnx.ModelProto) -> onnx.ModelProto:
    """The graph in float32; weights keep their values, as far as float32 has them."""
    result = copied(proto)
    graph = result.graph
    for tensor in graph.initializer:
        _widen(tensor)
    for value in (*graph.input, *graph.output, *graph.value_info):
        if value.type.tensor_type.elem_type in RARE:
            value.type.tensor_type.elem_type = FLOAT
    for node in _nodes(graph):
        for tensor in _tensors(node):
            _widen(tensor)
        for attribute in node.attribute:
            if attribute.name in TYPES and attribute.i in RARE:
                attribute.i = FLOAT
    return result


def _widen(tensor: onnx.TensorProto) -> None:
    if tensor.data_type not in RARE:
        return
    if is_stored(tensor):  # read as what it is, given as what it says
        tensor.data_type = FLOAT
        return
    with np.errstate(over="ignore"):
        array = onnx.numpy_helper.to_array(tensor).astype(np.float32)
    tensor.CopyFrom(onnx.numpy_helper.from_array(array, tensor.name))


def _nodes(graph: onnx.GraphProto) -> Iterator[onnx.NodeProto]:
    for node in graph.node:
        yield node
        for inner in subgraphs(node):
            yield from _nodes(inner)


def _tensors(node: onnx.NodeProto) -> Iterator[onnx.TensorProto]:
    for attribute in node.attribute:
        if attribute.type == onnx.AttributeProto.TENSOR:
            yield attribute.t
