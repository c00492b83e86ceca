"""Errors without a residual block, against the network with its branch set to a constant by hand."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import numpy_helper

import onnxprune
from models.attention import ATTENTION
from models.builder import Graph, Tensor
from models.control_flow import CONTROL_FLOW
from models.topologies import TOPOLOGIES
from models.transformers import TRANSFORMERS
from onnxprune.blocks import Blocks
from onnxprune.calibration import Calibration
from onnxprune.data import Data, open_data, synthetic
from onnxprune.dependency import DependencyGraph
from onnxprune.model import Array, Model
from onnxprune.sensitivity import Probe, masks

# Networks of one output whose branches end in a convolution, BatchNorm, a scale, Concat, an activation, a new layout, a
# matrix product with a bias and without; the last one has joins that normalise. The axis is that of the features.
NETWORKS = {
    **dict.fromkeys(("residual_with_input", "residual", "residual_layer_scale"), (TOPOLOGIES, 1)),
    **dict.fromkeys(("split_concat_add", "c2f"), (TOPOLOGIES, 1)),
    **dict.fromkeys(("vit", "llama", "messages", "levit"), (TRANSFORMERS, -1)),
    "convnext": (TRANSFORMERS, 1),
    "group_query": (ATTENTION, -1),
}


def calibrated(proto: onnx.ModelProto, data: Data | None = None) -> tuple[Blocks, Data, Calibration]:
    blocks = Blocks(DependencyGraph(Model(proto)))
    data = data or synthetic(blocks.graph.model, blocks.graph.shapes, samples=12, seed=0)
    return blocks, data, Calibration(blocks.graph, data)


def run(proto: onnx.ModelProto, batches: Sequence[Mapping[str, Array]], name: str) -> Array:
    """What is computed there, one batch after the other."""
    model = onnx.ModelProto()
    model.CopyFrom(proto)
    if name not in {output.name for output in model.graph.output}:
        model.graph.output.append(onnx.ValueInfoProto(name=name))
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    return np.stack([session.run([name], feeds)[0] for feeds in batches])


def with_constant(proto: onnx.ModelProto, join: str, operand: int, value: Array) -> onnx.ModelProto:
    """The model whose join adds this value in place of its branch."""
    model = onnx.ModelProto()
    model.CopyFrom(proto)
    model.graph.initializer.append(numpy_helper.from_array(value, "by hand"))
    (node,) = (node for node in model.graph.node if join in node.output)
    node.input[operand] = "by hand"
    return model


@pytest.mark.parametrize("name", NETWORKS)
def test_without_its_branch_a_block_adds_the_mean(name: str) -> None:
    source, axis = NETWORKS[name]
    proto = source[name]()
    blocks, data, calibration = calibrated(proto)
    errors = calibration.without(blocks.residual, 0)
    assert list(errors) == [block.name for block in blocks.residual]
    assert errors
    batches = [batch.feeds for batch in data.batches(1)]
    whole = run(proto, batches, "output").astype(np.float64)
    for block in blocks.residual:
        branch, join = block.join.inputs[block.branch], block.join.outputs[0]
        values = run(proto, batches, branch)
        place = axis % (values.ndim - 1) + 1
        rest = tuple(a for a in range(values.ndim) if a != place)
        mean = values.mean(axis=rest, dtype=np.float64, keepdims=True)
        constant = np.ascontiguousarray(np.broadcast_to(mean, values.shape)[0]).astype(np.float32)
        changed = with_constant(proto, join, block.branch, constant)
        made = run(changed, batches, "output")
        lost = np.square(made - whole).sum() / np.square(whole - whole.mean()).sum()
        assert lost > 1e-3
        assert errors[block.name] == pytest.approx(lost, rel=1e-3), block.name


def test_a_block_costs_the_same_with_its_norm_and_folded() -> None:
    """What ends in BatchNorm competes with what ends in a convolution."""
    plain = TOPOLOGIES["residual_projection_stage"]()
    folded = onnxprune.fold(plain).model
    found = []
    for proto in (plain, folded):
        blocks, _, calibration = calibrated(proto)
        found.append([*calibration.without(blocks.residual, 0).values()])
    assert len(found[0]) == len(found[1]) == 2
    assert np.isfinite(found).all()
    assert found[0] == pytest.approx(found[1], rel=1e-3)


def test_a_budget_gives_up_an_idle_block_that_ends_in_a_norm() -> None:
    """One of two blocks adds next to nothing: it goes first, whole."""
    g = Graph(seed=3)
    x = g.relu(g.conv(g.input("batch", 3, 8, 8, name="image"), 16))
    for gain in (1.0, 1e-4):
        with g.scope("busy" if gain == 1 else "idle"):
            x = g.add(x, g.bn(g.conv(g.relu(g.conv(x, 16)), 16), gain=gain))
    model = g.model(g.gemm(g.flatten(g.gap(x)), 5))
    images = np.random.default_rng(0).standard_normal((48, 3, 8, 8), dtype=np.float32)
    result = onnxprune.shrink(model, macs=0.6, data=images, align=1, repair="none")
    assert [edit.block for edit in result.plan.removals] == ["idle.add_1"]
    assert sum(edit.removed for edit in result.plan.keeps) < 16


def test_blocks_in_bodies_cannot_be_told() -> None:
    blocks, _, calibration = calibrated(CONTROL_FLOW["loop_gru"]())
    (block,) = blocks.residual
    assert calibration.without(blocks.residual, 0) == {block.name: math.inf}


@pytest.mark.parametrize("dtype", [np.float16, np.float64])
def test_other_widths(dtype: type[np.floating]) -> None:
    """Switches have the type of the branch."""
    g = Graph(seed=1)
    x = g.input("batch", 4, name="x", dtype=onnx.helper.np_dtype_to_tensor_dtype(np.dtype(dtype)))

    def matrix(name: str, *shape: int) -> Tensor:
        return g.store(name, g.normal(*shape).astype(dtype))

    h = g.op("MatMul", x, matrix("a", 4, 6))
    y = g.add(h, g.op("MatMul", g.relu(g.op("MatMul", h, matrix("b", 6, 8))), matrix("c", 8, 6)))
    proto = g.model(g.op("MatMul", y, matrix("d", 6, 3)))
    blocks = Blocks(DependencyGraph(Model(proto)))
    rows = np.random.default_rng(0).standard_normal((24, 4)).astype(dtype)
    _, _, calibration = calibrated(proto, open_data(rows, blocks.graph.model, blocks.graph.shapes))
    (error,) = calibration.without(blocks.residual, 0).values()
    a, b, c, d = (numpy_helper.to_array(t).astype(np.float64) for t in proto.graph.initializer)
    stream = rows.astype(np.float64) @ a
    branch = np.maximum(stream @ b, 0) @ c
    whole, made = (stream + branch) @ d, (stream + branch.mean(axis=0)) @ d
    lost = np.square(made - whole).sum() / np.square(whole - whole.mean()).sum()
    assert error == pytest.approx(lost, rel=1e-2)


def test_an_error_is_measured_on_samples_that_no_map_has_seen() -> None:
    """Few samples and many channels: on the samples themselves any half makes up for the other half."""
    g = Graph(seed=2)
    h = g.relu(g.gemm(g.input("batch", 48, name="x"), 96))
    model = g.model(g.gemm(h, 8))
    rng = np.random.default_rng(0)
    rows, fresh = (rng.standard_normal((count, 48)).astype(np.float32) for count in (96, 256))
    blocks = Blocks(DependencyGraph(Model(model)))
    graph = blocks.graph
    _, data, calibration = calibrated(model, open_data(rows, graph.model, graph.shapes))
    (group,) = calibration.graph.groups
    keep = masks([(group, range(48))])
    others = Probe(calibration.evidence, open_data(fresh, graph.model, graph.shapes), apart=True).error(keep)
    assert calibration.probe(48).error(keep) == pytest.approx(others, rel=0.25)
    assert Probe(calibration.evidence, data).error(keep) < 0.7 * others
