"""Changes of layout: the same elements, seen along other axes."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from onnxprune.ops.spec import (
    Array,
    NodeView,
    Resize,
    Rule,
    Sample,
    Shape,
    Unknown,
    label,
    names,
    op,
    pins,
    refine,
)


def _reshape_evaluate(node: NodeView, inputs: Sequence[Array | None]) -> list[Array]:
    return [np.reshape(np.asarray(inputs[0]), node.out_shape())]


@op(
    "Reshape",
    since=5,
    samples=[
        Sample(((2, 6, 4), np.array([2, 3, 8]))),
        Sample(((2, 12, 5), np.array([0, 3, 4, -1]))),
        Sample(((2, 3, 4, 5), np.array([6, 20]))),
        Sample(((2, 8, 3), np.array([2, -1]))),
        Sample(((2, 6, 4), np.array([2, 4, 6]))),
        Sample(((4, 1, 6), np.array([0, 2, 3, 1]))),
        Sample(((2, 6), np.array([12]))),
        Sample(((2, 6), np.array([1, 2, 1, -1])), {"allowzero": 1}),
        Sample(((2, 3, 6), np.array([6, 0, 2]))),
    ],
    evaluate=_reshape_evaluate,
)
def reshape(node: NodeView) -> Rule:
    left, right, sizes, pinned = refine(node.shape(), node.out_shape())

    def target(change: Resize) -> dict[int | str, Array | None]:
        old = node.value(1)
        source, out = change.inputs[0], change.output()
        assert old is not None
        assert source is not None
        copies = not node.attr("allowzero", 0)
        new = []
        for j, (value, extent) in enumerate(zip(old.ravel().tolist(), out, strict=True)):
            follows = value == -1 or (value == 0 and copies and source[j] == extent)
            new.append(value if follows else extent)
        return {1: np.array(new, dtype=np.int64)}

    return Rule((left, None), (right,), sizes=sizes, pinned=pinned, resize=target)


@op(
    "Flatten",
    since=1,
    samples=[Sample(((2, 3, 4, 5),)), Sample(((2, 3, 4),), {"axis": -1}), Sample(((2, 3),), {"axis": 0})],
)
def flatten(node: NodeView) -> Rule:
    rank = node.rank()
    axis = int(node.attr("axis", 1))
    axis = axis + rank if axis < 0 else axis
    axes = names("a", rank)
    return Rule((tuple(map(label, axes)),), (((tuple(axes[:axis]),), (tuple(axes[axis:]),)),))


@op(
    "Transpose",
    since=1,
    samples=[Sample(((2, 3, 4),)), Sample(((2, 3, 4),), {"perm": [1, 2, 0]})],
    evaluate=lambda node, inputs: [np.transpose(np.asarray(inputs[0]), node.attr("perm"))],
)
def transpose(node: NodeView) -> Rule:
    axes = names("a", node.rank())
    perm = node.attr("perm", range(node.rank())[::-1])
    return Rule((tuple(map(label, axes)),), (tuple(label(axes[p]) for p in perm),))


@op(
    "Squeeze",
    since=1,
    samples=[
        Sample(((2, 1, 3, 1), np.array([1]))),
        Sample(((2, 1, 3),), {"axes": [1]}, opset=11),
        Sample(((2, 1, 3, 1),)),
        Sample(((2, 1, 3),), opset=9),
    ],
    evaluate=_reshape_evaluate,
)
def squeeze(node: NodeView) -> Rule:
    given = node.operand("axes", 1, 13)
    if given == [] or (given is None and node.has(1)):
        raise Unknown("which axes it takes away is not known")
    shape = node.shape()
    gone = {node.axis(a) for a in given} if given else {i for i, size in enumerate(shape) if size == 1}
    axes = names("a", len(shape))

    def stated(_: Resize) -> dict[int | str, Array | None]:
        """Axes that went by their extent of 1 are named, lest another one shrinks to 1."""
        array = np.array(sorted(gone), dtype=np.int64)
        return {"axes": array} if node.opset < 13 else {1: array}

    return Rule(
        (tuple(map(label, axes)), None),
        (tuple(label(a) for i, a in enumerate(axes) if i not in gone),),
        resize=None if given else stated,
    )


@op(
    "Unsqueeze",
    since=1,
    samples=[Sample(((2, 3), np.array([0, -1]))), Sample(((2, 3),), {"axes": [1]}, opset=11)],
    evaluate=_reshape_evaluate,
)
def unsqueeze(node: NodeView) -> Rule:
    rank = len(node.out_shape())
    new = {node.axis(a, rank) for a in node.operand("axes", 1, 13) or []}
    axes = names("a", node.rank())
    rest = iter(axes)
    output = tuple(label(f"one{j}" if j in new else next(rest)) for j in range(rank))
    return Rule((tuple(map(label, axes)), None), (output,))


@op(
    "DepthToSpace",
    since=1,
    samples=[
        Sample(((2, 12, 2, 3),), {"blocksize": 2}),
        Sample(((2, 12, 2, 3),), {"blocksize": 2, "mode": "CRD"}),
    ],
)
def depth_to_space(node: NodeView) -> Rule:
    block = int(node.attr("blocksize"))
    depth = "(c b1 b2)" if node.attr("mode", "DCR") == "CRD" else "(b1 b2 c)"
    return Rule.of(
        f"n {depth} h w -> n c (h b1) (w b2)",
        sizes={"b1": block, "b2": block},
        pinned=pins(("b1", "b2"), "block of DepthToSpace"),
    )


@op("SpaceToDepth", since=1, samples=[Sample(((2, 3, 4, 6),), {"blocksize": 2})])
def space_to_depth(node: NodeView) -> Rule:
    block = int(node.attr("blocksize"))
    return Rule.of(
        "n c (h b1) (w b2) -> n (b1 b2 c) h w",
        sizes={"b1": block, "b2": block},
        pinned=pins(("b1", "b2"), "block of SpaceToDepth"),
    )


def _expand_evaluate(node: NodeView, inputs: Sequence[Array | None]) -> list[Array]:
    return [np.broadcast_to(np.asarray(inputs[0]), node.out_shape()).copy()]


@op(
    "Expand",
    since=8,
    samples=[Sample(((3, 1), np.array([2, 3, 4]))), Sample(((2, 1, 4), np.array([1, 5, 1])))],
    evaluate=_expand_evaluate,
)
def expand(node: NodeView) -> Rule:
    out = node.out_shape()
    shape = node.shape()
    shift = len(out) - len(shape)
    source = tuple(
        label(f"a{i + shift}" if size == out[i + shift] else f"one{i}") for i, size in enumerate(shape)
    )

    def target(change: Resize) -> dict[int | str, Array | None]:
        old = node.value(1)
        assert old is not None
        return {1: _grown(old, change.output())}

    return Rule((source, None), (tuple(label(f"a{j}") for j in range(len(out))),), resize=target)


def _grown(old: Array, out: Shape) -> Array:
    """An Expand target: entries of 1 follow the input, the others state the extent."""
    shift = len(out) - old.size
    return np.array(
        [v if v == 1 else out[j + shift] for j, v in enumerate(old.ravel().tolist())], dtype=np.int64
    )


@op(
    "Tile",
    since=6,
    samples=[Sample(((2, 3), np.array([1, 2]))), Sample(((1, 4), np.array([3, 1])))],
    evaluate=lambda node, inputs: [np.tile(np.asarray(inputs[0]), np.asarray(inputs[1]))],
)
def tile(node: NodeView) -> Rule:
    axes, copies = names("a", node.rank()), names("r", node.rank())
    if 0 in node.shape():
        raise Unknown("an extent is zero")
    sizes = {r: new // old for r, new, old in zip(copies, node.out_shape(), node.shape(), strict=True)}

    def repeats(change: Resize) -> dict[int | str, Array | None]:
        return {1: np.array([change.extents[r] for r in copies], dtype=np.int64)}

    return Rule(
        (tuple(map(label, axes)), None),
        (tuple(((r, a),) for r, a in zip(copies, axes, strict=True)),),
        sizes=sizes,
        resize=repeats,
    )
