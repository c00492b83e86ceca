"""Quantised networks: pruned in their own format, scales and zero points cut along; and how they are checked."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import pytest
from onnx import ModelProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator
from onnx.reference.op_run import OpRun

from models.quantised import DOMAIN, QUANTISED
from onnxprune.dependency import DependencyGraph
from onnxprune.model import Model
from onnxprune.ops import declared
from onnxprune.ops.real import FORMS
from onnxprune.plan import Keep, Plan
from onnxprune.shapes import analyse
from onnxprune.surgery import apply, keep_masks
from onnxprune.validation.equivalence import check
from onnxprune.validation.unrounded import rounding, unrounded
from tests.reference import TOLERANCE, error, feeds, graph_of, masked, parameters, random_plan, run

Array = npt.NDArray[Any]

MEASURED = {
    "transformer_of_integers": "its scales are measured on what is there, so rounding differs",
    "convolutions_of_integers": "as transformer_of_integers",
    "mlp_fused_dynamic": "as transformer_of_integers",
    "ffn_of_4_bits_with_zeros": "its activations are rounded by blocks",
}
STATED = sorted(QUANTISED.keys() - MEASURED)
EXPOSED = ("transformer_of_integers", "convolutions_of_integers")
"""Networks of measured scales in operators that the reference evaluator knows."""


def halved(graph: DependencyGraph, seed: int = 1) -> Plan:
    """Half of the units of every group, at least one of them gone."""
    rng = np.random.default_rng(seed)
    edits = []
    for group in graph.groups:
        units = np.sort(rng.permutation(group.size)[: max(1, group.size // 2)])
        edits.append(Keep(group.name, group.size, tuple(map(int, units)), group.kind))
    return Plan(graph.model.digest(), tuple(edits))


def stored(model: ModelProto) -> dict[str, Array]:
    return {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}


# ------------------------------------------------------------------------------------- what is cut


@pytest.mark.parametrize("name", sorted(QUANTISED))
def test_weights_shrink_in_their_own_format(name: str) -> None:
    model = QUANTISED[name]()
    graph = graph_of(model)
    assert graph.groups
    assert {pinned.reason.kind for pinned in graph.pinned} <= {"interface"}
    pruned = apply(graph, halved(graph))
    onnx.checker.check_model(pruned)
    before, after = stored(model), stored(pruned)
    assert before.keys() == after.keys()
    assert all(after[key].dtype == array.dtype for key, array in before.items())
    assert [node.op_type for node in pruned.graph.node] == [node.op_type for node in model.graph.node]
    smaller = {key for key, array in before.items() if after[key].size < array.size}
    for group in graph.groups:
        assert {o.tensor for o in group.occurrences} <= smaller
    assert parameters(pruned) < 0.8 * parameters(model)


# Of one group: units kept, and by tensor the positions that stay on each axis (None: all of them).
C = [0, 2, 3, 7]  # of 11 channels
N = [1, 4, 5, 26]  # of 28 neurons
H = [4, 5, 6, 7, 12, 13, 14, 15]  # the second and the last of 5 heads of width 4, less the last
K = np.add.outer([16, 48], np.arange(16)).ravel().tolist()  # blocks 1 and 3 of 16
Z = np.add.outer([32, 96], np.arange(32)).ravel().tolist()  # pairs of blocks 1 and 3
F = np.add.outer([4, 20], np.arange(4)).ravel().tolist()  # blocks 1 and 5 of 4
W = np.add.outer(np.arange(3) * 20, np.arange(5, 15)).ravel().tolist()  # heads 1 and 2 of q, k and v
Cut = tuple[list[int] | None, ...]
EXACT: dict[str, tuple[str, list[int], dict[str, Cut]]] = {
    "residual_of_qlinear": (
        "conv_1.weight:0",
        C,
        {
            "conv_1.weight": (C, None, None, None),
            "conv_1.scale": (C,),
            "conv_1.zero": (C,),
            "conv_1.bias": (C,),
            "conv_2.weight": (None, C, None, None),
            "conv_3.weight": (C, None, None, None),
            "conv_3.scale": (C,),
            "conv_3.zero": (C,),
            "conv_3.bias": (C,),
            "gemm_1.weight": (None, C),
        },
    ),
    "mlp_of_qlinear": (
        "matmul_1.weight:1",
        N,
        {
            "matmul_1.weight": (None, N),
            "matmul_1.scale": (N,),
            "matmul_1.zero": (N,),
            "matmul_2.weight": (N, None),
        },
    ),
    "transformer_of_integers": (
        "matmulinteger_1.weight:1[0:20:4]",
        [1, 3],
        {
            f"matmulinteger_{layer}.{part}": (None, H) if part == "weight" else (H,)
            for layer in (1, 2, 3)
            for part in ("weight", "scale", "zero", "bias")
        }
        | {"matmulinteger_4.weight": (H, None)},
    ),
    "attention_of_integers": (
        "attention_1.weight:1[0:60:5]",
        [1, 2],
        {
            "attention_1.weight": (None, W),
            "attention_1.scale": (W,),
            "attention_1.zero": (W,),
            "attention_1.bias": (W,),
            "matmul_2.weight": (W[:10], None),
        },
    ),
    "ffn_of_4_bits": (
        "nbits_1.weight:0[0:80:16]",
        [1, 3],
        {
            "nbits_1.weight": (K, None, None),
            "nbits_1.scale": (np.add.outer(np.multiply(K, 2), [0, 1]).ravel().tolist(),),
            "nbits_1.bias": (K,),
            "nbits_2.weight": (None, [1, 3], None),
            "nbits_2.scale": (np.add.outer(np.arange(5) * 5, [1, 3]).ravel().tolist(),),
        },
    ),
    "ffn_of_4_bits_with_zeros": (
        "nbits_1.scale:0[0:128:32]",
        [1, 3],
        {
            "nbits_1.weight": (Z, None, None),
            "nbits_1.scale": (Z, None),
            "nbits_1.zero": (Z, None),
            "nbits_1.bias": (Z,),
            "nbits_2.weight": (None, [2, 3, 6, 7], None),
            "nbits_2.scale": (None, [2, 3, 6, 7]),
            "nbits_2.zero": (None, [1, 3]),
        },
    ),
    "blocked_weights": (
        "blocked_1.scale:1[0:28:4]",
        [1, 5],
        {
            "blocked_1.weight": (None, F),
            "blocked_1.scale": (None, F),
            "blocked_2.weight": (F, None),
            "blocked_2.scale": ([1, 5], None),
        },
    ),
    "cast_weights": (
        "layer_1.weight:0",
        N,
        {"layer_1.weight": (N, None), "layer_2.weight": (None, N)},
    ),
    "qdq_by_channel": (
        "qdq_1.weight:0",
        C,
        {
            "qdq_1.weight": (C, None, None, None),
            "qdq_1.scale": (C,),
            "qdq_1.zero": (C,),
            "qdq_1.bias": (C,),
            "qdq_1.bias_scale": (C,),
            "qdq_2.weight": (None, C, None, None),
        },
    ),
}


@pytest.mark.parametrize("name", sorted(EXACT))
def test_one_group_is_cut_where_it_lies(name: str) -> None:
    model = QUANTISED[name]()
    graph = graph_of(model)
    wanted, units, cuts = EXACT[name]
    group = next(group for group in graph.groups if group.name == wanted)
    pruned = apply(graph, Plan(model.graph.name, (Keep(wanted, group.size, tuple(units), group.kind),)))
    after = stored(pruned)
    for key, array in stored(model).items():
        if array.dtype == np.int64:  # a target shape
            continue
        expected = array
        for axis, positions in enumerate(cuts.get(key, ())):
            expected = expected if positions is None else expected.take(positions, axis=axis)
        assert after[key].dtype == expected.dtype
        np.testing.assert_array_equal(after[key], expected, err_msg=key)


def test_attributes_of_packed_weights_are_restated() -> None:
    graph = graph_of(QUANTISED["ffn_of_4_bits"]())
    pruned = apply(graph, Plan("", (Keep(graph.groups[0].name, 5, (1, 3), "exact"),)))
    layers = [node for node in pruned.graph.node if node.op_type == "MatMulNBits"]
    sizes = [{a.name: a.i for a in node.attribute} for node in layers]
    assert [(size["K"], size["N"], size["block_size"]) for size in sizes] == [(32, 32, 16), (32, 5, 16)]


# ------------------------------------------------------------------------------------ that it is right


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("name", STATED)
def test_pruned_is_the_masked_original(name: str, seed: int) -> None:
    """Integers are contracted exactly, so not one quantum may differ."""
    graph = graph_of(QUANTISED[name]())
    plan = random_plan(graph, "", seed)
    inputs = feeds(graph.model.proto, seed=seed)
    assert error(run(apply(graph, plan), inputs), run(masked(graph, plan), inputs)) < 1e-6


class DynamicQuantizeLinear(OpRun):
    """No rounding: the integers are the numbers themselves."""

    op_domain = ""

    def _run(self, x: Array) -> tuple[Array, Array, Array]:
        return x, np.array(1, np.float32), np.array(0, np.float32)


class Where(OpRun):
    """Without a check of types, so that a mask may write a float zero point."""

    op_domain = ""

    def _run(self, condition: Array, x: Array, y: Array) -> tuple[Array]:
        return (np.where(condition, x, y),)


class MatMulInteger(OpRun):
    op_domain = ""

    def _run(self, a: Array, b: Array, a_zero: Array, b_zero: Array) -> tuple[Array]:
        return ((a - a_zero) @ (b.astype(np.float32) - b_zero.astype(np.float32)),)


class ConvInteger(OpRun):
    """Of stride 1, padded to keep its size."""

    op_domain = ""

    def _run(self, x: Array, w: Array, x_zero: Array, w_zero: Array, **attributes: Any) -> tuple[Array]:
        k, group = w.shape[-1], int(attributes["group"])
        margin = (0, 0), (0, 0), (k // 2, k // 2), (k // 2, k // 2)
        windows = np.lib.stride_tricks.sliding_window_view(np.pad(x - x_zero, margin), (k, k), axis=(2, 3))
        parts = np.split(windows, group, axis=1)
        filters = np.split(w.astype(np.float32) - w_zero.astype(np.float32), group)
        results = [np.einsum("ncyxij,ocij->noyx", a, b) for a, b in zip(parts, filters, strict=True)]
        return (np.concatenate(results, axis=1),)


REAL = [DynamicQuantizeLinear, Where, MatMulInteger, ConvInteger]


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("name", EXPOSED)
def test_pruned_is_the_masked_original_but_for_rounding(name: str, seed: int) -> None:
    """Where scales are measured the range of fewer units is another; without rounding nothing is."""
    graph = graph_of(QUANTISED[name]())
    plan = random_plan(graph, "", seed)
    inputs = feeds(graph.model.proto, seed=seed)
    got, want = (
        list(ReferenceEvaluator(model, new_ops=REAL).run(None, inputs))
        for model in (apply(graph, plan), masked(graph, plan))
    )
    assert error(got, want) < TOLERANCE


@pytest.mark.parametrize("name", sorted(MEASURED))
def test_rounding_differs_by_little(name: str) -> None:
    graph = graph_of(QUANTISED[name]())
    plan = halved(graph)
    inputs = feeds(graph.model.proto)
    assert error(run(apply(graph, plan), inputs), run(masked(graph, plan), inputs)) < 0.03


# ------------------------------------------------------------------------------------------ the check


@pytest.mark.parametrize("name", sorted(QUANTISED))
def test_the_check_passes(name: str) -> None:
    graph = graph_of(QUANTISED[name]())
    plan = halved(graph)
    proof = check(graph, keep_masks(graph, plan), apply(graph, plan))
    assert proof.passed
    operators = rounding(graph.model.proto)
    assert bool(operators) == any("rounding" in note for note in proof.notes)
    assert bool(operators) == (name not in ("ffn_of_4_bits", "blocked_weights", "cast_weights"))


MISTAKES = [
    ("residual_of_qlinear", "conv_2.scale"),
    ("residual_of_qlinear", "conv_1.weight"),
    ("residual_of_qlinear", "gemm_1.weight"),
    ("branches_of_qlinear", "conv_2.weight"),
    ("mlp_of_qlinear", "matmul_1.zero"),
    ("mlp_of_qlinear", "matmul_2.weight"),
    ("transformer_of_integers", "matmulinteger_4.weight"),
    ("transformer_of_integers", "matmulinteger_3.scale"),
    ("convolutions_of_integers", "convinteger_1.scale"),
    ("mlp_fused_dynamic", "fused_1.scale"),
    ("attention_of_integers", "attention_1.scale"),
    ("ffn_of_4_bits_with_zeros", "nbits_1.zero"),
    ("blocked_weights", "blocked_2.scale"),
    ("qdq_by_channel", "qdq_2.scale"),
]


@pytest.mark.parametrize(("name", "tensor"), MISTAKES)
def test_the_check_finds_what_is_cut_by_the_wrong_units(name: str, tensor: str) -> None:
    graph = graph_of(QUANTISED[name]())
    plan = halved(graph)
    pruned = apply(graph, plan)
    wrong = next(t for t in pruned.graph.initializer if t.name == tensor)
    array = numpy_helper.to_array(wrong)
    axis = int(
        np.argmax([n != m for n, m in zip(array.shape, stored(graph.model.proto)[tensor].shape, strict=True)])
    )
    wrong.CopyFrom(numpy_helper.from_array(np.roll(array, 1, axis).copy(), tensor))
    assert not check(graph, keep_masks(graph, plan), pruned).passed


@pytest.mark.parametrize("name", ["mlp_of_qlinear", "residual_of_qlinear", "attention_of_integers"])
def test_a_removed_unit_is_its_zero_point(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Zeros in its place would count."""
    graph = graph_of(QUANTISED[name]())
    for link in graph.links:
        monkeypatch.setattr(link, "rule", replace(link.rule, zero={}))
    plan = halved(graph)
    assert not check(graph, keep_masks(graph, plan), apply(graph, plan)).passed


