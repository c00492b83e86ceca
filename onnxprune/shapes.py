"""Concrete shapes and integer values of every tensor, at chosen sizes of the dynamic dimensions.

Dynamic dimensions get unusual sizes (3, 7, 224 and 160, ...), so that none is mistaken for a product
of others, and a second set of sizes tells static extents from dynamic ones. onnx's own inference does
most; what it leaves open is filled node by node, with integer shape arithmetic evaluated on the way,
and at last by one run in onnxruntime.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TypeVar, cast

import numpy as np
import onnx

from onnxprune import flow
from onnxprune.errors import UserError
from onnxprune.model import FLOATS, Array, Model, Node, copy_without_weights
from onnxprune.ops import NodeView, Unknown, control, lookup
from onnxprune.ops.spec import Evaluate, Shape
from onnxprune.ops.window import MOVED, outgrown
from onnxprune.runtime import (
    LARGEST,
    Endless,
    Feeds,
    RunError,
    Session,
    decisive_values,
    index_bounds,
    inner,
    make_feeds,
)
from onnxprune.sizes import Sizes, assignments, dim_key, dynamic_dims, is_dynamic

R = TypeVar("R")
SMALL = 4096  # elements of integer tensors whose values are followed
SMALL_FLOAT = 64
OpenShape = tuple[int | None, ...]
BAKED = (
    3  # contradictory sizes after which a dimension that fits at one size only is taken to be of that size
)
MENDED = 24  # further sizes to try
SHIFT = 5  # what extents that depend on data are changed by, to see what follows from them
INTEGERS = 10**6  # elements of an integer tensor beyond which onnx must not follow values


@dataclass
class Shapes:
    """Shapes and known values at one assignment of sizes; `other` holds those at a second one."""

    sizes: Sizes
    shapes: dict[str, Shape] = field(default_factory=dict)
    values: dict[str, Array] = field(default_factory=dict)
    elements: dict[str, int] = field(default_factory=dict)  # element types (TensorProto.DataType)
    other: Shapes | None = None
    contradictions: set[str] = field(default_factory=set)  # tensors of bodies that inference refuses to type
    open: dict[str, OpenShape] = field(default_factory=dict)  # extents that depend on data are None
    shifted: dict[str, Array] = field(default_factory=dict)  # values, had those extents been others
    failed: bool = False  # whether a run that was needed could not be made
    inferred: dict[Hashable, dict[int, onnx.TypeProto]] = field(default_factory=dict)  # what nodes alike make

    def is_dynamic(self, name: str, axis: int) -> bool:
        """Whether the extent changes with the inputs."""
        if name in self.open and self.open[name][axis] is None:
            return True
        if self.other is None:
            return False
        shape, other = self.shapes.get(name), self.other.shapes.get(name)
        return shape is None or other is None or len(shape) != len(other) or shape[axis] != other[axis]

    def static_entries(self, name: str) -> Array:
        """Mask over a known integer value: which entries do not depend on the inputs."""
        value = self.values[name]
        result = np.ones(value.shape, dtype=bool)
        others = [] if self.other is None else [self.other.values.get(name)]
        if name in self.shifted:
            others.append(self.shifted[name])
        for other in others:
            result &= value == other if other is not None and other.shape == value.shape else False
        return result

    def view(self, model: Model, node: Node) -> NodeView:
        """The node as its declaration sees it."""

        def value(i: int) -> Array | None:
            return self.values.get(node.inputs[i])

        def fixed(i: int) -> bool:
            name = node.inputs[i]
            return (
                not name
                or name in model.constants
                or (name in self.values and bool(self.static_entries(name).all()))
            )

        return NodeView(
            node.op,
            model.opset(node.domain),
            node.attributes,
            tuple(self.shapes.get(i) if i else None for i in node.inputs),
            tuple(self.shapes.get(o) if o else None for o in node.outputs),
            value,
            fixed,
            _measured(model, node),
        )


def _measured(model: Model, node: Node) -> bool:
    for output in node.outputs:
        if any(reader.op not in ("Shape", "Size") for reader in model.consumers.get(output, ())):
            return False
    return all(output.name not in node.outputs for output in model.outputs)


def analyse(model: Model) -> Shapes:
    """Shapes at the first sizes of the dynamic dimensions that are consistent, with second ones beside them."""
    try:
        return _Search(model).result()
    except Endless as error:
        raise UserError(f"{model.name}: {error}") from None


class _Search:
    """Tries sizes for the dynamic dimensions until the model accepts two sets of them.

    Some sizes contradict the graph and some only make it compute nothing (filters larger than their image);
    those of the latter kind are taken where no others are found.
    """

    def __init__(self, model: Model) -> None:
        self.model = model
        self.keys = dynamic_dims(model)
        self.base = skeleton(model)
        self.refused = _refusal(model)
        self.follow = not _explodes(model)
        self.contradictory = 0
        self.poor: list[Shapes] = []

    def result(self) -> Shapes:
        first, best, most = None, None, 0
        for shapes in self._accepted():
            if first is None:
                first = shapes
                if not self.keys:
                    return first
                continue
            differing = self._differing(first, shapes)
            if differing > most:
                most, best = differing, shapes
            if most == len(self.keys):
                break
        if first is None and self.poor:
            first = self.poor[0]
            best = next((s for s in self.poor if self._differing(first, s) == len(self.keys)), None)
            most = len(self.keys) if best is not None else 0
        if first is None:
            return self._forced()
        if best is not None and _ones(best) < _ones(first):
            first, best = best, first  # an extent of 1 is lost in products
        if most == len(self.keys) or self.contradictory >= BAKED:
            first.other = best
        elif self.keys:
            first.other = Shapes(first.sizes)  # nothing is known to be static
        return first

    def _differing(self, a: Shapes, b: Shapes) -> int:
        return sum(a.sizes[key] != b.sizes[key] for key in self.keys)

    def _accepted(self) -> Iterator[Shapes]:
        for strict in (True, False) if self.model.scopes.names else (True,):
            found = False
            mended: list[Sizes] = []
            for sizes in _trials(self.keys, mended):
                if (shapes := self._try(sizes, strict, mended)) is not None:
                    found = True
                    yield shapes
            if found:
                break

    def _try(self, sizes: Sizes, strict: bool, mended: list[Sizes]) -> Shapes | None:
        proto = self._infer(sizes, strict=True)
        if proto is None:
            self.contradictory += 1
            if self.contradictory <= MENDED and (loose := self._infer(sizes, strict=False)):
                mended += _refuted(self.model, loose, sizes)
            return None
        shapes = _complete(self.model, proto, sizes)
        if (wrong := _contradiction(self.model, shapes)) is not None:
            self.contradictory += 1
            mended += _mended(sizes, *wrong)
            return None
        if strict and self.refused(shapes):
            return None
        if shapes.failed or _empty(self.model, shapes):
            self.poor.append(shapes)
            return None
        return shapes

    def _infer(self, sizes: Sizes, strict: bool) -> onnx.ModelProto | None:
        proto = onnx.ModelProto()
        proto.CopyFrom(self.base)
        for value in proto.graph.input:
            if value.name in self.model.constants:
                continue
            for axis, dim in enumerate(value.type.tensor_type.shape.dim):
                if is_dynamic(dim):
                    dim.dim_value = sizes[dim_key(value.name, axis, dim)]
        try:
            return onnx.shape_inference.infer_shapes(proto, strict_mode=strict, data_prop=self.follow)
        except (onnx.shape_inference.InferenceError, onnx.checker.ValidationError, RuntimeError, ValueError):
            return None

    def _forced(self) -> Shapes:
        """What can be had where no sizes satisfy strict inference."""
        _refuse_invalid(self.model)
        sizes = next(assignments(self.keys))
        proto = self._infer(sizes, strict=False)
        shapes = _complete(self.model, proto or self.base, sizes)
        _run(self.model, shapes, [o for node in self.model.nodes for o in node.outputs if o])
        if self.keys:
            shapes.other = Shapes(sizes)  # nothing is known to be static
        return shapes


def _ones(shapes: Shapes) -> int:
    return list(shapes.sizes.values()).count(1)


def _empty(model: Model, shapes: Shapes) -> bool:
    """Whether something that reads a weight computes nothing, or a window is larger than what it is moved over."""
    moved = (node for node in model.nodes if node.op in MOVED)
    return any(outgrown(shapes.view(model, node)) for node in moved) or any(
        0 in shapes.shapes.get(output, ())
        for node in model.nodes
        for output in node.outputs
        if any(len(model.constants[name].dims) > 1 for name in node.inputs if name in model.constants)
        and shapes.elements.get(output) in FLOATS
    )


def _trials(keys: Mapping[str, str], mended: list[Sizes]) -> Iterator[Sizes]:
    """Sizes to try; those that are appended to `mended` on the way come first."""
    tried: list[Sizes] = []
    for sizes in assignments(keys):
        yield sizes
        while mended and len(tried) < MENDED:
            other = mended.pop(0)
            if other not in tried:
                tried.append(other)
                yield other


def _mended(sizes: Sizes, old: int, new: int) -> Iterator[Sizes]:
    """Sizes at which `old` elements may be `new`: exporters write sizes of the example into shapes."""
    for key, size in sizes.items():
        wanted, rest = divmod(size * new, old) if old else (0, 1)
        if not rest and 0 < wanted <= SMALL:
            yield {**sizes, key: wanted}


def _refuted(model: Model, inferred: onnx.ModelProto, sizes: Sizes) -> Iterator[Sizes]:
    """Sizes that may satisfy the first node which these do not: a Reshape that leaves one extent open, or a
    sum with a stored table (positions, a mask) that is as long as the example."""
    shapes = {v.name: _shape(v.type) for v in (*inferred.graph.value_info, *inferred.graph.input)}
    shapes |= {name: tuple(tensor.dims) for name, tensor in model.constants.items()}
    for node in model.nodes:
        old = shapes.get(node.inputs[0]) if node.inputs else None
        if node.domain or old is None or len(node.inputs) < 2:
            continue
        if node.op == "Reshape" and node.inputs[1] in model.constants:
            target = model.array(node.inputs[1]).ravel().tolist()
            kept = [size if entry == 0 else entry for entry, size in zip(target, old, strict=False)]
            stated = -math.prod(kept + target[len(kept) :]) if -1 in target else 0
            if stated > 0 and math.prod(old) % stated:
                for size in dict.fromkeys(sizes.values()):  # what is left open may be any of them
                    yield from _mended(sizes, math.prod(old), size * stated)
                return
        elif node.op in _BROADCASTING and (other := shapes.get(node.inputs[1])) is not None:
            for a, b in zip(old[::-1], other[::-1], strict=False):
                if a != b and 1 not in (a, b):
                    yield from _mended(sizes, a, b)
                    yield from _mended(sizes, b, a)
                    return


_BROADCASTING = {"Add", "Sub", "Mul", "Div"}


def _refusal(model: Model) -> Callable[[Shapes], bool]:
    """Says whether sizes are wrong, of a graph with bodies, which onnx's own inference does not judge."""
    if not model.scopes.names:
        return lambda _: False
    try:
        session = Session(model.proto)
    except RunError:
        return lambda shapes: bool(shapes.contradictions)

    def refused(shapes: Shapes) -> bool:
        if shapes.contradictions:
            return True
        bounds = index_bounds(model, shapes.shapes)
        for way in decisive_values(model):
            try:
                session.run(make_feeds(model, shapes.sizes, 0, bounds, way))
                return False
            except RunError:
                continue
        return True

    return refused


