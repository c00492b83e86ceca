"""TensorRT, and TensorRT-RTX, which builds engines without a GPU, too.

Networks are strongly typed: every tensor has the type that it has in the file, and nothing else makes a layer run
in another one. Asking for a precision therefore asks for a file of that type; only of a float32 file a copy in
float16 is made here (`half`).
"""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
import importlib.util
import itertools
import json
import shlex
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import ml_dtypes
import numpy as np
import onnx

from onnxprune import model as models
from onnxprune.allocation import Alignment
from onnxprune.errors import UserError
from onnxprune.model import Array, Model, Node
from onnxprune.runtime import Feeds
from onnxprune.shapes import analyse
from onnxprune.sizes import dynamic_dims
from onnxprune.targets import half
from onnxprune.targets.cuda_driver import Stream, gpu
from onnxprune.targets.messages import one_line
from onnxprune.targets.ranges import ranges_of
from onnxprune.targets.target import Engine, Scheme, State, Target, TargetError

PORTABLE = (80, 86, 89, 120)  # compute capabilities that an engine of TensorRT-RTX is built for
TURING = 75
WIDTHS = range(9, 257)  # of heads of an Attention node, as TensorRT-RTX 1.7 builds them
_WEIGHTS: dict[int, str] = {
    onnx.TensorProto.FLOAT: "fp32",
    onnx.TensorProto.FLOAT16: "fp16",
    onnx.TensorProto.BFLOAT16: "bf16",
}
_INTEGER_ONLY = {"DynamicQuantizeLinear", "MatMulInteger", "ConvInteger", "QLinearConv", "QLinearMatMul"}
_BORDERS = ("QuantizeLinear", "DequantizeLinear")
_ALIGNMENT = {
    "fp32": Alignment(4, 4, 4),
    "tf32": Alignment(4, 8, 4),
    "fp16": Alignment(8, 8, 8),
    "bf16": Alignment(8, 8, 8),
    "int8": Alignment(32, 8, 16),
}


