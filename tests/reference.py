"""What a pruned model must compute, said without the library's surgery, index arithmetic or validation."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime as ort
from onnx import helper, numpy_helper

from onnxprune.axes import Axis, Const, Product, Sum, Var, resolve
from onnxprune.dependency import DependencyGraph, Link
from onnxprune.flow import graphs, nest
from onnxprune.model import Model
from onnxprune.plan import Keep, Plan

Array = npt.NDArray[Any]
Masks = Mapping[Var, Array]
TOLERANCE = 1e-4
WEIGHTS = {
    getattr(onnx.TensorProto, name) for name in ("FLOAT", "FLOAT16", "BFLOAT16", "DOUBLE", "INT8", "UINT8")
}
FLOAT = onnx.TensorProto.FLOAT
ZERO_POINTS = {onnx.TensorProto.INT8, onnx.TensorProto.UINT8}
WEIGHTED = ("Conv", "ConvTranspose", "Gemm", "MatMul", "Einsum")


def graph_of(proto: onnx.ModelProto) -> DependencyGraph:
    return DependencyGraph(Model(proto))


def masks(graph: DependencyGraph, plan: Plan) -> dict[Var, Array]:
    """Which units of each group the plan keeps."""
    groups = {group.name: group for group in graph.groups}
    result = {}
    for edit in plan.keeps:
        result[groups[edit.group].var] = np.isin(np.arange(edit.size), edit.units)
    return result


def random_plan(graph: DependencyGraph, digest: str, seed: int, lossy: bool = False) -> Plan:
    """Random units of every group that can be cut exactly (or of all groups)."""
    rng = np.random.default_rng(seed)
    edits = []
    for group in graph.groups:
        count = int(rng.integers(1, group.size + 1))
        units = tuple(int(u) for u in np.sort(rng.permutation(group.size)[:count]))
        if count < group.size and (lossy or group.kind == "exact"):
            edits.append(Keep(group.name, group.size, units, group.kind))
    return Plan(digest, tuple(edits))


def stays(axis: Axis, keep: Masks) -> Array:
    """For each position of an axis whether it stays."""
    axis = resolve(axis)
    if isinstance(axis, Const):
        return np.ones(axis.extent, dtype=bool)
    if isinstance(axis, Var):
        return keep.get(axis, np.ones(axis.extent, dtype=bool))
    if isinstance(axis, Sum):
        return np.concatenate([stays(term, keep) for term in axis.terms])
    assert isinstance(axis, Product)
    result = np.ones(1, dtype=bool)
    for factor in axis.factors:
        result = np.outer(result, stays(factor, keep)).ravel()
    return result


# ------------------------------------------------------------------------------------ the masked original


def masked(graph: DependencyGraph, plan: Plan) -> onnx.ModelProto:
    """The original with the removed units zeroed in front of every operator that sums over them; integers
    that count from a zero point are set to that."""
    keep = masks(graph, plan)
    proto = onnx.ModelProto()
    proto.CopyFrom(graph.model.proto)
    nodes = {link.node.index: list(_summed(graph, link)) for link in graph.links}
    zeros = {link.node.index: link.rule.zero for link in graph.links}
    result: list[onnx.NodeProto] = []
    for index, node in enumerate(proto.graph.node):
        for i, axis, rank, typed in nodes.get(index, ()):
            here = stays(typed, keep)
            if here.all():
                continue
            stem = f"masked.{index}.{i}.{axis}"
            shape = [-1 if j == axis else 1 for j in range(rank)]
            if (where := zeros.get(index, {}).get(i)) is not None:
                mask = numpy_helper.from_array(here.reshape(shape), f"{stem}.mask")
                zero = node.input[where]
                result.append(helper.make_node("Constant", [], [f"{stem}.mask"], value=mask))
                result.append(helper.make_node("Where", [f"{stem}.mask", node.input[i], zero], [stem]))
                node.input[i] = stem
                continue
            if graph.shapes.elements.get(node.input[i], FLOAT) in ZERO_POINTS:  # of weights, which are masked
                continue
            mask = numpy_helper.from_array(here.reshape(shape).astype(np.float32), f"{stem}.mask")
            result.append(helper.make_node("Constant", [], [f"{stem}.mask"], value=mask))
            result.append(helper.make_node("Mul", [node.input[i], f"{stem}.mask"], [stem]))
            node.input[i] = stem
        result.append(node)
    del proto.graph.node[:]
    proto.graph.node.extend(result)
    del proto.graph.value_info[:]
    return nest(proto)


def _summed(graph: DependencyGraph, link: Link) -> Iterator[tuple[int, int, int, Axis]]:
    """(input, axis, rank, type) where each label that the node sums over first occurs."""
    if link.take is not None or link.node.op in ("Shape", "Size"):  # these read no values
        return
    rule = link.rule
    made = {name for pattern in rule.outputs for terms in pattern or () for term in terms for name in term}
    done: set[str] = set()
    for i, pattern in enumerate(rule.inputs):
        for axis, terms in enumerate(pattern or ()):
            inside = {name for term in terms for name in term} - made - done
            typed = link.inputs[i] if i < len(link.inputs) else None
            if inside and typed is not None:
                done |= inside if link.node.inputs[i] not in graph.model.constants else set()
                yield i, axis, len(typed), typed[axis]


# ---------------------------------------------------------------------------------------------- running


def feeds(model: onnx.ModelProto, batch: int = 2, seed: int = 0, length: int = 8) -> dict[str, Array]:
    """Random inputs; the first axis is `batch` where it is symbolic, any other `length`."""
    rng = np.random.default_rng(seed)
    stored = {tensor.name for tensor in model.graph.initializer}
    result: dict[str, Array] = {}
    for info in model.graph.input:
        if info.name in stored:
            continue
        dims = enumerate(info.type.tensor_type.shape.dim)
        shape = [dim.dim_value or (length if i else batch) for i, dim in dims]
        if info.type.tensor_type.elem_type == onnx.TensorProto.INT64:
            result[info.name] = rng.integers(0, 10, shape)
        else:
            result[info.name] = rng.standard_normal(shape, dtype=np.float32)
    return result


def run(model: onnx.ModelProto, inputs: Mapping[str, Array]) -> list[Array]:
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 4
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = ort.InferenceSession(model.SerializeToString(), options, ["CPUExecutionProvider"])
    return session.run(None, dict(inputs))


def error(got: list[Array], want: list[Array]) -> float:
    """The largest difference as a share of each output's scale; infinite where shapes differ."""
    worst = 0.0
    for a, b in zip(got, want, strict=True):
        if a.shape != b.shape:
            return math.inf
        if b.size:
            scale = max(float(np.abs(b).max()), 1e-6)
            worst = max(worst, float(np.abs(a.astype(np.float64) - b).max()) / scale)
    return worst


