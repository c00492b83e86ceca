"""Things exporters write and networks do with one another, a few nodes each: cut at random, always right.

Each idiom says how many units its groups have; a change there is a change in what can be pruned.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx
import pytest
from onnx import ModelProto, TensorProto, helper

from models.builder import Graph, Tensor
from onnxprune.surgery import apply
from tests.reference import assert_equal_to_masked, graph_of, random_plan

FLOAT = np.float32
Drawn = Tensor | tuple[Tensor, ...] | ModelProto
Draw = Callable[[Graph], Drawn]
IDIOMS: dict[str, tuple[Draw, tuple[int, ...]]] = {}


def idiom(*sizes: int) -> Callable[[Draw], Draw]:
    """Register a network whose groups have these sizes."""

    def register(draw: Draw) -> Draw:
        IDIOMS[draw.__name__] = draw, sizes
        return draw

    return register


def built(draw: Draw) -> ModelProto:
    g = Graph(draw.__name__, seed=1)
    result = draw(g)
    if isinstance(result, ModelProto):
        return result
    return g.model(*(result if isinstance(result, tuple) else (result,)))


@pytest.mark.parametrize("name", IDIOMS)
def test_idiom_is_cut_right(name: str) -> None:
    graph = graph_of(built(IDIOMS[name][0]))
    for seed in range(4):
        plan = random_plan(graph, "", seed)
        pruned = apply(graph, plan)
        onnx.checker.check_model(pruned, full_check=True)
        assert_equal_to_masked(graph, plan, pruned)


@pytest.mark.parametrize("name", IDIOMS)
def test_idiom_has_these_groups(name: str) -> None:
    draw, sizes = IDIOMS[name]
    assert sorted(group.size for group in graph_of(built(draw)).groups) == sorted(sizes)


# Pieces that many of them share


def image(g: Graph, width: int = 6) -> Tensor:
    """A first convolution."""
    return g.conv(g.input("batch", 3, 4, 4, name="image"), width, 3)


def tokens(g: Graph, width: int = 8) -> Tensor:
    """A first matrix over vectors of a length known at run time."""
    return g.matmul(g.input("batch", "length", 6, name="tokens"), width)


def head(g: Graph, x: Tensor) -> Tensor:
    return g.gemm(g.flatten(g.gap(x)), 5)


def shape_of(g: Graph, x: Tensor) -> Tensor:
    return g.op("Shape", x)


def at(g: Graph, shape: Tensor, i: int) -> Tensor:
    return g.op("Gather", shape, g.const([i]), axis=0)


def joined(g: Graph, *parts: Tensor | int) -> Tensor:
    """An integer vector put together from computed and stored parts."""
    return g.op("Concat", *(g.const([p]) if isinstance(p, int) else p for p in parts), axis=0)


def halves(g: Graph, op_type: str, x: Tensor, operand: Tensor, *shape: int | str) -> tuple[Tensor, Tensor]:
    """A node over axis 1 with two outputs of a shape that inference cannot tell."""
    node, _ = g._emit(op_type, (x, operand), 2, "", None, {"axis": 1})
    return Tensor(node.output[0], shape), Tensor(node.output[1], shape)


# Extents computed at run time


@idiom(8)
def positions_by_length(g: Graph) -> Drawn:
    """A table of positions cut to a computed length: its rows must all stay."""
    x = tokens(g)
    table = g.store("positions", g.normal(32, 8))
    rows = g.op("Slice", table, g.const([0]), at(g, shape_of(g, x), 1), g.const([0]), shape=("length", 8))
    return g.matmul(g.relu(g.add(x, rows)), 5)


@idiom(8)
def positions_by_length_and_width(g: Graph) -> Drawn:
    """The same, with as many computed ends as the table has axes."""
    x = tokens(g)
    table = g.store("positions", g.normal(32, 8))
    ends = joined(g, at(g, shape_of(g, x), 1), 8)
    rows = g.op("Slice", table, g.const([0, 0]), ends, g.const([0, 1]), shape=("length", 8))
    return g.matmul(g.relu(g.add(x, rows)), 5)


@idiom(6)
def channels_times_rows(g: Graph) -> Drawn:
    x = image(g)
    shape = shape_of(g, x)
    product = g.op("Mul", at(g, shape, 1), at(g, shape, 2))
    flat = joined(g, at(g, shape, 0), product, at(g, shape, 3))
    y = g.op("Tanh", g.op("Reshape", x, flat, shape=("batch", 24, 4)))
    return head(g, g.op("Reshape", y, shape, shape=x.shape))


@idiom(6)
def expand_where_not_minus_one(g: Graph) -> Drawn:
    """How `expand` with -1 for unchanged axes is exported."""
    x = image(g)
    target = joined(g, at(g, shape_of(g, x), 0), 6, -1, -1)
    one = helper.make_tensor("one", TensorProto.INT64, [1], [1])
    ones = g.op("ConstantOfShape", shape_of(g, target), value=one, shape=(4,), dtype=TensorProto.INT64)
    same = g.op("Equal", target, g.op("Mul", ones, g.const(-1)))
    y = g.op("Expand", g.gap(x), g.op("Where", same, ones, target), shape=("batch", 6, 1, 1))
    return head(g, g.mul(x, y))


@idiom(6)
def mean_by_counted_channels(g: Graph) -> Drawn:
    """A sum divided by the number of channels, which is an extent of the original for good."""
    x = image(g)
    count = g.op("Cast", at(g, shape_of(g, x), 1), to=TensorProto.FLOAT)
    return head(g, g.mul(x, g.op("Div", g.reduce("ReduceSum", x, 1), count)))


@idiom(6)
def mean_by_counted_elements(g: Graph) -> Drawn:
    x = image(g)
    count = g.op("Cast", g.op("Size", x), to=TensorProto.FLOAT, dtype=TensorProto.FLOAT)
    return g.op("Div", g.reduce("ReduceSum", x, 1, 2, 3), count)


@idiom(6, 6, 4)
def zeros_like(g: Graph) -> Drawn:
    x = image(g)
    zeros = g.op("ConstantOfShape", shape_of(g, x), shape=x.shape, dtype=TensorProto.FLOAT)
    return head(g, g.conv(g.concat(x, zeros), 4, 1))


@idiom()
def range_over_channels(g: Graph) -> Drawn:
    x = image(g)
    count = g.op("Squeeze", at(g, shape_of(g, x), 1), g.const([0]))
    numbers = g.op("Range", g.const(0), count, g.const(1), shape=(6,), dtype=TensorProto.INT64)
    factors = g.reshape(g.op("Cast", numbers, to=TensorProto.FLOAT), 1, -1, 1, 1)
    return head(g, g.mul(x, factors))


@idiom(4)
def split_in_computed_halves(g: Graph) -> Drawn:
    x = image(g, 8)
    half = g.op("Div", at(g, shape_of(g, x), 1), g.const([2]))
    sizes = joined(g, half, g.op("Sub", at(g, shape_of(g, x), 1), half))
    a, b = halves(g, "Split", x, sizes, "batch", 4, 4, 4)
    return head(g, g.mul(a, g.op("Sigmoid", b)))


@idiom(4)
def slice_in_computed_halves(g: Graph) -> Drawn:
    x = image(g, 8)
    half = g.op("Div", at(g, shape_of(g, x), 1), g.const([2]))
    a = g.op("Slice", x, g.const([0]), half, g.const([1]), shape=("batch", 4, 4, 4))
    b = g.op("Slice", x, half, g.const([2**62]), g.const([1]), shape=("batch", 4, 4, 4))
    return head(g, g.mul(a, g.op("Sigmoid", b)))


@idiom(6, 4)
def resize_to_computed_sizes(g: Graph) -> Drawn:
    x = image(g)
    first = g.op("Slice", shape_of(g, x), g.const([0]), g.const([2]), shape=(2,))
    sizes = g.op("Concat", first, g.const([8, 8]), axis=0)
    y = g.op("Resize", x, None, None, sizes, shape=("batch", 6, 8, 8), mode="nearest")
    return head(g, g.conv(y, 4, 1))


@idiom(6)
def tile_to_computed_channels(g: Graph) -> Drawn:
    x = image(g)
    times = joined(g, 1, at(g, shape_of(g, x), 1), 1, 1)
    mask = g.const(g.normal(1, 1, 4, 4), FLOAT)
    return head(g, g.mul(x, g.op("Tile", mask, times, shape=(1, 6, 4, 4))))


@idiom(6)
def repeats_made_by_one_hot(g: Graph) -> Drawn:
    """How often each axis is repeated: a number of rows in a vector of ones."""
    x = image(g)
    times = joined(g, 1, at(g, shape_of(g, x), 2))
    repeats = g.op("OneHot", g.const([2]), g.const([4]), times, shape=(1, 4), dtype=TensorProto.INT64)
    y = g.op("Tile", x, g.op("Reshape", repeats, g.const([-1]), shape=(4,)), shape=("batch", 6, 16, 4))
    return head(g, y)


@idiom(6)
def expand_to_computed_shape(g: Graph) -> Drawn:
    x = image(g)
    mask = g.const(g.normal(1, 1, 4, 4), FLOAT)
    return head(g, g.mul(x, g.op("Expand", mask, shape_of(g, x), shape=x.shape)))


@idiom(6)
def shape_of_a_filter(g: Graph) -> Drawn:
    weight = g.store("weight", g.normal(6, 3, 3, 3))
    x = g.conv(g.input("batch", 3, 4, 4), weight=weight)
    y = g.op("Reshape", x, joined(g, -1, at(g, shape_of(g, weight), 0), 16), shape=("batch", 6, 16))
    return g.gemm(g.flatten(y), 5)


@idiom(6)
def class_token(g: Graph) -> Drawn:
    """A stored vector repeated for each element of the batch and put in front."""
    x = g.input("batch", 4)
    batch = g.op("Slice", shape_of(g, x), g.const([0]), g.const([1]), shape=(1,))
    first = g.op("Expand", g.store("token", g.normal(1, 1, 6)), joined(g, batch, 1, 6), shape=("batch", 1, 6))
    both = g.concat(first, g.unsqueeze(g.matmul(x, 6), 1), axis=1)
    return g.matmul(g.reduce("ReduceSum", both, 1, keepdims=False), 5)


# Heads


def attended(g: Graph, x: Tensor, *swap: int) -> Tensor:
    return g.op("MatMul", g.op("MatMul", x, g.transpose(x, *swap)), x)


@idiom(4, 2)
def heads_left_to_minus_one(g: Graph) -> Drawn:
    x = tokens(g)
    shape = shape_of(g, x)
    lead = at(g, shape, 0), at(g, shape, 1)
    y = g.transpose(g.op("Reshape", x, joined(g, *lead, -1, 2), shape=("batch", "length", 4, 2)), 0, 2, 1, 3)
    y = g.transpose(attended(g, y, 0, 1, 3, 2), 0, 2, 1, 3)
    return g.matmul(g.op("Reshape", y, joined(g, *lead, -1), shape=("batch", "length", 8)), 5)


@idiom(4, 2)
def heads_beside_the_batch(g: Graph) -> Drawn:
    """Heads seen as more elements of the batch, with a -1."""
    x = tokens(g)
    y = g.transpose(g.reshape(x, 0, -1, 4, 2, shape=("batch", "length", 4, 2)), 0, 2, 1, 3)
    shape = shape_of(g, y)
    y = g.op("Reshape", y, joined(g, -1, at(g, shape, 2), 2), shape=("rows", "length", 2))
    y = g.op("Reshape", attended(g, y, 0, 2, 1), shape, shape=("batch", 4, "length", 2))
    y = g.reshape(g.transpose(y, 0, 2, 1, 3), 0, 0, 8, shape=("batch", "length", 8))
    return g.matmul(y, 5)


@idiom(4, 2)
def batch_counted_back_from_its_heads(g: Graph) -> Drawn:
    """What reads the number of all heads divides it by a stored number of heads."""
    x = tokens(g)
    y = g.transpose(g.reshape(x, 0, 0, 4, 2, shape=("batch", "length", 4, 2)), 0, 2, 1, 3)
    rows = g.op("Mul", at(g, shape_of(g, x), 0), g.const([4]))
    y = attended(g, g.op("Reshape", y, joined(g, rows, -1, 2), shape=("rows", "length", 2)), 0, 2, 1)
    batch = g.op("Div", at(g, shape_of(g, y), 0), g.const([4]))
    y = g.op("Reshape", y, joined(g, batch, 4, -1, 2), shape=("batch", 4, "length", 2))
    y = g.reshape(g.transpose(y, 0, 2, 1, 3), 0, 0, 8, shape=("batch", "length", 8))
    return g.matmul(y, 5)


@idiom(4, 2)
def heads_beside_a_stored_batch(g: Graph) -> Drawn:
    """The same with every extent written down."""
    x = g.matmul(g.input(5, 2, 6), 8)
    y = g.transpose(g.reshape(x, 5, 8, 2), 1, 0, 2)
    y = g.transpose(attended(g, y, 0, 2, 1), 1, 0, 2)
    return g.matmul(g.reshape(y, 5, 2, 8), 5)


@idiom(8, 6)
def tokens_as_rows(g: Graph) -> Drawn:
    x = tokens(g)
    y = g.relu(g.gemm(g.reshape(x, -1, 8, shape=("rows", 8)), 6))
    shape = joined(g, at(g, shape_of(g, x), 0), -1, 6)
    return g.matmul(g.op("Reshape", y, shape, shape=("batch", "length", 6)), 5)


# One tensor in two places of a node


@idiom(6)
def square(g: Graph) -> Drawn:
    x = image(g)
    return head(g, g.mul(x, x))


@idiom(6, 4)
def three_times_itself(g: Graph) -> Drawn:
    x = image(g)
    return head(g, g.conv(g.bn(g.concat(x, x, g.relu(x))), 4, 1))


@idiom(6)
def gram_over_positions(g: Graph) -> Drawn:
    x = g.reshape(image(g), 0, 6, 16)
    return g.matmul(g.flatten(g.op("MatMul", x, g.transpose(x, 0, 2, 1))), 5)


@idiom(6)
def gram_over_channels(g: Graph) -> Drawn:
    x = g.reshape(image(g), 0, 6, 16)
    return g.matmul(g.flatten(g.op("MatMul", g.transpose(x, 0, 2, 1), x)), 5)


@idiom(6)
def gram_by_einsum(g: Graph) -> Drawn:
    x = g.reshape(image(g), 0, 6, 16)
    return g.matmul(g.flatten(g.op("Einsum", x, x, equation="bcs,bds->bcd")), 5)


@idiom()
def square_matrix_times_itself(g: Graph) -> Drawn:
    """Channels and columns become one axis, and columns come from the image."""
    x = g.slice(g.reshape(image(g), 0, 6, 16), [0], [6], [2])
    return g.matmul(g.flatten(g.op("MatMul", x, x)), 5)


@idiom(6)
def chosen_from_itself(g: Graph) -> Drawn:
    x = image(g)
    return head(g, g.op("Where", g.op("Greater", x, g.const(0.0, FLOAT)), x, x))


# One weight in two places


def tied(g: Graph) -> tuple[Tensor, Tensor]:
    return g.matmul(g.input("batch", 4), 6), g.store("tied", g.normal(6, 6))


@idiom(6)
def matrix_twice(g: Graph) -> Drawn:
    x, weight = tied(g)
    return g.matmul(g.op("MatMul", g.relu(g.op("MatMul", x, weight)), weight), 3)


@idiom(6, 6)
def matrix_and_its_transpose(g: Graph) -> Drawn:
    x, weight = tied(g)
    y = g.relu(g.op("MatMul", x, weight))
    return g.matmul(g.op("MatMul", y, g.transpose(weight, 1, 0)), 3)


@idiom(6, 6)
def matrix_by_gemm_both_ways(g: Graph) -> Drawn:
    x, weight = tied(g)
    return g.matmul(g.op("Gemm", g.relu(g.op("Gemm", x, weight, transB=1)), weight), 3)


@idiom(6, 6)
def matrix_squared_by_element(g: Graph) -> Drawn:
    x, weight = tied(g)
    return g.matmul(g.op("MatMul", x, g.mul(weight, weight)), 3)


@idiom(6, 6)
def matrix_times_its_transpose(g: Graph) -> Drawn:
    x, weight = tied(g)
    return g.matmul(g.op("MatMul", x, g.op("MatMul", g.transpose(weight, 1, 0), weight)), 3)


@idiom()
def matrix_is_an_output(g: Graph) -> Drawn:
    x, weight = tied(g)
    return g.matmul(g.op("MatMul", x, weight), 3), g.op("Identity", weight)


@idiom()
def stored_matrix_is_an_output(g: Graph) -> Drawn:
    x, weight = tied(g)
    model = g.model(g.matmul(g.op("MatMul", x, weight), 3))
    model.graph.output.append(weight.value_info())
    return model


@idiom(6)
def bias_is_an_output(g: Graph) -> Drawn:
    """The graph goes on giving the whole bias."""
    bias = g.store("bias", g.normal(6))
    model = g.model(head(g, g.relu(g.conv(g.input("batch", 3, 4, 4), 6, bias=bias))))
    model.graph.output.append(bias.value_info())
    return model


@idiom(6)
def bias_is_read_in_a_branch(g: Graph) -> Drawn:
    bias = g.store("bias", g.normal(6))
    x = g.input("batch", 3, 4, 4)
    y = g.gemm(g.flatten(g.gap(g.relu(g.conv(x, 6, bias=bias)))), 6)

    def branch(op_type: str) -> onnx.GraphProto:
        result = Tensor(f"{op_type}.result", (6,))
        return helper.make_graph(
            [helper.make_node(op_type, ["bias"], [result.name])], op_type, [], [result.value_info()]
        )

    condition = g.op("Greater", g.op("ReduceSum", x, keepdims=0), g.const(0.0, FLOAT))
    chosen = Tensor("chosen", (6,))
    g.nodes.append(
        helper.make_node(
            "If", [condition.name], [chosen.name], then_branch=branch("Neg"), else_branch=branch("Abs")
        )
    )
    return g.add(y, chosen)


@idiom(6, 6)
def bias_of_two_and_of_the_output(g: Graph) -> Drawn:
    bias = g.store("bias", g.normal(6))
    x = g.relu(g.conv(g.input("batch", 3, 4, 4), 6, bias=bias))
    x = g.relu(g.conv(x, 6, bias=bias))
    return g.add(g.gemm(g.flatten(g.gap(x)), 6), bias)


@idiom(6)
def vector_over_channels_and_over_columns(g: Graph) -> Drawn:
    vector = g.store("vector", g.normal(6))
    x = g.conv(g.input("batch", 3, 6, 6), 6)
    return head(g, g.add(g.mul(x, vector), g.reshape(vector, 6, 1, 1)))


@idiom(6, 6)
def one_vector_for_all_of_two_normalisations(g: Graph) -> Drawn:
    vector = g.store("vector", g.uniform(0.5, 1.5, 6))
    x = g.op("BatchNormalization", image(g), *[vector] * 4)
    return head(g, g.op("BatchNormalization", g.conv(x, 6), *[vector] * 4))


@idiom(6)
def depthwise_filter_of_two_branches(g: Graph) -> Drawn:
    weight = g.store("depthwise", g.normal(6, 1, 3, 3))
    x = g.input("batch", 3, 4, 4)
    a, b = (g.conv(g.conv(x, 6, 1), weight=weight, group=6, bias=False) for _ in range(2))
    return g.gemm(g.flatten(a), 5), g.gemm(g.flatten(b), 5)


@idiom(6, 6)
def one_stored_shape_for_two_maps(g: Graph) -> Drawn:
    shape = g.const([0, 6, 16])
    x = image(g)
    a, b = (g.op("Reshape", y, shape) for y in (x, g.conv(x, 6)))
    return g.matmul(g.flatten(g.op("MatMul", a, g.transpose(b, 0, 2, 1))), 5)


@idiom(2, 4, 2, 4)
def stored_sizes_for_two_splits(g: Graph) -> Drawn:
    sizes = g.const([2, 4])
    x = image(g)
    a, b = g.ops("Split", x, sizes, outputs=2, axis=1)
    c, _ = g.ops("Split", g.conv(x, 6), sizes, outputs=2, axis=1)
    return head(g, g.concat(b, c)), head(g, a)


@idiom(4)
def one_stored_number_for_start_and_axis(g: Graph) -> Drawn:
    one = g.const([1])
    return head(g, g.op("Slice", image(g), one, g.const([5]), one))


# Weights that are computed


@idiom(4, 5)
def filters_joined(g: Graph) -> Drawn:
    weight = g.concat(g.store("a", g.normal(4, 3, 3, 3)), g.store("b", g.normal(5, 3, 3, 3)), axis=0)
    return g.gemm(g.flatten(g.conv(g.input("batch", 3, 4, 4), weight=weight)), 5)


@idiom(4, 5)
def filters_split(g: Graph) -> Drawn:
    x = g.input("batch", 3, 4, 4)
    parts = g.split(g.store("both", g.normal(9, 3, 3, 3)), [4, 5], axis=0)
    first, second = (g.gemm(g.flatten(g.conv(x, weight=part, bias=False)), 5) for part in parts)
    return first, second


@idiom(3, 6)
def matrix_of_low_rank(g: Graph) -> Drawn:
    weight = g.op("MatMul", g.store("u", g.normal(8, 3)), g.store("v", g.normal(3, 6)))
    return g.matmul(g.relu(g.op("MatMul", g.input("batch", 8), weight)), 5)


@idiom(6)
def matrix_over_its_own_sum(g: Graph) -> Drawn:
    weight = g.store("weight", g.normal(8, 6))
    scaled = g.op("Div", weight, g.reduce("ReduceSum", g.op("Abs", weight), 0))
    return g.matmul(g.relu(g.op("MatMul", g.input("batch", 8), scaled)), 5)


@idiom(6)
def map_over_the_norm_of_its_filter(g: Graph) -> Drawn:
    weight = g.store("weight", g.normal(6, 3, 3, 3))
    norm = g.reduce("ReduceSum", g.mul(weight, weight), 1, 2, 3)
    x = g.conv(g.input("batch", 3, 6, 6), weight=weight)
    return head(g, g.op("Div", x, g.reshape(norm, 1, -1, 1, 1)))


@idiom(6, 4)
def filters_standardised(g: Graph) -> Drawn:
    """Filters are brought to mean zero and variance one by a normalisation in training mode: what makes
    units is cut; what reads them takes statistics over what stays."""
    x = g.input("batch", 3, 4, 4)
    for width, inner in ((6, 3), (4, 6)):
        flat = g.op(
            "Reshape", g.store(f"filter{width}", g.normal(width, inner, 3, 3)), g.const([1, width, -1])
        )
        vectors = (g.const(np.full(width, v), FLOAT) for v in (1.5, 0.0, 0.0, 1.0))
        flat, *_ = g.ops("BatchNormalization", flat, *vectors, outputs=3, training_mode=1)
        x = g.relu(g.conv(x, weight=g.reshape(flat, width, inner, 3, 3)))
    return head(g, x)


@idiom(6)
def filter_stored_flat(g: Graph) -> Drawn:
    weight = g.reshape(g.store("flat", g.normal(162)), 6, 3, 3, 3)
    return head(g, g.conv(g.input("batch", 3, 4, 4), weight=weight))


@idiom(6)
def constant_plus_constant(g: Graph) -> Drawn:
    vector = g.add(g.const(g.normal(6, 1, 1), FLOAT), g.const(g.normal(1, 6, 1, 1), FLOAT))
    return g.gemm(g.flatten(g.mul(image(g), vector)), 5)


# Odd cuts and joins


@idiom(2, 2)
def flattened_then_split(g: Graph) -> Drawn:
    """The halves of a flattened map are halves of its channels."""
    x = g.conv(image(g), 12, 3, group=3)
    a, b = g.split(g.flatten(x), 2)
    return g.gemm(g.add(a, b), 5)


@idiom(2, 3)
def flattened_then_split_inside_a_channel(g: Graph) -> Drawn:
    """A boundary at 40 of 6 x 16: two channels before it, one across, three behind."""
    a, b = g.split(g.flatten(image(g)), [40, 56])
    return g.gemm(a, 5), g.gemm(b, 5)


@idiom(3, 5)
def nothing_sliced(g: Graph) -> Drawn:
    x = image(g, 8)
    return head(g, g.concat(g.slice(x, [3], [3], [1]), x))


@idiom(8)
def nothing_split_off(g: Graph) -> Drawn:
    return head(g, g.relu(g.split(image(g, 8), [0, 8])[1]))


@idiom(2, 4, 2, 2, 2, 2, 2)
def shuffled_in_twos_and_fours(g: Graph) -> Drawn:
    x = g.conv(image(g, 8), 8, 3, group=2)
    x = g.conv(g.channel_shuffle(x, 2), 8, 3, group=2)
    return head(g, g.conv(g.channel_shuffle(x, 4), 8, 3, group=4))


@idiom(4)
def shortcut_padded_with_zeros(g: Graph) -> Drawn:
    """The narrow map decides; what it is padded with stays."""
    x = image(g, 4)
    return head(g, g.add(g.conv(x, 6), g.op("Pad", x, g.const([0, 1, 0, 0, 0, 1, 0, 0]))))


@idiom(2)
def positions_in_a_matrix(g: Graph) -> Drawn:
    y = g.op("Gather", image(g), g.const([[0, 2], [4, 1]]), axis=1)
    return g.gemm(g.reduce("ReduceSum", y, 2, 3, 4, keepdims=False), 5)


@idiom()
def ranked_channels(g: Graph) -> Drawn:
    x = g.flatten(g.gap(image(g)))
    return g.matmul(halves(g, "TopK", x, g.const([3]), "batch", 3)[0], 5)


@idiom(6)
def flattened_with_the_batch(g: Graph) -> Drawn:
    return g.gemm(g.op("Flatten", g.conv(g.input(2, 3, 4, 4), 6), axis=0), 5)


@idiom(6)
def summed_over_everything(g: Graph) -> Drawn:
    x = image(g)
    return g.gemm(g.flatten(g.mul(x, g.reduce("ReduceSum", x, 1, 2, 3))), 5)


@idiom(6)
def averaged_over_the_batch(g: Graph) -> Drawn:
    x = g.conv(g.input(4, 3, 4, 4), 6)
    return head(g, g.add(x, g.reduce("ReduceMean", x, 0)))


@idiom(6)
def squeezed_at_computed_axes(g: Graph) -> Drawn:
    x = g.gap(g.conv(g.input(2, 3, 4, 4), 6))
    y = g.op("Squeeze", x, g.op("Add", g.const([1, 2]), g.const([1, 1])), shape=(2, 6))
    return g.gemm(y, 5)


@idiom(6)
def clipped_by_vectors_of_one(g: Graph) -> Drawn:
    x = image(g)
    return head(g, g.op("Clip", x, g.const([0.0], FLOAT), g.const([1.0], FLOAT), shape=x.shape))


@idiom(6)
def outer_product(g: Graph) -> Drawn:
    """A matrix of one row makes units like any other."""
    return g.matmul(g.relu(g.matmul(g.input("batch", 1), 6)), 5)


@idiom(6, 4)
def quantised_in_between(g: Graph) -> Drawn:
    scale, zero = g.const(0.05, FLOAT), g.const(0, np.uint8)
    codes = g.op("QuantizeLinear", g.relu(image(g)), scale, zero)
    return head(g, g.conv(g.op("DequantizeLinear", codes, scale, zero), 4, 1))


@idiom(6)
def broadcast_by_einsum(g: Graph) -> Drawn:
    """One label with an extent of one in an operand and of two in the other."""
    weight = g.store("weight", g.normal(1, 4, 6))
    x = g.op("Einsum", g.input(2, 3, 4), weight, equation="bij,bjk->bik", shape=(2, 3, 6))
    return g.matmul(x, 5)


@idiom(6)
def einsum_with_an_ellipsis(g: Graph) -> Drawn:
    x = g.op("Einsum", g.input(2, 3, 4), g.store("weight", g.normal(4, 6)), equation="...j,jk->...k")
    return g.matmul(x, 5)


# Reading and writing at positions


def rows_of(g: Graph, width: int = 8) -> Tensor:
    """Five rows of features; positions among them are stored."""
    return g.matmul(g.input(5, 6, name="rows"), width)


@idiom(8)
def rows_by_element(g: Graph) -> Drawn:
    """For each feature another choice of rows: the choices of removed features go along."""
    index = g.const(np.arange(24).reshape(3, 8) % 5)
    y = g.op("GatherElements", rows_of(g), index, axis=0)
    return g.matmul(g.relu(y), 5)


@idiom(4)
def features_by_element(g: Graph) -> Drawn:
    """Features are picked by their position; how many are picked may change."""
    index = g.const(np.arange(20).reshape(5, 4) % 8)
    return g.matmul(g.op("GatherElements", rows_of(g), index, axis=1), 5)


@idiom(8)
def rows_by_number(g: Graph) -> Drawn:
    y = g.op("GatherND", rows_of(g), g.const([[4], [0], [2]]), shape=(3, 8))
    return g.matmul(g.relu(y), 5)


@idiom(3)
def elements_by_number(g: Graph) -> Drawn:
    """What is picked may go, with its number; what it is picked from may not."""
    y = g.op("GatherND", rows_of(g), g.const([[[4, 7], [0, 1], [2, 5]]]), shape=(1, 3))
    return g.matmul(y, 5)


@idiom(8)
def rows_written_by_element(g: Graph) -> Drawn:
    """Updates are as wide as what they are written to."""
    index = g.const(np.arange(24).reshape(3, 8) % 5)
    updates = g.matmul(g.input(3, 4, name="updates"), 8)
    y = g.op("ScatterElements", rows_of(g), index, updates, axis=0)
    return g.matmul(g.relu(y), 5)


@idiom()
def features_written_by_element(g: Graph) -> Drawn:
    index = g.const(np.arange(20).reshape(5, 4))
    index = g.op("Mod", index, g.const(8))
    updates = g.matmul(g.input(5, 3, name="updates"), 4)
    return g.matmul(g.op("ScatterElements", rows_of(g), index, updates, axis=1, reduction="add"), 5)


@idiom(8)
def rows_written_by_number(g: Graph) -> Drawn:
    updates = g.matmul(g.input(2, 4, name="updates"), 8)
    y = g.op("ScatterND", rows_of(g), g.const([[4], [1]]), updates, shape=(5, 8))
    return g.matmul(g.relu(y), 5)


@idiom(8, 8)
def messages_are_summed(g: Graph) -> Drawn:
    """What edges carry is added up at their ends, in zeros of the shape of the nodes' features."""
    x = rows_of(g)
    messages = g.relu(g.matmul(g.op("Gather", x, g.const([0, 1, 1, 3, 4, 2, 0]), axis=0), 8))
    zeros = g.op("ConstantOfShape", shape_of(g, x), shape=(5, 8), dtype=TensorProto.FLOAT)
    ends = g.op("Expand", g.const([[2], [2], [0], [4], [1], [3], [2]]), shape_of(g, messages), shape=(7, 8))
    y = g.op("ScatterElements", zeros, ends, messages, axis=0, reduction="add", shape=(5, 8))
    return g.matmul(y, 5)


