"""Pooling, resizing and sampling over space."""

from __future__ import annotations

import dataclasses
import math

import numpy as np

from onnxprune.ops.spec import (
    Array,
    AxisPattern,
    NodeView,
    Pinned,
    Resize,
    Rule,
    Sample,
    label,
    names,
    op,
    parse,
    pins,
)


@op(
    "AveragePool",
    "MaxPool",
    "LpPool",
    since=1,
    samples=[
        Sample(((2, 4, 6, 6),), {"kernel_shape": [2, 2], "strides": [2, 2]}),
        Sample(((2, 4, 7),), {"kernel_shape": [3], "pads": [1, 1]}, opset=11),
    ],
)
def pool(node: NodeView) -> Rule | Pinned:
    if len(node.out_shapes) > 1 and node.out_shapes[1] is not None:
        return Pinned("it returns positions that count over all channels")
    h, y = names("h", node.rank() - 2), names("y", node.rank() - 2)
    return Rule.of(f"n c {' '.join(h)} -> n c {' '.join(y)}", pinned=pins((*h, *y), "pooling window"))


@op(
    "GlobalAveragePool",
    "GlobalMaxPool",
    "GlobalLpPool",
    since=1,
    samples=[Sample(((2, 4, 6, 6),)), Sample(((2, 4, 5),))],
)
def global_pool(node: NodeView) -> Rule:
    h, y = names("h", node.rank() - 2), names("one", node.rank() - 2)
    return Rule.of(f"n c {' '.join(h)} -> n c {' '.join(y)}", pinned=pins(h, "pooled as a whole"))


@op(
    "Upsample",
    since=7,
    samples=[
        Sample(((2, 4, 3, 3), np.array([1, 1, 2, 2], np.float32)), opset=9),
        Sample(((2, 4, 3, 3),), {"scales": [1.0, 1.0, 2.0, 3.0]}, opset=7),
    ],
)
@op(
    "Resize",
    since=10,
    samples=[
        Sample(((2, 4, 3, 3), None, np.array([1, 1, 2, 2], np.float32))),
        Sample(((2, 4, 3, 3), None, None, np.array([2, 4, 5, 7]))),
        Sample(((2, 4, 3, 3), np.array([1, 1, 2, 2], np.float32)), opset=10),
        Sample(((2, 4, 3, 3), None, None, np.array([5, 4])), {"axes": [3, 1]}, opset=18),
        Sample(
            ((2, 4, 3, 3), np.empty(0, np.float32), np.array([1, 1, 1.2, 2], np.float32)),
            {"mode": "linear"},
            opset=11,
        ),
    ],
)
def resize(node: NodeView) -> Rule | Pinned:
    if node.attr("coordinate_transformation_mode") == "tf_crop_and_resize":
        return Pinned("it crops while resizing")
    if node.attr("keep_aspect_ratio_policy", "stretch") != "stretch":
        return Pinned("its aspect ratio policy ties the axes together")
    shape, out = node.shape(), node.out_shape()
    given = [node.axis(a) for a in node.attr("axes", range(len(shape)))]
    scales = dict(zip(given, _scales(node), strict=False))
    left: list[AxisPattern] = []
    right: list[AxisPattern] = []
    pinned: dict[str, str] = {}
    for i, (size, new) in enumerate(zip(shape, out, strict=True)):
        if size == new and scales.get(i, 1) == 1:
            left.append(label(f"a{i}"))
            right.append(label(f"a{i}"))
        else:
            pinned |= pins((f"h{i}", f"y{i}"), "resized")
            left.append(label(f"h{i}"))
            right.append(label(f"y{i}"))

    def sizes(change: Resize) -> dict[int | str, Array | None]:
        if not node.has(3):
            return {}
        return {3: np.array([change.output()[axis] for axis in given], dtype=np.int64)}

    return Rule((tuple(left), None, None, None), (tuple(right),), pinned=pinned, resize=sizes)


