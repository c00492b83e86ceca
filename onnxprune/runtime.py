"""The door to onnxruntime: sessions and seeded inputs."""

from __future__ import annotations

import contextlib
import functools
import itertools
import math
import os
import re
import secrets
import shutil
import tempfile
import threading
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

import numpy as np
import onnx

from onnxprune import flow
from onnxprune import model as model_files
from onnxprune.errors import UserError
from onnxprune.model import DEFAULT_DOMAINS, Array, Model, Node, save
from onnxprune.sizes import Sizes, dim_key, is_dynamic

os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
import onnxruntime as ort

Feeds = dict[str, Array]
EXTERNAL_BYTES = 4096  # tensors above this go to a file that onnxruntime maps instead of copying
LARGEST = 2**28  # elements of an input that is made up
ENDLESS = 120  # seconds after which a loop is taken never to end
WAYS = 8  # through the branches of a graph that are tried


class RunError(Exception):
    """onnxruntime refused to load or run a model; the message is its own, on one line."""


class OutOfMemory(RunError):
    """The run asked for more memory than there is; it says nothing about the model."""


class Endless(UserError):
    """A loop did not end; further runs would not, either."""


_scratches: set[Path] = set()


@contextlib.contextmanager
def _scratch() -> Iterator[Path]:
    """A temporary folder, and a note of it until it is gone."""
    folder = Path(tempfile.gettempdir(), f"onnxprune-{secrets.token_hex(8)}")
    _scratches.add(folder)  # before it is there, so that no interrupt comes in between
    try:
        folder.mkdir(mode=0o700)
        yield folder
    finally:
        _discard(folder)


def _discard(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    _scratches.discard(folder)


def clean_up() -> None:
    """Remove what an interrupt in the wrong moment has left."""
    for folder in list(_scratches):
        _discard(folder)
    model_files.clean_up()


Level = Literal["none", "basic", "all"]
_LEVELS: dict[Level, Any] = {
    "none": ort.GraphOptimizationLevel.ORT_DISABLE_ALL,
    "basic": ort.GraphOptimizationLevel.ORT_ENABLE_BASIC,
    "all": ort.GraphOptimizationLevel.ORT_ENABLE_ALL,
}


class Session:
    """One onnxruntime CPU session of a model, from memory or from a file.

    Graph optimisations are off by default, so that the graph that runs is the graph that is judged.
    `expose` are inner tensors to return besides the outputs of a model in memory. With `placement`, the attribute
    of that name counts the nodes that each provider took. Without `spinning`, idle threads sleep.
    """

    def __init__(
        self,
        source: onnx.ModelProto | Path,
        optimise: Level = "none",
        threads: int = 0,
        expose: Sequence[onnx.ValueInfoProto] = (),
        placement: bool = False,
        spinning: bool = True,
    ) -> None:
        options = ort.SessionOptions()
        if not spinning:
            options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        if placement:
            options.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
        options.log_severity_level = 4
        options.intra_op_num_threads = threads
        options.graph_optimization_level = _LEVELS[optimise]
        self._loops = False
        try:
            if isinstance(source, Path):
                self._session = self._open(str(source), options)
            else:
                source = flow.nest(source)
                graphs = flow.graphs(source)
                self._loops = any(node.op_type == "Loop" for graph in graphs for node in graph.node)
                if (crashing := crash(source)) is not None:
                    raise RunError(crashing)
                with _scratch() as folder:
                    path = folder / "model.onnx"
                    large = {t.name: "" for t in source.graph.initializer if len(t.raw_data) > EXTERNAL_BYTES}
                    save(source, path, large, outputs=expose)
                    self._session = self._open(str(path), options)
        except RunError:
            raise
        except (UserError, OSError) as error:
            where = tempfile.gettempdir()
            raise UserError(
                f"no room for temporary files in {where} (set TMPDIR to use another): {error}"
            ) from None
        except Exception as error:  # onnxruntime raises classes of its own, without a common base
            raise _failure(error) from None
        self.outputs: list[str] = [o.name for o in self._session.get_outputs()]
        self.inputs: dict[str, str] = {i.name: i.type for i in self._session.get_inputs()}
        parts = self._session.get_provider_graph_assignment_info() if placement else ()
        self.placement = Counter[str]()
        for part in parts:
            self.placement[part.ep_name] += len(part.get_nodes())

    @staticmethod
    def _open(path: str, options: Any) -> Any:
        providers = ["CPUExecutionProvider"]
        return ort.InferenceSession(path, options, providers=providers, enable_fallback=0)  # which prints

    def run(self, feeds: Mapping[str, Array], outputs: Sequence[str] | None = None) -> dict[str, Any]:
        """Values of `outputs` (default: all). Floats are fed in the width that the model states, what it does not take
        not at all."""
        # This is timed: as little as possible besides the run itself.
        names = list(outputs) if outputs else self.outputs
        inputs = self.inputs
        given = {
            k: v.astype(np.float32) if inputs[k] == "tensor(float)" and v.dtype != np.float32 else v
            for k, v in feeds.items()
            if k in inputs
        }
        try:
            run = self._bounded if self._loops else self._session.run
            return dict(zip(names, run(names, given), strict=True))
        except Endless:
            raise
        except Exception as error:  # as above
            raise _failure(error) from None

    def _bounded(self, names: list[str], given: Feeds) -> list[Any]:
        """A run that is ended where it does not end."""
        options = ort.RunOptions()
        clock = threading.Timer(ENDLESS, setattr, (options, "terminate", True))
        clock.daemon = True
        clock.start()
        try:
            values: list[Any] = self._session.run(names, given, options)
        except Exception:
            if options.terminate:
                raise Endless(
                    f"a loop of the model did not end in {ENDLESS} seconds on made-up inputs; nothing was written"
                ) from None
            raise
        finally:
            clock.cancel()
        return values


@functools.cache
def newest() -> tuple[int, int]:
    """The newest opset and IR version that this onnxruntime loads, of those that onnx knows.

    Found by trial: the operators that it registers are newer than what it takes, and an environment variable
    (ALLOW_RELEASED_ONNX_OPSET_ONLY) changes that.
    """
    options = ort.SessionOptions()
    options.log_severity_level = 4

    def loads(opset: int, ir: int) -> bool:
        x, y = (onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [1]) for name in "xy")
        graph = onnx.helper.make_graph([onnx.helper.make_node("Identity", ["x"], ["y"])], "least", [x], [y])
        model = onnx.helper.make_model(
            graph, opset_imports=[onnx.helper.make_opsetid("", opset)], ir_version=ir
        )
        try:
            ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
        except Exception:  # as above
            return False
        return True

    old_opset, old_ir = 13, 7  # which every release that this package takes can load
    opset = next(
        n for n in range(onnx.defs.onnx_opset_version(), 0, -1) if n == old_opset or loads(n, old_ir)
    )
    ir = next(n for n in range(onnx.IR_VERSION, 0, -1) if n == old_ir or loads(old_opset, n))
    return opset, ir


