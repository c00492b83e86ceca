"""Hypothesis strategies: random small networks, drawn with `models.builder`.

A network starts from one image, grows by steps that each read one or two live tensors and add new
ones, and ends in a head of fixed width, so that every channel count between is free to change.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
from hypothesis import assume
from hypothesis import strategies as st
from hypothesis.strategies import DrawFn, SearchStrategy
from onnx import ModelProto, TensorProto
from onnxruntime.capi.onnxruntime_pybind11_state import RuntimeException

from models.builder import Graph, Tensor
from tests.reference import feeds, run

CLASSES = 5
SIDES = (8, 12)  # of images of no given size
WIDTHS = st.integers(2, 12)
MAX_WIDTH = 24
MAX_SIDE = 8
ACTIVATIONS = ("Relu", "Sigmoid", "Tanh", "Softplus", "LeakyRelu", "Elu", "Neg", "HardSigmoid", "Cos")


@dataclass
class Network:
    """A graph that grows: `live` tensors have the shape (batch, channels, height, width)."""

    g: Graph
    draw: DrawFn
    live: list[Tensor] = field(default_factory=list)
    weights: list[Tensor] = field(default_factory=list)

    def pick(self) -> Tensor:
        """One of the last live tensors."""
        return self.live[-1 - self.number(0, min(2, len(self.live) - 1))]

    def number(self, low: int, high: int) -> int:
        return self.draw(st.integers(low, high))

    def choice(self, *options: int) -> int:
        return self.draw(st.sampled_from(options))

    def flag(self) -> bool:
        return self.draw(st.booleans())

    def width(self) -> int:
        return self.draw(WIDTHS)

    def divisor(self, *numbers: int) -> int:
        """A common divisor above 1, or 1 where there is none."""
        common = [d for d in range(2, min(numbers) + 1) if not any(n % d for n in numbers)]
        return self.draw(st.sampled_from(common)) if common else 1

    def conv(self, x: Tensor, width: int, k: int = 1, group: int = 1) -> Tensor:
        y = self.g.conv(x, width, k, group=group, bias=self.flag())
        self.weights.append(self._weight(y))
        return y

    def _weight(self, made: Tensor) -> Tensor:
        node = self.g.nodes[-1]
        assert node.output[0] == made.name
        known = {t.name: tuple(t.dims) for t in self.g.initializers}
        known |= {n.output[0]: tuple(n.attribute[0].t.dims) for n in self.g.nodes if n.op_type == "Constant"}
        return Tensor(node.input[1], known[node.input[1]])

    def vector(self, *shape: int) -> Tensor:
        """Stored numbers away from zero, of both signs."""
        signs = np.where(self.g.rng.random(shape) < 0.3, -1, 1).astype(np.float32)
        return self.g.const(self.g.uniform(0.5, 1.5, *shape) * signs, np.float32)

    def pool(self, x: Tensor) -> Tensor:
        """(batch, channels, 1, 1): the mean over space."""
        if self.flag():
            return self.g.gap(x)
        return self.g.reduce("ReduceMean", x, 2, 3)


Step = Callable[[Network], Tensor | list[Tensor]]
STEPS: dict[str, Step] = {}


def step(function: Step) -> Step:
    """Register a step under its name."""
    STEPS[function.__name__] = function
    return function


# Weights


@step
def convolve(n: Network) -> Tensor:
    return n.conv(n.pick(), n.width(), n.choice(1, 3))


@step
def convolve_normalised(n: Network) -> Tensor:
    return n.g.act(n.g.bn(n.conv(n.pick(), n.width(), n.choice(1, 3))), "relu")


@step
def convolve_grouped(n: Network) -> Tensor:
    x = n.pick()
    group = n.divisor(x.channels)
    return n.conv(x, group * n.number(1, 4), 3, group)


@step
def convolve_depthwise(n: Network) -> Tensor:
    x = n.pick()
    return n.conv(x, x.channels * n.choice(1, 1, 2), 3, x.channels)


@step
def convolve_transposed(n: Network) -> Tensor:
    x = n.pick()
    group = n.divisor(x.channels) if n.flag() else 1
    k, stride, pad = (2, 2, 0) if max(x.spatial) * 2 <= MAX_SIDE else (3, 1, 1)
    width = group * n.number(1, 4)
    return n.g.conv_transpose(x, width, k, stride=stride, pad=pad, group=group, bias=n.flag())


@step
def convolve_with_a_known_filter(n: Network) -> Tensor:
    """The filter of an earlier convolution, where one fits."""
    x = n.pick()
    fitting = [w for w in n.weights if w.rank == 4 and w.extent(1) == x.channels]
    if not fitting:
        return n.conv(x, n.width())
    return n.g.conv(x, weight=n.draw(st.sampled_from(fitting)), bias=n.flag())


@step
def dense_on_channels(n: Network) -> Tensor:
    """A matrix product over the last axis, between two transpositions."""
    x = n.g.transpose(n.pick(), 0, 2, 3, 1)
    return n.g.transpose(n.g.matmul(x, n.width(), bias=n.flag()), 0, 3, 1, 2)


@step
def dense_on_width(n: Network) -> Tensor:
    x = n.pick()
    return n.g.matmul(x, n.choice(4, x.spatial[1]))


@step
def dense_over_everything(n: Network) -> Tensor:
    """Flatten, two Gemms, and back to a map."""
    x = n.pick()
    if n.flag():
        x = n.g.max_pool(x, 2)
    y = n.g.gemm(n.g.flatten(x), n.width(), trans_b=n.flag(), alpha=0.5, beta=2.0)
    side, width = n.choice(1, 2), n.width()
    y = n.g.gemm(n.g.relu(y), width * side * side)
    return n.g.reshape(y, 0, width, side, side)


@step
def contract_by_einsum(n: Network) -> Tensor:
    x, width = n.pick(), n.width()
    weight = n.g.const(n.g.he(width, x.channels, fan_in=x.channels), np.float32)
    return n.g.op("Einsum", x, weight, equation="bchw,oc->bohw")


@step
def filter_behind_transpose(n: Network) -> Tensor:
    x, width = n.pick(), n.width()
    weight = n.g.const(n.g.he(x.channels, width, 1, 1, fan_in=x.channels), np.float32)
    return n.g.conv(x, weight=n.g.transpose(weight, 1, 0, 2, 3))


@step
def attend(n: Network) -> Tensor:
    """Multi-head attention over the positions of a small map, from one joint projection."""
    x = n.pick()
    while x.spatial[0] * x.spatial[1] > 16:
        x = n.g.max_pool(x, 2)
    positions, heads, depth = x.spatial[0] * x.spatial[1], n.choice(1, 2, 3), n.choice(2, 4)
    tokens = n.g.transpose(n.g.reshape(x, 0, 0, positions), 0, 2, 1)
    joint = n.g.matmul(tokens, 3 * heads * depth, bias=n.flag())
    if n.flag():
        whole = n.g.reshape(joint, 0, positions, 3, heads, depth)
        parts = [n.g.op("Squeeze", p, n.g.const([2])) for p in n.g.split(whole, 3, axis=2)]
    else:
        parts = [n.g.reshape(p, 0, positions, heads, depth) for p in n.g.split(joint, 3, axis=2)]
    query, key, value = (n.g.transpose(p, 0, 2, 1, 3) for p in parts)
    scores = n.g.op("MatMul", query, n.g.transpose(key, 0, 1, 3, 2))
    mixed = n.g.op("MatMul", n.g.op("Softmax", n.g.mul(scores, n.g.const(0.5, np.float32)), axis=-1), value)
    flat = n.g.reshape(n.g.transpose(mixed, 0, 2, 1, 3), 0, positions, heads * depth)
    width = n.width()
    result = n.g.transpose(n.g.matmul(flat, width, bias=n.flag()), 0, 2, 1)
    return n.g.reshape(result, 0, width, *x.spatial)


# Elementwise


@step
def activate(n: Network) -> Tensor:
    return n.g.op(n.draw(st.sampled_from(ACTIVATIONS)), n.pick())


@step
def clip(n: Network) -> Tensor:
    return n.g.clip(n.pick(), -1.0, 2.0)


@step
def activate_by_channel(n: Network) -> Tensor:
    x = n.pick()
    return n.g.op("PRelu", x, n.vector(x.channels, 1, 1))


@step
def normalise(n: Network) -> Tensor:
    return n.g.bn(n.pick())


@step
def scale(n: Network) -> Tensor:
    """A product with a stored tensor that broadcasts in one of several ways."""
    x = n.pick()
    c, height, width = x.channels, *x.spatial
    shapes = [(1, c, 1, 1), (c, 1, 1), (), (1,), (width,), (height, 1), (c, 1, width)]
    return n.g.mul(x, n.vector(*n.draw(st.sampled_from(shapes))))


@step
def shift_left(n: Network) -> Tensor:
    """A stored tensor minus the map: the constant is the first operand."""
    x = n.pick()
    return n.g.op("Sub", n.vector(x.channels, 1, 1), x)


@step
def add_residual(n: Network) -> Tensor:
    """A sum with another tensor of the same shape; a convolution makes one where there is none."""
    x = n.pick()
    same = [y for y in n.live if y.shape == x.shape and y is not x]
    if same and n.flag():
        return n.g.add(x, n.draw(st.sampled_from(same)))
    return n.g.add(x, n.conv(n.g.relu(x), x.channels, 3))


@step
def choose(n: Network) -> Tensor:
    x = n.pick()
    return n.g.op("Where", n.g.op("Greater", x, n.g.const(0.0, np.float32)), x, n.vector(x.channels, 1, 1))


@step
def maximum(n: Network) -> Tensor:
    x = n.pick()
    return n.g.op("Max", x, n.conv(x, x.channels), n.vector(x.channels, 1, 1))


@step
def gate(n: Network) -> Tensor:
    """Squeeze and excitation."""
    x, width = n.pick(), n.width()
    y = n.g.op("Sigmoid", n.conv(n.g.relu(n.conv(n.pool(x), width)), x.channels))
    return n.g.mul(x, y)


@step
def gate_by_gemm(n: Network) -> Tensor:
    x, width = n.pick(), n.width()
    y = n.g.gemm(n.g.relu(n.g.gemm(n.g.flatten(n.g.gap(x)), width)), x.channels)
    y = n.g.op("Sigmoid", y)
    if n.flag():
        return n.g.mul(x, n.g.unsqueeze(y, 2, 3))
    first = -1 if n.flag() else 0
    return n.g.mul(x, n.g.reshape(y, first, x.channels, 1, 1, shape=(x.shape[0], x.channels, 1, 1)))


@step
def gate_from_another(n: Network) -> Tensor:
    """Channels of one map scaled by the pooled channels of another of the same width."""
    x = n.pick()
    same = [y for y in n.live if y.channels == x.channels]
    return n.g.mul(x, n.pool(n.draw(st.sampled_from(same))))


@step
def gate_by_sum(n: Network) -> Tensor:
    """A map of one channel, summed over all of them, that gates every channel."""
    x = n.pick()
    y = n.g.reduce("ReduceSum", x, 1, keepdims=True)
    return n.g.mul(x, n.g.op("Sigmoid", y))


@step
def expand(n: Network) -> Tensor:
    """Pooled channels broadcast to the map's own shape, which is computed."""
    x = n.pick()
    return n.g.op("Expand", n.pool(x), n.g.op("Shape", x), shape=x.shape)


