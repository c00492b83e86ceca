"""A model in parts, run one after the other, so that few of its weights are in memory at a time.

The graph is cut where float activations pass from one part to the next; what is cheap (shape arithmetic,
masks, positions) is computed again in every part that reads it. Large weights are fed as inputs, straight
from where they are stored.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

import onnx

from onnxprune import flow
from onnxprune.model import FLOATS, Array, Model, copy_without_weights, expected_bytes, to_array
from onnxprune.runtime import Feeds, Session, inner
from onnxprune.shapes import Shapes

WHOLE = 2**30  # bytes of weights of a model that is run at once
PART = 2**28  # bytes of weights in a part, unless one tensor is larger
LARGE = 2**20  # bytes of a weight that is fed


@dataclass(frozen=True, slots=True)
class Part:
    """Tensors to compute, from the graph's inputs and from what earlier parts have computed."""

    outputs: tuple[str, ...]
    known: frozenset[str]


def too_large(model: Model) -> bool:
    """Whether a model is to be run in parts."""
    flat = not any(node.captured or node.domain == flow.DOMAIN for node in model.nodes)
    return flat and sum(map(expected_bytes, model.constants.values())) > WHOLE


def partition(model: Model, shapes: Shapes, shared: Collection[str], results: Sequence[str]) -> list[Part]:
    """Parts of bounded weight whose borders are among the `shared` tensors; the last ones give `results`."""
    heavy = _behind_large_weights(model)

    def passes(name: str) -> bool:
        known = name in shared and name in heavy and name in shapes.shapes
        return known and shapes.elements.get(name) in FLOATS

    last_read = {name: i for i, node in enumerate(model.nodes) for name in (*node.inputs, *node.captured)}
    last_read |= dict.fromkeys(results, len(model.nodes))
    for node in reversed(model.nodes):  # what is computed again needs its operands for as long as it is read
        again = max((last_read.get(name, -1) for name in node.outputs if not passes(name)), default=-1)
        last_read |= {name: max(last_read.get(name, -1), again) for name in node.inputs}
    parts: list[Part] = []
    known: frozenset[str] = frozenset()
    live: dict[str, None] = {}
    size = 0
    read: set[str] = set()
    for i, node in enumerate(model.nodes):
        fresh = {name for name in node.inputs if name in model.constants} - read
        cost = sum(expected_bytes(model.constants[name]) for name in fresh)
        if size and size + cost > PART:
            border = tuple(name for name in live if last_read.get(name, -1) >= i)
            parts.append(Part(tuple(name for name in border if name not in known), known))
            known |= frozenset(border)
            live = dict.fromkeys(border)
            size, read = 0, set()
        read |= fresh
        size += cost
        live |= dict.fromkeys(filter(passes, node.outputs))
    parts.append(Part(tuple(name for name in results if name not in known), known))
    return [part for part in parts if part.outputs]


def _behind_large_weights(model: Model) -> set[str]:
    """Tensors that cost something to compute."""
    found = {name for name, t in model.constants.items() if expected_bytes(t) >= LARGE}
    for node in model.nodes:
        if not found.isdisjoint(node.inputs) and node.op not in ("Shape", "Size"):
            found.update(filter(None, node.outputs))
    return found


def closure(
    proto: onnx.ModelProto, wanted: Iterable[str], known: Collection[str] = ()
) -> tuple[list[int], set[str]]:
    """Indices of the nodes that some tensors need, and the tensors that these read from elsewhere: those that are
    known, inputs and weights."""
    makers = {output: i for i, node in enumerate(proto.graph.node) for output in node.output if output}
    nodes: set[int] = set()
    outside: set[str] = set()
    waiting = list(wanted)
    while waiting:
        name = waiting.pop()
        index = makers.get(name)
        if index is None or name in known:
            outside.add(name)
        elif index not in nodes:
            nodes.add(index)
            waiting.extend(filter(None, proto.graph.node[index].input))
    return sorted(nodes), outside


