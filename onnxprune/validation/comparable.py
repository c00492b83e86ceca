"""Forms of a graph that onnxruntime can run and that are worth comparing."""

from __future__ import annotations

import numpy as np
import onnx

from onnxprune import flow
from onnxprune.dependency import DependencyGraph
from onnxprune.model import copied, copied_node
from onnxprune.runtime import Feeds

RUNNABLE = {
    "",
    "ai.onnx",
    "ai.onnx.ml",
    "ai.onnx.preview",
    "com.microsoft",
    "com.microsoft.nchwc",
    flow.DOMAIN,
}


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
            missing.update(filter(None, node.output))
        elif alien:
            read.update(dict.fromkeys(i for i in node.input if i))
            for output in filter(None, node.output):
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
        if name in made and name not in stated and not graph.model.scopes.of(name):
            element = graph.shapes.elements.get(name, onnx.TensorProto.FLOAT)
            result.graph.output.append(onnx.helper.make_tensor_value_info(name, element, None))
    kept = [o for o in result.opset_import if o.domain in RUNNABLE]
    del result.opset_import[:]
    result.opset_import.extend(kept)
    return result


def extra_feeds(extra: list[onnx.ValueInfoProto]) -> Feeds:
    """Seeded values for inputs that stand for what such operators made."""
    generator = np.random.default_rng([0, 1])
    feeds: Feeds = {}
    for value in extra:
        if value.name.startswith("onnxprune."):
            continue
        shape = [d.dim_value for d in value.type.tensor_type.shape.dim]
        dtype = onnx.helper.tensor_dtype_to_np_dtype(value.type.tensor_type.elem_type)
        feeds[value.name] = np.asarray(generator.standard_normal(shape)).astype(dtype)
    return feeds


# By operand the permutation from `layout` 1 to `layout` 0, and by output the one back.
_STEPS_FIRST = {0: (1, 0, 2), 5: (1, 0, 2), 6: (1, 0, 2)}
_BATCH_FIRST = {0: (2, 0, 1, 3), 1: (1, 0, 2), 2: (1, 0, 2)}


def is_batch_first(node: onnx.NodeProto) -> bool:
    """Whether it is a recurrent layer of `layout` 1, for which onnxruntime has no kernel."""
    return node.op_type in ("LSTM", "GRU", "RNN") and any(a.name == "layout" and a.i for a in node.attribute)


def steps_first(proto: onnx.ModelProto) -> onnx.ModelProto:
    """The graph with recurrent layers of `layout` 1 written in `layout` 0, between transpositions."""
    result = copied(proto)
    del result.graph.node[:]
    for number, source in enumerate(proto.graph.node):
        node = copied_node(source)
        if not is_batch_first(source):
            result.graph.node.append(node)
            continue
        turned: list[onnx.NodeProto] = []
        for names, order, back in ((node.input, _STEPS_FIRST, False), (node.output, _BATCH_FIRST, True)):
            for i, perm in order.items():
                if i >= len(names) or not names[i]:
                    continue
                outer, names[i] = names[i], f"onnxprune.steps.{number}.{int(back)}.{i}"
                ends = (names[i], outer) if back else (outer, names[i])
                turn = onnx.helper.make_node("Transpose", ends[:1], ends[1:], perm=perm)
                (turned if back else result.graph.node).append(turn)
        kept = [a for a in node.attribute if a.name != "layout"]
        del node.attribute[:]
        node.attribute.extend(kept)
        result.graph.node.append(node)
        result.graph.node.extend(turned)
    return result


def is_rounded_recurrence(node: onnx.NodeProto) -> bool:
    """Whether it is a recurrent layer that rounds its state at each step, by the range of all units."""
    return node.op_type == "DynamicQuantizeLSTM"


def real_recurrence(proto: onnx.ModelProto) -> onnx.ModelProto:
    """The graph with such layers on real numbers, with the weights that their bytes stand for."""
    result = copied(proto)
    del result.graph.node[:]
    make = onnx.helper.make_node
    for number, source in enumerate(proto.graph.node):
        if not is_rounded_recurrence(source):
            result.graph.node.append(source)
            continue
        inputs = list(source.input[:8])
        stem = f"onnxprune.real.{number}"
        target = onnx.numpy_helper.from_array(np.array([0, 1, -1]), f"{stem}.shape")
        result.graph.initializer.append(target)
        for weight, scale, zero in ((1, 8, 9), (2, 10, 11)):
            name = f"{stem}.{weight}"
            result.graph.node.extend(
                (
                    make("Cast", [source.input[weight]], [f"{name}.bytes"], to=onnx.TensorProto.FLOAT),
                    make("Cast", [source.input[zero]], [f"{name}.zero"], to=onnx.TensorProto.FLOAT),
                    make("Reshape", [f"{name}.zero", target.name], [f"{name}.zeros"]),
                    make("Reshape", [source.input[scale], target.name], [f"{name}.scales"]),
                    make("Sub", [f"{name}.bytes", f"{name}.zeros"], [f"{name}.steps"]),
                    make("Mul", [f"{name}.steps", f"{name}.scales"], [f"{name}.real"]),
                    make("Transpose", [f"{name}.real"], [name], perm=[0, 2, 1]),
                )
            )
            inputs[weight] = name
        node = make("LSTM", inputs, list(source.output), name=source.name)
        node.attribute.extend(source.attribute)
        result.graph.node.append(node)
    return result