# --------------------------------------------------------------------------- without rounding


SAMPLES = [
    pytest.param(spec.domain, spec.name, number, id=f"{spec.name}-{spec.domain or 'onnx'}-{number}")
    for spec in declared()
    if (spec.domain, spec.name) in FORMS
    for number in range(len(spec.samples))
]


@pytest.mark.parametrize(("domain", "name", "number"), SAMPLES)
def test_forms_in_real_numbers_round_to_the_operator(domain: str, name: str, number: int) -> None:
    spec = next(spec for spec in declared() if (spec.domain, spec.name) == (domain, name))
    sample = spec.samples[number]
    rng = np.random.default_rng(0)
    operands = [
        rng.uniform(-1, 1, given).astype(np.float32) if isinstance(given, tuple) else given
        for given in sample.inputs
    ]
    first = next(i for i, value in enumerate(operands) if value is not None and value.ndim)
    names = [f"i{i}" if value is not None else "" for i, value in enumerate(operands)]
    node = helper.make_node(name, names, ["made"], domain=domain, **sample.attributes)
    kept = helper.make_node("Abs", ["made"], ["y"])  # it reads what is rounded
    fed = operands[first]
    assert fed is not None
    model = helper.make_model(
        helper.make_graph(
            [node, kept],
            name,
            [
                helper.make_tensor_value_info(
                    names[first], helper.np_dtype_to_tensor_dtype(fed.dtype), fed.shape
                )
            ],
            [onnx.ValueInfoProto(name="y")],
            [
                numpy_helper.from_array(value, key)
                for i, (key, value) in enumerate(zip(names, operands, strict=True))
                if value is not None and i != first
            ],
        ),
        opset_imports=[helper.make_opsetid("", sample.opset), helper.make_opsetid(DOMAIN, 1)],
        ir_version=8,
    )
    (want,) = run(model, {names[first]: fed})
    model.graph.output[0].CopyFrom(
        helper.make_tensor_value_info("y", helper.np_dtype_to_tensor_dtype(want.dtype), want.shape)
    )
    form = unrounded(model, analyse(Model(model)))
    assert name not in {node.op_type for node in form.graph.node}
    (got,) = run(form, {names[first]: fed})
    assert got.dtype == want.dtype
    apart = np.abs(got.astype(np.float64) - want).max()
    quantum = 1.0 if want.dtype.kind in "iu" else 0.02 * float(np.abs(want).max())
    assert apart <= (0 if want.dtype == np.int32 else quantum)
    assert len(np.unique(want)) > 3


