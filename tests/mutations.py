from __future__ import annotations
import numpy as np, onnx
from onnx import TensorProto, helper, numpy_helper

NUMBERS = (0, -1, 1, 2, 3, 5, 7, 2**31, 2**63 - 1, -(2**63))
REALS = (0.0, -1.0, 1e30, float("nan"), float("inf"))
TYPES = (TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.DOUBLE, TensorProto.INT8, TensorProto.UINT8,
         TensorProto.INT32, TensorProto.INT64, TensorProto.BOOL, TensorProto.BFLOAT16)

def pick(rng, things):
    return things[int(rng.integers(len(things)))]

def graphs(graph):
    yield graph
    for node in graph.node:
        for a in node.attribute:
            if a.type == onnx.AttributeProto.GRAPH:
                yield from graphs(a.g)

def mutate(proto, rng):
    """One random change; says which."""
    graph = pick(rng, list(graphs(proto.graph)))
    if not graph.node: graph = proto.graph
    kind = pick(rng, list(KINDS))
    return kind.__name__, kind(proto, graph, rng)

def interesting(graph, rng):
    special = [n for n in graph.node if n.op_type in SPECIAL or n.domain]
    return pick(rng, special if special and rng.random() < 0.6 else list(graph.node))

SPECIAL = {"Attention", "RotaryEmbedding", "LSTM", "GRU", "RNN", "Loop", "If", "Scan", "QLinearConv", "QLinearMatMul",
  "DequantizeLinear", "QuantizeLinear", "ConvInteger", "MatMulInteger", "DynamicQuantizeLinear", "Softmax", "Split", "Reshape","Concat","Transpose","Slice","Gather"}

def attribute(proto, graph, rng):
    nodes = [n for n in graph.node if any(a.type != onnx.AttributeProto.GRAPH for a in n.attribute)]
    if not nodes: return None
    special = [n for n in nodes if n.op_type in SPECIAL or n.domain]
    node = pick(rng, special if special and rng.random() < 0.6 else nodes)
    a = pick(rng, [a for a in node.attribute if a.type != onnx.AttributeProto.GRAPH])
    how = rng.random()
    if how < 0.15:
        copy = [x for x in node.attribute if x.name != a.name]
        name = a.name
        kept = onnx.NodeProto(); kept.attribute.extend(copy)
        del node.attribute[:]; node.attribute.extend(kept.attribute)
        return f"{node.op_type} lost {name}"
    if how < 0.2:
        a.CopyFrom(helper.make_attribute(a.name, pick(rng, ["sideways", 1.5, [1, 2], 3, [0.5]])))
    elif a.type == onnx.AttributeProto.INT:
        a.i = int(pick(rng, (*NUMBERS, a.i + 1 if a.i < 2**62 else 0, a.i - 1, min(a.i * 2, 2**60))))
    elif a.type == onnx.AttributeProto.INTS:
        values = list(a.ints)
        how = rng.random()
        if how < 0.25: values.append(int(pick(rng, NUMBERS)))
        elif how < 0.5: values = values[:-1]
        elif values: values[int(rng.integers(len(values)))] = int(pick(rng, NUMBERS))
        a.CopyFrom(helper.make_attribute(a.name, values, attr_type=onnx.AttributeProto.INTS))
    elif a.type == onnx.AttributeProto.FLOAT:
        a.f = pick(rng, REALS)
    elif a.type == onnx.AttributeProto.STRING:
        a.s = pick(rng, (b"sideways", b"", b"\xff\xfe", b"bidirectional", b"reverse", b"Relu"))
    elif a.type == onnx.AttributeProto.STRINGS:
        a.strings.append(b"Relu")
    elif a.type == onnx.AttributeProto.TENSOR:
        return retyped(a.t, rng)
    return f"{node.op_type}.{a.name} = {helper.printable_attribute(a)[:60]}"

