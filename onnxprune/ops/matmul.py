"""Matrix products."""

from __future__ import annotations

from onnxprune.ops.spec import (
    AxisPattern,
    NodeView,
    Pattern,
    Pinned,
    Rule,
    Sample,
    label,
    op,
)


@op(
    "Gemm",
    samples=[
        Sample(((3, 4), (4, 5), (5,))),
        Sample(((4, 3), (5, 4), (1, 5)), {"transA": 1, "transB": 1, "alpha": 0.5, "beta": 2.0}),
        Sample(((3, 4), (5, 4), (3, 1)), {"transB": 1}),
        Sample(((3, 4), (4, 5), (3, 5))),
        Sample(((3, 4), (4, 5), ())),
        Sample(((3, 4), (4, 5))),
        Sample(((3, 4), (4, 5), (5,)), opset=7),
    ],
)
def gemm(node: NodeView) -> Rule:
    a = "k m" if node.attr("transA", 0) else "m k"
    b = "n k" if node.attr("transB", 0) else "k n"
    rule = Rule.of(f"{a}, {b} -> m n", macs=("m", "k", "n"), linear=(1, 2))
    if not node.has(2):
        return rule
    shape, out = node.shape(2), node.out_shape()
    bias: list[AxisPattern] = []
    for i, size in enumerate(shape):
        axis = i + 2 - len(shape)
        bias.append(label("mn"[axis] if size == out[axis] else f"one{i}"))
    return Rule((*rule.inputs, tuple(bias)), rule.outputs, macs=rule.macs, linear=rule.linear)


@op(
    "MatMul",
    since=1,
    samples=[
        Sample(((2, 3, 4), (4, 5))),
        Sample(((2, 6, 3, 4), (2, 6, 4, 5))),
        Sample(((5, 4), (2, 4, 3))),
        Sample(((2, 1, 3, 4), (6, 4, 5))),
        Sample(((4,), (4, 5))),
        Sample(((3, 4), (4,))),
        Sample(((4,), (4,))),
        Sample(((4,), (2, 4, 3))),
    ],
)
def matmul(node: NodeView) -> Rule:
    a, b = node.shape(0), node.shape(1)
    row: Pattern = () if len(a) == 1 else (label("m"),)
    column: Pattern = () if len(b) == 1 else (label("n"),)
    depth = max(len(a), len(b)) - 2
    left, right, out = [], [], []
    for j in range(depth):
        x = a[j - depth - 2] if len(a) >= depth - j + 2 else None
        y = b[j - depth - 2] if len(b) >= depth - j + 2 else None
        size = max(x or 1, y or 1)
        out.append(label(f"b{j}"))
        if x is not None:
            left.append(label(f"b{j}" if x == size else f"a_one{j}"))
        if y is not None:
            right.append(label(f"b{j}" if y == size else f"b_one{j}"))
    return Rule(
        (
            (*left, *row, label("k")),
            (*right, label("k"), *column) if len(b) > 1 else (label("k"),),
        ),
        ((*out, *row, *column),),
        macs=(*(f"b{j}" for j in range(depth)), *("m" for _ in row), "k", *("n" for _ in column)),
        linear=(1, 2) if len(b) > 1 else None,
    )


@op(
    "Einsum",
    since=12,
    samples=[
        Sample(((2, 4, 3, 3), (5, 4)), {"equation": "bchw,oc->bohw"}),
        Sample(((2, 3, 4), (4, 5)), {"equation": "bij,jk"}),
        Sample(((2, 3, 4, 5), (2, 6, 4, 5)), {"equation": "bihd,bjhd->bhij"}),
        Sample(((3, 4),), {"equation": "ij->i"}),
        Sample(((3, 4), (4, 2), (2, 5)), {"equation": "ij, jk, kl -> il"}),
        Sample(((2, 3, 4), (1, 4, 5)), {"equation": "bij,bjk->bik"}),
        Sample(((2, 3, 4), (4, 5)), {"equation": "...j,jk->...k"}),
        Sample(((2, 6, 3, 4), (2, 6, 4, 5)), {"equation": "...ij,...jk"}),
        Sample(((2, 3, 4), (4, 5)), {"equation": "b...d,de->eb..."}),
    ],
)
def einsum(node: NodeView) -> Rule | Pinned:
    inputs, output = _subscripts(node)
    if any(len(set(operand)) < len(operand) for operand in inputs):
        return Pinned("its equation repeats a label in one operand (a diagonal)")
    extents: dict[str, int] = {}
    for i, operand in enumerate(inputs):
        for name, size in zip(operand, node.shape(i), strict=True):
            extents[name] = max(size, extents.get(name, 1))
    patterns = [
        tuple(
            label(name if size == extents[name] else f"{name}_one{i}")  # an extent of 1 is broadcast
            for name, size in zip(operand, node.shape(i), strict=True)
        )
        for i, operand in enumerate(inputs)
    ]
    return Rule(tuple(patterns), (tuple(map(label, output)),), macs=tuple(extents) if len(inputs) > 1 else ())


def _subscripts(node: NodeView) -> tuple[list[list[str]], list[str]]:
    """The labels of each operand and of the result; an ellipsis stands for labels of its own."""
    equation = str(node.attr("equation", "")).replace(" ", "")
    left, arrow, right = equation.partition("->")
    terms = left.split(",")
    hidden = [
        node.rank(i) - len(term.replace("...", "")) if "..." in term else 0 for i, term in enumerate(terms)
    ]
    dots = [f"dot{j}" for j in range(max(hidden))]

    def labels(term: str, count: int) -> list[str]:
        before, _, after = term.partition("...")
        return [*before, *dots[len(dots) - count :], *after]

    if not arrow:
        single = (c for c in set(left) - set(",.") if left.count(c) == 1)
        right = ("..." if dots else "") + "".join(sorted(single))
    inputs = [labels(term, count) for term, count in zip(terms, hidden, strict=True)]
    return inputs, labels(right, len(dots) if "..." in right else 0)