class TensorRt(Target):
    """Multiples of channels that tensor cores take whole: 16 bytes of matrix operands, and 32 channels of the
    vectorised int8 format (NVIDIA, "Deep Learning Performance Guide", and TensorRT's best practices).
    """

    name = "tensorrt"
    title = "TensorRT or TensorRT-RTX, NVIDIA GPUs"
    scheme = Scheme(
        "int8", None, symmetric=True, biases=False, reach="inputs",
        why="it takes symmetric int8 and float biases, and fuses what follows a layer if no border is between",
    )  # fmt: skip
    extra = "tensorrt"
    precisions: ClassVar[tuple[str, ...]] = ("fp32", "tf32", "fp16", "bf16", "int8")

    def alignment(self) -> Alignment:
        return _ALIGNMENT[self.precision]

    def state(self) -> State:
        device = gpu()
        portable = ", ".join(f"SM{capability}" for capability in PORTABLE)
        if device is None:
            version = _rtx_version()
            if not version:
                missing = (
                    f"neither a CUDA device nor tensorrt-rtx-cu13, which builds without one: {self.install()}"
                )
                return State("absent", missing=missing)
            missing = "no CUDA device: engines are built here, not run here"
            return State("builds", version, portable, missing)
        try:
            api = _api()
        except TargetError as error:
            return State("absent", device=device.name, missing=f"{error}")
        if _supported(api, device.capability):
            return State("runs", api.version, device.name)
        missing = (
            f"{api.version} knows no SM{device.capability} ({device.name}): engines are built, not run here"
        )
        return State("builds", api.version, portable, missing)

    def objections(self, model: Model) -> list[str]:
        return list(_objections(model, self.precision))

    def load(self, path: Path, threads: int = 1) -> Engine:
        state = self.state()
        if state.reach != "runs":
            raise TargetError(f"tensorrt does not run here: {state.missing}")
        return TensorRtEngine(path, self.precision, threads)

    def build(self, path: Path, output: Path | None = None) -> Mapping[str, Any]:
        """Compile a model and, with an `output`, write the engine, and `<output>.json` with what it is built for.

        TensorRT-RTX builds for all of `PORTABLE`, with or without a GPU; TensorRT for the device that it finds.
        Raises `TargetError`, and `UserError` where the engine would replace the model or cannot be written.
        """
        plan = _compile(path, self.precision, portable=True)
        report = plan.report | {"engine": str(output) if output else None}
        if output is not None:
            beside = output.with_name(f"{output.name}.json")
            for place, source in itertools.product((output, beside), (path, *plan.files)):
                if models.same_file(place, source):
                    raise UserError(f"{place}: this would overwrite the input; choose another path")
            with models.atomic(beside) as description, models.atomic(output) as engine:
                engine.write_bytes(plan.data)
                description.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
        return report

    def commands(self, path: Path) -> list[str]:
        """trtexec (TensorRT), the program of the same use of TensorRT-RTX, and Polygraphy against onnxruntime; before
        them the conversion, where there is one."""
        model = models.load(path)
        ranges = ranges_of(model)
        first = []
        if _converts(model, self.precision):
            source, path = path, path.with_suffix(".fp16.onnx")
            first = [shlex.join(["python", "-m", f"{half.__name__}_program", str(source), str(path)])]
        engine = f"--saveEngine={path.with_suffix('.engine')}"
        shapes = [
            f"--{which}Shapes=" + ",".join(f"{name}:{_by_x(shape[i])}" for name, shape in ranges.items())
            for i, which in enumerate(("min", "opt", "max"))
            if ranges
        ]
        given = [f"--onnx={path}", *shapes, engine]
        plain = [] if self.precision == "tf32" else ["--noTF32"]
        polygraphy = ["polygraphy", "run", str(path), "--trt", "--strongly-typed", "--onnxrt"]
        polygraphy += ["--tf32"] if self.precision == "tf32" else []
        for i, which in enumerate(("min", "opt", "max")):
            if ranges:
                lists = [f"{name}:{list(shape[i])}".replace(" ", "") for name, shape in ranges.items()]
                polygraphy += [f"--trt-{which}-shapes", *lists]
        if ranges:
            polygraphy += [
                "--input-shapes",
                *(f"{n}:{list(s[1])}".replace(" ", "") for n, s in ranges.items()),
            ]
        polygraphy += ["--rtol", "0", "--atol", f"{self.tolerance:g}"]
        return [
            *first,
            shlex.join(["trtexec", "--stronglyTyped", *given, *plain]),
            shlex.join(["tensorrt_rtx", *given, *plain]),
            shlex.join(polygraphy),
            f"POLYGRAPHY_USE_TENSORRT_RTX=1 {shlex.join(polygraphy)}",
        ]


