"""One use of a weight: its canonical matrix, what a map between channels does to it, and its bias, through
onnxruntime."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper

from models.attention import ATTENTION
from models.builder import Graph, Tensor
from models.quantised import QUANTISED
from models.recurrent import RECURRENT
from models.topologies import TOPOLOGIES
from models.transformers import TRANSFORMERS
from onnxprune import axes, passes, rewrite, surgery
from onnxprune.blocks import Blocks
from onnxprune.dependency import DependencyGraph
from onnxprune.model import Model
from onnxprune.parts import inner_values
from onnxprune.passes import Options
from onnxprune.plan import SetWeight
from onnxprune.readers import Reader, Readers, Source
from onnxprune.repair.channels import cut
from onnxprune.repair.weights import Weights
from onnxprune.runtime import Session
from tests.reference import Array, feeds, graph_of

Draw = Callable[[Graph], Tensor]
CASES: dict[str, tuple[Draw, tuple[int, int, int, int]]] = {}
"""Networks with one reader (the last one), and the shape of its matrix."""


def case(*shape: int) -> Callable[[Draw], Draw]:
    def register(draw: Draw) -> Draw:
        groups, outputs, channels, taps = shape
        CASES[draw.__name__] = draw, (groups, outputs, channels, taps)
        return draw

    return register


def image(g: Graph, channels: int, *sides: int) -> Tensor:
    return g.input("batch", channels, *sides)


def conv(g: Graph, x: Tensor, *shape: int, bias: bool = True, **attributes: object) -> Tensor:
    """A convolution whose attributes are all said here."""
    operands = [g.store("w", g.normal(*shape)), *([g.store("c", g.normal(shape[0]))] if bias else [])]
    return g.op("Conv", x, *operands, **attributes)


@case(1, 5, 4, 9)
def conv_3x3(g: Graph) -> Tensor:
    return conv(g, image(g, 4, 6, 7), 5, 4, 3, 3, pads=[1, 1, 1, 1])


@case(1, 5, 4, 6)
def conv_strided_dilated_uneven(g: Graph) -> Tensor:
    shape = 5, 4, 3, 2
    return conv(g, image(g, 4, 9, 8), *shape, strides=[2, 3], dilations=[2, 1], pads=[3, 0, 1, 1])


@case(1, 5, 4, 9)
def conv_same_upper(g: Graph) -> Tensor:
    return conv(g, image(g, 4, 6, 8), 5, 4, 3, 3, auto_pad="SAME_UPPER", strides=[2, 2])


@case(1, 5, 4, 9)
def conv_same_lower(g: Graph) -> Tensor:
    return conv(g, image(g, 4, 6, 8), 5, 4, 3, 3, auto_pad="SAME_LOWER", strides=[2, 2])


@case(1, 5, 4, 4)
def conv_valid_without_bias(g: Graph) -> Tensor:
    return conv(g, image(g, 4, 6, 6), 5, 4, 2, 2, auto_pad="VALID", bias=False)


@case(1, 5, 4, 1)
def conv_1x1_with_a_border(g: Graph) -> Tensor:
    return conv(g, image(g, 4, 3, 3), 5, 4, 1, 1, pads=[1, 0, 1, 2])


@case(1, 5, 4, 1)
def conv_1x1(g: Graph) -> Tensor:
    return conv(g, image(g, 4, 3, 3), 5, 4, 1, 1)


@case(3, 2, 4, 3)
def conv_grouped_1d(g: Graph) -> Tensor:
    return conv(g, image(g, 12, 9), 6, 4, 3, group=3, pads=[1, 1])


@case(6, 2, 1, 9)
def conv_depthwise(g: Graph) -> Tensor:
    return conv(g, image(g, 6, 5, 5), 12, 1, 3, 3, group=6)


@case(1, 3, 2, 12)
def conv_3d(g: Graph) -> Tensor:
    return conv(g, image(g, 2, 4, 5, 6), 3, 2, 2, 3, 2, pads=[1, 0, 1, 0, 1, 0], strides=[2, 1, 2])


@case(1, 5, 4, 4)
def conv_transpose(g: Graph) -> Tensor:
    return g.conv_transpose(image(g, 4, 3, 4), 5)


@case(2, 3, 2, 9)
def conv_transpose_grouped(g: Graph) -> Tensor:
    x = image(g, 4, 4, 5)
    w, c = g.store("w", g.normal(4, 3, 3, 3)), g.store("c", g.normal(6))
    border = {"pads": [1, 0, 0, 1], "dilations": [1, 2], "output_padding": [1, 0]}
    return g.op("ConvTranspose", x, w, c, group=2, strides=[2, 1], **border)


@case(4, 1, 1, 3)
def conv_transpose_depthwise_same(g: Graph) -> Tensor:
    x = image(g, 4, 5)
    return g.op(
        "ConvTranspose", x, g.store("w", g.normal(4, 1, 3)), group=4, strides=[2], auto_pad="SAME_UPPER"
    )


@case(1, 4, 3, 3)
def conv_transpose_of_stated_size(g: Graph) -> Tensor:
    x, w = image(g, 3, 5), g.store("w", g.normal(3, 4, 3))
    return g.op("ConvTranspose", x, w, strides=[2], output_shape=[10])


@case(1, 5, 6, 1)
def gemm(g: Graph) -> Tensor:
    return g.gemm(g.input("batch", 6), 5, alpha=0.5, beta=3.0)


@case(1, 5, 6, 1)
def gemm_turned(g: Graph) -> Tensor:
    return g.gemm(g.input(6, "batch"), 5, trans_a=True, trans_b=False, alpha=-2.0)


@case(1, 5, 6, 1)
def gemm_without_bias(g: Graph) -> Tensor:
    return g.gemm(g.input("batch", 6), 5, alpha=0.5, bias=False)


@case(1, 5, 6, 1)
def matmul(g: Graph) -> Tensor:
    return g.matmul(g.input("batch", 3, 6), 5, bias=True)


@case(1, 5, 6, 1)
def matmul_bias_in_front(g: Graph) -> Tensor:
    return g.add(g.const(g.normal(5), np.float32), g.matmul(g.input("batch", 3, 6), 5))


@case(1, 5, 6, 1)
def matmul_weight_on_the_left(g: Graph) -> Tensor:
    return g.op("MatMul", g.store("w", g.normal(5, 6)), g.input("batch", 6, 3))


@case(3, 5, 6, 1)
def matmul_batched(g: Graph) -> Tensor:
    return g.op("MatMul", g.input("batch", 3, 2, 6), g.store("w", g.normal(3, 6, 5)))


@case(1, 5, 6, 1)
def einsum_pointwise(g: Graph) -> Tensor:
    return g.op("Einsum", image(g, 6, 2, 3), g.store("w", g.normal(5, 6)), equation="bchw,oc->bohw")


@case(3, 5, 6, 1)
def einsum_heads(g: Graph) -> Tensor:
    x, w = g.input("batch", 4, 3, 6), g.store("w", g.normal(6, 3, 5))
    return g.op("Einsum", x, w, equation="bshd,dhe->bshe")


def recurrent(g: Graph, op: str, gates: int, **attributes: object) -> Tensor:
    ways = 2 if attributes.get("direction") == "bidirectional" else 1
    parts = g.normal(ways, gates * 4, 6), g.normal(ways, gates * 4, 4), g.normal(ways, 8 * gates)
    stored = [g.store(f"p{i}", part) for i, part in enumerate(parts)]
    return g.ops(op, g.input(5, "batch", 6), *stored, outputs=2, hidden_size=4, **attributes)[0]


@case(1, 32, 6, 1)
def lstm(g: Graph) -> Tensor:
    return recurrent(g, "LSTM", 4, direction="bidirectional")


@case(1, 12, 6, 1)
def gru(g: Graph) -> Tensor:
    return recurrent(g, "GRU", 3, direction="reverse", linear_before_reset=1)


@case(1, 4, 6, 1)
def rnn(g: Graph) -> Tensor:
    return recurrent(g, "RNN", 1)


@case(1, 24, 6, 1)
def fused_attention(g: Graph) -> Tensor:
    w, c = g.store("w", g.normal(6, 24)), g.store("c", g.normal(24))
    shape = ("batch", 3, 8)
    return g.op("Attention", g.input("batch", 3, 6), w, c, domain="com.microsoft", shape=shape, num_heads=2)


@case(1, 7, 5, 12)
def flattened(g: Graph) -> Tensor:
    return g.gemm(g.flatten(g.relu(conv_1x1_wide(g, 4, 3))), 7)


def conv_1x1_wide(g: Graph, *sides: int) -> Tensor:
    return conv(g, image(g, 4, *sides), 5, 4, 1, 1)


@case(1, 7, 5, 12)
def flattened_channels_last(g: Graph) -> Tensor:
    return g.gemm(g.flatten(g.transpose(g.relu(conv_1x1_wide(g, 4, 3)), 0, 2, 3, 1)), 7, trans_b=False)


@case(1, 7, 5, 12)
def flattened_between(g: Graph) -> Tensor:
    return g.matmul(g.flatten(g.transpose(g.relu(conv_1x1_wide(g, 4, 3)), 0, 2, 1, 3)), 7, bias=True)


@case(1, 3, 9, 9)
def concatenated(g: Graph) -> Tensor:
    x = image(g, 4, 5, 5)
    both = g.concat(g.relu(g.conv(x, 5)), g.relu(g.conv(x, 4)))
    return g.conv(both, 3, 3)


@case(1, 3, 4, 9)
def taken_apart(g: Graph) -> Tensor:
    first, _ = g.split(g.relu(g.conv(image(g, 4, 5, 5), 10)), [4, 6])
    return g.conv(first, 3, 3)


@case(1, 3, 5, 36)
def space_to_depth(g: Graph) -> Tensor:
    """Each channel is on the axis four times, a quarter of its positions each."""
    x = g.relu(g.conv(image(g, 4, 8, 8), 5))
    return g.conv(g.op("SpaceToDepth", x, blocksize=2), 3, 3)


class Net:
    """A case with its last reader, whose source can be given."""

    def __init__(self, draw: Draw) -> None:
        g = Graph(seed=3)
        self.proto = g.model(draw(g))
        self.graph = graph_of(self.proto)
        self.reader = Readers(self.graph).all[-1]
        if self.reader.node.op in ("LSTM", "GRU", "RNN"):
            self.reader = Readers(self.graph).all[0]  # the last one reads the state
        self.model = self.graph.model
        self.weight = self.model.array(self.reader.weight)
        self.feeds = feeds(self.proto, batch=3, seed=5)
        self.source = self.reader.source
        if self.source.tensor in self.feeds:
            self.value = self.feeds[self.source.tensor]
        else:
            run = inner_values(self.model, self.graph.shapes, [self.source.tensor])
            self.value = run(self.feeds)[self.source.tensor]

    def run(self, value: Array, proto: onnx.ModelProto | None = None, **weights: Array) -> Array:
        """The output for a value of the source, and for other weights."""
        model = Model(proto or self.proto)
        edited = rewrite.apply(model, [SetWeight(name, array) for name, array in weights.items()])
        name = self.source.tensor
        if name not in self.feeds:
            kept = [node for node in edited.graph.node if name not in node.output]
            del edited.graph.node[:]
            edited.graph.node.extend(kept)
            edited.graph.input.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, None))
        return next(iter(Session(edited).run({**self.feeds, name: value}).values()))


def mapped(source: Source, value: Array, maps: Array) -> Array:
    """x with its channels mapped, maps [groups, channels, channels]: said anew, on the tensor's own axes."""
    result = np.zeros(value.shape)
    extents = [value.shape[a] for a in source.moved]
    layout = source.groups // int(np.prod(extents)), source.before, source.size, source.after
    for place in np.ndindex(*extents):
        index: list[slice | int] = [slice(None)] * value.ndim
        for a, at in zip(source.moved, place, strict=True):
            index[a] = at
        axis = source.axis - sum(a < source.axis for a in source.moved)
        part = np.moveaxis(value[tuple(index)], axis, -1).astype(np.float64)
        flat = part.reshape(*part.shape[:-1], *layout)
        first = int(np.ravel_multi_index(place, extents)) * layout[0] if extents else 0
        new = np.einsum("gij,...gbja->...gbia", maps[first : first + layout[0]], flat)
        result[tuple(index)] = np.moveaxis(new.reshape(part.shape), -1, axis)
    return result.astype(np.float32)


