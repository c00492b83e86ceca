"""Quantisation to and from integers, and weights that are stored quantised: scales and zero points follow
their axis, in blocks whole blocks."""

from __future__ import annotations

import math

import ml_dtypes
import numpy as np

from onnxprune.ops.spec import (
    Array,
    NodeView,
    Pattern,
    Pinned,
    Resize,
    Rule,
    Sample,
    Term,
    label,
    names,
    op,
    pins,
)

DOMAIN = "com.microsoft"
BLOCK = "values of a block share a scale"
PACKED = "several values share a byte"
RAGGED = "its last block is not full"

_BYTES = np.arange(24, dtype=np.uint8).reshape(2, 4, 3)
_WORDS = np.arange(24, dtype=np.uint16).reshape(2, 4, 3) * 1000
_ZEROS = np.array([3, 0, 7, 100], dtype=np.uint8)
_NIBBLES = (np.arange(48) * 7 % 16).reshape(4, 12).astype(ml_dtypes.uint4)
_NIBBLE_ZEROS = (np.arange(12) % 5).reshape(4, 3).astype(ml_dtypes.uint4)
_SIGNED_NIBBLES = (np.arange(24) * 7 % 16 - 8).reshape(6, 4).astype(ml_dtypes.int4)


@op(
    "DequantizeLinear",
    since=10,
    samples=[
        Sample((_BYTES, (4,)), {"axis": 1}),
        Sample((_BYTES, (4,), _ZEROS)),
        Sample((_BYTES, (3,)), {"axis": -1}),
        Sample((_BYTES, (), np.array(5, dtype=np.uint8)), opset=10),
        Sample((_BYTES, (1,), np.array([5], dtype=np.uint8))),
        Sample((_BYTES, (1,), np.array(5, dtype=np.uint8))),
        Sample((_NIBBLES, (4, 3), _NIBBLE_ZEROS), {"axis": 1, "block_size": 4}, opset=21),
        Sample((_SIGNED_NIBBLES, (3, 4)), {"axis": 0, "block_size": 2}, opset=21),
        Sample((_SIGNED_NIBBLES, (2, 4)), {"axis": 0, "block_size": 4}, opset=21),
        Sample((_SIGNED_NIBBLES, (4,)), {"axis": 1}, opset=21),
    ],
)
@op(
    "QuantizeLinear",
    since=10,
    samples=[
        Sample(((2, 4, 3), (4,)), {"axis": 1}),
        Sample(((2, 4, 3), (4,), _ZEROS)),
        Sample(((2, 4, 3), (), np.array(100, dtype=np.uint8)), opset=10),
        Sample(((4, 12), (4, 3), np.zeros((4, 3), np.int8)), {"axis": 1, "block_size": 4}, opset=21),
    ],
)
@op(
    "DequantizeLinear",
    domain=DOMAIN,
    since=1,
    samples=[
        Sample((_WORDS, (4,), _ZEROS.astype(np.uint16)), {"axis": 1}),
        Sample((_WORDS, (), np.array(500, np.uint16))),
    ],
)
@op(
    "QuantizeLinear",
    domain=DOMAIN,
    since=1,
    samples=[
        Sample(((2, 4, 3), (4,), _ZEROS.astype(np.uint16)), {"axis": 1}),
        Sample(((2, 4, 3), (), np.array(500, np.uint16))),
    ],
)
def quantize(node: NodeView) -> Rule | Pinned:
    axes = names("a", node.rank())
    data: Pattern = tuple(map(label, axes))
    if block := int(node.attr("block_size", 0)):
        return _blocked(node, axes, node.axis(node.attr("axis", 1)), block)
    over = label(axes[node.axis(node.attr("axis", 1))] if axes else "one")

    def parameter(i: int) -> Pattern | None:
        if not node.has(i):
            return None
        shape = node.shape(i)
        return (over if shape != (1,) else label(f"one{i}"),) if shape else ()

    return Rule((data, parameter(1), parameter(2)), (data,))


def _blocked(node: NodeView, axes: tuple[str, ...], axis: int, block: int) -> Rule:
    scale = tuple(map(label, axes))
    if node.shape()[axis] != node.shape(1)[axis] * block:
        data = (*scale[:axis], label("ragged"), *scale[axis + 1 :])
        return Rule((data, scale, scale), (data,), pinned=pins(("ragged", axes[axis]), RAGGED))
    data = (*scale[:axis], ((axes[axis], "block"),), *scale[axis + 1 :])
    return Rule((data, scale, scale), (data,), sizes={"block": block}, pinned={"block": BLOCK})


_EXTREMES = np.where(np.arange(24) * 5 % 7 % 2, 2.0, -2.0).astype(np.float32).reshape(4, 6)
_EXTREMES[[0, 2], [1, 3]] = 0.5  # besides, so that the results are not the ends of the range alone


@op("DynamicQuantizeLinear", since=11, samples=[Sample((_EXTREMES,), outputs=3)])
def dynamic_quantize_linear(node: NodeView) -> Rule:
    """The range is that of what is there; it decides what is rounded how, and nothing else."""
    data = tuple(map(label, names("a", node.rank())))
    return Rule((data,), (data, (), ()))


_PACKED = (np.arange(3 * 4 * 8) * 37 % 251).astype(np.uint8).reshape(3, 4, 8)
_PACKED_ZEROS = np.array([[0x87, 0x69], [0x58, 0x88], [0x97, 0x78]], np.uint8)
_ATTRIBUTES = {"K": 64, "N": 3, "bits": 4, "block_size": 16}


