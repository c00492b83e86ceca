"""Folding: the closed form against onnxruntime, and what must not be folded."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import ModelProto, TensorProto, helper, numpy_helper, parser

from models.architectures import ARCHITECTURES
from models.builder import Graph, Storage, Tensor
from models.topologies import TOPOLOGIES
from onnxprune import rewrite
from onnxprune.errors import UserError
from onnxprune.model import Model, load, save
from onnxprune.passes import fold as folding
from onnxprune.plan import Edit, Rewire, SetWeight
from tests.reference import Array, error, feeds, run, stored_tensors

TOLERANCE = 1e-5


def ops(proto: ModelProto) -> dict[str, int]:
    return dict(Counter(node.op_type for node in proto.graph.node if node.op_type != "Constant"))


def arrays(proto: ModelProto) -> dict[str, Array]:
    return {name: numpy_helper.to_array(tensor) for name, tensor in stored_tensors(proto).items()}


def serialized(proto: ModelProto) -> bytes:
    return proto.SerializeToString(deterministic=True)


def folded(proto: ModelProto) -> ModelProto:
    """The folded model, after the laws that hold for every model were checked."""
    before = serialized(proto)
    result, edits = folding.fold(Model(proto))
    assert serialized(proto) == before
    assert folding.plan(Model(result)) == []
    assert serialized(folding.fold(Model(result))[0]) == serialized(result)
    assert serialized(rewrite.apply(Model(proto), edits)) == serialized(result)
    assert [v.name for v in result.graph.output] == [v.name for v in proto.graph.output]
    onnx.checker.check_model(result, full_check=True)
    return result


def showing(proto: ModelProto, names: set[str]) -> ModelProto:
    """The model with these tensors among its outputs."""
    copy = ModelProto()
    copy.CopyFrom(proto)
    known = {output.name for output in proto.graph.output}
    copy.graph.output.extend(onnx.ValueInfoProto(name=name) for name in sorted(names - known))
    return copy


def equal_fold(proto: ModelProto, tolerance: float = TOLERANCE) -> ModelProto:
    """The folded model, which computes the same under every name that it kept."""
    result = folded(proto)
    made = [
        {o for n in p.graph.node if n.op_type != "Constant" for o in n.output if o} for p in (proto, result)
    ]
    before, after = (showing(p, made[0] & made[1]) for p in (proto, result))
    for batch in (2, 3):
        inputs = feeds(proto, batch)
        assert error(run(after, inputs), run(before, inputs)) <= tolerance
    return result


def untouched(proto: ModelProto) -> None:
    assert serialized(folded(proto)) == serialized(proto)


def text(
    body: str, inputs: str = "float[2,3] x", outputs: str = "float[2,3] y", head: str = ""
) -> ModelProto:
    """A model in ONNX's own notation; `head` holds initializers or value_info."""
    stored = f"<{head}>" if head else ""
    return parser.parse_model(
        f'<ir_version: 8, opset_import: ["": 17]> g ({inputs}) => ({outputs}) {stored} {{ {body} }}'
    )


# --------------------------------------------------------------------------- closed form, brute force


def slice_of(weight: Array, kind: str, group: int, channel: int) -> Array:
    """The part of a kernel that makes one output channel, found without index notation."""
    if kind == "conv":
        return weight[channel]
    rows, columns = weight.shape[0] // group, weight.shape[1]
    part = channel // columns
    return weight[part * rows : (part + 1) * rows, channel % columns]


@pytest.mark.parametrize("storage", ["initializer", "constant", "input"])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("group", [1, 2, 6])
@pytest.mark.parametrize("kind", ["conv", "conv_transpose"])
def test_convolutions(kind: str, group: int, bias: bool, storage: Storage) -> None:
    g = Graph(opset=8 if storage == "input" else 17, ir=3 if storage == "input" else 8, storage=storage)
    x = g.input("batch", 6, 5, 4)
    y = getattr(g, kind)(x, 12, group=group, bias=bias)
    proto = g.model(g.relu(g.bn(y)))
    result = equal_fold(proto)
    assert ops(result) == {("Conv" if kind == "conv" else "ConvTranspose"): 1, "Relu": 1}
    name = next(name for name in arrays(proto) if name.endswith(".weight"))
    old, new = arrays(proto), arrays(result)
    gain = old["bn_1.scale"].astype(np.float64) / np.sqrt(old["bn_1.var"] + 1e-5)
    for channel in range(12):
        want = slice_of(old[name], kind, group, channel) * gain[channel]
        np.testing.assert_allclose(slice_of(new[name], kind, group, channel), want, rtol=1e-6)
    start = old[name.replace("weight", "bias")] if bias else 0
    want = (start - old["bn_1.mean"]) * gain + old["bn_1.bias"]
    np.testing.assert_allclose(new[name.replace("weight", "bias")], want, rtol=1e-5, atol=1e-6)
    assert len(new) == 2
    if storage == "input":
        assert {v.name for v in result.graph.input} == {"input", *new}


