"""Small transformer blocks around every fused attention operator, with random weights.

Each function draws one network on a `Graph`: an embedding of 20, attention, and a feed-forward part of 28
neurons, with a residual and a normalisation around both, and five outputs per position. Sizes are odd on
purpose. The decorator names the network, seeds it and registers a function of no arguments in `ATTENTION`.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from onnx import ModelProto, TensorProto

from models.builder import Dim, Graph, Tensor

DOMAIN = "com.microsoft"
HIDDEN, NEURONS, CLASSES = 20, 28, 5
LENGTH = 8
"""Positions of networks that cannot leave their number open."""

Result = Tensor | tuple[Tensor, ...]
Draw = Callable[[Graph], Result]
Build = Callable[[], ModelProto]

ATTENTION: dict[str, Build] = {}
"""The networks by name."""


def network(*, opset: int = 17) -> Callable[[Draw], Build]:
    """Register a drawing function under its own name."""

    def register(draw: Draw) -> Build:
        name = draw.__name__

        def build() -> ModelProto:
            g = Graph(name, opset=opset, ir=11 if opset >= 23 else 8, seed=zlib.crc32(name.encode()))
            result = draw(g)
            return g.model(*(result if isinstance(result, tuple) else (result,)))

        build.__name__ = build.__qualname__ = name
        build.__doc__ = draw.__doc__
        ATTENTION[name] = build
        return build

    return register


# Pieces


def _embed(g: Graph, length: Dim = "length", batch: Dim = "batch") -> Tensor:
    """Ten numbers per position, embedded."""
    return g.matmul(g.input(batch, length, 10, name="tokens"), HIDDEN, bias=True)


def _vector(g: Graph, name: str, size: int, mean: float = 0.0) -> Tensor:
    return g.store(g.fresh(name), g.normal(size, scale=0.3, mean=mean))


def _norm(g: Graph, x: Tensor) -> Tensor:
    """RMSNormalization where the operator set has it, else LayerNormalization."""
    scale = _vector(g, "scale", HIDDEN, 1.0)
    if g.opset >= 23:
        return g.op("RMSNormalization", x, scale, axis=-1)
    return g.op("LayerNormalization", x, scale, _vector(g, "shift", HIDDEN), axis=-1)


def _fused(
    g: Graph,
    op_type: str,
    *inputs: Tensor | None,
    shapes: Mapping[str, tuple[Dim, ...]],
    domain: str = DOMAIN,
    **attributes: Any,
) -> list[Tensor]:
    """A node whose shapes cannot be inferred, those of its outputs by name; none where it is not asked for."""
    first, *rest = shapes.items()
    result = [g.op(op_type, *inputs, domain=domain, shape=first[1], **attributes)]
    for name, shape in rest:
        result.append(Tensor(f"{g.nodes[-1].name}.{name}" if shape else "", shape))
        g.nodes[-1].output.append(result[-1].name)
    return result


def _heads(g: Graph, x: Tensor, heads: int, width: int) -> Tensor:
    """A projection of its own, as (batch, heads, positions, width)."""
    batch, length, _ = x.shape
    y = g.reshape(g.matmul(x, heads * width), 0, -1, heads, width, shape=(batch, length, heads, width))
    return g.transpose(y, 0, 2, 1, 3)


def _merged(g: Graph, x: Tensor, heads: int, width: int) -> Tensor:
    """Heads of (batch, heads, positions, width) side by side again."""
    batch, _, length, _ = x.shape
    y = g.transpose(x, 0, 2, 1, 3)
    return g.reshape(y, 0, -1, heads * width, shape=(batch, length, heads * width))


def _finish(g: Graph, x: Tensor, attended: Tensor) -> Tensor:
    """The output projection, the feed-forward part and the classifier."""
    x = g.add(x, g.matmul(attended, HIDDEN, bias=True))
    y = g.matmul(g.relu(g.matmul(_norm(g, x), NEURONS, bias=True)), HIDDEN, bias=True)
    return g.matmul(g.add(x, y), CLASSES)


def _finish_skip(g: Graph, x: Tensor, attended: Tensor) -> Tensor:
    """As `_finish`, with SkipLayerNormalization, which adds, normalises and gives both."""
    shape = x.shape
    y = g.matmul(attended, HIDDEN)
    scale, shift, bias = (
        _vector(g, n, HIDDEN, m) for n, m in (("scale", 1.0), ("shift", 0.0), ("bias", 0.0))
    )
    shapes = {"output": shape, "mean": (), "deviation": (), "sum": shape}
    y, _, _, x = _fused(g, "SkipLayerNormalization", x, y, scale, shift, bias, shapes=shapes)
    y = g.matmul(g.relu(g.matmul(y, NEURONS, bias=True)), HIDDEN)
    scale = _vector(g, "scale", HIDDEN, 1.0)
    (y,) = _fused(g, "SkipSimplifiedLayerNormalization", x, y, scale, shapes={"output": shape})
    return g.matmul(y, CLASSES)


def _caches(g: Graph, heads: int, width: int, values: int) -> tuple[Tensor, Tensor]:
    """Past keys and values as graph inputs."""
    return (
        g.input("batch", heads, "past", width, name="past_key"),
        g.input("batch", heads, "past", values, name="past_value"),
    )


def _angles(g: Graph, pairs: int) -> tuple[Tensor, Tensor]:
    """Cosines and sines of 16 positions."""
    angles = np.outer(np.arange(16), 10.0 ** -np.linspace(0, 2, pairs)).astype(np.float32)
    return g.store("cosines", np.cos(angles)), g.store("sines", np.sin(angles))


# Attention of ONNX


@network(opset=23)
def onnx_flat(g: Graph) -> Result:
    """Three axes; 4 heads, keys of 6 and values of 5."""
    x = _embed(g)
    y = _norm(g, x)
    q, k, v = g.matmul(y, 24, bias=True), g.matmul(y, 24), g.matmul(y, 20, bias=True)
    return _finish(g, x, g.op("Attention", q, k, v, q_num_heads=4, kv_num_heads=4))


@network(opset=23)
def onnx_split(g: Graph) -> Result:
    """Four axes, causal, with a scale of its own."""
    x = _embed(g)
    y = _norm(g, x)
    q, k, v = _heads(g, y, 4, 6), _heads(g, y, 4, 6), _heads(g, y, 4, 7)
    return _finish(g, x, _merged(g, g.op("Attention", q, k, v, is_causal=1, scale=0.5), 4, 7))


@network(opset=23)
def onnx_grouped(g: Graph) -> Result:
    """6 query heads in 2 groups."""
    x = _embed(g)
    y = _norm(g, x)
    q, k, v = g.matmul(y, 36), g.matmul(y, 12), g.matmul(y, 12)
    return _finish(g, x, g.op("Attention", q, k, v, q_num_heads=6, kv_num_heads=2, softcap=3.0))


@network(opset=24)
def onnx_multi_query(g: Graph) -> Result:
    """4 query heads that share keys and values."""
    x = _embed(g)
    y = _norm(g, x)
    q, k, v = _heads(g, y, 4, 6), _heads(g, y, 1, 6), _heads(g, y, 1, 6)
    return _finish(g, x, _merged(g, g.op("Attention", q, k, v), 4, 6))


@network(opset=23)
def onnx_rotary(g: Graph) -> Result:
    """Queries and keys turned by position; 4 query heads in 2 groups."""
    x = _embed(g)
    y = _norm(g, x)
    places = g.input("batch", "length", name="positions", dtype=TensorProto.INT64)
    angles = _angles(g, 3)
    q = g.op("RotaryEmbedding", g.matmul(y, 24), *angles, places, num_heads=4)
    k = g.op("RotaryEmbedding", g.matmul(y, 12), *angles, places, num_heads=2)
    return _finish(g, x, g.op("Attention", q, k, g.matmul(y, 12), q_num_heads=4, kv_num_heads=2, is_causal=1))


@network(opset=23)
def onnx_rotary_part(g: Graph) -> Result:
    """Interleaved pairs, in the first 4 of 7 positions of each head only."""
    x = _embed(g)
    y = _norm(g, x)
    places = g.input("batch", "length", name="positions", dtype=TensorProto.INT64)
    angles = _angles(g, 2)
    q, k = (
        g.op("RotaryEmbedding", _heads(g, y, 4, 7), *angles, places, rotary_embedding_dim=4, interleaved=1)
        for _ in range(2)
    )
    return _finish(g, x, _merged(g, g.op("Attention", q, k, _heads(g, y, 4, 6)), 4, 6))


@network(opset=23)
def onnx_masked(g: Graph) -> Result:
    """A mask from outside."""
    x = _embed(g)
    y = _norm(g, x)
    mask = g.input("batch", 1, "length", "length", name="mask")
    q, k, v = g.matmul(y, 24), g.matmul(y, 24), g.matmul(y, 24)
    return _finish(g, x, g.op("Attention", q, k, v, mask, q_num_heads=4, kv_num_heads=4))


@network(opset=23)
def onnx_biased(g: Graph) -> Result:
    """A trained bias on the scores of each of 6 query heads in 3 groups."""
    x = _embed(g, LENGTH)
    y = _norm(g, x)
    bias = g.store("bias", g.normal(6, LENGTH, LENGTH))
    q, k, v = _heads(g, y, 6, 6), _heads(g, y, 3, 6), _heads(g, y, 3, 6)
    return _finish(g, x, _merged(g, g.op("Attention", q, k, v, bias), 6, 6))


@network(opset=23)
def onnx_cached(g: Graph) -> Result:
    """Keys and values of 2 groups come in and go out; 6 query heads."""
    x = _embed(g)
    y = _norm(g, x)
    q, k, v = g.matmul(y, 36), g.matmul(y, 12), g.matmul(y, 12)
    kept: tuple[Dim, ...] = ("batch", 2, "total", 6)
    shapes = {"output": q.shape, "present_key": kept, "present_value": kept}
    inputs = (q, k, v, None, *_caches(g, 2, 6, 6))
    y, *present = _fused(g, "Attention", *inputs, domain="", shapes=shapes, q_num_heads=6, kv_num_heads=2)
    return (_finish(g, x, y), *present)


# Attention of onnxruntime, which projects queries, keys and values itself


def _projections(g: Graph, width: int) -> tuple[Tensor, Tensor]:
    return g.store("projections", g.he(HIDDEN, width, fan_in=HIDDEN)), _vector(g, "projected", width)


@network()
def microsoft_attention(g: Graph) -> Result:
    """4 heads of 6."""
    x = _embed(g)
    shapes = {"output": (*x.shape[:2], 24)}
    y, *_ = _fused(g, "Attention", _norm(g, x), *_projections(g, 72), shapes=shapes, num_heads=4)
    return _finish_skip(g, x, y)


@network()
def microsoft_attention_values(g: Graph) -> Result:
    """Values of another width, and a trained bias on the scores of each head."""
    x = _embed(g, LENGTH)
    bias = g.store("bias", g.normal(1, 4, LENGTH, LENGTH))
    inputs = (_norm(g, x), *_projections(g, 76), None, None, bias)
    shapes = {"output": (*x.shape[:2], 28)}
    y, *_ = _fused(g, "Attention", *inputs, shapes=shapes, num_heads=4, qkv_hidden_sizes=[24, 24, 28])
    return _finish_skip(g, x, y)


@network()
def microsoft_attention_cached(g: Graph) -> Result:
    """Keys and values come in and go out in one tensor."""
    x = _embed(g, batch=1)
    past = g.input(2, 1, 4, "past", 6, name="past")
    inputs = (_norm(g, x), *_projections(g, 72), None, past)
    shapes = {"output": (*x.shape[:2], 24), "present": (2, 1, 4, "total", 6)}
    y, present = _fused(g, "Attention", *inputs, shapes=shapes, num_heads=4, unidirectional=1)
    return _finish_skip(g, x, y), present


# MultiHeadAttention


@network()
def multi_head(g: Graph) -> Result:
    """Keys of 6, values of 5."""
    x = _embed(g)
    y = _norm(g, x)
    q, k, v = g.matmul(y, 24), g.matmul(y, 24), g.matmul(y, 20)
    shapes = {"output": v.shape}
    return _finish_skip(g, x, _fused(g, "MultiHeadAttention", q, k, v, shapes=shapes, num_heads=4)[0])


@network()
def multi_head_biased(g: Graph) -> Result:
    """One bias behind all projections, and one on the scores of each head."""
    x = _embed(g, LENGTH)
    y = _norm(g, x)
    q, k, v = g.matmul(y, 24), g.matmul(y, 24), g.matmul(y, 24)
    scores = g.store("scores", g.normal(1, 4, LENGTH, LENGTH))
    inputs = (q, k, v, _vector(g, "projected", 72), None, scores)
    return _finish_skip(
        g, x, _fused(g, "MultiHeadAttention", *inputs, shapes={"output": v.shape}, num_heads=4)[0]
    )


@network()
def multi_head_cached(g: Graph) -> Result:
    """Keys and values come in and go out."""
    x = _embed(g)
    y = _norm(g, x)
    q, k, v = g.matmul(y, 24), g.matmul(y, 24), g.matmul(y, 24)
    kept: tuple[Dim, ...] = ("batch", 4, "total", 6)
    shapes = {"output": v.shape, "present_key": kept, "present_value": kept}
    inputs = (q, k, v, None, None, None, *_caches(g, 4, 6, 6))
    y, *present = _fused(g, "MultiHeadAttention", *inputs, shapes=shapes, num_heads=4, unidirectional=1)
    return (_finish_skip(g, x, y), *present)


# GroupQueryAttention, whose heads are multiples of 8 wide


def _lengths(g: Graph, x: Tensor, past: int = 0) -> tuple[Tensor, Tensor]:
    """The last position of each sequence, all of one length, and the number of positions."""
    total = g.op("Add", g.op("Shape", x, start=1, end=2), g.const([past]))
    last = g.op("Expand", g.op("Sub", total, g.const([1])), g.op("Shape", x, end=1), shape=("batch",))
    return g.op("Cast", last, to=TensorProto.INT32), g.op("Cast", total, to=TensorProto.INT32)


@network()
def group_query(g: Graph) -> Result:
    """6 query heads in 2 groups."""
    x = _embed(g)
    y = _norm(g, x)
    q, k, v = g.matmul(y, 48), g.matmul(y, 16), g.matmul(y, 16)
    inputs = (q, k, v, None, None, *_lengths(g, x))
    shapes = {"output": q.shape}
    return _finish_skip(
        g, x, _fused(g, "GroupQueryAttention", *inputs, shapes=shapes, num_heads=6, kv_num_heads=2)[0]
    )


@network()
def group_query_packed(g: Graph) -> Result:
    """Queries, keys and values side by side."""
    x = _embed(g)
    inputs = (g.matmul(_norm(g, x), 80), None, None, None, None, *_lengths(g, x))
    shapes = {"output": (*x.shape[:2], 48)}
    return _finish_skip(
        g, x, _fused(g, "GroupQueryAttention", *inputs, shapes=shapes, num_heads=6, kv_num_heads=2)[0]
    )


@network()
def group_query_rotary(g: Graph) -> Result:
    """Queries and keys turned by position inside the node."""
    x = _embed(g, LENGTH)
    y = _norm(g, x)
    q, k, v = g.matmul(y, 64), g.matmul(y, 32), g.matmul(y, 32)
    inputs = (q, k, v, None, None, *_lengths(g, x), *_angles(g, 8))
    shapes = {"output": q.shape}
    return _finish_skip(
        g,
        x,
        _fused(g, "GroupQueryAttention", *inputs, shapes=shapes, num_heads=4, kv_num_heads=2, do_rotary=1)[0],
    )


@network()
def group_query_cached(g: Graph) -> Result:
    """A single position, with keys and values of those before."""
    x = _embed(g, length=1)
    y = _norm(g, x)
    q, k, v = g.matmul(y, 48), g.matmul(y, 16), g.matmul(y, 16)
    kept: tuple[Dim, ...] = ("batch", 2, LENGTH - 1, 8)
    past = g.input(*kept, name="past_key"), g.input(*kept, name="past_value")
    full: tuple[Dim, ...] = ("batch", 2, LENGTH, 8)
    shapes = {"output": q.shape, "present_key": full, "present_value": full}
    inputs = (q, k, v, *past, *_lengths(g, x, LENGTH - 1))
    y, *present = _fused(g, "GroupQueryAttention", *inputs, shapes=shapes, num_heads=6, kv_num_heads=2)
    return (_finish_skip(g, x, y), *present)