class Runner:
    """Runs parts of one graph, which may be a changed copy of the model that was partitioned."""

    def __init__(self, proto: onnx.ModelProto) -> None:
        self.proto = proto
        self._weights = {tensor.name: tensor for tensor in proto.graph.initializer}
        self._inputs = {value.name: value for value in proto.graph.input}

    def run(self, part: Part, feeds: Sequence[Feeds]) -> list[dict[str, Array]]:
        """The part's outputs for each of several feeds; what a feed does not hold is not read.

        Raises `RunError` if onnxruntime refuses the part.
        """
        indices, names = closure(self.proto, part.outputs, part.known)
        proto, weights = self._extract(part, indices, names, feeds[0])
        session = Session(proto)
        return [session.run({**feed, **weights}, list(part.outputs)) for feed in feeds]

    def _extract(
        self, part: Part, indices: Sequence[int], outside: Collection[str], feed: Mapping[str, Array]
    ) -> tuple[onnx.ModelProto, Feeds]:
        """The part as a model, and its large weights, to be fed."""
        proto = onnx.ModelProto()
        copy_without_weights(self.proto, proto)
        graph = proto.graph
        for field in (graph.node, graph.input, graph.output, graph.value_info, graph.quantization_annotation):
            del field[:]
        graph.node.extend(self.proto.graph.node[i] for i in indices)
        weights: Feeds = {}
        for name in sorted(outside):
            tensor = self._weights.get(name)
            if name in self._inputs and tensor is None:
                graph.input.append(self._inputs[name])
            elif tensor is None:
                element = onnx.helper.np_dtype_to_tensor_dtype(feed[name].dtype)
                graph.input.append(onnx.helper.make_tensor_value_info(name, element, None))
            elif expected_bytes(tensor) >= LARGE and tensor.data_type in FLOATS:
                weights[name] = to_array(tensor)
                graph.input.append(
                    onnx.helper.make_tensor_value_info(name, tensor.data_type, list(tensor.dims))
                )
            else:
                graph.initializer.append(tensor)
        graph.output.extend(onnx.ValueInfoProto(name=name) for name in part.outputs)
        return proto, weights


def inner_values(model: Model, shapes: Shapes, wanted: Sequence[str]) -> Callable[[Feeds], dict[str, Array]]:
    """A function from inputs to float tensors of the model, which runs it in parts where it is too large.

    Raises `RunError`, then or later, if onnxruntime cannot run the model.
    """
    if not too_large(model):
        session = Session(model.proto, expose=inner(model.proto, wanted))
        return lambda feeds: session.run(feeds, wanted)
    runner = Runner(model.proto)
    parts = partition(model, shapes, model.producers.keys(), wanted)

    def run(feeds: Feeds) -> dict[str, Array]:
        values: dict[str, Array] = dict(feeds)
        for part in parts:
            values |= runner.run(part, [values])[0]
        return {name: values[name] for name in wanted}

    return run


def ancestors(
    proto: onnx.ModelProto, wanted: Sequence[str], known: Mapping[str, Array] = MappingProxyType({})
) -> onnx.ModelProto:
    """What it takes to compute some tensors, as a model that gives them; tensors that are inputs are left out.

    known  tensors that need not be computed: they become inputs
    """
    indices, outside = closure(proto, wanted, known)
    part = onnx.ModelProto()
    copy_without_weights(proto, part)
    graph = part.graph
    weights = {tensor.name for tensor in proto.graph.initializer}
    given = {value.name for value in proto.graph.input} - weights
    inputs = [value for value in proto.graph.input if value.name in given]
    for field in (graph.node, graph.input, graph.output, graph.value_info, graph.quantization_annotation):
        del field[:]
    graph.input.extend(inputs)
    for name in known:
        if name in outside and name not in given:
            element = onnx.helper.np_dtype_to_tensor_dtype(known[name].dtype)
            graph.input.append(onnx.helper.make_tensor_value_info(name, element, None))
    graph.node.extend(proto.graph.node[i] for i in indices)
    graph.initializer.extend(tensor for tensor in proto.graph.initializer if tensor.name in outside)
    part.ir_version = max(part.ir_version, 4)  # before, weights had to be inputs
    graph.output.extend(
        onnx.ValueInfoProto(name=name)
        for name in dict.fromkeys(wanted)
        if name not in given and name not in known
    )
    return part
