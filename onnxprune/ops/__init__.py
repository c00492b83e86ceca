"""What operators are: one declaration each, one file per family."""

from onnxprune.ops import contrib, conv, index, matmul, norm, pointwise, pool, quantize, reduce, reshape, shape
from onnxprune.ops.spec import (
    NodeView,
    OpSpec,
    Pinned,
    Resize,
    Rule,
    Sample,
    Take,
    Unknown,
    declared,
    lookup,
    op,
)

__all__ = [
    "NodeView",
    "OpSpec",
    "Pinned",
    "Resize",
    "Rule",
    "Sample",
    "Take",
    "Unknown",
    "contrib",
    "conv",
    "declared",
    "index",
    "lookup",
    "matmul",
    "norm",
    "op",
    "pointwise",
    "pool",
    "quantize",
    "reduce",
    "reshape",
    "shape",
]