class TensorRtEngine(Engine):
    """An engine on the first CUDA device. A run copies its inputs there and its outputs back."""

    def __init__(self, path: Path, precision: str, threads: int) -> None:
        plan = _compile(path, precision, portable=False)
        api = _api()
        device = gpu()
        self._log = _logger(api)
        self._outputs = plan.outputs
        self._stream = Stream()
        self._log.clear()
        self._runtime: Any = api.module.Runtime(self._log.logger)
        self._engine: Any = self._runtime.deserialize_cuda_engine(plan.data)
        self._context: Any = self._engine.create_execution_context() if self._engine else None
        if self._context is None:
            raise TargetError(self._log.errors() or "TensorRT made no engine and gave no reason")
        self.nodes = {device.name if device else "": self._engine.num_layers}
        self.settings = _settings(plan, device.name if device else "", threads)

    def run(self, feeds: Feeds) -> dict[str, Any]:
        try:
            return self._run(feeds)
        except TargetError:
            raise
        except Exception as error:  # of its own bindings
            raise TargetError(one_line(error) or type(error).__name__) from None

    def _run(self, feeds: Feeds) -> dict[str, Any]:
        trt = _api().module
        self._log.clear()
        self._stream.enter()
        kept, results = [], {}  # copies are made later: what they read and write must live until then
        for i in range(self._engine.num_io_tensors):
            name = self._engine.get_tensor_name(i)
            if self._engine.get_tensor_mode(name) == trt.TensorIOMode.INPUT:
                if name not in feeds:
                    raise TargetError(f"nothing is given for input '{name}'")
                value = _contiguous(feeds[name], self._type(name))
                kept.append(value)
                if not self._context.set_input_shape(name, value.shape):
                    raise TargetError(
                        self._log.errors() or f"input '{name}' of shape {value.shape} is refused"
                    )
                if self._engine.get_tensor_location(name) == trt.TensorLocation.HOST:
                    self._context.set_tensor_address(name, value.ctypes.data)
                    continue
                address = self._stream.buffer(name, value.nbytes)
                self._stream.upload(address, value)
                self._context.set_tensor_address(name, address)
        if unknown := self._context.infer_shapes():
            raise TargetError(self._log.errors() or f"shapes cannot be told without {', '.join(unknown)}")
        for name in self._outputs:
            shape = tuple(self._context.get_tensor_shape(name))
            if any(extent < 0 for extent in shape):
                raise TargetError(
                    f"the shape of output '{name}' depends on data, which is not supported here"
                )
            value = np.empty(shape, self._type(name))
            results[name] = value
            if self._engine.get_tensor_location(name) == trt.TensorLocation.HOST:
                self._context.set_tensor_address(name, value.ctypes.data)
            else:
                self._context.set_tensor_address(name, self._stream.buffer(name, value.nbytes))
        if not self._context.execute_async_v3(self._stream.handle):
            raise TargetError(self._log.errors() or "TensorRT failed and gave no reason")
        for name, value in results.items():
            if self._engine.get_tensor_location(name) != trt.TensorLocation.HOST:
                self._stream.download(self._stream.buffer(name, value.nbytes), value)
        self._stream.wait()
        return results

    def _type(self, name: str) -> np.dtype[Any]:
        kind: str = self._engine.get_tensor_dtype(name).name
        known = {
            "FLOAT": np.dtype(np.float32),
            "HALF": np.dtype(np.float16),
            "BF16": np.dtype(ml_dtypes.bfloat16),
            "FP8": np.dtype(ml_dtypes.float8_e4m3fn),
        }
        return known[kind] if kind in known else np.dtype(kind.lower())

    def close(self) -> None:
        """Free the memory on the device."""
        self._context = self._engine = self._runtime = None
        self._stream.close()


def _settings(plan: _Plan, device: str, threads: int) -> dict[str, Any]:
    """What results of an engine on a device depend on."""
    kept = ("version", "precision", "profile", "converted")
    return {
        "provider": "TensorRT",
        "device": device,
        "threads": threads,
        **{key: plan.report[key] for key in kept if key in plan.report},
        "includes": "copies to and from the device",
        "on_cpu": False,
    }


def _contiguous(value: Array, dtype: np.dtype[Any]) -> Array:
    return np.asarray(value, dtype=dtype, order="C")


# Installations


@dataclass(frozen=True)
class _Api:
    """The module, its version in words, and whether it is TensorRT-RTX."""

    module: Any
    version: str
    rtx: bool


def _rtx_version() -> str:
    """Which TensorRT-RTX is installed, in words; empty where none is."""
    for name in ("tensorrt_rtx_cu13", "tensorrt_rtx_cu12", "tensorrt_rtx"):
        try:
            return f"TensorRT-RTX {importlib.metadata.version(name)}"
        except importlib.metadata.PackageNotFoundError:
            continue
    return ""


