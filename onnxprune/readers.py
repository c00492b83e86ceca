"""Where an activation is summed over with a stored weight: what a cut takes from, and a repair gives to.

    y[.., g, o, ..] = sum over i, t of  W[g, o, i, t] x[.., g, i, ..]

`i` are the channels that a cut thins out, `g` the groups of a convolution (or of a batch of matrices), `t`
the taps of a window or the positions that a Flatten has put beside the channels. A map between channels acts
on `i` alone, so it folds into the weight whatever the window, stride, dilation or layout (every matrix
product, convolution, transposed convolution and recurrent layer is this one case).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx

from onnxprune import axes
from onnxprune.axes import Axis, BoolArray, Const, IntArray, Keep
from onnxprune.dependency import DependencyGraph, Group, Link
from onnxprune.model import FLOATS, Array, Node, uncollected
from onnxprune.ops.spec import AxisPattern, Window

Floats = npt.NDArray[Any]  # of float64, or of float32 where it is very large
LARGE = 2**24  # elements of a weight that is worked on in float32


@dataclass(frozen=True, slots=True)
class Source:
    """An activation and the layout of its channels.

    tensor   its name
    moved    axes that hold groups on their own (a batch of matrices, directions of a recurrence)
    axis     the axis with the channels: (groups before channels after), row-major
    groups   groups in all: those of the moved axes, then those of the axis
    before, after  positions on the axis around the channels that are samples of them (a flattened image)
    size     channels of a group
    """

    tensor: str
    moved: tuple[int, ...]
    axis: int
    groups: int
    before: int
    size: int
    after: int

    def rows(self, value: Array, most: int | None = None, random: np.random.Generator | None = None) -> Array:
        """[groups, rows, channels] of a value of the tensor; of `most` positions drawn by `random`, where there
        are more."""
        rest = [a for a in range(value.ndim) if a != self.axis and a not in self.moved]
        flat = value.transpose(*rest, *self.moved, self.axis)
        space = flat.shape[: len(rest)]
        count = math.prod(space)
        if most is not None and random is not None and count > most:
            flat = flat[np.unravel_index(np.sort(random.choice(count, most, replace=False)), space)]
        flat = flat.reshape(-1, self.groups, self.before, self.size, self.after)
        return np.ascontiguousarray(flat.transpose(1, 0, 2, 4, 3)).reshape(self.groups, -1, self.size)


@dataclass(frozen=True, slots=True)
class Bias:
    """A stored vector that is added to what a reader makes, `scale` times; an empty tensor is one that the
    node could have as its operand `operand`."""

    node: Node
    operand: int
    tensor: str
    scale: float = 1.0


@dataclass(frozen=True, eq=False, slots=True)
class Reader:
    """One use of a weight (see the module)."""

    link: Link
    source: Source
    typed: Axis  # of the source's axis
    operand: int  # of the weight
    weight: str
    split: tuple[tuple[int, ...], ...]  # extents of the parts of each of the weight's axes
    order: tuple[int, ...]  # of those parts: groups, outputs, channels (with what is around them), taps
    fixed: int  # how many of them are groups and outputs
    _names: tuple[str, ...]  # of the parts, in that order
    _given: int  # the operand that holds the source (0 for a state)
    outputs: int  # of each group
    taps: int
    bias: Bias | None

    @property
    def node(self) -> Node:
        return self.link.node

    @property
    def window(self) -> Window | None:
        """How the weight moves over the source, where it has a window: not where it acts on each position alone."""
        rule = self.link.rule
        given, made = rule.inputs[self._given], rule.outputs[0]
        alone = given is not None and made is not None and given[2:] == made[2:]
        return None if alone else rule.window

    @property
    def windowed(self) -> bool:
        """Whether the weight has axes of taps."""
        return len(self._names) > self.fixed + 1

    @property
    def affine(self) -> bool:
        """Whether the node's output is the sum of the module's formula, and a bias."""
        return self.link.rule.linear is not None and self.link.rule.linear[0] == self.operand

    @property
    def matrix_shape(self) -> tuple[int, int, int, int]:
        """Of `matrix`: groups, outputs, channels, taps (with the positions around the channels)."""
        source = self.source
        return source.groups, self.outputs, source.size, source.before * source.after * self.taps

    @property
    def target_order(self) -> tuple[int, ...] | None:
        """The axes of the node's output as (rest, in the order of the source's), groups, outputs; None where
        the two do not correspond."""
        rule = self.link.rule
        made, given = rule.outputs[0] or (), rule.inputs[self._given] or ()
        fixed = set(self._names[: self.fixed])
        moved = {given[axis][0][0] for axis in self.source.moved}
        ends = [i for i, terms in enumerate(made) if fixed & {n for t in terms for n in t} - moved]
        sides = [i for i, terms in enumerate(made) if len(terms) == 1 and moved & set(terms[0])]
        rest = [i for i in range(len(made)) if i not in ends and i not in sides]
        if len(ends) != 1 or len(sides) != len(moved):
            return None
        if self.window is None:
            theirs = [
                given[a] for a in range(len(given)) if a != self.source.axis and a not in self.source.moved
            ]
            if sorted(theirs) != sorted(made[i] for i in rest):
                return None
            rest = [next(i for i in rest if made[i] == terms) for terms in theirs]
        return (*rest, *sides, *ends)

    def matrix(self, weight: Array) -> Floats:
        """The weight as [groups, outputs, channels, taps], float64 (float32 where it is very large)."""
        source = self.source
        moved = weight.reshape([part for parts in self.split for part in parts]).transpose(self.order)
        moved = moved.reshape(
            source.groups, self.outputs, source.before, source.size, source.after * self.taps
        )
        whole = moved.transpose(0, 1, 3, 2, 4).reshape(source.groups, self.outputs, source.size, -1)
        return whole.astype(np.float64 if whole.size <= LARGE else np.float32)

    def weight_of(self, matrix: Floats) -> Floats:
        """The inverse of `matrix`."""
        source = self.source
        parts = [part for parts in self.split for part in parts]
        whole = matrix.reshape(
            source.groups, self.outputs, source.size, source.before, source.after * self.taps
        )
        moved = whole.transpose(0, 1, 3, 2, 4).reshape([parts[i] for i in self.order])
        return moved.transpose(np.argsort(self.order)).reshape([math.prod(parts) for parts in self.split])

    def made(self, keep: Keep) -> BoolArray:
        """Which outputs stay, [groups, outputs]."""
        masks = []
        place = 0
        typed = self.link.inputs[self.operand] or []
        inner = set(self.order[self.fixed :])
        whole = np.ones((), dtype=bool)
        for axis, parts in zip(typed, self.split, strict=True):
            kept = axes.kept_positions(axis, keep)
            mask = np.ones(axis.extent, dtype=bool)
            if kept is not None:
                mask[:] = False
                mask[kept] = True
            summed = tuple(i for i in range(len(parts)) if place + i in inner)
            masks.append(mask.reshape(parts).any(axis=summed, keepdims=True))
            place += len(parts)
        for part in masks:
            whole = np.asarray(np.logical_and.outer(whole, part))
        return whole.transpose(self.order).reshape(self.source.groups, self.outputs)

    def channels(self, keep: Keep) -> BoolArray | None:
        """Which channels stay, [groups, channels]; None where all do."""
        kept = axes.kept_positions(self.typed, keep)
        if kept is None:
            return None
        source = self.source
        mask = np.zeros(self.typed.extent, dtype=bool)
        mask[kept] = True
        mask = mask.reshape(-1, source.before, source.size, source.after)[:, 0, :, 0]
        return np.tile(mask, (source.groups // len(mask), 1))

    def units(self, group: Group) -> list[IntArray]:
        """For each occurrence of a group on the source's axis, its unit at each of [groups, channels]; -1: none."""
        source = self.source
        return [
            np.tile(
                units.reshape(-1, source.before, source.size, source.after)[:, 0, :, 0],
                (source.groups * source.before * source.size * source.after // len(units), 1),
            )
            for _, units in axes.unit_maps(self.typed, group.var)
        ]


class Readers:
    """All readers of a model, in the order of its nodes."""

    @uncollected
    def __init__(self, graph: DependencyGraph) -> None:
        self.graph = graph
        self._strides = {group.var: group.stride for group in graph.groups}
        self._outputs = {output.name for output in graph.model.outputs}
        self.all = tuple(reader for link in graph.links for reader in self._of(link))
        self._of_var: dict[axes.Var, list[Reader]] = {}
        for reader in self.all:
            for var in axes.free_vars(reader.typed):
                self._of_var.setdefault(var, []).append(reader)

    def of(self, group: Group) -> list[Reader]:
        """The readers of a group's units."""
        return self.reading(group.var)

    def reading(self, var: axes.Var) -> list[Reader]:
        """The readers of an axis that holds these units."""
        return self._of_var.get(var, [])

    # ------------------------------------------------------------------------------------- finding

    def _of(self, link: Link) -> Iterator[Reader]:
        rule, node = link.rule, link.node
        if not rule.macs or link.take is not None or self.graph.model.scopes.of(node.result):
            return  # what is inside a body cannot be looked at from outside
        for operand, pattern in enumerate(rule.inputs[: len(node.inputs)]):
            tensor = self.graph.model.constants.get(node.inputs[operand])
            if pattern and tensor is not None and tensor.data_type in FLOATS and len(tensor.dims) > 1:
                reader = self._reader(link, operand)
                if reader is not None:
                    yield reader

    def _reader(self, link: Link, operand: int) -> Reader | None:
        rule, node = link.rule, link.node
        pattern = rule.inputs[operand] or ()
        labels = [name for terms in pattern for term in terms for name in term]
        found = self._summed(link, operand, labels)
        if found is None:
            return None
        name, tensor, where = found
        axis = next(i for i, terms in enumerate(where) if any(name in term for term in terms))
        own = where[axis][0]
        if len(where[axis]) > 1 or own[-1] != name:
            return None
        around = own[:-1]
        moved = [i for i, terms in enumerate(where) if i != axis and terms[0] and terms[0][0] in labels]
        if any(len(where[i]) > 1 or len(where[i][0]) > 1 for i in moved):
            return None
        shared = [where[i][0][0] for i in moved]
        if not set(around) <= set(labels):
            return None
        groups = [*shared, *around]
        made = {n for p in rule.outputs if p for terms in p for term in terms for n in term}
        split: list[tuple[int, ...]] = []
        parts: list[str] = []
        for terms, extent in zip(pattern, self.graph.model.constants[node.inputs[operand]].dims, strict=True):
            if len(terms) == 1:
                parts += terms[0]
                split.append(tuple(link.labels[n].extent for n in terms[0]))
            elif {n for term in terms for n in term}.isdisjoint({name, *groups}):
                parts.append("+".join(n for term in terms for n in term))
                split.append((extent,))
            else:
                return None
        if len(set(parts)) < len(parts):
            return None
        windows = [p for p in parts if p not in made and p != name and p not in groups and "+" not in p]
        windows = [p for p in windows if rule.linear is not None]  # elsewhere they are outputs all the same
        rest = [p for p in parts if p not in groups and p != name and p not in windows]
        order = tuple(parts.index(p) for p in [*groups, *rest, name, *windows])
        counted = math.prod(link.labels[g].extent for g in groups)
        typed = axes.resolve((self.graph.types.get(tensor) or [])[axis])
        before, size, after = self._layout(typed, link.labels[name].extent, bool(groups and counted > 1))
        extents = dict(zip(parts, (part for axis in split for part in axis), strict=True))
        source = Source(tensor, tuple(moved), axis, counted, before, size, after)
        taps = math.prod(extents[p] for p in windows)
        outputs = math.prod(extents[p] for p in rest)
        bias = self._bias(link, operand, outputs * counted)
        weight = node.inputs[operand]
        given = next((i for i, n in enumerate(node.inputs) if n == tensor), 0)
        fixed = len(groups) + len(rest)
        named = tuple(parts[i] for i in order)
        return Reader(
            link,
            source,
            typed,
            operand,
            weight,
            tuple(split),
            order,
            fixed,
            named,
            given,
            outputs,
            taps,
            bias,
        )

    def _summed(
        self, link: Link, operand: int, labels: list[str]
    ) -> tuple[str, str, tuple[AxisPattern, ...]] | None:
        """The one label that is summed over with an activation, the activation and its pattern."""
        rule, node = link.rule, link.node
        found = []
        for name in link.contracted():
            if name not in labels:
                continue
            if name in rule.tied and rule.outputs[0] and node.outputs[0]:  # a state, which the node makes
                found.append((rule.tied[name], node.outputs[0], rule.outputs[0], name))
                continue
            for i, pattern in enumerate(rule.inputs[: len(node.inputs)]):
                activation = (
                    i != operand and node.inputs[i] and node.inputs[i] not in self.graph.model.constants
                )
                if pattern and activation and any(name in t for terms in pattern for t in terms):
                    found.append((name, node.inputs[i], pattern, name))
                    break
        if len(found) != 1 or self.graph.types.get(found[0][1]) is None:
            return None
        seen, tensor, pattern, name = found[0]
        reading = {i for i, _ in link.operands(name)}
        if len(reading) > (1 if seen != name else 2):
            return None  # a product of two activations is not linear in either's channels
        if seen != name:  # in the weight the state has a name of its own
            pattern = tuple(
                tuple(tuple(name if n == seen else n for n in term) for term in terms) for terms in pattern
            )
        return name, tensor, pattern

    def _layout(self, typed: Axis, size: int, grouped: bool) -> tuple[int, int, int]:
        """(before, channels, after) of an axis where an image has been flattened into it: its positions are
        samples of the channels, not channels."""
        if grouped or not isinstance(typed, axes.Product):
            return 1, size, 1
        free = [i for i, factor in enumerate(typed.factors) if not isinstance(factor, Const)]
        if len(free) != 1 or not isinstance(typed.factors[free[0]], axes.Var):
            return 1, size, 1
        var = typed.factors[free[0]]
        assert isinstance(var, axes.Var)
        before = math.prod(factor.extent for factor in typed.factors[: free[0]])
        after = math.prod(factor.extent for factor in typed.factors[free[0] + 1 :])
        stride = self._strides.get(var, 1)  # channels of one unit where it is made
        if stride == 1:
            return before, var.extent, after
        if after == stride and before > 1:
            return before, var.extent * stride, 1
        return 1, size, 1

    def _bias(self, link: Link, operand: int, size: int) -> Bias | None:
        rule, node, model = link.rule, link.node, self.graph.model
        if rule.linear is None or rule.linear[0] != operand:
            return None
        at = rule.linear[1]
        scale = float(node.attributes.get("alpha", 1.0)), float(node.attributes.get("beta", 1.0))
        if at < len(node.inputs) and node.inputs[at]:
            usable = self._vector(node.inputs[at], size) and all(scale)
            return Bias(node, at, node.inputs[at], scale[1] / scale[0]) if usable else None
        if onnx.defs.get_schema(node.op, model.opset(node.domain), node.domain).max_input > at:
            return Bias(node, at, "", scale[1] / scale[0]) if all(scale) else None
        following = model.consumers.get(node.outputs[0], [])
        if len(following) != 1 or node.outputs[0] in self._outputs or len(node.outputs) > 1:
            return None
        added = next((other for other in self.graph.links if other.node is following[0]), None)
        if added is None or len(added.rule.adds) != 2 or added.rule.lossy:
            return None
        for i in added.rule.adds:
            name = following[0].inputs[i]
            last = model.constants[name].dims[-1:] if name in model.constants else []
            made = self.graph.shapes.shapes.get(node.outputs[0], ())
            if self._vector(name, size) and list(last) == [size] and made[-1:] == (size,):
                return Bias(following[0], i, name)
        return None

    def _vector(self, name: str, size: int) -> bool:
        """Whether a tensor is a stored vector of this size that nothing else reads."""
        tensor = self.graph.model.constants.get(name)
        if tensor is None or tensor.data_type not in FLOATS or math.prod(tensor.dims) != size:
            return False
        return max(tensor.dims, default=0) == size and len(self.graph.model.consumers.get(name, ())) == 1
