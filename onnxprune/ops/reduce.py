"""Reductions. A sum is exact to cut: a masked unit adds nothing. Everything else is a statistic of its
axis and lossy; the norms among them too, although a masked unit adds nothing to them either: they are
there to normalise what stays."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from onnxprune.ops.spec import (
    Array,
    Evaluate,
    NodeView,
    Rule,
    Sample,
    label,
    names,
    op,
    pins,
)

_SUMS = ("ReduceSum",)
_OTHERS = (
    "ReduceL1",
    "ReduceL2",
    "ReduceLogSum",
    "ReduceLogSumExp",
    "ReduceMax",
    "ReduceMean",
    "ReduceMin",
    "ReduceProd",
    "ReduceSumSquare",
)
_NUMPY: dict[str, Callable[..., Any]] = {
    "ReduceSum": np.sum,
    "ReduceMax": np.max,
    "ReduceMin": np.min,
    "ReduceProd": np.prod,
}


def _axes(node: NodeView) -> list[int]:
    """Axes reduced: attribute `axes`, or input 1 (opset 13 for ReduceSum, 18 for the others)."""
    given = node.operand("axes", 1, 13 if node.op == "ReduceSum" else 18)
    if not given:
        return [] if node.attr("noop_with_empty_axes", 0) else list(range(node.rank()))
    return [node.axis(a) for a in given]


def _rule(node: NodeView) -> Rule:
    over = set(_axes(node))
    axes = names("a", node.rank())
    keep = node.attr("keepdims", 1) == 1
    output = [label(f"one{i}" if i in over else a) for i, a in enumerate(axes) if keep or i not in over]
    reduced = [axes[i] for i in sorted(over)]
    why = f"{node.op} over this axis depends on how many there are"
    return Rule(
        (tuple(map(label, axes)), None),
        (tuple(output),),
        lossy={} if node.op in _SUMS else pins(reduced, why),
    )


def _evaluator(name: str) -> Evaluate | None:
    function = _NUMPY.get(name)
    if function is None:
        return None

    def evaluate(node: NodeView, inputs: Sequence[Array | None]) -> list[Array]:
        axes, keep = tuple(_axes(node)), node.attr("keepdims", 1) == 1
        return [np.asarray(function(np.asarray(inputs[0]), axis=axes, keepdims=keep))]

    return evaluate


for _name in (*_SUMS, *_OTHERS):
    op(
        _name,
        since=1,
        samples=[
            Sample(((2, 4, 3), np.array([1])), {"keepdims": 0}, opset=18),
            Sample(((2, 4, 3),), {"axes": [-1, 1]}, opset=11),
            Sample(((2, 4, 3),), {"noop_with_empty_axes": 1}, opset=18),
            Sample(((2, 4),), {"keepdims": 0}),
        ],
        evaluate=_evaluator(_name),
    )(_rule)


@op(
    "ArgMax",
    "ArgMin",
    since=1,
    samples=[Sample(((2, 4, 3),), {"axis": 1}), Sample(((2, 4, 3),), {"axis": 2, "keepdims": 0})],
)
def arg_reduce(node: NodeView) -> Rule:
    over = node.axis(node.attr("axis", 0))
    axes = names("a", node.rank())
    keep = node.attr("keepdims", 1) == 1
    output = [label("one" if i == over else a) for i, a in enumerate(axes) if keep or i != over]
    return Rule((tuple(map(label, axes)),), (tuple(output),), pinned={axes[over]: "positions are counted"})


@op(
    "TopK",
    since=1,
    samples=[
        Sample(((2, 4, 3), np.array([2])), {"axis": 1}, outputs=2),
        Sample(((2, 4, 3),), {"k": 2}, opset=9, outputs=2),
    ],
)
def top_k(node: NodeView) -> Rule:
    over = node.axis(node.attr("axis", -1))
    axes = names("a", node.rank())
    output = tuple(label("k" if i == over else a) for i, a in enumerate(axes))
    return Rule(
        (tuple(map(label, axes)), None),
        (output, output),
        pinned={axes[over]: "positions are ranked", "k": "the number asked for"},
    )


@op("CumSum", since=11, samples=[Sample(((2, 4, 3), np.array(1))), Sample(((2, 4, 3), np.array([-1])))])
def cum_sum(node: NodeView) -> Rule:
    over = node.axis(int(np.ravel(node.value(1))[0]))  # type: ignore[arg-type]
    axes = names("a", node.rank())
    data = tuple(map(label, axes))
    return Rule((data, None), (data,), pinned={axes[over]: "running sum"})


@op(
    "DFT",
    since=17,
    samples=[
        Sample(((2, 3, 4, 1),), {"axis": 2}),
        Sample(((2, 3, 4, 2),), {"axis": 1, "inverse": 1}),
        Sample(((2, 3, 4, 1),), {"axis": 1, "onesided": 1}),
        Sample(((2, 3, 4, 1), None, np.array(1)), opset=20),
    ],
)
def dft(node: NodeView) -> Rule:
    over = node.operand("axis", 2, 20) or [1 if node.opset < 20 else -2]
    axis = node.axis(over[0])
    axes = names("a", node.rank() - 1)
    out = [f"y{i}" if i == axis else a for i, a in enumerate(axes)]
    return Rule(
        (tuple(map(label, (*axes, "real"))), None, None),
        (tuple(map(label, (*out, "complex"))),),
        pinned=pins((axes[axis], out[axis], "real", "complex"), "a spectrum over this axis"),
    )
