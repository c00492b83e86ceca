"""Pieces of a model, what their times depend on, and what work costs in them."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import ModelProto, helper, numpy_helper

from models.architectures import ARCHITECTURES
from models.transformers import TRANSFORMERS
from onnxprune import latency
from onnxprune.cost import CostModel
from onnxprune.dependency import DependencyGraph
from onnxprune.errors import UserError
from onnxprune.latency import Predicted, Table, pieces, prices
from onnxprune.runtime import Feeds, Session
from onnxprune.shapes import accepted_runs
from onnxprune.targets import State, target
from tests.reference import graph_of

SMALL = {"width": 0.25, "image": 64, "classes": 10}
SUBJECTS: dict[str, Callable[[], ModelProto]] = {
    **{
        name: lambda name=name: ARCHITECTURES[name](**SMALL)  # type: ignore[misc]
        for name in ("resnet50", "mobilenet_v3_large", "shufflenet_v2", "densenet121")
    },
    **{name: lambda name=name: TRANSFORMERS[name]() for name in sorted(TRANSFORMERS)[:6]},  # type: ignore[misc]
}


def fed(graph: DependencyGraph) -> Feeds:
    session = Session(graph.model.proto)
    return next(iter(accepted_runs(graph.model, graph.shapes, session.run, 1)))[1]


@pytest.mark.parametrize("name", SUBJECTS)
def test_pieces_one_after_the_other_are_the_model(name: str) -> None:
    graph = graph_of(SUBJECTS[name]())
    feeds = fed(graph)
    found = pieces(graph, feeds)
    values = dict(feeds)
    for piece in found:
        made = Session(piece.proto).run({key: values[key] for key in piece.feeds})
        for key in piece.feeds:
            np.testing.assert_allclose(values[key], piece.feeds[key], rtol=1e-3, atol=1e-4)
        values |= made
    for key, value in Session(graph.model.proto).run(feeds).items():
        np.testing.assert_allclose(values[key], value, rtol=1e-3, atol=1e-4)
    hearts = [link.node.outputs[0] for link in graph.links if any(link.rule.products)]
    assert sorted(piece.heart for piece in found) == sorted(hearts)
    counted = Counter(node.output[0] for piece in found for node in piece.proto.graph.node)
    assert set(counted.values()) == {1}  # no work is counted twice


def layer(width: int, seed: int = 0, kernel: int = 3) -> ModelProto:
    rng = np.random.default_rng(seed)
    weight = rng.standard_normal((width, 4, kernel, kernel)).astype(np.float32)
    nodes = [helper.make_node("Conv", ["x", f"w{seed}"], ["c"]), helper.make_node("Relu", ["c"], ["y"])]
    value = helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, [1, 4, 8, 8])
    made = helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, None)
    graph = helper.make_graph(nodes, "g", [value], [made], [numpy_helper.from_array(weight, f"w{seed}")])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def digest(proto: ModelProto) -> str:
    graph = graph_of(proto)
    (piece,) = pieces(graph, fed(graph))
    return piece.digest


def test_times_depend_on_shapes_and_not_on_values_or_names() -> None:
    assert digest(layer(8, seed=1)) == digest(layer(8, seed=2))
    assert digest(layer(8)) != digest(layer(7))
    assert digest(layer(8)) != digest(layer(8, kernel=5))


def test_prices_of_the_original_give_its_time() -> None:
    graph = graph_of(SUBJECTS["mobilenet_v3_large"]())
    hearts = [piece.heart for piece in pieces(graph, fed(graph))]
    rng = np.random.default_rng(0)
    whole = Predicted({heart: float(rng.uniform(0.1, 2)) for heart in hearts})
    found = prices(graph, whole)
    total = (CostModel(graph, prices=found.by_node)().time + found.constant) * latency.UNIT * 1e3
    assert total == pytest.approx(whole.total, rel=1e-3)


def test_prices_go_through_the_original_and_the_last_trial() -> None:
    """Times that are an offset and a slope for each piece are told apart after one trial."""
    graph = graph_of(SUBJECTS["resnet50"]())
    nodes = {node.outputs[0]: node.index for node in graph.model.nodes}
    rng = np.random.default_rng(1)
    hearts = [piece.heart for piece in pieces(graph, fed(graph))]
    offset = {heart: float(rng.uniform(0.01, 0.1)) for heart in hearts}
    slope = {heart: float(rng.uniform(1e-7, 1e-6)) for heart in hearts}
    cost = CostModel(graph)

    def clocked(counts: dict[object, int]) -> Predicted:
        work = cost.work(counts)  # type: ignore[arg-type]
        return Predicted({h: offset[h] + slope[h] * work[nodes[h]] for h in hearts})

    half = {group.var: group.size // 2 for group in graph.groups}
    third = {group.var: group.size // 3 for group in graph.groups}
    found = prices(graph, clocked({}), [(half, clocked(half))])  # type: ignore[arg-type]
    priced = CostModel(graph, prices=found.by_node)
    told = (priced(third).time + found.constant) * latency.UNIT * 1e3
    assert told == pytest.approx(clocked(third).total, rel=1e-3)  # type: ignore[arg-type]


def test_work_of_the_nodes_is_the_cost() -> None:
    graph = graph_of(SUBJECTS["densenet121"]())
    half = {group.var: group.size // 2 for group in graph.groups}
    cost = CostModel(graph)
    share = sum(cost.work(half).values()) / sum(cost.work().values())
    assert share == pytest.approx(cost(half).macs / cost().macs, rel=1e-6)


class Absent(type(target("cpu"))):  # type: ignore[misc]
    """The CPU, somewhere else."""

    def state(self) -> object:
        return State("absent", missing="it is elsewhere")


def test_a_table_goes_from_machine_to_machine(tmp_path: Path) -> None:
    graph = graph_of(layer(8))
    feeds = fed(graph)
    path = tmp_path / "table.json"
    here = Table(target("cpu"), 1, path)
    measured = latency.predict(graph, feeds, here)
    assert measured.total > 0
    here.save()
    there = Table(Absent(), 1, path)
    assert not there.runs
    assert latency.predict(graph, feeds, there) == measured
    with pytest.raises(UserError, match="lacks a shape of this model"):
        latency.predict(graph_of(layer(7)), fed(graph_of(layer(7))), there)


@pytest.mark.parametrize(
    "broken",
    [
        "",
        "[]",
        '{"format": 9, "target": "cpu", "milliseconds": {}}',
        '{"format": 1, "target": "qnn", "milliseconds": {}}',
        '{"format": 1, "target": "cpu", "milliseconds": {"a": -1}}',
        '{"format": 1, "target": "cpu", "milliseconds": {"a": "x"}}',
        '{"format": 1, "target": "cpu", "milliseconds": 3}',
    ],
)
def test_files_that_are_no_tables(broken: str, tmp_path: Path) -> None:
    path = tmp_path / "table.json"
    path.write_text(broken)
    with pytest.raises(UserError, match="not a latency table that fits"):
        Table(target("cpu"), 1, path)


def test_tables_are_kept_apart_by_target_and_threads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ONNXPRUNE_CACHE", f"{tmp_path}")
    one, two = Table(target("cpu"), 1), Table(target("cpu"), 2)
    assert one.path != two.path
    one.times["a"] = 1.0
    one.save()
    assert Table(target("cpu"), 1).times == {"a": 1.0}
    assert not Table(target("cpu"), 2).times
    assert json.loads(one.path.read_text())["threads"] == 1