@functools.cache
def _api() -> _Api:
    """TensorRT where there is a GPU and it can be imported, else TensorRT-RTX. Raises `TargetError`."""
    reasons = []
    for name in ("tensorrt", "tensorrt_rtx") if gpu() else ("tensorrt_rtx",):
        if importlib.util.find_spec(name) is None:
            continue
        try:
            module = importlib.import_module(name)
        except Exception as error:  # its libraries are looked up while it is imported
            reasons.append(f"{name} cannot be imported ({one_line(error)})")
            continue
        rtx = name == "tensorrt_rtx"
        return _Api(module, f"{'TensorRT-RTX' if rtx else 'TensorRT'} {module.__version__}", rtx)
    raise TargetError("; ".join(reasons) or f"tensorrt_rtx is not installed: {TensorRt().install()}")


def _supported(api: _Api, capability: int) -> bool:
    """Whether it makes engines for a device; TensorRT says so itself when it builds."""
    return not api.rtx or hasattr(api.module.ComputeCapability, f"SM{capability}")


@dataclass(frozen=True)
class _Log:
    """TensorRT keeps the first logger that it is given for as long as the process lives: this one."""

    logger: Any
    messages: list[str]

    def clear(self) -> None:
        self.messages.clear()

    def errors(self) -> str:
        """What went wrong since the last `clear`, on one line."""
        return _reasons("\n".join(dict.fromkeys(self.messages)))


@functools.cache
def _logger(api: _Api) -> _Log:
    messages: list[str] = []

    class Logger(api.module.ILogger):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            api.module.ILogger.__init__(self)

        def log(self, severity: Any, text: str) -> None:
            if int(severity) <= 1:  # internal errors and errors
                messages.append(text)

    return _Log(Logger(), messages)


def _reasons(text: str) -> str:
    """TensorRT's message on one line, without the complaints that follow from there being no driver."""
    lines = text.splitlines()
    return one_line(" ".join([line for line in lines if "cudaError 35" not in line] or lines))


# Building


@dataclass(frozen=True)
class _Plan:
    """A serialised engine, the model's outputs in order, what it is built for, and the files it was made of."""

    data: bytes
    outputs: list[str]
    report: dict[str, Any]
    files: frozenset[Path]


def _compile(path: Path, precision: str, portable: bool) -> _Plan:
    """Parse and build, after a conversion where one is asked for. Raises `TargetError` with TensorRT's words, or ours
    where the types are not those asked for."""
    api = _api()
    log = _logger(api)
    log.clear()
    trt = api.module
    try:
        model = models.load(path)
    except UserError as error:
        raise TargetError(f"{error}") from None
    why = [*filter(None, [_mistyped(model, precision)]), *_told(_unsigned(model), _UNSIGNED)]
    if why:  # what TensorRT would build all the same, into something else
        raise TargetError(why[0])
    copy = half.converted(model, TensorRt(precision).tolerance) if _converts(model, precision) else None
    builder = trt.Builder(log.logger)
    network = builder.create_network(0 if api.rtx else _strongly_typed(trt))
    parser = trt.OnnxParser(network, log.logger)
    if not (parser.parse(copy.proto.SerializeToString()) if copy else parser.parse_from_file(str(path))):
        raise TargetError(_refusals(parser) or log.errors() or "TensorRT cannot read the model")
    config = builder.create_builder_config()
    if precision != "tf32":
        config.clear_flag(trt.BuilderFlag.TF32)
    built_for = _aim(api, config, portable)
    try:
        ranges = ranges_of(model)
    except UserError as error:
        raise TargetError(f"{error}") from None
    if ranges:
        profile = builder.create_optimization_profile()
        for name, shapes in ranges.items():
            profile.set_shape(name, *shapes)
        if config.add_optimization_profile(profile) < 0:
            raise TargetError(log.errors() or "TensorRT refuses the ranges of the inputs' shapes")
    data = builder.build_serialized_network(network, config)
    if data is None:
        raise TargetError(log.errors() or "TensorRT builds no engine and gives no reason")
    plan = bytes(data)
    report = {
        "version": api.version,
        "built_for": built_for,
        "precision": precision,
        **({"converted": copy.as_dict()} if copy else {}),
        "profile": {
            name: dict(zip(("min", "opt", "max"), map(list, r), strict=True)) for name, r in ranges.items()
        },
        "layers": network.num_layers,
        "bytes": len(plan),
        "model": model.digest(),
    }
    return _Plan(plan, [output.name for output in model.outputs], report, model.files)


