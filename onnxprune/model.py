"""The only door to ONNX files: load, check, look up, save.

`Model` is a read-only view of a ModelProto: its nodes in a canonical topological order (independent
of the order in the file), its constants (initializers and Constant nodes) and who reads what.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import gc
import hashlib
import heapq
import math
import os
import secrets
import stat
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath
from types import MappingProxyType
from typing import Any, NoReturn, ParamSpec, TypeVar

import google.protobuf.message
import numpy as np
import numpy.typing as npt
import onnx
from onnx import external_data_helper, numpy_helper

from onnxprune import flow, stored
from onnxprune.errors import UserError
from onnxprune.flow import copied_node as copied_node
from onnxprune.flow import fresh_name as fresh_name
from onnxprune.flow import subgraphs as subgraphs

Array = npt.NDArray[Any]
P = ParamSpec("P")
R = TypeVar("R")
Layout = Mapping[str, str]  # initializers that lie outside the file -> the data file that holds them
DEFAULT_DOMAINS = ("", "ai.onnx")
STORED = 2**20  # bytes from which a tensor in a data file is not read before it is needed
ALIGNMENT = 4096  # of tensors in an external file, so that they can be mapped
INSIDE = 2**30  # bytes of weights that are written into a file that an engine or a converter reads
FLOATS = {
    onnx.TensorProto.FLOAT,
    onnx.TensorProto.FLOAT16,
    onnx.TensorProto.BFLOAT16,
    onnx.TensorProto.DOUBLE,
}
QUANTISED = {
    onnx.TensorProto.INT8,
    onnx.TensorProto.UINT8,
    onnx.TensorProto.INT4,
    onnx.TensorProto.UINT4,
    onnx.TensorProto.FLOAT8E4M3FN,
    onnx.TensorProto.FLOAT8E4M3FNUZ,
    onnx.TensorProto.FLOAT8E5M2,
    onnx.TensorProto.FLOAT8E5M2FNUZ,
    onnx.TensorProto.FLOAT4E2M1,
}
WEIGHTS = FLOATS | QUANTISED


def uncollected(function: Callable[P, R]) -> Callable[P, R]:
    """The function, run without the garbage collector of cycles.

    A graph is many small objects that all stay; walking them again and again takes a fifth of the time.
    """

    @functools.wraps(function)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        enabled = gc.isenabled()
        gc.disable()
        try:
            return function(*args, **kwargs)
        finally:
            if enabled:
                gc.enable()

    return run


class Node:
    """A NodeProto with its attributes parsed once."""

    __slots__ = ("_attributes", "captured", "domain", "index", "inputs", "op", "outputs", "proto")

    def __init__(self, proto: onnx.NodeProto, index: int) -> None:
        self.proto = proto
        self.index = index
        self.op = proto.op_type
        self.domain = "" if proto.domain == "ai.onnx" else proto.domain
        self.inputs: tuple[str, ...] = tuple(proto.input)
        self.outputs: tuple[str, ...] = tuple(proto.output)
        self._attributes: dict[str, Any] | None = None
        self.captured: tuple[str, ...] = tuple(sorted(flow.captured(proto)))

    @property
    def attributes(self) -> Mapping[str, Any]:
        if self._attributes is None:
            values = ((a.name, _attribute(a)) for a in self.proto.attribute)
            self._attributes = {
                name: value for name, value in values if value is not None
            }  # untyped ones count as absent
        return self._attributes

    @property
    def label(self) -> str:
        """The name people know the node by; its first output where it has none."""
        return self.proto.name or self.result or self.op

    @property
    def result(self) -> str:
        """The first output that it makes: recurrent nodes may leave earlier ones out. Empty where it makes none."""
        return next(filter(None, self.outputs), "")

    def __repr__(self) -> str:
        return f"{self.op} '{self.label}'"


def _attribute(attribute: onnx.AttributeProto) -> Any:
    value = onnx.helper.get_attribute_value(attribute)
    return value.decode(errors="replace") if isinstance(value, bytes) else value


class Model:
    """A checked view of one ONNX graph in its flat form (`onnxprune.flow`), `proto`, which is never changed
    through it. `source` is the model as it was given."""

    def __init__(
        self,
        proto: onnx.ModelProto,
        path: Path | None = None,
        external: Layout = MappingProxyType({}),
        files: frozenset[Path] = frozenset(),
    ) -> None:
        self.source = proto
        self.proto = proto
        self.path = path
        self.external = external
        self.files = files  # that it was read from
        self._check_versions()
        try:
            for text in _texts(proto):
                self._text(text)
            self.source = proto = _ordered(proto, owned=path is not None)
            flat = flow.flatten(proto)
        except flow.Invalid as error:
            self._refuse(str(error))
        self.proto = proto = flat.proto
        self.inlined = flat.inlined  # functions of the file that were unfolded, and how often
        self.scopes = flow.scopes(proto)
        graph = proto.graph
        self.opsets = {_domain(o.domain): o.version for o in proto.opset_import}
        self.initializers: dict[str, onnx.TensorProto] = {t.name: t for t in graph.initializer}
        self.nodes: list[Node] = [Node(n, i) for i, n in enumerate(graph.node)]
        self.inputs = [i for i in graph.input if i.name not in self.initializers]
        self.outputs = list(graph.output)
        self.producers: dict[str, Node] = {}
        self.consumers: dict[str, list[Node]] = {}
        self._check_opsets()
        self._check_names()
        self.nodes = self._canonical_order()
        self.constants: dict[str, onnx.TensorProto] = dict(self.initializers)
        for node in self.nodes:
            if node.op == "Constant" and node.domain == "":
                tensor = constant_tensor(node)
                if tensor is not None:
                    self.constants[node.outputs[0]] = tensor
        for name, tensor in self.constants.items():
            if (wrong := _damage(tensor)) is not None:
                self._refuse(f"tensor '{name}' {wrong}")

    @property
    def name(self) -> str:
        return str(self.path) if self.path else (self.proto.graph.name or "model")

    def opset(self, domain: str = "") -> int:
        return self.opsets.get(domain, 1)

    def array(self, name: str) -> Array:
        """The values of a constant."""
        return to_array(self.constants[name])

    def _check_versions(self) -> None:
        proto = self.proto
        if not 1 <= proto.ir_version <= onnx.IR_VERSION:
            known_ir = f"1 to {onnx.IR_VERSION} are"
            self._refuse(
                f"IR version {proto.ir_version} is unknown ({known_ir}); export the model again or upgrade onnx"
            )
        if not proto.graph.node and not proto.graph.output:
            self._refuse("the file holds no graph; is it an ONNX model?")
        versions = [o.version for o in proto.opset_import if _domain(o.domain) == ""]
        known = onnx.defs.onnx_opset_version()
        if any(not 1 <= v <= known for v in versions):
            self._refuse(
                f"opset {versions[0]} is unknown (1 to {known} are); convert the model or upgrade onnx"
            )
        if len(set(versions)) > 1:
            self._refuse(f"two opsets are stated ({versions[0]} and {versions[1]}); export the model again")

    def _check_opsets(self) -> None:
        """Refuse operators whose version nothing states (before IR 3 that was opset 1)."""
        plain = next((node for node in self.nodes if node.domain == ""), None)
        if plain is not None and "" not in self.opsets and self.proto.ir_version >= 3:
            self._refuse(f"no opset is stated, so node '{plain.label}' means nothing; export the model again")

    def _check_names(self) -> None:
        """Fill producers and consumers; refuse tensors made twice or never, and names that are not text."""
        graph = self.proto.graph
        for kind, values in (("initializer", graph.initializer), ("graph input", graph.input)):
            seen: set[str] = set()
            for value in values:
                if value.name in seen:
                    self._refuse(f"{kind} '{value.name}' occurs twice; the graph is invalid")
                seen.add(self._text(value.name))
        given = {i.name for i in graph.input} | set(self.initializers)
        given |= {t.values.name for t in graph.sparse_initializer}
        for node in self.nodes:
            self._check_arity(node)
            for attribute in node.proto.attribute:
                if attribute.ref_attr_name:
                    self._refuse(
                        f"attribute '{attribute.name}' of node '{node.label}' refers to a function's attribute, "
                        "and the node is in no function; the graph is invalid"
                    )
            for output in node.outputs:
                if not output:
                    continue
                if output in self.producers or output in given:
                    self._refuse(
                        f"tensor '{output}' is produced twice (node '{node.label}'); the graph is invalid"
                    )
                self.producers[output] = node
            for name in dict.fromkeys((*node.inputs, *node.captured)):
                if name:
                    self.consumers.setdefault(name, []).append(node)
        for name, nodes in self.consumers.items():
            if name not in given and name not in self.producers:
                self._refuse(
                    f"node '{nodes[0].label}' reads '{name}', which nothing produces; the graph is invalid"
                )
        for value in graph.output:
            if value.name not in given and value.name not in self.producers:
                self._refuse(f"graph output '{value.name}' is produced by no node; the graph is invalid")

    def _canonical_order(self) -> list[Node]:
        """Topological order with ties broken by name, so that the file's node order is irrelevant."""
        waiting: dict[int, int] = {}
        ready: list[tuple[str, int]] = []
        for node in self.nodes:
            needs = {n for n in (*node.inputs, *node.captured) if n in self.producers}
            if late := sorted(name for name in needs if self.producers[name].index > node.index):
                self._refuse(
                    f"node '{node.label}' reads '{late[0]}' before it is produced (a cycle, or a body whose nodes "
                    "are out of order); the graph is invalid"
                )
            waiting[node.index] = len(needs)
            if not needs:
                heapq.heappush(ready, (node.result, node.index))
        order: list[Node] = []
        while ready:
            node = self.nodes[heapq.heappop(ready)[1]]
            order.append(node)
            for output in filter(None, node.outputs):
                for consumer in self.consumers.get(output, ()):
                    waiting[consumer.index] -= 1
                    if not waiting[consumer.index]:
                        heapq.heappush(ready, (consumer.result, consumer.index))
        if len(order) < len(self.nodes):
            stuck = next(n for n in self.nodes if waiting[n.index])
            self._refuse(f"node '{stuck.label}' is part of a cycle; the graph is invalid")
        return order

    def _check_arity(self, node: Node) -> None:
        low, high = _arity(node.op, node.domain, self.opset(node.domain))
        if not low <= len(node.inputs) <= high:
            self._refuse(
                f"node '{node.label}' ({node.op}) has {len(node.inputs)} inputs and takes {low} to {high}; "
                "the graph is invalid"
            )
        if not node.outputs and node.domain == "":
            self._refuse(f"node '{node.label}' ({node.op}) has no output; the graph is invalid")

    def _text(self, name: str) -> str:
        if not isinstance(name, str):  # what protobuf gives for bytes that are not UTF-8
            self._refuse(f"the name {name!r} is not UTF-8 text; the file is damaged, export it again")
        return name

    def _refuse(self, why: str) -> NoReturn:
        raise UserError(f"{self.name}: {why}")

    @uncollected
    def digest(self) -> str:
        """SHA-256 of the graph and its weights, whatever file layout they are stored in."""
        skeleton = onnx.ModelProto()
        copy_without_weights(self.source, skeleton)
        digest = hashlib.sha256(skeleton.SerializeToString(deterministic=True))
        initializers = {t.name: t for t in self.source.graph.initializer}
        large = [name for name, tensor in initializers.items() if expected_bytes(tensor) >= STORED]
        with ThreadPoolExecutor(os.cpu_count()) as pool:  # a digest of its own for each, taken side by side
            parts = dict(zip(large, pool.map(lambda name: _digest(initializers[name]), large), strict=True))
        for name, tensor in sorted(initializers.items()):
            part = parts.get(name) or _digest(tensor)
            digest.update(f"{name}|{tensor.data_type}|{list(tensor.dims)}|{part}|".encode())
        return digest.hexdigest()


