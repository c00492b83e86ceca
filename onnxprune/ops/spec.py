"""How an operator is declared: one function that says, in index notation, what its axes mean.

    @op("Conv", samples=[...])
    def conv(node):
        return Rule.of("n (g i) ..., (g o) i ..., (g o) -> n (g o) ...", ...)

A label on both sides couples those axes. A label missing on the right is contracted: cutting it is
exact once the weights are cut too. Labels may be pinned or lossy. From the rule are derived the
coupling, the surgery, the cost and the folding; the samples hold each label against onnxruntime.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]
Shape = tuple[int, ...]

Term = tuple[str, ...]  # a product of labels, row-major
AxisPattern = tuple[Term, ...]  # a sum of terms
Pattern = tuple[AxisPattern, ...]  # one per dimension


def label(name: str) -> AxisPattern:
    return ((name,),)


@functools.lru_cache(maxsize=1024)
def parse(text: str) -> tuple[tuple[Pattern, ...], tuple[Pattern, ...]]:
    """Index notation as patterns: `parse("n (g i), i -> n g")`.

    `(a b)` is a row-major product, `(a + b)` a sum; operands are separated by commas.
    """
    left, _, right = text.partition("->")
    return tuple(map(_operand, left.split(","))), tuple(map(_operand, right.split(",")))


def _operand(text: str) -> Pattern:
    axes: list[AxisPattern] = []
    tokens = text.replace("(", " ( ").replace(")", " ) ").split()
    position = 0
    while position < len(tokens):
        if tokens[position] != "(":
            axes.append(label(tokens[position]))
            position += 1
            continue
        close = tokens.index(")", position)
        terms = " ".join(tokens[position + 1 : close]).split("+")
        axes.append(tuple(tuple(term.split()) for term in terms))
        position = close + 1
    return tuple(axes)


@dataclass(frozen=True, slots=True)
class Window:
    """How a filter moves over the last axes of its input (ONNX, Conv); per axis, in elements.

    extents    of the filter
    strides    between two outputs
    dilations  between two taps
    pads       zeros put in front
    """

    extents: Shape
    strides: Shape
    dilations: Shape
    pads: Shape

    def position(self, axis: int, tap: int, size: int, outputs: int) -> tuple[Array, Array]:
        """Where a tap reads an axis of `size` elements for each of the outputs, and whether it is inside."""
        at = np.arange(outputs) * self.strides[axis] + tap * self.dilations[axis] - self.pads[axis]
        return at, (at >= 0) & (at < size)


@dataclass(frozen=True, slots=True)
class Rule:
    """What the axes of one node mean.

    inputs, outputs   per operand its axis patterns; None where its axes mean nothing here
                      (integer operands, absent inputs)
    sizes             extents of labels that the shapes alone do not give
    pinned, lossy     label -> why it cannot be cut, or not exactly
    attributes        attribute name -> the label whose extent it states
    tied              label -> the label that it is the same axis as: where a node sums over an axis that it
                      also makes (the state of a recurrent layer), the operand's side has a name of its own
    macs              labels whose product is the number of multiply-accumulates, or several such products
    linear            (weight, bias) operand positions where the node is affine in its last inputs:
                      scaling an output label scales that operand
    window            how the weight of `linear` moves over its input, where it has a window
    gain              position of the operand that scales each unit of a normalisation
    adds              operands whose elementwise sum is the first output, or is normalised to it
    heads             labels that count attention heads (elsewhere they are found by structure)
    zero              operand -> the operand that holds its zero point, where its integers count from one;
                      None where no value in it means nothing (weights packed into bytes)
    resize            integer operands and attributes after a cut (see `Resize`)
    """

    inputs: tuple[Pattern | None, ...]
    outputs: tuple[Pattern | None, ...]
    sizes: Mapping[str, int] = field(default_factory=dict)
    pinned: Mapping[str, str] = field(default_factory=dict)
    lossy: Mapping[str, str] = field(default_factory=dict)
    attributes: Mapping[str, str] = field(default_factory=dict)
    tied: Mapping[str, str] = field(default_factory=dict)
    macs: Term | AxisPattern = ()
    linear: tuple[int, int] | None = None
    window: Window | None = None
    gain: int | None = None
    adds: tuple[int, ...] = ()
    heads: Term = ()
    zero: Mapping[int, int | None] = field(default_factory=dict)
    resize: Callable[[Resize], dict[int | str, Array | None]] | None = None

    @staticmethod
    def of(text: str, **options: Any) -> Rule:
        inputs, outputs = parse(text)
        return Rule(inputs, outputs, **options)

    @property
    def products(self) -> AxisPattern:
        """The terms of `macs`."""
        labels = tuple(part for part in self.macs if isinstance(part, str))
        return (labels,) if labels else tuple(part for part in self.macs if not isinstance(part, str))


@dataclass(frozen=True, slots=True)
class Pinned:
    """All axes of the node are pinned, for this reason."""

    why: str


@dataclass(frozen=True, slots=True)
class Take:
    """The output axis is made of given positions of an input axis: a constant index map.

    `axis` and `index` say which positions; all other axes pass through. `operand` is the input that
    holds the index and is renumbered after a cut; None where a cut can only be written as a Gather.
    """

    axis: int
    index: Array
    operand: int | None


@dataclass(frozen=True, slots=True)
class Resize:
    """What a rule's `resize` sees: the node as it was, and the extents after the cut.

    It returns the new value of each integer operand (by input position) or attribute (by name; an array
    of no dimensions is one number); None takes an attribute away.
    """

    node: NodeView
    inputs: Sequence[Shape | None]
    outputs: Sequence[Shape | None]
    extents: Mapping[str, int]

    def output(self, i: int = 0) -> Shape:
        shape = self.outputs[i]
        assert shape is not None
        return shape


@dataclass(frozen=True, slots=True)
class NodeView:
    """A node as declarations see it: attributes, shapes and known integer values."""

    op: str
    opset: int
    attributes: Mapping[str, Any]
    shapes: tuple[Shape | None, ...]
    out_shapes: tuple[Shape | None, ...]
    values: Callable[[int], Array | None]
    fixed: Callable[[int], bool] = lambda _: True  # whether operand i is the same at all sizes
    measured: bool = False  # whether nothing reads more of the outputs than their extents

    def attr(self, name: str, default: Any = None) -> Any:
        return self.attributes.get(name, default)

    def has(self, i: int) -> bool:
        """Whether optional input i is given."""
        return i < len(self.shapes) and self.shapes[i] is not None

    def shape(self, i: int = 0) -> Shape:
        shape = self.shapes[i]
        if shape is None:
            raise Unknown(f"the shape of input {i} is unknown")
        return shape

    def out_shape(self, i: int = 0) -> Shape:
        shape = self.out_shapes[i]
        if shape is None:
            raise Unknown(f"the shape of output {i} is unknown")
        return shape

    def rank(self, i: int = 0) -> int:
        return len(self.shape(i))

    def value(self, i: int) -> Array | None:
        """The known value of an integer (or small float) operand; None if absent.

        Raises `Unknown` if the operand is there but its value is only known at run time.
        """
        if i >= len(self.shapes) or self.shapes[i] is None:
            return None
        value = self.values(i)
        if value is None:
            raise Unknown(f"input {i} is only known at run time")
        return value

    def axis(self, value: int, rank: int | None = None) -> int:
        return value % (self.rank() if rank is None else rank)

    def operand(self, name: str, i: int, since: int) -> list[int] | None:
        """Integers given as attribute `name` before opset `since` and as input `i` from then on."""
        if self.opset >= since:
            value = self.value(i)
            return None if value is None else [int(v) for v in np.atleast_1d(value)]
        attribute = self.attr(name)
        return None if attribute is None else [int(v) for v in np.atleast_1d(attribute)]


class Unknown(Exception):
    """A declaration needs something that is only known at run time; the node's axes are pinned."""


