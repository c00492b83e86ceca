"""Pieces of a model, what their times depend on, and what work costs in them."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from onnx import ModelProto, helper, numpy_helper

from models.architectures import ARCHITECTURES
from models.builder import Graph
from models.transformers import TRANSFORMERS
from onnxprune import (
    Options,
    Result,
    comparison,
    latency,
    make_plan,
    measure,
    measuring,
    shrink,
    surgery,
    timing,
)
from onnxprune.blocks import Blocks
from onnxprune.cost import CostModel
from onnxprune.dependency import DependencyGraph
from onnxprune.errors import UserError
from onnxprune.grids import Grid, Whole, monotone, spread
from onnxprune.latency import Piece, Predicted, Table, forms, pieces, prices
from onnxprune.runtime import Feeds, Session
from onnxprune.shapes import accepted_runs
from onnxprune.targets import TARGETS, Engine, State, TargetError, target
from onnxprune.targets.cpu import Cpu
from tests.reference import graph_of
from tests.small import check_refused, run

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


def resized(factor: float) -> ModelProto:
    """A layer and a Resize, whose factor is a float constant."""
    rng = np.random.default_rng(0)
    nodes = [
        helper.make_node("Conv", ["x", "w"], ["c"]),
        helper.make_node("Resize", ["c", "", "s"], ["y"], mode="linear"),
    ]
    weights = [
        numpy_helper.from_array(rng.standard_normal((4, 4, 3, 3)).astype(np.float32), "w"),
        numpy_helper.from_array(np.array([1, 1, factor, factor], dtype=np.float32), "s"),
    ]
    value = helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, [1, 4, 8, 8])
    made = helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, None)
    graph = helper.make_graph(nodes, "g", [value], [made], weights)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def test_times_depend_on_floats_that_decide_on_shapes() -> None:
    assert digest(resized(2)) == digest(resized(2))
    assert digest(resized(2)) != digest(resized(8))


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


def network(
    nodes: list[onnx.NodeProto],
    inputs: dict[str, tuple[int, ...]],
    output: tuple[int, ...],
    weights: dict[str, tuple[int, ...]],
    constants: dict[str, Any] | None = None,
) -> ModelProto:
    """A model that makes `o`, with normal weights of these shapes."""
    rng = np.random.default_rng(0)
    arrays = {name: (0.1 * rng.standard_normal(shape)).astype(np.float32) for name, shape in weights.items()}
    stored = [numpy_helper.from_array(value, name) for name, value in (arrays | (constants or {})).items()]
    read = [helper.make_tensor_value_info(n, onnx.TensorProto.FLOAT, shape) for n, shape in inputs.items()]
    made = helper.make_tensor_value_info("o", onnx.TensorProto.FLOAT, output)
    graph = helper.make_graph(nodes, "g", read, [made], stored)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def idle() -> ModelProto:
    """Nothing multiplies, and nothing can go."""
    return network([helper.make_node("Relu", ["x"], ["o"])], {"x": (1, 4)}, (1, 4), {})


def recurrent() -> ModelProto:
    """Two LSTMs side by side, of which only the last states are read: what comes first is left out and has no name."""
    nodes, weights = [], {"g1": (80, 64), "g2": (64, 8)}
    for at, hidden in enumerate((32, 48)):
        weights |= {f"w{at}": (1, 4 * hidden, 16), f"r{at}": (1, 4 * hidden, hidden)}
        nodes += [
            helper.make_node("LSTM", [f"x{at}", f"w{at}", f"r{at}"], ["", f"h{at}"], hidden_size=hidden),
            helper.make_node("Squeeze", [f"h{at}", "first"], [f"s{at}"]),
        ]
    nodes += [
        helper.make_node("Concat", ["s0", "s1"], ["c"], axis=1),
        helper.make_node("Gemm", ["c", "g1"], ["d"]),
        helper.make_node("Relu", ["d"], ["e"]),
        helper.make_node("Gemm", ["e", "g2"], ["o"]),
    ]
    inputs = {"x0": (12, 1, 16), "x1": (12, 1, 16)}
    return network(nodes, inputs, (1, 8), weights, {"first": np.array([0])})


def test_nodes_whose_first_output_is_left_out() -> None:
    graph = graph_of(recurrent())
    found = pieces(graph, fed(graph))
    assert [piece.heart for piece in found] == ["h0", "h1", "d", "o"]
    assert forms(graph, found).keys() == {"h0", "h1", "d", "o"}
    whole = Predicted({piece.heart: 1.0 + at for at, piece in enumerate(found)})
    spent = {node.result: prices(graph, whole).by_node.get(node.index) for node in graph.model.nodes}
    work = CostModel(graph).work()
    for node in graph.model.nodes:
        if node.result in whole.pieces:
            price = whole.pieces[node.result] * 1e-3 / latency.UNIT / work[node.index]
            assert spent[node.result] == pytest.approx(price, rel=0.01)
    result = shrink(recurrent(), macs=0.5, samples=16)
    assert result.report.kept["macs"] < 1
    assert result.report.as_dict()["repair"]["layers"]


def branching() -> ModelProto:
    """A network with a body, which is timed in one piece."""
    bodies = {}
    for name, op in (("then_branch", "Relu"), ("else_branch", "Neg")):
        out = helper.make_tensor_value_info(op, onnx.TensorProto.FLOAT, None)
        bodies[name] = helper.make_graph([helper.make_node(op, ["b"], [op])], name, [], [out])
    nodes = [
        helper.make_node("Conv", ["x", "w1"], ["a"], pads=[1] * 4),
        helper.make_node("Conv", ["a", "w2"], ["b"], pads=[1] * 4),
        helper.make_node("ReduceSum", ["b"], ["s"], keepdims=0),
        helper.make_node("Greater", ["s", "zero"], ["c"]),
        helper.make_node("If", ["c"], ["d"], **bodies),
        helper.make_node("Conv", ["d", "w3"], ["o"], pads=[1] * 4),
    ]
    weights = {"w1": (64, 8, 3, 3), "w2": (64, 64, 3, 3), "w3": (8, 64, 3, 3)}
    return network(nodes, {"x": (1, 8, 16, 16)}, (1, 8, 16, 16), weights, {"zero": np.float32(0)})


def test_a_model_in_one_piece_has_prices_too() -> None:
    graph = graph_of(branching())
    assert [piece.heart for piece in pieces(graph, fed(graph))] == [""]
    half = {group.var: group.size // 2 for group in graph.groups}
    cost = CostModel(graph)

    def clocked(counts: dict[object, int]) -> Predicted:
        return Predicted({"": 0.1 + 1e-7 * cost(counts).macs})  # type: ignore[arg-type]

    for trials in ([], [(half, clocked(half))]):
        found = prices(graph, clocked({}), trials)  # type: ignore[arg-type]
        priced = CostModel(graph, prices=found.by_node)
        total = (priced().time + found.constant) * latency.UNIT * 1e3
        assert total == pytest.approx(clocked({}).total, rel=1e-3)
    assert len(set(found.by_node.values())) == 1
    told = (priced(half).time + found.constant) * latency.UNIT * 1e3  # type: ignore[arg-type]
    assert told == pytest.approx(clocked(half).total, rel=1e-3)


def test_constants_go_with_each_of_their_readers() -> None:
    """A shape that two pieces read is constant in both: a runtime could not plan a variable one."""
    shape = numpy_helper.from_array(np.array([1, 8, 4, 4]))
    nodes = [
        helper.make_node("Constant", [], ["shape"], value=shape),
        helper.make_node("Conv", ["x", "w1"], ["a"]),
        helper.make_node("Reshape", ["a", "shape"], ["b"]),
        helper.make_node("Conv", ["b", "w2"], ["c"]),
        helper.make_node("Reshape", ["c", "shape"], ["o"]),
    ]
    weights = {"w1": (8, 8, 1, 1), "w2": (8, 8, 1, 1)}
    model = network(nodes, {"x": (1, 8, 4, 4)}, (1, 8, 4, 4), weights)
    graph = graph_of(model)
    assert [list(piece.feeds) for piece in pieces(graph, fed(graph))] == [["x"], ["b"]]


def test_work_of_the_nodes_is_the_cost() -> None:
    graph = graph_of(SUBJECTS["densenet121"]())
    half = {group.var: group.size // 2 for group in graph.groups}
    cost = CostModel(graph)
    share = sum(cost.work(half).values()) / sum(cost.work().values())
    assert share == pytest.approx(cost(half).macs / cost().macs, rel=1e-6)


class Absent(Cpu):
    """The CPU, somewhere else."""

    def state(self) -> State:
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


HEADER: dict[str, Any] = {
    "format": latency.FORMAT,
    "target": "cpu",
    "version": "onnxruntime 1.20.0",
    "device": "aarch64",
    "processor": "Cortex-A76",
    "threads": 8,
    "milliseconds": {},
    "grids": {},
    "wholes": {},
}
GRID: dict[str, Any] = {"inputs": [1, 2], "outputs": [3], "times": [[1], [2]], "rest": [1], "spent": [2]}
WHOLE: dict[str, Any] = {"milliseconds": 1, "pieces": 1, "ratios": [[0.5, 0.5]]}


@pytest.mark.parametrize(
    "changed",
    [
        {"format": 1},
        {"target": "qnn"},
        {"threads": "8"},
        {"milliseconds": {"a": -1}},
        {"milliseconds": {"a": "x"}},
        {"milliseconds": {"a": float("nan")}},
        {"milliseconds": 3},
        {"grids": {"a": 1}},
        {"grids": {"a": GRID | {"inputs": [2, 1]}}},
        {"grids": {"a": GRID | {"inputs": [1.5, 2]}}},
        {"grids": {"a": GRID | {"inputs": [1, 10**400]}}},
        {"grids": {"a": GRID | {"outputs": []}}},
        {"grids": {"a": GRID | {"times": [[1]]}}},
        {"grids": {"a": GRID | {"times": [[1], [2, 3]]}}},
        {"grids": {"a": GRID | {"times": [[1], [float("inf")]]}}},
        {"grids": {"a": GRID | {"spent": [0]}}},
        {"wholes": {"a": WHOLE | {"milliseconds": 0}}},
        {"wholes": {"a": WHOLE | {"ratios": [1]}}},
        {"wholes": []},
    ],
)
def test_tables_that_do_not_fit(changed: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "table.json"
    path.write_text(json.dumps(HEADER | {"grids": {"a": GRID}, "wholes": {"a": WHOLE}}))
    assert Table(target("cpu"), 1, path).grids["a"].at((1, 3, 1)) == 1
    path.write_text(json.dumps(HEADER | changed))
    with pytest.raises(UserError, match="not a latency table that fits"):
        Table(target("cpu"), 1, path)


@pytest.mark.parametrize(
    "broken",
    ["", "[]", "{}", "[" * 10**5, json.dumps(HEADER | {"milliseconds": {"a": 10**400}})],
    ids=["empty", "a list", "nothing", "deep", "endless"],
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


@pytest.mark.parametrize("name", ["version", "device", "processor", "threads"])
def test_a_table_of_another_machine_is_only_read(name: str, tmp_path: Path) -> None:
    """Its times are believed, and none of this machine are put beside them."""
    graph, other = graph_of(layer(8)), graph_of(layer(7))
    path = tmp_path / "table.json"
    (piece,) = pieces(graph, fed(graph))
    here = Table(target("cpu"), 1, path)
    stated = HEADER | here.key | {"milliseconds": {piece.digest: 123.0}}
    path.write_text(json.dumps(stated))
    assert Table(target("cpu"), 1, path).runs
    stated[name] = HEADER[name]
    path.write_text(json.dumps(stated))
    before = path.read_bytes()
    table = Table(target("cpu"), 1, path)
    assert not table.runs
    assert f"{name} {HEADER[name]!r}, here {here.key[name]!r}" == table.foreign
    assert latency.predict(graph, fed(graph), table).total == 123.0
    with pytest.raises(
        UserError, match=f"another machine .*{name}.* are not mixed; make it with `onnxprune measure"
    ):
        latency.predict(other, fed(other), table)
    with pytest.raises(UserError, match="another machine is not added to"):
        measuring.measure(Blocks(graph), {}, fed(graph), table)
    table.save()
    assert path.read_bytes() == before


def test_a_table_says_on_which_processor_it_was_made(tmp_path: Path) -> None:
    x86, arm, board = tmp_path / "x86", tmp_path / "arm", tmp_path / "board"
    x86.write_text(
        "processor\t: 0\nmodel\t\t: 17\nmodel name\t: Ryzen 9 7950X 16-Core\nflags\t\t: fpu avx\n\n" * 2
    )
    arm.write_text("processor\t: 0\nCPU implementer\t: 0x41\nCPU part\t: 0xd0b\n\n")
    board.write_text("processor\t: 0\nCPU part\t: 0xd0b\n\nHardware\t: BCM2835\nModel\t\t: Raspberry Pi 5\n")
    assert latency._cpuinfo(x86) == "Ryzen 9 7950X 16-Core"
    assert latency._cpuinfo(arm) == "0x41 0xd0b"
    assert latency._cpuinfo(board) == "Raspberry Pi 5 BCM2835 0xd0b"
    assert latency._cpuinfo(tmp_path / "none") == ""
    assert Table(target("cpu"), 1, tmp_path / "t.json").key["processor"] == latency.processor()


# Grids


def dense() -> ModelProto:
    """Layers that read one, all, and some of those before them: pieces of one to three directions."""
    graph = Graph(seed=0)
    stream = graph.relu(graph.conv(graph.input(1, 3, 32, 32), 48))
    for _ in range(2):
        stream = graph.concat(stream, graph.relu(graph.conv(graph.relu(graph.conv(stream, 64, k=1)), 32)))
        stream = graph.relu(stream)
    return graph.model(graph.gemm(graph.flatten(graph.gap(graph.conv(stream, 64))), 10))


PLACED = {name: make for name, make in SUBJECTS.items() if name != "densenet121"} | {"dense": dense}


@pytest.mark.parametrize("name", PLACED)
def test_the_place_of_a_piece_tells_whether_it_changes(name: str) -> None:
    """A piece has the original's shapes exactly where its three extents are the original's."""
    graph = graph_of(PLACED[name]())
    feeds = fed(graph)
    found = pieces(graph, feeds)
    original = {piece.heart: piece.digest for piece in found}
    known = forms(graph, found)
    rng = np.random.default_rng(len(name))
    groups = [group for group in graph.groups if not group.lossy]
    chosen = [groups[i] for i in rng.permutation(len(groups))[: max(len(groups) // 4, 1)]]
    counts = {group.var: group.size // 2 for group in chosen}
    keep = {group.var: np.arange(group.size) < counts[group.var] for group in chosen}
    cut = graph_of(surgery._Surgery(graph, keep).run())
    same = {piece.heart: piece.digest == original[piece.heart] for piece in pieces(cut, feeds)}
    assert same == {heart: form.place(counts) == form.place({}) for heart, form in known.items()}
    assert len(set(same.values())) == 2 or len(groups) < 4


grids = st.integers(1, 4).flatmap(
    lambda rows: st.integers(1, 4).flatmap(
        lambda columns: arrays(np.float64, (rows, columns), elements=st.floats(0.01, 100))
    )
)


@given(grids)
def test_monotone_values_fall_nowhere_and_stay_where_they_did_not(values: np.ndarray[Any, Any]) -> None:
    made = monotone(values)
    assert all((np.diff(made, axis=axis) >= 0).all() for axis in range(2))
    np.testing.assert_array_equal(monotone(made), made)
    assert values.min() <= made.min() <= made.max() <= values.max()


@given(grids, st.integers(0, 60), st.integers(0, 60))
def test_between_the_points_of_a_grid(values: np.ndarray[Any, Any], first: int, second: int) -> None:
    """Never outside of what was measured, and never less time for more channels."""
    inputs, outputs = (tuple(range(8, 8 * n + 1, 8)) for n in values.shape)
    grid = Grid(inputs, outputs, tuple(map(tuple, values.tolist())), (1,), (float(values[-1, -1]),))
    assert Grid.read(json.loads(json.dumps(grid.as_dict()))) == grid
    spent = grid.at((first, second, 1))
    assert min(values.min(), 0.1 * values.min()) <= spent <= values.max() * (1 + 1e-9)
    assert grid.at((first + 1, second, 1)) >= spent * (1 - 1e-9)
    assert grid.at((first, second + 1, 1)) >= spent * (1 - 1e-9)


@pytest.mark.parametrize("length", range(1, 40))
def test_points_are_spread_from_end_to_end(length: int) -> None:
    found = list(spread(length, 5))
    assert (found[0], found[-1], len(found)) == (0, length - 1, min(length, 5))
    assert np.ptp(np.diff(found)) <= 1 if length > 2 else True


def test_ratios_of_whole_models() -> None:
    whole = Whole(10, 12, ((0.5, 0.6), (0.25, 0.4), (1.2, 0.99)))
    assert [whole.ratio(told) for told in (0.0, 0.125, 0.25, 0.5, 0.75, 1.0)] == [
        0.0, 0.2, 0.4, 0.6, pytest.approx(0.8), 1.0,
    ]  # fmt: skip


def test_times_that_are_linear_in_each_extent_are_found_between_points(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a machine of which it is known how long each shape takes, at any counts."""
    proto = dense()
    graph = graph_of(proto)

    def known(self: Table, piece: Piece) -> float:
        """An offset, the products of inputs and outputs, and what is read."""
        made = sum(int(np.prod(weight.dims)) for weight in piece.proto.graph.initializer)
        return 1e-2 + 1e-6 * made + 1e-7 * sum(value.size for value in piece.feeds.values())

    monkeypatch.setattr(Table, "time", known)
    monkeypatch.setattr(timing, "SECONDS", 1e-3)  # what whole models take does not matter here
    table = Table(target("cpu"), 1, tmp_path / "t.json")
    feeds = fed(graph)
    allowed = {group.var: tuple(range(8, group.size + 1, 8)) for group in graph.groups}
    found = measuring.measure(Blocks(graph), allowed, feeds, table)
    assert found.error < 1e-9
    assert found.pieces == len(table.grids) == found.distinct == 7
    kinds = {
        (len(grid.inputs) > 1, len(grid.outputs) > 1, len(grid.rest) > 1) for grid in table.grids.values()
    }
    assert {(False, True, False), (True, True, False), (True, True, True), (True, False, False)} <= kinds
    away = Table(Absent(), 1, tmp_path / "t.json")
    shapes = forms(graph, pieces(graph, feeds))
    rng = np.random.default_rng(0)
    for _ in range(5):
        counts = {group.var: int(rng.integers(8, group.size + 1)) for group in graph.groups}
        cut = measuring._cut(Blocks(graph), counts)
        exact = latency.predict(cut, feeds, table).pieces
        told = {heart: away.grids[form.key].at(form.place(counts)) for heart, form in shapes.items()}
        assert told == pytest.approx(exact, rel=1e-6)