@pytest.mark.parametrize("rank", [1, 3])
def test_other_ranks(rank: int) -> None:
    g = Graph()
    x = g.input("batch", 4, *[5] * rank)
    result = equal_fold(g.model(g.bn(g.conv(g.relu(g.bn(g.conv_transpose(x, 6, group=2))), 8, bias=False))))
    assert ops(result) == {"ConvTranspose": 1, "Relu": 1, "Conv": 1}


@pytest.mark.parametrize("factors", [(1.0, 1.0), (0.5, 3.0), (2.0, 0.0)], ids=str)
@pytest.mark.parametrize("shape", [None, (), (1,), (7,), (1, 7), (2, 7), (1, 1)], ids=str)
@pytest.mark.parametrize("trans_b", [True, False])
def test_gemm(trans_b: bool, shape: tuple[int, ...] | None, factors: tuple[float, float]) -> None:
    g = Graph()
    x = g.input(2, 5)
    bias = False if shape is None else g.store("b", np.asarray(g.normal(*shape), np.float32).reshape(shape))
    alpha, beta = factors
    y = g.gemm(x, 7, bias=bias, trans_b=trans_b, alpha=alpha, beta=beta)
    proto = g.model(g.bn(y))
    result = folded(proto)
    inputs = feeds(proto)
    assert error(run(result, inputs), run(proto, inputs)) <= TOLERANCE
    assert ops(result) == {"Gemm": 1}
    new = arrays(result)
    assert new.keys() == {"gemm_1.weight", "gemm_1.bias" if shape is None else "b"}
    assert min(value.size for value in new.values()) == (14 if shape == (2, 7) else 7)


def test_gemm_whose_bias_would_grow() -> None:
    g = Graph()
    y = g.gemm(g.input(2, 5), 7, bias=g.store("b", g.normal(2, 1)))
    untouched(g.model(g.bn(y)))


def test_gemm_with_a_bias_that_is_computed() -> None:
    g = Graph()
    x = g.input(2, 5)
    untouched(g.model(g.bn(g.gemm(x, 7, bias=g.reduce("ReduceMean", x, 1)))))


@pytest.mark.parametrize("storage", ["initializer", "constant"])
def test_matmul(storage: Storage) -> None:
    """No operand for a bias: what shifts stays behind as one Add."""
    g = Graph(storage=storage)
    x = g.input("batch", 5)
    plain, biased = g.bn(g.matmul(x, 7)), g.bn(g.matmul(x, 7, bias=True))
    result = equal_fold(g.model(plain, biased, g.matmul(x, 7, bias=True)))
    assert ops(result) == {"MatMul": 3, "Add": 3}
    assert {"matmul_1.bias", "matmul_2.bias", "matmul_3.bias"} <= arrays(result).keys()


def test_matmul_and_a_scale() -> None:
    g = Graph()
    x = g.input("batch", 4, 5)
    y = g.mul(g.matmul(x, 6), g.const(0.125, np.float32))
    z = g.op("Div", g.const(3.0, np.float32), g.op("Sub", g.matmul(x, 6), g.const([0.5] * 6, np.float32)))
    assert ops(equal_fold(g.model(y, z))) == {"MatMul": 2, "Sub": 1, "Div": 1}


def test_matmul_with_a_matrix_per_head() -> None:
    g = Graph()
    x = g.input("batch", 3, 4, 5)
    y = g.op("MatMul", x, g.store("w", g.normal(3, 5, 6)))
    y = g.mul(y, g.store("per_head", g.normal(3, 1, 1)))
    y = g.mul(y, g.store("per_column", g.normal(6)))
    y = g.mul(y, g.store("both", g.normal(3, 1, 6)))
    result = equal_fold(g.model(y))
    assert ops(result) == {"MatMul": 1}
    assert arrays(result)["w"].shape == (3, 5, 6)


def test_batch_norm_over_another_axis_than_the_weight_makes() -> None:
    g = Graph()
    untouched(g.model(g.bn(g.matmul(g.input("batch", 4, 5), 6))))