def _strongly_typed(trt: Any) -> int:
    """The flag of a network whose types are those of the file."""
    return 1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED)


def _aim(api: _Api, config: Any, portable: bool) -> list[str]:
    """Set the devices that are built for, and name them."""
    device = gpu()
    wanted = PORTABLE if portable or device is None else (device.capability,)
    if api.rtx:
        config.num_compute_capabilities = len(wanted)
        for i, capability in enumerate(wanted):
            config.set_compute_capability(getattr(api.module.ComputeCapability, f"SM{capability}"), i)
    elif device is not None:
        return [f"SM{device.capability}"]
    return [f"SM{capability}" for capability in wanted]


def _refusals(parser: Any) -> str:
    """What the parser objects to, node by node, the first three."""
    errors = [parser.get_error(i) for i in range(min(parser.num_errors, 3))]
    more = f" (and {parser.num_errors - len(errors)} more)" if parser.num_errors > len(errors) else ""
    told = []
    for error in errors:
        text = error.desc()
        reason = "not supported" if text in ("", "false") else _reasons(text)
        told.append(f"{error.node_operator()} '{error.node_name()}': {reason}")
    return one_line("; ".join(told)) + more if told else ""


def _by_x(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape))


# What it is known not to take


def _stored_as(model: Model) -> str | None:
    """The precision of most weights, or int8 where activations are quantised; None where there are no weights."""
    if any(node.op == "QuantizeLinear" and node.domain == "" for node in model.nodes):
        return "int8"
    counts = Counter[str]()
    for tensor in model.constants.values():
        if len(tensor.dims) > 1 and tensor.data_type in _WEIGHTS:
            counts[_WEIGHTS[tensor.data_type]] += int(np.prod(tensor.dims))
    return counts.most_common(1)[0][0] if counts else None


def _converts(model: Model, precision: str) -> bool:
    """Whether a copy in another type is built instead of the file."""
    return precision == "fp16" and _stored_as(model) == "fp32"


def _mistyped(model: Model, precision: str) -> str | None:
    """Why the file is not one of that precision, nor converted, and what to do; None where it is."""
    stored = _stored_as(model)
    if stored is None or stored == precision or (stored, precision) == ("fp32", "tf32"):
        return None
    if _converts(model, precision):
        return half.obstacle(model)
    if precision == "int8":
        return (
            f"nothing in the model is quantised ({stored}): quantise it first, or ask for tensorrt:{stored}"
        )
    if stored == "int8":
        return "the model is quantised, and TensorRT takes types as they are: ask for tensorrt:int8"
    return (
        f"the weights are {stored}, and TensorRT takes types as they are: "
        f"convert the model to {precision}, or ask for tensorrt:{stored}"
    )


def _objections(model: Model, precision: str) -> Iterator[str]:
    why = _mistyped(model, precision)
    if why is not None:
        yield why
    foreign = [node for node in model.nodes if node.domain == "com.microsoft"]
    yield from _told(foreign, "of onnxruntime's own domain: not in TensorRT's parser")
    integer = [node for node in model.nodes if node.domain == "" and node.op in _INTEGER_ONLY]
    yield from _told(integer, "TensorRT takes QuantizeLinear and DequantizeLinear only")
    yield from _quantisation(model)
    if any(node.op == "Attention" and node.domain == "" for node in model.nodes):
        yield from _attention(model, _converts(model, precision))
    device = gpu()
    if device and device.capability == TURING and _stored_as(model) == "fp32" and _rtx_version():
        if not _converts(model, precision):
            yield "TensorRT-RTX multiplies no float32 matrices on SM75: ask for tensorrt:fp16"