@pytest.fixture(params=sorted(CASES), scope="module")
def net(request: pytest.FixtureRequest) -> tuple[Net, tuple[int, int, int, int]]:
    draw, shape = CASES[request.param]
    return Net(draw), shape


Given = tuple[Net, tuple[int, int, int, int]]


def test_matrix_and_back(net: Given) -> None:
    """The same numbers, each once, in the stated shape."""
    found, shape = net
    matrix = found.reader.matrix(found.weight)
    assert matrix.shape == found.reader.matrix_shape == shape
    assert matrix.dtype == np.float64
    places = np.arange(found.weight.size, dtype=np.float64).reshape(found.weight.shape)
    np.testing.assert_array_equal(found.reader.weight_of(found.reader.matrix(places)), places)
    np.testing.assert_array_equal(found.reader.weight_of(matrix).astype(np.float32), found.weight)


def test_a_map_folds_into_the_weight(net: Given) -> None:
    """W (M x) = (W M) x, groups each with a map of their own."""
    found, (groups, _, channels, _) = net
    maps = np.random.default_rng(0).standard_normal((groups, channels, channels))
    folded = np.einsum("goit,gij->gojt", found.reader.matrix(found.weight), maps)
    new = found.reader.weight_of(folded).astype(np.float32)
    wanted = found.run(mapped(found.source, found.value, maps))
    got = found.run(found.value, **{found.reader.weight: new})
    assert np.abs(wanted - found.run(found.value)).max() > 1e-2 * np.abs(wanted).max()
    np.testing.assert_allclose(got, wanted, rtol=1e-3, atol=1e-4 * np.abs(wanted).max())