@functools.cache
def _arity(op: str, domain: str, opset: int) -> tuple[int, int]:
    """The least and the largest number of inputs; anything goes for operators that onnx does not know."""
    try:
        schema = onnx.defs.get_schema(op, opset, domain)
    except onnx.defs.SchemaError:
        return 0, sys.maxsize
    return schema.min_input, schema.max_input


def _texts(proto: onnx.ModelProto) -> Iterator[str]:
    """Every name that is looked up, compared, copied or shown."""
    yield from _strings(proto)
    yield from (opset.domain for opset in proto.opset_import)
    nodes = [node for function in proto.functions for node in function.node]
    for function in proto.functions:
        yield from (function.name, function.domain, *function.input, *function.output)
    for graph in flow.graphs(proto):
        yield from _strings(graph)
        nodes += graph.node
        for value in (*graph.input, *graph.output, *graph.value_info):
            yield value.name
        for value in (*graph.input, *graph.output):
            yield from (dim.dim_param for dim in value.type.tensor_type.shape.dim)
        yield from (tensor.name for tensor in graph.initializer)
        yield from (tensor.values.name for tensor in graph.sparse_initializer)
    for node in nodes:
        yield from (node.name, node.op_type, node.domain, *node.input, *node.output)
        for attribute in node.attribute:
            yield from (attribute.name, attribute.ref_attr_name)


