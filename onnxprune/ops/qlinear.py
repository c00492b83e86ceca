"""Arithmetic on quantised integers, of ONNX itself and of onnxruntime (`com.microsoft`).

Scales and zero points are numbers, or vectors over the outputs of a weight. Where a unit is contracted, an
integer that says nothing is the zero point, not 0.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from onnxprune.ops.conv import conv
from onnxprune.ops.matmul import gemm, matmul
from onnxprune.ops.norm import STATISTIC
from onnxprune.ops.pool import global_pool, pool
from onnxprune.ops.spec import (
    Array,
    NodeView,
    Pattern,
    Pinned,
    Rule,
    Sample,
    broadcast,
    label,
    names,
    op,
    parse,
    pins,
)

DOMAIN = "com.microsoft"
ROWS = "its rows are scaled one by one"


def _bytes(*shape: int, signed: bool = False, step: int = 37) -> Array:
    """Different values over most of the range."""
    values = np.arange(np.prod(shape)) * step % 251
    return (values - 125).astype(np.int8).reshape(shape) if signed else values.astype(np.uint8).reshape(shape)


def _of(value: float) -> Array:
    return np.array(value, np.float32)


def _byte(value: int) -> Array:
    return np.array(value, np.uint8)


def _parameter(node: NodeView, i: int, *axes: str) -> Pattern | None:
    """A scale or zero point: one number, or a vector over the axis made of the labels."""
    if not node.has(i):
        return None
    shape = node.shape(i)
    if shape in ((), (1,)):
        return tuple(label(f"one{i}") for _ in shape)
    return ((axes,),)


def _rule(node: NodeView, operands: dict[int, Pattern | None], like: Rule) -> Rule:
    """The rule of the operator on real numbers, with its operands in other places."""
    inputs = tuple(operands.get(i) if node.has(i) else None for i in range(len(node.shapes)))
    return dataclasses.replace(like, inputs=inputs, linear=None, adds=())


def _seen(node: NodeView, *positions: int, **attributes: object) -> NodeView:
    """The node as its counterpart on real numbers has it: these operands, attributes replaced."""
    shapes = tuple(node.shape(i) if node.has(i) else None for i in positions)
    return dataclasses.replace(node, shapes=shapes, attributes={**node.attributes, **attributes})


def _channels_first(pattern: Pattern | None) -> Pattern | None:
    return pattern and (pattern[0], *pattern[2:], pattern[1])


# --------------------------------------------------------------------------------------- convolutions

_CONV = (_bytes(2, 6, 5, 5), _of(0.02), _byte(117))
_OUT = (_of(0.1), _byte(120))
_BIAS = np.arange(8, dtype=np.int32) * 300 - 1000
_FILTERS = _bytes(8, 6, 3, 3, signed=True)
_GROUPS = (_bytes(9, 2, 1, 1, step=53), np.linspace(0.01, 0.03, 9).astype(np.float32), _byte(130))
_SPREAD = np.linspace(0.01, 0.03, 8).astype(np.float32)


@op(
    "QLinearConv",
    since=10,
    samples=[
        Sample((*_CONV, _FILTERS, _SPREAD, np.zeros(8, np.int8), *_OUT, _BIAS), {"pads": [1, 1, 1, 1]}),
        Sample((*_CONV, *_GROUPS, *_OUT), {"group": 3}, opset=10),
        Sample((*_CONV, _bytes(8, 6, 1, 1), _of(0.01), _byte(99), *_OUT), {"strides": [2, 2]}),
        Sample((*_CONV, _bytes(12, 1, 3, 3), np.array([0.01], np.float32), _byte(99), *_OUT), {"group": 6}),
    ],
)
@op(
    "QLinearConv",
    domain=DOMAIN,
    since=1,
    samples=[
        Sample(
            (
                np.moveaxis(_CONV[0], 1, -1).copy(),
                *_CONV[1:],
                _FILTERS,
                _SPREAD,
                np.zeros(8, np.int8),
                *_OUT,
                _BIAS,
            ),
            {"channels_last": 1},
        ),
        Sample((*_CONV, _FILTERS, _SPREAD, np.zeros(8, np.int8), *_OUT, _BIAS)),
    ],
)
def qlinear_conv(node: NodeView) -> Rule:
    like = conv(_seen(node, 0, 3))
    data, out = like.inputs[0], like.outputs[0]
    if node.attr("channels_last", 0):
        data, out = _channels_first(data), _channels_first(out)
    made = ("g", "o")
    return _rule(
        node,
        {
            0: data,
            1: _parameter(node, 1),
            2: _parameter(node, 2),
            3: like.inputs[1],
            4: _parameter(node, 4, *made),
            5: _parameter(node, 5, *made),
            6: _parameter(node, 6),
            7: _parameter(node, 7),
            8: ((made,),),
        },
        dataclasses.replace(like, outputs=(out,), zero={0: 2, 3: 5}),
    )


@op(
    "ConvInteger",
    since=10,
    samples=[
        Sample((_CONV[0], _bytes(8, 6, 3, 3), _byte(117), _byte(99)), {"pads": [1, 1, 1, 1]}),
        Sample((_CONV[0], _bytes(9, 2, 1, 1)), {"group": 3}),
        Sample((_CONV[0], _bytes(12, 1, 3, 3), _byte(117)), {"group": 6}),
    ],
)
def conv_integer(node: NodeView) -> Rule:
    like = conv(node)
    return _rule(
        node,
        {
            0: like.inputs[0],
            1: like.inputs[1],
            2: _parameter(node, 2),
            3: _parameter(node, 3, "g", "o"),
        },
        dataclasses.replace(like, zero={0: 2, 1: 3}),
    )


# ------------------------------------------------------------------------------------ matrix products

_LEFT = (_bytes(3, 6), _of(0.02), _byte(117))
_COLUMNS = np.linspace(0.01, 0.03, 4).astype(np.float32)
_COLUMN_ZEROS = np.array([0, 3, -7, 20], np.int8)
_RIGHT = _bytes(6, 4, signed=True)


def _product(node: NodeView, a: int, b: int, parameters: tuple[int, int, int, int]) -> Rule | Pinned:
    """A matrix product whose left operand is scaled as a whole and whose right one may be by column."""
    like = matmul(_seen(node, a, b))
    for i in parameters[:2]:
        if node.has(i) and node.shape(i) not in ((), (1,)):
            return Pinned(ROWS)
    right = like.inputs[1] or ()
    operands = {a: like.inputs[0], b: right} | {i: _parameter(node, i) for i in parameters[:2]}
    for i in parameters[2:]:
        if node.has(i) and node.rank(i) > 1:  # by column in each matrix of a stack: (..., 1, n)
            axes = zip(node.shape(i), right, strict=True)
            operands[i] = tuple(label(f"one{i}_{j}") if size == 1 else t for j, (size, t) in enumerate(axes))
        else:
            operands[i] = _parameter(node, i, "n")
    return _rule(node, operands, dataclasses.replace(like, zero={a: parameters[0], b: parameters[2]}))


@op(
    "QLinearMatMul",
    since=10,
    samples=[
        Sample((*_LEFT, _RIGHT, _COLUMNS, _COLUMN_ZEROS, *_OUT)),
        Sample((_bytes(2, 3, 6), *_LEFT[1:], _bytes(6, 4), _of(0.01), _byte(99), *_OUT), opset=10),
        Sample((_bytes(2, 3, 6), *_LEFT[1:], _bytes(2, 6, 4), _of(0.01), _byte(99), *_OUT)),
    ],
)
def qlinear_matmul(node: NodeView) -> Rule | Pinned:
    if any(node.shape(i) not in ((), (1,)) for i in (6, 7)):
        return Pinned(ROWS)
    rule = _product(node, 0, 3, (2, 1, 5, 4))
    if isinstance(rule, Pinned):
        return rule
    ends = tuple(_parameter(node, i) for i in (6, 7))
    return dataclasses.replace(rule, inputs=(*rule.inputs[:6], *ends))


@op(
    "MatMulInteger",
    since=10,
    samples=[
        Sample((_LEFT[0], _RIGHT, _byte(117), _COLUMN_ZEROS)),
        Sample((_bytes(2, 3, 6), _bytes(6, 4), _byte(117), np.array([99], np.uint8))),
        Sample((_bytes(2, 3, 6), _bytes(2, 6, 4))),
    ],
)
def matmul_integer(node: NodeView) -> Rule | Pinned:
    return _product(node, 0, 1, (2, 2, 3, 3))


@op(
    "MatMulIntegerToFloat",
    domain=DOMAIN,
    since=1,
    samples=[
        Sample((_LEFT[0], _RIGHT, _of(0.02), _COLUMNS, _byte(117), _COLUMN_ZEROS, (4,))),
        Sample((_LEFT[0], _RIGHT, _of(0.02), _of(0.01))),
    ],
)
def matmul_integer_to_float(node: NodeView) -> Rule | Pinned:
    return _biased(node, _product(node, 0, 1, (4, 2, 5, 3)), 6)


_EXTREMES = np.where(np.arange(24) * 5 % 7 % 2, 2.0, -2.0).astype(np.float32).reshape(4, 6)


@op(
    "DynamicQuantizeMatMul",
    domain=DOMAIN,
    since=1,
    samples=[
        Sample((_EXTREMES, _RIGHT, _COLUMNS, _COLUMN_ZEROS, (4,))),
        Sample((_EXTREMES, _RIGHT, _of(0.01))),
    ],
)
def dynamic_quantize_matmul(node: NodeView) -> Rule | Pinned:
    """As DynamicQuantizeLinear, the range of the left operand only decides what is rounded how."""
    rule = _biased(node, _product(node, 0, 1, (5, 5, 3, 2)), 4)
    return rule if isinstance(rule, Pinned) else dataclasses.replace(rule, zero={1: 3})


def _biased(node: NodeView, rule: Rule | Pinned, i: int) -> Rule | Pinned:
    if isinstance(rule, Pinned) or not node.has(i):
        return rule
    return dataclasses.replace(rule, inputs=(*rule.inputs[:i], (label("n"),)))


@op(
    "QGemm",
    domain=DOMAIN,
    since=1,
    samples=[
        Sample((*_LEFT, _RIGHT, _COLUMNS, _COLUMN_ZEROS, _BIAS[:4], *_OUT)),
        Sample((*_LEFT, _bytes(4, 6), _of(0.01), _byte(99), _BIAS[None, :4]), {"transB": 1, "alpha": 0.5}),
        Sample((_bytes(6, 3), *_LEFT[1:], _bytes(6, 4), _of(0.01), _byte(99)), {"transA": 1}),
    ],
)
def q_gemm(node: NodeView) -> Rule | Pinned:
    if any(node.has(i) and node.shape(i) not in ((), (1,)) for i in (1, 2, 7, 8)):
        return Pinned(ROWS)
    like = gemm(_seen(node, 0, 3, 6))
    operands = {i: _parameter(node, i, "n") for i in (1, 2, 4, 5, 7, 8)}
    operands |= {0: like.inputs[0], 3: like.inputs[1], 6: like.inputs[2] if node.has(6) else None}
    return _rule(node, operands, dataclasses.replace(like, zero={0: 2, 3: 5}))


@op(
    "QAttention",
    domain=DOMAIN,
    since=1,
    samples=[
        Sample(
            (_bytes(2, 3, 6), _bytes(6, 24), (24,), _of(0.02), _of(0.01), None, _byte(117), _byte(99)),
            {"num_heads": 2},
        ),
        Sample(
            (
                _bytes(2, 3, 6),
                _bytes(6, 24, signed=True),
                (24,),
                _of(0.02),
                np.linspace(0.005, 0.02, 24).astype(np.float32),
                None,
                _byte(117),
                np.zeros(24, np.int8),
            ),
            {"num_heads": 2},
        ),
    ],
)
def q_attention(node: NodeView) -> Rule | Pinned:
    if node.has(8) or any(shape is not None for shape in node.out_shapes[1:]):
        return Pinned("it carries past keys and values")
    if node.attr("do_rotary", 0):
        return Pinned("it rotates queries and keys")
    made = ("t", "h", "d")
    data, weight, bias = parse("b s i, i (t h d), (t h d) ->")[0]
    operands: dict[int, Pattern | None] = {0: data, 1: weight, 2: bias}
    operands |= {i: _parameter(node, i, *made) for i in (3, 4, 6, 7)}
    like = Rule(
        (),
        parse("-> b s (h d)")[1],
        sizes={"t": 3, "h": int(node.attr("num_heads"))},
        attributes={"num_heads": "h"},
        pinned=pins(("t", "d"), "scores are taken over it") | {"s": "positions attend to each other"},
        macs=("b", "s", "i", "t", "h", "d"),
        heads=("h",),
        zero={0: 6, 1: 7},
    )
    return _rule(node, operands, like)


# ---------------------------------------------------------------------------- elementwise and pooling


@op(
    "QLinearAdd",
    "QLinearMul",
    domain=DOMAIN,
    since=1,
    samples=[
        Sample((_bytes(2, 4, 3), _of(0.02), _byte(117), _bytes(4, 1, step=53), _of(0.03), _byte(99), *_OUT)),
        Sample((_bytes(2, 4), _of(0.02), _byte(0), _bytes(2, 4, step=53), _of(0.03), _byte(0), *_OUT)),
    ],
)
def q_nary(node: NodeView) -> Rule:
    (left, right), out = broadcast((node.shape(0), node.shape(3)), node.out_shape())
    return _elementwise(node, {0: left, 3: right}, out)


@op(
    "QLinearWhere",
    domain=DOMAIN,
    since=1,
    samples=[
        Sample(
            (
                np.arange(12).reshape(3, 4) % 5 < 2,
                _bytes(3, 4),
                _of(0.02),
                _byte(117),
                _bytes(4, step=53),
                _of(0.03),
                _byte(99),
                *_OUT,
            )
        )
    ],
)
def q_where(node: NodeView) -> Rule:
    operands, out = broadcast((node.shape(0), node.shape(1), node.shape(4)), node.out_shape())
    return _elementwise(node, dict(zip((0, 1, 4), operands, strict=True)), out)


@op(
    "QLinearSigmoid",
    "QLinearLeakyRelu",
    domain=DOMAIN,
    since=1,
    samples=[Sample((_bytes(2, 4, 3), _of(0.03), _byte(117), _of(0.01), _byte(3)))],
)
def q_unary(node: NodeView) -> Rule:
    data = tuple(map(label, names("a", node.rank())))
    return _elementwise(node, {0: data}, data)


def _elementwise(node: NodeView, operands: dict[int, Pattern | None], out: Pattern) -> Rule:
    """All operands that are not told otherwise are scales and zero points, one number each."""
    rest = {i: _parameter(node, i) for i in range(len(node.shapes)) if i not in operands}
    return _rule(node, operands | rest, Rule((), (out,)))


@op(
    "QLinearSoftmax",
    domain=DOMAIN,
    since=1,
    samples=[
        Sample((_bytes(2, 4, 3), _of(0.03), _byte(117), _of(0.004), _byte(3)), {"opset": 13, "axis": 1}),
        Sample((_bytes(2, 4, 3), _of(0.03), _byte(117), _of(0.004), _byte(3)), {"opset": 12, "axis": 1}),
    ],
)
def q_softmax(node: NodeView) -> Rule:
    rule, axis = q_unary(node), node.axis(node.attr("axis", -1))
    over = range(axis, axis + 1) if int(node.attr("opset")) >= 13 else range(axis, node.rank())
    return dataclasses.replace(rule, pinned=pins((f"a{i}" for i in over), "softmax over it"))


_MAP = (_bytes(2, 4, 6, 6), _of(0.03), _byte(117), _of(0.04), _byte(99))
_LAST = (np.moveaxis(_MAP[0], 1, -1).copy(), *_MAP[1:])


@op(
    "QLinearAveragePool",
    domain=DOMAIN,
    since=1,
    samples=[
        Sample(_MAP, {"kernel_shape": [2, 2], "strides": [2, 2]}),
        Sample(_LAST, {"kernel_shape": [3, 3], "pads": [1, 1, 1, 1], "channels_last": 1}),
    ],
)
@op(
    "QLinearGlobalAveragePool",
    domain=DOMAIN,
    since=1,
    samples=[Sample(_MAP), Sample(_LAST, {"channels_last": 1})],
)
def q_pool(node: NodeView) -> Rule | Pinned:
    rule = (global_pool if node.op == "QLinearGlobalAveragePool" else pool)(_seen(node, 0))
    if isinstance(rule, Pinned):
        return rule
    data, out = rule.inputs[0], rule.outputs[0]
    if node.attr("channels_last", 0):
        data, out = _channels_first(data), _channels_first(out)
    operands = {i: _parameter(node, i) for i in range(1, 5)} | {0: data}
    return _rule(node, operands, dataclasses.replace(rule, outputs=(out,)))


@op(
    "NhwcMaxPool",
    domain=DOMAIN,
    since=1,
    samples=[Sample((_LAST[0],), {"kernel_shape": [2, 2], "strides": [2, 2]})],
)
def nhwc_max_pool(node: NodeView) -> Rule | Pinned:
    return q_pool(dataclasses.replace(node, attributes={**node.attributes, "channels_last": 1}))


@op(
    "QLinearConcat",
    domain=DOMAIN,
    since=1,
    samples=[
        Sample(
            (*_OUT, _bytes(2, 3, 4), _of(0.02), _byte(117), _bytes(2, 2, 4, step=53), _of(0.03), _byte(99)),
            {"axis": 1},
        ),
        Sample(
            (*_OUT, _bytes(2, 3), _of(0.02), _byte(117), _bytes(2, 3, step=53), _of(0.03), _byte(99)),
            {"axis": -1},
        ),
    ],
)
def q_concat(node: NodeView) -> Rule:
    rank = len(node.out_shape())
    axis = node.axis(int(node.attr("axis")), rank)
    parts = range(2, len(node.shapes), 3)
    axes = tuple(map(label, names("a", rank)))
    operands: dict[int, Pattern | None] = {
        i: (*axes[:axis], label(f"p{i}"), *axes[axis + 1 :]) for i in parts
    }
    joined = tuple((f"p{i}",) for i in parts)
    return _elementwise(node, operands, (*axes[:axis], joined, *axes[axis + 1 :]))


# ---------------------------------------------------------------------------------------- embeddings

_SEGMENTS = np.array([[0, 1, 0]], np.int32)
_NUMBERS = tuple(_of(scale) for scale in (0.02, 0.03, 0.01, 0.02, 0.01))


@op(
    "QEmbedLayerNormalization",
    domain=DOMAIN,
    since=1,
    samples=[
        Sample(
            (
                np.array([[1, 2, 0]], np.int32),
                _SEGMENTS,
                _bytes(5, 4),
                _bytes(3, 4, step=53),
                _bytes(2, 4, step=41),
                _bytes(4, step=61),
                _bytes(4, step=71),
                None,
                *_NUMBERS,
                *(_byte(zero) for zero in (117, 99, 120, 4, 130)),
            ),
            {"epsilon": 1e-5},
            outputs=2,
        )
    ],
)
def q_embed_layer_normalization(node: NodeView) -> Rule:
    text = "b s, b s, words d, places d, segments d, d, d, b s -> b s d, b"
    inputs, outputs = parse(text)
    operands = dict(enumerate(inputs)) | {i: _parameter(node, i) for i in range(8, 18)}
    like = Rule(
        (),
        outputs,
        pinned=pins(("words", "places", "segments", "s"), "picked by position"),
        lossy={"d": STATISTIC},
    )
    return _rule(node, operands, like)