def accepted_runs(
    model: Model, shapes: Shapes, run: Callable[[Feeds], R], count: int
) -> list[tuple[Sizes, Feeds, R]]:
    """Up to `count` runs on seeded inputs, at sizes of the dynamic dimensions that the model accepts.

    Raises `RunError`, the first one met, if it accepts none.
    """
    bounds = index_bounds(model, shapes.shapes)
    runs: list[tuple[Sizes, Feeds, R]] = []
    failure: RunError | None = None
    ways = decisive_values(model)
    left = list(ways)
    for seed, sizes in enumerate(_candidate_sizes(model, shapes)):
        for way in left or ways[:1]:
            try:
                feeds = make_feeds(model, sizes, seed, bounds, way)
                runs.append((sizes, feeds, run(feeds)))
            except RunError as error:
                failure = failure or error
                continue
            left = [other for other in left if other is not way]
            break
        if len(runs) >= count and not left:
            break
    if not runs and failure is not None:
        raise failure
    return runs


def _candidate_sizes(model: Model, shapes: Shapes) -> Iterator[Sizes]:
    """Most telling first."""
    yield shapes.sizes
    if shapes.other is not None and shapes.other.sizes != shapes.sizes:
        yield shapes.other.sizes
    keys = dynamic_dims(model)
    if keys:
        yield from assignments(keys)
        yield from (dict.fromkeys(keys, size) for size in (1, 2, 8, 32, 64, 256))
    yield shapes.sizes


