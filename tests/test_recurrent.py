"""Recurrent networks: what is cut, where the state is pinned, and what is left of the recurrence."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnx.compose
import pytest
from onnx import ModelProto, numpy_helper
from onnx.reference import ReferenceEvaluator
from onnx.reference.op_run import OpRun

from models.recurrent import BATCH_FIRST, GATES, RECURRENT
from onnxprune import criteria
from onnxprune.blocks import Blocks
from onnxprune.cost import CostModel
from onnxprune.criteria import Evidence
from onnxprune.dependency import DependencyGraph
from onnxprune.plan import Keep, Plan
from onnxprune.readers import Readers
from onnxprune.surgery import apply, keep_masks
from onnxprune.validation.equivalence import check
from tests.reference import TOLERANCE, error, graph_of, masked, parameters, random_plan, run

Array = npt.NDArray[Any]

ALL = RECURRENT | BATCH_FIRST
RUNNABLE = sorted(RECURRENT)
QUANTIZED = "lstm_quantized"  # rounds its states by the range of all units: exact up to that rounding only
REAL = [name for name in RUNNABLE if name != QUANTIZED]

# States that the graph's own inputs pin, and what else is pinned inside.
PINNED_STATES = {"state_is_interface": "graph input 'h'", "states_stacked": "graph input 'states'"}
NORMALISED = {"crnn": "softmax"}


def inputs_of(model: ModelProto, batch: int = 3, steps: int = 6, seed: int = 0) -> dict[str, Array]:
    rng = np.random.default_rng(seed)
    sizes = {"batch": batch, "steps": steps}
    feeds: dict[str, Array] = {}
    for value in model.graph.input:
        dims = value.type.tensor_type.shape.dim
        shape = [d.dim_value or sizes[d.dim_param] for d in dims]
        whole = value.type.tensor_type.elem_type == onnx.TensorProto.INT64
        feeds[value.name] = rng.integers(0, steps + 2, shape) if whole else _normal(rng, shape)
    return feeds


def _normal(rng: np.random.Generator, shape: list[int]) -> Array:
    return rng.standard_normal(shape, dtype=np.float32)


def uniform(graph: DependencyGraph, ratio: float) -> Plan:
    """Every group less a share of its units, spread over all of it."""
    edits: list[Keep] = []
    for group in graph.groups:
        count = max(1, round(group.size * (1 - ratio)))
        order = np.random.default_rng(group.size).permutation(group.size)
        edits.append(Keep(group.name, group.size, tuple(sorted(order[:count].tolist())), group.kind))
    return Plan(graph.model.digest(), tuple(edits))


def assert_right(graph: DependencyGraph, plan: Plan, pruned: ModelProto) -> None:
    reference = masked(graph, plan)
    for batch, steps in ((3, 6), (2, 9)):
        feeds = inputs_of(graph.model.proto, batch, steps)
        assert error(run(pruned, feeds), run(reference, feeds)) < TOLERANCE


# ------------------------------------------------------------------------------------------- the law


@pytest.mark.parametrize("ratio", [0.3, 0.5, 0.8])
@pytest.mark.parametrize("name", REAL)
def test_network_shrinks_and_equals_the_masked_original(name: str, ratio: float) -> None:
    proto = RECURRENT[name]()
    graph = graph_of(proto)
    plan = uniform(graph, ratio)
    pruned = apply(graph, plan)
    onnx.checker.check_model(pruned, full_check=True)
    assert_right(graph, plan, pruned)
    assert parameters(pruned) < parameters(proto)


@pytest.mark.parametrize("name", sorted(ALL))
def test_own_check_agrees(name: str) -> None:
    graph = graph_of(ALL[name]())
    for seed in range(3):
        plan = random_plan(graph, "", seed)
        pruned = apply(graph, plan)
        onnx.checker.check_model(pruned, full_check=True)
        result = check(graph, keep_masks(graph, plan), pruned)
        assert result.passed
        assert bool(result.notes) == (name in BATCH_FIRST or name == QUANTIZED)


@pytest.mark.parametrize("opset", [7, 12, 13, 14, 21, 22, 24])
@pytest.mark.parametrize("name", ["lstm_peepholes", "gru_linear_before_reset", "rnn", "bidirectional_ends"])
def test_every_operator_set(name: str, opset: int) -> None:
    graph = graph_of(RECURRENT[name](opset))
    plan = uniform(graph, 0.5)
    pruned = apply(graph, plan)
    onnx.checker.check_model(pruned, full_check=True)
    assert not graph.opaque
    assert_right(graph, plan, pruned)


def test_quantized_states_differ_by_their_rounding_only() -> None:
    graph = graph_of(RECURRENT[QUANTIZED]())
    plan = uniform(graph, 0.3)
    feeds = inputs_of(graph.model.proto)
    reference = masked_at_zero_points(graph, plan)
    assert 0 < error(run(apply(graph, plan), feeds), run(reference, feeds)) < 0.03


def masked_at_zero_points(graph: DependencyGraph, plan: Plan) -> ModelProto:
    """The original with zeros, which are the zero points here, in the recurrence of removed units."""
    kept = {e.size: e.units for e in plan.edits if isinstance(e, Keep)}
    proto = onnx.ModelProto()
    proto.CopyFrom(graph.model.proto)
    for tensor in proto.graph.initializer:
        units = {"recurrence": kept[6], "weight": kept[9], "matmul_2.weight": kept[6]}.get(tensor.name)
        if units is not None:
            array = numpy_helper.to_array(tensor).copy()
            axis = array.ndim - 2
            gone = np.setdiff1d(np.arange(array.shape[axis]), units)
            np.moveaxis(array, axis, 0)[gone] = 0
            tensor.CopyFrom(numpy_helper.from_array(array, tensor.name))
    return proto


def test_gates_in_another_order_are_found_wrong() -> None:
    graph = graph_of(RECURRENT["lstm"]())
    plan = uniform(graph, 0.5)
    pruned = apply(graph, plan)
    weight = next(t for t in pruned.graph.initializer if t.name == "lstm_1.recurrence")
    array = numpy_helper.to_array(weight)
    weight.CopyFrom(numpy_helper.from_array(np.roll(array, array.shape[2], axis=1), weight.name))
    assert not check(graph, keep_masks(graph, plan), pruned).passed


@pytest.mark.parametrize("name", ["bidirectional_ends", "encoder_decoder", "rnn"])
def test_outputs_may_be_left_out(name: str) -> None:
    proto = RECURRENT[name]()
    read = {i for node in proto.graph.node for i in node.input}
    for node in proto.graph.node:
        if node.op_type in GATES:
            node.output[:] = [output if output in read else "" for output in node.output]
    graph = graph_of(proto)
    plan = uniform(graph, 0.5)
    assert_right(graph, plan, apply(graph, plan))


def test_own_check_tells_layers_without_their_first_output_apart() -> None:
    """Two that are written in another form for it, between tensors with names of their own."""
    sides = [onnx.compose.add_prefix(ALL["gru_layout"](), f"{side}.") for side in ("left", "right")]
    proto = onnx.compose.merge_models(*sides, io_map=[])
    read = {i for node in proto.graph.node for i in node.input}
    for node in proto.graph.node:
        if len(node.output) > 1:
            node.output[:] = [output if output in read else "" for output in node.output]
    assert sum(node.output[0] == "" for node in proto.graph.node) == 2
    graph = graph_of(proto)
    plan = uniform(graph, 0.4)
    assert check(graph, keep_masks(graph, plan), apply(graph, plan)).passed


# ------------------------------------------------------------------------------------- what is cut


@pytest.mark.parametrize("name", sorted(ALL))
def test_only_states_at_the_interface_are_pinned(name: str) -> None:
    graph = graph_of(ALL[name]())
    inner = {pinned.reason.text for pinned in graph.pinned if pinned.reason.kind != "interface"}
    assert bool(inner) == (name in NORMALISED)
    assert all(NORMALISED[name] in text for text in inner)
    assert all(group.kind == "exact" for group in graph.groups)
    states = {str(pinned.reason) for pinned in graph.pinned if pinned.node.op in GATES and pinned.axis == 1}
    assert states == ({PINNED_STATES[name]} if name in PINNED_STATES else set())


def test_all_gates_of_a_unit_go_and_the_others_keep_their_order() -> None:
    graph = graph_of(RECURRENT["bidirectional_stacked"]())
    group = next(g for g in graph.groups if g.size == 8)
    keep = (1, 2, 5)
    pruned = apply(graph, Plan("", (Keep(group.name, 8, keep, "exact"),)))
    before, after = (
        {t.name: numpy_helper.to_array(t) for t in m.graph.initializer} for m in (graph.model.proto, pruned)
    )

    def gates(part: str) -> Array:
        array = before[f"lstm_3.{part}"]
        return array.reshape(2, -1, 8, *array.shape[2:])[:, :, keep]

    assert np.array_equal(after["lstm_3.weight"], gates("weight").reshape(2, 12, 12))
    assert np.array_equal(after["lstm_3.recurrence"], gates("recurrence").reshape(2, 12, 8)[..., keep])
    assert np.array_equal(after["lstm_3.bias"], gates("bias").reshape(2, 24))
    head = before["gemm_1.weight"].reshape(5, 2, 8)[..., keep]
    assert np.array_equal(after["gemm_1.weight"], head.reshape(5, 6))
    sizes = [a.i for n in pruned.graph.node for a in n.attribute if a.name == "hidden_size"]
    assert sizes == [6, 3]


@pytest.mark.parametrize("name", sorted(ALL))
def test_a_state_that_comes_in_makes_no_attention(name: str) -> None:
    graph = graph_of(ALL[name]())
    blocks = Blocks(graph)
    assert {blocks.role(group) for group in graph.groups} <= {"channels", "ffn", "hidden"}
    assert not blocks.cached


def test_a_peephole_goes_with_its_unit() -> None:
    graph = graph_of(RECURRENT["lstm_peepholes"]())
    pruned = apply(graph, uniform(graph, 0.5))
    shapes = {t.name: tuple(t.dims) for t in pruned.graph.initializer}
    assert shapes["lstm_1.peepholes"] == (1, 9)
    assert shapes["lstm_1.bias"] == (1, 24)
    assert shapes["lstm_1.recurrence"] == (1, 12, 3)


@pytest.mark.parametrize("part", ["weight", "recurrence", "columns"])
def test_every_weight_of_a_unit_counts_in_its_score(part: str) -> None:
    proto = RECURRENT["lstm"]()
    small = 4
    for tensor in proto.graph.initializer:
        array = numpy_helper.to_array(tensor).copy()
        if tensor.name == f"lstm_1.{part}":
            array.reshape(4, 6, -1)[:, small] *= 1e-3
        elif part == "columns" and tensor.name == "lstm_1.recurrence":
            array[..., small] *= 1e-3
        else:
            array = np.ones_like(array) if tensor.name.startswith(("lstm_1", "matmul_2")) else array
        tensor.CopyFrom(numpy_helper.from_array(array, tensor.name))
    graph = graph_of(proto)
    group = next(g for g in graph.groups if g.size == 6)
    scores = criteria.score(Evidence(graph, Readers(graph)), [group], "l2")[group]
    assert int(np.argmin(scores)) == small


# -------------------------------------------------------------------------------------------- cost


@pytest.mark.parametrize("name", ["lstm", "gru", "rnn", "bidirectional_ends", "encoder_decoder"])
def test_multiplications_of_the_input_and_of_the_recurrence_are_counted(name: str) -> None:
    graph = graph_of(RECURRENT[name]())
    plan = uniform(graph, 0.5)
    pruned = apply(graph, plan)
    groups = {group.name: group for group in graph.groups}
    model = CostModel(graph)
    sizes = graph.shapes.sizes
    for cost, proto in (
        (model(), graph.model.proto),
        (model({groups[e.group].var: len(e.units) for e in plan.edits if isinstance(e, Keep)}), pruned),
    ):
        assert cost.params == parameters(proto)
        weights = {t.name: math.prod(t.dims) for t in proto.graph.initializer}
        total = 0
        for node in proto.graph.node:
            rows = {"MatMul": [1], "Gemm": [1]}.get(node.op_type, [1, 2])
            if node.op_type in ("MatMul", "Gemm", "LSTM", "GRU", "RNN"):
                steps = 1 if node.op_type == "Gemm" else sizes["steps"]
                total += steps * sizes["batch"] * sum(weights[node.input[i]] for i in rows)
        assert cost.macs == total // sizes["steps"]  # the first axis of the first input counts as one


# ------------------------------------------------------------------- the recurrence, by the formulas


ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "Sigmoid": lambda x: 1 / (1 + np.exp(-x)),
    "Tanh": np.tanh,
    "Relu": lambda x: np.maximum(x, 0),
    "HardSigmoid": lambda x: np.clip(0.2 * x + 0.5, 0, 1),
    "Softsign": lambda x: x / (1 + np.abs(x)),
}
DEFAULTS = {"LSTM": ["Sigmoid", "Tanh", "Tanh"], "GRU": ["Sigmoid", "Tanh"], "RNN": ["Tanh"]}


Step = Callable[..., tuple[Array, Array]]


class _Recurrent(OpRun):
    op_domain = ""
    step: Step

    def _run(self, x: Array, w: Array, r: Array, *rest: Array | None, **attributes: Any) -> tuple[Array, ...]:
        op = type(self).__name__
        given: list[Array | None] = [*rest, *[None] * (5 - len(rest))]
        b, lengths, h, c, p = given
        count, hidden = r.shape[0], r.shape[2]
        first = bool(attributes.get("layout"))
        x = x.swapaxes(0, 1) if first else x
        steps, batch = x.shape[:2]
        zeros = np.zeros((count, batch, hidden), np.float32)
        h, c = (zeros if s is None else s.swapaxes(0, 1) if first else s for s in (h, c))
        b = np.zeros((count, 2 * r.shape[1]), np.float32) if b is None else b
        p = np.zeros((count, 3 * hidden), np.float32) if p is None else p
        ends = np.full(batch, steps) if lengths is None else lengths
        names = attributes.get("activations") or DEFAULTS[op] * count
        y = np.zeros((steps, count, batch, hidden), np.float32)
        last = [h.copy(), c.copy()]
        for d in range(count):
            functions = [ACTIVATIONS[n] for n in names[d * len(DEFAULTS[op]) :]]
            backwards = d == 1 or attributes.get("direction") == "reverse"
            for n in range(batch):
                state, cell = h[d, n], c[d, n]
                order = range(ends[n])
                for t in reversed(order) if backwards else order:
                    state, cell = self.step(
                        x[t, n], state, cell, w[d], r[d], b[d], p[d], functions, attributes
                    )
                    y[t, d, n] = state
                last[0][d, n], last[1][d, n] = state, cell
        if first:
            y, last = y.transpose(2, 0, 1, 3), [end.swapaxes(0, 1) for end in last]
        return (y, *last[: len(self.onnx_node.output) - 1])


def clipped(gate: Array, attributes: dict[str, Any]) -> Array:
    bound = attributes.get("clip") or np.inf
    return np.clip(gate, -bound, bound)


class LSTM(_Recurrent):
    @staticmethod
    def step(
        x: Array, h: Array, c: Array, w: Array, r: Array, b: Array, p: Array, f: Any, a: Any
    ) -> tuple[Array, Array]:
        half = len(b) // 2
        gates = np.split(w @ x + r @ h + b[:half] + b[half:], 4)
        i, o, forget, new = gates
        pi, po, pf = np.split(p, 3)
        i = f[0](clipped(i + pi * c, a))
        forget = 1 - i if a.get("input_forget") else f[0](clipped(forget + pf * c, a))
        c = forget * c + i * f[1](clipped(new, a))
        return f[0](clipped(o + po * c, a)) * f[2](clipped(c, a)), c


class GRU(_Recurrent):
    @staticmethod
    def step(
        x: Array, h: Array, c: Array, w: Array, r: Array, b: Array, p: Array, f: Any, a: Any
    ) -> tuple[Array, Array]:
        (wz, wr, wh), (rz, rr, rh) = np.split(w, 3), np.split(r, 3)
        bz, br, bh, cz, cr, ch = np.split(b, 6)
        z = f[0](wz @ x + rz @ h + bz + cz)
        reset = f[0](wr @ x + rr @ h + br + cr)
        inner = reset * (rh @ h + ch) if a.get("linear_before_reset") else rh @ (reset * h) + ch
        return (1 - z) * f[1](wh @ x + inner + bh) + z * h, c


class RNN(_Recurrent):
    @staticmethod
    def step(
        x: Array, h: Array, c: Array, w: Array, r: Array, b: Array, p: Array, f: Any, a: Any
    ) -> tuple[Array, Array]:
        half = len(b) // 2
        return f[0](w @ x + r @ h + b[:half] + b[half:]), c


def by_formula(model: ModelProto, feeds: dict[str, Array]) -> list[Array]:
    results = ReferenceEvaluator(model, new_ops=[LSTM, GRU, RNN]).run(None, feeds)
    return [np.asarray(value) for value in results]


@pytest.mark.parametrize("name", sorted(set(ALL) - {QUANTIZED, "crnn"}))
def test_pruned_network_equals_the_masked_formulas(name: str) -> None:
    graph = graph_of(ALL[name]())
    plan = uniform(graph, 0.4)
    pruned = apply(graph, plan)
    feeds = inputs_of(graph.model.proto, 2, 4)
    want = by_formula(masked(graph, plan), feeds)
    assert error(by_formula(pruned, feeds), want) < TOLERANCE
    if name in RECURRENT:
        assert error(run(pruned, feeds), want) < TOLERANCE
