"""Transformers of published widths and any number of layers, as TorchScript exports them.

    from models.exported import EXPORTED, WIDE
    model = EXPORTED["bert"](WIDE["bert"])

Weights are random. Target shapes are put together at run time (Shape, Gather, Unsqueeze, Concat), sizes are
Constant nodes, and a vocabulary is small unless its size is given, so that the layers are what is measured.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from onnx import ModelProto, TensorProto, numpy_helper

from models.builder import Array, Dim, Graph, Tensor

END = 2**63 - 1


@dataclass(frozen=True)
class Sizes:
    """What a transformer is made of.

    layers     of the encoder and of the decoder each; stages of two, where a network has stages
    groups     heads of keys and values, where several heads of queries share one
    words      of the vocabulary, or classes
    positions  the longest sequence; of pictures and sound the only one
    """

    hidden: int
    heads: int
    neurons: int
    layers: int = 2
    groups: int = 0
    words: int = 1000
    positions: int = 512

    @property
    def width(self) -> int:
        return self.hidden // self.heads


Result = Tensor | tuple[Tensor, ...]
Attention = Callable[[Tensor], Tensor]

WIDE = {
    "bert": Sizes(768, 12, 3072),
    "gpt2": Sizes(768, 12, 3072, positions=1024),
    "llama": Sizes(2048, 32, 5632, groups=4),
    "t5": Sizes(768, 12, 2048),
    "vit": Sizes(768, 12, 3072, positions=196),
    "deit": Sizes(384, 6, 1536, positions=196),
    "swin": Sizes(96, 3, 384, positions=3136),
    "whisper": Sizes(512, 8, 2048, positions=500),
}
"""Published sizes, with few layers: BERT base, GPT-2, TinyLlama, T5 1.1 base, ViT-B/16, DeiT-S, Swin-T and Whisper
base (on a third of its positions)."""

EXPORTED: dict[str, Callable[[Sizes], ModelProto]] = {}
"""The networks by name."""


def _network(
    draw: Callable[[Exporter, Sizes], Result],
) -> Callable[[Exporter, Sizes], Result]:
    """Register a drawing function under its own name."""
    name = draw.__name__

    def build(sizes: Sizes) -> ModelProto:
        g = Exporter(name, seed=zlib.crc32(name.encode()))
        result = draw(g, sizes)
        return g.model(*(result if isinstance(result, tuple) else (result,)))

    EXPORTED[name] = build
    return draw


class Exporter(Graph):
    """A graph under construction, in the idioms of the exporter."""

    def number(self, *values: float) -> Tensor:
        """A float constant; one value is a scalar."""
        return self.const(values[0] if len(values) == 1 else values, np.float32)

    def ints(self, *values: int) -> Tensor:
        """An integer vector in a Constant node, as each shape gets its own."""
        return self.store(self.fresh("ints"), np.asarray(values, np.int64), "constant")

    def trained(self, hint: str, *shape: int, scale: float = 0.3, mean: float = 0.0) -> Tensor:
        return self.store(self.fresh(hint), self.normal(*shape, scale=scale, mean=mean))

    def ids(self, *shape: Dim, name: str) -> Tensor:
        return self.input(*shape, name=name, dtype=TensorProto.INT64)

    # Shapes

    def size(self, x: Tensor, axis: int) -> Tensor:
        """An extent as a vector of one number."""
        return self.unsqueeze(self.op("Gather", self.op("Shape", x), self.const(axis), axis=0), 0)

    def sizes(self, x: Tensor, *dims: Dim) -> Tensor:
        """A shape put together from numbers and extents of `x`."""
        parts = [self.ints(dim) if isinstance(dim, int) else self.size(x, x.shape.index(dim)) for dim in dims]
        return self.concat(*parts, axis=0)

    def computed(self, x: Tensor, *dims: Dim) -> Tensor:
        """A Reshape to a computed shape."""
        return self.op("Reshape", x, self.sizes(x, *dims), shape=dims)

    def counted(self, x: Tensor, axis: int) -> Tensor:
        """0, 1, ... along an axis."""
        limit = self.op("Gather", self.op("Shape", x), self.const(axis), axis=0)
        return self.op("Range", self.const(0), limit, self.const(1), shape=(x.shape[axis],))

    def expanded(self, x: Tensor, target: Tensor, *dims: Dim) -> Tensor:
        """Expand, as it is exported: -1 in the target, which becomes 1, keeps an extent."""
        one = numpy_helper.from_array(np.ones(1, np.int64))
        ones = self.op(
            "ConstantOfShape", self.ints(len(dims)), shape=(len(dims),), dtype=one.data_type, value=one
        )
        kept = self.op("Equal", target, self.mul(ones, self.const(-1)))
        return self.op("Expand", x, self.op("Where", kept, ones, target, dtype=TensorProto.INT64), shape=dims)

    # Norms and neurons

    def norm(self, x: Tensor) -> Tensor:
        scale, shift = self.trained("scale", x.extent(-1), mean=1.0), self.trained("shift", x.extent(-1))
        return self.op("LayerNormalization", x, scale, shift, axis=-1)

    def norm_spelled(self, x: Tensor) -> Tensor:
        """A layer norm of operators."""
        centred = self.op("Sub", x, self.reduce("ReduceMean", x, -1))
        variance = self.reduce("ReduceMean", self.op("Pow", centred, self.number(2.0)), -1)
        y = self.op("Div", centred, self.op("Sqrt", self.add(variance, self.number(1e-5))))
        y = self.mul(y, self.trained("scale", x.extent(-1), mean=1.0))
        return self.add(y, self.trained("shift", x.extent(-1)))

    def rms(self, x: Tensor) -> Tensor:
        """A norm without a mean."""
        mean = self.reduce("ReduceMean", self.op("Pow", x, self.number(2.0)), -1)
        y = self.mul(x, self.op("Reciprocal", self.op("Sqrt", self.add(mean, self.number(1e-6)))))
        return self.mul(self.trained("scale", x.extent(-1), mean=1.0), y)

    def gelu(self, x: Tensor) -> Tensor:
        y = self.op("Erf", self.op("Div", x, self.number(math.sqrt(2))))
        return self.mul(self.mul(x, self.add(y, self.number(1.0))), self.number(0.5))

    def gelu_tanh(self, x: Tensor) -> Tensor:
        cube = self.mul(self.op("Pow", x, self.number(3.0)), self.number(0.044715))
        y = self.op("Tanh", self.mul(self.add(x, cube), self.number(math.sqrt(2 / math.pi))))
        return self.mul(self.mul(x, self.number(0.5)), self.add(y, self.number(1.0)))

    def feed(self, x: Tensor, neurons: int) -> Tensor:
        y = self.gelu(self.matmul(x, neurons, bias=True))
        return self.matmul(y, x.extent(-1), bias=True)

    def feed_gated(self, x: Tensor, neurons: int) -> Tensor:
        gate = self.act(self.matmul(x, neurons), "silu")
        return self.matmul(self.mul(gate, self.matmul(x, neurons)), x.extent(-1))

    # Attention

    def heads(self, x: Tensor, heads: int, width: int, *, bias: bool = True) -> Tensor:
        """A projection as (batch, heads, positions, width)."""
        return self.apart(self.matmul(x, heads * width, bias=bias), heads, width)

    def apart(self, x: Tensor, heads: int, width: int) -> Tensor:
        return self.transpose(self.computed(x, *x.shape[:2], heads, width), 0, 2, 1, 3)

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, *, scale: bool = True
    ) -> Tensor:
        """Heads attended to, side by side again: (batch, positions, heads and width)."""
        scores = self.op("MatMul", q, self.transpose(k, 0, 1, 3, 2))
        if scale:
            scores = self.op("Div", scores, self.number(math.sqrt(q.extent(-1))))
        if mask is not None:
            scores = self.add(scores, mask)
        y = self.transpose(self.op("MatMul", self.op("Softmax", scores, axis=-1), v), 0, 2, 1, 3)
        return self.computed(y, *y.shape[:2], y.extent(2) * y.extent(3))

    def separate(self, x: Tensor, others: Tensor, sizes: Sizes) -> tuple[Tensor, Tensor, Tensor]:
        """Queries of `x`, keys and values of `others`."""
        q, k, v = (self.heads(each, sizes.heads, sizes.width) for each in (x, others, others))
        return q, k, v

    def causal(self, x: Tensor) -> Tensor:
        """A mask against later positions: (1, 1, positions, positions)."""
        places = self.counted(x, 1)
        later = self.op("Greater", self.unsqueeze(places, 0), self.unsqueeze(places, 1))
        mask = self.mul(self.op("Cast", later, to=TensorProto.FLOAT), self.number(-1e4))
        return self.unsqueeze(mask, 0, 1)

    def fused(self, x: Tensor, sizes: Sizes) -> Tensor:
        """Attention on one projection for queries, keys and values; the positions are a number."""
        y = self.matmul(x, 3 * sizes.hidden, bias=True)
        y = self.computed(y, *x.shape[:2], 3, sizes.heads, sizes.width)
        y = self.transpose(y, 2, 0, 3, 1, 4)
        q, k, v = (self.op("Gather", y, self.const(i), axis=0) for i in range(3))
        return self.matmul(self.attend(q, k, v), sizes.hidden, bias=True)


def _self_attention(g: Exporter, sizes: Sizes, mask: Tensor | None = None) -> Attention:
    return lambda x: g.matmul(g.attend(*g.separate(x, x, sizes), mask), sizes.hidden, bias=True)


# Language


@_network
def bert(g: Exporter, sizes: Sizes) -> Result:
    """Words, positions and types, a mask of the padding, norms behind the sums, a pooled first position."""
    ids, types = (g.ids("batch", "length", name=name) for name in ("ids", "types"))
    real = g.ids("batch", "length", name="mask")
    x = g.op("Gather", g.trained("words", sizes.words, sizes.hidden, scale=1.0), ids)
    x = g.add(x, g.op("Gather", g.trained("kinds", 2, sizes.hidden), types))
    places = g.op("Gather", g.trained("places", sizes.positions, sizes.hidden), g.counted(ids, 1))
    x = g.norm(g.add(x, places))
    shown = g.op("Cast", g.unsqueeze(real, 1, 2), to=TensorProto.FLOAT)
    mask = g.mul(g.op("Sub", g.number(1.0), shown), g.number(-1e4))
    for _ in range(sizes.layers):
        x = g.norm(g.add(_self_attention(g, sizes, mask)(x), x))
        x = g.norm(g.add(g.feed(x, sizes.neurons), x))
    first = g.op("Gather", x, g.const(0), axis=1)
    return g.gemm(g.op("Tanh", g.gemm(first, sizes.hidden)), 3)


@_network
def gpt2(g: Exporter, sizes: Sizes) -> Result:
    """Gemm on positions side by side, one projection cut in three; the table of words classifies, too."""
    table = g.trained("table", sizes.words, sizes.hidden, scale=0.1)
    ids = g.ids("batch", "length", name="ids")
    x = g.op("Gather", table, ids)
    x = g.add(x, g.op("Gather", g.trained("places", sizes.positions, sizes.hidden), g.counted(ids, 1)))

    def convolved(x: Tensor, neurons: int) -> Tensor:
        rows = g.reshape(x, -1, x.extent(-1), shape=("rows", x.extent(-1)))
        y = g.gemm(rows, neurons, trans_b=False)
        target = g.concat(g.size(x, 0), g.size(x, 1), g.ints(neurons), axis=0)
        return g.op("Reshape", y, target, shape=(*x.shape[:2], neurons))

    for _ in range(sizes.layers):
        parts = g.split(convolved(g.norm_spelled(x), 3 * sizes.hidden), [sizes.hidden] * 3, axis=2)
        q, k, v = (g.apart(part, sizes.heads, sizes.width) for part in parts)
        x = g.add(x, convolved(g.attend(q, k, v, g.causal(x)), sizes.hidden))
        y = g.gelu_tanh(convolved(g.norm_spelled(x), sizes.neurons))
        x = g.add(x, convolved(y, sizes.hidden))
    return g.op("MatMul", g.norm_spelled(x), g.transpose(table, 1, 0))


@_network
def llama(g: Exporter, sizes: Sizes) -> Result:
    """Rotated grouped queries, gated neurons, norms without a mean."""
    x = g.op("Gather", g.trained("words", sizes.words, sizes.hidden), g.ids("batch", "length", name="ids"))
    places = g.op("Cast", g.unsqueeze(g.counted(x, 1), 1), to=TensorProto.FLOAT)
    angles = g.op("MatMul", places, g.store("frequencies", _frequencies(sizes.width)))
    angles = g.concat(angles, angles, axis=-1)
    cosine, sine = g.op("Cos", angles), g.op("Sin", angles)
    half, times = sizes.width // 2, sizes.heads // sizes.groups

    def rotated(x: Tensor) -> Tensor:
        turned = g.concat(g.op("Neg", g.slice(x, [half], [END], [3])), g.slice(x, [0], [half], [3]), axis=-1)
        return g.add(g.mul(x, cosine), g.mul(turned, sine))

    def repeated(x: Tensor) -> Tensor:
        batch, groups, length, width = x.shape
        wide = (batch, groups, times, length, width)
        y = g.expanded(g.unsqueeze(x, 2), g.sizes(x, *wide), *wide)
        return g.computed(y, batch, sizes.heads, length, width)

    def project(x: Tensor, heads: int) -> Tensor:
        return g.heads(x, heads, sizes.width, bias=False)

    for _ in range(sizes.layers):
        y = g.rms(x)
        q, k, v = project(y, sizes.heads), project(y, sizes.groups), project(y, sizes.groups)
        y = g.attend(rotated(q), repeated(rotated(k)), repeated(v), g.causal(x))
        x = g.add(x, g.matmul(y, sizes.hidden))
        x = g.add(x, g.feed_gated(g.rms(x), sizes.neurons))
    return g.matmul(g.rms(x), sizes.words)


def _frequencies(width: int) -> Array:
    return np.asarray(10_000.0 ** -(np.arange(0, width, 2) / width), np.float32).reshape(1, -1)


@_network
def t5(g: Exporter, sizes: Sizes) -> Result:
    """Encoder and decoder on one table of words, a bias by distance, gated neurons, no scale."""
    table = g.trained("table", sizes.words, sizes.hidden)
    x = g.op("Gather", table, g.ids("batch", "length", name="ids"))
    y = g.op("Gather", table, g.ids("batch", "target", name="target"))

    def bias(x: Tensor) -> Tensor:
        places = g.counted(x, 1)
        far = g.op("Abs", g.op("Sub", g.unsqueeze(places, 0), g.unsqueeze(places, 1)))
        buckets = g.op("Min", far, g.const(31))
        by_head = g.op("Gather", g.trained("buckets", 32, sizes.heads), buckets)
        return g.unsqueeze(g.transpose(by_head, 2, 0, 1), 0)

    def attention(x: Tensor, others: Tensor, mask: Tensor | None) -> Tensor:
        small = g.he(sizes.hidden, sizes.hidden, fan_in=sizes.hidden) / np.float32(math.sqrt(sizes.width))
        q = g.op("MatMul", x, g.store(g.fresh("queries"), small))  # small weights in place of a scale
        k, v = (g.heads(others, sizes.heads, sizes.width, bias=False) for _ in range(2))
        q = g.apart(q, sizes.heads, sizes.width)
        return g.matmul(g.attend(q, k, v, mask, scale=False), sizes.hidden)

    shared = bias(x)
    for _ in range(sizes.layers):
        z = g.rms(x)
        x = g.add(x, attention(z, z, shared))
        x = g.add(x, g.feed_gated(g.rms(x), sizes.neurons))
    states = g.rms(x)
    shared = g.add(bias(y), g.causal(y))
    for _ in range(sizes.layers):
        z = g.rms(y)
        y = g.add(y, attention(z, z, shared))
        y = g.add(y, attention(g.rms(y), states, None))
        y = g.add(y, g.feed_gated(g.rms(y), sizes.neurons))
    return g.op("MatMul", g.mul(g.rms(y), g.number(sizes.hidden**-0.5)), g.transpose(table, 1, 0))


@_network
def whisper(g: Exporter, sizes: Sizes) -> Result:
    """Two convolutions over sound, an encoder, and a decoder of words."""
    sound = g.input("batch", 80, 2 * sizes.positions, name="sound")
    x = g.gelu(g.conv(g.gelu(g.conv(sound, sizes.hidden, 3)), sizes.hidden, 3, stride=2))
    x = g.add(g.transpose(x, 0, 2, 1), g.trained("places", sizes.positions, sizes.hidden))
    for _ in range(sizes.layers):
        x = g.add(x, _self_attention(g, sizes)(g.norm(x)))
        x = g.add(x, g.feed(g.norm(x), sizes.neurons))
    states = g.norm(x)
    table = g.trained("table", sizes.words, sizes.hidden, scale=0.1)
    ids = g.ids("batch", "length", name="ids")
    y = g.add(
        g.op("Gather", table, ids), g.op("Gather", g.trained("ends", 448, sizes.hidden), g.counted(ids, 1))
    )
    mask = g.causal(y)
    for _ in range(sizes.layers):
        y = g.add(y, _self_attention(g, sizes, mask)(g.norm(y)))
        crossed = g.attend(*g.separate(g.norm(y), states, sizes))
        y = g.add(y, g.matmul(crossed, sizes.hidden, bias=True))
        y = g.add(y, g.feed(g.norm(y), sizes.neurons))
    return g.op("MatMul", g.norm(y), g.transpose(table, 1, 0))


# Vision


def _patches(g: Exporter, hidden: int, size: int, image: int = 224) -> Tensor:
    """A picture as a sequence of patches."""
    x = g.conv(g.input("batch", 3, image, image, name="image"), hidden, size, stride=size, pad=0)
    count = math.prod(x.spatial)
    return g.transpose(g.computed(x, "batch", hidden, count), 0, 2, 1)


def _with_tokens(g: Exporter, x: Tensor, count: int) -> Tensor:
    """Trained tokens in front of the sequence, and a trained vector per position."""
    hidden = x.extent(-1)
    tokens = [
        g.expanded(g.trained("token", 1, 1, hidden), g.sizes(x, "batch", -1, -1), "batch", 1, hidden)
        for _ in range(count)
    ]
    x = g.concat(*tokens, x, axis=1)
    return g.add(x, g.trained("places", 1, x.extent(1), hidden))


def _vision(g: Exporter, sizes: Sizes, tokens: int) -> Tensor:
    x = _with_tokens(g, _patches(g, sizes.hidden, 224 // math.isqrt(sizes.positions)), tokens)
    for _ in range(sizes.layers):
        x = g.add(x, g.fused(g.norm(x), sizes))
        x = g.add(x, g.feed(g.norm(x), sizes.neurons))
    return g.norm(x)


@_network
def vit(g: Exporter, sizes: Sizes) -> Result:
    """A class token in front of the patches."""
    return g.gemm(g.op("Gather", _vision(g, sizes, 1), g.const(0), axis=1), sizes.words)


@_network
def deit(g: Exporter, sizes: Sizes) -> Result:
    """A class token and one of a teacher."""
    x = _vision(g, sizes, 2)
    first, second = (g.gemm(g.op("Gather", x, g.const(i), axis=1), sizes.words) for i in range(2))
    return g.op("Div", g.add(first, second), g.number(2.0))


@_network
def swin(g: Exporter, sizes: Sizes) -> Result:
    """Windows of 7 x 7, every other time shifted, and patches merged two by two between the stages."""
    side = math.isqrt(sizes.positions)
    x = g.norm(_patches(g, sizes.hidden, 4, 4 * side))
    for stage in range(sizes.layers):
        hidden, heads = sizes.hidden << stage, sizes.heads << stage
        if stage:
            x = g.reshape(x, 0, side, side, hidden // 2, shape=("batch", side, side, hidden // 2))
            corners = [g.slice(x, [i, j], [END, END], [1, 2], [2, 2]) for j in (0, 1) for i in (0, 1)]
            x, side = g.concat(*corners, axis=-1), side // 2
            x = g.reshape(x, 0, side * side, 2 * hidden, shape=("batch", side * side, 2 * hidden))
            x = g.matmul(g.norm(x), hidden)
        for shift in (0, 3):
            x = g.add(x, _windows(g, g.norm(x), heads, side, shift))
            x = g.add(x, g.feed(g.norm(x), sizes.neurons << stage))
    return g.gemm(g.reduce("ReduceMean", g.norm(x), 1, keepdims=False), sizes.words)


def _windows(g: Exporter, x: Tensor, heads: int, side: int, shift: int) -> Tensor:
    """Attention inside the windows of a map."""
    hidden, many, edge = x.extent(-1), side // 7, 7
    y = g.reshape(x, 0, side, side, hidden, shape=("batch", side, side, hidden))
    y = _rolled(g, y, shift)
    y = g.reshape(y, 0, many, edge, many, edge, hidden, shape=("batch", many, edge, many, edge, hidden))
    y = g.transpose(y, 0, 1, 3, 2, 4, 5)
    y = g.reshape(y, -1, edge * edge, hidden, shape=("windows", edge * edge, hidden))
    y = g.matmul(_window_heads(g, y, heads, many if shift else 0), hidden, bias=True)
    y = g.reshape(y, -1, many, many, edge, edge, hidden, shape=("batch", many, many, edge, edge, hidden))
    y = g.transpose(y, 0, 1, 3, 2, 4, 5)
    y = _rolled(g, g.reshape(y, 0, side, side, hidden, shape=("batch", side, side, hidden)), -shift)
    return g.reshape(y, 0, side * side, hidden, shape=("batch", side * side, hidden))


def _rolled(g: Exporter, x: Tensor, by: int) -> Tensor:
    """Both axes of a map shifted around."""
    for axis in (1, 2) if by else ():
        x = g.concat(g.slice(x, [by], [END], [axis]), g.slice(x, [0], [by], [axis]), axis=axis)
    return x


def _window_heads(g: Exporter, x: Tensor, heads: int, shifted: int) -> Tensor:
    """Heads of windows with a trained bias for each pair of positions; of `shifted` x `shifted` windows
    each has a mask of its own."""
    places, hidden = x.extent(1), x.extent(2)
    width, edge = hidden // heads, math.isqrt(places)
    y = g.reshape(g.matmul(x, 3 * hidden, bias=True), 0, places, 3, heads, width,
                  shape=("windows", places, 3, heads, width))  # fmt: skip
    y = g.transpose(y, 2, 0, 3, 1, 4)
    q, k, v = (g.op("Gather", y, g.const(i), axis=0) for i in range(3))
    rows, columns = np.divmod(np.arange(places), edge)
    reach = 2 * edge - 1
    index = (rows[:, None] - rows + edge - 1) * reach + columns[:, None] - columns + edge - 1
    bias = g.op("Gather", g.trained("bias", reach * reach, heads), g.const(index.ravel()))
    bias = g.unsqueeze(g.transpose(g.reshape(bias, places, places, -1), 2, 0, 1), 0)
    scores = g.op("MatMul", g.mul(q, g.number(width**-0.5)), g.transpose(k, 0, 1, 3, 2))
    scores = g.add(scores, bias)
    if shifted:
        count = shifted * shifted
        mask = g.store(
            g.fresh("mask"), -100 * g.rng.integers(0, 2, (count, places, places)).astype(np.float32)
        )
        apart = ("batch", count, heads, places, places)
        scores = g.reshape(scores, -1, count, heads, places, places, shape=apart)
        scores = g.add(scores, g.unsqueeze(mask, 0, 2))
        scores = g.reshape(scores, -1, heads, places, places, shape=("windows", heads, places, places))
    y = g.transpose(g.op("MatMul", g.op("Softmax", scores, axis=-1), v), 0, 2, 1, 3)
    return g.reshape(y, 0, places, hidden, shape=("windows", places, hidden))
