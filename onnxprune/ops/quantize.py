"""Quantisation to and from integers: scale and zero point follow their axis."""

from __future__ import annotations

import numpy as np

from onnxprune.ops.spec import NodeView, Pattern, Pinned, Rule, Sample, label, names, op

_BYTES = np.arange(24, dtype=np.uint8).reshape(2, 4, 3)
_ZEROS = np.array([3, 0, 7, 100], dtype=np.uint8)


@op(
    "DequantizeLinear",
    since=10,
    samples=[
        Sample((_BYTES, (4,)), {"axis": 1}),
        Sample((_BYTES, (4,), _ZEROS)),
        Sample((_BYTES, (3,)), {"axis": -1}),
        Sample((_BYTES, (), np.array(5, dtype=np.uint8)), opset=10),
        Sample((_BYTES, (1,), np.array([5], dtype=np.uint8))),
    ],
)
@op(
    "QuantizeLinear",
    since=10,
    samples=[
        Sample(((2, 4, 3), (4,)), {"axis": 1}),
        Sample(((2, 4, 3), (4,), _ZEROS)),
        Sample(((2, 4, 3), (), np.array(100, dtype=np.uint8)), opset=10),
    ],
)
def quantize(node: NodeView) -> Rule | Pinned:
    if node.attr("block_size", 0):
        return Pinned("it is quantised in blocks")
    axes = names("a", node.rank())
    data: Pattern = tuple(map(label, axes))
    parameter: Pattern = ()
    if node.rank(1):
        axis = axes[node.axis(node.attr("axis", 1))]
        parameter = (label(axis if node.shape(1) != (1,) else "one"),)
    return Rule((data, parameter, parameter), (data,))