def test_a_graph_of_integers_alone_is_compared() -> None:
    """Bytes in, bytes out: what is compared are the floats that the output would be rounded from."""
    model = QUANTISED["mlp_of_qlinear"]()
    graph = model.graph
    inside = [node for node in graph.node if node.op_type == "QLinearMatMul"]
    first, last = inside[0].input[0], inside[-1].output[0]
    del graph.node[:], graph.input[:], graph.output[:], graph.value_info[:]
    graph.node.extend(inside)
    graph.input.append(helper.make_tensor_value_info(first, onnx.TensorProto.UINT8, ["batch", 6, 20]))
    graph.output.append(helper.make_tensor_value_info(last, onnx.TensorProto.UINT8, ["batch", 6, 5]))
    typed = graph_of(model)
    plan = halved(typed)
    pruned = apply(typed, plan)
    assert check(typed, keep_masks(typed, plan), pruned).passed
    weight = next(t for t in pruned.graph.initializer if t.name == "matmul_3.weight")
    weight.CopyFrom(numpy_helper.from_array(np.roll(numpy_helper.to_array(weight), 1, 0), weight.name))
    assert not check(typed, keep_masks(typed, plan), pruned).passed


def test_rounding_stays_where_an_operator_has_no_form() -> None:
    """BitShift takes integers: they are rounded for it, and what it makes is counted again."""
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "s", "z"], ["q"]),
        helper.make_node("BitShift", ["q", "one"], ["half"], direction="RIGHT"),
        helper.make_node("DequantizeLinear", ["half", "s", "z"], ["y"]),
    ]
    graph = helper.make_graph(
        nodes,
        "shift",
        [helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, [2, 6])],
        [helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, [2, 6])],
        [
            numpy_helper.from_array(np.array(0.1, np.float32), "s"),
            numpy_helper.from_array(np.array(7, np.uint8), "z"),
            numpy_helper.from_array(np.array(1, np.uint8), "one"),
        ],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    inputs = {"x": np.linspace(-0.63, 4.1, 12, dtype=np.float32).reshape(2, 6)}
    form = unrounded(model, analyse(Model(model)))
    np.testing.assert_allclose(run(form, inputs)[0], run(model, inputs)[0], atol=1e-6)
