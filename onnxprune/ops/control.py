"""Control flow in a flat graph (`onnxprune.flow`): which tensors an output of such a node may be."""

from __future__ import annotations

from typing import NamedTuple

from onnxprune.flow import DOMAIN
from onnxprune.ops.spec import NodeView, Pattern, Rule, Shape, Unknown, label, op


class Source(NamedTuple):
    """An input that an output takes its values from: less the axis `without`, with a new axis at `at`."""

    input: int
    without: int | None = None
    at: int | None = None

    def axes(self, node: NodeView) -> list[int | None] | None:
        """For each axis of the output the axis of the input, None for the new one; None if unknown."""
        shape = node.shapes[self.input]
        if shape is None or (self.without is not None and not shape):
            return None
        axes: list[int | None] = list(range(len(shape)))
        if self.without is not None:
            del axes[self.without % len(shape)]
        if self.at is not None:
            axes.insert(self.at % (len(shape) + 1), None)
        return axes


def sources(node: NodeView) -> list[list[Source]]:
    """For each output, the inputs whose value it may have."""
    if node.op == "Alias":
        return [[Source(0)]]
    count, states = len(node.out_shapes), node.attr("states", 0)
    if node.op == "If":
        return [[Source(1 + k + branch * count) for branch in _taken(node)] for k in range(count)]
    if node.op.endswith("Entry"):
        first = node.attr("first")
        plain = [[Source(k)] if k >= first else [] for k in range(first + states)]
        return plain + [[Source(len(plain) + k, without=a)] for k, a in enumerate(node.attr("axes", []))]
    carried = [[Source(k), Source(states + k)] for k in range(states)]
    return carried + [[Source(2 * states + k, at=a)] for k, a in enumerate(node.attr("axes", []))]


def _taken(node: NodeView) -> list[int]:
    """The branches that run: both, unless the condition is known and the same at all sizes."""
    try:
        condition = node.value(0) if node.fixed(0) else None
    except Unknown:
        condition = None
    return [0, 1] if condition is None or condition.size != 1 else [0 if condition.item() else 1]


def shapes(node: NodeView) -> list[Shape | None]:
    """The shapes of the outputs; None where the tensors that an output may be differ, or iterations count."""
    found: list[Shape | None] = []
    for candidates in sources(node):
        given: set[Shape | None] = set()
        for source in candidates:
            axes, shape = source.axes(node), node.shapes[source.input] or ()
            unknown = axes is None or None in axes
            given.add(None if unknown else tuple(shape[a] for a in axes or () if a is not None))
        found.append(given.pop() if len(given) == 1 else None if given else ())
    return found


def steady(node: NodeView) -> bool:
    """Whether what one iteration hands to the next keeps its shape."""
    states = node.attr("states", 0)
    before, after = node.shapes[:states], node.shapes[states : 2 * states]
    return None not in before and before == after


@op("Alias", "If", "LoopEntry", "LoopExit", "ScanEntry", "ScanExit", domain=DOMAIN, since=1)
def control(node: NodeView) -> Rule:
    """Each axis of an output is that of all tensors that the output may be; where they differ, it is pinned."""
    labels: dict[int, list[str]] = {}  # of the inputs that outputs are made of
    pinned: dict[str, str] = {}
    outputs: list[Pattern | None] = []
    for k, (out, candidates) in enumerate(zip(node.out_shapes, sources(node), strict=True)):
        arriving = [source for source in candidates if node.shapes[source.input] is not None]
        for source in arriving:
            labels[source.input] = [f"i{source.input}.{axis}" for axis in range(node.rank(source.input))]
        if out is None or not candidates:
            outputs.append(None)
            for source in arriving:
                pinned.update(dict.fromkeys(labels[source.input], "the shape of what it gives is unknown"))
            continue
        outputs.append(tuple(label(f"o{k}.{axis}") for axis in range(len(out))))
        if len(arriving) < len(candidates):
            why = "the shape of what arrives is unknown"
            pinned.update({f"o{k}.{axis}": why for axis in range(len(out))})
        for source in arriving:
            axes = source.axes(node) or []
            pinned.update(dict.fromkeys(labels[source.input], _why(node, arriving)))
            if len(axes) != len(out):
                pinned.update({f"o{k}.{axis}": _why(node, arriving) for axis in range(len(out))})
                continue
            for axis, own in enumerate(axes):
                if own is not None and node.shape(source.input)[own] == out[axis]:
                    labels[source.input][own] = f"o{k}.{axis}"
                else:
                    pinned[f"o{k}.{axis}"] = _why(node, arriving)
    inputs = [tuple(map(label, labels[i])) if i in labels else None for i in range(len(node.shapes))]
    return Rule(tuple(inputs), tuple(outputs), pinned=pinned)


def _why(node: NodeView, arriving: list[Source]) -> str:
    if node.op != "If":
        return "iterations run along this axis"
    return f"its branches give {' and '.join(str(node.shape(source.input)) for source in arriving)}"
