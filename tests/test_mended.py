"""A repaired candidate against its plan's cut: what repair may change passes, anything else is named."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper

import onnxprune
from models.control_flow import CONTROL_FLOW
from models.recurrent import RECURRENT
from models.topologies import TOPOLOGIES
from models.transformers import TRANSFORMERS
from onnxprune import surgery
from onnxprune.blocks import Blocks
from onnxprune.dependency import DependencyGraph
from onnxprune.model import Model
from onnxprune.plan import Plan
from onnxprune.validation import mended
from onnxprune.validation.mended import Mending

ALL = {**TOPOLOGIES, **TRANSFORMERS, **RECURRENT, **CONTROL_FLOW}


def compared(original: onnx.ModelProto, plan: Plan, candidate: onnx.ModelProto) -> Mending:
    graph = DependencyGraph(Model(original))
    return mended.check(graph, surgery.apply(graph, plan, Blocks(graph)), Model(candidate))


def cases() -> list[str]:
    """Networks of every kind, few of each."""
    chosen = []
    for family in (TOPOLOGIES, TRANSFORMERS, RECURRENT, CONTROL_FLOW):
        names = sorted(family)
        chosen += names[:: max(len(names) // 6, 1)]
    return chosen


@pytest.mark.parametrize("method", ["mean", "sequential"])
@pytest.mark.parametrize("name", cases())
def test_whatever_repair_did_passes(name: str, method: str) -> None:
    original = ALL[name]()
    try:
        result = onnxprune.shrink(original, channels=0.5, align=1, repair=method, samples=6, min_channels=2)
    except onnxprune.NothingToPrune:
        pytest.skip("nothing can be cut")
    except onnxprune.UserError as error:
        pytest.skip(f"nothing to repair on: {error}")
    found = compared(original, result.plan, result.model)
    assert found.broken == ()
    assert result.report.repair is not None
    assert (found.repaired + found.added > 0) == (result.report.repair.chosen != "none" and _changed(result))


def _changed(result: Any) -> bool:
    return any(not layer.method.startswith("none") for layer in result.report.repair.layers)


@pytest.fixture(scope="module")
def original() -> onnx.ModelProto:
    return TOPOLOGIES["residual_projection_stage"]()


@pytest.fixture(scope="module")
def repaired(original: onnx.ModelProto) -> Any:
    return onnxprune.shrink(original, channels=0.5, align=1, samples=16)


def weight_of(model: onnx.ModelProto, end: str) -> onnx.TensorProto:
    return next(t for t in model.graph.initializer if t.name.endswith(end))


def replaced(tensor: onnx.TensorProto, change: Callable[[np.ndarray], np.ndarray]) -> None:
    tensor.CopyFrom(numpy_helper.from_array(change(numpy_helper.to_array(tensor)), tensor.name))


def scaled_variance(model: onnx.ModelProto) -> None:
    replaced(weight_of(model, "var"), lambda a: a * 2)


def narrower(model: onnx.ModelProto) -> None:
    replaced(weight_of(model, "conv_1.weight"), lambda a: a[:, :, 1:])


def doubled(model: onnx.ModelProto) -> None:
    replaced(weight_of(model, "conv_1.weight"), lambda a: a.astype(np.float64))


def stride(model: onnx.ModelProto) -> None:
    node = next(n for n in model.graph.node if n.op_type == "Conv")
    next(a for a in node.attribute if a.name == "pads").ints[0] += 1


def rewired(model: onnx.ModelProto) -> None:
    first, second = [n for n in model.graph.node if n.op_type == "Relu"][:2]
    second.input[0] = first.output[0]


def another_node(model: onnx.ModelProto) -> None:
    node = model.graph.node[-1]
    end = node.output[0]
    node.output[0] = "before the end"
    model.graph.node.append(helper.make_node("Relu", ["before the end"], [end], name="more"))


def another_constant(model: onnx.ModelProto) -> None:
    model.graph.initializer.append(numpy_helper.from_array(np.ones(3, np.float32), "stray"))


def another_opset(model: onnx.ModelProto) -> None:
    model.opset_import[0].version += 1


def another_operator(model: onnx.ModelProto) -> None:
    next(n for n in model.graph.node if n.op_type == "Relu").op_type = "Sigmoid"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (scaled_variance, "var' has other values"),
        (narrower, "has other shape"),
        (doubled, "has other elements"),
        (stride, "has other attributes"),
        (rewired, "reads"),
        (another_node, "is new"),
        (another_constant, "constant 'stray' is new"),
        (another_opset, "it is written for ai.onnx 18"),
        (another_operator, "has other attributes"),
    ],
)
def test_anything_else_is_named(
    change: Callable[[onnx.ModelProto], None], words: str, original: onnx.ModelProto, repaired: Any
) -> None:
    candidate = onnx.ModelProto()
    candidate.CopyFrom(repaired.model)
    assert compared(original, repaired.plan, candidate).passed
    change(candidate)
    found = compared(original, repaired.plan, candidate)
    assert not found.passed
    assert any(words in line for line in found.broken), found.broken
    assert len(found.broken) <= mended.SHOWN + 1


def test_a_bias_may_be_added_where_a_layer_can_have_one_only(
    original: onnx.ModelProto, repaired: Any
) -> None:
    cut = onnxprune.apply(original, repaired.plan, cut_only=True).model
    same = compared(original, repaired.plan, cut)
    assert (same.repaired, same.added, same.broken) == (0, 0, ())
    node = next(n for n in cut.graph.node if n.op_type == "Conv" and len(n.input) == 2)
    width = next(t for t in cut.graph.initializer if t.name == node.input[1]).dims[0]
    cut.graph.initializer.append(numpy_helper.from_array(np.ones(width, np.float32), "more"))
    node.input.append("more")
    found = compared(original, repaired.plan, cut)
    assert (found.repaired, found.added, found.broken) == (0, 1, ())
    node.input[2] = next(n for n in cut.graph.node if n.op_type == "BatchNormalization").input[1]
    broken = compared(original, repaired.plan, cut).broken
    assert any("reads" in line for line in broken), "a bias of its own, or none"


def test_values_of_a_plain_cut_are_counted(original: onnx.ModelProto, repaired: Any) -> None:
    cut = onnxprune.apply(original, repaired.plan, cut_only=True).model
    convolutions = [n.input[1] for n in cut.graph.node if n.op_type == "Conv"]
    for tensor in cut.graph.initializer:
        if tensor.name in convolutions[:3]:
            replaced(tensor, lambda a: a + 1)
    assert compared(original, repaired.plan, cut).repaired == 3