def _strings(message: Any) -> Iterator[str]:
    return (value for described, value in message.ListFields() if described.type == described.TYPE_STRING)


def _domain(domain: str) -> str:
    return "" if domain in DEFAULT_DOMAINS else domain


def _ordered(proto: onnx.ModelProto, owned: bool) -> onnx.ModelProto:
    """The model with every node behind those it reads, as ONNX asks and not every converter writes; itself
    where it is in order, changed in place where it is `owned`. A cycle stays where it is."""
    nodes = list(proto.graph.node)
    makers = {output: i for i, node in enumerate(nodes) for output in node.output if output}
    needs = [
        {makers[name] for name in (*node.input, *flow.captured(node)) if name in makers} for node in nodes
    ]
    if all(max(need, default=-1) < i for i, need in enumerate(needs)):
        return proto
    readers: dict[int, list[int]] = {}
    for i, need in enumerate(needs):
        for maker in need:
            readers.setdefault(maker, []).append(i)
    waiting = [len(need) for need in needs]
    ready = [i for i, count in enumerate(waiting) if not count]
    order = []
    while ready:
        i = heapq.heappop(ready)
        order.append(i)
        for reader in readers.get(i, ()):
            waiting[reader] -= 1
            if not waiting[reader]:
                heapq.heappush(ready, reader)
    order += [i for i, count in enumerate(waiting) if count]
    result = proto if owned else copied(proto)
    copies = [copied_node(nodes[i]) for i in order]
    del result.graph.node[:]
    result.graph.node.extend(copies)
    return result


