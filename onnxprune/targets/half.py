"""Copies of float32 models in float16, for compilers that take types as they are.

onnxruntime's converter (`onnxruntime.transformers.float16`) makes the copy; inputs and outputs keep their types. A copy
is not trusted before it has run. onnxruntime's CPU alone would tell too little: it computes most of float16 in float32
and drops the rounding between nodes, and with it what overflows. So there is a rehearsal, too: the copy with all
in float32, in which every tensor that is float16 in the copy is rounded to it and back.
"""

from __future__ import annotations

import contextlib
import importlib
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from onnxprune import flow
from onnxprune import model as models
from onnxprune.data import synthetic
from onnxprune.errors import UserError
from onnxprune.model import Array, Model
from onnxprune.outputs import unsaturated
from onnxprune.runtime import Feeds, RunError, Session, inner
from onnxprune.shapes import accepted_runs, analyse
from onnxprune.targets.messages import one_line
from onnxprune.targets.target import TargetError

LARGEST = 65504.0  # finite in float16
ENDLESS = 1e9  # from here on a number stands for infinity: fills of masks, bounds that bind nothing
_WHOLE = 2**31 - 1  # bytes of a file without external data
_TYPES = {"to", "dtype", "output_dtype"}  # attributes that name an element type
_TOGETHER = 64  # tensors that are looked at in one run
_INSTEAD = "ask for tensorrt:fp32"


@dataclass(frozen=True)
class Half:
    """The copy, with its weights inside, and what is not in float16 there.

    kept     nodes that stay in float32, between casts: operators that have no float16, and those that read or make
             what float16 cannot hold
    clipped  constants that stood for infinity and are +-65504 now
    """

    proto: onnx.ModelProto
    kept: tuple[str, ...]
    clipped: tuple[str, ...]

    def as_dict(self) -> dict[str, Any]:
        return {"types": "fp32 -> fp16", "float32": list(self.kept), "clipped": list(self.clipped)}


def converted(model: Model, tolerance: float) -> Half:
    """A float32 model in float16, whose outputs are within a tolerance, as a share of their scale, of the original's
    on two made-up inputs. Raises `TargetError`.

    Nodes that read a weight beyond 65504 stay in float32. If the outputs are wrong then, those stay, too, that make or
    read a tensor which is beyond it on these inputs.
    """
    if why := obstacle(model):
        raise TargetError(why)
    plain = _prepared(model)
    trial = _Trial(model, tolerance)
    wide = {name for name, values in _constants(model) if _lost(values)}
    sizes, stay = _sizes(plain), _touching(plain, wide)
    copy = _copy(plain, sizes | stay)
    if (wrong := trial.of(copy)) and (beyond := trial.beyond(plain)):
        stay |= _touching(plain, beyond)
        copy = _copy(plain, sizes | stay)
        wrong = trial.of(copy)
    if wrong:
        raise TargetError(wrong)
    operators, _ = converter()
    kinds = _kinds(plain)
    kept = [
        f"{node.op_type} '{node.name}'"
        for node in plain.graph.node
        if node.name in stay
        or (
            node.op_type in operators
            and node.name not in sizes
            and any(kinds.get(name) == TensorProto.FLOAT for name in (*node.input, *node.output))
        )
    ]
    halved = {tensor.name for tensor in copy.graph.initializer if tensor.data_type == TensorProto.FLOAT16}
    clipped = tuple(name for name, values in _constants(model) if name in halved and _clipped(values))
    return Half(copy, tuple(kept), clipped)


def obstacle(model: Model) -> str | None:
    """What keeps a model from being converted, as far as that is known without trying."""
    body = next((node for node in model.nodes if node.domain == flow.DOMAIN), None)
    if body is not None:
        return f"the bodies of '{body.label}' cannot be converted to fp16 and tried: {_INSTEAD}"
    size = sum(map(models.expected_bytes, model.initializers.values()))
    if size > _WHOLE:
        return (
            f"{size / 1e9:.1f} GB of weights, and onnxruntime's converter to fp16 takes {_WHOLE / 1e9:.1f}: "
            f"convert the model, or {_INSTEAD}"
        )
    return None


def _constants(model: Model) -> Iterator[tuple[str, Array]]:
    """The float32 constants."""
    for name, tensor in model.constants.items():
        if tensor.data_type == TensorProto.FLOAT:
            yield name, model.array(name)


def _endless(values: Array) -> Array:
    """Which values stand for infinity: fills below everything, and single numbers above everything."""
    found: Array = values <= -ENDLESS
    return found | (values >= ENDLESS) if values.size == 1 else found


def _lost(values: Array) -> bool:
    """Whether a value is finite, not in float16, and means itself."""
    return bool((np.isfinite(values) & (np.abs(values) > LARGEST) & ~_endless(values)).any())


def _clipped(values: Array) -> bool:
    return bool((np.isfinite(values) & (np.abs(values) > LARGEST)).any())


# Conversion