@pytest.mark.parametrize("shape", [(), (1,), (8, 1, 1), (1, 8, 1, 1), (1, 1, 1, 1)], ids=str)
@pytest.mark.parametrize("bias", [True, False])
def test_elementwise_chain(shape: tuple[int, ...], bias: bool) -> None:
    """x * a, b + x, x / c, d - x by constants, as a batch normalisation is written by some exporters."""
    g = Graph()
    x = g.conv(g.input("batch", 4, 5, 5), 8, group=2, bias=bias)
    a, b, c, d = (g.store(name, g.uniform(0.5, 2, *shape).reshape(shape)) for name in "abcd")
    y = g.op("Sub", d, g.op("Div", g.add(b, g.mul(x, a)), c))
    assert ops(equal_fold(g.model(g.op("Sub", y, a)))) == {"Conv": 1}


@pytest.mark.parametrize(
    ("op", "shape"),
    [("Mul", (5,)), ("Mul", (5, 1)), ("Add", (8, 5, 5)), ("Mul", (1, 1, 8, 1, 1)), ("Add", (2, 1, 1, 1))],
)
def test_constants_that_are_not_per_channel(op: str, shape: tuple[int, ...]) -> None:
    g = Graph()
    untouched(g.model(g.op(op, g.conv(g.input(2, 4, 5, 5), 8), g.store("v", g.normal(*shape)))))


def test_a_constant_that_widens_the_output() -> None:
    g = Graph()
    untouched(g.model(g.mul(g.conv(g.input(2, 4, 5, 5), 1), g.store("v", g.normal(8, 1, 1)))))


def test_division_by_the_output() -> None:
    g = Graph()
    x = g.conv(g.input(2, 4, 5, 5), 8)
    untouched(g.model(g.op("Div", g.store("v", g.normal(8, 1, 1)), x)))


def test_division_by_zero() -> None:
    g = Graph()
    untouched(g.model(g.op("Div", g.conv(g.input(2, 4, 5, 5), 8), g.const([0.0], np.float32))))


def norm_then_affine(g: Graph, x: Tensor, op: str, width: int, **attributes: Any) -> Tensor:
    operands = [g.store(f"{op}.{name}", g.normal(width)) for name in ("gain", "shift")]
    y = g.op(op, x, *operands, **attributes)
    shape = (width,) if op == "LayerNormalization" else (width, 1, 1)
    return g.add(g.mul(y, g.store(f"{op}.a", g.normal(*shape))), g.store(f"{op}.b", g.normal(*shape)))


def test_behind_normalisations() -> None:
    g = Graph(opset=21, ir=10)
    x = g.input("batch", 8, 5, 6)
    results = [
        norm_then_affine(g, x, "InstanceNormalization", 8),
        norm_then_affine(g, x, "GroupNormalization", 8, num_groups=4, shape=x.shape),
        norm_then_affine(g, x, "LayerNormalization", 6),
        g.add(g.mul(g.bn(g.bn(x)), g.const([[[2.0]]], np.float32)), g.store("c", g.normal(8, 1, 1))),
    ]
    result = equal_fold(g.model(*results))
    assert ops(result) == {
        "InstanceNormalization": 1,
        "GroupNormalization": 1,
        "LayerNormalization": 1,
        "BatchNormalization": 1,
    }