def skeleton(model: Model) -> onnx.ModelProto:
    """The model with its large constants turned into typed inputs: cheap to infer shapes on."""
    proto = onnx.ModelProto()
    copy_without_weights(model.proto, proto)
    graph = proto.graph
    del graph.value_info[:]
    for output in graph.output:
        output.type.tensor_type.ClearField("shape")
    listed = {i.name for i in graph.input}
    heavy = {name for name, t in model.constants.items() if not _followed(t)}
    if (
        model.scopes.names
    ):  # what a branch that never runs says is no contradiction: bodies are left to `_complete`
        graph.ClearField("sparse_initializer")
        proto.opset_import.add(domain=flow.DOMAIN, version=1)
    nodes = [
        n
        for n in graph.node
        if not (n.op_type == "Constant" and n.output[0] in heavy) and not any(map(model.scopes.of, n.output))
    ]
    if len(nodes) < len(graph.node):
        del graph.node[:]
        graph.node.extend(nodes)
    for name, tensor in model.constants.items():
        if name in heavy:
            if name not in listed:
                graph.input.append(
                    onnx.helper.make_tensor_value_info(name, tensor.data_type, list(tensor.dims))
                )
        elif name in model.initializers:
            graph.initializer.append(tensor)
    return proto


def _followed(tensor: onnx.TensorProto) -> bool:
    return math.prod(tensor.dims) <= (SMALL_FLOAT if tensor.data_type in FLOATS else SMALL)