def test_rows_follow_the_channels(net: Given) -> None:
    """Rows of a mapped value are the mapped rows."""
    found, (groups, _, channels, _) = net
    maps = np.random.default_rng(1).standard_normal((groups, channels, channels))
    rows = found.source.rows(found.value)
    assert rows.shape == (groups, found.value.size // groups // channels, channels)
    got = found.source.rows(mapped(found.source, found.value, maps))
    np.testing.assert_allclose(got, rows @ maps.transpose(0, 2, 1), rtol=1e-4, atol=1e-4)


def test_a_shift_of_the_bias_is_a_shift_of_what_is_made(net: Given) -> None:
    """By just so much, alpha and beta, a following Add and a bias that was not there included."""
    found, (groups, outputs, _, _) = net
    reader = found.reader
    if reader.bias is None:
        assert not reader.affine or reader.node.op in ("MatMul", "Einsum")
        return
    rng = np.random.default_rng(2)
    shift = rng.standard_normal((groups, outputs))
    weights = Weights(found.model)
    weights.shift(found.model.producers[reader.bias.node.outputs[0]], reader.bias, shift)
    changed = rewrite.edited(found.model, weights.edits("test"))
    gain = float(reader.node.attributes.get("alpha", 1.0))
    difference = found.run(found.value, changed) - found.run(found.value)
    axis = 1 if reader.node.op in ("Conv", "ConvTranspose") else -1
    wanted = gain * np.moveaxis(
        np.broadcast_to(shift.ravel(), np.moveaxis(difference, axis, -1).shape), -1, axis
    )
    np.testing.assert_allclose(difference, wanted, rtol=1e-3, atol=1e-4)
    again = Weights(found.model)  # twice on one node adds up
    for _ in range(2):
        again.shift(found.model.producers[reader.bias.node.outputs[0]], reader.bias, shift / 2)
    twice = rewrite.edited(found.model, again.edits("test"))
    np.testing.assert_allclose(
        found.run(found.value, twice), found.run(found.value, changed), rtol=1e-4, atol=1e-4
    )


def test_every_affine_case_has_a_bias_but_those_that_cannot() -> None:
    without = {name for name, (draw, _) in CASES.items() if Net(draw).reader.bias is None}
    assert without == {
        "einsum_heads",
        "einsum_pointwise",
        "fused_attention",
        "gru",
        "lstm",
        "matmul_batched",
        "matmul_weight_on_the_left",
        "rnn",
    }


@pytest.mark.parametrize("op", ["LSTM", "GRU", "RNN"])
@pytest.mark.parametrize("direction", ["forward", "bidirectional"])
def test_state_weights(op: str, direction: str) -> None:
    """Permuting the state permutes what its readers read: relabelled units give relabelled states."""
    gates = {"LSTM": 4, "GRU": 3, "RNN": 1}[op]
    g = Graph(seed=3)
    proto = g.model(recurrent(g, op, gates, direction=direction))
    graph = graph_of(proto)
    (reader,) = [r for r in Readers(graph).all if r.weight == "p1"]
    ways = 2 if direction == "bidirectional" else 1
    assert reader.source.tensor == proto.graph.output[0].name
    assert reader.matrix_shape == (ways, gates * 4, 4, 1)
    order = np.stack([np.random.default_rng(way).permutation(4) for way in range(ways)])
    stored = {name: graph.model.array(name) for name in ("p0", "p1", "p2")}
    # outputs by hand: direction, gate, unit
    rows = {
        name: np.stack([a.reshape(ways, -1, 4, *a.shape[2:])[w][:, order[w]] for w in range(ways)])
        for name, a in stored.items()
    }
    new = {name: a.reshape(stored[name].shape) for name, a in rows.items()}
    matrix = reader.matrix(new["p1"])
    new["p1"] = reader.weight_of(np.stack([matrix[w][:, order[w]] for w in range(ways)])).astype(np.float32)
    edits = [SetWeight(name, array) for name, array in new.items()]
    given_ = feeds(proto, batch=2)
    (before,) = Session(proto).run(given_).values()
    (after,) = Session(rewrite.apply(graph.model, edits)).run(given_).values()
    wanted = np.stack([before[:, w][..., order[w]] for w in range(ways)], axis=1)
    np.testing.assert_allclose(after, wanted, rtol=1e-4, atol=1e-5)
    rows_of = reader.source.rows(before)
    for w in range(ways):
        np.testing.assert_array_equal(rows_of[w], before[:, w].reshape(-1, 4))


def test_a_product_of_two_activations_has_no_reader() -> None:
    """It is not linear in the channels of either."""
    g = Graph(seed=0)
    x = g.input("batch", 3, 6)
    y = g.op("Einsum", g.relu(x), x, g.store("w", g.normal(6, 5)), equation="bsi,bsi,io->bso")
    assert not Readers(graph_of(g.model(y))).all


# --------------------------------------------------------------------------------- what a cut leaves of it


def random_keep(graph: DependencyGraph, seed: int) -> axes.Keep:
    rng = np.random.default_rng(seed)
    keep: axes.Keep = {}
    for group in graph.groups:
        mask = rng.random(group.size) < 0.6
        mask[rng.integers(group.size)] = True
        keep[group.var] = mask
    return keep


NETS = {**TOPOLOGIES, **TRANSFORMERS, **ATTENTION, **RECURRENT, **QUANTISED}
SOME = [
    "concat_same_twice",
    "dense_block",
    "depthwise_conv_transpose",
    "flatten_spatial",
    "grouped_conv_transpose",
    "gru",
    "bidirectional_stacked",
    "microsoft_attention",
    "shufflenet_v1_units",
    "space_to_depth",
    "split_concat_add",
    "swin",
]


def check_cut(reader: Reader, keep: axes.Keep) -> None:
    """The cut weight holds what `made` and `channels` say: counted by marking each element with its place."""
    typed = reader.link.inputs[reader.operand]
    assert typed is not None
    shape = tuple(axis.extent for axis in typed)
    groups, outputs, size, taps = reader.matrix_shape
    assert int(np.prod(shape)) == groups * outputs * size * taps
    kept, made = reader.channels(keep), reader.made(keep)
    assert made.shape == (groups, outputs)
    kept = np.ones((groups, size), dtype=bool) if kept is None else kept
    assert kept.shape == (groups, size)
    places = np.arange(int(np.prod(shape)), dtype=np.float64).reshape(shape)
    matrix = reader.matrix(places)
    wanted = np.concatenate([matrix[g][np.ix_(made[g], kept[g])].ravel() for g in range(groups)])
    np.testing.assert_array_equal(np.sort(cut(reader, places, keep).ravel()), np.sort(wanted))


@pytest.mark.parametrize("name", SOME)
@settings(max_examples=5, deadline=None)
@given(seed=st.integers(0, 2**16))
def test_what_stays_is_what_the_cut_leaves(name: str, seed: int) -> None:
    graph = graph_of(NETS[name]())
    readers = Readers(graph).all
    assert readers
    keep = random_keep(graph, seed)
    for reader in readers:
        check_cut(reader, keep)


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(NETS))
def test_what_stays_is_what_the_cut_leaves_anywhere(name: str) -> None:
    graph = graph_of(NETS[name]())
    for seed in range(3):
        keep = random_keep(graph, seed)
        for reader in Readers(graph).all:
            check_cut(reader, keep)