PLAIN: dict[str, Any] = {"criterion": "l2", "allocation": "uniform", "repair": "none", "allow_slower": True}


def chosen(result: Result) -> dict[str, Any]:
    assert result.report.candidates is not None
    (point,) = (one for one in result.report.candidates.as_dict()["points"] if one["chosen"])
    return dict(point)


def test_measured_on_the_device_and_pruned_elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "SECONDS", 0.03)
    builder = Graph(seed=0)
    value = builder.input(1, 3, 32, 32)
    for width in (48, 64, 64):
        value = builder.relu(builder.conv(value, width))
    proto = builder.model(value)
    path, table, bare = tmp_path / "model.onnx", tmp_path / "table.json", tmp_path / "bare.json"
    onnx.save(proto, path)
    told = run("measure", path, "-o", table)
    assert told.exit_code == 0, told.output
    assert "between the points of the grids times of pieces are off by" in told.output
    before = table.read_bytes()
    stated = json.loads(before)
    bare.write_text(json.dumps(stated | {"grids": {}}))  # what the path of a search there would have left
    with monkeypatch.context() as patch:
        patch.setitem(TARGETS, "cpu", Absent)
        options: dict[str, Any] = {**PLAIN, "latency": 0.6, "targets": ["cpu"], "align": 4}
        with pytest.raises(UserError, match="lacks a shape of this model, and cpu does not run here"):
            shrink(path, latency_table=bare, **options)
        with pytest.raises(UserError, match=r"does not run here .*give --latency-table"):
            shrink(path, latency_table=tmp_path / "none.json", **options)
        with pytest.raises(UserError, match="does not run here"):
            measuring.measure(Blocks(graph_of(proto)), {}, {}, Table(Absent(), 1, bare))
        result = shrink(path, latency_table=table, **options)
        same = shrink(path, latency_table=table, **options)
    assert table.read_bytes() == before
    assert result.plan == same.plan  # nothing was measured, so that nothing differs
    assert 0.55 < chosen(result)["cost"] <= 0.61
    assert any("is what" in note and "it was not measured" in note for note in result.report.notes)
    graph = graph_of(proto)
    known = Table(Absent(), 1, table).wholes[latency.digest_of(graph, comparison.inputs(graph)[0])]
    assert chosen(result)["cost"] == pytest.approx(known.ratio(chosen(result)["predicted"]))