def _told(nodes: list[Node], why: str) -> Iterator[str]:
    """One line about nodes that share a fault, naming the first."""
    if nodes:
        more = f" and {len(nodes) - 1} more" if len(nodes) > 1 else ""
        yield f"{nodes[0]}{more}: {why}"


_UNSIGNED = "uint8, which TensorRT's parser takes for int8 and so cuts off above 127: quantise to int8"


def _quantisation(model: Model) -> Iterator[str]:
    shifted, biases, bare = [], [], []
    for node in model.nodes:
        if node.domain != "":
            continue
        constants = [model.constants[name].data_type for name in node.inputs if name in model.constants]
        if node.op not in _BORDERS:
            if onnx.TensorProto.INT8 in constants:
                bare.append(node)
        elif constants and node.inputs[0] in model.constants and constants[0] == onnx.TensorProto.INT32:
            biases.append(node)
        elif (zero := _zero_point(node)) in model.constants and model.array(zero).astype(np.float64).any():
            shifted.append(node)
    yield from _told(
        bare, "an int8 constant goes through a DequantizeLinear in TensorRT, or is stored in float"
    )
    yield from _told(shifted, "the zero point is not 0; TensorRT takes symmetric int8 only")
    yield from _told(_unsigned(model), _UNSIGNED)
    yield from _told(biases, "an int32 bias; leave biases in float when quantising")


def _unsigned(model: Model) -> list[Node]:
    """Borders of uint8, which is also what QuantizeLinear means where it does not say."""
    found = []
    for node in model.nodes:
        if node.domain == "" and node.op in _BORDERS:
            zero = model.constants.get(_zero_point(node))
            kind = zero.data_type if zero is not None else node.attributes.get("output_dtype", 0)
            silent = node.op == "QuantizeLinear" and not _zero_point(node) and not kind
            if silent or kind == onnx.TensorProto.UINT8:
                found.append(node)
    return found


def _zero_point(node: Node) -> str:
    return node.inputs[2] if len(node.inputs) > 2 else ""


def _attention(model: Model, converts: bool) -> Iterator[str]:
    """What TensorRT-RTX 1.7 refuses of Attention nodes; it takes all widths apart where heads lie beside each other and
    every extent is stated."""
    shapes = analyse(model)
    wide, odd, single, uneven = [], [], [], []
    for node in model.nodes:
        if node.op != "Attention" or node.domain != "":
            continue
        if not converts and shapes.elements.get(node.inputs[0]) == onnx.TensorProto.FLOAT:
            wide.append(node)
        groups = node.attributes.get("kv_num_heads", 0)
        counts = (node.attributes.get("q_num_heads", 0), groups, groups)
        widths = [
            shape[-1] if len(shape) == 4 else shape[-1] // count
            for name, count in zip(node.inputs[:3], counts, strict=True)
            if (shape := shapes.shapes.get(name)) and (len(shape) == 4 or count)
        ]
        query = shapes.shapes.get(node.inputs[0]) or ()
        loose = len(query) == 4 or bool(dynamic_dims(model))
        if loose and any(width not in WIDTHS for width in widths):
            odd.append(node)
        elif loose and query[:1] == (1,) and (query[1] if len(query) == 4 else counts[0]) == 1:
            single.append(node)
        if len(set(widths)) > 1:
            uneven.append(node)
    yield from _told(wide, "TensorRT builds this node in float16 and bfloat16, not in float32")
    yield from _told(odd, f"heads are not {WIDTHS[0]} to {WIDTHS[-1]} wide")
    yield from _told(single, "a single head in a batch of one: leave two, or the batch open")
    yield from _told(uneven, "heads of values are not as wide as those of keys: prune both together")


TARGET = TensorRt
