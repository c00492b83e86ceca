"""Shape arithmetic and constants made at run time."""

from __future__ import annotations

import numpy as np
import onnx

from onnxprune.ops.spec import Array, NodeView, Resize, Rule, Sample, label, names, op


@op(
    "Shape",
    since=1,
    samples=[],
    evaluate=lambda node, inputs: [
        np.array(node.shape()[node.attr("start", 0) : node.attr("end")], dtype=np.int64)
    ],
)
def shape(node: NodeView) -> Rule:
    return Rule((tuple(map(label, names("a", node.rank()))),), (None,))


@op(
    "Size",
    since=1,
    evaluate=lambda node, inputs: [np.array(np.prod(node.shape()), dtype=np.int64)],
)
def size(node: NodeView) -> Rule:
    return shape(node)


@op("Constant", since=1)
def constant(node: NodeView) -> Rule:
    return Rule((), (None,))


def _fill(node: NodeView) -> Array:
    value = node.attr("value")
    return np.zeros(1, np.float32) if value is None else onnx.numpy_helper.to_array(value)


@op(
    "ConstantOfShape",
    since=9,
    samples=[Sample((np.array([2, 3]),))],
    evaluate=lambda node, inputs: [np.full(node.out_shape(), _fill(node).ravel()[0])],
)
def constant_of_shape(node: NodeView) -> Rule:
    def extents(change: Resize) -> dict[int | str, Array | None]:
        return {0: np.array(change.output(), dtype=np.int64)}

    axes = tuple(map(label, names("a", len(node.out_shape()))))
    return Rule((None,), (axes,), resize=extents)


@op(
    "Range",
    since=11,
    evaluate=lambda node, inputs: [np.arange(*(np.asarray(i).item() for i in inputs))],
)
def range_(node: NodeView) -> Rule:
    return Rule((None, None, None), ((label("a"),),), pinned={"a": "positions are counted"})