def inner(proto: onnx.ModelProto, names: Iterable[str]) -> list[onnx.ValueInfoProto]:
    """What to expose for these tensors: those that are no outputs of the model."""
    known = {output.name for output in proto.graph.output}
    return [onnx.ValueInfoProto(name=name) for name in names if name not in known]


_NEVER_EMPTY = {"LSTM", "GRU", "RNN", "DynamicQuantizeLSTM", "Einsum"}


def crash(proto: onnx.ModelProto) -> str | None:
    """A node whose kernel takes the whole process along (in onnxruntime 1.31), and what to do about it."""
    nodes = [node for graph in flow.graphs(proto) for node in graph.node]
    nodes += [node for function in proto.functions for node in function.node]
    empty = [
        value.name
        for value in proto.graph.input
        if any(dim.HasField("dim_value") and not dim.dim_value for dim in value.type.tensor_type.shape.dim)
    ]
    for node in nodes:
        name = node.name or next(iter(node.output), "")
        if node.domain == "com.microsoft" and node.op_type == "Attention" and not any(node.input[2:3]):
            return f"its Attention without a bias crashes (node '{name}'); give it one of zeros"
        if node.domain in DEFAULT_DOMAINS and node.op_type in ("Loop", "Scan") and not all(node.output):
            return f"an output without a name, of node '{name}', crashes it; name it"
        if empty and node.op_type in _NEVER_EMPTY:
            return f"{node.op_type} crashes on nothing, which is what input '{empty[0]}' holds by its shape"
        if node.domain == "com.microsoft" and node.op_type == "QLinearConcat" and not all(node.input):
            return f"an operand that is left out of node '{name}' crashes it; export the model again"
        if node.op_type in ("Attention", "GroupQueryAttention"):
            heads = {a.name: a.i for a in node.attribute if a.name.endswith("num_heads")}
            if any(heads.values()) and not all(0 < count < 2**31 for count in heads.values()):
                stated = " and ".join(f"{key} {count}" for key, count in sorted(heads.items()))
                return f"{stated} of node '{name}' crash it; export the model again"
    return None