def random_chain(seed: int) -> ModelProto:
    """An operator with weights, then random scales, shifts and idle nodes of many shapes."""
    rng = np.random.default_rng(seed)
    g = Graph(seed=seed, storage="constant" if seed % 2 else "initializer")
    x = g.input("batch", 4, 5, 6)
    kernel = g.store("w", g.normal(8, 2, 3, 3))
    for width in (8, 4):
        match rng.integers(4):
            case 0 if width == 8:
                x = g.conv(x, weight=kernel, group=x.channels // 2, bias=bool(rng.integers(2)))
            case 1:
                x = g.conv_transpose(x, width, 1, stride=1, group=2, bias=bool(rng.integers(2)))
            case 2:
                x = g.op("MatMul", x, g.store(g.fresh("m"), g.normal(6, 6)))
            case _:
                x = g.conv(x, width, group=int(rng.choice([1, 2, 4])))
        for _ in range(rng.integers(5)):
            shapes = [(), (x.channels, 1, 1), (1, x.channels, 1, 1), (6,), (5, 1), (x.channels, 1, 6)]
            shape = shapes[rng.integers(len(shapes))]
            v = g.store(g.fresh("v"), g.uniform(0.5, 1.5, *shape).reshape(shape))
            match rng.integers(6):
                case 0:
                    x = g.bn(x)
                case 1:
                    x = g.dropout(g.op("Identity", x))
                case _:
                    op = str(rng.choice(["Mul", "Add", "Sub", "Div"]))
                    x = g.op(op, *((x, v) if op == "Div" or rng.integers(2) else (v, x)))
        if rng.integers(3) == 0:
            x = g.add(x, g.relu(x))
    return g.model(x)


@pytest.mark.parametrize("seed", range(40))
def test_random_chains(seed: int) -> None:
    equal_fold(random_chain(seed))


# ----------------------------------------------------------------------- who else reads what changes


def test_output_of_the_convolution_is_needed_too() -> None:
    g = Graph()
    x = g.conv(g.input("batch", 3, 5, 5), 8)
    untouched(g.model(g.bn(x), x))
    untouched(g.model(g.add(g.bn(x), g.relu(x))))


def test_convolution_whose_output_a_subgraph_captures() -> None:
    proto = text(
        """c = MatMul(x, w)
        a = Mul(c, two)
        y = If(flag) <then_branch = t () => (float[2,3] r) { r = Add(a, c) },
                      else_branch = e () => (float[2,3] r) { r = Identity(a) }>""",
        inputs="float[2,3] x, bool flag",
        head="float[3,3] w = {1,2,3,4,5,6,7,8,9}, float two = {2}",
    )
    untouched(proto)


def test_captured_weight_is_cloned() -> None:
    proto = text(
        """c = MatMul(x, w)
        a = Mul(c, two)
        y = If(flag) <then_branch = t () => (float[2,3] r) { r = MatMul(a, w) },
                      else_branch = e () => (float[2,3] r) { r = Identity(a) }>""",
        inputs="float[2,3] x, bool flag",
        head="float[3,3] w = {1,2,3,4,5,6,7,8,9}, float two = {2}",
    )
    result = folded(proto)
    assert ops(result) == {"MatMul": 1, "If": 1}
    np.testing.assert_array_equal(arrays(result)["w.folded"], 2 * arrays(result)["w"])
    for flag in (True, False):
        inputs = {"x": np.ones((2, 3), np.float32), "flag": np.array(flag)}
        np.testing.assert_array_equal(run(result, inputs)[0], run(proto, inputs)[0])


def shared(norms: int, plain: bool = False) -> ModelProto:
    """One kernel and bias for two convolutions, with `norms` different batch normalisations behind them."""
    g = Graph()
    x = g.input("batch", 3, 5, 5)
    w, b = g.store("w", g.normal(4, 3, 3, 3)), g.store("b", g.normal(4))
    y = [g.conv(v, weight=w, bias=b) for v in (x, g.relu(x))]
    if norms == 2:
        return g.model(g.bn(y[0]), g.bn(y[1]), *([g.conv(x, weight=w, bias=b)] if plain else []))
    first = g.bn(y[0])
    vectors = [Tensor(f"bn_1.{part}", (4,)) for part in ("scale", "bias", "mean", "var")]
    return g.model(first, g.op("BatchNormalization", y[1], *vectors))


def test_shared_weights() -> None:
    assert arrays(equal_fold(shared(1))).keys() == {"w", "b"}
    assert arrays(equal_fold(shared(2))).keys() == {"w", "b", "w.folded", "b.folded"}
    result = equal_fold(shared(2, plain=True))
    assert arrays(result).keys() == {"w", "b", "w.folded", "b.folded", "w.folded_2", "b.folded_2"}
    np.testing.assert_array_equal(arrays(result)["w"], arrays(shared(2))["w"])


def test_large_shared_weights_are_not_cloned(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(folding, "CLONE_BYTES", 100)
    untouched(shared(2))
    assert ops(equal_fold(shared(1))) == {"Conv": 2, "Relu": 1}


def test_weight_that_is_a_graph_output() -> None:
    proto = text(
        "c = MatMul(x, w) y = Mul(c, two)", head="float[3,3] w = {1,2,3,4,5,6,7,8,9}, float two = {2}"
    )
    proto.graph.output.append(helper.make_tensor_value_info("w", TensorProto.FLOAT, (3, 3)))
    np.testing.assert_array_equal(arrays(equal_fold(proto))["w"].ravel(), range(1, 10))


def test_vector_with_two_roles() -> None:
    """One vector is the scale of one normalisation, its own shift, and the bias of another layer."""
    g = Graph()
    v = g.store("v", g.uniform(0.5, 1.5, 4))
    x = g.conv(g.input("batch", 3, 5, 5), 4, bias=v)
    mean, var = g.store("mean", g.normal(4)), g.store("var", g.uniform(0.5, 1, 4))
    x = g.op("BatchNormalization", x, v, v, mean, var)
    x = g.op("BatchNormalization", g.relu(x), v, v, mean, var)
    x = g.mul(x, g.store("gain", g.normal(4, 1, 1)))
    result = equal_fold(g.model(g.conv(x, 4, bias=v)))
    assert ops(result) == {"Conv": 2, "Relu": 1, "BatchNormalization": 1}


# ------------------------------------------------------------------------------- what is not folded


def test_batch_norm_in_front_stays() -> None:
    g = Graph()
    x = g.bn(g.input("batch", 4, 5, 5))
    untouched(g.model(g.conv(g.relu(g.bn(g.relu(g.conv(x, 8)))), 4)))


def test_batch_norm_in_training_mode_stays() -> None:
    g = Graph()
    x = g.conv(g.input("batch", 3, 5, 5), 4)
    parts = [g.store(name, g.uniform(0.5, 1, 4)) for name in ("scale", "shift", "mean", "var")]
    y, _, _ = g.ops("BatchNormalization", x, *parts, outputs=3, training_mode=1)
    assert folding.plan(Model(g.model(y))) == []


def test_batch_norm_in_the_training_form_of_old_operator_sets_stays() -> None:
    g = Graph(opset=9)
    proto = g.model(g.bn(g.conv(g.input("batch", 3, 5, 5), 4)))
    proto.graph.node[-1].output.extend(["mean", "var", "saved_mean", "saved_var"])
    untouched(proto)


def test_what_a_narrow_type_cannot_hold_stays() -> None:
    g = Graph()
    x = g.input(2, 1, dtype=TensorProto.FLOAT16)
    large = np.full((1, 1), 40000, np.float16)
    untouched(g.model(g.mul(g.op("MatMul", x, g.store("w", large)), g.store("large", large))))


def test_half_precision() -> None:
    g = Graph()
    x = g.input("batch", 3, 8, 8)
    proto = g.model(g.relu(g.bn(g.conv(x, 16, bias=False))))
    for value in (*proto.graph.input, *proto.graph.output):
        value.type.tensor_type.elem_type = TensorProto.FLOAT16
    for tensor in proto.graph.initializer:
        tensor.CopyFrom(
            numpy_helper.from_array(numpy_helper.to_array(tensor).astype(np.float16), tensor.name)
        )
    result = folded(proto)
    assert {value.dtype for value in arrays(result).values()} == {np.dtype(np.float16)}
    inputs = {"input": feeds(g.model(x), 2)["input"].astype(np.float16)}
    assert error(run(result, inputs), run(proto, inputs)) < 3e-3


def test_quantised_weights_stay_quantised() -> None:
    untouched(TOPOLOGIES["weight_quantised"]())


def test_annotated_tensors_stay() -> None:
    g = Graph()
    proto = g.model(g.bn(g.conv(g.input("batch", 3, 5, 5), 4)))
    proto.graph.quantization_annotation.add(tensor_name="conv_1.output")
    untouched(proto)


# -------------------------------------------------------------------------------------------- constants

KERNEL = "float[3,3] w = {1,2,3,4,5,6,7,8,9}"


def test_constants_are_evaluated() -> None:
    proto = text(
        """a = Transpose <perm = [1, 0]> (w)
        b = Cast <to = 7> (a)
        c = Cast <to = 1> (b)
        one = Constant <value = float[1] {1}> ()
        d = Add(c, one)
        y = MatMul(x, d)""",
        head=KERNEL,
    )
    result = equal_fold(proto)
    assert [node.op_type for node in result.graph.node] == ["MatMul"]
    np.testing.assert_array_equal(arrays(result)["d"], arrays(proto)["w"].T + 1)
    assert arrays(result).keys() == {"d"}


def test_a_constant_node_with_several_outputs() -> None:
    result = equal_fold(
        text(
            "k, i = TopK(w, one) v = Cast <to = 1> (i) a = Add(x, k) y = Mul(a, v)",
            inputs="float[3,1] x",
            outputs="float[3,1] y",
            head=KERNEL + ", int64[1] one = {1}",
        )
    )
    assert ops(result) == {"Add": 1, "Mul": 1}
    result = equal_fold(
        text(
            "k, l, m = Split <axis = 0> (w) a = Add(x, k) y = Mul(a, m)",
            inputs="float[1,3] x",
            outputs="float[1,3] y",
            head=KERNEL,
        )
    )
    assert arrays(result).keys() == {"k", "m"}


def test_a_weight_behind_identity_keeps_its_name() -> None:
    result = equal_fold(text("a = Identity(w) b = Identity(a) y = MatMul(x, b)", head=KERNEL))
    assert ops(result) == {"MatMul": 1}
    assert arrays(result).keys() == {"w"}


def test_batch_norm_of_a_constant() -> None:
    result = equal_fold(
        text(
            "a = BatchNormalization(w, v, v, v, v) b = Add(x, a) y = Relu(b)",
            outputs="float[3,3] y",
            inputs="float[1,3] x",
            head=KERNEL + ", float[3] v = {1,2,3}",
        )
    )
    assert ops(result) == {"Add": 1, "Relu": 1}


@pytest.mark.parametrize(
    "body",
    [
        "a = RandomNormalLike(w) b = Add(w, a) y = MatMul(x, b)",
        "a = Bernoulli(half) b = Mul(w, a) y = MatMul(x, b)",
        "a, scale, zero = DynamicQuantizeLinear(w) b = DequantizeLinear(a, scale, zero) y = MatMul(x, b)",
        "y = Identity(w)",
        "k = Constant <value = float[3,3] {1,2,3,4,5,6,7,8,9}> () y = Identity(k)",
        "y = Transpose(w)",
        "y = Transpose(w) z = MatMul(x, y)",
    ],
    ids=["random_like", "bernoulli", "quantised", "output", "node_output", "made_output", "read_output"],
)
def test_constants_that_are_not_evaluated(body: str) -> None:
    untouched(
        text(
            body,
            outputs="float[n,3] y",
            head=KERNEL + ", float[3,3] half = {0.5,0.5,0.5,0.5,0.5,0.5,0.5,0.5,0.5}",
        )
    )


def big(g: Graph, *shape: int) -> Tensor:
    return g.store("w", g.normal(*shape))


def transposed(g: Graph, x: Tensor) -> Tensor:
    return g.op("MatMul", x, g.transpose(big(g, 50, 40), 1, 0))


def tied(g: Graph, x: Tensor) -> Tensor:
    w = big(g, 50, 40)
    return g.add(
        g.op("MatMul", x, g.transpose(w, 1, 0)),
        g.reduce("ReduceSum", g.op("MatMul", w, g.transpose(x, 1, 0)), 0, 1),
    )


def twice(g: Graph, x: Tensor) -> Tensor:
    w = big(g, 50, 40)
    y = g.op("MatMul", x, g.transpose(w, 1, 0))
    return g.add(
        y, g.op("MatMul", x, g.reshape(w, 40, 50)), g.op("MatMul", x, g.reshape(w, 40, -1, shape=(40, 50)))
    )


def expanded(g: Graph, x: Tensor) -> Tensor:
    row = g.op("Expand", g.store("row", g.normal(1, 50)), g.const([40, 50]))
    return g.op("MatMul", x, row)


def filled(rows: int) -> Callable[[Graph, Tensor], Tensor]:
    def draw(g: Graph, x: Tensor) -> Tensor:
        value = numpy_helper.from_array(np.array([0.5], np.float32))
        w = g.op(
            "ConstantOfShape", g.const([rows, 32]), value=value, shape=(rows, 32), dtype=TensorProto.FLOAT
        )
        return g.add(g.reduce("ReduceSum", x, 1), g.reduce("ReduceSum", w, 0, 1))

    return draw


def widened(g: Graph, x: Tensor, dtype: type[np.generic]) -> Tensor:
    w = g.store("w", (10 * g.normal(40, 50)).astype(dtype))
    return g.op("MatMul", x, g.op("Cast", w, to=TensorProto.FLOAT, dtype=TensorProto.FLOAT, shape=(40, 50)))


@pytest.mark.parametrize(
    ("draw", "gone"),
    [
        (transposed, {"Transpose"}),
        (tied, set()),
        (twice, set()),
        (expanded, set()),
        (filled(32), {"ConstantOfShape", "ReduceSum"}),
        (filled(33), set()),
        (lambda g, x: widened(g, x, np.float16), {"Cast"}),
        (lambda g, x: widened(g, x, np.int8), set()),
    ],
    ids=["transposed", "tied", "twice", "expanded", "filled", "filled_large", "from_half", "from_int8"],
)
def test_results_that_take_more_than_they_free(
    draw: Callable[[Graph, Tensor], Tensor], gone: set[str]
) -> None:
    """A weight used elsewhere would be stored twice; an Expand is smaller than what it makes."""
    g = Graph()
    proto = g.model(draw(g, g.input("batch", 40)))
    result = equal_fold(proto)
    left = Counter(ops(proto)) - Counter(ops(result))
    assert set(left) == gone


def test_constant_that_a_subgraph_captures() -> None:
    proto = text(
        """a = Neg(w)
        y = If(flag) <then_branch = t () => (float[2,3] r) { r = MatMul(x, a) },
                      else_branch = e () => (float[2,3] r) { r = Identity(x) }>""",
        inputs="float[2,3] x, bool flag",
        head=KERNEL,
    )
    result = folded(proto)
    assert ops(result) == {"If": 1}
    np.testing.assert_array_equal(arrays(result)["a"], -arrays(proto)["w"])


# -------------------------------------------------------------------------------------------- idle nodes


@pytest.mark.parametrize(
    ("body", "left"),
    [
        ("a = Relu(x) b = Identity(a) c = Dropout(b) d = Identity(c) y = Neg(d)", ["Relu", "Neg"]),
        ("a = Relu(x) b = Neg(a) y = Identity(a) z = Neg(b)", ["Relu", "Neg", "Neg"]),
        ("a = Relu(x) b = Identity(a) y = Identity(b) z = Identity(y)", ["Relu", "Identity"]),
        ("a = Relu(x) y = Identity(a) z = Identity(a)", ["Relu", "Identity"]),
        ("y = Identity(x) z = Relu(x)", ["Identity", "Relu"]),
        ("y = Dropout(x) z = Relu(y)", ["Dropout", "Relu"]),
        ("a, b = Split <axis = 0> (x) y = Identity(b) z = Relu(b)", ["Split", "Relu"]),
    ],
)
def test_idle_nodes(body: str, left: list[str]) -> None:
    proto = text(body, outputs="float[n,3] y, float[n,3] z")
    if "z =" not in body:
        del proto.graph.output[1]
    assert [node.op_type for node in equal_fold(proto).graph.node] == left


def test_dropout_with_a_mask_that_is_used() -> None:
    untouched(text("a, m = Dropout(x) b = Cast <to = 1> (m) y = Mul(a, b)"))


def test_dropout_in_training_mode() -> None:
    proto = text("a = Dropout(x, r, t) y = Relu(a)", head="float r = {0.5}, bool t = {1}")
    assert folding.plan(Model(proto)) == []
    untouched(text("a = Dropout(x, r, t) y = Relu(a)", "float[2,3] x, bool t", head="float r = {0.5}"))
    proto = text("a = Dropout(x, r, t) y = Relu(a)", head="float r = {0.5}, bool t = {0}")
    assert ops(equal_fold(proto)) == {"Relu": 1}


def test_identity_that_a_subgraph_captures() -> None:
    proto = text(
        """a = Identity(x)
        y = If(flag) <then_branch = t () => (float[2,3] r) { r = Neg(a) },
                      else_branch = e () => (float[2,3] r) { r = Relu(a) }>""",
        inputs="float[2,3] x, bool flag",
    )
    assert ops(folded(proto)) == {"If": 1}


# --------------------------------------------------------------------------------- what else is in the file


def test_everything_else_survives() -> None:
    g = Graph()
    proto = g.model(g.bn(g.conv(g.input("batch", 3, 5, 5), 4)))
    graph = proto.graph
    graph.initializer.append(numpy_helper.from_array(np.ones(3, np.float32), "unused"))
    graph.node.append(helper.make_node("Relu", ["input"], ["dead"]))
    graph.node.append(
        helper.make_node("BatchNormalization", ["dead", *graph.node[-2].input[1:]], ["dead_bn"])
    )
    del graph.node[-1].input[1:]
    graph.node[-1].op_type = "Neg"
    proto.metadata_props.add(key="author", value="somebody")
    proto.doc_string = graph.doc_string = graph.node[0].doc_string = "a text"
    graph.initializer[0].doc_string = "a kernel"
    for name in ("conv_1.output", "dead"):
        graph.value_info.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, ("batch", None, 5, 5)))
    result = equal_fold(proto)
    assert ops(result) == {"Conv": 1, "Relu": 1, "Neg": 1}
    assert [t.name for t in result.graph.initializer] == ["conv_1.weight", "conv_1.bias", "unused"]
    assert [v.name for v in result.graph.value_info] == ["dead"]
    assert result.graph.initializer[2] == graph.initializer[-1]
    assert result.graph.initializer[0].doc_string == "a kernel"
    assert result.graph.node[0].doc_string == "a text"
    for field in ("metadata_props", "doc_string", "opset_import", "ir_version", "producer_name"):
        assert getattr(result, field) == getattr(proto, field)
    assert result.graph.input == graph.input


