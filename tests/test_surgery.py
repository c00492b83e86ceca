"""What surgery restates, and what it leaves alone."""

from __future__ import annotations

import numpy as np
import onnx
from onnx import helper

from models.builder import Graph
from onnxprune import Keep, Options, Plan, make_plan, pipeline, surgery
from onnxprune.dependency import DependencyGraph
from onnxprune.model import Model
from tests.reference import error, graph_of, masked, run


def folded_rows() -> onnx.ModelProto:
    """Rows of `batch x 4`: an axis that is dynamic and cut at the same time."""
    g = Graph()
    x = g.gemm(g.input("batch", 6), 16)
    x = g.relu(g.reshape(x, -1, 4, shape=("rows", 4)))
    x = g.gemm(g.reshape(x, -1, 16, shape=("batch", 16)), 5)
    model = g.model(x)
    model.graph.value_info.append(helper.make_tensor_value_info("relu_1.output", 1, ["rows", 4]))
    return model


def test_stated_shapes_of_dynamic_axes_are_not_fixed() -> None:
    model = folded_rows()
    result = pipeline.prune(model, Options(0.5, align=1))
    (value,) = (v for v in result.model.graph.value_info if v.name == "relu_1.output")
    rows, width = value.type.tensor_type.shape.dim
    assert not rows.HasField("dim_value")
    assert not rows.dim_param  # the old expression no longer holds
    assert width.dim_value == 4
    targets = [
        onnx.numpy_helper.to_array(t).tolist() for t in result.model.graph.initializer if len(t.dims) == 1
    ]
    assert [-1, 8] in targets


def test_a_plan_that_keeps_everything_changes_nothing() -> None:
    model = folded_rows()
    graph = DependencyGraph(Model(model))
    everything = tuple(Keep(g.name, g.size, tuple(range(g.size))) for g in graph.groups)
    same = surgery.apply(graph, Plan("", everything))
    assert same.SerializeToString(deterministic=True) == model.SerializeToString(deterministic=True)


def test_an_attention_scale_from_a_shape_keeps_its_value() -> None:
    """The masked original divides by the old width, so the pruned one must as well."""
    g = Graph()
    x = g.input("batch", 5, 12)
    q, k = g.matmul(x, 8), g.matmul(x, 8)
    width = g.op("Cast", g.op("Gather", g.op("Shape", q), g.const(-1), axis=0), to=1, dtype=1)
    scores = g.op("Div", g.op("MatMul", q, g.transpose(k, 0, 2, 1)), g.op("Sqrt", width))
    result = pipeline.prune(g.model(scores), Options(0.5, align=1))
    assert result.report.after.channels < result.report.before.channels
    frozen = [n for n in result.model.graph.node if n.op_type == "Concat"]
    assert frozen, "the Shape must go on giving the old width"


def test_heads_are_cut_where_the_first_size_that_fits_has_a_batch_of_one() -> None:
    """Only long signals fit the filter; at a batch of one, batch times heads looks like heads."""
    g = Graph()
    x = g.conv(g.input("batch", 3, "samples"), 8, 33, pad=0)
    batch = g.op("Gather", g.op("Shape", x), g.const([0]), axis=0)
    y = g.transpose(g.reshape(x, 0, 4, 2, -1, shape=("batch", 4, 2, "length")), 0, 1, 3, 2)
    rows = g.op("Concat", g.op("Mul", batch, g.const([4])), g.const([-1, 2]), axis=0)
    y = g.relu(g.op("Reshape", y, rows, shape=("rows", "length", 2)))
    back = g.op("Concat", batch, g.const([4, -1, 2]), axis=0)
    y = g.transpose(g.op("Reshape", y, back, shape=("batch", 4, "length", 2)), 0, 2, 1, 3)
    model = g.model(g.matmul(g.reshape(y, 0, 0, 8, shape=("batch", "length", 8)), 5))
    assert sorted(group.size for group in DependencyGraph(Model(model)).groups) == [2, 4]
    assert pipeline.prune(model, Options(0.5, align=1)).report.after.channels == 4