def _explodes(model: Model) -> bool:
    """Whether integers grow without bound on the way (Concat of a tensor with itself, again and again; one for
    each row of an input of absurd size); inference would follow every one of them."""
    for value in model.inputs:
        if math.prod(max(dim.dim_value, 1) for dim in value.type.tensor_type.shape.dim) > LARGEST:
            return True
    sizes = {name: math.prod(t.dims) for name, t in model.constants.items() if t.data_type not in FLOATS}
    for node in model.nodes:
        if node.op == "Concat":
            sizes[node.outputs[0]] = sum(sizes.get(name, 0) for name in node.inputs)
        elif any(name in sizes for name in node.inputs):
            largest = max(sizes.get(name, 0) for name in node.inputs)
            sizes.update(dict.fromkeys(node.outputs, largest))
    return max(sizes.values(), default=0) > INTEGERS


_CONTRADICTION = ("ShapeInferenceError", "TypeInferenceError", "Type Error", "INVALID_GRAPH")


def _refuse_invalid(model: Model) -> None:
    """Refuse a model that inference finds contradictory and onnxruntime, too."""
    try:
        Session(model.proto)
    except RunError as error:
        if any(word in str(error) for word in _CONTRADICTION) and "No Op registered" not in str(error):
            raise UserError(f"{model.name}: {error}; the model is invalid, export it again") from None


def _contradiction(model: Model, shapes: Shapes) -> tuple[int, int] | None:
    """The elements that the first wrong Reshape reads and makes: inference does not check computed targets."""
    for node in model.nodes:
        if node.op == "Reshape" and node.domain == "":
            old, new = shapes.shapes.get(node.inputs[0]), shapes.shapes.get(node.outputs[0])
            if old is not None and new is not None and math.prod(old) != math.prod(new):
                return math.prod(old), math.prod(new)
    return None


def _complete(model: Model, inferred: onnx.ModelProto, sizes: Sizes) -> Shapes:
    """Follow the graph once: take what inference found, evaluate integers, fill holes node by node."""
    graph = inferred.graph
    types = {v.name: v.type for v in (*graph.output, *graph.value_info, *graph.input)}
    result = Shapes(sizes)
    for name, type_ in types.items():
        if (shape := _shape(type_)) is not None:
            result.shapes[name] = shape
    for name, tensor in model.constants.items():
        result.shapes[name] = tuple(tensor.dims)
        if _followed(tensor):
            result.values[name] = model.array(name)
    result.elements = {n: t.tensor_type.elem_type for n, t in types.items()}
    result.elements |= {n: t.data_type for n, t in model.constants.items()}
    for node in model.nodes:
        if node.outputs and node.outputs[0] in model.constants:
            continue
        missing = any(o and o not in result.shapes for o in node.outputs)
        if missing and node.domain == flow.DOMAIN:
            _infer_flow(model, node, result)
        elif missing:
            _infer_node(model, node, result)
        _evaluate_declared(model, node, result)
    _excuse(model, result)
    if _contradiction(model, result) is None:  # else these sizes are passed over, and not worth a run
        unknown = [o for node in model.nodes for o in node.outputs if o and o not in result.shapes]
        _run(model, result, unknown)
        _follow_measured(model, result, result.shapes.keys() & set(unknown))
    return result


