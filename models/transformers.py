"""Small transformers as the usual exporters write them, with random weights.

Each function draws one network on a `Graph`; the decorator names it, seeds it and registers a function in
`TRANSFORMERS`, which may be asked for a later operator set or for weights as Constant nodes. Unless a function says otherwise there are 4 heads of 6 (or 6 query heads of 4 that
share 3 of keys and values), an embedding of 24, 40 neurons and 30 words, over any number of positions.

A sum of a residual stream and what a block adds is a node called `attention_join_1`, `ffn_join_1` or
`convolution_join_1`, by the kind of the block; what the block adds is its second operand, or its first if the
name ends in `_swapped`.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Sequence

import numpy as np
from onnx import ModelProto, TensorProto

from models.builder import Array, Dim, Graph, Storage, Tensor

HIDDEN, HEADS, WIDTH, NEURONS, WORDS, LONGEST = 24, 4, 6, 40, 30, 16
GROUPS = 3
"""Heads of keys and values where several heads of queries share them."""
END = 2**63 - 1

Result = Tensor | tuple[Tensor, ...]
Draw = Callable[[Graph], Result]
Build = Callable[..., ModelProto]
Layer = Callable[[Graph, Tensor], Tensor]
Norm = Callable[[Graph, Tensor], Tensor]
Three = tuple[Tensor, Tensor, Tensor]

TRANSFORMERS: dict[str, Build] = {}
"""The networks by name."""


def network(*, opset: int = 17) -> Callable[[Draw], Build]:
    """Register a drawing function under its own name."""

    def register(draw: Draw) -> Build:
        name = draw.__name__

        def build(opset: int = opset, storage: Storage = "initializer") -> ModelProto:
            g = Graph(name, opset=opset, seed=zlib.crc32(name.encode()), storage=storage)
            result = draw(g)
            return g.model(*(result if isinstance(result, tuple) else (result,)))

        build.__name__ = build.__qualname__ = name
        build.__doc__ = draw.__doc__
        TRANSFORMERS[name] = build
        return build

    return register


# Numbers, shapes and positions


def _float(g: Graph, *values: float) -> Tensor:
    return g.const(values[0] if len(values) == 1 else values, np.float32)


def _vector(g: Graph, name: str, *shape: int, mean: float = 0.0) -> Tensor:
    return g.store(g.fresh(name), g.normal(*shape, scale=0.3, mean=mean))


def _table(g: Graph, name: str, *shape: int) -> Tensor:
    return g.store(g.fresh(name), g.normal(*shape))


def _ints(g: Graph, *shape: Dim, name: str) -> Tensor:
    return g.input(*shape, name=name, dtype=TensorProto.INT64)


def _size(g: Graph, x: Tensor, axis: int) -> Tensor:
    """An extent as a single number."""
    return g.op("Gather", g.op("Shape", x), g.const(axis), axis=0)


def _sizes(g: Graph, x: Tensor, *dims: Dim) -> Tensor:
    """A shape put together at run time from numbers and extents of `x`."""
    parts = [
        g.const([dim]) if isinstance(dim, int) else g.unsqueeze(_size(g, x, x.shape.index(dim)), 0)
        for dim in dims
    ]
    return g.concat(*parts, axis=0)


def _computed(g: Graph, x: Tensor, *dims: Dim) -> Tensor:
    """A Reshape whose target is computed from the shape of `x`."""
    return g.op("Reshape", x, _sizes(g, x, *dims), shape=dims)


def _baked(g: Graph, x: Tensor, *dims: Dim) -> Tensor:
    """A Reshape to numbers: 0 for an open extent that stays in its place, -1 for one that does not."""
    kept = [i < x.rank and dim == x.shape[i] for i, dim in enumerate(dims)]
    codes = [dim if isinstance(dim, int) else 0 if same else -1 for dim, same in zip(dims, kept, strict=True)]
    return g.reshape(x, *codes, shape=dims)


def _range(g: Graph, x: Tensor, axis: int = 1) -> Tensor:
    """0, 1, ... along an axis of `x`."""
    return g.op("Range", g.const(0), _size(g, x, axis), g.const(1), shape=(x.shape[axis],))


def _distances(g: Graph, x: Tensor) -> Tensor:
    """Of each pair of positions how far the second is ahead."""
    places = _range(g, x)
    return g.op("Sub", g.unsqueeze(places, 0), g.unsqueeze(places, 1), shape=("length", "length"))


def _real(g: Graph, x: Tensor) -> Tensor:
    return g.op("Cast", x, to=TensorProto.FLOAT)


# Embeddings, norms and joins


def _words(g: Graph, table: Tensor | None = None) -> Tensor:
    table = table or _table(g, "words", WORDS, HIDDEN)
    return g.op("Gather", table, _ints(g, "batch", "length", name="ids"))


def _placed(g: Graph, x: Tensor) -> Tensor:
    """A trained vector per position added."""
    table = _table(g, "positions", LONGEST, x.extent(-1))
    return g.add(x, g.op("Gather", table, _range(g, x)))


def _norm(g: Graph, x: Tensor) -> Tensor:
    scale, shift = _vector(g, "scale", x.extent(-1), mean=1.0), _vector(g, "shift", x.extent(-1))
    return g.op("LayerNormalization", x, scale, shift, axis=-1)


def _norm_spelled(g: Graph, x: Tensor) -> Tensor:
    centred = g.op("Sub", x, g.reduce("ReduceMean", x, -1))
    variance = g.reduce("ReduceMean", g.op("Pow", centred, _float(g, 2.0)), -1)
    y = g.op("Div", centred, g.op("Sqrt", g.add(variance, _float(g, 1e-5))))
    return g.add(g.mul(y, _vector(g, "scale", x.extent(-1), mean=1.0)), _vector(g, "shift", x.extent(-1)))


def _rms(g: Graph, x: Tensor) -> Tensor:
    mean = g.reduce("ReduceMean", g.op("Pow", x, _float(g, 2.0)), -1)
    y = g.mul(x, g.op("Reciprocal", g.op("Sqrt", g.add(mean, _float(g, 1e-6)))))
    return g.mul(_vector(g, "scale", x.extent(-1), mean=1.0), y)


def _join(g: Graph, kind: str, x: Tensor, added: Tensor, *, swapped: bool = False) -> Tensor:
    name = g.fresh(f"{kind}_join") + "_swapped" * swapped
    return g.op("Add", *((added, x) if swapped else (x, added)), name=name)


def _block(g: Graph, x: Tensor, attend: Layer, *, norm: Norm = _norm) -> Tensor:
    """A residual block of attention behind a norm."""
    return _join(g, "attention", x, attend(g, norm(g, x)))


def _layer(g: Graph, x: Tensor, attend: Layer, feed: Layer | None = None, norm: Norm = _norm) -> Tensor:
    """Attention and neurons, each behind a norm."""
    x = _block(g, x, attend, norm=norm)
    return _join(g, "ffn", x, (feed or _feed)(g, norm(g, x)))


def _post_layer(g: Graph, x: Tensor, attend: Layer, feed: Layer | None = None, norm: Norm = _norm) -> Tensor:
    """Attention and neurons, each in front of a norm."""
    x = norm(g, _join(g, "attention", x, attend(g, x), swapped=True))
    return norm(g, _join(g, "ffn", x, (feed or _feed)(g, x), swapped=True))


def _classify(g: Graph, x: Tensor) -> Tensor:
    """Five classes of each position."""
    return g.matmul(_norm(g, x), 5)


def _one(g: Graph, attend: Layer, feed: Layer | None = None, norm: Norm = _norm) -> Tensor:
    """Words, one layer, classes."""
    return _classify(g, _layer(g, _words(g), attend, feed, norm))


# Neurons


def _gelu(g: Graph, x: Tensor) -> Tensor:
    y = g.op("Erf", g.op("Div", x, _float(g, math.sqrt(2))))
    return g.mul(g.mul(x, g.add(y, _float(g, 1.0))), _float(g, 0.5))


def _gelu_tanh(g: Graph, x: Tensor) -> Tensor:
    cube = g.mul(g.op("Pow", x, _float(g, 3.0)), _float(g, 0.044715))
    y = g.op("Tanh", g.mul(g.add(x, cube), _float(g, math.sqrt(2 / math.pi))))
    return g.mul(g.mul(x, _float(g, 0.5)), g.add(y, _float(g, 1.0)))


def _feed(g: Graph, x: Tensor) -> Tensor:
    return g.matmul(_gelu(g, g.matmul(x, NEURONS, bias=True)), x.extent(-1), bias=True)


def _feed_tanh(g: Graph, x: Tensor) -> Tensor:
    """As a transposed convolution of width 1 (GPT-2) writes it: Gemm on positions side by side."""
    y = _baked(g, x, "rows", HIDDEN)
    y = g.gemm(_gelu_tanh(g, g.gemm(y, NEURONS, trans_b=False)), HIDDEN, trans_b=False)
    return g.op("Reshape", y, g.op("Shape", x), shape=x.shape)


def _feed_gated(g: Graph, x: Tensor) -> Tensor:
    return g.matmul(g.mul(g.act(g.matmul(x, NEURONS), "silu"), g.matmul(x, NEURONS)), HIDDEN)


def _feed_fused(g: Graph, x: Tensor) -> Tensor:
    value, gate = g.split(g.matmul(x, 2 * NEURONS, bias=True), 2, axis=-1)
    return g.matmul(g.mul(value, _gelu(g, gate)), HIDDEN)


def _feed_convolved(g: Graph, x: Tensor) -> Tensor:
    y = g.relu(g.conv(g.transpose(x, 0, 2, 1), NEURONS, 1))
    return g.transpose(g.conv(y, HIDDEN, 1), 0, 2, 1)


def _feed_mixed(g: Graph, x: Tensor) -> Tensor:
    """A depthwise convolution over a map of 4 x 4 positions in between."""
    y = g.transpose(g.matmul(x, NEURONS, bias=True), 0, 2, 1)
    y = g.conv(_baked(g, y, "batch", NEURONS, 4, 4), NEURONS, 3, group=NEURONS)
    y = g.transpose(_baked(g, y, "batch", NEURONS, 16), 0, 2, 1)
    return g.matmul(_gelu(g, y), HIDDEN, bias=True)


def _feed_experts(g: Graph, x: Tensor) -> Tensor:
    """All of 3 experts, weighted by a softmax."""
    weights = g.split(g.op("Softmax", g.matmul(x, 3), axis=-1), [1, 1, 1], axis=-1)
    return g.add(*(g.mul(_feed_gated(g, x), weight) for weight in weights))


# Heads


def _heads(g: Graph, x: Tensor, heads: int = HEADS, width: int = WIDTH) -> Tensor:
    """A projection of its own, as (batch, heads, positions, width)."""
    y = g.matmul(x, heads * width, bias=True)
    return g.transpose(_computed(g, y, *x.shape[:2], heads, width), 0, 2, 1, 3)


def _separate(g: Graph, x: Tensor) -> Three:
    return _heads(g, x), _heads(g, x), _heads(g, x)


def _project(g: Graph, x: Tensor) -> Tensor:
    """Heads of (batch, heads, positions, width) side by side again, and projected."""
    y = g.transpose(x, 0, 2, 1, 3)
    return g.matmul(_computed(g, y, *y.shape[:2], x.extent(1) * x.extent(3)), HIDDEN, bias=True)


def _scaled(g: Graph, scores: Tensor, width: int = WIDTH) -> Tensor:
    return g.op("Div", scores, _float(g, math.sqrt(width)))


def _mixed(g: Graph, scores: Tensor, v: Tensor) -> Tensor:
    return g.op("MatMul", g.op("Softmax", scores, axis=-1), v)


def _products(g: Graph, q: Tensor, k: Tensor) -> Tensor:
    return g.op("MatMul", q, g.transpose(k, 0, 1, 3, 2))


def _attended(g: Graph, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None) -> Tensor:
    """Attention over (batch, heads, positions, width), `bias` added to its scores."""
    scores = _scaled(g, _products(g, q, k), q.extent(-1))
    return _project(g, _mixed(g, scores if bias is None else g.add(scores, bias), v))


def _self_attention(g: Graph, x: Tensor) -> Tensor:
    return _attended(g, *_separate(g, x))


# One projection each


@network()
def torchscript(g: Graph) -> Result:
    """Every shape is computed, piece by piece."""
    return _one(g, _self_attention)


@network(opset=18)
def dynamo(g: Graph) -> Result:
    """Shapes of numbers, and a scale on both queries and keys."""

    def attend(g: Graph, x: Tensor) -> Tensor:
        q, k, v = (
            g.transpose(
                _baked(g, g.matmul(x, HIDDEN, bias=True), "batch", "length", HEADS, WIDTH), 0, 2, 1, 3
            )
            for _ in range(3)
        )
        root = _float(g, WIDTH**-0.25)
        y = _mixed(g, g.op("MatMul", g.mul(q, root), g.mul(g.transpose(k, 0, 1, 3, 2), root)), v)
        size = g.concat(g.op("Shape", x, start=0, end=2), g.const([-1]), axis=0)
        y = g.op("Reshape", g.transpose(y, 0, 2, 1, 3), size, shape=("batch", "length", HIDDEN))
        return g.matmul(y, HIDDEN, bias=True)

    return _one(g, attend)


@network()
def einsum(g: Graph) -> Result:
    """Both products as Einsum, without transpositions."""

    def attend(g: Graph, x: Tensor) -> Tensor:
        q, k, v = (_baked(g, g.matmul(x, HIDDEN), "batch", "length", HEADS, WIDTH) for _ in range(3))
        scores = _scaled(g, g.op("Einsum", q, k, equation="bnhd,bmhd->bhnm"))
        y = g.op("Einsum", g.op("Softmax", scores, axis=-1), v, equation="bhnm,bmhd->bnhd")
        return g.matmul(_baked(g, y, "batch", "length", HIDDEN), HIDDEN)

    return _one(g, attend)


@network()
def keras_einsum(g: Graph) -> Result:
    """Weights of three axes, contracted by Einsum."""

    def attend(g: Graph, x: Tensor) -> Tensor:
        q, k, v = (
            g.add(
                g.op("Einsum", x, _kernel(g, HIDDEN, HEADS, WIDTH), equation="abc,cde->abde"),
                _vector(g, "bias", HEADS, WIDTH),
            )
            for _ in range(3)
        )
        scores = g.op("Einsum", k, g.mul(q, _float(g, WIDTH**-0.5)), equation="aecd,abcd->acbe")
        y = g.op("Einsum", g.op("Softmax", scores, axis=-1), v, equation="acbe,aecd->abcd")
        y = g.op("Einsum", y, _kernel(g, HEADS, WIDTH, HIDDEN), equation="abcd,cde->abe")
        return g.add(y, _vector(g, "bias", HIDDEN))

    return _one(g, attend)


def _kernel(g: Graph, *shape: int) -> Tensor:
    return g.store(g.fresh("kernel"), g.normal(*shape, scale=HIDDEN**-0.5))


@network()
def keras_tensordot(g: Graph) -> Result:
    """Each Dense flattens the positions; shapes are computed; one bias of two axes per projection."""

    def dense(g: Graph, x: Tensor) -> Tensor:
        rows = g.matmul(_baked(g, x, "rows", HIDDEN), HIDDEN)
        return g.op(
            "Reshape", rows, _sizes(g, x, "batch", "length", HEADS, WIDTH), shape=(*x.shape[:2], HEADS, WIDTH)
        )

    def attend(g: Graph, x: Tensor) -> Tensor:
        q, k, v = (
            g.transpose(g.add(dense(g, x), _vector(g, "bias", HEADS, WIDTH)), 0, 2, 1, 3) for _ in range(3)
        )
        return _attended(g, q, k, v)

    return _one(g, attend)


@network()
def scale_from_shape(g: Graph) -> Result:
    """The scale is the root of an extent of the queries."""

    def attend(g: Graph, x: Tensor) -> Tensor:
        q, k, v = _separate(g, x)
        width = g.op("Slice", g.op("Shape", q), g.const([-1]), g.const([END]), shape=(1,))
        scores = g.op("Div", _products(g, q, k), g.op("Sqrt", _real(g, width)))
        return _project(g, _mixed(g, scores, v))

    return _one(g, attend)


# Queries, keys and values from one matrix


def _fused(g: Graph, x: Tensor, *dims: Dim) -> Tensor:
    y = g.matmul(x, 3 * HIDDEN, bias=True)
    return _baked(g, y, *x.shape[:2], *dims) if dims else y


def _viewed(g: Graph, x: Tensor) -> Tensor:
    return g.transpose(_baked(g, x, *x.shape[:2], HEADS, WIDTH), 0, 2, 1, 3)


@network()
def fused_gather(g: Graph) -> Result:
    """(3 heads width) transposed to the front, then one Gather each."""

    def attend(g: Graph, x: Tensor) -> Tensor:
        y = g.transpose(_fused(g, x, 3, HEADS, WIDTH), 2, 0, 3, 1, 4)
        q, k, v = (g.op("Gather", y, g.const(i), axis=0) for i in range(3))
        return _attended(g, q, k, v)

    return _one(g, attend)


@network(opset=18)
def fused_unbind(g: Graph) -> Result:
    """(3 heads width), Split and Squeeze."""

    def attend(g: Graph, x: Tensor) -> Tensor:
        y = g.transpose(_fused(g, x, 3, HEADS, WIDTH), 2, 0, 3, 1, 4)
        q, k, v = (g.squeeze(part, 0) for part in g.split(y, 3, axis=0))
        return _attended(g, q, k, v)

    return _one(g, attend)


@network()
def fused_split(g: Graph) -> Result:
    """A Gemm on positions side by side, then Split (GPT-2)."""

    def attend(g: Graph, x: Tensor) -> Tensor:
        y = g.gemm(_baked(g, x, "rows", HIDDEN), 3 * HIDDEN, trans_b=False)
        y = g.op("Reshape", y, _sizes(g, x, "batch", "length", 3 * HIDDEN), shape=(*x.shape[:2], 3 * HIDDEN))
        q, k, v = (_viewed(g, part) for part in g.split(y, [HIDDEN] * 3, axis=2))
        return _attended(g, q, k, v)

    return _one(g, attend, _feed_tanh)


@network()
def fused_slices(g: Graph) -> Result:
    """Three Slices."""

    def attend(g: Graph, x: Tensor) -> Tensor:
        y = _fused(g, x)
        ends = (HIDDEN, 2 * HIDDEN, END)
        q, k, v = (_viewed(g, g.slice(y, [i * HIDDEN], [end], [2])) for i, end in enumerate(ends))
        return _attended(g, q, k, v)

    return _one(g, attend)


@network()
def fused_strided(g: Graph) -> Result:
    """(heads width 3), taken apart by Slices of step 3."""

    def attend(g: Graph, x: Tensor) -> Tensor:
        y = _fused(g, x)
        q, k, v = (_viewed(g, g.slice(y, [i], [END], [2], [3])) for i in range(3))
        return _attended(g, q, k, v)

    return _one(g, attend)


@network()
def interleaved_split(g: Graph) -> Result:
    """(heads (3 width)), split per head (GPT-NeoX)."""

    def attend(g: Graph, x: Tensor) -> Tensor:
        y = _fused(g, x, HEADS, 3 * WIDTH)
        q, k, v = (g.transpose(part, 0, 2, 1, 3) for part in g.split(y, [WIDTH] * 3, axis=3))
        return _attended(g, q, k, v)

    return _one(g, attend)


@network()
def interleaved_gather(g: Graph) -> Result:
    """(heads 3 width), one Gather each (BLOOM)."""

    def attend(g: Graph, x: Tensor) -> Tensor:
        y = _fused(g, x, HEADS, 3, WIDTH)
        q, k, v = (g.transpose(g.op("Gather", y, g.const(i), axis=3), 0, 2, 1, 3) for i in range(3))
        return _attended(g, q, k, v)

    return _one(g, attend)


@network()
def paddle(g: Graph) -> Result:
    """(3 heads width), Slice and Squeeze; the scale is on the queries."""

    def attend(g: Graph, x: Tensor) -> Tensor:
        y = g.transpose(_fused(g, x, 3, HEADS, WIDTH), 2, 0, 3, 1, 4)
        q, k, v = (g.squeeze(g.slice(y, [i], [i + 1], [0]), 0) for i in range(3))
        q = g.add(g.mul(q, _float(g, WIDTH**-0.5)), _float(g, 0.0))
        return _project(g, _mixed(g, _products(g, q, k), v))

    return _one(g, attend)


@network()
def torch_module(g: Graph) -> Result:
    """nn.MultiheadAttention: positions first, batch and heads side by side."""

    def attend(g: Graph, x: Tensor) -> Tensor:
        y = g.unsqueeze(_computed(g, g.matmul(x, 3 * HIDDEN, bias=True), "length", "batch", 3, HIDDEN), 0)
        y = g.squeeze(g.transpose(y, 3, 1, 2, 0, 4), 3)
        rows = g.unsqueeze(g.mul(_size(g, x, 1), g.const(HEADS)), 0)
        size = g.concat(g.unsqueeze(_size(g, x, 0), 0), rows, g.const([WIDTH]), axis=0)
        q, k, v = (
            g.transpose(
                g.op("Reshape", g.op("Gather", y, g.const(i), axis=0), size, shape=("length", "rows", WIDTH)),
                1,
                0,
                2,
            )
            for i in range(3)
        )
        scores = g.op("MatMul", g.mul(q, _float(g, WIDTH**-0.5)), g.transpose(k, 0, 2, 1))
        y = g.transpose(_mixed(g, scores, v), 1, 0, 2)
        flat = g.concat(g.unsqueeze(g.mul(_size(g, x, 0), _size(g, x, 1)), 0), g.const([HIDDEN]), axis=0)
        y = g.gemm(g.op("Reshape", y, flat, shape=("all", HIDDEN)), HIDDEN)
        return g.op("Reshape", y, _sizes(g, x, "length", "batch", HIDDEN), shape=x.shape)

    return g.transpose(_classify(g, _layer(g, g.transpose(_words(g), 1, 0, 2), attend)), 1, 0, 2)


# Masks, biases and positions


def _causal(g: Graph, x: Tensor) -> Tensor:
    """0 or a large negative number, of each pair of positions."""
    length = g.unsqueeze(_size(g, x, 1), 0)
    square = ("length", "length")
    ones = g.op("ConstantOfShape", g.concat(length, length, axis=0), value=_one_float(), shape=square)
    seen = g.op("Cast", g.op("Trilu", ones, upper=0), to=TensorProto.BOOL)
    return g.op("Where", seen, _float(g, 0.0), _float(g, -1e4), shape=square, dtype=TensorProto.FLOAT)


def _one_float() -> TensorProto:
    return TensorProto(dims=[1], data_type=TensorProto.FLOAT, float_data=[1.0])


@network()
def causal(g: Graph) -> Result:
    """A triangle of the positions there are."""
    return _one(g, lambda g, x: _attended(g, *_separate(g, x), _causal(g, x)))


@network()
def sliding_window(g: Graph) -> Result:
    """Scores of positions further apart than 3 are put out by a Where."""

    def attend(g: Graph, x: Tensor) -> Tensor:
        q, k, v = _separate(g, x)
        far = g.op("Greater", g.op("Abs", _distances(g, x)), g.const(3))
        scores = g.op(
            "Where", far, _float(g, -1e4), _scaled(g, _products(g, q, k)), shape=(*q.shape[:3], "length")
        )
        scores = Tensor(scores.name, scores.shape, TensorProto.FLOAT)
        return _project(g, _mixed(g, scores, v))

    return _one(g, attend)


@network()
def padding_mask(g: Graph) -> Result:
    """Which words count is an input."""
    x = _words(g)
    counts = _real(g, g.unsqueeze(_ints(g, "batch", "length", name="attention_mask"), 1, 2))
    mask = g.mul(g.op("Sub", _float(g, 1.0), counts), _float(g, -0.25))
    for _ in range(2):
        x = _layer(g, x, lambda g, x: _attended(g, *_separate(g, x), mask))
    return _classify(g, x)


def _buckets(g: Graph, x: Tensor) -> Tensor:
    """A trained bias per head and distance, distances above 5 in one bucket."""
    buckets = g.op("Min", g.op("Abs", _distances(g, x)), g.const(5))
    bias = g.op("Gather", _table(g, "buckets", 6, HEADS), buckets)
    return g.unsqueeze(g.transpose(bias, 2, 0, 1), 0)


@network()
def position_buckets(g: Graph) -> Result:
    """The bias of T5, shared by two layers; norms without a mean and scores without a scale."""
    x = _words(g)
    bias = _buckets(g, x)
    for _ in range(2):
        x = _layer(
            g,
            x,
            lambda g, x: _project(g, _biased(g, *_separate(g, x), bias)),
            lambda g, x: g.matmul(g.relu(g.matmul(x, NEURONS)), HIDDEN),
            _rms,
        )
    return _classify(g, x)


def _biased(g: Graph, q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    return _mixed(g, g.add(_products(g, q, k), bias), v)


@network()
def alibi(g: Graph) -> Result:
    """A slope per head times the distance."""

    def attend(g: Graph, x: Tensor) -> Tensor:
        slopes = g.store("slopes", np.logspace(-1, -HEADS, HEADS, base=2, dtype=np.float32).reshape(-1, 1, 1))
        return _attended(g, *_separate(g, x), g.mul(slopes, _real(g, _distances(g, x))))

    return _one(g, attend)


def _frequencies(width: int) -> Array:
    return np.asarray(100.0 ** -(np.arange(0, width, 2) / width), np.float32)


def _rotated(g: Graph, x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    """The two halves of each head turned."""
    half = x.extent(-1) // 2
    high = g.op("Neg", g.slice(x, [half], [END], [3]))
    return g.add(g.mul(x, cosine), g.mul(g.concat(high, g.slice(x, [0], [half], [3]), axis=-1), sine))


def _angles(g: Graph, x: Tensor, width: int) -> Tensor:
    """Position times frequency, twice side by side."""
    places = g.unsqueeze(_real(g, _range(g, x)), 1)
    angles = g.op("MatMul", places, g.store(g.fresh("frequencies"), _frequencies(width).reshape(1, -1)))
    return g.concat(angles, angles, axis=-1)


@network()
def rotary_halves(g: Graph) -> Result:
    """Cosines and sines are computed from the positions."""

    def attend(g: Graph, x: Tensor) -> Tensor:
        q, k, v = _separate(g, x)
        angles = _angles(g, x, WIDTH)
        turn = g.op("Cos", angles), g.op("Sin", angles)
        return _attended(g, _rotated(g, q, *turn), _rotated(g, k, *turn), v)

    return _one(g, attend)


@network()
def rotary_pairs(g: Graph) -> Result:
    """Neighbours are turned: Reshape to pairs, Split, and stacked again."""

    def turned(g: Graph, x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
        y = _computed(g, x, *x.shape[:3], WIDTH // 2, 2)
        a, b = (g.squeeze(part, 4) for part in g.split(y, [1, 1], axis=4))
        first = g.op("Sub", g.mul(a, cosine), g.mul(b, sine))
        second = g.add(g.mul(a, sine), g.mul(b, cosine))
        return _computed(g, g.concat(g.unsqueeze(first, 4), g.unsqueeze(second, 4), axis=4), *x.shape)

    def attend(g: Graph, x: Tensor) -> Tensor:
        q, k, v = _separate(g, x)
        places = g.unsqueeze(_real(g, _range(g, x)), 1)
        angles = g.mul(places, g.store("frequencies", _frequencies(WIDTH)))
        turn = g.op("Cos", angles), g.op("Sin", angles)
        return _attended(g, turned(g, q, *turn), turned(g, k, *turn), v)

    return _one(g, attend)


@network()
def rotary_tables(g: Graph) -> Result:
    """Tables of cosines and sines, read by positions that are an input."""

    def attend(g: Graph, x: Tensor) -> Tensor:
        q, k, v = _separate(g, x)
        places = _ints(g, "batch", "length", name="positions")
        angles = np.outer(np.arange(LONGEST, dtype=np.float32), np.tile(_frequencies(WIDTH), 2))
        turn = [
            g.unsqueeze(g.op("Gather", g.store(name, table), places), 1)
            for name, table in (("cosines", np.cos(angles)), ("sines", np.sin(angles)))
        ]
        return _attended(g, _rotated(g, q, *turn), _rotated(g, k, *turn), v)

    return _one(g, attend)


@network()
def query_key_norm(g: Graph) -> Result:
    """Queries and keys are normalised over the width of each head."""

    def attend(g: Graph, x: Tensor) -> Tensor:
        q, k, v = _separate(g, x)
        return _attended(g, _rms(g, q), _rms(g, k), v)

    return _one(g, attend)


# Shared, cached and foreign keys


def _repeated(g: Graph, x: Tensor, times: int) -> Tensor:
    """Each head several times over, by Expand."""
    batch, heads, length, width = x.shape
    wide = (batch, heads, times, length, width)
    y = g.op("Expand", g.unsqueeze(x, 2), _sizes(g, x, batch, x.extent(1), times, length, width), shape=wide)
    return _computed(g, y, batch, x.extent(1) * times, length, width)


def _grouped(g: Graph, x: Tensor) -> Three:
    """6 query heads of 4, 3 of keys and values."""
    q, k, v = _heads(g, x, 6, 4), _heads(g, x, GROUPS, 4), _heads(g, x, GROUPS, 4)
    return q, _repeated(g, k, 2), _repeated(g, v, 2)


@network()
def grouped_query(g: Graph) -> Result:
    """Keys and values repeated by Expand and Reshape."""
    return _one(g, lambda g, x: _attended(g, *_grouped(g, x)))


@network()
def grouped_einsum(g: Graph) -> Result:
    """Queries as (groups, repeats, width), which the keys and values of a group meet in an Einsum."""

    def attend(g: Graph, x: Tensor) -> Tensor:
        q = _baked(g, g.matmul(x, 24), "batch", "length", GROUPS, 2, 4)
        k, v = (_baked(g, g.matmul(x, 12), "batch", "length", GROUPS, 4) for _ in range(2))
        scores = _scaled(g, g.op("Einsum", q, k, equation="bngrd,bmgd->bgrnm"), 4)
        y = g.op("Einsum", g.op("Softmax", scores, axis=-1), v, equation="bgrnm,bmgd->bngrd")
        return g.matmul(_baked(g, y, "batch", "length", 24), HIDDEN)

    return _one(g, attend)


@network()
def multi_query(g: Graph) -> Result:
    """One head of keys and values, broadcast."""

    def attend(g: Graph, x: Tensor) -> Tensor:
        return _attended(g, _heads(g, x), _heads(g, x, 1), _heads(g, x, 1))

    return _one(g, attend)


@network()
def multi_query_tiled(g: Graph) -> Result:
    """One head of keys and values, tiled."""

    def attend(g: Graph, x: Tensor) -> Tensor:
        k, v = (
            g.op("Tile", _heads(g, x, 1), g.const([1, HEADS, 1, 1]), shape=("batch", HEADS, "length", WIDTH))
            for _ in range(2)
        )
        return _attended(g, _heads(g, x), k, v)

    return _one(g, attend)


@network()
def cached(g: Graph) -> Result:
    """Keys and values come in and go out."""
    x = _words(g)
    y = _norm(g, x)
    q, k, v = _separate(g, y)
    past = [g.input("batch", HEADS, "past", WIDTH, name=name) for name in ("past_key", "past_value")]
    k, v = (
        g.op("Concat", old, new, axis=2, shape=("batch", HEADS, "total", WIDTH))
        for old, new in zip(past, (k, v), strict=True)
    )
    x = _join(g, "attention", x, _attended(g, q, k, v))
    return _classify(g, _join(g, "ffn", x, _feed(g, _norm(g, x)))), k, v


def _crossed(g: Graph, x: Tensor, others: Tensor) -> Tensor:
    return _attended(g, _heads(g, x), _heads(g, others), _heads(g, others))


@network()
def cross_attention(g: Graph) -> Result:
    """Two layers read states of 20 features that are an input."""
    x = _words(g)
    states = g.input("batch", "frames", 20, name="states")
    for _ in range(2):
        x = _layer(g, _block(g, x, _self_attention), lambda g, x: _crossed(g, x, states))
    return _classify(g, x)


# Attention of other kinds


@network()
def linear_attention(g: Graph) -> Result:
    """Keys and values are multiplied first; ELU + 1 in place of a softmax."""

    def attend(g: Graph, x: Tensor) -> Tensor:
        q, k, v = _separate(g, x)
        q, k = (g.add(g.op("Elu", part), _float(g, 1.0)) for part in (q, k))
        y = g.op("MatMul", q, g.op("MatMul", g.transpose(k, 0, 1, 3, 2), v))
        total = g.reduce("ReduceSum", g.mul(q, g.reduce("ReduceSum", k, 2)), -1)
        return _project(g, g.op("Div", y, total))

    return _one(g, attend)


@network()
def performer(g: Graph) -> Result:
    """Linear attention on 10 random features of each head."""

    def attend(g: Graph, x: Tensor) -> Tensor:
        q, k, v = _separate(g, x)
        features = _table(g, "features", WIDTH, 10)
        q, k = (g.add(g.relu(g.op("MatMul", part, features)), _float(g, 0.1)) for part in (q, k))
        return _project(g, g.op("MatMul", q, g.op("MatMul", g.transpose(k, 0, 1, 3, 2), v)))

    return _one(g, attend)


@network()
def cosine_attention(g: Graph) -> Result:
    """Queries and keys of length 1, and a trained temperature per head."""

    def attend(g: Graph, x: Tensor) -> Tensor:
        q, k, v = _separate(g, x)
        q, k = (g.op("Div", part, g.reduce("ReduceL2", part, -1)) for part in (q, k))
        heat = g.op("Exp", g.op("Min", _vector(g, "heat", HEADS, 1, 1, mean=1.0), _float(g, 4.6)))
        return _project(g, _mixed(g, g.mul(_products(g, q, k), heat), v))

    return _one(g, attend)


@network()
def talking_heads(g: Graph) -> Result:
    """Scores are mixed across heads in front of the softmax and behind it."""

    def mix(g: Graph, scores: Tensor, heads: int) -> Tensor:
        return g.transpose(g.matmul(g.transpose(scores, 0, 2, 3, 1), heads), 0, 3, 1, 2)

    def attend(g: Graph, x: Tensor) -> Tensor:
        q, k, v = _heads(g, x), _heads(g, x), _heads(g, x, 3)
        weights = g.op("Softmax", mix(g, _scaled(g, _products(g, q, k)), 5), axis=-1)
        return _project(g, g.op("MatMul", mix(g, weights, 3), v))

    return _one(g, attend)


# Neurons and the order of things


@network()
def tanh_gelu(g: Graph) -> Result:
    """Norms spelled out, and neurons as Gemm with a tanh."""
    return _one(g, _self_attention, _feed_tanh, _norm_spelled)


@network()
def gated(g: Graph) -> Result:
    """A gate of its own matrix (SwiGLU)."""
    return _one(g, _self_attention, _feed_gated, _rms)


@network()
def gated_fused(g: Graph) -> Result:
    """Values and gates from one matrix (GEGLU)."""
    return _one(g, _self_attention, _feed_fused)


@network()
def convolved(g: Graph) -> Result:
    """Neurons between two convolutions of width 1."""
    return _one(g, _self_attention, _feed_convolved)


@network()
def mixed(g: Graph) -> Result:
    """Neurons with a depthwise convolution between, which makes the block one of convolution (SegFormer)."""
    x = g.matmul(g.input("batch", 16, 10, name="patches"), HIDDEN, bias=True)
    x = _block(g, x, _self_attention)
    return _classify(g, _join(g, "convolution", x, _feed_mixed(g, _norm(g, x))))


@network()
def experts(g: Graph) -> Result:
    """A mixture of three experts."""
    return _one(g, _self_attention, _feed_experts)


@network()
def parallel(g: Graph) -> Result:
    """Attention and neurons read one norm and are added one after the other (GPT-J)."""
    x = _words(g)
    for swapped in (False, True):
        y = _norm(g, x)
        attended, fed = _self_attention(g, y), _feed(g, y)
        x = _join(g, "ffn", _join(g, "attention", x, attended, swapped=swapped), fed, swapped=swapped)
    return _classify(g, x)


@network()
def parallel_sum(g: Graph) -> Result:
    """Attention and neurons are one block."""
    x = _words(g)
    y = _norm(g, x)
    return _classify(g, _join(g, "attention", x, g.add(_self_attention(g, y), _feed(g, y))))


@network()
def layer_scale(g: Graph) -> Result:
    """What a block adds is scaled per feature, and goes through a Dropout."""

    def scaled(layer: Layer) -> Layer:
        return lambda g, x: g.dropout(g.mul(layer(g, x), _vector(g, "gamma", HIDDEN)), 0.1)

    return _one(g, scaled(_self_attention), scaled(_feed))


@network()
def post_norm(g: Graph) -> Result:
    """Norms behind the sums, spelled out."""
    x = _words(g)
    for _ in range(2):
        x = _post_layer(g, x, _self_attention, norm=_norm_spelled)
    return g.matmul(x, 5)


@network()
def mask_of_first_block(g: Graph) -> Result:
    """The causal mask is computed from the normalised stream of the first block, for all blocks."""
    x = _words(g)
    y = _norm(g, x)
    mask = _causal(g, y)
    x = _join(g, "attention", x, _attended(g, *_separate(g, y), mask))
    x = _join(g, "ffn", x, _feed(g, _norm(g, x)))
    return _classify(g, _layer(g, x, lambda g, x: _attended(g, *_separate(g, x), mask)))


@network()
def inner_outputs(g: Graph) -> Result:
    """Attention weights and the sums of each block are outputs, too."""
    x = _words(g)
    q, k, v = _separate(g, _norm(g, x))
    weights = g.op("Softmax", _scaled(g, _products(g, q, k)), axis=-1)
    first = _join(g, "attention", x, _project(g, g.op("MatMul", weights, v)))
    second = _join(g, "ffn", first, _feed(g, _norm(g, first)))
    third = _layer(g, second, _self_attention)
    return _classify(g, third), weights, first, second


# Language


@network()
def bert(g: Graph) -> Result:
    """Words, positions and types; norms behind the sums; a pooled first position."""
    x = _words(g)
    x = g.add(x, g.op("Gather", _table(g, "types", 10, HIDDEN), _ints(g, "batch", "length", name="types")))
    x = _norm(g, _placed(g, x))
    for _ in range(2):
        x = _post_layer(g, x, _self_attention)
    first = g.op("Gather", x, g.const(0), axis=1)
    return g.matmul(x, 5), g.gemm(g.op("Tanh", g.gemm(first, 14)), 3)


@network()
def gpt2(g: Graph) -> Result:
    """The table of words is the classifier, too."""
    table = _table(g, "table", WORDS, HIDDEN)
    x = _placed(g, _words(g, table))
    for _ in range(2):
        x = _layer(g, x, lambda g, x: _attended(g, *_split(g, x), _causal(g, x)), _feed_tanh, _norm_spelled)
    return g.op("MatMul", _norm_spelled(g, x), g.transpose(table, 1, 0))


def _split(g: Graph, x: Tensor) -> Three:
    q, k, v = (_viewed(g, part) for part in g.split(_fused(g, x), [HIDDEN] * 3, axis=2))
    return q, k, v


@network()
def llama(g: Graph) -> Result:
    """Rotated grouped queries, gated neurons, norms without a mean."""
    x = _words(g)
    angles = _angles(g, x, 4)
    turn = g.op("Cos", angles), g.op("Sin", angles)

    def attend(g: Graph, x: Tensor) -> Tensor:
        q, k, v = _heads(g, x, 6, 4), _heads(g, x, GROUPS, 4), _heads(g, x, GROUPS, 4)
        q, k = _rotated(g, q, *turn), _rotated(g, k, *turn)
        return _attended(g, q, _repeated(g, k, 2), _repeated(g, v, 2), _causal(g, x))

    for _ in range(2):
        x = _layer(g, x, attend, _feed_gated, _rms)
    return g.matmul(_rms(g, x), WORDS)


@network()
def t5(g: Graph) -> Result:
    """Encoder and decoder on one table of words, each with its bias by distance."""
    table = _table(g, "table", WORDS, HIDDEN)
    x = _words(g, table)
    bias = _buckets(g, x)

    def plain(g: Graph, x: Tensor) -> Tensor:
        return _project(g, _biased(g, *_separate(g, x), bias))

    for _ in range(2):
        x = _layer(g, x, plain, _feed_gated, _rms)
    states = _rms(g, x)
    y = g.op("Gather", table, _ints(g, "batch", "target", name="target"))
    for _ in range(2):
        y = _layer(
            g,
            _block(g, y, _self_attention, norm=_rms),
            lambda g, y: _crossed(g, y, states),
            _feed_gated,
            _rms,
        )
    return g.op("MatMul", g.mul(_rms(g, y), _float(g, HIDDEN**-0.5)), g.transpose(table, 1, 0))


@network()
def whisper(g: Graph) -> Result:
    """Two convolutions over sound, an encoder, and a decoder of words."""
    sound = g.input("batch", 10, 16, name="sound")
    y = _gelu(g, g.conv(_gelu(g, g.conv(sound, 18, 3)), HIDDEN, 3, stride=2))
    y = g.transpose(y, 0, 2, 1)
    y = g.add(y, _table(g, "places", 8, HIDDEN))
    states = _norm(g, _layer(g, y, _self_attention))
    table = _table(g, "table", WORDS, HIDDEN)
    x = _placed(g, _words(g, table))
    x = _block(g, x, lambda g, x: _attended(g, *_separate(g, x), _causal(g, x)))
    x = _layer(g, x, lambda g, x: _crossed(g, x, states))
    return g.op("MatMul", _norm(g, x), g.transpose(table, 1, 0))


# Vision


def _patches(g: Graph, hidden: int = HIDDEN) -> Tensor:
    """A 4 x 4 map of patches of an image of 16 x 16."""
    return g.conv(g.input("batch", 3, 16, 16, name="image"), hidden, 4, stride=4, pad=0)


def _sequence(g: Graph, x: Tensor) -> Tensor:
    return g.transpose(_baked(g, x, "batch", x.extent(1), math.prod(x.spatial)), 0, 2, 1)


def _with_tokens(g: Graph, x: Tensor, count: int) -> Tensor:
    """Trained tokens in front of the sequence."""
    size = _sizes(g, x, "batch", -1, -1)
    size = g.op(
        "Where", g.op("Equal", size, g.const(-1)), g.const([1, 1, 1]), size, dtype=size.dtype, shape=(3,)
    )
    tokens = [
        g.op("Expand", _vector(g, "token", 1, 1, HIDDEN), size, shape=("batch", 1, HIDDEN))
        for _ in range(count)
    ]
    return g.concat(*tokens, x, axis=1)


def _fused_attention(g: Graph, x: Tensor) -> Tensor:
    y = g.transpose(_fused(g, x, 3, HEADS, WIDTH), 2, 0, 3, 1, 4)
    q, k, v = (g.op("Gather", y, g.const(i), axis=0) for i in range(3))
    return _attended(g, q, k, v)


@network()
def vit(g: Graph) -> Result:
    """A class token in front of the patches."""
    x = _with_tokens(g, _sequence(g, _patches(g)), 1)
    x = g.add(x, _table(g, "places", 1, 17, HIDDEN))
    for _ in range(2):
        x = _layer(g, x, _fused_attention)
    return g.gemm(g.op("Gather", _norm(g, x), g.const(0), axis=1), 5)


@network()
def deit(g: Graph) -> Result:
    """A class token and one of a teacher."""
    x = _with_tokens(g, _sequence(g, _patches(g)), 2)
    x = g.add(x, _table(g, "places", 1, 18, HIDDEN))
    x = _norm(g, _layer(g, x, _fused_attention))
    first, second = (g.gemm(g.op("Gather", x, g.const(i), axis=1), 5) for i in range(2))
    return g.op("Div", g.add(first, second), _float(g, 2.0))


def _rolled(g: Graph, x: Tensor, by: int) -> Tensor:
    """Both axes of a map shifted around."""
    for axis in (1, 2):
        x = g.concat(g.slice(x, [by], [END], [axis]), g.slice(x, [0], [by], [axis]), axis=axis)
    return x


def _window_attention(g: Graph, x: Tensor, mask: Tensor | None) -> Tensor:
    """Heads of (windows, 4 positions, embedding) with a trained bias for each pair of positions."""
    y = g.transpose(_baked(g, _fused(g, x), "windows", 4, 3, HEADS, WIDTH), 2, 0, 3, 1, 4)
    q, k, v = (g.op("Gather", y, g.const(i), axis=0) for i in range(3))
    rows, columns = np.divmod(np.arange(4), 2)
    index = (rows[:, None] - rows + 1) * 3 + columns[:, None] - columns + 1
    bias = g.op("Gather", _table(g, "bias", 9, HEADS), g.const(index.ravel()))
    bias = g.unsqueeze(g.transpose(g.reshape(bias, 4, 4, -1), 2, 0, 1), 0)
    scores = g.add(g.op("MatMul", g.mul(q, _float(g, WIDTH**-0.5)), g.transpose(k, 0, 1, 3, 2)), bias)
    if mask is not None:
        square = ("batch", 4, HEADS, 4, 4)
        scores = g.add(g.reshape(scores, -1, 4, HEADS, 4, 4, shape=square), g.unsqueeze(mask, 0, 2))
        scores = g.reshape(scores, -1, HEADS, 4, 4, shape=("windows", HEADS, 4, 4))
    y = g.transpose(_mixed(g, scores, v), 0, 2, 1, 3)
    return g.matmul(_baked(g, y, "windows", 4, HIDDEN), HIDDEN, bias=True)


def _windows(g: Graph, x: Tensor, shift: int) -> Tensor:
    """Attention inside the 2 x 2 windows of a 4 x 4 map, perhaps shifted."""
    y = (
        _rolled(g, _baked(g, x, "batch", 4, 4, HIDDEN), shift)
        if shift
        else _baked(g, x, "batch", 4, 4, HIDDEN)
    )
    y = g.transpose(
        g.reshape(y, 0, 2, 2, 2, 2, HIDDEN, shape=("batch", 2, 2, 2, 2, HIDDEN)), 0, 1, 3, 2, 4, 5
    )
    y = _baked(g, y, "windows", 4, HIDDEN)
    mask = (
        g.store(g.fresh("mask"), -10 * g.rng.integers(0, 2, (4, 4, 4)).astype(np.float32)) if shift else None
    )
    y = _window_attention(g, y, mask)
    y = g.reshape(y, -1, 2, 2, 2, 2, HIDDEN, shape=("batch", 2, 2, 2, 2, HIDDEN))
    y = _baked(g, g.transpose(y, 0, 1, 3, 2, 4, 5), "batch", 4, 4, HIDDEN)
    return _baked(g, _rolled(g, y, 4 - shift) if shift else y, "batch", 16, HIDDEN)


@network()
def swin(g: Graph) -> Result:
    """Windows, shifted windows, and patches merged two by two."""
    x = _norm(g, _sequence(g, _patches(g)))
    for shift in (0, 1):
        x = _layer(g, x, lambda g, x, shift=shift: _windows(g, x, shift))  # type: ignore[misc]
    x = _baked(g, x, "batch", 4, 4, HIDDEN)
    corners = [g.slice(x, [i, j], [END, END], [1, 2], [2, 2]) for j in (0, 1) for i in (0, 1)]
    x = _baked(g, g.concat(*corners, axis=-1), "batch", 4, 4 * HIDDEN)
    x = g.matmul(_norm(g, x), 36)
    x = _join(g, "ffn", x, _feed(g, _norm(g, x)))
    return g.gemm(g.reduce("ReduceMean", x, 1, keepdims=False), 5)


@network()
def convnext(g: Graph) -> Result:
    """A depthwise convolution, a norm over channels, and neurons."""
    x = _patches(g, 20)
    for i in range(2):
        y = _norm(g, g.transpose(g.conv(x, 20, 7, group=20), 0, 2, 3, 1))
        y = g.mul(_feed(g, y), _vector(g, "gamma", 20))
        x = _join(g, "convolution", x, g.transpose(y, 0, 3, 1, 2), swapped=bool(i))
    return g.gemm(g.flatten(g.gap(x)), 5)


@network()
def svtr(g: Graph) -> Result:
    """A stem of convolutions, attention on the rows of a map, a convolution behind, and text."""
    x = g.conv_bn(g.input("batch", 3, 8, "width", name="image"), 10, stride=2, act="relu")
    x = g.conv_bn(x, HIDDEN, stride=2)
    x = g.transpose(_baked(g, x, "batch", HIDDEN, "length"), 0, 2, 1)
    for _ in range(2):
        x = _layer(g, x, _fused_attention, norm=_norm)
    x = g.reshape(g.transpose(x, 0, 2, 1), 0, HIDDEN, 2, -1, shape=("batch", HIDDEN, 2, "columns"))
    x = g.act(g.conv(x, 30, 3, stride=(2, 1)), "hardswish")
    x = g.transpose(g.squeeze(x, 2), 0, 2, 1)
    return g.op("Softmax", g.matmul(x, 7), axis=2)


@network()
def mixer(g: Graph) -> Result:
    """Neurons across the 16 patches, then neurons across the features."""
    x = _sequence(g, _patches(g))
    for _ in range(2):
        y = g.matmul(_gelu(g, g.matmul(g.transpose(_norm(g, x), 0, 2, 1), 14, bias=True)), 16, bias=True)
        x = _join(g, "ffn", x, g.transpose(y, 0, 2, 1))
        x = _join(g, "ffn", x, _feed(g, _norm(g, x)))
    return g.gemm(g.reduce("ReduceMean", x, 1, keepdims=False), 5)


@network()
def clip(g: Graph) -> Result:
    """Patches and words, normalised and multiplied, in both orders."""
    x = _layer(g, _sequence(g, _patches(g)), _fused_attention)
    image = g.matmul(g.reduce("ReduceMean", _norm(g, x), 1, keepdims=False), 18)
    y = _norm(g, _layer(g, _placed(g, _words(g)), _self_attention, _feed_tanh))
    text = g.matmul(g.op("Gather", y, g.const(0), axis=1), 18)
    image, text = (g.op("Div", tower, g.reduce("ReduceL2", tower, 1)) for tower in (image, text))
    heat = g.op("Exp", g.const(1.5, np.float32))
    scores = g.op("MatMul", g.mul(image, heat), g.transpose(text, 1, 0))
    return scores, g.transpose(scores, 1, 0)


# Graphs and sound


def _edges(g: Graph) -> Sequence[Tensor]:
    """The ends of each edge."""
    return [_ints(g, "edges", name=name) for name in ("source", "target")]


@network()
def messages(g: Graph) -> Result:
    """Two rounds of messages between 10 vertices, which ScatterND and ScatterElements add up."""
    x = g.matmul(g.input(10, 7, name="vertices"), HIDDEN, bias=True)
    source, target = _edges(g)
    for by_rows in (True, False):
        ends = g.concat(g.op("Gather", x, source), g.op("Gather", x, target), axis=1)
        y = g.matmul(g.relu(g.matmul(ends, NEURONS, bias=True)), HIDDEN)
        nothing = g.op("Mul", x, _float(g, 0.0))
        if by_rows:
            total = g.op("ScatterND", nothing, g.unsqueeze(target, 1), y, reduction="add")
        else:
            index = g.op("Expand", g.unsqueeze(target, 1), g.op("Shape", y), shape=("edges", HIDDEN))
            total = g.op("ScatterElements", nothing, index, y, axis=0, reduction="add")
        x = _join(g, "ffn", x, g.relu(g.matmul(total, HIDDEN)))
    return g.matmul(x, 5)


@network()
def vocoder(g: Graph) -> Result:
    """Transposed convolutions with residual blocks of dilated convolutions between (HiFi-GAN)."""
    x = g.conv(g.input("batch", 10, "frames", name="mel"), HIDDEN, 7)
    for channels in (18, 14):
        x = g.conv_transpose(g.op("LeakyRelu", x, alpha=0.1), channels, 4, stride=2, pad=1)
        branches = []
        for k in (3, 5):
            y = x
            for dilation in (1, 3):
                z = g.op("LeakyRelu", y, alpha=0.1)
                z = g.conv(
                    g.op("LeakyRelu", g.conv(z, channels, k, dilation=dilation), alpha=0.1), channels, k
                )
                y = _join(g, "convolution", y, z, swapped=True)
            branches.append(y)
        x = g.op("Div", g.add(*branches), _float(g, 2.0))
    return g.op("Tanh", g.conv(x, 1, 7))


@network()
def speech(g: Graph) -> Result:
    """Attention, a gated convolution over time with a norm over batches, and half-steps of neurons (Conformer)."""
    x = g.matmul(g.input("batch", "length", 10, name="sound"), HIDDEN, bias=True)
    half = _float(g, 0.5)
    x = _join(g, "ffn", x, g.mul(_feed(g, _norm(g, x)), half))
    x = _block(g, x, _self_attention)
    y = g.conv(g.transpose(_norm(g, x), 0, 2, 1), 36, 1)
    value, gate = g.split(y, 2, axis=1)
    y = g.conv(g.mul(value, g.op("Sigmoid", gate)), 18, 5, group=18)
    y = g.conv(g.act(g.bn(y), "silu"), HIDDEN, 1)
    x = _join(g, "convolution", x, g.transpose(y, 0, 2, 1))
    x = _join(g, "ffn", x, g.mul(_feed(g, _norm(g, x)), half))
    return _classify(g, x)


# Forms of single architectures


def _merged(g: Graph, x: Tensor) -> Tensor:
    """(batch, length, embedding) as (batch and heads, length, width), the first extent computed."""
    y = _viewed(g, x)
    rows = g.unsqueeze(g.mul(_size(g, x, 0), g.const(HEADS)), 0)
    return g.op("Reshape", y, g.concat(rows, g.const([-1, WIDTH]), axis=0), shape=("rows", x.shape[1], WIDTH))


@network()
def batch_and_heads(g: Graph) -> Result:
    """Heads are part of the batch (BART), but for the mask."""
    x = _words(g)
    mask = _causal(g, x)

    def attend(g: Graph, x: Tensor) -> Tensor:
        q, k, v = (_merged(g, g.matmul(x, HIDDEN, bias=True)) for _ in range(3))
        scores = g.op("MatMul", g.mul(q, _float(g, WIDTH**-0.5)), g.transpose(k, 0, 2, 1))
        apart = g.op(
            "Reshape",
            scores,
            g.concat(g.unsqueeze(_size(g, x, 0), 0), g.const([HEADS]), g.op("Shape", mask), axis=0),
            shape=("batch", HEADS, "length", "length"),
        )
        scores = g.op("Reshape", g.add(apart, mask), g.op("Shape", scores), shape=scores.shape)
        y = _baked(g, _mixed(g, scores, v), "rows", "length", WIDTH)
        y = g.op(
            "Reshape",
            y,
            _sizes(g, x, "batch", HEADS, "length", WIDTH),
            shape=("batch", HEADS, "length", WIDTH),
        )
        return _project(g, y)

    return _classify(g, _layer(g, x, attend))


@network()
def batch_and_heads_einsum(g: Graph) -> Result:
    """Heads are part of the batch of an Einsum, over states that are an input (Stable Diffusion)."""
    x = _words(g)
    states = g.input("batch", "frames", 20, name="states")

    def attend(g: Graph, x: Tensor) -> Tensor:
        q, k, v = (_merged(g, g.matmul(y, HIDDEN)) for y in (x, states, states))
        scores = g.mul(g.op("Einsum", q, k, equation="bid,bjd->bij"), _float(g, WIDTH**-0.5))
        y = g.op("Einsum", g.op("Softmax", scores, axis=-1), v, equation="bij,bjd->bid")
        return _project(g, _baked(g, y, "batch", HEADS, "length", WIDTH))

    def _baked(g: Graph, y: Tensor, *dims: Dim) -> Tensor:
        return g.op("Reshape", y, _sizes(g, x, *dims), shape=dims)

    return _classify(g, _layer(g, x, attend, _feed_fused))


@network()
def latent_queries(g: Graph) -> Result:
    """5 trained queries gather what there is in the words (Perceiver)."""
    x = _words(g)
    y = _table(g, "latents", 1, 5, HIDDEN)
    q = g.transpose(g.reshape(g.matmul(_norm(g, y), HIDDEN), 1, 5, HEADS, WIDTH), 0, 2, 1, 3)
    y = _join(
        g, "attention", _expanded(g, y, x, 5), _attended(g, q, *(_heads(g, _norm(g, x)) for _ in range(2)))
    )
    return _classify(g, _layer(g, y, _self_attention))


def _expanded(g: Graph, x: Tensor, like: Tensor, count: int) -> Tensor:
    """One for each of a batch."""
    return g.op("Expand", x, _sizes(g, like, "batch", count, HIDDEN), shape=("batch", count, HIDDEN))


@network()
def heads_one_by_one(g: Graph) -> Result:
    """Each of 2 heads is split off, attends for itself, and is joined again by Concat."""

    def attend(g: Graph, x: Tensor) -> Tensor:
        heads = zip(*(g.split(g.matmul(x, 10), [5, 5], axis=2) for _ in range(3)), strict=True)
        parts = [_mixed(g, _scaled(g, g.op("MatMul", q, g.transpose(k, 0, 2, 1)), 5), v) for q, k, v in heads]
        return g.matmul(g.concat(*parts, axis=2), HIDDEN)

    return _one(g, attend)


@network()
def grouped_fused(g: Graph) -> Result:
    """6 query heads and 3 of keys and of values from one matrix, split unevenly (Phi-3)."""

    def attend(g: Graph, x: Tensor) -> Tensor:
        parts = g.split(g.matmul(x, 48), [24, 12, 12], axis=2)
        q, k, v = (
            g.transpose(_baked(g, part, "batch", "length", count, 4), 0, 2, 1, 3)
            for part, count in zip(parts, (6, GROUPS, GROUPS), strict=True)
        )
        return _attended(g, q, _repeated(g, k, 2), _repeated(g, v, 2))

    return _one(g, attend, _feed_gated, _rms)


@network()
def grouped_interleaved(g: Graph) -> Result:
    """(groups, 2 queries and a key and a value, width) in one matrix (Falcon)."""

    def attend(g: Graph, x: Tensor) -> Tensor:
        y = _baked(g, g.matmul(x, 48), "batch", "length", GROUPS, 4, 4)
        q = _computed(g, g.slice(y, [0], [-2], [3]), "batch", "length", 6, 4)
        k, v = (
            _computed(g, _across(g, g.slice(y, [i], [i + 1 or END], [3])), "batch", "length", 6, 4)
            for i in (-2, -1)
        )
        q, k, v = (g.transpose(part, 0, 2, 1, 3) for part in (q, k, v))
        return _attended(g, q, k, v)

    def _across(g: Graph, x: Tensor) -> Tensor:
        return g.op("Expand", x, g.const([1, 1, 1, 2, 1]), shape=("batch", "length", GROUPS, 2, 4))

    return _one(g, attend)


@network()
def rotary_part(g: Graph) -> Result:
    """The first 4 of 6 of each head are turned (GPT-NeoX)."""

    def attend(g: Graph, x: Tensor) -> Tensor:
        q, k, v = _separate(g, x)
        angles = _angles(g, x, 4)
        turn = g.op("Cos", angles), g.op("Sin", angles)
        q, k = (
            g.concat(
                _rotated(g, g.slice(part, [0], [4], [3]), *turn), g.slice(part, [4], [END], [3]), axis=-1
            )
            for part in (q, k)
        )
        return _attended(g, q, k, v)

    return _one(g, attend)


@network()
def latent_attention(g: Graph) -> Result:
    """Keys and values of 4 heads from 14 numbers, and 4 more to turn that all heads share (DeepSeek)."""

    def attend(g: Graph, x: Tensor) -> Tensor:
        angles = _angles(g, x, 4)
        turn = g.op("Cos", angles), g.op("Sin", angles)
        plain, turned = g.split(_heads(g, x, HEADS, 10), [6, 4], axis=3)
        q = g.concat(plain, _rotated(g, turned, *turn), axis=-1)
        narrow, shared = g.split(g.matmul(x, 18), [14, 4], axis=2)
        shared = _rotated(g, g.transpose(_computed(g, shared, "batch", "length", 1, 4), 0, 2, 1, 3), *turn)
        keys, v = g.split(_heads(g, _rms(g, narrow), HEADS, 11), [6, 5], axis=3)
        size = _sizes(g, x, "batch", HEADS, "length", 4)
        shared = g.op("Expand", shared, size, shape=("batch", HEADS, "length", 4))
        return _attended(g, q, g.concat(keys, shared, axis=-1), v)

    return _one(g, attend, _feed_gated, _rms)


@network()
def sinks(g: Graph) -> Result:
    """One more score per head takes what no position deserves, and is cut off again (gpt-oss)."""

    def attend(g: Graph, x: Tensor) -> Tensor:
        q, k, v = _separate(g, x)
        sink = _vector(g, "sink", 1, HEADS, 1, 1)
        sink = g.op(
            "Expand", sink, _sizes(g, q, "batch", 1, "length", 1), shape=("batch", HEADS, "length", 1)
        )
        scores = _scaled(g, _products(g, q, k))
        scores = g.op("Concat", scores, sink, axis=-1, shape=(*q.shape[:3], "more"))
        weights = g.op("Softmax", scores, axis=-1)
        weights = g.op(
            "Slice", weights, g.const([0]), g.const([-1]), g.const([3]), shape=(*q.shape[:3], "length")
        )
        return _project(g, g.op("MatMul", weights, v))

    return _one(g, attend)


@network()
def sandwich(g: Graph) -> Result:
    """Norms on both sides of a block, scores under a tanh, and a scale on the words (Gemma)."""
    x = g.mul(_words(g), _float(g, HIDDEN**0.5))

    def attend(g: Graph, x: Tensor) -> Tensor:
        q, k, v = _separate(g, x)
        scores = g.op("Tanh", g.op("Div", _products(g, q, k), _float(g, 5.0)))
        return _rms(g, _project(g, _mixed(g, g.mul(scores, _float(g, 5.0)), v)))

    return _classify(g, _layer(g, x, attend, lambda g, x: _rms(g, _feed_gated(g, x)), _rms))


@network()
def scaled_stream(g: Graph) -> Result:
    """The stream is scaled in front of every sum (DeepNorm)."""
    x = _words(g)
    for _ in range(2):
        x = _norm(g, _join(g, "attention", g.mul(x, _float(g, 1.5)), _self_attention(g, x)))
        x = _norm(g, _join(g, "ffn", g.mul(x, _float(g, 1.5)), _feed(g, x)))
    return g.matmul(x, 5)


@network()
def long_skip(g: Graph) -> Result:
    """The stream of the first layer is joined to that of the third by Concat and a matrix (U-ViT)."""
    x = first = _layer(g, _words(g), _self_attention)
    x = _layer(g, x, _self_attention)
    x = g.matmul(g.concat(x, first, axis=-1), HIDDEN, bias=True)
    return _classify(g, _layer(g, x, _self_attention))


@network()
def retention(g: Graph) -> Result:
    """A decay per head in place of a softmax, and a norm of each head (RetNet)."""

    def attend(g: Graph, x: Tensor) -> Tensor:
        q, k, v = _separate(g, x)
        decay = g.store("decay", np.log(np.linspace(0.5, 0.9, HEADS, dtype=np.float32)).reshape(-1, 1, 1))
        weights = g.op("Exp", g.mul(decay, _real(g, g.op("Abs", _distances(g, x)))))
        y = _norm_spelled(g, g.op("MatMul", g.mul(_products(g, q, k), weights), v))
        y = _computed(g, g.transpose(y, 0, 2, 1, 3), "batch", "length", HIDDEN)
        return g.matmul(g.mul(g.act(g.matmul(x, HIDDEN), "silu"), y), HIDDEN)

    return _one(g, attend)


@network()
def disentangled(g: Graph) -> Result:
    """Queries meet keys of distances, too, which GatherElements brings to their positions (DeBERTa)."""

    def attend(g: Graph, x: Tensor) -> Tensor:
        q, k, v = _separate(g, x)
        places = g.transpose(
            g.reshape(g.matmul(_table(g, "distances", 9, HIDDEN), HIDDEN), 9, HEADS, WIDTH), 1, 2, 0
        )
        near = g.add(g.op("Max", g.op("Min", _distances(g, x), g.const(4)), g.const(-4)), g.const(4))
        size = _sizes(g, q, "batch", HEADS, "length")
        last = g.unsqueeze(_size(g, x, 1), 0)
        square = ("batch", HEADS, "length", "length")
        index = g.op("Expand", near, g.concat(size, last, axis=0), shape=square)
        apart = g.op("GatherElements", g.op("MatMul", q, places), index, axis=3)
        return _project(g, _mixed(g, _scaled(g, g.add(_products(g, q, k), apart), 3 * WIDTH), v))

    return _one(g, attend)


@network()
def shifted_distances(g: Graph) -> Result:
    """Scores by distance are shifted into place by Pad, Reshape and Slice; two biases per head (Transformer-XL)."""

    def attend(g: Graph, x: Tensor) -> Tensor:
        q, k, v = (
            g.transpose(_baked(g, g.matmul(x, HIDDEN), "batch", 8, HEADS, WIDTH), 0, 2, 1, 3)
            for _ in range(3)
        )
        table = g.reshape(g.matmul(_table(g, "distances", 15, HIDDEN), HIDDEN), 15, HEADS, WIDTH)
        near, far = (g.add(q, _vector(g, "bias", HEADS, 1, WIDTH)) for _ in range(2))
        scores = g.pad(g.op("MatMul", far, g.transpose(table, 1, 2, 0)), [0, 0, 0, 1], [0, 0, 0, 0])
        scores = g.slice(_baked(g, scores, "batch", HEADS, 16, 8), [1], [END], [2])
        scores = g.slice(_baked(g, scores, "batch", HEADS, 8, 15), [0], [8], [3])
        y = g.transpose(_mixed(g, _scaled(g, g.add(_products(g, near, k), scores)), v), 0, 2, 1, 3)
        return g.matmul(_baked(g, y, "batch", 8, HIDDEN), HIDDEN)

    x = g.matmul(g.input("batch", 8, 10, name="sound"), HIDDEN)
    return _classify(g, _layer(g, x, attend))


@network()
def sentence(g: Graph) -> Result:
    """The mean of the words that count, and the word of the highest number, by GatherND."""
    ids = _ints(g, "batch", "length", name="ids")
    x = _norm(g, _layer(g, g.op("Gather", _table(g, "words", WORDS, HIDDEN), ids), _self_attention))
    counts = g.unsqueeze(_real(g, g.op("Greater", ids, g.const(2))), 2)
    total = g.reduce("ReduceSum", g.mul(x, counts), 1, keepdims=False)
    mean = g.op("Div", total, g.op("Max", g.reduce("ReduceSum", counts, 1, keepdims=False), _float(g, 1e-6)))
    highest = g.unsqueeze(g.op("ArgMax", ids, axis=1, keepdims=0), 1)
    index = g.concat(g.unsqueeze(_range(g, ids, 0), 1), highest, axis=1)
    last = g.op("GatherND", x, index, shape=("batch", HIDDEN))
    return g.matmul(mean, 18), g.matmul(last, 7)


# Forms of single architectures for images and sound


@network()
def cross_covariance(g: Graph) -> Result:
    """Features attend to features: a softmax over the width of each head (XCiT)."""

    def attend(g: Graph, x: Tensor) -> Tensor:
        q, k, v = (
            g.transpose(_computed(g, g.matmul(x, HIDDEN), *x.shape[:2], HEADS, WIDTH), 0, 2, 3, 1)
            for _ in "qkv"
        )
        q, k = (g.op("Div", part, g.reduce("ReduceL2", part, -1)) for part in (q, k))
        heat = _vector(g, "heat", HEADS, 1, 1, mean=1.0)
        y = _mixed(g, g.mul(_products(g, q, k), heat), v)
        return _project(g, g.transpose(y, 0, 1, 3, 2))

    return _one(g, attend)


@network()
def reduced_keys(g: Graph) -> Result:
    """Keys and values of a map of half the side, from one matrix (PVT)."""

    def attend(g: Graph, x: Tensor) -> Tensor:
        q = g.transpose(_baked(g, g.matmul(x, HIDDEN), "batch", 16, HEADS, WIDTH), 0, 2, 1, 3)
        y = g.conv(_baked(g, g.transpose(x, 0, 2, 1), "batch", HIDDEN, 4, 4), HIDDEN, 2, stride=2, pad=0)
        y = _norm(g, g.transpose(_baked(g, y, "batch", HIDDEN, 4), 0, 2, 1))
        y = g.transpose(_baked(g, g.matmul(y, 2 * HIDDEN), "batch", 4, 2, HEADS, WIDTH), 2, 0, 3, 1, 4)
        k, v = (g.op("Gather", y, g.const(i), axis=0) for i in range(2))
        return _attended(g, q, k, v)

    x = _block(g, _sequence(g, _patches(g)), attend)
    x = _join(g, "convolution", x, _feed_mixed(g, _norm(g, x)))
    return g.gemm(g.reduce("ReduceMean", x, 1, keepdims=False), 5)


@network()
def pooled_keys(g: Graph) -> Result:
    """Depthwise convolutions over the map of each head, heads being part of the batch (MViT)."""

    def pool(g: Graph, x: Tensor, stride: int) -> Tensor:
        y = _baked(g, g.transpose(_baked(g, x, "rows", 16, WIDTH), 0, 2, 1), "rows", WIDTH, 4, 4)
        y = g.conv(y, WIDTH, 3, stride=stride, group=WIDTH, bias=False)
        size = math.prod(y.spatial)
        y = g.transpose(_baked(g, y, "rows", WIDTH, size), 0, 2, 1)
        return _norm(g, g.reshape(y, -1, HEADS, size, WIDTH, shape=("batch", HEADS, size, WIDTH)))

    def attend(g: Graph, x: Tensor) -> Tensor:
        y = g.transpose(_fused(g, x, 3, HEADS, WIDTH), 2, 0, 3, 1, 4)
        q, k, v = (pool(g, g.op("Gather", y, g.const(i), axis=0), 1 + (i > 0)) for i in range(3))
        scores = _scaled(g, _products(g, q, k))
        y = g.transpose(_mixed(g, scores, v), 0, 2, 1, 3)
        return g.matmul(_baked(g, y, "batch", 16, HIDDEN), HIDDEN)

    x = _layer(g, _sequence(g, _patches(g)), attend)
    return g.gemm(g.reduce("ReduceMean", x, 1, keepdims=False), 5)


@network()
def convolved_projections(g: Graph) -> Result:
    """Queries, keys and values from depthwise convolutions with norms over batches (CvT)."""

    def attend(g: Graph, x: Tensor) -> Tensor:
        image = _baked(g, g.transpose(x, 0, 2, 1), "batch", HIDDEN, 4, 4)
        q, k, v = (
            _viewed(
                g, g.matmul(_sequence(g, g.bn(g.conv(image, HIDDEN, 3, group=HIDDEN, bias=False))), HIDDEN)
            )
            for _ in range(3)
        )
        return _attended(g, q, k, v)

    x = _layer(g, _sequence(g, _patches(g)), attend)
    return g.gemm(g.reduce("ReduceMean", x, 1, keepdims=False), 5)


@network()
def computed_bias(g: Graph) -> Result:
    """The bias of each pair of positions comes from a small network on their distance (Swin 2)."""

    def attend(g: Graph, x: Tensor) -> Tensor:
        y = g.matmul(g.relu(g.matmul(_table(g, "distances", 9, 2), 14, bias=True)), HEADS)
        index = g.rng.integers(0, 9, 256)
        bias = g.reshape(g.op("Gather", g.reshape(y, -1, HEADS), g.const(index), axis=0), 16, 16, -1)
        bias = g.mul(g.op("Sigmoid", g.unsqueeze(g.transpose(bias, 2, 0, 1), 0)), _float(g, 16.0))
        return _attended(g, *_separate(g, x), bias)

    x = _post_layer(g, _sequence(g, _patches(g)), attend)
    return g.gemm(g.reduce("ReduceMean", x, 1, keepdims=False), 5)


@network()
def decomposed_bias(g: Graph) -> Result:
    """Queries meet tables of rows and of columns by Einsum (Segment Anything)."""

    def attend(g: Graph, x: Tensor) -> Tensor:
        y = g.transpose(_fused(g, x, 3, HEADS, WIDTH), 2, 0, 3, 1, 4)
        y = g.reshape(y, 3, -1, 16, WIDTH, shape=(3, "rows", 16, WIDTH))
        q, k, v = (g.op("Gather", y, g.const(i), axis=0) for i in range(3))
        image = _baked(g, q, "rows", 4, 4, WIDTH)
        rows = g.op("Einsum", image, _table(g, "rows", 4, 4, WIDTH), equation="bhwc,hkc->bhwk")
        columns = g.op("Einsum", image, _table(g, "columns", 4, 4, WIDTH), equation="bhwc,wkc->bhwk")
        scores = _scaled(g, g.op("MatMul", q, g.transpose(k, 0, 2, 1)))
        scores = g.add(_baked(g, scores, "rows", 4, 4, 4, 4), g.unsqueeze(rows, 4), g.unsqueeze(columns, 3))
        y = _mixed(g, _baked(g, scores, "rows", 16, 16), v)
        y = g.transpose(g.reshape(y, -1, HEADS, 16, WIDTH, shape=("batch", HEADS, 16, WIDTH)), 0, 2, 1, 3)
        return g.matmul(_baked(g, y, "batch", 16, HIDDEN), HIDDEN)

    x = _layer(g, _sequence(g, _patches(g)), attend)
    return g.gemm(g.reduce("ReduceMean", x, 1, keepdims=False), 5)


@network()
def levit(g: Graph) -> Result:
    """Keys narrower than values, norms over batches on positions side by side, a table of biases per head."""

    def dense(g: Graph, x: Tensor, width: int) -> Tensor:
        y = g.bn(_baked(g, g.matmul(x, width), "rows", width))
        return g.reshape(y, -1, 16, width, shape=("batch", 16, width))

    def attend(g: Graph, x: Tensor) -> Tensor:
        y = _baked(g, dense(g, x, HEADS * 14), "batch", 16, HEADS, 14)
        q, k, v = (g.transpose(part, 0, 2, 1, 3) for part in g.split(y, [4, 4, 6], axis=3))
        index = g.const(g.rng.integers(0, 12, (16, 16)))
        bias = g.op("Gather", _table(g, "biases", HEADS, 12), index, axis=1)
        y = g.transpose(_mixed(g, g.add(_scaled(g, _products(g, q, k), 4), bias), v), 0, 2, 1, 3)
        return dense(g, g.op("HardSwish", _baked(g, y, "batch", 16, HIDDEN)), HIDDEN)

    x = _sequence(g, _patches(g))
    x = _join(g, "attention", x, attend(g, x))
    x = _join(g, "ffn", x, dense(g, g.op("HardSwish", dense(g, x, NEURONS)), HIDDEN))
    return g.gemm(g.reduce("ReduceMean", x, 1, keepdims=False), 5)


@network()
def resized_positions(g: Graph) -> Result:
    """A trained map of 3 x 3 positions, resized to that of the patches (DINOv2)."""
    x = _sequence(g, _patches(g))
    places = g.transpose(g.reshape(_table(g, "places", 1, 9, HIDDEN), 1, 3, 3, HIDDEN), 0, 3, 1, 2)
    places = g.resize(places, sizes=[1, HIDDEN, 4, 4], shape=(1, HIDDEN, 4, 4), mode="linear")
    x = g.add(x, g.reshape(g.transpose(places, 0, 2, 3, 1), 1, -1, HIDDEN, shape=(1, 16, HIDDEN)))
    return g.gemm(g.reduce("ReduceMean", _layer(g, x, _fused_attention), 1, keepdims=False), 5)


@network()
def spatial_gate(g: Graph) -> Result:
    """Half of the neurons, mixed across positions by a matrix, gate the other half (gMLP)."""
    x = _sequence(g, _patches(g))
    for _ in range(2):
        value, gate = g.split(_gelu(g, g.matmul(_norm(g, x), 2 * 18, bias=True)), 2, axis=-1)
        gate = g.transpose(g.matmul(g.transpose(_norm(g, gate), 0, 2, 1), 16, bias=True), 0, 2, 1)
        x = _join(g, "ffn", x, g.matmul(g.mul(value, gate), HIDDEN, bias=True))
    return g.gemm(g.reduce("ReduceMean", x, 1, keepdims=False), 5)


@network()
def grouped_positions(g: Graph) -> Result:
    """Positions come from a grouped convolution over the words (wav2vec 2)."""
    x = g.transpose(g.conv(g.input("batch", 1, 64, name="sound"), HIDDEN, 8, stride=8, pad=0), 0, 2, 1)
    y = g.conv(g.transpose(x, 0, 2, 1), HIDDEN, 3, group=4)
    x = _norm(g, _join(g, "convolution", x, g.transpose(_gelu(g, y), 0, 2, 1)))
    return g.matmul(_post_layer(g, x, _self_attention), 5)


@network()
def pixels(g: Graph) -> Result:
    """One head over the pixels of a map, behind a norm of groups of channels (VAE)."""
    x = _patches(g)
    y = g.op("Reshape", x, g.const([0, 4, -1]), shape=("batch", 4, 96))
    y = g.op("InstanceNormalization", y, _vector(g, "one", 4, mean=1.0), _vector(g, "nil", 4))
    y = g.op("Reshape", y, g.op("Shape", x), shape=x.shape)
    y = g.add(g.mul(y, _vector(g, "scale", HIDDEN, 1, 1, mean=1.0)), _vector(g, "shift", HIDDEN, 1, 1))
    q, k, v = (_baked(g, g.conv(y, 18, 1), "batch", 18, 16) for _ in range(3))
    weights = g.op("Softmax", _scaled(g, g.op("MatMul", g.transpose(q, 0, 2, 1), k), 18), axis=2)
    y = _baked(g, g.op("MatMul", v, g.transpose(weights, 0, 2, 1)), "batch", 18, 4, 4)
    x = _join(g, "attention", x, g.conv(y, HIDDEN, 1))
    return g.gemm(g.flatten(g.gap(x)), 5)


# Weights, keys and streams that are shared or split


@network()
def one_layer_twice(g: Graph) -> Result:
    """Two layers of the same matrices (ALBERT)."""
    matrices = {name: g.store(f"{name}.weight", g.he(a, b, fan_in=a)) for name, a, b in _SHARED}

    def attend(g: Graph, x: Tensor) -> Tensor:
        q, k, v = (_viewed(g, g.op("MatMul", x, matrices[name])) for name in ("query", "key", "value"))
        y = g.transpose(_mixed(g, _scaled(g, _products(g, q, k)), v), 0, 2, 1, 3)
        return g.op("MatMul", _baked(g, y, "batch", "length", HIDDEN), matrices["output"])

    x = _words(g)
    for _ in range(2):
        x = _layer(
            g,
            x,
            attend,
            lambda g, x: g.op("MatMul", g.relu(g.op("MatMul", x, matrices["up"])), matrices["down"]),
        )
    return _classify(g, x)


_SHARED = (
    *((name, HIDDEN, HIDDEN) for name in ("query", "key", "value", "output")),
    ("up", HIDDEN, NEURONS),
    ("down", NEURONS, HIDDEN),
)


@network()
def keys_of_first_layer(g: Graph) -> Result:
    """The second layer attends to keys and values of the first (Gemma 3n)."""
    x = _words(g)
    q, k, v = _separate(g, _norm(g, x))
    x = _join(g, "attention", x, _attended(g, q, k, v))
    x = _join(g, "ffn", x, _feed(g, _norm(g, x)))
    return _classify(g, _layer(g, x, lambda g, x: _attended(g, _heads(g, x), k, v)))


@network()
def class_attention(g: Graph) -> Result:
    """The last two blocks change a class token alone, which attends to itself and the patches (CaiT)."""
    patches = _layer(g, _sequence(g, _patches(g)), _fused_attention)
    x = _expanded(g, _vector(g, "token", 1, 1, HIDDEN), patches, 1)
    x = g.add(x, g.matmul(g.reduce("ReduceMean", patches, 1), HIDDEN))
    both = _norm(g, g.concat(x, patches, axis=1))
    first = g.slice(both, [0], [1], [1])
    x = _join(g, "attention", x, _attended(g, _heads(g, first), _heads(g, both), _heads(g, both)))
    x = _join(g, "ffn", x, _feed(g, _norm(g, x)))
    return g.gemm(g.flatten(x), 5)


@network()
def pair_bias(g: Graph) -> Result:
    """Pairs of positions add to the scores of each head; a gate of its own matrix in front of the output."""
    pairs = g.input("batch", "length", "length", 7, name="pairs")

    def attend(g: Graph, x: Tensor) -> Tensor:
        q, k, v = _separate(g, x)
        bias = g.transpose(g.matmul(_norm(g, pairs), HEADS), 0, 3, 1, 2)
        y = g.transpose(_mixed(g, g.add(_scaled(g, _products(g, q, k)), bias), v), 0, 2, 1, 3)
        gate = g.op("Sigmoid", _baked(g, g.matmul(x, HIDDEN, bias=True), "batch", "length", HEADS, WIDTH))
        return g.matmul(_baked(g, g.mul(y, gate), "batch", "length", HIDDEN), HIDDEN)

    return _one(g, attend)


@network()
def head_gates(g: Graph) -> Result:
    """One gate per head, and a scale per head that is part of no matrix."""

    def attend(g: Graph, x: Tensor) -> Tensor:
        q, k, v = _separate(g, x)
        y = g.mul(_mixed(g, _scaled(g, _products(g, q, k)), v), _vector(g, "scale", HEADS, 1, 1, mean=1.0))
        gates = g.op("Sigmoid", g.unsqueeze(g.transpose(g.matmul(x, HEADS, bias=True), 0, 2, 1), 3))
        return _project(g, g.mul(y, gates))

    return _one(g, attend)


@network()
def long_convolution(g: Graph) -> Result:
    """Three parts of one matrix behind a causal depthwise convolution, multiplied (Hyena)."""

    def mix(g: Graph, x: Tensor) -> Tensor:
        y = g.pad(g.transpose(g.matmul(x, 54, bias=True), 0, 2, 1), [0, 0, 2], [0, 0, 0])
        y = Tensor(y.name, ("batch", 54, "padded"))
        a, b, c = g.split(g.conv(y, 54, 3, group=54, pad=0), 3, axis=1)
        y = g.transpose(g.mul(g.mul(a, b), c), 0, 2, 1)
        return g.matmul(y, HIDDEN)

    x = _words(g)
    y = mix(g, _norm(g, x))
    x = _join(g, "convolution", x, Tensor(y.name, x.shape))
    return _classify(g, _join(g, "ffn", x, _feed(g, _norm(g, x))))


@network()
def quantised_weights(g: Graph) -> Result:
    """Every matrix is stored in 8 bits with a scale per column."""

    def dense(g: Graph, x: Tensor, width: int) -> Tensor:
        codes = g.store(g.fresh("codes"), g.rng.integers(-127, 128, (x.extent(-1), width)).astype(np.int8))
        scale = g.store(g.fresh("step"), g.uniform(0.002, 0.004, width))
        return g.op("MatMul", x, g.op("DequantizeLinear", codes, scale, axis=1))

    def attend(g: Graph, x: Tensor) -> Tensor:
        q, k, v = (_viewed(g, dense(g, x, HIDDEN)) for _ in range(3))
        y = g.transpose(_mixed(g, _scaled(g, _products(g, q, k)), v), 0, 2, 1, 3)
        return dense(g, _baked(g, y, "batch", "length", HIDDEN), HIDDEN)

    return _one(g, attend, lambda g, x: dense(g, _gelu(g, dense(g, x, NEURONS)), HIDDEN))


@network()
def low_rank(g: Graph) -> Result:
    """Queries and values have a second, narrow path beside their matrix (LoRA)."""

    def dense(g: Graph, x: Tensor) -> Tensor:
        beside = g.mul(g.matmul(g.matmul(x, 7), HIDDEN), _float(g, 0.5))
        return _viewed(g, g.add(g.matmul(x, HIDDEN, bias=True), beside))

    return _one(g, lambda g, x: _attended(g, dense(g, x), _heads(g, x), dense(g, x)))


@network()
def flows(g: Graph) -> Result:
    """Half of the channels is added to by convolutions of the other half, then all are turned round (VITS)."""
    x = g.conv(g.input("batch", 10, "frames", name="sound"), 12, 1)
    for _ in range(2):
        kept, changed = g.split(x, 2, axis=1)
        changed = _join(g, "convolution", changed, g.conv(g.relu(g.conv(kept, 14, 5)), 6, 1))
        x = g.slice(g.concat(kept, changed), [-1], [-END], [1], [-1])
    return g.conv(x, 3, 1)


@network()
def norm_in_double(g: Graph) -> Result:
    """Norms divide in double precision; what is masked is put out by the smallest number."""

    def norm(g: Graph, x: Tensor) -> Tensor:
        mean = g.op("Cast", g.reduce("ReduceMean", g.mul(x, x), -1), to=TensorProto.DOUBLE)
        root = g.op("Sqrt", g.op("Add", mean, g.const(1e-6, np.float64)))
        y = g.op("Div", g.op("Cast", x, to=TensorProto.DOUBLE), root)
        return g.mul(_real(g, y), _vector(g, "scale", HIDDEN, mean=1.0))

    def attend(g: Graph, x: Tensor) -> Tensor:
        q, k, v = _separate(g, x)
        later = g.op("Greater", _distances(g, x), g.const(0))
        least = g.const(np.finfo(np.float32).min, np.float32)
        square = ("length", "length")
        mask = g.op("Where", later, least, _float(g, 0.0), shape=square, dtype=TensorProto.FLOAT)
        return _attended(g, q, k, v, mask)

    return _one(g, attend, None, norm)
