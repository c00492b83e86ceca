"""Which residual blocks go: every criterion against what it is known to be."""

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
from onnxprune.data import Data, open_data
from onnxprune.errors import UserError
from onnxprune.passes import layers
from onnxprune.runtime import make_feeds
from onnxprune.statistics import Regression
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


def scores(blocks: Blocks, criterion: str = "influence", data: Data | None = None) -> dict[str, float]:
    """What the plan says of every block."""
    edits = layers.plan(blocks, str(len(blocks.residual)), criterion, data=data)
    return {edit.block: float(edit.reason.rpartition(" ")[2]) for edit in edits}


def tokens(blocks: Blocks, samples: int = 32) -> tuple[Array, Data]:
    values = np.random.default_rng(3).standard_normal((samples, 10, 6)).astype(np.float32)
    graph = blocks.graph
    return values, open_data({"tokens": values}, graph.model, graph.shapes, samples=samples, seed=0)


def test_influence_of_known_blocks() -> None:
    """Nothing, a turn by 45 degrees, a half turn, a change of length, and a turn by 45 degrees back."""
    found = scores(added(0 * TURN, TURN, -3 * np.eye(8), 2 * np.eye(8), TURN.T))
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
    """Against onnxruntime, on a block that is not linear: the mean over tokens."""
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
    values = dict(zip(wanted, session.run(wanted, feeds), strict=True))
    found = scores(blocks)
    assert len(found) == 2
    for name, (before, after) in names.items():
        a, b = values[before], values[after]
        cosines = (a * b).sum(axis=-1) / np.linalg.norm(a, axis=-1) / np.linalg.norm(b, axis=-1)
        assert found[name] == pytest.approx(1 - cosines.mean(), rel=1e-2)