_SIGNATURE = r"[^()]*\([^()]*\)(?: const)?(?: \[with [^]]*\])? "
_NOISE = re.compile(
    r"\[ONNXRuntimeError\] : \d+ : |Load model from \S+ failed:|This is an invalid model\. "
    rf"|/onnxruntime_src/\S+ (?:{_SIGNATURE})?"
)


def _failure(error: Exception) -> RunError:
    text = _one_line(error)
    full = isinstance(error, MemoryError) or "bad_alloc" in text or "Failed to allocate memory" in text
    return (OutOfMemory if full else RunError)(text or "out of memory")


def _one_line(error: Exception) -> str:
    """onnxruntime's message without line breaks, temporary paths and source locations."""
    return " ".join(_NOISE.sub("", str(error)).split())[:300]


def make_feeds(
    model: Model,
    sizes: Sizes,
    seed: int,
    bounds: Mapping[str, int],
    given: Mapping[str, int] = MappingProxyType({}),
) -> Feeds:
    """Seeded inputs: normal floats, integers within `bounds` (0 or 1 where unknown), values that are `given`.

    Raises `RunError` for inputs that are no tensors of numbers.
    """
    generator = np.random.default_rng(seed)
    feeds: Feeds = {}
    for value in model.inputs:
        tensor = value.type.tensor_type
        if not value.type.HasField("tensor_type") or tensor.elem_type in (0, onnx.TensorProto.STRING):
            raise RunError(f"input '{value.name}' is not a tensor of numbers")
        if not tensor.HasField("shape"):  # taken for a number, it can take the process along
            raise RunError(f"the shape of input '{value.name}' is not stated")
        shape = [
            sizes[dim_key(value.name, axis, dim)] if is_dynamic(dim) else dim.dim_value
            for axis, dim in enumerate(tensor.shape.dim)
        ]
        if math.prod(shape) > LARGEST:
            raise RunError(f"input '{value.name}' of shape {shape} is too large to run")
        dtype = onnx.helper.tensor_dtype_to_np_dtype(tensor.elem_type)
        if np.issubdtype(dtype, np.integer) or dtype == np.bool_:
            array: Array = generator.integers(0, bounds.get(value.name, 2), size=shape)
        else:
            array = generator.standard_normal(shape)
        if value.name in given:
            array = np.full(shape, given[value.name])
        feeds[value.name] = np.asarray(array).astype(dtype)
    return feeds


def decisive_values(model: Model) -> list[dict[str, int]]:
    """Values of inputs that decide which way the graph takes: a flag of an If, an integer that is compared
    with constants. One entry for each way; a single empty one where no input decides."""
    found: dict[str, list[int]] = {}
    for value in model.inputs:
        kind = value.type.tensor_type.elem_type
        uses = list(_carried(model, value.name))
        if kind == onnx.TensorProto.BOOL:
            if any(node.domain == flow.DOMAIN and node.inputs[0] == name for node, name in uses):
                found[value.name] = [1, 0]
        elif kind in (onnx.TensorProto.INT32, onnx.TensorProto.INT64) and model.scopes.names:
            others = [
                other for node, name in uses if node.op == "Equal" for other in node.inputs if other != name
            ]
            arrays = [model.array(other) for other in others if other in model.constants]
            wanted = list(dict.fromkeys(int(array.item()) for array in arrays if array.size == 1))[:WAYS]
            if wanted:
                found[value.name] = [*wanted, next(n for n in range(WAYS + 1) if n not in wanted)]
    return [
        dict(zip(found, values, strict=True))
        for values in itertools.islice(itertools.product(*found.values()), WAYS)
    ]


_CARRIERS = {"Cast", "Unsqueeze", "Squeeze", "Reshape", "Identity", "Flatten", "Transpose", "Expand", "Slice"}


def index_bounds(model: Model, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, int]:
    """For integer inputs that index a table, the number of its rows."""
    bounds: dict[str, int] = {}
    for value in model.inputs:
        limits = [
            shapes[node.inputs[0]][node.attributes.get("axis", 0)]
            for node, name in _carried(model, value.name)
            if node.op == "Gather" and node.inputs[1] == name and node.inputs[0] in shapes
        ]
        if limits:
            bounds[value.name] = max(min(limits), 1)
    return bounds


def _carried(model: Model, name: str) -> Iterator[tuple[Node, str]]:
    """Every use of a tensor, also behind nodes that only carry it."""
    waiting, seen = [name], {name}
    while waiting:
        name = waiting.pop()
        for node in model.consumers.get(name, ()):
            yield node, name
            carries = node.op in _CARRIERS or (node.op == "Gather" and node.inputs[0] == name)
            if carries and node.outputs[0] not in seen:
                seen.add(node.outputs[0])
                waiting.append(node.outputs[0])
