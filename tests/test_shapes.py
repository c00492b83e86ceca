"""What the shape analysis finds where sizes are baked in, depend on data, or belong to fused operators."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pytest
from onnx import ModelProto, TensorProto

from models.builder import Graph, Tensor
from models.quantised import matmul_n_bits
from onnxprune.model import Model
from onnxprune.shapes import Shapes, analyse
from onnxprune.surgery import apply
from tests.reference import Array, error, graph_of, masked, random_plan, run
from tests.test_idioms import at, joined, shape_of

INT64 = TensorProto.INT64
FLOAT = np.float32
MICROSOFT = "com.microsoft"


def shapes_of(proto: ModelProto) -> Shapes:
    return analyse(Model(proto))


def other(shapes: Shapes) -> Shapes:
    assert shapes.other is not None
    return shapes.other


def check_cuts(proto: ModelProto, *inputs: Mapping[str, Array]) -> None:
    """Random cuts give the masked original at each of these inputs."""
    graph = graph_of(proto)
    for seed in range(3):
        plan = random_plan(graph, "", seed)
        pruned, reference = apply(graph, plan), masked(graph, plan)
        for feeds in inputs:
            assert error(run(pruned, feeds), run(reference, feeds)) < 1e-4
        assert plan.keeps


def normal(*shape: int) -> Array:
    return np.random.default_rng(len(shape)).standard_normal(shape).astype(FLOAT)


def static(shapes: Shapes, tensor: Tensor) -> list[bool]:
    return [bool(entry) for entry in shapes.static_entries(tensor.name)]


# Sizes that an exporter baked in


def attention(g: Graph, x: Tensor, length: int, batch: int) -> Tensor:
    """Two heads of 4, through shapes that hold the length of the example."""
    seen = ("batch", length)

    def reshaped(y: Tensor, *dims: int) -> Tensor:
        return g.op("Reshape", y, g.const([batch, length, *dims]), shape=(*seen, *dims))

    q, k, v = (g.transpose(reshaped(g.matmul(x, 8), 2, 4), 0, 2, 1, 3) for _ in range(3))
    scores = g.op("Softmax", g.op("MatMul", q, g.transpose(k, 0, 1, 3, 2)), axis=-1)
    return reshaped(g.transpose(g.op("MatMul", scores, v), 0, 2, 1, 3), 8)


def baked(length: int, batch: int) -> ModelProto:
    g = Graph(seed=1)
    x = g.matmul(g.input("batch", "length", 6, name="tokens"), 8)
    y = g.matmul(attention(g, x, length, batch), 8)
    return g.model(g.matmul(g.op("Add", x, y, shape=("batch", length, 8)), 5))


@pytest.mark.parametrize("length", [12, 50, 77, 197])
@pytest.mark.parametrize("batch", [0, -1])
def test_a_baked_length_is_found(length: int, batch: int) -> None:
    """The batch goes on being dynamic."""
    shapes = shapes_of(baked(length, batch))
    assert shapes.sizes["length"] == other(shapes).sizes["length"] == length
    assert shapes.sizes["batch"] != other(shapes).sizes["batch"]
    assert shapes.is_dynamic("tokens", 0)
    assert not shapes.is_dynamic("tokens", 1)


@pytest.mark.parametrize("batch", [0, -1])
def test_heads_are_cut_beside_a_baked_length(batch: int) -> None:
    proto = baked(50, batch)
    sizes = [group.size for group in graph_of(proto).groups]
    assert sorted(sizes) == [2, 4, 4, 8]  # heads, their two widths, the residual stream
    check_cuts(proto, {"tokens": normal(2, 50, 6)}, {"tokens": normal(5, 50, 6)})


@pytest.mark.parametrize("stored", [(1, 20, 8), (20, 8), (20, 1)])
def test_the_length_of_a_stored_table_is_found(stored: tuple[int, ...]) -> None:
    g = Graph()
    x = g.matmul(g.input("batch", "length", 6, name="tokens"), 8)
    y = g.op("Add", g.store("table", g.normal(*stored)), x, shape=("batch", 20, 8))
    proto = g.model(g.matmul(g.relu(y), 5))
    shapes = shapes_of(proto)
    assert shapes.sizes["length"] == 20  # beside it only a length of 1 fits
    assert shapes.sizes["batch"] != other(shapes).sizes["batch"]
    assert [group.size for group in graph_of(proto).groups] == [8]
    check_cuts(proto, {"tokens": normal(2, 20, 6)}, {"tokens": normal(5, 20, 6)})


def test_a_baked_image_is_found() -> None:
    """Height and width are open by name, but their product is not."""
    g = Graph()
    x = g.conv(g.input("batch", 3, "height", "width", name="image"), 6, 3)
    y = g.op("Reshape", x, g.const([0, 6, 48 * 48]), shape=("batch", 6, 48 * 48))
    shapes = shapes_of(g.model(g.matmul(y, 5)))
    assert shapes.sizes["height"] * shapes.sizes["width"] == 48 * 48


# Extents that are data


def chosen_rows(g: Graph) -> tuple[Tensor, Tensor, Tensor]:
    """Rows of 8 that are picked by a condition, the positions, and the shape of the rows."""
    x = g.matmul(g.input("batch", 6, name="tokens"), 8)
    positive = g.op("Greater", g.reduce("ReduceSum", x, 1, keepdims=False), g.const(0.0, FLOAT))
    found = g.op("NonZero", positive)
    rows = g.op("GatherND", x, g.transpose(found, 1, 0), shape=("rows", 8))
    return rows, found, shape_of(g, rows)


def test_rows_that_are_picked_are_as_many_as_the_data_says() -> None:
    g = Graph()
    rows, found, shape = chosen_rows(g)
    heads = g.op("Reshape", rows, joined(g, at(g, shape, 0), 2, 4), shape=("rows", 2, 4))
    y = g.op("Reshape", g.op("Tanh", heads), shape, shape=("rows", 8))
    proto = g.model(g.matmul(y, 5))
    shapes = shapes_of(proto)
    assert shapes.open[found.name] == (1, None)
    assert shapes.open[rows.name] == (None, 8)
    assert shapes.is_dynamic(rows.name, 0)
    assert not shapes.is_dynamic(rows.name, 1)
    assert static(shapes, shape) == [False, True]
    check_cuts(proto, {"tokens": normal(7, 6)}, {"tokens": normal(20, 6)})


def always_the_same(g: Graph) -> tuple[Tensor, Tensor, Tensor]:
    """Positions of what is not zero among 6 numbers: for most inputs all of them."""
    numbers = g.reduce("ReduceMax", g.input("batch", 6, name="tokens"), 0, keepdims=False)
    found = g.op("NonZero", numbers)
    shape = shape_of(g, found)
    count = at(g, shape, 1)
    return found, shape, g.op("Mul", count, g.const([2]))


def test_extents_from_data_are_not_static_where_they_coincide() -> None:
    g = Graph()
    found, shape, twice = always_the_same(g)
    proto = g.model(g.op("Identity", twice))
    shapes = shapes_of(proto)
    assert shapes.shapes[found.name] == other(shapes).shapes[found.name] == (1, 6)
    assert shapes.open[found.name] == (1, None)
    assert shapes.is_dynamic(found.name, 1)
    assert not shapes.is_dynamic(found.name, 0)
    assert static(shapes, shape) == [True, False]
    assert shapes.values[twice.name].tolist() == [12]
    assert shapes.shifted[twice.name].tolist() != [12]
    assert static(shapes, twice) == [False]


def test_channels_behind_as_many_positions_are_not_taken_for_them() -> None:
    """6 positions that are data beside 6 channels: only the channels may be restated."""
    g = Graph()
    found, _, _ = always_the_same(g)
    x = g.matmul(g.input("batch", 9, name="rows"), 6)
    positions = g.op("Squeeze", found, g.const([0]), shape=("found",), dtype=INT64)
    y = g.op("Gather", g.relu(x), positions, axis=1, shape=("batch", "found"))
    z = g.op(
        "Reshape",
        y,
        joined(g, at(g, shape_of(g, y), 0), at(g, shape_of(g, y), 1), 1),
        shape=("batch", "found", 1),
    )
    graph = graph_of(g.model(g.reduce("ReduceSum", z, 1), g.matmul(g.relu(x), 5)))
    assert not graph.groups  # all 6 may be read by position


def regulated(g: Graph, durations: Tensor) -> tuple[Tensor, Tensor]:
    """Features spread over as many frames as the durations sum up to, and their shape."""
    x = g.matmul(g.input(1, "length", 6, name="tokens"), 8)
    count = g.op("ReduceSum", durations, keepdims=0)
    frames = g.op("Range", g.const(0), count, g.const(1), shape=("frames",), dtype=INT64)
    last = g.op("Sub", g.op("Squeeze", at(g, shape_of(g, x), 1), g.const([0])), g.const(1))
    index = g.op("Min", frames, last, shape=("frames",), dtype=INT64)
    y = g.op("Gather", x, index, axis=1, shape=(1, "frames", 8))
    return y, shape_of(g, y)


def test_frames_of_a_length_regulator() -> None:
    g = Graph()
    y, shape = regulated(g, g.op("Add", g.input("length", name="durations", dtype=INT64), g.const(2)))
    table = g.op("Expand", g.const(g.normal(1, 1, 8), FLOAT), shape, shape=(1, "frames", 8))
    y = g.op("Add", y, table, shape=(1, "frames", 8))
    split = joined(g, at(g, shape, 0), at(g, shape, 1), 2, 4)
    heads = g.op("Reshape", y, split, shape=(1, "frames", 2, 4))
    z = g.matmul(g.op("Reshape", g.relu(heads), shape, shape=(1, "frames", 8)), 5)
    proto = g.model(z)
    shapes = shapes_of(proto)
    assert shapes.open[y.name] == (1, None, 8)
    assert static(shapes, shape) == [True, False, True]
    assert static(shapes, split) == [True, False, True, True]
    assert sorted(group.size for group in graph_of(proto).groups) == [2, 4]
    for_two = {"tokens": normal(1, 2, 6), "durations": np.array([5, 1])}
    for_four = {"tokens": normal(1, 4, 6), "durations": np.array([0, 3, 0, 1])}
    check_cuts(proto, for_two, for_four)


def test_what_is_made_as_long_as_data_says_is_as_long() -> None:
    """Expand to a shape whose value is known at the sizes of the analysis, and a sum with that."""
    g = Graph()
    found, shape, _ = always_the_same(g)
    rows = g.op("Expand", g.const(g.normal(3, 1, 1), FLOAT), shape, shape=(3, 1, "found"))
    total = g.op("Add", rows, g.op("Cast", found, to=TensorProto.FLOAT), shape=(3, 1, "found"))
    again = shape_of(g, total)
    shapes = shapes_of(g.model(g.op("Identity", again)))
    assert shapes.shapes[total.name] == other(shapes).shapes[total.name] == (3, 1, 6)
    for tensor in (rows, total):
        assert [shapes.is_dynamic(tensor.name, axis) for axis in range(3)] == [False, False, True]
    assert static(shapes, again) == [True, True, False]


def test_frames_that_are_as_many_as_channels() -> None:
    """8 frames at any size of the inputs, but by what their values are; and 8 channels."""
    g = Graph()
    g.input("length", name="durations", dtype=INT64)
    ones = g.op("Clip", g.inputs[0], g.const(1), g.const(1), shape=("length",), dtype=INT64)
    eight = g.op("Mul", g.op("ReduceMax", ones, keepdims=0), g.const(8))
    y, shape = regulated(g, eight)
    z = g.matmul(g.relu(g.op("Reshape", y, shape, shape=(1, "frames", 8))), 5)
    proto = g.model(z)
    shapes = shapes_of(proto)
    assert shapes.shapes[y.name] == other(shapes).shapes[y.name] == (1, 8, 8)
    assert static(shapes, shape) == [True, False, True]
    check_cuts(proto, {"tokens": normal(1, 3, 6), "durations": np.array([4, 4, 4])})


# Operators that onnx does not know


def microsoft(g: Graph, op: str, *inputs: Tensor, like: Tensor, **attributes: Any) -> Tensor:
    return g.op(op, *inputs, domain=MICROSOFT, shape=like.shape, **attributes)


def fused_matmul(g: Graph, x: Tensor) -> Tensor:
    return microsoft(g, "FusedMatMul", x, g.store("fused.weight", g.normal(8, 8)), like=x, alpha=0.5)


def normalised(g: Graph, x: Tensor) -> Tensor:
    gamma, beta = g.store("gamma", g.normal(8, mean=1)), g.store("beta", g.normal(8))
    return microsoft(g, "SkipLayerNormalization", x, g.matmul(x, 8), gamma, beta, like=x)


def stored_in_4_bits(g: Graph, x: Tensor) -> Tensor:
    wide = matmul_n_bits(g, g.matmul(x, 32), 32, 16, zeros=False)
    return matmul_n_bits(g, g.relu(wide), 8, 16, zeros=False)


@pytest.mark.parametrize("fused", [fused_matmul, normalised, stored_in_4_bits])
def test_shape_arithmetic_goes_on_behind_fused_operators(fused: Callable[[Graph, Tensor], Tensor]) -> None:
    g = Graph()
    y = fused(g, g.matmul(g.input("batch", "length", 6, name="tokens"), 8))
    shape = shape_of(g, y)
    split = joined(g, at(g, shape, 0), at(g, shape, 1), 2, 4)
    heads = g.transpose(g.op("Reshape", y, split, shape=("batch", "length", 2, 4)), 0, 2, 1, 3)
    mixed = g.op("MatMul", g.op("Softmax", g.op("MatMul", heads, g.transpose(heads, 0, 1, 3, 2))), heads)
    back = g.transpose(mixed, 0, 2, 1, 3)
    width = g.op("Mul", at(g, shape_of(g, back), 2), at(g, shape_of(g, back), 3))
    target = joined(g, at(g, shape, 0), at(g, shape, 1), width)
    proto = g.model(g.matmul(g.op("Reshape", back, target, shape=("batch", "length", 8)), 5))
    shapes = shapes_of(proto)
    assert shapes.open == {}  # all of it follows from shapes
    assert static(shapes, split) == [False, False, True, True]
    assert shapes.values[target.name].tolist() == [shapes.sizes["batch"], shapes.sizes["length"], 8]
    assert static(shapes, target) == [False, False, True]


def test_heads_behind_a_fused_product_are_cut() -> None:
    g = Graph()
    y = fused_matmul(g, g.matmul(g.input("batch", "length", 6, name="tokens"), 8))
    shape = shape_of(g, y)
    split = joined(g, at(g, shape, 0), at(g, shape, 1), 2, 4)
    heads = g.op("Tanh", g.op("Reshape", y, split, shape=("batch", "length", 2, 4)))
    proto = g.model(g.matmul(g.op("Reshape", heads, shape, shape=("batch", "length", 8)), 5))
    assert sorted(group.size for group in graph_of(proto).groups) == [2, 4, 8]
    check_cuts(proto, {"tokens": normal(2, 3, 6)}, {"tokens": normal(1, 9, 6)})


def test_sizes_that_only_onnxruntime_refuses_are_passed_over() -> None:
    """The operands of a fused sum must be alike, which onnx cannot tell."""
    g = Graph()
    a, b = (g.matmul(g.input("batch", length, 6, name=length), 8) for length in ("left", "right"))
    gamma, beta = g.store("gamma", g.normal(8)), g.store("beta", g.normal(8))
    y = microsoft(g, "SkipLayerNormalization", a, b, gamma, beta, like=a)
    shapes = shapes_of(g.model(g.matmul(y, 5)))
    for each in (shapes, other(shapes)):
        assert each.sizes["left"] == each.sizes["right"]
        assert each.shapes[y.name] == (each.sizes["batch"], each.sizes["left"], 8)
    assert all(shapes.sizes[key] != other(shapes).sizes[key] for key in shapes.sizes)


# Filters larger than what they are moved over


def convolved(g: Graph, x: Tensor, cout: int, size: int, stride: int) -> Tensor:
    filters = g.store(g.fresh("filters"), g.normal(cout, x.extent(1), size))
    return g.relu(g.op("Conv", x, filters, strides=[stride], shape=("batch", cout, "frames")))


def test_a_stack_of_strided_filters_is_given_a_long_signal() -> None:
    g = Graph()
    x = g.op(
        "Unsqueeze", g.input("batch", "samples", name="wave"), g.const([1]), shape=("batch", 1, "samples")
    )
    for cout, size, stride in ((6, 10, 5), (5, 8, 4), (7, 8, 4), (8, 8, 4), (9, 8, 4)):
        x = convolved(g, x, cout, size, stride)
    proto = g.model(g.gemm(g.reduce("ReduceMean", x, 2, keepdims=False), 4))
    shapes = shapes_of(proto)
    for each in (shapes, other(shapes)):
        assert all(0 not in shape for shape in each.shapes.values())
    assert shapes.sizes["samples"] != other(shapes).sizes["samples"]
    assert sorted(group.size for group in graph_of(proto).groups) == [5, 6, 7, 8, 9]


def test_an_image_smaller_than_a_filter_is_passed_over() -> None:
    g = Graph()
    x = g.input("batch", 3, "side", "side", name="image")
    filters = g.store("filters", g.normal(6, 3, 200, 200))
    y = g.op("Conv", x, filters, shape=("batch", 6, "rest", "rest"))
    shapes = shapes_of(g.model(g.gemm(g.flatten(g.gap(y)), 5)))
    for each in (shapes, other(shapes)):
        assert min(each.shapes[y.name]) > 0
    assert shapes.sizes["side"] != other(shapes).sizes["side"]


def test_a_strided_filter_is_given_a_signal_of_its_length() -> None:
    """Inference counts one position where there is none: (7 - 10) / 5 is rounded up to 0."""
    g = Graph()
    y = convolved(g, g.input("batch", 1, "samples", name="wave"), 6, 10, 5)
    proto = g.model(g.op("Conv", y, g.store("last", g.normal(4, 6, 1)), shape=("batch", 4, "frames")))
    shapes = shapes_of(proto)
    for each in (shapes, other(shapes)):
        assert each.sizes["samples"] >= 10
    assert shapes.is_dynamic(y.name, 2)


@pytest.mark.parametrize("pads", [[6, 6], [12, 0]])
def test_padding_counts_as_signal(pads: list[int]) -> None:
    g = Graph()
    x = g.input("batch", 1, "samples", name="wave")
    y = g.op("Conv", x, g.store("filters", g.normal(6, 1, 19)), pads=pads, shape=("batch", 6, "frames"))
    shapes = shapes_of(g.model(g.op("ReduceMax", y, axes=[2], shape=("batch", 6, 1))))
    assert shapes.sizes["samples"] == 7


def test_a_window_larger_than_any_size_tried_is_analysed_all_the_same() -> None:
    g = Graph()
    y = convolved(g, g.input("batch", 1, "samples", name="wave"), 6, 6000, 10000)
    proto = g.model(g.op("Conv", y, g.store("last", g.normal(4, 6, 1)), shape=("batch", 4, "frames")))
    assert [group.size for group in graph_of(proto).groups] == [6]