@dataclass(frozen=True)
class Sample:
    """One use of an operator for the oracle: operand arrays or shapes, attributes, opset."""

    inputs: tuple[Shape | Array | None, ...]
    attributes: Mapping[str, Any] = field(default_factory=dict)
    opset: int = 17
    outputs: int = 1


Declaration = Callable[[NodeView], "Rule | Take | Pinned"]
D = TypeVar("D", bound=Declaration)
Evaluate = Callable[[NodeView, Sequence[Array | None]], "list[Array]"]


@dataclass(frozen=True)
class OpSpec:
    name: str
    domain: str
    since: int
    declare: Declaration
    samples: tuple[Sample, ...]
    evaluate: Evaluate | None


_REGISTRY: dict[tuple[str, str], OpSpec] = {}


def op(
    *names: str,
    domain: str = "",
    since: int = 7,
    samples: Sequence[Sample] = (),
    evaluate: Evaluate | None = None,
) -> Callable[[D], D]:
    """Declare one operator, or several that share a rule. A second declaration of a name raises."""

    def register(declare: D) -> D:
        for name in names:
            if (domain, name) in _REGISTRY:
                raise ValueError(f"operator {domain or 'ai.onnx'}.{name} is declared twice")
            _REGISTRY[domain, name] = OpSpec(name, domain, since, declare, tuple(samples), evaluate)
        return declare

    return register


