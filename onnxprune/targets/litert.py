"""LiteRT (TensorFlow Lite), on the CPU with XNNPACK; onnx2tf converts the model.

Both pin other versions of onnx and numpy than this package needs, so that they live in an environment of their own,
in which a process converts and runs. Times would be those of the pipe, too, and are not taken.
"""

from __future__ import annotations

import math
import platform
import shlex
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort

from onnxprune import flow
from onnxprune.allocation import Alignment
from onnxprune.model import Model
from onnxprune.runtime import Feeds, newest
from onnxprune.targets import litert_program
from onnxprune.targets.cache import kept
from onnxprune.targets.fixed import dtypes, fixed
from onnxprune.targets.messages import one_line
from onnxprune.targets.provider import FixedEngine
from onnxprune.targets.remote import RemoteEngine
from onnxprune.targets.target import Engine, State, Target, TargetError, Versions
from onnxprune.targets.xnnpack import Xnnpack

PROVIDER = "LiteRT"
PACKAGE = "onnx2tf"
INPUT, OUTPUT = "onnxprune_input_", "onnxprune_output_"


def environment() -> Path:
    """Where its environment is looked for: a folder of the cache."""
    return kept("litert")


class LiteRt(Target):
    """Networks run in float32, convolutions and products in XNNPACK."""

    name = "litert"
    title = "LiteRT with XNNPACK through onnx2tf, CPU"
    timed = False

    def alignment(self) -> Alignment:
        return Xnnpack().alignment()

    def install(self) -> str:
        folder = shlex.quote(str(environment()))
        return f"with Python 3.12 or newer, python3 -m venv {folder} && {folder}/bin/pip install {PACKAGE}"

    def state(self) -> State:
        device = platform.machine()
        packages = environment() / "lib"
        versions = []
        for name in ("ai_edge_litert", PACKAGE):
            found = sorted(packages.glob(f"python*/site-packages/{name}-*.dist-info"))
            if not found:
                return State("absent", device=device, missing=f"not installed: {self.install()}")
            versions.append(found[-1].name.removesuffix(".dist-info").replace("-", " "))
        return State("runs", ", ".join(versions).replace("ai_edge_litert", "LiteRT"), device)

    def newest(self) -> Versions:
        return Versions(*newest())  # of onnxruntime, which reads the model first

    def objections(self, model: Model) -> list[str]:
        found = super().objections(model)
        if any(node.domain == flow.DOMAIN for node in model.nodes):
            found.append("onnx2tf converts no bodies of If, Loop and Scan")
        return found

    def load(self, path: Path, threads: int = 1) -> Engine:
        state = self.state()
        if state.reach != "runs":
            raise TargetError(f"{self.name} does not run here: {state.missing}")
        return FixedEngine(path, lambda file: LiteRtEngine(file, threads))


class LiteRtEngine(Engine):
    """A model whose inputs have exact shapes.

    onnx2tf moves channels to the end, outputs too, and shapes do not always tell whether it did. So it is given a copy
    of the model with outputs in one row, whose order it must keep. Names it may change, too: it is given plain ones.
    """

    def __init__(self, path: Path, threads: int) -> None:
        with tempfile.TemporaryDirectory(prefix="onnxprune-") as folder:
            proto = _folded(fixed(path, {}, Path(folder)))
            weights = {tensor.name for tensor in proto.graph.initializer}
            self._inputs = [value.name for value in proto.graph.input if value.name not in weights]
            self._outputs = {output.name: _fact(output) for output in proto.graph.output}
            copy = Path(folder, "flat.onnx")
            copy.write_bytes(_plain(proto, self._inputs).SerializeToString())
            self._remote = RemoteEngine(
                copy,
                PROVIDER,
                {},
                threads,
                interpreter=environment() / "bin" / "python",
                program=litert_program.__file__,
                precision="fp32",
            )
        self.nodes, self.place, self.settings = self._remote.nodes, self._remote.place, self._remote.settings

    def run(self, feeds: Feeds) -> dict[str, Any]:
        if missing := next((name for name in self._inputs if name not in feeds), None):
            raise TargetError(f"it takes an input '{missing}', for which nothing is given")
        flat = self._remote.run({f"{INPUT}{i}": feeds[name] for i, name in enumerate(self._inputs)})
        made: dict[str, Any] = {}
        for index, (name, (shape, kind)) in enumerate(self._outputs.items()):
            value = np.asarray(flat[f"{OUTPUT}{index}"])
            if value.size != math.prod(shape):
                raise TargetError(f"output '{name}' has {value.size} values, not those of {list(shape)}")
            made[name] = value.reshape(shape).astype(kind, copy=False)
        return made

    def close(self) -> None:
        """End the process."""
        self._remote.close()


def _folded(path: Path) -> onnx.ModelProto:
    """The model with the shapes of its outputs, the arithmetic on shapes done by onnxruntime: onnx2tf loses track of
    it. Raises `TargetError`."""
    options = ort.SessionOptions()
    options.log_severity_level = 4
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_BASIC
    options.optimized_model_filepath = str(path.with_name("folded.onnx"))
    try:
        session = ort.InferenceSession(str(path), options)
        proto = onnx.load(options.optimized_model_filepath)
    except Exception as error:  # onnxruntime raises classes of its own, without a common base
        raise TargetError(one_line(error)) from None
    dtypes(proto.graph.output, "output")
    for output, found in zip(proto.graph.output, session.get_outputs(), strict=True):
        kind = output.type.tensor_type.elem_type
        output.CopyFrom(onnx.helper.make_tensor_value_info(output.name, kind, found.shape))
    return proto


def _fact(output: onnx.ValueInfoProto) -> tuple[tuple[int, ...], np.dtype[Any]]:
    """Shape and type. Raises `TargetError` where the shape is not known before a run."""
    tensor = output.type.tensor_type
    if not all(dim.HasField("dim_value") for dim in tensor.shape.dim):
        raise TargetError(f"the shape of output '{output.name}' is not known before a run")
    kind = onnx.helper.tensor_dtype_to_np_dtype(tensor.elem_type)
    return tuple(dim.dim_value for dim in tensor.shape.dim), kind


def _plain(proto: onnx.ModelProto, inputs: Sequence[str]) -> onnx.ModelProto:
    """The model, changed to give each output in one row, its inputs and outputs numbered."""
    graph = proto.graph
    taken = {value.name: value for value in graph.input}
    del graph.input[:]
    for index, name in enumerate(inputs):
        value = graph.input.add()
        value.CopyFrom(taken[name])
        value.name = f"{INPUT}{index}"
        graph.node.insert(0, onnx.helper.make_node("Identity", [value.name], [name]))
    shape = onnx.numpy_helper.from_array(np.array([-1]), f"{OUTPUT}shape")
    graph.initializer.append(shape)
    outputs = list(graph.output)
    del graph.output[:]
    for index, output in enumerate(outputs):
        name, kind = f"{OUTPUT}{index}", output.type.tensor_type.elem_type
        graph.node.append(onnx.helper.make_node("Reshape", [output.name, shape.name], [name]))
        graph.output.append(onnx.helper.make_tensor_value_info(name, kind, None))
    return proto


TARGET = LiteRt
