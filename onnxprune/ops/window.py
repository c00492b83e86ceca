"""Windows that are moved over an image or a signal."""

from __future__ import annotations

from onnxprune.ops.spec import NodeView

MOVED = ("Conv", "MaxPool", "AveragePool", "LpPool")


def outgrown(node: NodeView) -> bool:
    """Whether a window is larger than what it is moved over; onnx's inference does not always notice, as it
    rounds the negative number of steps up."""
    if node.op not in MOVED or not node.has(0) or str(node.attr("auto_pad", "")).startswith("SAME"):
        return False
    extents = node.shape()[2:]
    window = node.attr("kernel_shape") or (node.shape(1)[2:] if node.has(1) else ())
    pads = node.attr("pads") or [0] * 2 * len(extents)
    steps = node.attr("dilations") or [1] * len(extents)
    before, after = pads[: len(extents)], pads[len(extents) :]
    return any(
        extent + first + last <= step * (positions - 1)
        for extent, first, last, step, positions in zip(extents, before, after, steps, window, strict=False)
    )