def copy_without_weights(source: onnx.ModelProto, target: onnx.ModelProto) -> None:
    """Copy everything but the graph's initializers, without ever copying those."""
    flow.copy_fields(source, target, frozenset({"graph"}))
    target.graph.SetInParent()
    flow.copy_fields(source.graph, target.graph, frozenset({"initializer"}))


def copied(proto: onnx.ModelProto) -> onnx.ModelProto:
    """A copy that can be changed without changing the original."""
    result = onnx.ModelProto()
    result.CopyFrom(proto)
    return result


def to_array(tensor: onnx.TensorProto) -> Array:
    """The tensor as numpy, not to be written to; bfloat16 and smaller floats as ml_dtypes arrays."""
    return stored.read(tensor) if stored.is_stored(tensor) else numpy_helper.to_array(tensor)


def materialised(proto: onnx.ModelProto) -> onnx.ModelProto:
    """The model with the values of all tensors; itself where nothing is left in a data file."""
    if not any(map(stored.is_stored, proto.graph.initializer)):
        return proto
    result = copied(proto)
    for tensor in result.graph.initializer:
        if stored.is_stored(tensor):
            values = _bytes(tensor)
            tensor.ClearField("external_data")
            tensor.ClearField("data_location")
            tensor.raw_data = bytes(values)
    return result


