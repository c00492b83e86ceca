"""Convolutions."""

from __future__ import annotations

from onnxprune.ops.spec import NodeView, Pinned, Rule, Sample, Window, names, op, pins


def _spatial(node: NodeView) -> tuple[tuple[str, ...], tuple[str, ...], tuple[str, ...]]:
    rank = node.rank() - 2
    return names("h", rank), names("p", rank), names("y", rank)


def _pointwise(node: NodeView) -> bool:
    """Whether every position is convolved on its own."""
    sizes = (*node.shape(1)[2:], *node.attr("strides", ()))
    return all(size == 1 for size in sizes) and not any(node.attr("pads", ()))


def _window(node: NodeView) -> Window:
    rank = node.rank() - 2
    ones = (1,) * rank
    extents = node.shape(1)[2:]
    strides, dilations = tuple(node.attr("strides", ones)), tuple(node.attr("dilations", ones))
    pads = tuple(node.attr("pads", (0,) * rank))[:rank]
    padding = node.attr("auto_pad", "NOTSET")
    if str(padding).startswith("SAME"):
        sizes = zip(node.shape()[2:], node.out_shape()[2:], extents, strides, dilations, strict=True)
        total = [max((out - 1) * step + (tap - 1) * far + 1 - size, 0) for size, out, tap, step, far in sizes]
        pads = tuple((missing + (padding == "SAME_LOWER")) // 2 for missing in total)
    elif padding == "VALID":
        pads = (0,) * rank
    return Window(extents, strides, dilations, pads)


@op(
    "Conv",
    since=1,
    samples=[
        Sample(((2, 6, 5, 5), (8, 6, 3, 3), (8,))),
        Sample(((2, 6, 5, 4), (8, 6, 1, 1), (8,))),
        Sample(((2, 6, 5, 5), (9, 2, 3, 3), (9,)), {"group": 3, "pads": [1, 1, 1, 1]}),
        Sample(((2, 6, 7), (12, 1, 3)), {"group": 6, "strides": [2]}),
        Sample(((1, 4, 5, 5, 5), (6, 4, 3, 3, 3), (6,)), {"dilations": [2, 2, 2]}),
        Sample(((2, 4, 5, 5), (6, 4, 3, 3)), {"auto_pad": "SAME_UPPER", "kernel_shape": [3, 3]}, opset=7),
        Sample(((2, 4, 6), (12, 1, 3), (12,)), {"group": 4}),
    ],
)
def conv(node: NodeView) -> Rule:
    h, p, y = _spatial(node)
    if _pointwise(node):
        h = y
    return Rule.of(
        f"n (g i) {' '.join(h)}, (g o) i {' '.join(p)}, (g o) -> n (g o) {' '.join(y)}",
        sizes={"g": int(node.attr("group", 1))},
        attributes={"group": "g"},
        pinned=pins(p if h == y else (*h, *p, *y), "kernel window"),
        macs=("n", "g", "o", "i", *p, *y),
        linear=(1, 2),
        window=_window(node),
    )


@op(
    "ConvTranspose",
    since=1,
    samples=[
        Sample(((2, 6, 4, 4), (6, 5, 2, 2), (5,)), {"strides": [2, 2]}),
        Sample(((2, 6, 4, 4), (6, 3, 3, 3), (6,)), {"group": 2}),
        Sample(((2, 6, 7), (6, 1, 3)), {"group": 6, "output_padding": [1], "strides": [2]}),
        Sample(((2, 4, 3), (4, 3, 2), (6,)), {"group": 2, "strides": [2], "output_shape": [7]}, opset=7),
    ],
)
def conv_transpose(node: NodeView) -> Rule:
    h, p, y = _spatial(node)
    return Rule.of(
        f"n (g i) {' '.join(h)}, (g i) o {' '.join(p)}, (g o) -> n (g o) {' '.join(y)}",
        sizes={"g": int(node.attr("group", 1))},
        attributes={"group": "g"},
        pinned=pins((*h, *p, *y), "kernel window"),
        macs=("n", "g", "o", "i", *p, *h),
        linear=(1, 2),
    )


@op(
    "DeformConv",
    since=19,
    samples=[
        Sample(((1, 4, 4, 4), (6, 4, 2, 2), (1, 8, 3, 3), (6,)), {"kernel_shape": [2, 2]}, opset=19),
        Sample(((1, 4, 4, 4), (6, 2, 2, 2), (1, 8, 3, 3)), {"kernel_shape": [2, 2], "group": 2}, opset=19),
    ],
)
def deform_conv(node: NodeView) -> Rule | Pinned:
    if int(node.attr("offset_group", 1)) != 1:
        return Pinned("its channels move in groups")
    h, p, y = _spatial(node)
    space, taps = " ".join(y), " ".join(p)
    return Rule.of(
        f"n (g i) {' '.join(h)}, (g o) i {taps}, n shift {space}, (g o), n ({taps}) {space} -> n (g o) {space}",
        sizes={"g": int(node.attr("group", 1))} | dict(zip(p, node.shape(1)[2:], strict=True)),
        attributes={"group": "g"},
        pinned=pins((*h, *p, *y), "kernel window") | {"shift": "two per tap of the window"},
        macs=("n", "g", "o", "i", *p, *y),
    )
