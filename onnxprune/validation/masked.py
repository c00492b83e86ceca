"""The masked original: the reference that a pruned model must equal.

masked(G, R) is G with the contribution of the removed units R taken out of every contraction that
reads them: the operand is zeroed there (or set to its zero point), in front of that consumer only. What a
removed unit carries up to that point (a bias, a BatchNorm shift, sigmoid(0)) does not matter. A statistic
over a cut axis (lossy) is taken over the kept positions.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx

from onnxprune.axes import Axis, IntArray, Keep, kept_positions
from onnxprune.blocks import Block
from onnxprune.dependency import DependencyGraph, Link
from onnxprune.errors import InternalError
from onnxprune.model import copy_without_weights

PREFIX = "onnxprune.masked."


def masked(graph: DependencyGraph, keep: Keep, removed: Sequence[Block] = ()) -> onnx.ModelProto:
    """The original with the removed units masked at their consumers, and zeros for what removed blocks
    add; same inputs and outputs."""
    return _Masker(graph, keep).build(removed)


class _Masker:
    def __init__(self, graph: DependencyGraph, keep: Keep) -> None:
        self.graph = graph
        self.keep = keep
        self.before: dict[int, list[onnx.NodeProto]] = {}
        self.after: dict[int, list[onnx.NodeProto]] = {}
        self.rewired: dict[int, onnx.NodeProto] = {}
        self.constants: list[onnx.TensorProto] = []

    def build(self, removed: Sequence[Block]) -> onnx.ModelProto:
        dropped = {block.join.index: block.branch for block in removed}
        for link in self.graph.links:
            self._statistics(link)
            self._contractions(link)
            if link.node.index in dropped:
                branch = dropped[link.node.index]
                rank = len(link.inputs[branch] or ())
                self._zero(link, branch, 0, rank, 1, np.empty(0, dtype=np.int64))
        source = self.graph.model.proto
        proto = onnx.ModelProto()
        copy_without_weights(source, proto)
        del proto.graph.node[:]
        del proto.graph.value_info[:]
        for index, node in enumerate(source.graph.node):
            proto.graph.node.extend(self.before.get(index, ()))
            proto.graph.node.append(self.rewired.get(index, node))
            proto.graph.node.extend(self.after.get(index, ()))
        proto.graph.initializer.extend(source.graph.initializer)
        proto.graph.initializer.extend(self.constants)
        if proto.ir_version < 4:
            proto.graph.input.extend(
                onnx.helper.make_tensor_value_info(t.name, t.data_type, list(t.dims)) for t in self.constants
            )
        return proto

    def _kept(self, axis: Axis) -> IntArray | None:
        return kept_positions(axis, self.keep)

    def _contractions(self, link: Link) -> None:
        """Zero one operand of every contraction over a cut axis."""
        if link.node.op in ("Shape", "Size"):  # they read no values
            return
        for name in link.contracted():
            if self._kept(link.labels[name]) is None:
                continue
            choices = [c for c in link.operands(name) if link.rule.zero.get(c[0], 0) is not None]
            names = link.node.inputs
            data = [c for c in choices if names[c[0]] not in self.graph.model.constants]
            for i, axis in data[:1] or choices:  # weights that hold a unit together are all zeroed
                operand = link.inputs[i]
                assert operand is not None
                kept = self._kept(operand[axis])
                assert kept is not None
                self._zero(link, i, axis, len(operand), operand[axis].extent, kept)

    def _zero(self, link: Link, i: int, axis: int, rank: int, extent: int, kept: IntArray) -> None:
        """Let input i of a node hold nothing outside the kept positions of one axis."""
        tensor = self._node(link).input[i]
        element = self.graph.shapes.elements.get(link.node.inputs[i], 0)
        if not element:
            raise InternalError(f"{link.node}: the element type of '{tensor}' is unknown")
        shape = [extent if a == axis else 1 for a in range(rank)]
        dtype = onnx.helper.tensor_dtype_to_np_dtype(element)
        where = self.graph.model.opset() >= 9
        mask = np.zeros(extent, dtype=bool if where else dtype)
        mask[kept] = 1
        inputs = [self._constant(mask.reshape(shape)), tensor]
        if where:
            inputs.append(self._neutral(link, i) or self._constant(np.zeros((), dtype=dtype)))
        self._insert(link, i, onnx.helper.make_node("Where" if where else "Mul", inputs, [""]))

    def _neutral(self, link: Link, i: int) -> str:
        """The zero point that input i counts from, broadcast against it; empty where it counts from 0."""
        where = link.rule.zero.get(i)
        name = link.node.inputs[where] if where is not None and where < len(link.node.inputs) else ""
        own = link.rule.inputs[where] if where is not None and name else None
        pattern = link.rule.inputs[i] or ()
        if (
            not own
            or not any(terms in own for terms in pattern[:-1])
            or name not in self.graph.model.constants
        ):
            return name
        shape = [
            axis.extent if t in own else 1 for axis, t in zip(link.inputs[i] or (), pattern, strict=True)
        ]
        return self._constant(self.graph.model.array(name).reshape(shape))

    def _statistics(self, link: Link) -> None:
        """Let a lossy node see the kept positions only, and spread its result out again."""
        cut = {
            name
            for name in link.rule.lossy
            if name in link.labels and self._kept(link.labels[name]) is not None
        }
        if not cut:
            return
        for i, (operand, pattern) in enumerate(zip(link.inputs, link.rule.inputs, strict=False)):
            for axis, terms in enumerate(pattern or ()):
                if operand is not None and any(name in cut for term in terms for name in term):
                    kept = self._kept(operand[axis])
                    assert kept is not None
                    index = self._constant(kept)
                    self._insert(
                        link,
                        i,
                        onnx.helper.make_node("Gather", [self._node(link).input[i], index], [""], axis=axis),
                    )
        node = self._node(link)
        for o, (result, pattern) in enumerate(zip(link.outputs, link.rule.outputs, strict=False)):
            for axis, terms in enumerate(pattern or ()):
                if result is not None and any(name in cut for term in terms for name in term):
                    kept = self._kept(result[axis])
                    assert kept is not None
                    spread = np.zeros(result[axis].extent, dtype=np.int64)
                    spread[kept] = np.arange(len(kept))
                    narrow = f"{PREFIX}{node.output[o]}.{axis}"
                    after = self.after.setdefault(link.node.index, [])
                    after.insert(
                        0,
                        onnx.helper.make_node(
                            "Gather", [narrow, self._constant(spread)], [node.output[o]], axis=axis
                        ),
                    )
                    node.output[o] = narrow

    def _node(self, link: Link) -> onnx.NodeProto:
        index = link.node.index
        if index not in self.rewired:
            self.rewired[index] = onnx.NodeProto()
            self.rewired[index].CopyFrom(link.node.proto)
        return self.rewired[index]

    def _insert(self, link: Link, i: int, node: onnx.NodeProto) -> None:
        """Put a node in front of input i."""
        before = self.before.setdefault(link.node.index, [])
        node.output[0] = f"{PREFIX}{link.node.index}.{len(before)}"
        node.name = node.output[0]
        before.append(node)
        self._node(link).input[i] = node.output[0]

    def _constant(self, value: np.ndarray[tuple[int, ...], np.dtype[np.generic]]) -> str:
        name = f"{PREFIX}constant.{len(self.constants)}"
        self.constants.append(onnx.numpy_helper.from_array(value, name))
        return name