# Side by side


@step
def concatenate(n: Network) -> Tensor:
    x = n.pick()
    fitting = [y for y in n.live if y.spatial == x.spatial and y.channels + x.channels <= MAX_WIDTH]
    if not fitting:
        return n.g.relu(x)
    other = n.draw(st.sampled_from(fitting))
    return n.g.concat(x, other) if n.flag() else n.g.concat(other, x)


@step
def concatenate_rows(n: Network) -> Tensor:
    x = n.pick()
    if x.spatial[0] * 2 > MAX_SIDE:
        return n.g.relu(x)
    return n.g.concat(x, n.conv(x, x.channels), axis=2)


@step
def split_equally(n: Network) -> list[Tensor]:
    x = n.pick()
    parts = n.divisor(x.channels)
    return n.g.split(x, parts) if parts <= 4 else [x]


@step
def split_unequally(n: Network) -> list[Tensor]:
    x = n.pick()
    first = n.number(1, x.channels - 1) if x.channels > 1 else 0
    return n.g.split(x, [first, x.channels - first]) if first else [x]


@step
def slice_channels(n: Network) -> Tensor:
    x = n.pick()
    start = n.number(0, x.channels - 1)
    stop = n.number(start + 1, x.channels)
    low, high = start, stop
    if n.flag():
        low, high = start - x.channels, stop - x.channels if stop < x.channels else 2**62
    return n.g.slice(x, [low], [high], [1])


