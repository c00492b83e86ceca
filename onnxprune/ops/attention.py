"""Fused attention and rotary embeddings, of ONNX itself and of onnxruntime (`com.microsoft`).

Labels: `b` batch; `s` queries, `t` keys and `p` keys of a cache by position; `h` heads of keys and values, `r`
query heads that share one of them; `d` width of queries and keys, which scores are contracted over, `e` width of
values. Where `d` is cut the scale keeps its old value, because the masked original does.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from onnxprune.ops.spec import (
    Array,
    NodeView,
    Pinned,
    Resize,
    Rule,
    Sample,
    Unknown,
    op,
    parse,
    pins,
)

DOMAIN = "com.microsoft"
SCORES = "a softmax is taken over it"
CAUSAL = "positions see only those before them"
INSIDE = "it is contracted inside the node"
ORDER = "its parts are told apart by position"
PLACES = "picked by position"


def _rule(
    node: NodeView,
    inputs: Sequence[str],
    outputs: Sequence[str],
    sizes: Mapping[str, int],
    tied: Mapping[str, str] | None = None,
    **options: Any,
) -> Rule:
    """A rule from index notation for every operand; those that are absent have no meaning."""
    given, made = parse(", ".join(inputs) + " -> " + ", ".join(outputs))
    taken = tuple(p if node.has(i) else None for i, p in enumerate(given))
    results = tuple(p if _makes(node, i) else None for i, p in enumerate(made))
    patterns = (pattern for pattern in (*taken, *results) if pattern)
    held = {name for pattern in patterns for terms in pattern for term in terms for name in term}
    return Rule(
        taken,
        results,
        sizes={name: size for name, size in sizes.items() if name in held},
        tied={name: other for name, other in (tied or {}).items() if name in held},
        **options,
    )


def _makes(node: NodeView, i: int) -> bool:
    """Whether optional output i is asked for."""
    return i < len(node.out_shapes) and node.out_shapes[i] is not None


def _spread(node: NodeView, i: int, axes: Sequence[tuple[str, int]]) -> str:
    """Operand i, broadcast to `axes` (notation and extent); an extent of neither 1 nor that is a label `m`."""
    if not node.has(i):
        return ""
    shape = node.shape(i)
    found = []
    for j, (size, (text, extent)) in enumerate(zip(shape, axes[len(axes) - len(shape) :], strict=True)):
        found.append(text if size == extent else f"one{i}_{j}" if size == 1 else "m")
    return " ".join(found)


def _scale(change: Resize, width: int) -> dict[int | str, Array | None]:
    """The default scale, stated once the width it follows from is cut."""
    if change.extents["d"] == width:
        return {}
    return {"scale": np.array(1 / math.sqrt(width), dtype=np.float32)}


def _divided(extent: int, parts: int) -> int:
    if parts < 1 or extent % parts:
        raise Unknown(f"an extent of {extent} does not hold {parts} heads")
    return extent // parts


_BOOLEAN = np.array([[1, 1, 0, 1], [1, 0, 1, 1], [0, 1, 1, 1]], dtype=bool)


@op(
    "Attention",
    since=23,
    samples=[
        Sample(((2, 3, 12), (2, 4, 12), (2, 4, 20)), {"q_num_heads": 4, "kv_num_heads": 4}, opset=23),
        Sample(((2, 4, 3, 5), (2, 4, 6, 5), (2, 4, 6, 3)), opset=23),
        Sample(
            ((2, 3, 24), (2, 4, 8), (2, 4, 6)),
            {"q_num_heads": 6, "kv_num_heads": 2, "is_causal": 1},
            opset=23,
        ),
        Sample(((2, 6, 3, 4), (2, 3, 5, 4), (2, 3, 5, 4)), {"scale": 0.7, "softcap": 2.0}, opset=23),
        Sample(((1, 6, 3, 4), (1, 1, 5, 4), (1, 1, 5, 2)), opset=24),
        Sample(((2, 6, 3, 4), (2, 3, 4, 4), (2, 3, 4, 4), _BOOLEAN), opset=23),
        Sample(((2, 6, 3, 4), (2, 3, 4, 4), (2, 3, 4, 4), (6, 3, 4)), opset=23),
        Sample(
            ((2, 3, 24), (2, 4, 12), (2, 4, 12), (2, 6, 3, 4)),
            {"q_num_heads": 6, "kv_num_heads": 3},
            opset=24,
        ),
        Sample(((2, 4, 3, 5), (2, 4, 4, 5), (2, 4, 4, 5), (2, 1, 3, 4)), opset=24),
        Sample(
            ((2, 4, 3, 5), (2, 2, 4, 5), (2, 2, 4, 3), (3, 6), (2, 2, 2, 5), (2, 2, 2, 3)),
            opset=23,
            outputs=3,
        ),
        Sample(
            ((2, 3, 20), (2, 4, 10), (2, 4, 6), None, (2, 2, 2, 5), (2, 2, 2, 3)),
            {"q_num_heads": 4, "kv_num_heads": 2, "is_causal": 1, "qk_matmul_output_mode": 3},
            opset=24,
            outputs=4,
        ),
        Sample(
            ((2, 4, 3, 5), (2, 2, 4, 5), (2, 2, 4, 3), None, None, None, np.array([4, 2])),
            opset=24,
        ),
    ],
)
def attention(node: NodeView) -> Rule:
    flat = node.rank() == 3
    if flat:
        batch, queries, wide = node.shape(0)
        heads, shared = int(node.attr("q_num_heads")), int(node.attr("kv_num_heads"))
        width = _divided(wide, heads)
        query, key, value, result = "b s (h r d)", "b t (h d)", "b t (h e)", "b s (h r e)"
    else:
        batch, heads, queries, width = node.shape(0)
        shared = node.shape(1)[1]
        query, key, value, result = "b (h r) s d", "b h t d", "b h t e", "b (h r) s e"
    kept, made = node.shape(1)[1 if flat else 2], node.has(4) or _makes(node, 1)
    total = "(p + t)" if node.has(4) else "t"
    keys = kept + (node.shape(4)[2] if node.has(4) else 0)
    mask = _spread(node, 3, [("b", batch), ("(h r)", heads), ("s", queries), (total, keys)])
    if made:  # `c` is the width of keys where they are kept, `d` where queries meet them
        key = key.replace("d", "c")

    def restated(change: Resize) -> dict[int | str, Array | None]:
        h, r = change.extents["h"], change.extents["r"]
        stated = node.attr("scale") is not None and not math.isnan(node.attr("scale"))
        new = {} if stated else _scale(change, width)
        return new | ({"q_num_heads": np.array(h * r), "kv_num_heads": np.array(h)} if flat else {})

    return _rule(
        node,
        [query, key, value, mask, "b h p c", "b h p e", "b"],
        [result, f"b h {total} c", f"b h {total} e", f"b (h r) s {total}"],
        sizes={"h": shared, "r": _divided(heads, shared)},
        pinned=pins("tpm", SCORES) | ({"s": CAUSAL} if node.attr("is_causal", 0) else {}),
        tied={"d": "c"} if made else {},
        macs=tuple(("b", "h", "r", "s", w, x) for w in "de" for x in "tp"[: 1 + node.has(4)]),
        heads=("h", "r"),
        resize=restated,
    )


def _rotated(node: NodeView, caches: tuple[int, int], places: str, heads: int) -> Rule:
    """Pairs are turned by angles of their own, and stay pairs. `heads` is 0 where an axis holds them."""
    pairs, stated = node.shape(caches[0])[-1], int(node.attr("rotary_embedding_dim", 0))
    wide = _divided(node.shape()[-1], heads or 1)
    if stated not in (0, 2 * pairs) or wide < 2 * pairs:
        raise Unknown(f"{pairs} angles do not turn {stated or wide} values")
    turned = "p two" if node.attr("interleaved", 0) else "two p"
    pinned = {"m": PLACES, "two": "a pair is turned together", "w": "part of each head is turned"}
    if wide == 2 * pairs:
        axis = f"({'h ' if heads else ''}{turned})"
    elif heads:  # heads of a sum
        axis = "(h w)"
        pinned["p"] = pinned["w"]
    else:
        axis = f"({turned} + rest)"
    data = f"b s {axis}" if heads else f"b h s {axis}"
    angles = "m p" if len(node.shape(caches[0])) == 2 else "b s p"
    if places == "x":
        pinned |= {"s": "positions are counted", "x": "positions are counted"}
    operands = {0: data, caches[0]: angles, caches[1]: angles, 6 - sum(caches): places}

    def restated(change: Resize) -> dict[int | str, Array | None]:
        return {"rotary_embedding_dim": np.array(2 * change.extents["p"])}

    return _rule(
        node,
        [operands[i] for i in range(4)],
        [data],
        sizes={"two": 2, "p": pairs} | ({"h": heads} if heads else {}),
        attributes={"num_heads": "h"} if heads and node.attr("num_heads", 0) else {},
        pinned=pinned,
        resize=restated if stated else None,
    )


_PLACES = np.array([[0, 2, 1], [3, 1, 4]])


@op(
    "RotaryEmbedding",
    since=23,
    samples=[
        Sample(((2, 4, 3, 8), (5, 4), (5, 4), _PLACES), opset=23),
        Sample(((2, 4, 3, 8), (5, 4), (5, 4), _PLACES), {"interleaved": 1}, opset=23),
        Sample(((2, 3, 24), (5, 4), (5, 4), _PLACES), {"num_heads": 3}, opset=23),
        Sample(((2, 3, 24), (2, 3, 4), (2, 3, 4)), {"num_heads": 3, "interleaved": 1}, opset=23),
        Sample(((2, 4, 3, 8), (2, 3, 4), (2, 3, 4)), {"rotary_embedding_dim": 8}, opset=23),
        Sample(((2, 4, 3, 9), (5, 3), (5, 3), _PLACES), {"rotary_embedding_dim": 6}, opset=23),
        Sample(
            ((2, 4, 3, 9), (5, 3), (5, 3), _PLACES),
            {"rotary_embedding_dim": 6, "interleaved": 1},
            opset=23,
        ),
        Sample(((2, 3, 30), (5, 4), (5, 4), _PLACES), {"num_heads": 3, "rotary_embedding_dim": 8}, opset=23),
    ],
)
def rotary_embedding(node: NodeView) -> Rule:
    heads = int(node.attr("num_heads")) if node.rank() == 3 else 0
    return _rotated(node, (1, 2), "b s", heads)


@op(
    "RotaryEmbedding",
    domain=DOMAIN,
    since=1,
    samples=[
        Sample(((2, 3, 24), _PLACES, (5, 4), (5, 4))),
        Sample(((2, 3, 24), _PLACES, (5, 4), (5, 4)), {"interleaved": 1}),
        Sample(((2, 3, 24), np.array([1]), (5, 4), (5, 4))),
        Sample(((2, 4, 3, 8), _PLACES, (5, 4), (5, 4))),
        Sample(((2, 4, 3, 8), np.array([1]), (5, 4), (5, 4)), {"interleaved": 1}),
        Sample(((2, 3, 30), _PLACES, (5, 4), (5, 4)), {"num_heads": 3, "rotary_embedding_dim": 8}),
    ],
)
def rotary_embedding_of_onnxruntime(node: NodeView) -> Rule | Pinned:
    if node.attr("is_packed_batching", 0):
        return Pinned("its batch is ragged")
    heads = 0
    if node.rank() == 3:
        heads = int(node.attr("num_heads", 0)) or _divided(node.shape()[-1], 2 * node.shape(2)[-1])
    return _rotated(node, (2, 3), "b s" if node.rank(1) == 2 else "x", heads)


def _weights(features: int, width: int) -> tuple[Array, Array]:
    """A matrix and a bias, stored."""
    rng = np.random.default_rng(width)
    matrix, bias = rng.uniform(-1, 1, (features, width)), rng.uniform(-1, 1, width)
    return matrix.astype(np.float32), bias.astype(np.float32)


_KEPT = np.array([[1, 1, 0], [1, 0, 1]], dtype=np.int32)


@op(
    "Attention",
    domain=DOMAIN,
    since=1,
    samples=[
        Sample(((2, 3, 6), *_weights(6, 24)), {"num_heads": 2, "scale": 0.5}),
        Sample(((2, 3, 7), *_weights(7, 45)), {"num_heads": 3, "unidirectional": 1}),
        Sample(((2, 3, 6), *_weights(6, 27)), {"num_heads": 3, "qkv_hidden_sizes": [6, 6, 15]}),
        Sample(((2, 3, 6), *_weights(6, 36), _KEPT), {"num_heads": 3}),
        Sample(((2, 3, 6), *_weights(6, 36), np.array([2, 3], np.int32)), {"num_heads": 3}),
        Sample(((2, 3, 6), *_weights(6, 36), np.tile(_KEPT[:, None], (1, 3, 1))), {"num_heads": 3}),
        Sample(((2, 3, 6), *_weights(6, 36), None, None, (1, 3, 3, 3)), {"num_heads": 3}),
        Sample(((2, 3, 6), *_weights(6, 36), None, None, (2, 1, 3, 3)), {"num_heads": 3}),
        Sample(((2, 3, 6), *_weights(6, 36), None, (2, 2, 3, 2, 4)), {"num_heads": 3}, outputs=2),
        Sample(((2, 3, 6), *_weights(6, 36)), {"num_heads": 3}, outputs=2),
    ],
)
def attention_of_onnxruntime(node: NodeView) -> Rule | Pinned:
    if node.attr("do_rotary", 0):
        return Pinned("it turns pairs of each head by their position")
    if node.attr("past_present_share_buffer", 0):
        return Pinned("its cache is one buffer")
    if node.has(3) and node.rank(3) == 4:
        return Pinned("its mask has positions of its own")
    heads, (batch, places, _) = int(node.attr("num_heads")), node.shape(0)
    sizes = node.attr("qkv_hidden_sizes") or [_divided(node.shape(1)[1], 3)] * 3
    d, e = _divided(int(sizes[0]), heads), _divided(int(sizes[2]), heads)
    total = "(p + s)" if node.has(4) else "s"
    keys = places + (node.shape(4)[3] if node.has(4) else 0)
    masks = {0: "", 1: "x", 2: f"b {total}", 3: f"b s {total}"}
    mask = masks[node.rank(3) if node.has(3) else 0]
    pinned = pins("spm", SCORES) | {"two": "keys and values are stacked"}
    if node.has(2) and not node.fixed(1):
        pinned["d"] = INSIDE  # a bias is added to what is not a weight
    if mask == "x":
        pinned |= pins("xb", ORDER)

    def stated(change: Resize) -> dict[int | str, Array | None]:
        h, new, values = (change.extents[name] for name in "hde")
        scale = {} if node.attr("scale", 0.0) else _scale(change, d)
        if node.attr("qkv_hidden_sizes") is None and new == values:
            return scale
        return {**scale, "qkv_hidden_sizes": np.array([h * new, h * new, h * values])}

    return _rule(
        node,
        [
            "b s i",
            "i (h d + h d + h e)",
            "(h d + h d + h e)",
            mask,
            "two b h p e",
            _spread(node, 5, [("b", batch), ("h", heads), ("s", places), (total, keys)]),
        ],
        ["b s (h e)", f"two b h {total} e"],
        sizes={"h": heads, "d": d, "e": e, "two": 2},
        attributes={"num_heads": "h"},
        pinned=pinned,
        tied={"d": "e"} if node.has(4) or _makes(node, 1) else {},
        macs=tuple(("b", "s", "i", "h", width) for width in "dde"),
        heads=("h",),
        resize=stated,
    )


def _multi_head(node: NodeView, bias: int, mask: int, added: int, past: int) -> Rule:
    """Attention of queries, keys and values that were projected before; the arguments are positions.

    `c` is the width of keys where they may be kept, `d` where queries meet them, `g` that of one bias for all.
    """
    heads, (batch, places, hidden) = int(node.attr("num_heads")), node.shape(0)
    width, wide = _divided(hidden, heads), _divided(node.out_shape()[2], heads)
    split = node.rank(1) == 4
    tied, c, vector = {}, "d", "(h d + h d + h e)"
    pinned = pins("stpm" if node.attr("unidirectional", 0) else "tpm", SCORES)
    if split or node.has(past):  # kernels demand one width
        tied, c, vector = {"d": "e", "c": "e", "g": "e"}, "c", "(three h g)"
        pinned["three"] = ORDER
    elif node.has(bias) or _makes(node, 1):  # the bias is contracted on its own
        tied, c, vector = {"d": "c", "g": "c"}, "c", "(h g + h g + h e)"
    key, value = (f"b h t {c}", "b h t e") if split else (f"b t (h {c})", "b t (h e)")
    total = "(p + t)" if node.has(past) else "t"
    keys = node.shape(1)[2 if split else 1] + (node.shape(past)[2] if node.has(past) else 0)
    padding = {0: "", 1: "x", 2: f"b {total}", 3: f"b s {total}"}[node.rank(mask) if node.has(mask) else 0]
    if padding == "x":
        pinned |= pins("xb", ORDER)
    operands = {
        0: "b s (h d)",
        1: key,
        2: value,
        bias: vector,
        mask: padding,
        added: _spread(node, added, [("b", batch), ("h", heads), ("s", places), (total, keys)]),
        past: f"b h p {c}",
        past + 1: "b h p e",
    }
    return _rule(
        node,
        [operands.get(i, "") for i in range(len(node.shapes))],
        ["b s (h e)", f"b h {total} {c}", f"b h {total} e"],
        sizes={"h": heads, "d": width, "g": width, "e": wide, "three": 3},
        attributes={"num_heads": "h"},
        pinned=pinned,
        tied=tied,
        macs=tuple(("b", "h", "s", w, x) for w in "de" for x in "tp"[: 1 + node.has(past)]),
        heads=("h",),
        resize=None if node.attr("scale", 0.0) else lambda change: _scale(change, width),
    )


_OTHERS = ((2, 4, 18), (2, 4, 18))
_PADS = np.array([[1, 1, 0, 1], [1, 0, 1, 1]], dtype=np.int32)


@op(
    "MultiHeadAttention",
    domain=DOMAIN,
    since=1,
    samples=[
        Sample(((2, 3, 18), *_OTHERS), {"num_heads": 3}),
        Sample(((2, 3, 18), *_OTHERS), {"num_heads": 3, "scale": 0.7}),
        Sample(((2, 3, 18), (2, 4, 18), (2, 4, 12)), {"num_heads": 3}),
        Sample(((2, 3, 18), (2, 3, 18), (2, 3, 18)), {"num_heads": 3, "unidirectional": 1}),
        Sample(((2, 3, 18), *_OTHERS, (54,)), {"num_heads": 3}),
        Sample(((2, 3, 18), (2, 4, 18), (2, 4, 12), (48,)), {"num_heads": 3}),
        Sample(((2, 3, 18), *_OTHERS, None, _PADS), {"num_heads": 3}),
        Sample(((2, 3, 18), *_OTHERS, None, np.array([2, 4], np.int32)), {"num_heads": 3}),
        Sample(((2, 3, 18), *_OTHERS, None, np.stack([_PADS] * 3, 1)), {"num_heads": 3}),
        Sample(((2, 3, 18), *_OTHERS, None, None, (1, 3, 3, 4)), {"num_heads": 3}),
        Sample(((2, 3, 18), *_OTHERS, None, None, (2, 1, 3, 4)), {"num_heads": 3}),
        Sample(
            ((2, 3, 18), *_OTHERS, None, None, None, (2, 3, 2, 6), (2, 3, 2, 6)),
            {"num_heads": 3},
            outputs=3,
        ),
        Sample(
            ((2, 3, 18), *_OTHERS, (54,), None, (2, 3, 3, 6), (2, 3, 2, 6), (2, 3, 2, 6)),
            {"num_heads": 3},
            outputs=3,
        ),
        Sample(((2, 3, 18), (2, 4, 18), (2, 4, 12)), {"num_heads": 3}, outputs=3),
        Sample(((2, 3, 18), (2, 3, 4, 6), (2, 3, 4, 6)), {"num_heads": 3}),
    ],
)
def multi_head_attention(node: NodeView) -> Rule | Pinned:
    if node.has(8) or node.has(9):
        return Pinned("its cache is one buffer")
    if _makes(node, 3):
        return Pinned("its scores are an output")
    if not node.has(2):
        return Pinned("its operands are packed")
    return _multi_head(node, bias=3, mask=4, added=5, past=6)


@op(
    "DecoderMaskedMultiHeadAttention",
    domain=DOMAIN,
    since=1,
    samples=[Sample(((2, 1, 18), (2, 3, 4, 6), (2, 3, 4, 6)), {"num_heads": 3})],
)
def decoder_masked_multi_head_attention(node: NodeView) -> Rule | Pinned:
    if node.attr("past_present_share_buffer", 0) or not node.has(1) or node.rank(1) != 4:
        return Pinned("its cache is one buffer")
    if _makes(node, 3):
        return Pinned("its scores are an output")
    return _multi_head(node, bias=10, mask=3, added=4, past=5)


_LAST = np.array([3, 2], dtype=np.int32)
_TOTAL = np.array([4], dtype=np.int32)
_GROUPED = ((2, 4, 32), (2, 4, 16), (2, 4, 16), None, None, _LAST, _TOTAL)


@op(
    "GroupQueryAttention",
    domain=DOMAIN,
    since=1,
    samples=[
        Sample(
            ((2, 4, 48), (2, 4, 16), (2, 4, 16), None, None, _LAST, _TOTAL),
            {"num_heads": 6, "kv_num_heads": 2},
            outputs=3,
        ),
        Sample(
            ((2, 4, 64), None, None, None, None, _LAST, _TOTAL),
            {"num_heads": 4, "kv_num_heads": 2},
            outputs=3,
        ),
        Sample(
            _GROUPED,
            {"num_heads": 4, "kv_num_heads": 2, "scale": 0.4, "softcap": 2.0, "local_window_size": 2},
        ),
        Sample(
            (
                (2, 1, 32),
                (2, 1, 16),
                (2, 1, 16),
                (2, 2, 3, 8),
                (2, 2, 3, 8),
                _LAST,
                _TOTAL,
            ),
            {"num_heads": 4, "kv_num_heads": 2},
            outputs=3,
        ),
        Sample(
            ((2, 4, 64), (2, 4, 32), (2, 4, 32), None, None, _LAST, _TOTAL, (6, 8), (6, 8)),
            {"num_heads": 4, "kv_num_heads": 2, "do_rotary": 1},
            outputs=3,
        ),
        Sample(
            ((2, 4, 64), (2, 4, 32), (2, 4, 32), None, None, _LAST, _TOTAL, (6, 8), (6, 8)),
            {"num_heads": 4, "kv_num_heads": 2, "do_rotary": 1, "rotary_interleaved": 1},
        ),
        Sample(
            ((2, 4, 128), None, None, None, None, _LAST, _TOTAL, (6, 8), (6, 8)),
            {"num_heads": 4, "kv_num_heads": 2, "do_rotary": 1},
        ),
        Sample(
            (*_GROUPED, None, None, None, (2, 4, 4, 4), (4,)),
            {"num_heads": 4, "kv_num_heads": 2},
        ),
    ],
)
def group_query_attention(node: NodeView) -> Rule | Pinned:
    if any(node.has(i) for i in range(12, len(node.shapes))) or node.attr("sliding_window_cache", 0):
        return Pinned("its cache is quantised or a window, or it normalises queries and keys")
    if _makes(node, 3):
        return Pinned("its scores are an output")
    batch, places, wide = node.shape(0)
    heads, shared = int(node.attr("num_heads")), int(node.attr("kv_num_heads"))
    packed = not node.has(1)
    keys = node.shape(10)[3] if node.has(10) else 0

    def stated(change: Resize) -> dict[int | str, Array | None]:
        h, r = change.extents["h"], change.extents["r"]
        return {"num_heads": np.array(h * r), "kv_num_heads": np.array(h)}

    return _rule(
        node,
        [
            "b s (h r d + h d + h d)" if packed else "b s (h r d)",
            "b t (h d)",
            "b t (h d)",
            "b h p d",
            "b h p d",
            "b",
            " ".join(f"one{i}" for i in range(node.rank(6))),
            "x a",
            "x a",
            "b s",
            _spread(node, 10, [("b", batch), ("(h r)", heads), ("s", places), ("k", keys)]),
            "(h r)",
        ],
        ["b s (h r d)", "b h n d", "b h n d"],
        sizes={
            "h": shared,
            "r": _divided(heads, shared),
            "d": _divided(wide, heads + 2 * shared if packed else heads),
        },
        pinned=pins("stkpn", SCORES) | pins("da", "onnxruntime takes heads of 8 or 16 only") | {"x": PLACES},
        macs=tuple(("b", "h", "r", "s", "d", x) for x in ("s", "s")),
        heads=("h", "r"),
        resize=stated,
    )