def test_a_vector_shared_by_layers_of_different_cuts_is_cloned() -> None:
    g = Graph()
    bias = g.store("shared.bias", np.ones(8, np.float32))
    x = g.input("batch", 3, 6, 6)
    left, right = g.conv(x, 8, 3, bias=bias), g.conv(x, 8, 3, bias=bias)
    model = g.model(g.conv(left, 4, 1), g.conv(right, 4, 1))
    plan = make_plan(model, Options(0.5, align=1))
    result = pipeline.apply_plan(model, plan)
    biases = {
        n.input[2]
        for n in result.model.graph.node
        if n.op_type == "Conv" and n.input[1][:6] in ("conv_1", "conv_2")
    }
    assert len(biases) == 2
    assert "shared.bias" in biases


def rows_and_heads() -> onnx.ModelProto:
    """nn.MultiheadAttention, positions first: batch and heads are one axis, multiplied out at run time."""
    g = Graph()
    x = g.matmul(g.input("length", "batch", 6, name="tokens"), 8)
    shape = g.op("Shape", x)
    length, batch = (g.op("Gather", shape, g.const([i]), axis=0) for i in (0, 1))
    target = g.op("Concat", length, g.op("Mul", batch, g.const([4])), g.const([2]), axis=0)
    rows = g.transpose(g.op("Reshape", x, target, shape=("length", "rows", 2)), 1, 0, 2)
    scores = g.op("Softmax", g.op("MatMul", rows, g.transpose(rows, 0, 2, 1)))
    mixed = g.transpose(g.op("MatMul", scores, rows), 1, 0, 2)
    return g.model(g.matmul(g.op("Reshape", mixed, shape, shape=("length", "batch", 8)), 5))


def test_rows_of_a_computed_batch_are_scaled() -> None:
    """Three heads of four, for any batch and length."""
    graph = graph_of(rows_and_heads())
    (heads,) = (group for group in graph.groups if group.size == 4)
    plan = Plan("", (Keep(heads.name, 4, (0, 2, 3)),))
    pruned, reference = surgery.apply(graph, plan), masked(graph, plan)
    weights = {tensor.name: tuple(tensor.dims) for tensor in pruned.graph.initializer}
    assert weights["matmul_1.weight"] == (6, 6)
    for shape in ((1, 1, 6), (2, 5, 6), (11, 3, 6)):
        tokens = {"tokens": np.random.default_rng(0).standard_normal(shape, dtype=np.float32)}
        assert error(run(pruned, tokens), run(reference, tokens)) < 1e-5


def test_zeros_that_go_to_an_output_keep_their_extent() -> None:
    """They have the shape of features that are cut."""
    g = Graph()
    x = g.matmul(g.input("batch", 6, name="tokens"), 8)
    zeros = g.op("ConstantOfShape", g.op("Shape", x), shape=("batch", 8), dtype=1)
    proto = g.model(g.matmul(g.relu(x), 5), zeros)
    graph = graph_of(proto)
    (group,) = graph.groups
    pruned = surgery.apply(graph, Plan("", (Keep(group.name, 8, (1, 6)),)))
    for batch in (1, 4):
        got = run(pruned, {"tokens": np.ones((batch, 6), np.float32)})
        assert got[1].shape == (batch, 8)
    assert [tuple(t.dims) for t in pruned.graph.initializer if t.name == "matmul_1.weight"] == [(6, 2)]


def test_a_shape_known_at_run_time_only_pins() -> None:
    """Behind an operator that nobody knows; what else is there is cut."""
    g = Graph()
    x = g.relu(g.matmul(g.relu(g.matmul(g.input("batch", 6), 7)), 8))
    odd = g.op("Mystery", g.input("batch", 3, name="other"), domain="example", shape=("batch", 8))
    y = g.op("Reshape", x, g.op("Shape", odd), shape=("batch", 8))
    graph = graph_of(g.model(g.matmul(y, 5)))
    assert [group.size for group in graph.groups] == [7]
    texts = {pinned.reason.text for pinned in graph.pinned if pinned.tensor == "matmul_2.weight"}
    assert texts == {"Reshape: the shape of output 0 is unknown"}