@step
def slice_both(n: Network) -> Tensor:
    """Channels and rows at once."""
    x = n.pick()
    if x.channels < 2 or x.spatial[0] < 2:
        return n.g.relu(x)
    return n.g.slice(x, [0, 1], [x.channels - 1, -1 if x.spatial[0] > 2 else 2], [1, 2])


@step
def slice_strided(n: Network) -> Tensor:
    x = n.pick()
    stride = n.choice(2, 3, -1)
    if x.channels < 3:
        return n.g.relu(x)
    start, stop = (n.number(0, 1), 2**62) if stride > 0 else (x.channels, -(2**62))
    return n.g.slice(x, [start], [stop], [1], [stride])


@step
def gather_channels(n: Network) -> Tensor:
    x = n.pick()
    index = n.draw(st.lists(st.integers(-x.channels, x.channels - 1), min_size=2, max_size=10))
    return n.g.op("Gather", x, n.g.const(index), axis=1)


@step
def pad_channels(n: Network) -> Tensor:
    return n.g.pad(n.pick(), [0, n.number(0, 2), 0, 0], [0, n.number(1, 2), 0, 0])


@step
def pad_space(n: Network) -> Tensor:
    x = n.pick()
    if max(x.spatial) >= MAX_SIDE or min(x.spatial) < 2:
        return n.g.relu(x)
    return n.g.pad(x, [0, 0, 1, 0], [0, 0, 0, 1], n.draw(st.sampled_from(["constant", "reflect", "edge"])))


@step
def repeat(n: Network) -> Tensor:
    x = n.pick()
    if 2 * x.channels > MAX_WIDTH:
        return n.g.relu(x)
    return n.g.op("Tile", x, n.g.const([1, 2, 1, 1]))


# Layout


@step
def shuffle(n: Network) -> Tensor:
    x = n.pick()
    return n.g.channel_shuffle(x, n.divisor(x.channels))


@step
def shuffle_by_gather(n: Network) -> Tensor:
    x = n.pick()
    groups = n.divisor(x.channels)
    index = np.arange(x.channels).reshape(groups, -1).T.ravel()
    return n.g.op("Gather", x, n.g.const(index), axis=1)


