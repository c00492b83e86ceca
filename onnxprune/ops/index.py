"""Joining, cutting and picking along an axis."""

from __future__ import annotations

import numpy as np

from onnxprune.ops.spec import (
    Array,
    AxisPattern,
    NodeView,
    Pinned,
    Resize,
    Rule,
    Sample,
    Take,
    Unknown,
    label,
    names,
    op,
    pins,
)


@op(
    "Concat",
    since=4,
    samples=[
        Sample(((2, 3, 4), (2, 5, 4), (2, 1, 4)), {"axis": 1}),
        Sample(((2, 3), (2, 4)), {"axis": -1}, opset=11),
    ],
    evaluate=lambda node, inputs: [
        np.concatenate([np.asarray(i) for i in inputs], axis=int(node.attr("axis")))
    ],
)
def concat(node: NodeView) -> Rule:
    axis = node.axis(int(node.attr("axis")))
    axes = names("a", node.rank())

    def operand(part: AxisPattern) -> tuple[AxisPattern, ...]:
        return tuple(part if i == axis else label(a) for i, a in enumerate(axes))

    parts = names("p", len(node.shapes))
    whole: AxisPattern = tuple((part,) for part in parts)
    sizes = {part: node.shape(i)[axis] for i, part in enumerate(parts)}
    return Rule(tuple(operand(label(p)) for p in parts), (operand(whole),), sizes=sizes)


@op(
    "Split",
    since=2,
    samples=[
        Sample(((2, 6, 4), np.array([2, 3, 1])), {"axis": 1}, outputs=3),
        Sample(((2, 6, 4),), {"axis": 1, "split": [2, 4]}, opset=11, outputs=2),
        Sample(((2, 6, 4),), {"axis": 1, "num_outputs": 2}, opset=18, outputs=2),
        Sample(((2, 7, 4),), {"axis": 1, "num_outputs": 3}, opset=18, outputs=3),
        Sample(((2, 6, 4),), {"axis": -2}, outputs=2),
        Sample(((4, 3),), outputs=2, opset=7),
    ],
    evaluate=lambda node, inputs: np.split(
        np.asarray(inputs[0]),
        np.cumsum([node.out_shape(i)[_split_axis(node)] for i in range(len(node.out_shapes))])[:-1],
        axis=_split_axis(node),
    ),
)
def split(node: NodeView) -> Rule:
    axis = _split_axis(node)
    axes = names("a", node.rank())
    parts = names("p", len(node.out_shapes))
    sizes = {part: node.out_shape(i)[axis] for i, part in enumerate(parts)}
    whole: AxisPattern = tuple((part,) for part in parts)

    def operand(part: AxisPattern) -> tuple[AxisPattern, ...]:
        return tuple(part if i == axis else label(a) for i, a in enumerate(axes))

    def pieces(change: Resize) -> dict[int | str, Array | None]:
        new = [change.extents[part] for part in parts]
        stated = node.value(1) if node.opset >= 13 else node.attr("split")
        if stated is None and len(set(new)) == 1:
            return {}
        array = np.array(new, dtype=np.int64)
        return {"split": array} if node.opset < 13 else {1: array, "num_outputs": None}

    return Rule((operand(whole), None), tuple(operand(label(p)) for p in parts), sizes=sizes, resize=pieces)


def _split_axis(node: NodeView) -> int:
    return node.axis(int(node.attr("axis", 0)))


def _bounds(node: NodeView) -> dict[int, tuple[int, int, int]]:
    """axis -> (start, stop, step) of a Slice, clipped to the extents."""
    if node.opset < 10:
        starts, ends, axes, steps = node.attr("starts"), node.attr("ends"), node.attr("axes"), None
    else:
        starts, ends, axes, steps = (node.value(i) for i in (1, 2, 3, 4))
    starts, ends = np.ravel(starts), np.ravel(ends)
    axes = range(len(starts)) if axes is None else [node.axis(int(a)) for a in np.ravel(axes)]
    steps = np.ones(len(starts), dtype=np.int64) if steps is None else np.ravel(steps)
    bounds = {}
    for axis, start, end, step in zip(axes, starts, ends, steps, strict=True):
        bounds[axis] = slice(int(start), int(end), int(step)).indices(node.shape()[axis])
        if int(step) < 0 and int(end) < -node.shape()[axis]:
            bounds[axis] = (bounds[axis][0], -1, int(step))
    return bounds


@op(
    "Slice",
    since=1,
    samples=[
        Sample(((2, 8, 4), np.array([2]), np.array([5]), np.array([1]))),
        Sample(((2, 8, 4), np.array([0, -3]), np.array([2, 2**62]), np.array([2, 1]))),
        Sample(((2, 8, 4),), {"starts": [1], "ends": [7], "axes": [1]}, opset=9),
        Sample(((2, 8, 4), np.array([1, 0]), np.array([8, 2]), np.array([1, 2]), np.array([2, 1]))),
        Sample(((2, 8, 4), np.array([7]), np.array([-99]), np.array([1]), np.array([-1]))),
        Sample(((2, 8, 4), np.array([1]), np.array([2**62]), np.array([1]), np.array([2]))),
        Sample(((2, 8, 4), np.array([0, 2]), np.array([2, -1]))),
    ],
    evaluate=lambda node, inputs: [_slice(node, np.asarray(inputs[0]))],
)
def slice_(node: NodeView) -> Rule | Take | Pinned:
    bounds = _bounds(node)
    strided = [axis for axis, (*_, step) in bounds.items() if step != 1]
    if len(strided) == 1 and len(bounds) == 1 and all(map(node.fixed, range(1, len(node.shapes)))):
        axis = strided[0]
        return Take(axis, np.arange(*bounds[axis]), operand=None)
    source: list[AxisPattern] = []
    result: list[AxisPattern] = []
    sizes: dict[str, int] = {}
    pinned: dict[str, str] = {}
    for i, size in enumerate(node.shape()):
        start, stop, step = bounds.get(i, (0, size, 1))
        if step != 1:
            pinned |= pins((f"s{i}", f"t{i}"), "sliced with a stride")
            source.append(label(f"s{i}"))
            result.append(label(f"t{i}"))
            continue
        stop = max(start, stop)
        sizes |= {f"x{i}": start, f"a{i}": stop - start, f"z{i}": size - stop}
        terms = [name for name in (f"x{i}", f"a{i}", f"z{i}") if sizes[name] or name[0] == "a"]
        source.append(tuple((name,) for name in terms))
        result.append(label(f"a{i}"))

    def ends(change: Resize) -> dict[int | str, Array | None]:
        return _slice_operands(node, change)

    return Rule(
        (tuple(source), None, None, None, None), (tuple(result),), sizes=sizes, pinned=pinned, resize=ends
    )