def _follow_measured(model: Model, result: Shapes, measured: set[str]) -> None:
    """What follows from shapes that a run gave: integer values, and which extents come from data.

    Where inference cannot tell an extent although it knows the operands, the extent is data (how many
    elements are not zero). Operators that inference does not know have extents that follow from shapes.
    """
    if not measured:
        return
    shifted = Shapes(result.sizes, dict(result.shapes), dict(result.values), result.elements)
    for node in model.nodes:
        for name in measured.intersection(node.outputs):
            if (known := _extents_known(model, node, name, result, shifted)) is not None:
                result.open[name] = known
                pairs = zip(result.shapes[name], known, strict=True)
                shifted.shapes[name] = tuple(size + SHIFT if dim is None else size for size, dim in pairs)
        if node.outputs and node.outputs[0] not in result.values:
            _evaluate_declared(model, node, result)
            if result.open:
                _evaluate_declared(model, node, shifted)
            for name in node.outputs:
                if name in result.values and result.open:
                    result.shifted[name] = shifted.values.get(name, np.empty(0))
                elif name in result.values:
                    shifted.values[name] = result.values[name]


def _extents_known(model: Model, node: Node, name: str, result: Shapes, shifted: Shapes) -> OpenShape | None:
    """The shape of a measured output with None for extents that are data; None if there are none. Those that
    a value states which is data are others where it is shifted."""
    if _schema(model, node) is None and not any(None in result.open.get(i, ()) for i in node.inputs):
        return None
    shape = result.shapes[name]
    known: list[int | None] = list(shape)
    for values in (result, shifted):
        types = _inferred(model, node, values, result.shapes | result.open)
        dims = _open_shape(types[name]) if name in types else None
        if dims is None or len(dims) != len(shape):
            return (None,) * len(shape)
        known = [size if size == dim else None for size, dim in zip(known, dims, strict=True)]
    return tuple(known) if None in known else None


def _evaluate_declared(model: Model, node: Node, result: Shapes) -> None:
    spec = lookup(node.domain, node.op, model.opset(node.domain))
    if spec is not None and spec.evaluate is not None:
        _evaluate(model, node, spec.evaluate, result)


def _run(model: Model, result: Shapes, wanted: list[str]) -> None:
    """Shapes that inference cannot give (functions, fused operators) or gets wrong, from one run in
    onnxruntime."""
    wanted = [name for name in wanted if not model.scopes.of(name)]
    if not wanted or any(math.prod(shape) > LARGEST for shape in result.shapes.values()):
        return
    try:
        session = Session(model.proto, expose=inner(model.proto, wanted))
    except RunError:
        return
    try:
        values = session.run(make_feeds(model, result.sizes, 0, {}), wanted)
    except RunError:
        result.failed = True
        return
    for name, value in values.items():
        if isinstance(value, np.ndarray) and not (1 in value.shape and _chosen(model, name)):
            result.shapes[name] = value.shape
            result.elements[name] = onnx.helper.np_dtype_to_tensor_dtype(value.dtype)


def _chosen(model: Model, name: str) -> bool:
    """Whether a decision made the tensor, of branches that differ: an extent of 1 may be another in the next."""
    node = model.producers.get(name)
    return node is not None and node.domain == flow.DOMAIN and node.op == "If"


def _shape(type_: onnx.TypeProto) -> Shape | None:
    dims = _open_shape(type_)
    return None if dims is None or None in dims else cast(Shape, dims)


def _open_shape(type_: onnx.TypeProto) -> OpenShape | None:
    if not type_.HasField("tensor_type") or not (tensor := type_.tensor_type).HasField("shape"):
        return None
    return tuple(
        size if (size := dim.dim_value) > 0 or (size == 0 and dim.HasField("dim_value")) else None
        for dim in tensor.shape.dim
    )


def _evaluate(model: Model, node: Node, evaluate: Evaluate, result: Shapes) -> None:
    """Integer shape arithmetic: the values of a node whose inputs are all known and small."""
    shape_only = node.op in ("Shape", "Size")
    if not shape_only and any(i and i not in result.values for i in node.inputs):
        return
    inputs = [] if shape_only else [result.values[i] if i else None for i in node.inputs]
    try:
        if node.op == "ConstantOfShape" and node.outputs[0] not in result.shapes:
            result.shapes[node.outputs[0]] = tuple(int(v) for v in np.ravel(inputs[0]))  # type: ignore[arg-type]
        known = result.shapes.get(node.outputs[0])
        if known is not None and math.prod(known) > SMALL:
            return
        with np.errstate(all="ignore"):
            outputs = evaluate(result.view(model, node), inputs)
    except (Unknown, ValueError, TypeError, IndexError, ZeroDivisionError, OverflowError):
        return
    for name, value in zip(node.outputs, outputs, strict=False):
        if name and value.size <= SMALL:
            result.values[name] = value
            result.shapes[name] = value.shape