def _bytes(tensor: onnx.TensorProto) -> memoryview:
    """The tensor's values as raw data, without a copy where that is possible."""
    if tensor.raw_data:
        return memoryview(tensor.raw_data)
    array = np.ascontiguousarray(to_array(tensor))
    return array.reshape(-1).view(np.uint8).data


def _digest(tensor: onnx.TensorProto) -> str:
    if stored.is_stored(tensor):
        return hashlib.sha256(_bytes(tensor)).hexdigest()
    return hashlib.sha256(tensor.raw_data or to_array(tensor).tobytes()).hexdigest()


def _damage(tensor: onnx.TensorProto) -> str | None:
    """What is wrong with a stored tensor: its values do not fill its shape."""
    if tensor.data_type not in _TYPES:
        return f"has the unknown element type {tensor.data_type}; export the model again or upgrade onnx"
    if stored.is_stored(tensor):
        return None
    if external_data_helper.uses_external_data(tensor):
        return "lies in an external file that was not loaded; give the path of the model"
    if tensor.HasField("segment"):
        return "is stored in segments, which nothing reads; export the model again"
    if any(dim < 0 for dim in tensor.dims):
        return f"has the shape {list(tensor.dims)}; the file is damaged, export it again"
    if tensor.HasField("raw_data"):
        have, need, what = len(tensor.raw_data), expected_bytes(tensor), "bytes"
    else:
        have, need = (
            len(getattr(tensor, onnx.helper.tensor_dtype_to_field(tensor.data_type))),
            _stored(tensor),
        )
        what = "values"
    if have != need:
        return f"of shape {list(tensor.dims)} holds {have:,} {what} and needs {need:,}; the file is damaged, export it again"
    return None


def _stored(tensor: onnx.TensorProto) -> int:
    """Entries that a tensor without raw data needs in its typed field."""
    count = math.prod(tensor.dims)
    kind = _TYPES[tensor.data_type]
    if kind.startswith("COMPLEX"):
        return 2 * count
    return (count * _PACKED[kind] + 7) // 8 if _PACKED.get(kind) in (2, 4) else count


def constant_tensor(node: Node) -> onnx.TensorProto | None:
    """The tensor a Constant node holds, or None for strings and sparse values."""
    for name, value in node.attributes.items():
        if name == "value":
            return value if isinstance(value, onnx.TensorProto) else None
        if name in ("value_float", "value_floats"):
            return numpy_helper.from_array(np.asarray(value, dtype=np.float32))
        if name in ("value_int", "value_ints"):
            return numpy_helper.from_array(np.asarray(value, dtype=np.int64))
    return None


# ---------------------------------------------------------------------------------------------- files