def test_weights_that_are_inputs_and_change_their_shape() -> None:
    g = Graph(opset=8, ir=3, storage="input")
    bias = g.store("b", np.ones((), np.float32))
    result = equal_fold(g.model(g.bn(g.gemm(g.input("batch", 5), 7, bias=bias))))
    stated = {v.name: [d.dim_value for d in v.type.tensor_type.shape.dim] for v in result.graph.input}
    assert stated["b"] == [7]
    assert stated.keys() == {"input", "b", "gemm_1.weight"}


def test_external_weights(tmp_path: Any) -> None:
    g = Graph()
    proto = g.model(g.bn(g.conv(g.input("batch", 3, 5, 5), 4, bias=False)))
    save(proto, tmp_path / "model.onnx", {"conv_1.weight": "model.onnx.data"})
    model = load(tmp_path / "model.onnx")
    result, _ = folding.fold(model)
    save(result, tmp_path / "folded.onnx", model.external)
    stored = load(tmp_path / "folded.onnx")
    assert stored.external.keys() == {"conv_1.weight"}
    assert error(run(stored.proto, feeds(proto)), run(proto, feeds(proto))) <= TOLERANCE


# ---------------------------------------------------------------------------------------------- rewrite


def test_no_edits() -> None:
    proto = TOPOLOGIES["dead_branch"]()
    assert serialized(rewrite.apply(Model(proto), [])) == serialized(proto)