def assert_equal_to_masked(graph: DependencyGraph, plan: Plan, pruned: onnx.ModelProto) -> None:
    reference = masked(graph, plan)
    for batch, seed, length in ((2, 0, 8), (1, 1, 12)):
        inputs = feeds(graph.model.proto, batch, seed, length)
        want = run(reference, inputs)
        assert all(np.isfinite(value).all() for value in want)
        assert error(run(pruned, inputs), want) < TOLERANCE


# ----------------------------------------------------------------------------------------------- counting


def parameters(model: onnx.ModelProto) -> int:
    """Elements of all stored weights: floating-point or quantised tensors with axes."""
    return sum(elements(tensor) for tensor in stored_tensors(model).values())


def elements(tensor: onnx.TensorProto) -> int:
    """The elements of a stored weight; 0 for single numbers and for shapes, indices and the like."""
    return math.prod(tensor.dims) if tensor.dims and tensor.data_type in WEIGHTS else 0


def stored_tensors(model: onnx.ModelProto) -> dict[str, onnx.TensorProto]:
    """Constants by name, in bodies too (where no name occurs twice)."""
    tensors: dict[str, onnx.TensorProto] = {}
    for graph in graphs(model):
        tensors |= {tensor.name: tensor for tensor in graph.initializer}
        for node in graph.node:
            if node.op_type == "Constant" and node.attribute[0].name == "value":
                tensors[node.output[0]] = node.attribute[0].t
    return tensors


def macs(model: onnx.ModelProto, inputs: Mapping[str, Array]) -> int:
    """Multiply-accumulates at these inputs, by the shapes that onnxruntime meets."""
    weighted = [n for n in model.graph.node if n.op_type in WEIGHTED]
    wanted = {name for node in weighted for name in (*node.input[:2], node.output[0])}
    known = stored_tensors(model)
    shapes = {name: tuple(known[name].dims) for name in wanted & known.keys()}
    shapes |= {name: value.shape for name, value in inputs.items()}
    rest = sorted(wanted - shapes.keys())
    probe = onnx.ModelProto()
    probe.CopyFrom(model)
    del probe.graph.output[:]
    probe.graph.output.extend(
        helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None) for name in rest
    )
    if rest:
        shapes |= {n: v.shape for n, v in zip(rest, run(probe, inputs), strict=True)}
    return sum(_node_macs(node, shapes) for node in weighted)


def _node_macs(node: onnx.NodeProto, shapes: Mapping[str, tuple[int, ...]]) -> int:
    x, w, y = shapes[node.input[0]], shapes[node.input[1]], shapes[node.output[0]]
    if node.op_type == "Einsum":
        left, right = node.attribute[0].s.decode().partition("->")[0].split(",")
        return math.prod({**dict(zip(left, x, strict=True)), **dict(zip(right, w, strict=True))}.values())
    if node.op_type == "Conv":
        return math.prod(y) * math.prod(w[1:])
    if node.op_type == "ConvTranspose":
        return math.prod(x) * math.prod(w[1:])
    if node.op_type == "MatMul":
        return math.prod(y) * x[-1]
    transposed = any(a.name == "transA" and a.i for a in node.attribute)
    return math.prod(y) * x[0 if transposed else 1]
