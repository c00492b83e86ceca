"""What the parts of a network are: attention heads, neurons, the residual stream and its blocks.

All of it is found by structure on the dependency graph, never by names:

    heads        what stays side by side when two activations are multiplied (the batch of Q K^T)
    head-width   what that product sums over, or takes from one of its operands alone
    hidden       the width of a residual stream: an axis of a sum `x + f(x)`
    ffn          neurons between two matrix products (or 1x1 convolutions, a depthwise one between)
    channels     everything else
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Literal

from onnxprune import axes
from onnxprune.axes import Axis, Const, Var
from onnxprune.dependency import (
    DependencyGraph,
    Group,
    Link,
    Occurrence,
    is_window,
    pattern_labels,
)
from onnxprune.model import Node, uncollected

Role = Literal["heads", "head-width", "hidden", "ffn", "channels"]
BlockKind = Literal["attention", "convolution", "ffn"]

NEAR = 64  # nodes between a residual stream and a block that may be shared with other blocks (a norm)
STREAM = 8  # steps that a residual stream is followed back


@dataclass(frozen=True, slots=True)
class Block:
    """A residual block: `join` adds `branch` to `stream`, and the branch is made from the stream.

    name     the label of the join; its output where several nodes bear that
    fused    whether the join goes on to normalise the sum
    stream   the position of the operand that goes on without the block
    branch   the position of the operand that the block makes
    nodes    what nothing else reads: they go with the block
    """

    name: str
    kind: BlockKind
    join: Node
    stream: int
    branch: int
    fused: bool
    nodes: tuple[Node, ...]


class Blocks:
    """The parts of a model."""

    @uncollected
    def __init__(self, graph: DependencyGraph) -> None:
        self.graph = graph
        self.links = {link.node.index: link for link in graph.links}
        self.variable = _variable(graph)
        self.readers = _readers(graph)
        self.summed = _vars(
            link.labels[name] for link in graph.links if link.rule.macs for name in link.contracted()
        )
        products = self._products()
        heads, inner, alone = map(_vars, products)
        self.widths = inner | alone
        self.heads = heads | self._repeats(alone, inner)
        self.cached = self._cached(products[0])
        self._labels = Counter(node.label for node in graph.model.nodes)
        self.residual = tuple(self._residual())
        self._by_name = {block.name: block for block in self.residual}
        self.hidden = frozenset(var for block in self.residual for var in self._stream_vars(block))

    def role(self, group: Group) -> Role:
        if group.var in self.heads:
            return "heads"
        if group.var in self.hidden:
            return "hidden"
        if group.var in self.widths or any(sibling.var in self.heads for sibling in group.siblings):
            return "head-width"
        return "ffn" if self._neurons(group) else "channels"

    def named(self, name: str) -> Block:
        """The residual block of this name. Raises `KeyError`."""
        return self._by_name[name]

    def gone(self, blocks: Iterable[Block]) -> frozenset[int]:
        """Indices of the nodes that go when all these blocks are removed."""
        chosen = list(blocks)
        nodes = self._unread([(block.join, block.join.inputs[block.branch]) for block in chosen])
        joins = {block.join.index for block in chosen if not block.fused}
        return frozenset(node.index for node in nodes) | joins

    # ------------------------------------------------------------------------- heads and neurons

    def _products(self) -> tuple[list[Axis], list[Axis], list[Axis]]:
        """Of all products of activations, and of fused attention, the axes of heads, those summed over and
        those of one operand alone."""
        heads: list[Axis] = []
        inner: list[Axis] = []
        alone: list[Axis] = []
        for link in self.graph.links:
            heads += [link.labels[name] for name in link.rule.heads if name in link.labels]
            recurrent = link.rule.tied and not link.rule.heads  # a state is no factor of the input
            if not link.rule.macs or recurrent:
                continue
            operands = [
                set(pattern_labels(pattern))
                for i, pattern in enumerate(link.rule.inputs[: len(link.node.inputs)])
                if pattern and link.node.inputs[i] in self.variable
            ]
            if len(operands) < 2:
                continue
            made = set(pattern_labels(link.rule.outputs[0] or ()))
            for name in sorted(set.union(*operands) & link.labels.keys() - set(link.rule.heads)):
                shared = sum(name in operand for operand in operands) > 1
                (inner if name not in made else heads if shared else alone).append(link.labels[name])
        return heads, inner, alone

    def _repeats(self, alone: frozenset[Var], inner: frozenset[Var]) -> frozenset[Var]:
        """Query heads that share their keys, which lack the axis: what else makes up a width that is
        summed over."""
        outer = alone - inner
        return frozenset(
            group.var
            for group in self.graph.groups
            if group.var in outer and any(sibling.var in inner for sibling in group.siblings)
        )

    def _cached(self, heads: Iterable[Axis]) -> tuple[str, ...]:
        """Why weights that make heads are pinned by a graph input or output: keys and values are kept
        outside, in a cache."""
        shared = {id(leaf) for axis in heads for leaf in axes.leaves(axes.resolve(axis))}
        found: dict[str, None] = {}
        for pinned in self.graph.pinned:
            typed = self.graph.axes_of(pinned.node, list(pinned.node.inputs).index(pinned.tensor)) or []
            for leaf in axes.leaves(axes.resolve(typed[pinned.axis])):
                if isinstance(leaf, Const) and id(leaf) in shared and leaf.reason.kind == "interface":
                    found[leaf.reason.text] = None
        return tuple(found)

    def _neurons(self, group: Group) -> bool:
        """Whether every weight that makes or reads the units is a matrix, a 1x1 or a depthwise filter."""
        weights = [o for o in group.occurrences if o.role in ("produce", "consume")]
        between = group.var in self.summed and any(o.role == "produce" for o in weights)
        return between and all(map(self._matrix, weights))

    def _matrix(self, occurrence: Occurrence) -> bool:
        link = self.links[occurrence.node.index]
        typed = self.graph.axes_of(occurrence.node, occurrence.input) or []
        wide = [axis for i, axis in enumerate(typed) if i != occurrence.axis and axis.extent > 1]
        windows = [axis for axis in wide if _is_window(axis)]
        stored = link.node.outputs[0] not in self.variable  # a weight that is made from others (quantised)
        if "hidden_size" in link.rule.attributes or not (link.rule.macs or stored):
            return False
        return not windows or (occurrence.role == "produce" and len(windows) == len(wide))

    # --------------------------------------------------------------------------- residual blocks

    def _residual(self) -> Iterator[Block]:
        joins: dict[int, Block] = {}
        for link in self.graph.links:
            block = self._block(link, joins) if len(link.rule.adds) == 2 else None
            if block is not None:
                joins[link.node.index] = block
                yield block

    def _block(self, link: Link, joins: dict[int, Block]) -> Block | None:
        join = link.node
        shapes = self.graph.shapes.shapes
        for stream, branch in (link.rule.adds, link.rule.adds[::-1]):
            names = join.inputs[stream], join.inputs[branch]
            alike = shapes.get(names[0]) == shapes.get(names[1]) == shapes.get(join.outputs[0])
            if not alike or not self.variable.issuperset(names) or names[0] == names[1]:
                continue
            nodes = self._unread([(join, names[1])], frozenset(joins))
            weighs = any(self._weighs(node) for node in nodes)
            if weighs and self._enters(nodes, self._trace(names[0], joins)):
                name = join.label if self._labels[join.label] == 1 else join.outputs[0]
                fused = bool(link.rule.lossy)
                return Block(name, self._kind(nodes), join, stream, branch, fused, tuple(nodes))
        return None

    def _weighs(self, node: Node) -> bool:
        """Whether a node multiplies an activation with weights."""
        link = self.links.get(node.index)
        return link is not None and bool(link.rule.macs) and not self.variable.issuperset(node.inputs)

    def _unread(self, cuts: Iterable[tuple[Node, str]], inner: frozenset[int] = frozenset()) -> list[Node]:
        """The nodes that nothing reads once each (reader, tensor) of `cuts` is gone; none if one of
        them is in `inner`."""
        producers = self.graph.model.producers
        left: dict[int, int] = {}
        found: list[Node] = []
        waiting = [tensor for _, tensor in cuts]
        while waiting:
            node = producers.get(waiting.pop())
            if node is None:
                continue
            left[node.index] = left.get(node.index, self.readers.get(node.index, 0)) - 1
            if left[node.index] == 0:
                if node.index in inner:
                    return []
                found.append(node)
                waiting += (name for name in (*node.inputs, *node.captured) if name)
        return sorted(found, key=lambda node: node.index)

    def _trace(self, tensor: str, joins: dict[int, Block]) -> set[str]:
        """The tensor, and what it was before earlier blocks were added to it."""
        seen = {tensor}
        for _ in range(STREAM):
            producer = self.graph.model.producers.get(tensor)
            if producer is None:
                break
            if producer.index in joins:
                tensor = producer.inputs[joins[producer.index].stream]
            elif self._moves(producer):
                tensor = producer.inputs[0]
            else:
                break
            seen.add(tensor)
        return seen

    def _moves(self, node: Node) -> bool:
        """Whether a node hands every element of its first input on."""
        shapes = self.graph.shapes.shapes
        old, new = shapes.get(node.inputs[0]) if node.inputs else None, shapes.get(node.outputs[0])
        if old is None or new is None or sorted(s for s in old if s > 1) != sorted(s for s in new if s > 1):
            return False
        link = self.links.get(node.index)
        rest = any(name in self.variable for name in node.inputs[1:])
        return link is not None and not (rest or link.rule.macs or link.rule.lossy or link.rule.pinned)

    def _enters(self, nodes: list[Node], stream: set[str]) -> bool:
        """Whether the nodes read the stream, at once or through a few nodes shared with other blocks."""
        made = {output for node in nodes for output in node.outputs}
        entries = {i for node in nodes for i in node.inputs if i in self.variable} - made
        return any(self._comes_from(entry, stream) for entry in sorted(entries))

    def _comes_from(self, tensor: str, stream: set[str]) -> bool:
        """Whether all that a tensor depends on, a few nodes back, is in the stream."""
        waiting, seen = [tensor], {tensor}
        while waiting:
            name = waiting.pop()
            producer = self.graph.model.producers.get(name)
            if name in stream or (producer is not None and not stream.isdisjoint(producer.outputs)):
                continue
            if producer is None or len(seen) > NEAR:
                return False
            fresh = {i for i in producer.inputs if i in self.variable} - seen
            seen |= fresh
            waiting += fresh
        return True

    def _kind(self, nodes: list[Node]) -> BlockKind:
        links = [self.links[node.index] for node in nodes if node.index in self.links]
        if any(self._attends(link) for link in links):
            return "attention"
        filters = (
            axis
            for link in links
            for name, operand in zip(link.node.inputs, link.inputs, strict=False)
            if name not in self.variable
            for axis in operand or ()
        )
        return "convolution" if any(map(_is_window, filters)) else "ffn"

    def _attends(self, link: Link) -> bool:
        operands = sum(name in self.variable for name in link.node.inputs)
        return bool(link.rule.heads) or (bool(link.rule.macs) and operands > 1)

    def _stream_vars(self, block: Block) -> Iterator[Var]:
        for axis in self.graph.types.get(block.join.outputs[0]) or ():
            yield from axes.free_vars(axis)


def _vars(typed: Iterable[Axis]) -> frozenset[Var]:
    return frozenset(var for axis in typed for var in axes.free_vars(axis))


def _is_window(axis: Axis) -> bool:
    resolved = axes.resolve(axis)
    return isinstance(resolved, Const) and resolved.extent > 1 and is_window(resolved.reason)


def _variable(graph: DependencyGraph) -> set[str]:
    """Tensors whose values depend on those of a graph input."""
    found = {value.name for value in graph.model.inputs}
    for node in graph.model.nodes:
        reads = not found.isdisjoint(node.inputs) or not found.isdisjoint(node.captured)
        if reads and node.op not in ("Shape", "Size"):
            found.update(filter(None, node.outputs))
    return found


def _readers(graph: DependencyGraph) -> dict[int, int]:
    """How often anything reads an output of each node."""
    model = graph.model
    count: dict[int, int] = {}
    for node in model.nodes:
        for name in (*node.inputs, *node.captured):
            if (producer := model.producers.get(name)) is not None:
                count[producer.index] = count.get(producer.index, 0) + 1
    for output in model.outputs:
        if (producer := model.producers.get(output.name)) is not None:
            count[producer.index] = count.get(producer.index, 0) + 1
    return count