def _slice_operands(node: NodeView, change: Resize) -> dict[int | str, Array | None]:
    old = node.opset < 10
    starts = np.array(node.attr("starts") if old else node.value(1), dtype=np.int64).ravel()
    stops = np.array(node.attr("ends") if old else node.value(2), dtype=np.int64).ravel()
    source = change.inputs[0]
    assert source is not None
    for k, (axis, (_, _, step)) in enumerate(_bounds(node).items()):
        if step != 1:
            continue
        start = change.extents.get(f"x{axis}", 0)
        stop = start + change.extents[f"a{axis}"]
        if slice(int(starts[k]), int(stops[k])).indices(source[axis])[:2] != (start, stop):
            starts[k], stops[k] = start, stop
    return {"starts": starts, "ends": stops} if old else {1: starts, 2: stops}


def _slice(node: NodeView, data: Array) -> Array:
    index = [slice(None)] * data.ndim
    for axis, (start, stop, step) in _bounds(node).items():
        index[axis] = slice(start, None if stop < 0 else stop, step)
    return data[tuple(index)]


@op(
    "Gather",
    since=1,
    samples=[
        Sample(((2, 6, 4), np.array([5, 0, 3])), {"axis": 1}),
        Sample(((2, 6, 4), np.array([2, 3, 4])), {"axis": 1}),
        Sample(((2, 6, 4), np.array([-1, -2, 1, 1])), {"axis": -2}),
        Sample(((6, 4), np.array([[1, 2], [0, 5]]))),
        Sample(((2, 6, 4), np.array(1)), {"axis": 1}),
    ],
    evaluate=lambda node, inputs: [
        np.take(np.asarray(inputs[0]), np.asarray(inputs[1]), axis=int(node.attr("axis", 0)))
    ],
)
def gather(node: NodeView) -> Rule | Take:
    axis = node.axis(int(node.attr("axis", 0)))
    try:
        index = node.value(1)
    except Unknown:
        index = None
    if index is not None and index.ndim == 1 and node.fixed(1):
        return Take(axis, np.asarray(index) % node.shape()[axis], operand=1)
    axes, picks = names("a", node.rank()), names("i", node.rank(1))
    output = (*axes[:axis], *picks, *axes[axis + 1 :])
    any_will_do = node.measured and index is not None and index.ndim == 0 and int(index) in (0, -1)
    return Rule(
        (tuple(map(label, axes)), tuple(map(label, picks))),
        (tuple(map(label, output)),),
        pinned={} if any_will_do else {axes[axis]: "picked by position"},
    )


@op(
    "Pad",
    since=1,
    samples=[
        Sample(((2, 3, 4), np.array([0, 1, 1, 0, 2, 1]))),
        Sample(((2, 3, 4), np.array([0, 0, 1, 0, 0, 1])), {"mode": "reflect"}),
        Sample(((2, 3, 4),), {"pads": [0, 1, 0, 0, 0, 0]}, opset=10),
        Sample(((2, 3, 4), np.array([1, 2]), np.array(0.5, np.float32), np.array([-2])), opset=18),
        Sample(((2, 3, 4), np.array([0, -1, 0, 0, 0, 0]))),
        Sample(((2, 3, 4), np.array([0, 0, 2, 0, 0, 0])), {"mode": "edge"}),
    ],
)
def pad(node: NodeView) -> Rule | Pinned:
    pads = node.operand("pads", 1, 11)
    if pads is None:
        return Pinned("its pads are missing")
    rank = node.rank()
    given = node.value(3) if node.opset >= 18 else None
    axes = range(rank) if given is None else [node.axis(int(a)) for a in given.ravel()]
    before = dict(zip(axes, pads[: len(pads) // 2], strict=True))
    after = dict(zip(axes, pads[len(pads) // 2 :], strict=True))
    constant = node.attr("mode", "constant") == "constant"
    source: list[AxisPattern] = []
    result: list[AxisPattern] = []
    sizes: dict[str, int] = {}
    pinned: dict[str, str] = {}
    for i in range(rank):
        low, high = before.get(i, 0), after.get(i, 0)
        if (low or high) and (not constant or low < 0 or high < 0):
            pinned |= pins((f"s{i}", f"t{i}"), "padded from its own values, or cropped")
            source.append(label(f"s{i}"))
            result.append(label(f"t{i}"))
            continue
        sizes |= {f"x{i}": low, f"z{i}": high}
        pinned |= pins((f"x{i}", f"z{i}"), "padding")
        source.append(label(f"a{i}"))
        result.append(tuple((n,) for n in (f"x{i}", f"a{i}", f"z{i}") if sizes.get(n, 1)))
    return Rule((tuple(source), None, None, None), (tuple(result),), sizes=sizes, pinned=pinned)
