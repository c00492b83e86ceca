"""Fused operators of onnxruntime (`com.microsoft`), as its optimiser and model tools write them."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from onnxprune.ops.conv import conv
from onnxprune.ops.matmul import gemm, matmul
from onnxprune.ops.norm import STATISTIC, layer_normalization
from onnxprune.ops.pointwise import nary, unary
from onnxprune.ops.spec import NodeView, Pattern, Pinned, Rule, Sample, label, names, op, pins

DOMAIN = "com.microsoft"


@op(
    "FusedConv",
    domain=DOMAIN,
    since=1,
    samples=[
        Sample(((2, 6, 5, 5), (8, 6, 3, 3), (8,)), {"activation": "Relu"}),
        Sample(((2, 6, 5, 5), (9, 2, 1, 1), (9,), (2, 9, 5, 5)), {"group": 3, "activation": "Relu"}),
    ],
)
def fused_conv(node: NodeView) -> Rule:
    rule = conv(node)
    return dataclasses.replace(rule, inputs=(*rule.inputs, rule.outputs[0]), linear=None)


@op(
    "FusedGemm",
    domain=DOMAIN,
    since=1,
    samples=[Sample(((3, 4), (4, 5), (5,)), {"activation": "Relu"})],
)
def fused_gemm(node: NodeView) -> Rule:
    return dataclasses.replace(gemm(node), linear=None)


@op(
    "FusedMatMul",
    domain=DOMAIN,
    since=1,
    samples=[
        Sample(((2, 3, 4), (4, 5)), {"alpha": 0.5}),
        Sample(((2, 4, 3), (2, 5, 4)), {"transA": 1, "transB": 1}),
    ],
)
def fused_matmul(node: NodeView) -> Rule | Pinned:
    if node.attr("transBatchA", 0) or node.attr("transBatchB", 0):
        return Pinned("it transposes batch axes")
    turned = (bool(node.attr("transA", 0)), bool(node.attr("transB", 0)))
    shapes = tuple(_turn(node.shape(i)) if turned[i] else node.shape(i) for i in range(2))
    rule = matmul(dataclasses.replace(node, shapes=shapes))
    inputs = tuple(_turn(p) if turn and p else p for p, turn in zip(rule.inputs, turned, strict=True))
    return dataclasses.replace(rule, inputs=inputs, linear=None)


def _turn(axes: tuple[Any, ...]) -> tuple[Any, ...]:
    """The last two axes swapped."""
    return (*axes[:-2], axes[-1], axes[-2])


op("BiasGelu", domain=DOMAIN, since=1, samples=[Sample(((2, 3, 4), (4,)))])(nary)
op("FastGelu", domain=DOMAIN, since=1, samples=[Sample(((2, 3, 4), (4,))), Sample(((2, 4),))])(nary)
op("Gelu", "QuickGelu", domain=DOMAIN, since=1, samples=[Sample(((2, 3, 4),))])(unary)
op("SimplifiedLayerNormalization", since=1, samples=[Sample(((2, 3, 4), (4,)))])(layer_normalization)


_SKIP = [
    Sample(((2, 3, 4), (2, 3, 4), (4,))),
    Sample(((2, 3, 4), (2, 3, 4), (4,), (4,))),
    Sample(((2, 3, 4), (2, 3, 4), (4,)), outputs=4),
]


@op(
    "SkipLayerNormalization",
    domain=DOMAIN,
    since=1,
    samples=[
        *_SKIP,
        Sample(((2, 3, 4), (1, 3, 4), (4,), (4,), (4,))),
        Sample(((2, 3, 4), (3, 4), (4,), None, (4,)), {"epsilon": 0.1}, outputs=4),
    ],
)
@op("SkipSimplifiedLayerNormalization", domain=DOMAIN, since=1, samples=_SKIP)
def skip_layer_normalization(node: NodeView) -> Rule:
    axes = names("a", node.rank())
    data: Pattern = tuple(map(label, axes))

    def operand(i: int) -> Pattern | None:
        if not node.has(i):
            return None
        shape, shift = node.shape(i), len(axes) - node.rank(i)
        return tuple(
            label(axes[j + shift] if size == node.shape()[j + shift] else f"one{i}_{j}")
            for j, size in enumerate(shape)
        )

    inside = node.op == "SkipSimplifiedLayerNormalization" and node.has(3)  # a bias in front of the norm
    return Rule(
        tuple(operand(i) for i in range(len(node.shapes))),
        (data, None, None, data),
        gain=None if inside else 2,
        adds=(0, 1),
        lossy={axes[-1]: STATISTIC},
    )


@op(
    "EmbedLayerNormalization",
    domain=DOMAIN,
    since=1,
    samples=[
        Sample(
            (
                np.array([[1, 2, 0]], np.int32),
                np.array([[0, 1, 0]], np.int32),
                (5, 4),
                (3, 4),
                (2, 4),
                (4,),
                (4,),
            ),
            {"epsilon": 1e-5},
            outputs=2,
        )
    ],
)
def embed_layer_normalization(node: NodeView) -> Rule:
    return Rule.of(
        "b s, b s, words d, places d, segments d, d, d -> b s d, b, b s d",
        pinned=pins(("words", "places", "segments", "s"), "picked by position"),
        gain=5,
        lossy={"d": STATISTIC},
    )