def load(path: str | os.PathLike[str]) -> Model:
    """Read an ONNX file; large tensors in external data stay there until they are needed.

    Raises `UserError` for anything that is not a readable, sound ONNX model. External data may only
    lie inside the model's own folder (links, absolute paths and `..` are refused).
    """
    path = Path(path)
    try:
        if _special(path):
            raise UserError(f"{path}: a device or a pipe, not a file; give the path of an .onnx file")
        data = path.read_bytes()
    except OSError as error:
        raise UserError(f"{path}: {os.strerror(error.errno or 0)}; give the path of an .onnx file") from None
    proto = onnx.ModelProto()
    try:
        proto.ParseFromString(data)
    except google.protobuf.message.DecodeError:
        raise UserError(
            f"{path}: not an ONNX model, or cut short ({len(data):,} bytes); export or copy it again"
        ) from None
    del data
    if not proto.HasField("graph") or not proto.ir_version:
        raise UserError(f"{path}: not an ONNX model (it holds no graph); give the path of an .onnx file")
    try:
        flow.refuse_private(proto)
    except flow.Invalid as error:
        raise UserError(f"{path}: {error}") from None
    layout, files = _load_external(proto, path)
    return Model(proto, path, layout, files | {path})


def _load_external(proto: onnx.ModelProto, path: Path) -> tuple[Layout, frozenset[Path]]:
    """Find the tensors stored outside the file, and read the small ones; where they lie, and the files."""
    layout: dict[str, str] = {}
    files: set[Path] = set()
    flat = not proto.functions and not any(True for node in proto.graph.node for _ in subgraphs(node))
    for tensor in proto.graph.initializer if flat else ():
        if external_data_helper.uses_external_data(tensor):
            target = _data_file(tensor, path)
            layout[tensor.name] = target.relative_to(path.parent).as_posix()
            files.add(target)
            _stay(tensor, target)
    for tensor in external_tensors(proto):
        target = _data_file(tensor, path)
        layout[tensor.name] = target.relative_to(path.parent).as_posix()
        files.add(target)
        what = f"{path}: external data '{target.name}' of tensor '{tensor.name}'"
        if "length" not in _entries(tensor):
            tensor.external_data.add(key="length", value=str(expected_bytes(tensor)))
        try:
            with warnings.catch_warnings():  # onnxruntime adds keys of its own, for its caches
                warnings.simplefilter("ignore")
                external_data_helper.load_external_data_for_tensor(tensor, str(path.parent))
        except (onnx.checker.ValidationError, ValueError, OSError) as error:
            detail = str(error).strip().splitlines()[0][:160]
            raise UserError(f"{what} cannot be read ({detail}); copy the model and its data again") from None
        if len(tensor.raw_data) != expected_bytes(tensor):
            raise UserError(
                f"{what} holds {len(tensor.raw_data):,} bytes and needs {expected_bytes(tensor):,}; "
                "the file is damaged, copy it again"
            )
    return layout, frozenset(files)


def _data_file(tensor: onnx.TensorProto, path: Path) -> Path:
    """The plain file in the model's folder that holds a tensor, whose type and shape are known."""
    location = _entries(tensor).get("location", "")
    what = f"{path}: external data '{location}' of tensor '{tensor.name}'"
    if not isinstance(location, str):
        raise UserError(f"{what} has no name that is UTF-8 text; the file is damaged, export it again")
    target = path.parent / location
    if not location or not _exists(target):
        raise UserError(f"{what} is missing; put that file beside the model")
    if not _inside(target, path.parent):
        raise UserError(f"{what} is not a plain file (no link) inside the model's folder; copy it there")
    if tensor.data_type not in _TYPES or any(dim < 0 for dim in tensor.dims):
        raise UserError(f"{what} has no type or shape that is known; export the model again")
    if _TYPES[tensor.data_type] == "STRING":
        raise UserError(f"{what} is text, which only the model itself can hold; export the model again")
    try:
        target.open("rb").close()
    except OSError as error:
        raise UserError(f"{what} cannot be read ({os.strerror(error.errno or 0)})") from None
    for field in _VALUES:  # what the file says counts
        tensor.ClearField(field)
    return target


def _entries(tensor: onnx.TensorProto) -> dict[str, str]:
    """What is said about a tensor's place; the last word counts, as in onnx and onnxruntime."""
    return {entry.key: entry.value for entry in tensor.external_data}


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except OSError:  # a name that cannot be
        return False