def _excuse(model: Model, result: Shapes) -> None:
    """Forget contradictions in branches that do not run at these sizes."""
    idle = set()
    for node in model.nodes:
        if node.domain == flow.DOMAIN and node.op == "If":
            condition = result.values.get(node.inputs[0])
            if condition is not None and condition.size == 1:
                idle.add(node.attributes["scope"] + int(condition.item()))
    result.contradictions = {
        name for name in result.contradictions if idle.isdisjoint(model.scopes.chain(model.scopes.of(name)))
    }


def _infer_flow(model: Model, node: Node, result: Shapes) -> None:
    """Shapes of what enters or leaves a body."""
    view = result.view(model, node)
    counters = (onnx.TensorProto.INT64, onnx.TensorProto.BOOL)  # the first inputs of a Loop's body
    for i, (name, shape, sources) in enumerate(
        zip(node.outputs, control.shapes(view), control.sources(view), strict=True)
    ):
        if shape is not None:
            result.shapes.setdefault(name, shape)
        known = [result.elements.get(node.inputs[source.input], 0) for source in sources]
        result.elements[name] = next(filter(None, known), 0) if sources else counters[i]


def _infer_node(model: Model, node: Node, result: Shapes) -> None:
    """Shape inference of one node, with the values found so far."""
    for name, type_ in _inferred(model, node, result, result.shapes).items():
        if not result.elements.get(name):
            result.elements[name] = type_.tensor_type.elem_type
        if (shape := _shape(type_)) is not None:
            result.shapes.setdefault(name, shape)


def _schema(model: Model, node: Node) -> onnx.defs.OpSchema | None:
    try:
        return onnx.defs.get_schema(node.op, model.opset(node.domain), node.domain)
    except onnx.defs.SchemaError:
        return None


def _inferred(
    model: Model, node: Node, result: Shapes, shapes: Mapping[str, OpenShape]
) -> Mapping[str, onnx.TypeProto]:
    """Types of a node's outputs from those of its inputs; empty where nothing can be said."""
    schema = _schema(model, node)
    if schema is None:
        return {}
    names = dict.fromkeys(filter(None, (*node.inputs, *node.captured)))
    if not all(result.elements.get(name) for name in names):
        return {}
    key = None if node.captured else _likeness(node, result, shapes)
    if key in result.inferred:
        return {node.outputs[i]: type_ for i, type_ in result.inferred[key].items()}
    inputs = {
        name: onnx.helper.make_tensor_type_proto(result.elements[name], shapes.get(name)) for name in names
    }
    data = {
        name: onnx.numpy_helper.from_array(np.asarray(result.values[name], order="C"), name)
        for name in names
        if name in result.values
    }
    try:
        types: Mapping[str, onnx.TypeProto] = onnx.shape_inference.infer_node_outputs(
            schema,
            node.proto,
            inputs,
            data,
            opset_imports=list(model.proto.opset_import),
            ir_version=model.proto.ir_version,
        )
    except (
        onnx.shape_inference.InferenceError,
        onnx.checker.ValidationError,
        KeyError,
        RuntimeError,
        ValueError,
    ):
        result.contradictions.update(name for name in node.outputs if model.scopes.of(name))
        return {}
    if key is not None:
        result.inferred[key] = {i: types[name] for i, name in enumerate(node.outputs) if name in types}
    return types


def _likeness(node: Node, result: Shapes, shapes: Mapping[str, OpenShape]) -> Hashable:
    """What inference sees of a node but for names: a deep network repeats its layers."""
    operands: list[Hashable] = []
    for name in node.inputs:
        operands += node.inputs.index(name), result.elements.get(name), shapes.get(name)
        if (value := result.values.get(name)) is not None:
            operands += value.dtype.str, value.shape, value.tobytes()
    attributes = (attribute.SerializeToString(deterministic=True) for attribute in node.proto.attribute)
    return node.op, node.domain, *map(bool, node.outputs), *attributes, "", *operands