@op(
    "MatMulNBits",
    domain=DOMAIN,
    since=1,
    samples=[
        Sample(((2, 5, 64), _PACKED, (3, 4)), _ATTRIBUTES),
        Sample(((2, 64), _PACKED, (12,)), _ATTRIBUTES),
        Sample(((2, 64), _PACKED, (3, 4), _PACKED_ZEROS, None, (3,)), _ATTRIBUTES),
        Sample(((2, 64), _PACKED, (12,), _PACKED_ZEROS.ravel()), _ATTRIBUTES),
        Sample(((2, 64), np.tile(_PACKED, 2), (3, 4), _PACKED[:, :, 0]), _ATTRIBUTES | {"bits": 8}),
        Sample(((2, 48), _PACKED[:, :3], (3, 3), _PACKED_ZEROS), _ATTRIBUTES | {"K": 48}),
        Sample(((2, 60), _PACKED, (12,)), _ATTRIBUTES | {"K": 60}),
    ],
)
def matmul_n_bits(node: NodeView) -> Rule | Pinned:
    """K counts whole blocks; zero points of several blocks in one byte stay together."""
    depth, block, bits = (int(node.attr(n, d)) for n, d in (("K", 0), ("block_size", 0), ("bits", 4)))
    if node.attr("weight_prepacked", 0) or node.rank(1) != 3:
        return Pinned("its weights are packed for one kind of device")
    count = node.shape(1)[1]
    packed = node.has(3) and math.prod(node.shape(3)) != math.prod(node.shape(2))
    share = 8 // bits if packed else 1
    lead = names("m", node.rank() - 1)
    fixed = {"share": PACKED, "block": BLOCK, "blob": PACKED}
    sizes = {"share": share, "block": block}
    columns: Term = ("k", "share", "block")
    blocks: Term = ("k", "share")
    zeros: Term = ("k",) if packed else blocks
    whole = depth == count * block and count % share == 0
    if not whole:
        columns, blocks, zeros = ("depth",), ("k",), ("bytes",) if packed else ("k",)
        fixed = pins(("depth", "k", "bytes", "blob"), RAGGED)
        sizes = {"k": count}
    if node.has(4):
        fixed["k"] = "its columns are grouped by number"

    def parameter(i: int, per: Term) -> Pattern | None:
        if not node.has(i):
            return None
        return (label("n"), (per,)) if node.rank(i) == 2 else ((("n", *per),),)

    def restate(change: Resize) -> dict[int | str, Array | None]:
        return {"K": np.array(change.extents["k"] * share * block)} if whole else {}

    return Rule(
        (
            (*map(label, lead), (columns,)),
            (label("n"), (blocks,), label("blob")),
            parameter(2, blocks),
            parameter(3, zeros),
            None,
            (label("n"),) if node.has(5) else None,
        ),
        ((*map(label, lead), label("n")),),
        sizes=sizes | {"n": int(node.attr("N"))},
        pinned=fixed,
        attributes={"N": "n"},
        macs=(*lead, *columns, "n"),
        zero={1: None, 3: None},
        resize=restate,
    )


_TABLE = np.tile(_PACKED.reshape(3, 32), (2, 1))
_ROWS = np.array([[1, 0, 5]])


@op(
    "GatherBlockQuantized",
    domain=DOMAIN,
    since=1,
    samples=[
        Sample(((_TABLE % 16).astype(ml_dtypes.uint4), _ROWS, (6, 2)), {"block_size": 16}, opset=21),
        Sample((_TABLE, _ROWS[0], (6, 4)), {"block_size": 16, "bits": 4}),
        Sample((_TABLE, _ROWS, (6, 4), _TABLE[:, :2]), {"block_size": 16, "quantize_axis": -1}),
        Sample((_TABLE, _ROWS, (6, 2), _TABLE[:, :2]), {"block_size": 16, "bits": 8}),
    ],
)
def gather_block_quantized(node: NodeView) -> Rule | Pinned:
    """Rows are picked; a quantised axis counts whole blocks, as in MatMulNBits."""
    shape, parameters = node.shape(), node.shape(2)
    picked, axis = node.axis(node.attr("gather_axis", 0)), node.axis(node.attr("quantize_axis", 1))
    block = int(node.attr("block_size", 128))
    lanes = node.out_shape()[-1] // shape[-1]  # values in a byte of the last axis
    last = len(shape) - 1
    if lanes > 1 and axis != last:
        return Pinned("it packs another axis than the one in blocks")
    if shape[axis] * lanes != parameters[axis] * block:
        return Pinned(RAGGED)
    share = parameters[axis] // node.shape(3)[axis] if node.has(3) else 1
    if parameters[axis] % share:
        return Pinned("its zero points are packed across the last block")
    axes = names("a", len(shape))

    def pattern(*inside: str) -> Pattern:
        return tuple(((name, *inside),) if i == axis else label(name) for i, name in enumerate(axes))

    index = tuple(map(label, names("i", node.rank(1))))
    made = pattern("share", "block", "lane")
    return Rule(
        (pattern("share", "block"), index, pattern("share"), pattern() if node.has(3) else None),
        ((*made[:picked], *index, *made[picked + 1 :]),),
        sizes={"share": share, "block": block // lanes, "lane": lanes},
        pinned={axes[picked]: "picked by position", "share": PACKED, "block": BLOCK, "lane": PACKED},
    )
