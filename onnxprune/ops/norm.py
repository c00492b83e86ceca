"""Normalisations. A statistic taken over an axis makes that axis lossy."""

from __future__ import annotations

from onnxprune.ops.spec import (
    NodeView,
    Pattern,
    Pinned,
    Rule,
    Sample,
    Unknown,
    label,
    names,
    op,
    pins,
)

STATISTIC = "a statistic is taken over this axis"


@op(
    "BatchNormalization",
    samples=[
        Sample(((2, 4, 3, 3), (4,), (4,), (4,), (4,))),
        Sample(((3, 4), (4,), (4,), (4,), (4,)), opset=9),
        Sample(((2, 4, 3), (4,), (4,), (4,), (4,)), {"spatial": 1}, opset=8),
        Sample(((2, 4, 3, 3), (4,), (4,), (4,), (4,)), {"epsilon": 0.1}, opset=14),
        Sample(((2, 4, 3), (4,), (4,), (4,), (4,)), {"training_mode": 1}, outputs=3),
    ],
)
def batch_normalization(node: NodeView) -> Rule | Pinned:
    """In training mode, with which exporters write standardised weights, it takes its own statistics."""
    if node.opset < 9 and not node.attr("spatial", 1):
        return Pinned("spatial=0 keeps statistics per position")
    axes = names("s", node.rank() - 2)
    space = " ".join(axes)
    training = node.attr("training_mode", 0)
    return Rule.of(
        f"n c {space}, c, c, c, c -> n c {space}, c, c",
        gain=1,
        lossy=pins(("n", *axes), STATISTIC) if training else {},
    )


@op("InstanceNormalization", samples=[Sample(((2, 4, 3, 3), (4,), (4,)))])
def instance_normalization(node: NodeView) -> Rule:
    axes = names("s", node.rank() - 2)
    space = " ".join(axes)
    return Rule.of(f"n c {space}, c, c -> n c {space}", gain=1, lossy=pins(axes, STATISTIC))


@op(
    "LayerNormalization",
    samples=[
        Sample(((2, 3, 4), (4,), (4,))),
        Sample(((2, 3, 4), (3, 4)), {"axis": 1}),
        Sample(((2, 3, 4), (4,)), {"axis": 1}),
        Sample(((2, 3, 4), (4,), (4,)), outputs=3),
    ],
)
@op(
    "RMSNormalization",
    since=23,
    samples=[
        Sample(((2, 3, 4), (4,)), opset=23),
        Sample(((2, 3, 4), (3, 4)), {"axis": 1}, opset=23),
    ],
)
def layer_normalization(node: NodeView) -> Rule:
    rank = node.rank()
    first = node.axis(node.attr("axis", -1))
    axes = names("a", rank)
    data: Pattern = tuple(label(a) for a in axes)

    def parameter(i: int) -> Pattern:
        shape = node.shape(i)
        shift = rank - len(shape)
        if any(size not in (1, extent) for size, extent in zip(shape, node.shape()[shift:], strict=True)):
            raise Unknown(f"an operand of shape {list(shape)} does not fit")
        return tuple(
            label(axes[j + shift] if size == node.shape()[j + shift] else f"one{i}_{j}")
            for j, size in enumerate(shape)
        )

    statistic = tuple(label(a) if j < first else label(f"one_{j}") for j, a in enumerate(axes))
    return Rule(
        (data, *(parameter(i) for i in range(1, len(node.shapes)) if node.has(i))),
        (data, statistic, statistic),
        gain=1,
        lossy=pins(axes[first:], STATISTIC),
    )


@op(
    "GroupNormalization",
    since=18,
    samples=[
        Sample(((2, 6, 3, 3), (3,), (3,)), {"num_groups": 3}, opset=18),
        Sample(((2, 6, 3, 3), (6,), (6,)), {"num_groups": 3}, opset=21),
    ],
)
def group_normalization(node: NodeView) -> Rule:
    axes = names("s", node.rank() - 2)
    space = " ".join(axes)
    vector = "(g c)" if node.opset >= 21 else "g"
    return Rule.of(
        f"n (g c) {space}, {vector}, {vector} -> n (g c) {space}",
        sizes={"g": int(node.attr("num_groups"))},
        attributes={"num_groups": "g"},
        gain=1,
        lossy=pins(("c", *axes), STATISTIC),
    )


@op("LRN", since=1, samples=[Sample(((2, 6, 3, 3),), {"size": 3, "alpha": 0.5})])
def lrn(node: NodeView) -> Rule:
    space = " ".join(names("s", node.rank() - 2))
    return Rule.of(f"n c {space} -> n c {space}", lossy={"c": "its window spans neighbouring channels"})


@op(
    "MeanVarianceNormalization",
    since=9,
    samples=[Sample(((2, 4, 3, 3),)), Sample(((2, 4, 3, 3),), {"axes": [1]})],
)
def mean_variance_normalization(node: NodeView) -> Rule:
    axes = names("a", node.rank())
    over = [axes[node.axis(a)] for a in node.attr("axes", [0, 2, 3])]
    text = " ".join(axes)
    return Rule.of(f"{text} -> {text}", lossy=pins(over, STATISTIC))


@op(
    "LpNormalization",
    since=1,
    samples=[Sample(((2, 4, 3),), {"axis": 1, "p": 2}), Sample(((2, 4, 3),), {"p": 1})],
)
def lp_normalization(node: NodeView) -> Rule:
    axes = names("a", node.rank())
    text = " ".join(axes)
    return Rule.of(f"{text} -> {text}", lossy={axes[node.axis(node.attr("axis", -1))]: STATISTIC})


@op(
    "Softmax",
    "LogSoftmax",
    "Hardmax",
    since=1,
    samples=[
        Sample(((2, 4, 3),), {"axis": 1}),
        Sample(((2, 4, 3),)),
        Sample(((2, 4, 3),), {"axis": 1}, opset=11),
        Sample(((2, 4, 3),), {"axis": -1}, opset=12),
        Sample(((2, 4, 3),), opset=7),
    ],
)
def softmax(node: NodeView) -> Rule:
    axes = names("a", node.rank())
    if node.opset >= 13:
        over = [axes[node.axis(node.attr("axis", -1))]]
    else:  # the input was seen as a matrix, cut in two at `axis`
        over = list(axes[node.axis(node.attr("axis", 1)) :])
    text = " ".join(axes)
    return Rule.of(f"{text} -> {text}", pinned=pins(over, "softmax axis"))
