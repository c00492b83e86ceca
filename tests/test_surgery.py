"""What surgery restates, and what it leaves alone."""

from __future__ import annotations

import numpy as np
import onnx
from onnx import helper

from models.builder import Graph
from onnxprune import Keep, Options, Plan, make_plan, pipeline, surgery
from onnxprune.dependency import DependencyGraph
from onnxprune.model import Model


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