@idiom(8)
def zeros_that_stay_whole(g: Graph) -> Drawn:
    """The shape is that of features which are cut, but what is made from it goes to an output."""
    x = rows_of(g)
    zeros = g.op("ConstantOfShape", shape_of(g, x), shape=(5, 8), dtype=TensorProto.FLOAT)
    return g.matmul(g.relu(x), 5), g.add(zeros, g.input(5, 8, name="state"))


@idiom(8)
def a_row_repeated_that_stays_whole(g: Graph) -> Drawn:
    x = tokens(g)
    row = g.op("Expand", g.const(g.normal(8), FLOAT), shape_of(g, x), shape=("batch", "length", 8))
    return g.matmul(g.relu(x), 5), g.op("Tanh", row)


@idiom(4, 2)
def causal_scores(g: Graph) -> Drawn:
    """The upper triangle of the scores of each head is left out."""
    x = tokens(g)
    y = g.transpose(g.reshape(x, 0, -1, 4, 2, shape=("batch", "length", 4, 2)), 0, 2, 1, 3)
    scores = g.op("Trilu", g.op("MatMul", y, g.transpose(y, 0, 1, 3, 2)), upper=0)
    y = g.transpose(g.op("MatMul", scores, y), 0, 2, 1, 3)
    return g.matmul(g.reshape(y, 0, 0, 8, shape=("batch", "length", 8)), 5)