def converter() -> tuple[list[str], Any]:
    """The operators that it keeps in float32, and the function. Importing it lengthens sys.path, which is undone."""
    path = list(sys.path)
    try:
        module = importlib.import_module("onnxruntime.transformers.float16")
        return module.DEFAULT_OP_BLOCK_LIST, module.convert_float_to_float16
    except Exception as error:  # of another version, or a build without it
        raise TargetError(f"onnxruntime's converter to fp16 cannot be imported ({one_line(error)})") from None
    finally:
        sys.path[:] = path


def _prepared(model: Model) -> onnx.ModelProto:
    """A copy in which constants are initializers, those are no inputs, and every node has a name of its own.

    The converter leaves Constant nodes that hold numbers, not tensors, in float32.
    """
    proto = models.copied(models.materialised(model.proto))
    graph = proto.graph
    many = max(len(graph.input), len(graph.output))
    taken = {f"graph_{end}put_cast{i}" for end in ("in", "out") for i in range(many)}  # the converter's own
    nodes = []
    for node in graph.node:
        tensor = model.constants.get(node.output[0]) if node.op_type == "Constant" else None
        if tensor is not None:
            graph.initializer.add().CopyFrom(tensor)
            graph.initializer[-1].name = node.output[0]
            continue
        node.name = flow.fresh_name(node.name or next(filter(None, node.output), node.op_type), taken)
        nodes.append(models.copied_node(node))
    del graph.node[:]
    graph.node.extend(nodes)
    inputs = [value for value in graph.input if value.name not in model.initializers]
    if len(inputs) < len(graph.input):
        kept = [value.SerializeToString() for value in inputs]
        del graph.input[:]
        graph.input.extend(map(onnx.ValueInfoProto.FromString, kept))
    proto.ir_version = max(proto.ir_version, 4)  # before, initializers had to be inputs
    return proto


def _sizes(proto: onnx.ModelProto) -> set[str]:
    """Nodes that compute with extents and constants only: beyond 2048 float16 would miss some of these."""
    constant = {tensor.name for tensor in proto.graph.initializer}
    known: set[str] = set()
    found = set()
    for node in proto.graph.node:
        inputs = set(filter(None, node.input))
        if node.op_type in ("Shape", "Size") or (inputs & known and inputs <= known | constant):
            known.update(filter(None, node.output))
            found.add(node.name)
    return found


def _touching(proto: onnx.ModelProto, tensors: set[str]) -> set[str]:
    """Nodes that make or read one of these tensors."""
    return {node.name for node in proto.graph.node if tensors & {*node.input, *node.output}}


def _copy(plain: onnx.ModelProto, keep: set[str]) -> onnx.ModelProto:
    """A model in float16 but for some nodes. Raises `TargetError`."""
    _, convert = converter()
    try:
        made = convert(models.copied(plain), keep_io_types=True, node_block_list=sorted(keep))
        return Model(_mended(made, {node.name for node in plain.graph.node})).source
    except Exception as error:  # asserts, what onnx raises, and what is wrong with the graph that came out
        words = one_line(error) or type(error).__name__
        raise TargetError(f"onnxruntime's converter to fp16 fails ({words}): {_INSTEAD}") from None


def _mended(proto: onnx.ModelProto, names: set[str]) -> onnx.ModelProto:
    """What the converter made of nodes with these names, without casts that it makes twice where two nodes in float32
    read one tensor, and without the way through float16 from float32 to float32."""
    graph = proto.graph
    down: dict[str, str] = {}
    up: dict[str, str] = {}
    added = [node for node in graph.node if node.name not in names]
    for node in added:
        if node.attribute[0].i == TensorProto.FLOAT16:
            down[node.output[0]] = node.input[0]
    for node in added:
        if node.input[0] in down:  # to float32
            node.input[0] = down[node.input[0]]
            up[node.output[0]] = node.input[0]
    seen: set[bytes] = set()
    nodes = []
    for node in graph.node:
        for i, name in enumerate(node.input):
            node.input[i] = up.get(name, name)
        content = node.SerializeToString(deterministic=True)
        if node.name in names or content not in seen:
            nodes.append(models.copied_node(node))
        seen.add(content)
    read = {name for node in nodes for name in node.input} | {value.name for value in graph.output}
    del graph.node[:]
    graph.node.extend(node for node in nodes if node.name in names or node.output[0] in read)
    return proto


# Trust


