"""Quantisation to and from integers: scale and zero point follow their axis."""

from __future__ import annotations

from onnxprune.ops.spec import NodeView, Pattern, Pinned, Rule, Sample, label, names, op


@op(
    "DequantizeLinear",
    "QuantizeLinear",
    since=10,
    samples=[
        Sample(((2, 4, 3), (4,)), {"axis": 1}),
        Sample(((2, 4, 3), ())),
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