@pytest.mark.parametrize("criterion", ["influence", "error", "obs"])
def test_scores_in_parts_are_those_of_one_run(criterion: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """And the largest is not the same as the least, which any constant would pass."""
    blocks = Blocks(graph_of(TRANSFORMERS["torch_module"]()))
    whole = scores(blocks, criterion)
    monkeypatch.setattr(parts, "WHOLE", -1)
    monkeypatch.setattr(parts, "PART", 64)
    monkeypatch.setattr(parts, "LARGE", 1)
    divided = scores(blocks, criterion)
    assert divided == pytest.approx(whole, rel=1e-2)
    assert len(set(whole.values())) > 1


@pytest.mark.parametrize("pinned", [False, True])
def test_influence_on_data_is_the_mean_over_all_tokens(pinned: bool) -> None:
    """Tokens of any length count alike, and so do batches; also where the stream is the output."""
    matrix = np.diag([3.0, 0, 0, -0.5, 0, 0, 1, -2])
    g = Graph()
    stream = g.matmul(g.input("batch", "length", 6, name="tokens"), 8)
    made = g.op("MatMul", stream, g.store("matrix", matrix.astype(np.float32)))
    joined = g.op("Add", stream, made, name="block_0")
    blocks = Blocks(graph_of(g.model(joined if pinned else g.matmul(joined, 5))))
    values, _ = tokens(blocks, 33)
    values = values * np.random.default_rng(0).lognormal(0, 3, (33, 10, 1)).astype(np.float32)
    data = open_data({"tokens": values}, blocks.graph.model, blocks.graph.shapes, samples=33)
    x = values.reshape(-1, 6).astype(np.float64) @ blocks.graph.model.array("matmul_1.weight")
    y = x + x @ matrix
    cosines = (x * y).sum(axis=1) / np.linalg.norm(x, axis=1) / np.linalg.norm(y, axis=1)
    assert scores(blocks, data=data)["block_0"] == pytest.approx(1 - cosines.mean(), rel=5e-3)


def test_influence_on_images_is_the_mean_over_pixels() -> None:
    g = Graph(seed=2)
    x = g.conv(g.input("batch", 3, 6, 6, name="image"), 5, 1)
    y = g.op("Add", x, g.relu(g.conv(x, 5, 3)), name="block")
    blocks = Blocks(graph_of(g.model(g.conv(y, 2, 1))))
    values = np.random.default_rng(0).standard_normal((16, 3, 6, 6)).astype(np.float32)
    data = open_data({"image": values}, blocks.graph.model, blocks.graph.shapes, samples=16)
    run = parts.inner_values(blocks.graph.model, blocks.graph.shapes, [x.name, y.name])
    a, b = (run({"image": values})[t.name].astype(np.float64) for t in (x, y))
    cosines = (a * b).sum(axis=1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)
    assert scores(blocks, data=data)["block"] == pytest.approx(1 - cosines.mean(), rel=5e-3)


def test_error_is_that_of_the_outputs_without_the_block() -> None:
    """Of maps that do not commute, so that it matters which one is left out."""
    generator = np.random.default_rng(1)
    matrices = [0.3 * generator.standard_normal((8, 8)) for _ in range(3)]
    blocks = added(*matrices)
    values, data = tokens(blocks)

    def output(*left: int) -> Array:
        x = values.reshape(-1, 6) @ blocks.graph.model.array("matmul_1.weight").astype(np.float64)
        for i in left:
            x = x + x @ matrices[i]
        return np.asarray(x @ blocks.graph.model.array(blocks.graph.model.nodes[-1].inputs[1]))

    whole = output(0, 1, 2)
    found = scores(blocks, "error", data)
    for i in range(3):
        changed = output(*(j for j in range(3) if j != i))
        wanted = np.square(changed - whole).sum() / np.square(whole).sum()
        assert found[f"block_{i}"] == pytest.approx(wanted, rel=5e-3)


def test_a_block_that_is_linear_costs_obs_nothing() -> None:
    """An even function of its input is the other extreme: no linear map says any of it."""
    g = Graph()
    x = g.matmul(g.input("batch", "length", 6, name="tokens"), 6)
    x = g.op("Add", x, g.matmul(x, 6, bias=True), name="linear")
    y = g.op("Abs", g.op("MatMul", x, g.store("even", 2 * np.eye(6, dtype=np.float32))))
    blocks = Blocks(graph_of(g.model(g.matmul(g.op("Add", x, y, name="even"), 5))))
    _, data = tokens(blocks, 256)
    found = scores(blocks, "obs", data)
    assert found["linear"] < 1e-3
    # for normal x with f = 2|x|: var f = 4 (1 - 2 / pi) var x, all of it new
    new = 4 * (1 - 2 / math.pi)
    assert found["even"] == pytest.approx(new / (1 + new), rel=0.1)
    assert scores(blocks, "influence", data)["linear"] > 0.01


def test_what_is_unexplained_is_the_residual_of_least_squares() -> None:
    generator = np.random.default_rng(0)
    x = generator.standard_normal((400, 5)) @ generator.standard_normal((5, 5)) + 3
    e = np.tanh(x @ generator.standard_normal((5, 5))) + 1
    fitted, judged = Regression(1, 5, 5), Regression(1, 5, 5)
    fitted.add(x[None, :300], e[None, :300])
    judged.add(x[None, 300:], e[None, 300:])
    ones = np.ones((400, 1))
    map_ = np.linalg.lstsq(np.hstack([x, ones])[:300], e[:300])[0]
    left = np.square(e[300:] - np.hstack([x, ones])[300:] @ map_).mean(axis=0).sum()
    share = left / (x + e).var(axis=0).sum()
    assert layers.unexplained(fitted, judged) == pytest.approx(share, rel=2e-2)


def test_tokens_that_were_fitted_judge_nothing() -> None:
    """Runs of three and four tokens with 16 features, which any linear map can fit."""
    g = Graph()
    x = g.matmul(g.input("batch", "length", 6, name="tokens"), 16)
    x = g.op("Relu", g.matmul(g.op("Relu", x), 16))
    y = g.op("Abs", g.op("MatMul", x, g.store("other", g.normal(16, 16))))
    blocks = Blocks(graph_of(g.model(g.matmul(g.op("Add", x, y, name="block"), 5))))
    generator = np.random.default_rng(0)
    for length in (3, 4):
        values = generator.standard_normal((2, length, 6)).astype(np.float32)
        data = open_data({"tokens": values}, blocks.graph.model, blocks.graph.shapes, samples=2)
        assert scores(blocks, "obs", data)["block"] > 0.05


@pytest.mark.parametrize("rows", [1, 2, 5])
def test_with_few_tokens_the_rest_is_not_taken_to_explain_anything(rows: int) -> None:
    """Noise on 64 features: a fit of so few rows is perfect and worthless."""
    generator = np.random.default_rng(0)
    fitted, judged = Regression(1, 64, 64), Regression(1, 64, 64)
    for part, count in ((fitted, rows), (judged, 200)):
        part.add(generator.standard_normal((1, count, 64)), generator.standard_normal((1, count, 64)))
    assert layers.unexplained(fitted, judged) > 0.4


@pytest.mark.parametrize("criterion", layers.CRITERIA)
def test_plans_are_the_same_twice(criterion: str) -> None:
    blocks = Blocks(graph_of(TRANSFORMERS["torchscript"]()))
    assert layers.plan(blocks, "1", criterion) == layers.plan(blocks, "1", criterion)
    assert len(layers.plan(blocks, "1", criterion)) == 1


@pytest.mark.parametrize("criterion", ["influence", "error", "obs"])
@pytest.mark.parametrize("given", [True, False])
def test_what_cannot_be_run_is_refused(criterion: str, given: bool) -> None:
    """Products from a domain that no runtime knows."""
    g = Graph()
    x = g.matmul(g.input("batch", 4, 6, name="tokens"), 8)
    x = g.op("Add", x, g.matmul(x, 8), name="block")
    blocks = Blocks(graph_of(g.model(g.matmul(x, 5))))
    for node in blocks.graph.model.proto.graph.node:
        if node.op_type == "MatMul":
            node.domain = "nowhere"
    values = np.random.default_rng(3).standard_normal((4, 4, 6)).astype(np.float32)
    data = open_data({"tokens": values}, blocks.graph.model, blocks.graph.shapes) if given else None
    with pytest.raises(
        UserError, match=rf"ranked by {criterion}, onnxruntime cannot run.*use --layer-criterion last"
    ):
        layers.plan(blocks, "1", criterion, data=data)
