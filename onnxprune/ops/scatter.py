"""Reading and writing at positions that are data: those axes are pinned, what is moved whole passes through."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from onnxprune.ops.spec import Array, AxisPattern, NodeView, Pattern, Rule, Sample, label, names, op, pins

BY_POSITION = "picked by position"

_ROWS = np.array([[1, 0, 2, 1], [0, 0, 1, 1]])
_PAIRS = np.array([[0, 1], [2, 0], [1, 1]])


@op(
    "GatherElements",
    since=11,
    samples=[
        Sample(((3, 4), _ROWS)),
        Sample(((2, 5), _ROWS), {"axis": 1}),
        Sample(((3, 6), _ROWS), {"axis": -2}),
    ],
)
def gather_elements(node: NodeView) -> Rule:
    axis = node.axis(int(node.attr("axis", 0)))
    data, index, pinned = _elementwise(node, axis)
    return Rule((data, index), (index,), pinned=pinned)


@op(
    "ScatterElements",
    since=11,
    samples=[
        Sample(((3, 4), _ROWS, (2, 4))),
        Sample(((2, 5), _ROWS, (2, 4)), {"axis": 1, "reduction": "add"}, opset=16),
        Sample(((3, 6), _ROWS, (2, 4))),
    ],
)
def scatter_elements(node: NodeView) -> Rule:
    axis = node.axis(int(node.attr("axis", 0)))
    data, index, pinned = _elementwise(node, axis)
    pinned |= {f"i{axis}": "written by position"}
    return Rule((data, index, index), (data,), pinned=pinned)


def _elementwise(node: NodeView, axis: int) -> tuple[Pattern, Pattern, dict[str, str]]:
    """Patterns of the data and of the indices, and the pinned labels. Off the axis, an index says nothing
    where the indices span the whole extent."""
    data: list[AxisPattern] = []
    index: list[AxisPattern] = []
    pinned: dict[str, str] = {}
    for i, (whole, part) in enumerate(zip(node.shape(0), node.shape(1), strict=True)):
        shared = i != axis and whole == part
        data.append(label(f"a{i}"))
        index.append(label(f"a{i}" if shared else f"i{i}"))
        if not shared:
            pinned[f"a{i}"] = BY_POSITION
            if i != axis:
                pinned[f"i{i}"] = BY_POSITION
    return tuple(data), tuple(index), pinned


@op(
    "GatherND",
    since=11,
    samples=[
        Sample(((3, 2, 4), _PAIRS), opset=13),
        Sample(((3, 4), np.array([[[2], [0]]])), opset=13),
        Sample(((2, 3, 4), np.array([[[2], [0]], [[1], [1]]])), {"batch_dims": 1}, opset=13),
    ],
)
def gather_nd(node: NodeView) -> Rule:
    depth = node.shape(1)[-1]
    batch = int(node.attr("batch_dims", 0))
    shared, picked = names("b", batch), names("p", depth)
    rest, moved = names("a", node.rank() - batch - depth), names("i", node.rank(1) - batch - 1)
    return Rule(
        (
            tuple(map(label, (*shared, *picked, *rest))),
            tuple(map(label, (*shared, *moved, "depth"))),
        ),
        (tuple(map(label, (*shared, *moved, *rest))),),
        pinned=pins((*picked, "depth"), BY_POSITION),
    )


@op(
    "ScatterND",
    since=11,
    samples=[
        Sample(((3, 2, 4), _PAIRS, (3, 4))),
        Sample(((4, 3), np.array([[[2], [0]]]), (1, 2, 3)), {"reduction": "add"}, opset=16),
    ],
)
def scatter_nd(node: NodeView) -> Rule:
    depth = node.shape(1)[-1]
    picked, rest = names("p", depth), names("a", node.rank() - depth)
    written = names("i", node.rank(1) - 1)
    data = tuple(map(label, (*picked, *rest)))
    return Rule(
        (
            data,
            tuple(map(label, (*written, "depth"))),
            tuple(map(label, (*written, *rest))),
        ),
        (data,),
        pinned=pins((*picked, *written, "depth"), "written by position"),
    )


@op(
    "Trilu",
    since=14,
    samples=[
        Sample(((2, 3, 4),)),
        Sample(((2, 3, 4), np.array(1)), {"upper": 0}),
    ],
)
def trilu(node: NodeView) -> Rule:
    axes = names("a", node.rank())
    data = tuple(map(label, axes))
    return Rule((data, None), (data,), pinned=pins(axes[-2:], "a triangle of positions"))


@op("NonZero", since=9)
def non_zero(node: NodeView) -> Rule:
    axes = names("a", node.rank())
    return Rule((tuple(map(label, axes)),), (None,), pinned=pins(axes, "its positions are the result"))


@op("EyeLike", since=9, samples=[Sample(((2, 3),))])
def eye_like(node: NodeView) -> Rule:
    return Rule.of("a b -> a b", pinned=pins("ab", "a diagonal of positions"))


def _one_hot(node: NodeView, inputs: Sequence[Array | None]) -> list[Array]:
    index, depth, values = (np.asarray(i) for i in inputs)
    count, axis = int(depth.item()), node.axis(int(node.attr("axis", -1)), index.ndim + 1)
    shape = [count if i == axis else 1 for i in range(index.ndim + 1)]
    index = np.expand_dims(np.where(index < 0, index + count, index), axis)
    return [np.where(index == np.arange(count).reshape(shape), values[1], values[0])]


@op(
    "OneHot",
    since=9,
    samples=[
        Sample((_ROWS, np.array(3), np.array([0, 5], np.float32))),
        Sample((_ROWS, np.array([3]), np.array([0, 1], np.float32)), {"axis": 1}),
    ],
    evaluate=_one_hot,
)
def one_hot(node: NodeView) -> Rule:
    axes = names("a", node.rank())
    axis = node.axis(int(node.attr("axis", -1)), node.rank() + 1)
    out = (*axes[:axis], "depth", *axes[axis:])
    return Rule(
        (tuple(map(label, axes)), None, None),
        (tuple(map(label, out)),),
        pinned={"depth": "positions are counted"},
    )