def test_rewire_of_a_node_that_is_not_there() -> None:
    with pytest.raises(UserError, match="no node makes 'b'"):
        rewrite.apply(Model(text("y = Relu(x)")), [Rewire(("b",))])


def test_layer_taken_out_by_rewiring() -> None:
    """Readers are redirected, what only the layer read goes, and an added node stands behind its inputs."""
    proto = text(
        "a = Relu(x) k = Constant <value = float[1] {2}> () b = MatMul(a, w) c = Neg(b) y = Add(c, a)",
        head=KERNEL,
    )
    result = rewrite.apply(Model(proto), [Rewire(("c",), {"c": "a"})])
    assert [node.op_type for node in result.graph.node] == ["Relu", "Constant", "Add"]
    assert [*result.graph.node[-1].input] == ["a", "a"]
    assert not result.graph.initializer
    added = helper.make_node("Mul", ["a", "k"], ["a2"])
    result = rewrite.apply(Model(proto), [Rewire((), {"c": "a2"}, (added,))])
    assert [node.op_type for node in result.graph.node] == ["Relu", "Constant", "Mul", "Add"]


def test_set_weight() -> None:
    proto = text(
        "k = Constant <value_floats = [1.0, 2.0, 3.0]> () a = Add(x, k) b = MatMul(a, w) y = Relu(b)",
        head=KERNEL,
    )
    edits: list[Edit] = [
        SetWeight("k", np.zeros(3)),
        SetWeight("w", np.float32(2) * np.eye(3, dtype=np.float32)),
    ]
    result = rewrite.apply(Model(proto), edits)
    assert [node.op_type for node in result.graph.node] == ["Constant", "Add", "MatMul", "Relu"]
    assert arrays(result)["k"].dtype == np.float64
    np.testing.assert_array_equal(arrays(result)["w"], 2 * np.eye(3))


# ----------------------------------------------------------------------------------------- whole networks

KEPT = {
    "concat_bn": 1,
    "dense_block": 5,
    "bn_before_conv": 2,
    "bn_flatten_gemm": 1,
    "two_bns_summed": 2,
    "densenet121": 62,
}


def check_network(name: str, proto: ModelProto, tolerance: float) -> None:
    result = equal_fold(proto, tolerance)
    assert ops(result).get("BatchNormalization", 0) == KEPT.get(name, 0)
    before, after = arrays(proto), arrays(result)
    read = {i for node in result.graph.node for i in node.input}
    for key in before.keys() & after.keys():
        assert before[key].dtype == after[key].dtype
    for node in proto.graph.node:
        if node.op_type in ("Conv", "ConvTranspose", "Gemm") and node.input[1] in before:
            assert node.input[1] in after.keys() & read or node.output[0] == "dead"


@pytest.mark.parametrize("name", TOPOLOGIES)
def test_topologies(name: str) -> None:
    check_network(name, TOPOLOGIES[name](), TOLERANCE)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_architectures(name: str) -> None:
    """Rounding adds up over fifty layers, and the deepest maps are small."""
    check_network(name, ARCHITECTURES[name](width=0.125, image=64), 1e-4)