def test_what_is_not_measured(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    onnx.save(layer(8), path)
    for arguments, why in (
        (("-o", "-"), "a table is a file"),
        (("-o", path), "the output is the input"),
        (("-o", tmp_path / "t.json", "--target", "qnn"), "it does not run here|times on qnn mean nothing"),
        (("-o", tmp_path / "t.json", "--target", "nowhere"), "choose one of"),
    ):
        refused = run("measure", path, *arguments)
        assert refused.exit_code == 2
        assert re.search(why, refused.output)
    onnx.save(idle(), path)
    assert (
        "nothing in it can be timed piece by piece" in run("measure", path, "-o", tmp_path / "t.json").output
    )
    assert not (tmp_path / "t.json").exists()


def test_shares_that_cannot_be_had(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each for its own reason, and not for one of a search that found nothing."""
    monkeypatch.setattr(timing, "SECONDS", 0.01)
    path, still = tmp_path / "model.onnx", tmp_path / "still.onnx"
    onnx.save(dense(), path)
    onnx.save(idle(), still)
    output = tmp_path / "o.onnx"
    for model, options, code, why in (
        (path, (0.01, "-o", output), 2, "cannot be reached on cpu; the least found is"),
        (path, (0.6, "-o", output, "--layers", "nowhere"), 2, "--layers nowhere: no residual block"),
        (path, (0.6, "--dry-run"), 2, "--latency makes and measures models, which --dry-run does not"),
        (still, (0.6, "-o", output), 4, "nothing is prunable"),
    ):
        check_refused(run("shrink", model, "--latency", *options), why, code=code)
    assert not output.exists()
    with pytest.raises(UserError, match="a share of the time is found by making models"):
        make_plan(path, Options(latency=0.6))


def test_a_cache_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It costs the times, not the result."""
    monkeypatch.setattr(timing, "SECONDS", 0.01)
    path, taken = tmp_path / "model.onnx", tmp_path / "a file"
    onnx.save(dense(), path)
    taken.touch()
    monkeypatch.setenv("ONNXPRUNE_CACHE", f"{taken}")
    result = shrink(path, latency=0.9, samples=16, allow_slower=True)
    assert any("the times of pieces are not kept for the next run" in note for note in result.report.notes)


def test_a_table_that_could_not_be_written_is_refused_before_anything_is_timed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Untimed(Cpu):
        def load(self, path: Path, threads: int = 1) -> Engine:
            raise AssertionError("something is timed")

    monkeypatch.setitem(TARGETS, "cpu", Untimed)
    path, taken = tmp_path / "model.onnx", tmp_path / "a file"
    onnx.save(dense(), path)
    taken.touch()
    for table in (taken / "t.json", taken / "no" / "t.json"):
        for asked in (
            lambda table=table: shrink(path, latency=0.6, latency_table=table, **PLAIN),
            lambda table=table: measure(path, table),
        ):
            with pytest.raises(
                UserError, match=r"t\.json: no table can be written there .*give another path"
            ):
                asked()
    Table(Untimed(), 1, tmp_path / "new" / "t.json")
    assert sorted(tmp_path.iterdir()) == [taken, path]  # what was tried leaves nothing behind


def test_times_of_the_whole_and_of_its_pieces_are_those_of_the_fastest_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What pieces add up to, in both commands."""
    rounds: list[tuple[float, ...]] = []

    def compared(*given: Any, **options: Any) -> timing.Timing:
        found = compare_models(*given, **options)
        rounds.append(found.engines[0].rounds)
        return found

    compare_models = timing.compare_models
    monkeypatch.setattr(timing, "compare_models", compared)
    monkeypatch.setattr(timing, "SECONDS", 0.01)
    path, table = tmp_path / "model.onnx", tmp_path / "t.json"
    onnx.save(dense(), path)
    graph = graph_of(onnx.load(path))
    measured = measure(path, table)
    whole = latency.predict(graph, comparison.inputs(graph)[0], Table(target("cpu"), 1, table)).total
    assert measured.sum == pytest.approx(whole / min(rounds[0]))
    found = shrink(path, latency=0.9, latency_table=table, **PLAIN).report.candidates
    assert found is not None
    assert found.as_dict()["sum"] == pytest.approx(whole / min(rounds[len(found.points)]))


def test_what_pieces_predict_is_reported_beside_what_was_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(timing, "SECONDS", 0.03)
    path, report, table = tmp_path / "model.onnx", tmp_path / "report.json", tmp_path / "t.json"
    onnx.save(dense(), path)
    options = [
        "--latency",
        0.6,
        "--latency-table",
        table,
        "--samples",
        16,
        "--repair",
        "none",
        "--allow-slower",
    ]
    done = run("shrink", path, *options, "--json", report)
    assert done.exit_code == 0, done.output
    found = json.loads(report.read_text())
    told = found["candidates"]
    (point,) = (one for one in told["points"] if one["chosen"])
    line = f"times of pieces predicted {point['predicted']:.3f} of the time, measured {point['cost']:.3f}"
    assert line in done.output
    assert told["measured"] is True
    assert (told["value"], told["better"], told["original"]) == ("predicted error", "lower", 0.0)
    assert all(one["predicted"] > 0 and one["value"] >= 0 for one in told["points"])
    graph = graph_of(onnx.load(path))
    feeds = comparison.inputs(graph)[0]
    known = Table(Absent(), 1, table)
    after = graph_of(onnx.load(tmp_path / "model.pruned.onnx"))
    share = latency.predict(after, feeds, known).total / latency.predict(graph, feeds, known).total
    assert point["predicted"] == pytest.approx(share)
    page = (Path(__file__).parents[1] / "docs" / "report.md").read_text(encoding="utf-8")
    assert all(f"`{key}`" in page for key in (*told, *point))


def test_a_target_that_refuses_a_piece(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Picky(Cpu):
        def load(self, path: Path, threads: int = 1) -> Engine:
            if any(node.op_type == "Concat" for node in onnx.load(path).graph.node):
                raise TargetError("no Concat here")
            return super().load(path, threads)

    monkeypatch.setitem(TARGETS, "cpu", Picky)
    with pytest.raises(
        UserError, match=r"--target cpu: it does not run the part of the model around .*: no Concat here"
    ):
        shrink(dense(), latency=0.6, latency_table=tmp_path / "t.json", **PLAIN)