def _stay(tensor: onnx.TensorProto, path: Path) -> None:
    """Leave a large tensor where it is stored, if it lies there whole."""
    need = expected_bytes(tensor)
    entries = _entries(tensor)
    offset, length = entries.get("offset", "0"), entries.get("length", str(need))
    digits = offset.isdecimal() and len(offset) < 20
    if need < STORED or _TYPES[tensor.data_type] in _PACKED or not digits or length != str(need):
        return
    if int(offset) + need <= path.stat().st_size:
        stored.bind(tensor, path, int(offset))


def _inside(target: Path, folder: Path) -> bool:
    """Whether the target is a plain file in the folder, reached by no link."""
    inside = target.resolve().is_relative_to(folder.resolve())
    status = target.lstat()
    linked = any(
        p.is_symlink() for p in (target, *target.parents) if p.is_relative_to(folder) and p != folder
    )
    return inside and stat.S_ISREG(status.st_mode) and status.st_nlink == 1 and not linked


def external_tensors(proto: onnx.ModelProto) -> Iterator[onnx.TensorProto]:
    """Every tensor stored outside the file."""
    for tensor in external_data_helper._get_all_tensors(proto):
        if external_data_helper.uses_external_data(tensor) and not stored.is_stored(tensor):
            yield tensor


_VALUES = ("raw_data", "float_data", "int32_data", "int64_data", "uint64_data", "double_data", "string_data")
_TYPES = {number: name for name, number in onnx.TensorProto.DataType.items() if number}
_PACKED = {"INT2": 2, "UINT2": 2, "INT4": 4, "UINT4": 4, "FLOAT4E2M1": 4, "FLOAT6E2M3": 6, "FLOAT6E3M2": 6}


def bits_of(element: int) -> int:
    """Bits that one element of a type takes in raw data. Raises `KeyError` for what is no number."""
    packed = _PACKED.get(_TYPES.get(element, ""))
    return packed or 8 * int(onnx.helper.tensor_dtype_to_np_dtype(element).itemsize)


def expected_bytes(tensor: onnx.TensorProto) -> int:
    """Bytes of raw data that fill the tensor's shape."""
    return (math.prod(tensor.dims) * bits_of(tensor.data_type) + 7) // 8


def same_file(a: Path, b: Path) -> bool:
    """Whether two paths lead to one file; False where either is missing or impossible."""
    try:
        return a.samefile(b)
    except (OSError, ValueError):
        return False


def _special(path: Path) -> bool:
    """Whether something is there that is neither a file nor a folder."""
    try:
        mode = path.stat().st_mode
    except (OSError, ValueError):
        return False
    return not stat.S_ISREG(mode) and not stat.S_ISDIR(mode)


_temporaries: set[Path] = set()


@contextlib.contextmanager
def atomic(path: Path) -> Iterator[Path]:
    """A temporary path beside `path` that takes its place only if the block succeeds; of a link, beside the file that it
    leads to. Raises `UserError` rather than replace a device or a pipe."""
    path = path.resolve() if os.path.islink(path) else path  # noqa: PTH114  # raises on no name
    if _special(path):
        raise UserError(f"{path}: a device or a pipe, not a file; give the path of a file")
    temporary = path.parent / f".{path.name}.{secrets.token_hex(4)}.part"
    _temporaries.add(temporary)  # before it is there, so that no interrupt comes in between
    try:
        os.close(os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600))
    except OSError as error:
        _temporaries.discard(temporary)
        raise UserError(f"{path}: cannot write there ({os.strerror(error.errno or 0)})") from None
    try:
        yield temporary
        umask = os.umask(0)
        os.umask(umask)
        temporary.chmod(0o666 & ~umask)
        temporary.replace(path)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise UserError(
                f"{path}: the disk is full (or a quota is); nothing was written, make room"
            ) from None
        raise UserError(
            f"{path}: cannot write ({os.strerror(error.errno or 0)}); nothing was written"
        ) from None
    finally:
        temporary.unlink(missing_ok=True)
        _temporaries.discard(temporary)


