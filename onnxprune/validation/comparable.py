"""Forms of a graph that onnxruntime can run and that are worth comparing."""

from __future__ import annotations

import numpy as np
import onnx

from onnxprune.dependency import DependencyGraph
from onnxprune.model import copied
from onnxprune.runtime import Feeds

RUNNABLE = {"", "ai.onnx", "ai.onnx.ml", "ai.onnx.preview", "com.microsoft", "com.microsoft.nchwc"}


def foreign(proto: onnx.ModelProto) -> list[str]:
    """Operators of the graph that onnxruntime does not have."""
    functions = {(f.domain, f.name) for f in proto.functions}
    return sorted(
        {
            f"{node.domain}.{node.op_type}"
            for node in proto.graph.node
            if node.domain not in RUNNABLE and (node.domain, node.op_type) not in functions
        }
    )


def around(graph: DependencyGraph, proto: onnx.ModelProto) -> onnx.ModelProto:
    """The graph without operators that onnxruntime does not have: what they read becomes outputs, what
    they make becomes inputs where its shape is known; what then cannot be computed is left out."""
    functions = {(f.domain, f.name) for f in proto.functions}
    result = copied(proto)
    del result.graph.node[:]
    del result.graph.output[:]
    del result.graph.value_info[:]
    missing: set[str] = set()
    read: dict[str, None] = {}
    for node in proto.graph.node:
        alien = node.domain not in RUNNABLE and (node.domain, node.op_type) not in functions
        if any(i in missing for i in node.input):
            missing.update(node.output)
        elif alien:
            read.update(dict.fromkeys(i for i in node.input if i))
            for output in node.output:
                element, shape = graph.shapes.elements.get(output), graph.shapes.shapes.get(output)
                if element and shape is not None:
                    result.graph.input.append(onnx.helper.make_tensor_value_info(output, element, shape))
                else:
                    missing.add(output)
        else:
            result.graph.node.append(node)
    made = {o for node in result.graph.node for o in node.output}
    result.graph.output.extend(value for value in proto.graph.output if value.name in made)
    stated = {value.name for value in result.graph.output}
    for name in read:
        if name in made and name not in stated:
            element = graph.shapes.elements.get(name, onnx.TensorProto.FLOAT)
            result.graph.output.append(onnx.helper.make_tensor_value_info(name, element, None))
    kept = [o for o in result.opset_import if o.domain in RUNNABLE]
    del result.opset_import[:]
    result.opset_import.extend(kept)
    return result


def extra_feeds(extra: list[onnx.ValueInfoProto], seed: int) -> Feeds:
    """Seeded values for inputs that stand for what such operators made."""
    generator = np.random.default_rng([seed, 1])
    feeds: Feeds = {}
    for value in extra:
        if value.name.startswith("onnxprune."):
            continue
        shape = [d.dim_value for d in value.type.tensor_type.shape.dim]
        dtype = onnx.helper.tensor_dtype_to_np_dtype(value.type.tensor_type.elem_type)
        feeds[value.name] = np.asarray(generator.standard_normal(shape)).astype(dtype)
    return feeds


def unrounded(proto: onnx.ModelProto) -> onnx.ModelProto:
    """The graph with QuantizeLinear -> DequantizeLinear pairs taken out: rounding turns a difference in
    the last bit into one of a whole quantum, which says nothing about the graph."""
    makers = {o: node for node in proto.graph.node for o in node.output}
    result = copied(proto)
    for node in result.graph.node:
        source = makers.get(node.input[0]) if node.op_type == "DequantizeLinear" else None
        if source is not None and source.op_type == "QuantizeLinear":
            node.CopyFrom(
                onnx.helper.make_node("Identity", [source.input[0]], list(node.output), name=node.name)
            )
    return result