@pytest.mark.parametrize("name", SOME)
def test_units_are_where_the_channels_go(name: str) -> None:
    """Removing one unit of a group removes just the channels that are said to be of it."""
    graph = graph_of(NETS[name]())
    readers = Readers(graph)
    for group in graph.groups:
        for reader in readers.of(group):
            occurrences = reader.units(group)
            assert occurrences
            for unit in {0, group.size - 1}:
                mask = np.arange(group.size) != unit
                kept = reader.channels({group.var: mask})
                here = np.any([units == unit for units in occurrences], axis=0)
                assert here.shape == (reader.source.groups, reader.source.size)
                assert kept is not None
                np.testing.assert_array_equal(kept, ~here)


def test_the_cut_weight_is_that_of_surgery() -> None:
    """Bit for bit, where the model's own plan is carried out."""
    for name in SOME:
        graph = graph_of(NETS[name]())
        blocks = Blocks(graph)
        plan = passes.plan(blocks, Options(channels=0.4, align=1), graph.model.digest())
        keep = surgery.keep_masks(graph, plan)
        pruned = Model(surgery.apply(graph, plan, blocks))
        seen = 0
        for reader in Readers(graph).all:
            node = pruned.producers.get(reader.node.outputs[0])
            assert node is not None
            weight = pruned.array(node.inputs[reader.operand])
            wanted = cut(reader, graph.model.array(reader.weight), keep)
            np.testing.assert_array_equal(weight.reshape(wanted.shape), wanted)
            seen += wanted.size < graph.model.array(reader.weight).size
        assert seen, name