def clean_up() -> None:
    """Remove what an interrupt in the wrong moment has left."""
    for temporary in list(_temporaries):
        temporary.unlink(missing_ok=True)
        _temporaries.discard(temporary)


def save(
    proto: onnx.ModelProto,
    path: str | os.PathLike[str],
    external: Layout = MappingProxyType({}),
    sources: frozenset[Path] = frozenset(),
    outputs: Sequence[onnx.ValueInfoProto] = (),
) -> int:
    """Write a model; its files appear whole or not at all. Returns the bytes written.

    The initializers named in `external` go to data files beside it: `<file name>.data`, or as many as they
    lay in. `outputs` are stated besides the graph's own. Raises `UserError` rather than overwrite one of
    `sources`, the files that the original was read from.
    """
    proto = flow.nest(proto)
    path = Path(path)
    place_of = places(proto, path, external)
    for target in (path, *dict.fromkeys(place_of.values())):
        if any(same_file(target, source) for source in sources):
            raise UserError(f"{path}: this would overwrite the input ({target.name}); choose another path")
    if not place_of and not outputs:
        with atomic(path) as temporary, temporary.open("wb") as file:
            return file.write(proto.SerializeToString(deterministic=True))
    shell = onnx.ModelProto()
    copy_without_weights(proto, shell)
    shell.graph.output.extend(outputs)
    written = 0
    with contextlib.ExitStack() as stack:
        model_file = stack.enter_context(atomic(path))  # the last to take its place
        files = {
            place: stack.enter_context(stack.enter_context(atomic(place)).open("wb"))
            for place in dict.fromkeys(place_of.values())
        }
        for tensor in proto.graph.initializer:
            copy = shell.graph.initializer.add()
            if tensor.name not in place_of:
                copy.CopyFrom(tensor)
                continue
            place = place_of[tensor.name]
            file = files[place]
            file.write(b"\0" * (-file.tell() % ALIGNMENT))
            copy.name, copy.data_type, copy.doc_string = tensor.name, tensor.data_type, tensor.doc_string
            copy.dims.extend(tensor.dims)
            copy.data_location = onnx.TensorProto.EXTERNAL
            offset = file.tell()
            length = file.write(_bytes(tensor))
            for key, value in (("location", place.name), ("offset", offset), ("length", length)):
                copy.external_data.add(key=key, value=str(value))
        for file in files.values():
            written += file.tell()
            file.flush()
        with model_file.open("wb") as file:
            return file.write(shell.SerializeToString(deterministic=True)) + written


def save_whole(proto: onnx.ModelProto, path: Path) -> None:
    """Write a model for engines, of which some read no data file: weights are inside, where they fit (`INSIDE`)."""
    sizes = {
        tensor.name: expected_bytes(tensor) if stored.is_stored(tensor) else len(tensor.raw_data)
        for tensor in proto.graph.initializer
    }
    if sum(sizes.values()) > INSIDE:
        save(proto, path, {name: "" for name, size in sizes.items() if size > ALIGNMENT})
    else:
        save(materialised(proto), path)


def places(proto: onnx.ModelProto, path: Path, external: Layout) -> dict[str, Path]:
    """The data file of each initializer that goes to one; what was left in its file when read always does."""
    names = [t.name for t in proto.graph.initializer if t.name in external or stored.is_stored(t)]
    locations = list(dict.fromkeys(external.get(name, "") for name in names if external.get(name)))
    if len(locations) < 2:
        return dict.fromkeys(names, path.with_name(path.name + ".data"))
    taken: set[str] = set()
    beside = {
        place: path.with_name(fresh_name(f"{path.name}.{PurePosixPath(place).name}", taken))
        for place in locations
    }
    return {name: beside[external.get(name) or locations[0]] for name in names}
