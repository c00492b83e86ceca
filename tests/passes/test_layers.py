"""Which residual blocks go: influence against what it is known to be."""

from __future__ import annotations

import math

import numpy as np
import onnx
import onnxruntime as ort
import pytest

from models.builder import Array, Graph
from models.transformers import TRANSFORMERS
from onnxprune import parts
from onnxprune.blocks import Blocks
from onnxprune.passes import layers
from onnxprune.runtime import make_feeds
from tests.reference import graph_of

TURN = np.kron(np.eye(4), [[0.0, -1.0], [1.0, 0.0]])
"""Rotates pairs of features by a right angle."""


def added(*matrices: Array) -> Blocks:
    """A stream to which each matrix adds what it makes of it."""
    g = Graph()
    x = g.matmul(g.input("batch", "length", 6, name="tokens"), 8)
    for i, matrix in enumerate(matrices):
        y = g.op("MatMul", x, g.store(f"matrix_{i}", matrix.astype(np.float32)))
        x = g.op("Add", x, y, name=f"block_{i}")
    return Blocks(graph_of(g.model(g.matmul(x, 5))))


def influence(blocks: Blocks) -> dict[str, float]:
    """What the plan says of every block."""
    edits = layers.plan(blocks, str(len(blocks.residual)), "influence")
    return {edit.block: float(edit.reason.rpartition(" ")[2]) for edit in edits}


def test_influence_of_known_blocks() -> None:
    """Nothing, a turn by 45 degrees, a half turn, a change of length, and a turn by 45 degrees back."""
    found = influence(added(0 * TURN, TURN, -3 * np.eye(8), 2 * np.eye(8), TURN.T))
    wanted = {0: 0.0, 1: 1 - math.sqrt(0.5), 2: 2.0, 3: 0.0, 4: 1 - math.sqrt(0.5)}
    assert found.keys() == {f"block_{i}" for i in wanted}
    for i, value in wanted.items():
        assert found[f"block_{i}"] == pytest.approx(value, rel=1e-2, abs=1e-6)


def test_the_least_influence_goes_first() -> None:
    blocks = added(TURN, 0.1 * TURN, -3 * np.eye(8), 0.5 * TURN)
    order = ["block_1", "block_3", "block_0", "block_2"]
    for count in range(1, 5):
        going = {edit.block for edit in layers.plan(blocks, str(count), "influence")}
        assert going == set(order[:count])


def test_of_equal_influence_the_deepest_goes_first() -> None:
    blocks = added(0 * TURN, TURN, 0 * TURN)
    assert [edit.block for edit in layers.plan(blocks, "1", "influence")] == ["block_2"]


def test_influence_is_computed_on_the_seeded_inputs() -> None:
    """Against onnxruntime, on a block that is not linear."""
    blocks = Blocks(graph_of(TRANSFORMERS["torchscript"]()))
    shapes, model = blocks.graph.shapes, blocks.graph.model
    names = {
        block.name: (block.join.inputs[block.stream], block.join.outputs[0]) for block in blocks.residual
    }
    wanted = sorted({name for pair in names.values() for name in pair})
    proto = onnx.ModelProto()
    proto.CopyFrom(model.proto)
    proto.graph.output.extend(onnx.ValueInfoProto(name=name) for name in wanted)
    session = ort.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"])
    feeds = make_feeds(model, shapes.sizes, 0, {"ids": 30})
    values = dict(zip(wanted, (v.ravel() for v in session.run(wanted, feeds)), strict=True))
    found = influence(blocks)
    assert len(found) == 2
    for name, (before, after) in names.items():
        a, b = values[before], values[after]
        assert found[name] == pytest.approx(1 - a @ b / np.sqrt(a @ a * (b @ b)), rel=1e-2)


def test_influence_in_parts_is_that_of_one_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """And the largest is not the same as the least, which any constant would pass."""
    blocks = Blocks(graph_of(TRANSFORMERS["torch_module"]()))
    whole = influence(blocks)
    monkeypatch.setattr(parts, "WHOLE", -1)
    monkeypatch.setattr(parts, "PART", 64)
    monkeypatch.setattr(parts, "LARGE", 1)
    divided = influence(blocks)
    assert divided == pytest.approx(whole, rel=1e-2)
    assert len(set(whole.values())) > 1