@idiom()
def triangle_of_features(g: Graph) -> Drawn:
    return g.matmul(g.op("Trilu", rows_of(g)), 5)


@idiom(6)
def positions_that_are_not_zero(g: Graph) -> Drawn:
    """Which features are not zero is a result: they stay, those before them go."""
    x = g.relu(g.matmul(g.relu(rows_of(g, 6)), 8))
    return g.op("NonZero", x)


@idiom()
def diagonal_of_features(g: Graph) -> Drawn:
    x = rows_of(g)
    return g.matmul(g.add(x, g.op("EyeLike", x, k=1)), 5)


@idiom(6)
def regions_of_an_image(g: Graph) -> Drawn:
    rois = g.const([[0, 0, 3, 3], [1, 0, 2, 3], [0, 1, 3, 2]], FLOAT)
    y = g.op(
        "RoiAlign", image(g), rois, g.const([0, 0, 0]), output_height=2, output_width=2, sampling_ratio=1
    )
    return head(g, y)


@idiom(6, 4)
def deformed_filter(_: Graph) -> Drawn:
    """Offsets of each of the nine positions, made from the image beside the features."""
    g = Graph(opset=19)
    x = image(g)
    offsets = g.conv(x, 18, 3)
    weight = g.store("deformed", g.normal(4, 6, 3, 3))
    y = g.op(
        "DeformConv", x, weight, offsets, pads=[1, 1, 1, 1], kernel_shape=[3, 3], shape=("batch", 4, 4, 4)
    )
    return g.model(head(g, g.relu(y)))