def _scales(node: NodeView) -> list[float]:
    """The scale factors; empty where `sizes` are given instead."""
    if node.op == "Upsample" and node.opset < 9:
        return list(node.attr("scales"))
    if node.op == "Upsample" or node.opset < 11:
        value = node.value(1)
    else:
        value = None if node.has(3) else node.value(2)
    return [] if value is None else [float(v) for v in value.ravel()]


@op(
    "GridSample",
    since=16,
    samples=[Sample(((2, 3, 4, 4), (2, 5, 6, 2)))],
)
def grid_sample(node: NodeView) -> Rule:
    h, y = names("h", node.rank() - 2), names("y", node.rank() - 2)
    out = " ".join(y)
    return Rule.of(
        f"n c {' '.join(h)}, n {out} xy -> n c {out}", pinned=pins((*h, "xy"), "sampled by position")
    )


_BATCH = np.array([1, 0, 1])
_PLACES = np.array([[[[0, 2], [9, 15]], [[17, 18], [25, 30]]]])


@op(
    "RoiAlign",
    since=10,
    samples=[
        Sample(
            ((2, 3, 6, 6), np.array([[0, 0, 4, 4], [1, 1, 5, 3], [0, 2, 2, 5]], np.float32), _BATCH),
            {"output_height": 2, "output_width": 2},
        )
    ],
)
@op(
    "MaxRoiPool",
    since=1,
    samples=[
        Sample(
            ((2, 3, 6, 6), np.array([[1, 0, 0, 4, 4], [0, 1, 1, 5, 3]], np.float32)),
            {"pooled_shape": [2, 2]},
        )
    ],
)
def roi_pool(node: NodeView) -> Rule:
    rule = Rule.of(
        "n c h w, r corner, r -> r c y x",
        pinned=pins(("n", "h", "w", "corner", "y", "x"), "regions are cut out by position"),
    )
    return rule if node.has(2) else dataclasses.replace(rule, inputs=rule.inputs[:2])


@op(
    "MaxUnpool",
    since=9,
    samples=[Sample(((1, 2, 2, 2), _PLACES), {"kernel_shape": [2, 2], "strides": [2, 2]})],
)
def max_unpool(node: NodeView) -> Rule:
    space, grown = names("s", node.rank() - 2), names("y", node.rank() - 2)
    data = f"n c {' '.join(space)}"
    return Rule.of(
        f"{data}, {data} -> n c {' '.join(grown)}",
        pinned=pins(("n", "c", *space, *grown), "written by position"),
    )


@op(
    "ReverseSequence",
    since=10,
    samples=[
        Sample(((4, 2, 3), np.array([4, 2])), {"time_axis": 0, "batch_axis": 1}),
        Sample(((2, 4, 3), np.array([1, 3])), {"time_axis": 1, "batch_axis": 0}),
    ],
)
def reverse_sequence(node: NodeView) -> Rule:
    axes = names("a", node.rank())
    time, batch = axes[int(node.attr("time_axis", 0))], axes[int(node.attr("batch_axis", 1))]
    data = tuple(map(label, axes))
    return Rule((data, (label(batch),)), (data,), pinned={time: "positions are turned around"})


@op(
    "Col2Im",
    since=18,
    samples=[
        Sample(((2, 12, 4), np.array([4, 4]), np.array([2, 2])), {"strides": [2, 2]}, opset=18),
        Sample(((1, 6, 12), np.array([5, 5]), np.array([2, 3])), opset=18),
    ],
)
def col2im(node: NodeView) -> Rule:
    block = node.value(2)
    assert block is not None
    space = names("s", block.size)
    (data,), outputs = parse(f"n (c k) l -> n c {' '.join(space)}")
    return Rule(
        (data, None, None),
        outputs,
        sizes={"k": math.prod(block.tolist())},
        pinned=pins(("k", "l", *space), "windows are laid over one another"),
    )