@step
def shuffle_with_computed_shape(n: Network) -> Tensor:
    """A shuffle whose shapes are put together at run time, as exporters write them."""
    x = n.pick()
    groups, (height, width) = n.divisor(x.channels), x.spatial
    whole = n.g.op("Shape", x)

    def extent(i: int) -> Tensor:
        return n.g.op("Gather", whole, n.g.const([i]), axis=0)

    channels = extent(1) if n.flag() else n.g.const([x.channels])
    inner = n.g.op("Div", channels, n.g.const([groups])) if n.flag() else n.g.const([x.channels // groups])
    parts = [extent(0), n.g.const([groups]), inner, extent(2), extent(3)]
    y = n.g.op(
        "Reshape", x, n.g.op("Concat", *parts, axis=0),
        shape=(x.shape[0], groups, x.channels // groups, height, width),
    )  # fmt: skip
    y = n.g.transpose(y, 0, 2, 1, 3, 4)
    last = [extent(0), n.g.const([-1]) if n.flag() else channels, extent(2), extent(3)]
    return n.g.op("Reshape", y, n.g.op("Concat", *last, axis=0), shape=x.shape)


@step
def view_as_pairs(n: Network) -> Tensor:
    """Channels seen as (c, 2) and summed, or weighed, over the pairs."""
    x = n.pick()
    if x.channels % 2:
        return n.g.relu(x)
    y = n.g.reshape(x, 0, x.channels // 2, 2, *x.spatial) if n.flag() else n.g.reshape(
        x, 0, -1, 2, *x.spatial, shape=(x.shape[0], x.channels // 2, 2, *x.spatial)
    )  # fmt: skip
    axis = n.choice(1, 2)
    y = n.g.mul(y, n.vector(2, 1, 1)) if n.flag() else y
    return n.g.reduce("ReduceSum", y, axis, keepdims=False)


@step
def view_across_space(n: Network) -> Tensor:
    """Rows become channels."""
    x = n.pick()
    height, width = x.spatial
    if x.channels * height > MAX_WIDTH:
        return n.g.relu(x)
    return n.g.reshape(x, 0, x.channels * height, 1, width)


@step
def view_flat_and_back(n: Network) -> Tensor:
    x = n.pick()
    height, width = x.spatial
    y = n.g.op("Tanh", n.g.reshape(x, 0, x.channels, height * width))
    if n.flag():
        y = n.g.transpose(n.g.transpose(y, 0, 2, 1), 0, 2, 1)
    return n.g.reshape(y, 0, x.channels, height, width)


@step
def swap_channels_and_rows(n: Network) -> Tensor:
    x = n.pick()
    return n.g.transpose(x, 0, 2, 1, 3) if max(x.channels, *x.spatial) <= MAX_SIDE else n.g.relu(x)


@step
def squeeze(n: Network) -> Tensor:
    """Drop the spatial axes of a pooled map and put them back."""
    y = n.g.op("Tanh", n.g.squeeze(n.pool(n.pick()), 2, 3))
    return n.g.unsqueeze(y, -1, -2)


@step
def squeeze_whatever_is_single(n: Network) -> Tensor:
    """A Squeeze that names no axes."""
    x = n.pick()
    if x.channels < 2 or isinstance(x.shape[0], str):
        return n.g.relu(x)
    y = n.g.op("Squeeze", n.pool(x), shape=x.shape[:2])
    return n.g.unsqueeze(y, 2, 3)


@step
def depth_to_space(n: Network) -> Tensor:
    x = n.pick()
    if x.channels % 4 or max(x.spatial) * 2 > MAX_SIDE:
        return n.g.relu(x)
    return n.g.op("DepthToSpace", x, blocksize=2, mode=n.draw(st.sampled_from(["DCR", "CRD"])))


@step
def space_to_depth(n: Network) -> Tensor:
    x = n.pick()
    if x.channels * 4 > MAX_WIDTH or any(side % 2 for side in x.spatial):
        return n.g.relu(x)
    return n.g.op("SpaceToDepth", x, blocksize=2)


# Space and statistics


@step
def pool(n: Network) -> Tensor:
    x = n.pick()
    if min(x.spatial) < 2:
        return n.g.relu(x)
    return n.g.max_pool(x, 2) if n.flag() else n.g.avg_pool(x, 3, stride=1, pad=1)


@step
def enlarge(n: Network) -> Tensor:
    x = n.pick()
    if max(x.spatial) * 2 > MAX_SIDE:
        return n.g.relu(x)
    height, width = x.spatial
    if n.flag() or isinstance(x.shape[0], str):
        return n.g.upsample(x)
    return n.g.resize(x, sizes=[int(x.shape[0]), x.channels, 2 * height, 2 * width])


@step
def average_channels(n: Network) -> Tensor:
    """A mean over channels: cutting them is lossy."""
    x = n.pick()
    return n.g.add(x, n.g.reduce("ReduceMean", x, 1))


@step
def standardise(n: Network) -> Tensor:
    x = n.pick()
    kind = n.number(0, 2)
    if kind == 0:
        return n.g.op("InstanceNormalization", x, n.vector(x.channels), n.vector(x.channels))
    if kind == 1 and n.g.opset >= 17:
        y = n.g.transpose(x, 0, 2, 3, 1)
        y = n.g.op("LayerNormalization", y, n.vector(x.channels), n.vector(x.channels))
        return n.g.transpose(y, 0, 3, 1, 2)
    groups = n.divisor(x.channels)
    if n.g.opset >= 21 and min(x.spatial) > 1:
        vectors = n.vector(x.channels), n.vector(x.channels)
        return n.g.op("GroupNormalization", x, *vectors, shape=x.shape, num_groups=groups)
    return n.g.op("Softmax", x, axis=1)


# Networks


@st.composite
def networks(
    draw: DrawFn,
    low: int = 2,
    high: int = 9,
    steps: tuple[str, ...] = tuple(STEPS),
    ends: tuple[int, ...] = (0, 1, 2, 3),
) -> ModelProto:
    """A random network of `low` to `high` steps, with one or two heads of fixed width."""
    opset = draw(st.sampled_from([13, 17, 18, 21]))
    storage = draw(st.sampled_from(["initializer", "initializer", "constant"]))
    g = Graph("random", opset=opset, ir=10, seed=draw(st.integers(0, 2**16)), storage=storage)
    batch: int | str = draw(st.sampled_from(["batch", 2]))
    side = draw(st.sampled_from([4, 6]))
    n = Network(g, draw)
    n.live.append(n.conv(g.input(batch, 3, side, side, name="image"), n.width(), 3))
    for name in draw(st.lists(st.sampled_from(steps), min_size=low, max_size=high)):
        made = STEPS[name](n)
        n.live.extend(made if isinstance(made, list) else [made])
    heads = [_head(n, n.live[-1], n.choice(*ends))]
    if n.flag():
        heads.append(_head(n, n.pick(), n.choice(*ends)))
    return g.model(*heads)


SIZELESS = (
    "convolve", "convolve_normalised", "convolve_grouped", "convolve_depthwise", "convolve_transposed",
    "convolve_with_a_known_filter", "dense_on_channels", "contract_by_einsum", "activate",
    "activate_by_channel", "normalise", "shift_left", "add_residual", "choose", "gate", "gate_by_gemm",
    "gate_from_another", "gate_by_sum", "expand", "concatenate", "split_equally", "split_unequally",
    "slice_channels", "slice_both", "gather_channels", "pad_channels", "pad_space", "repeat",
    "shuffle_by_gather", "shuffle_with_computed_shape", "squeeze", "depth_to_space", "space_to_depth",
    "pool", "average_channels", "standardise",
)  # fmt: skip


@st.composite
def sizeless_networks(draw: DrawFn) -> ModelProto:
    """A random network whose image may have any height and width (even ones, if it halves them)."""
    proto: ModelProto = draw(networks(2, 8, SIZELESS, ends=(3,)))
    dims = proto.graph.input[0].type.tensor_type.shape.dim
    dims[2].dim_param, dims[3].dim_param = "height", "width"
    assume(all(_runs(proto, side) for side in SIDES))
    return proto


def _runs(proto: ModelProto, side: int) -> bool:
    """Whether maps of equal size when the network was drawn are so at another size."""
    try:
        run(proto, feeds(proto, length=side))
    except RuntimeException:
        return False
    return True


def _head(n: Network, x: Tensor, kind: int) -> Tensor:
    """Classes by pooling or flattening, or a map of fixed width."""
    if kind == 0:
        return n.g.gemm(n.g.flatten(x), CLASSES)
    if kind == 1:
        return n.g.conv(x, CLASSES, 1)
    if kind == 2:
        return n.g.matmul(n.g.reduce("ReduceMean", x, 2, 3, keepdims=False), CLASSES)
    return n.g.gemm(n.g.flatten(n.g.gap(x)), CLASSES)


def seeds() -> SearchStrategy[int]:
    return st.integers(0, 2**16)


# Sequences of tokens, of a length known only at run time

LONGEST = 32
TokenStep = Callable[["Tokens"], Tensor]
TOKEN_STEPS: dict[str, TokenStep] = {}


@dataclass
class Tokens:
    """A graph over tensors of the shape (batch, length, width)."""

    g: Graph
    draw: DrawFn
    x: Tensor
    table: Tensor

    @property
    def width(self) -> int:
        return self.x.extent(2)

    def number(self, low: int, high: int) -> int:
        return self.draw(st.integers(low, high))

    def flag(self) -> bool:
        return self.draw(st.booleans())

    def dense(self, x: Tensor, width: int) -> Tensor:
        return self.g.matmul(x, width, bias=self.flag())

    def length(self) -> Tensor:
        """The number of tokens, as an integer vector of one element."""
        return self.g.op("Gather", self.g.op("Shape", self.x), self.g.const([1]), axis=0)

    def view(self, x: Tensor, *dims: int) -> Tensor:
        """(batch, length, ...) with other axes behind, the shape stored or computed."""
        shape = ("batch", "length", *dims)
        kind = self.number(0, 2)
        if kind == 0:
            return self.g.reshape(x, 0, 0, *dims, shape=shape)
        if kind == 1:
            return self.g.reshape(x, 0, -1, *dims, shape=shape)
        whole = self.g.op("Shape", x)
        first = self.g.op("Slice", whole, self.g.const([0]), self.g.const([2]), shape=(2,))
        parts = [self.g.const([dim]) for dim in dims] if self.flag() else [self.g.const(dims)]
        return self.g.op("Reshape", x, self.g.op("Concat", first, *parts, axis=0), shape=shape)

    def first_rows(self, table: Tensor) -> Tensor:
        """As many rows of a stored table as there are tokens."""
        zero, width = self.g.const([0]), table.extent(1)
        shape = ("length", width)
        if self.flag():
            return self.g.op("Slice", table, zero, self.length(), zero, shape=shape)
        ends = self.g.op("Concat", self.length(), self.g.const([width]), axis=0)
        return self.g.op("Slice", table, self.g.const([0, 0]), ends, self.g.const([0, 1]), shape=shape)

    def scaled(self, *shape: int) -> Tensor:
        return self.g.const(self.g.uniform(0.5, 1.5, *shape), np.float32)


def token_step(function: TokenStep) -> TokenStep:
    """Register a step under its name."""
    TOKEN_STEPS[function.__name__] = function
    return function


@token_step
def project(n: Tokens) -> Tensor:
    return n.g.op("Tanh", n.dense(n.x, n.number(2, 12)))


@token_step
def feed_forward(n: Tokens) -> Tensor:
    y = n.dense(n.x, n.number(2, 12))
    return n.g.add(n.x, n.dense(n.g.mul(y, n.g.op("Erf", y)), n.width))


@token_step
def feed_forward_gated(n: Tokens) -> Tensor:
    inner = n.number(2, 8)
    if n.flag():
        gate, value = n.dense(n.x, inner), n.dense(n.x, inner)
    else:
        gate, value = n.g.split(n.dense(n.x, 2 * inner), 2, axis=2)
    return n.g.add(n.x, n.dense(n.g.mul(n.g.op("Sigmoid", gate), value), n.width))


@token_step
def attend_to_tokens(n: Tokens) -> Tensor:
    """Self-attention, perhaps with fewer key heads, rotated, masked, or scaled by a computed width."""
    g, shared, heads, depth = n.g, n.number(1, 2), n.number(1, 2), 2 * n.number(1, 3)
    query = g.transpose(n.view(n.dense(n.x, shared * heads * depth), shared * heads, depth), 0, 2, 1, 3)
    key, value = (
        g.transpose(n.view(n.dense(n.x, heads * depth), heads, depth), 0, 2, 1, 3) for _ in range(2)
    )
    if n.flag():
        query, key = _rotated(n, query), _rotated(n, key)
    if shared > 1:
        key, value = _repeated(n, key, shared), _repeated(n, value, shared)
    scores = g.op("MatMul", query, g.transpose(key, 0, 1, 3, 2))
    width = g.op("Slice", g.op("Shape", query), g.const([-1]), g.const([2**62]), shape=(1,))
    if n.flag():
        scores = g.op("Div", scores, g.op("Sqrt", g.op("Cast", width, to=TensorProto.FLOAT)))
    if n.flag():
        mask = g.const(np.triu(np.full((LONGEST, LONGEST), -10, np.float32), 1), np.float32)
        rows = g.op("Slice", mask, g.const([0]), n.length(), g.const([0]), shape=("length", LONGEST))
        square = g.op("Slice", rows, g.const([0]), n.length(), g.const([1]), shape=("length", "length"))
        scores = g.add(scores, square)
    mixed = g.transpose(g.op("MatMul", g.op("Softmax", scores, axis=-1), value), 0, 2, 1, 3)
    return g.add(n.x, n.dense(n.view(mixed, shared * heads * depth), n.width))


def _rotated(n: Tokens, x: Tensor) -> Tensor:
    """Halves of each head turned by an angle that grows with the position."""
    g, depth = n.g, x.extent(3)
    if n.flag():
        low, high = g.split(x, 2, axis=3)
    else:
        low = g.slice(x, [0], [depth // 2], [3])
        high = g.slice(x, [depth // 2], [2**62], [3])
    turned = g.concat(g.op("Neg", high), low, axis=3)
    cosine, sine = (n.first_rows(n.scaled(LONGEST, depth)) for _ in range(2))
    return g.add(g.mul(x, cosine), g.mul(turned, sine))


def _repeated(n: Tokens, x: Tensor, times: int) -> Tensor:
    """Every head `times` over, one after the other."""
    g, heads, depth = n.g, x.extent(1), x.extent(3)
    shape = ("batch", heads, times, "length", depth)
    y = g.unsqueeze(x, 2)
    if n.flag():
        y = g.op("Tile", y, g.const([1, 1, times, 1, 1]), shape=shape)
    else:
        y = g.op("Expand", y, g.const([1, 1, times, 1, 1]), shape=shape)
    return g.reshape(y, 0, heads * times, -1, depth, shape=("batch", heads * times, "length", depth))


@token_step
def normalise_tokens(n: Tokens) -> Tensor:
    g, kind = n.g, n.number(0, 1)
    if kind and g.opset >= 17:
        return g.op("LayerNormalization", n.x, n.scaled(n.width), n.scaled(n.width))
    mean = g.reduce("ReduceMean", g.op("Pow", n.x, g.const(2.0, np.float32)), -1)
    return g.mul(g.op("Div", n.x, g.op("Sqrt", g.add(mean, g.const(1e-5, np.float32)))), n.scaled(n.width))


@token_step
def add_positions(n: Tokens) -> Tensor:
    return n.g.add(n.x, n.first_rows(n.scaled(LONGEST, n.width)))


@token_step
def convolve_tokens(n: Tokens) -> Tensor:
    x = n.g.transpose(n.x, 0, 2, 1)
    y = n.g.conv(n.g.relu(n.g.conv(x, n.width, 3, group=n.width)), n.number(2, 12), 1)
    return n.g.transpose(y, 0, 2, 1)


@token_step
def weigh_by_einsum(n: Tokens) -> Tensor:
    width = n.number(2, 12)
    return n.g.op("Einsum", n.x, n.scaled(n.width, width), equation="bld,de->ble")


@token_step
def take_features(n: Tokens) -> Tensor:
    if n.width < 4:
        return n.g.relu(n.x)
    return n.g.slice(n.x, [1], [n.width - 1], [2])


@token_step
def join_features(n: Tokens) -> Tensor:
    if n.width > 8:
        return n.g.relu(n.x)
    return n.g.concat(n.x, n.dense(n.x, n.number(1, 6)), axis=2)


@st.composite
def token_networks(draw: DrawFn, low: int = 1, high: int = 5) -> ModelProto:
    """Token numbers in, classes out: for each token, for their mean, or scores of the embedding table."""
    g = Graph("tokens", opset=draw(st.sampled_from([13, 17, 18])), ir=10, seed=draw(st.integers(0, 2**16)))
    ids = g.input("batch", "length", name="ids", dtype=TensorProto.INT64)
    width = draw(st.integers(2, 12))
    table = g.store("embedding", g.normal(11, width))
    x = g.op("Gather", table, ids, axis=0, shape=("batch", "length", width))
    n = Tokens(g, draw, x, table)
    steps = st.lists(st.sampled_from(sorted(TOKEN_STEPS)), min_size=low, max_size=high)
    for name in draw(steps):
        n.x = TOKEN_STEPS[name](n)
    kind = n.number(0, 2)
    if kind == 0:
        return g.model(g.matmul(n.x, CLASSES))
    if kind == 1:
        return g.model(g.matmul(g.reduce("ReduceMean", n.x, 1, keepdims=False), CLASSES))
    y = g.matmul(n.x, table.extent(1)) if n.width != table.extent(1) else n.x
    return g.model(g.op("MatMul", y, g.transpose(table, 1, 0)))


# --------------------------------------------------------------------------- residual blocks of transformers


def _normalised(n: Tokens, x: Tensor) -> Tensor:
    """LayerNormalization, the same spelled out, or a norm without a mean, over the last axis."""
    g, width, kind = n.g, x.extent(-1), n.number(0, 2)
    if kind == 0 and g.opset >= 17:
        return g.op("LayerNormalization", x, n.scaled(width), n.scaled(width), axis=-1)
    if kind < 2:
        x = g.op("Sub", x, g.reduce("ReduceMean", x, -1))
    mean = g.reduce("ReduceMean", g.op("Pow", x, g.const(2.0, np.float32)), -1)
    return g.mul(g.op("Div", x, g.op("Sqrt", g.add(mean, g.const(1e-3, np.float32)))), n.scaled(width))


def _projected(n: Tokens, x: Tensor, heads: int, depth: int) -> list[Tensor]:
    """Queries, keys and values as (batch, length, heads, depth), from one matrix or from three."""
    g, kind, every = n.g, n.number(0, 6), 3 * heads * depth
    if kind == 0:
        return [n.view(n.dense(x, heads * depth), heads, depth) for _ in range(3)]
    y = n.dense(x, every)
    if kind == 1:
        y = n.view(y, 3, heads, depth)
        return [g.op("Gather", y, g.const(i), axis=2) for i in range(3)]
    if kind == 2:
        y = n.view(y, heads, 3, depth)
        return [g.squeeze(g.slice(y, [i], [i + 1], [3]), 3) for i in range(3)]
    if kind == 3:
        return g.split(n.view(y, heads, 3 * depth), [depth] * 3, axis=3)
    if kind == 4:
        return [n.view(part, heads, depth) for part in g.split(y, 3, axis=2)]
    if kind == 5:
        return [n.view(g.slice(y, [i], [every], [2], [3]), heads, depth) for i in range(3)]
    y = g.transpose(n.view(y, 3, heads, depth), 2, 0, 3, 1, 4)
    return [g.transpose(g.op("Gather", y, g.const(i), axis=0), 0, 2, 1, 3) for i in range(3)]


def _shared(n: Tokens, x: Tensor, source: Tensor, depth: int) -> list[Tensor]:
    """Queries of several heads, keys and values of one (which broadcast) or of groups (which are repeated),
    perhaps from elsewhere."""
    times, heads, broadcast = n.number(2, 3), n.number(1, 3), n.flag()
    if broadcast:
        heads = 1
    origins = (x, heads * times), (source, heads), (source, heads)
    parts = [n.view(n.dense(y, count * depth), count, depth) for y, count in origins]
    q, k, v = (n.g.transpose(part, 0, 2, 1, 3) for part in parts)
    if not broadcast:
        k, v = _repeated(n, k, times), _repeated(n, v, times)
    return [q, k, v]


def _scored(n: Tokens, scores: Tensor, heads: int, depth: int) -> Tensor:
    """A scale, and what may be added to scores: a mask, a bias of each head."""
    g = n.g
    if n.flag():
        scores = g.op("Div", scores, g.const(depth**0.5, np.float32))
    if n.flag():
        table = g.const(np.triu(np.full((LONGEST, LONGEST), -10, np.float32), 1), np.float32)
        rows = g.op("Slice", table, g.const([0]), n.length(), g.const([0]), shape=("length", LONGEST))
        scores = g.add(
            scores, g.op("Slice", rows, g.const([0]), n.length(), g.const([1]), shape=("length",) * 2)
        )
    if n.flag():
        scores = g.mul(scores, n.scaled(heads, 1, 1))
    if n.flag():
        place = g.op("Range", g.const(0), g.squeeze(n.length(), 0), g.const(1), shape=("length",))
        apart = g.op("Abs", g.op("Sub", g.unsqueeze(place, 0), g.unsqueeze(place, 1), shape=("length",) * 2))
        bias = g.op("Gather", g.const(g.normal(LONGEST, heads), np.float32), apart)
        scores = g.add(scores, g.unsqueeze(g.transpose(bias, 2, 0, 1), 0))
    return scores


def _attention(n: Tokens, x: Tensor, source: Tensor) -> Tensor:
    g, depth, share = n.g, 2 * n.number(1, 3), n.flag()
    if share:
        q, k, v = _shared(n, x, source, depth)
    else:
        q, k, v = (g.transpose(part, 0, 2, 1, 3) for part in _projected(n, x, n.number(1, 4), depth))
    heads = q.extent(1)
    if n.flag():
        q, k = _normalised(n, q), _normalised(n, k)
    if n.flag():
        q, k = _rotated(n, q), _rotated(n, k)
    form = n.number(0, 3)
    if form == 0 and k.extent(1) == heads:
        scores = _scored(n, g.op("Einsum", q, k, equation="bhnd,bhmd->bhnm"), heads, depth)
        y = g.op("Einsum", g.op("Softmax", scores, axis=-1), v, equation="bhnm,bhmd->bnhd")
    elif form == 1:
        q, k = (g.op("Sigmoid", part) for part in (q, k))
        mixed = g.op("MatMul", q, g.op("MatMul", g.transpose(k, 0, 1, 3, 2), v))
        total = g.reduce("ReduceSum", g.mul(q, g.reduce("ReduceSum", k, 2)), -1)
        y = g.transpose(g.op("Div", mixed, total), 0, 2, 1, 3)
    else:
        scores = _scored(n, g.op("MatMul", q, g.transpose(k, 0, 1, 3, 2)), heads, depth)
        y = g.transpose(g.op("MatMul", g.op("Softmax", scores, axis=-1), v), 0, 2, 1, 3)
    return n.dense(n.view(y, heads * depth), n.width)


def _neurons(n: Tokens, x: Tensor, _: Tensor) -> Tensor:
    g, inner, kind = n.g, n.number(2, 10), n.number(0, 2)
    if kind == 0:
        y = n.dense(x, inner)
        return n.dense(g.mul(y, g.op("Erf", y)), n.width)
    if kind == 1:
        gate, value = g.split(n.dense(x, 2 * inner), 2, axis=2)
    else:
        gate, value = n.dense(x, inner), n.dense(x, inner)
    return n.dense(g.mul(g.op("Sigmoid", gate), value), n.width)


def _convolution(n: Tokens, x: Tensor, _: Tensor) -> Tensor:
    g = n.g
    y = g.conv(g.relu(g.conv(g.transpose(x, 0, 2, 1), n.width, 3, group=n.width)), n.number(2, 10), 1)
    return g.transpose(g.conv(g.relu(y), n.width, 1), 0, 2, 1)


RESIDUAL = {"attention": _attention, "ffn": _neurons, "convolution": _convolution}


@st.composite
def transformers(draw: DrawFn) -> ModelProto:
    """Words, residual blocks with norms on either side, and classes; the blocks may stand side by side or read
    earlier streams, and their sums may be outputs, too.

    A sum is called by the kind of its block, and ends in `_swapped` if the block is its first operand.
    """
    g = Graph(
        "transformer", opset=draw(st.sampled_from([13, 17, 18])), ir=10, seed=draw(st.integers(0, 2**16))
    )
    ids = g.input("batch", "length", name="ids", dtype=TensorProto.INT64)
    width = draw(st.integers(2, 12))
    table = g.store("embedding", g.normal(11, width))
    n = Tokens(g, draw, g.op("Gather", table, ids, axis=0, shape=("batch", "length", width)), table)
    outputs, streams = [], [n.x]
    before: Tensor | None = None
    for kind in draw(st.lists(st.sampled_from(sorted(RESIDUAL)), min_size=1, max_size=4)):
        if before is None or n.number(0, 3):  # else the block reads what the one before it reads
            before = _normalised(n, n.x) if n.flag() else n.x
        source = before if n.flag() else draw(st.sampled_from(streams))
        added = RESIDUAL[kind](n, before, source)
        if n.flag():
            added = g.dropout(g.mul(added, n.scaled(width)), 0.1)
        swapped = n.flag()
        name = g.fresh(f"{kind}_join") + "_swapped" * swapped
        n.x = g.op("Add", *((added, n.x) if swapped else (n.x, added)), name=name)
        streams.append(n.x)
        if n.number(0, 7) == 0:
            outputs.append(n.x)
        if n.flag():
            n.x, before = _normalised(n, n.x), None
    if n.flag():
        return g.model(g.op("MatMul", n.x, g.transpose(table, 1, 0)), *outputs)
    return g.model(g.matmul(n.x, CLASSES), *outputs)