class _Trial:
    """Inputs for a model, and what it makes of them in float32. Raises `TargetError` where it does not run."""

    def __init__(self, model: Model, tolerance: float) -> None:
        self._tolerance = tolerance
        try:
            session = Session(model.proto, optimise="basic")
            self._inputs = _inputs(model, session)
            self._wanted = [session.run(feeds) for feeds in self._inputs]
        except (UserError, RunError) as error:
            raise TargetError(f"the model cannot be tried before it is converted to fp16 ({error})") from None
        # Raised by one, as `comparison` does: near zero they say nothing in proportion to themselves.
        self._shares = {o.name for o in model.outputs if unsaturated(model, o.name) != o.name}

    def of(self, copy: onnx.ModelProto) -> str:
        """What is wrong with a copy, or with its rehearsal; empty where nothing is."""
        for proto in (copy, rehearsal(copy)):
            try:
                session = Session(proto)
                found = [session.run(feeds) for feeds in self._inputs]
            except (UserError, RunError) as error:
                return f"converted to fp16 it does not run in onnxruntime ({error}): {_INSTEAD}"
            for want, got in zip(self._wanted, found, strict=True):
                for name, value in want.items():
                    if isinstance(value, np.ndarray) and value.dtype.kind in "fiubV":  # V: bfloat16
                        why = _wrong(value, np.asarray(got[name]), self._tolerance, name in self._shares)
                        if why:
                            return f"in fp16 output '{name}' {why}: {_INSTEAD}"
        return ""

    def beyond(self, proto: onnx.ModelProto) -> set[str]:
        """Tensors of the model in float32 that hold what float16 cannot, on these inputs."""
        kinds = _kinds(proto)
        made = [name for node in proto.graph.node for name in node.output]
        names = [name for name in made if kinds.get(name) == TensorProto.FLOAT]
        found = {
            name
            for feeds in self._inputs
            for name, value in feeds.items()
            if value.dtype == np.float32 and _lost(value)
        }
        try:
            session = Session(proto, expose=inner(proto, names))
            for feeds in self._inputs:
                for i in range(0, len(names), _TOGETHER):
                    values = session.run(feeds, names[i : i + _TOGETHER])
                    found |= {name for name, value in values.items() if _lost(value)}
        except RunError as error:
            raise TargetError(f"the model cannot be tried before it is converted to fp16 ({error})") from None
        return found


def _wrong(want: Array, got: Array, tolerance: float, share: bool) -> str:
    """What is wrong with an output, in words; empty where it is near enough."""
    if want.shape != got.shape:
        return f"has the shape {list(got.shape)}, not {list(want.shape)}"
    if not want.size:
        return ""
    if want.dtype.kind in "iub":
        changed = float((want != got).mean())
        return f"differs in {changed:.1%} of its elements" if changed > tolerance else ""
    x, y = want.astype(np.float64) + share, got.astype(np.float64) + share
    finite = np.isfinite(x)
    if not np.isfinite(y[finite]).all():
        return "is not finite"
    if not finite.any():
        return ""
    far = float(np.abs(x[finite] - y[finite]).max())
    scale = max(float(np.abs(x[finite]).max()), 1e-30)
    return f"is off by {far / scale:.1%} of its scale" if far > tolerance * scale else ""


def _inputs(model: Model, session: Session) -> list[Feeds]:
    """Two inputs that suit the model, or what it accepts. Raises `UserError`, `RunError`."""
    shapes = analyse(model)
    with contextlib.suppress(UserError, RunError):
        made = [batch.feeds for batch in synthetic(model, shapes, samples=2, seed=0).batches(1)][:2]
        for feeds in made:
            session.run(feeds)
        if made:
            return made
    return [feeds for _, feeds, _ in accepted_runs(model, shapes, session.run, 2)]


_WIDE, _ROUNDED = ":wide", ":rounded"


def rehearsal(copy: onnx.ModelProto) -> onnx.ModelProto:
    """The copy in float32, every tensor of float16 rounded to it where it is made."""
    kinds = _kinds(copy)
    proto = models.copied(copy)
    graph = proto.graph
    nodes = []
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.name in _TYPES and attribute.i == TensorProto.FLOAT16:
                attribute.i = TensorProto.FLOAT
            elif attribute.type == onnx.AttributeProto.TENSOR:
                _widen(attribute.t)
        nodes.append(node)
        for i, name in enumerate(node.output):
            if kinds.get(name) == TensorProto.FLOAT16:
                node.output[i] = f"{name}{_WIDE}"
                rounded = f"{name}{_ROUNDED}"
                nodes.append(helper.make_node("Cast", [node.output[i]], [rounded], to=TensorProto.FLOAT16))
                nodes.append(helper.make_node("Cast", [rounded], [name], to=TensorProto.FLOAT))
    nodes = [models.copied_node(node) for node in nodes]
    del graph.node[:]
    graph.node.extend(nodes)
    for tensor in graph.initializer:
        _widen(tensor)
    for value in (*graph.input, *graph.output):
        if value.type.tensor_type.elem_type == TensorProto.FLOAT16:
            value.type.tensor_type.elem_type = TensorProto.FLOAT
    del graph.value_info[:]
    return proto


def _kinds(proto: onnx.ModelProto) -> Mapping[str, int]:
    """Element types of tensors, as far as onnx finds them."""
    try:
        graph = onnx.shape_inference.infer_shapes(proto).graph
    except Exception as error:  # of several classes
        raise TargetError(f"onnx cannot tell the types in the model ({one_line(error)})") from None
    values = (*graph.input, *graph.value_info, *graph.output)
    kinds = {value.name: value.type.tensor_type.elem_type for value in values}
    return kinds | {tensor.name: tensor.data_type for tensor in graph.initializer}


def _widen(tensor: onnx.TensorProto) -> None:
    if tensor.data_type == TensorProto.FLOAT16:
        values = numpy_helper.to_array(tensor).astype(np.float32)
        tensor.CopyFrom(numpy_helper.from_array(values, tensor.name))