def lookup(domain: str, name: str, opset: int) -> OpSpec | None:
    spec = _REGISTRY.get((domain, name))
    return spec if spec is not None and opset >= spec.since else None


def declared() -> list[OpSpec]:
    """All declarations, sorted by domain and name."""
    return [_REGISTRY[key] for key in sorted(_REGISTRY)]


# ------------------------------------------------------------------------------- shared pieces of rules


def names(prefix: str, count: int, start: int = 0) -> tuple[str, ...]:
    return tuple(f"{prefix}{i}" for i in range(start, start + count))


def broadcast(shapes: Sequence[Shape | None], out: Shape) -> tuple[tuple[Pattern | None, ...], Pattern]:
    """Patterns of operands that broadcast (numpy rules) to `out`, and the pattern of `out`."""
    patterns: list[Pattern | None] = []
    for number, shape in enumerate(shapes):
        if shape is None:
            raise Unknown(f"the shape of input {number} is unknown")
        shift = len(out) - len(shape)
        patterns.append(
            tuple(
                label(f"a{i + shift}") if size == out[i + shift] else label(f"one{number}_{i}")
                for i, size in enumerate(shape)
            )
        )
    return tuple(patterns), tuple(label(f"a{i}") for i in range(len(out)))


def refine(left: Shape, right: Shape) -> tuple[Pattern, Pattern, dict[str, int], dict[str, str]]:
    """Patterns of a row-major reshape from `left` to `right`: the common refinement of both.

    Worked example: (2, 12, 64) -> (2, 768) gives `d0 d1 d2 -> d0 (d1 d2)`; (6, 4) -> (4, 6) has no
    common refinement, so both sides get labels of their own, pinned. Returns the two patterns, the
    sizes of the labels and the pinned ones with the reason.
    """
    sizes: dict[str, int] = {}
    pinned: dict[str, str] = {}
    if 0 in (*left, *right) or math.prod(left) != math.prod(right):
        raise Unknown(f"extents {left} and {right} do not hold the same elements")
    out: tuple[list[AxisPattern], list[AxisPattern]] = ([], [])
    for a, b in _segments(left, right):
        if not (pieces := _common(a, b)):
            why = f"reshape {tuple(a)} -> {tuple(b)} has no common layout"
            for side, dims in zip(out, (a, b), strict=True):
                for size in dims:
                    name = f"d{len(sizes)}"
                    sizes[name], pinned[name] = size, why
                    side.append(label(name))
            continue
        labels = []
        for size in pieces:
            labels.append(f"d{len(sizes)}")
            sizes[labels[-1]] = size
        for side, dims in zip(out, (a, b), strict=True):
            side.extend(_group(dims, labels, sizes))
    return tuple(out[0]), tuple(out[1]), sizes, pinned


def _segments(left: Shape, right: Shape) -> list[tuple[list[int], list[int]]]:
    """Shortest runs of dimensions with equal products; extents of 1 stand alone."""
    segments: list[tuple[list[int], list[int]]] = []
    a, b = list(left), list(right)
    while a or b:
        if a and b and a[0] == b[0]:
            segments.append(([a.pop(0)], [b.pop(0)]))
        elif a and a[0] == 1:
            segments.append(([a.pop(0)], []))
        elif b and b[0] == 1:
            segments.append(([], [b.pop(0)]))
        else:
            x, y = [a.pop(0)], [b.pop(0)]
            while math.prod(x) != math.prod(y):
                if math.prod(x) < math.prod(y):
                    x.append(a.pop(0))
                else:
                    y.append(b.pop(0))
            segments.append((x, y))
    return segments


def _common(a: list[int], b: list[int]) -> list[int]:
    """Factors, major first, that both dimension lists are groupings of; empty if there are none."""
    bounds = sorted({math.prod(dims[i:]) for dims in (a, b) for i in range(len(dims) + 1)})
    pieces = []
    for low, high in itertools.pairwise(bounds):
        if high % low:
            return []
        pieces.append(high // low)
    return pieces[::-1] or [1]


def _group(dims: list[int], labels: list[str], sizes: Mapping[str, int]) -> list[AxisPattern]:
    """Gather consecutive labels into one product per dimension."""
    rest = list(labels)
    axes: list[AxisPattern] = []
    for size in dims:
        taken: list[str] = []
        while math.prod(sizes[t] for t in taken) != size or (not taken and size == 1 == len(dims)):
            taken.append(rest.pop(0))
        axes.append((tuple(taken),))
    return axes


def pins(labels: Iterable[str], why: str) -> dict[str, str]:
    """The same reason for several labels."""
    return dict.fromkeys(labels, why)