@idiom(8)
def sequences_read_backwards(g: Graph) -> Drawn:
    x = g.matmul(g.input(4, 3, 6, name="tokens"), 8)
    y = g.op("ReverseSequence", x, g.const([4, 1, 2]), time_axis=0, batch_axis=1)
    return g.matmul(g.relu(y), 5)


@idiom()
def features_read_backwards(g: Graph) -> Drawn:
    y = g.op("ReverseSequence", rows_of(g), g.const([4, 1, 2, 8, 5]), time_axis=1, batch_axis=0)
    return g.matmul(y, 5)


# Extents that are only measured, or computed with


@idiom(8)
def length_of_one_feature(g: Graph) -> Drawn:
    """The last feature is picked for its shape alone."""
    x = tokens(g)
    one = g.op("Gather", x, g.const(-1), axis=2, shape=("batch", "length"))
    zeros = g.op("ConstantOfShape", shape_of(g, one), shape=("batch", "length"), dtype=TensorProto.FLOAT)
    return g.matmul(g.add(x, g.unsqueeze(zeros, 2)), 5)


@idiom(7)
def last_feature_is_read(g: Graph) -> Drawn:
    """The same feature, now for its value: it stays."""
    x = tokens(g)
    one = g.op("Gather", x, g.const([-1]), axis=2, shape=("batch", "length", 1))
    return g.matmul(x, 5), one


@idiom(4, 2)
def heads_times_a_computed_batch(g: Graph) -> Drawn:
    """nn.MultiheadAttention, positions first: batch and heads are one axis, whose extent is multiplied out."""
    x = g.matmul(g.input("length", "batch", 6, name="tokens"), 8)
    shape = shape_of(g, x)
    rows = g.op("Mul", at(g, shape, 1), g.const([4]))
    y = g.op("Reshape", x, joined(g, at(g, shape, 0), rows, 2), shape=("length", "rows", 2))
    y = g.transpose(y, 1, 0, 2)
    y = g.transpose(attended(g, y, 0, 2, 1), 1, 0, 2)
    return g.matmul(g.op("Reshape", y, shape, shape=("length", "batch", 8)), 5)