def retyped(tensor, rng):
    name, old = tensor.name, list(tensor.dims)
    try: values = numpy_helper.to_array(tensor)
    except Exception: return None
    how = rng.random()
    if how < 0.25:
        kind = pick(rng, TYPES)
        with np.errstate(all="ignore"):
            new = values.astype(helper.tensor_dtype_to_np_dtype(kind))
        word = f"type {kind}"
    elif how < 0.4 and values.ndim > 1:
        new = values.transpose(rng.permutation(values.ndim)); word = "turned"
    elif how < 0.75 and values.ndim:
        axis = int(rng.integers(values.ndim))
        size = int(pick(rng, (0, 1, values.shape[axis] - 1, values.shape[axis] + 1, 2 * values.shape[axis])))
        new = np.resize(values, [*values.shape[:axis], max(size, 0), *values.shape[axis + 1:]]) if values.size else values
        word = f"axis {axis} {size}"
    elif how < 0.85:
        new = values.reshape(pick(rng, ((-1,), (1, *values.shape), (*values.shape, 1)))); word = "rank"
    elif values.size:
        new = values.copy(); flat = new.reshape(-1)
        with np.errstate(all="ignore"):
            i = int(rng.integers(flat.size))
            if values.dtype.kind in "iu" : flat[i] = np.array(pick(rng, (0, 1, -1, 2, 3, 5, 100, 2**31-1))).astype(values.dtype)
            elif values.dtype == bool: flat[i] = not flat[i]
            else: flat[i] = np.array(pick(rng, REALS)).astype(values.dtype)
        word = "value"
    else: return None
    tensor.CopyFrom(numpy_helper.from_array(np.ascontiguousarray(new).reshape(new.shape), name))
    return f"tensor {name} {old} {word}"

def tensor(proto, graph, rng):
    if not graph.initializer: return None
    return retyped(pick(rng, list(graph.initializer)), rng)

def inputs(proto, graph, rng):
    node = interesting(graph, rng)
    if not node.input: return None
    i = int(rng.integers(len(node.input)))
    how = rng.random()
    names = list(node.input)
    if how < 0.25 and len(names) > 1:
        j = int(rng.integers(len(names))); names[i], names[j] = names[j], names[i]; word = f"swap {i} {j}"
    elif how < 0.45: names[i] = ""; word = f"drop {i}"
    elif how < 0.6: names = names[:-1]; word = "cut"
    elif how < 0.8:
        other = [t.name for t in graph.initializer] + [v.name for v in graph.input] + [o for n in graph.node for o in n.output]
        names[i] = pick(rng, other); word = f"{i} -> {names[i]}"
    else: names.append(pick(rng, names)); word = "more"
    del node.input[:]; node.input.extend(names)
    return f"{node.op_type} {word}"

def outputs(proto, graph, rng):
    node = interesting(graph, rng)
    if len(node.output) > 1 and rng.random() < 0.6:
        i = int(rng.integers(len(node.output))); node.output[i] = ""; return f"{node.op_type} output {i} dropped"
    node.output.append("extra"); return f"{node.op_type} extra output"

def given(proto, graph, rng):
    if not graph.input: return None
    value = pick(rng, list(graph.input)); t = value.type.tensor_type
    how = rng.random()
    if how < 0.3 or not t.shape.dim:
        t.elem_type = pick(rng, TYPES); return f"{value.name} type {t.elem_type}"
    if how < 0.4: t.shape.dim.add().dim_value = 2; return f"{value.name} rank+"
    if how < 0.5: t.ClearField("shape"); return f"{value.name} no shape"
    d = pick(rng, list(t.shape.dim)); d.Clear()
    if rng.random() < 0.5: d.dim_value = int(pick(rng, (0, 1, 2, 7, 2**40, -1)))
    else: d.dim_param = pick(rng, ("q", "a+b", "length", "batch", "a + a"))
    return f"{value.name} dim {d}".replace("\n", "")

def operator(proto, graph, rng):
    node = interesting(graph, rng); old = node.op_type
    if rng.random() < 0.3: node.domain = pick(rng, ("", "com.microsoft", "other")); return f"{old} domain {node.domain}"
    node.op_type = pick(rng, [n.op_type for n in graph.node] + ["Relu", "Identity"]); return f"{old} -> {node.op_type}"

def opset(proto, graph, rng):
    o = pick(rng, list(proto.opset_import)); o.version = int(pick(rng, (1, 7, 9, 11, 13, 17, 19, 21, 23, 24)))
    return f"{o.domain} {o.version}"

def result(proto, graph, rng):
    made = [o for n in graph.node for o in n.output if o]
    if rng.random() < 0.5:
        graph.output.add(name=pick(rng, made)) ; return "more outputs"
    pick(rng, list(graph.output)).ClearField("type"); return "untyped output"

def removed(proto, graph, rng):
    node = interesting(graph, rng)
    if not node.input or not node.output: return None
    name = node.op_type
    a, b = node.input[0], node.output[0]
    for n in graph.node:
        for i, x in enumerate(n.input):
            if x == b: n.input[i] = a
    for o in graph.output:
        if o.name == b: return None
    graph.node.remove(node); return f"{name} bypassed"

KINDS = (attribute, attribute, attribute, attribute, tensor, tensor, tensor, inputs, inputs, inputs, outputs, given, operator, opset, result, removed)
