"""OpenVINO's own runtime on the CPU, through its Python API."""

from __future__ import annotations

import importlib
import importlib.metadata
import platform
import shlex
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from onnxprune import model as models
from onnxprune.allocation import Alignment
from onnxprune.runtime import Feeds
from onnxprune.targets.cpu import UNSIGNED, Cpu
from onnxprune.targets.messages import one_line
from onnxprune.targets.ranges import ranges_of
from onnxprune.targets.target import Engine, State, Target, TargetError, version_of

DEVICE = "CPU"
_HINTS = {"fp32": "f32", "bf16": "bf16"}
_REDUCED = {"bf16", "f16"}
_INERT = {"Parameter", "Result", "Constant", "Const", "Input", "Output"}  # layers that compute nothing


class OpenVino(Target):
    """Its CPU plugin computes in bf16 by default where the processor can; here the precision is always stated.

    Kernels are oneDNN's, in blocks of one vector register: 16 channels with AVX-512, 8 with AVX2.
    """

    name = "openvino"
    title = "OpenVINO, CPU"
    scheme = UNSIGNED
    extra = "openvino"
    precisions = ("fp32", "bf16")

    def alignment(self) -> Alignment:
        """As onnxruntime's; parts of a block run on no slower kernels here."""
        return replace(Cpu().alignment(), whole=False)

    def state(self) -> State:
        device = platform.machine()
        version = version_of("openvino")
        if not version:
            return State("absent", device=device, missing=f"openvino is not installed: {self.install()}")
        version = f"OpenVINO {version}"
        if self.precision != "bf16":
            return State("runs", version, device)
        try:
            able = "BF16" in _core().get_property(DEVICE, "OPTIMIZATION_CAPABILITIES")
        except (TargetError, RuntimeError) as error:
            return State("absent", version, device, one_line(error))
        return State("runs" if able else "absent", version, device, "" if able else "this CPU has no bf16")

    def load(self, path: Path, threads: int = 1) -> Engine:
        return OpenVinoEngine(path, threads, self.precision)

    def commands(self, path: Path) -> list[str]:
        command = ["benchmark_app", "-m", str(path), "-d", DEVICE, "-infer_precision", _HINTS[self.precision]]
        command += ["-hint", "none", "-nthreads", "1", "-nstreams", "1", "-api", "sync"]
        ranges = ranges_of(models.load(path))
        if ranges:
            shapes = [f"{name}{list(likely)}".replace(" ", "") for name, (_, likely, _) in ranges.items()]
            command += ["-data_shape", ",".join(shapes)]
        return [shlex.join(command)]


class OpenVinoEngine(Engine):
    """A compiled model and one request.

    Inputs and outputs are known by their place, which is that in the file: what names an input is, once compiled, often
    that of what only carries it (Identity, Dropout, a Cast to half).

    `nodes` counts the layers by device, `settings["layers"]` by the precision in which they run.
    """

    def __init__(self, path: Path, threads: int, precision: str) -> None:
        core = _core()
        wanted = {
            "INFERENCE_PRECISION_HINT": _HINTS[precision],
            "EXECUTION_MODE_HINT": "ACCURACY",
            "DYNAMIC_QUANTIZATION_GROUP_SIZE": 0,  # or inputs of layers with int8 weights become int8, too
            "PERFORMANCE_HINT": "LATENCY",
            "NUM_STREAMS": 1,
            "INFERENCE_NUM_THREADS": threads,
            "ENABLE_CPU_PINNING": False,  # or engines that live side by side share one core
        }
        try:
            graph = _header(path).graph
            weights = {tensor.name for tensor in graph.initializer}
            self._inputs = [value.name for value in graph.input if value.name not in weights]
            self._outputs = [value.name for value in graph.output]
            for value in graph.input:
                if value.type.tensor_type.elem_type == onnx.TensorProto.STRING:  # it corrupts its memory
                    raise TargetError(f"input '{value.name}' holds strings, at which OpenVINO crashes")
            compiled = core.compile_model(core.read_model(str(path)), DEVICE, wanted)
            self.nodes, layers = verified(compiled, DEVICE, precision)
            self._request = compiled.create_infer_request()
            self._types = [port.get_element_type().to_dtype() for port in compiled.inputs]
            for what, found, stated in (
                ("inputs", compiled.inputs, self._inputs),
                ("outputs", compiled.outputs, self._outputs),
            ):
                if len(found) != len(stated):
                    raise TargetError(f"OpenVINO has {len(found)} {what} of the model's {len(stated)}")
            self.settings = {
                "provider": "OpenVINO",
                "version": f"OpenVINO {importlib.metadata.version('openvino')}",
                "device": core.get_property(DEVICE, "FULL_DEVICE_NAME").strip(),
                "precision": precision,
                "layers": layers,
                "threads": compiled.get_property("INFERENCE_NUM_THREADS"),
                "streams": compiled.get_property("NUM_STREAMS"),
            }
        except TargetError:
            raise
        except Exception as error:  # also of its own bindings, without a common base
            raise TargetError(one_line(error) or type(error).__name__) from None

    def run(self, feeds: Feeds) -> dict[str, Any]:
        if missing := next((name for name in self._inputs if name not in feeds), None):
            raise TargetError(f"it takes an input '{missing}', for which nothing is given")
        try:
            given = {
                place: np.asarray(feeds[name], kind, order="C")
                for place, (name, kind) in enumerate(zip(self._inputs, self._types, strict=True))
            }
            results = self._request.infer(given, share_inputs=True, share_outputs=False)
            return dict(zip(self._outputs, results.to_tuple(), strict=True))
        except Exception as error:  # as above
            raise TargetError(one_line(error) or type(error).__name__) from None


def verified(compiled: Any, device: str, precision: str) -> tuple[Counter[str], dict[str, int]]:
    """Layers by device and by precision, of a compiled model.

    Raises `TargetError` where it runs on another device, or in another precision, than was asked for.
    """
    devices = list(compiled.get_property("EXECUTION_DEVICES"))
    if devices != [device]:
        raise TargetError(f"OpenVINO placed the model on {', '.join(devices)} instead of {device}")
    layers = Counter[str]()
    for operation in compiled.get_runtime_model().get_ordered_ops():
        info = operation.get_rt_info()
        if _text(info, "layerType") not in _INERT:
            layers[_text(info, "runtimePrecision")] += 1
    lower = sum(count for kind, count in layers.items() if kind in _REDUCED)
    if precision == "fp32" and lower:
        raise TargetError(f"OpenVINO runs {lower} layers in 16 bits although fp32 was asked for")
    if precision == "bf16" and not layers["bf16"]:
        raise TargetError("OpenVINO runs no layer in bf16 although bf16 was asked for")
    return Counter({device: layers.total()}), dict(sorted(layers.items()))


def _text(info: Any, key: str) -> str:
    """An entry of what OpenVINO says about a layer of the compiled graph."""
    value = info[key]
    return str(getattr(value, "value", value))


def _header(path: Path) -> onnx.ModelProto:
    """The model without the contents of its data files."""
    return onnx.load(str(path), load_external_data=False)


def _core() -> Any:
    try:
        return importlib.import_module("openvino").Core()
    except (ImportError, OSError) as error:
        raise TargetError(f"openvino cannot be imported ({one_line(error)})") from None


TARGET = OpenVino
