"""A network of two convolutions to break in many ways, and the command line as a function."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
from click.testing import CliRunner, Result
from onnx import TensorProto, helper, numpy_helper

from onnxprune.cli import main

Nodes = Sequence[onnx.NodeProto]


def weight(name: str, *shape: int, dtype: Any = np.float32) -> onnx.TensorProto:
    values = np.random.default_rng(len(name)).standard_normal(shape)
    return numpy_helper.from_array(values.astype(dtype), name)


def ints(name: str, *values: int) -> onnx.TensorProto:
    return numpy_helper.from_array(np.array(values, dtype=np.int64), name)


def floats(name: str, *dims: Any) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, TensorProto.FLOAT, list(dims))


def net(
    middle: Nodes = (),
    weights: Sequence[onnx.TensorProto] = (),
    last: str = "b",
    opset: int = 17,
    ir: int = 8,
) -> onnx.ModelProto:
    """conv1 (8 channels, tensor a), what is between (a to `last`; a Relu by default), conv2, pooling."""
    between = middle or [helper.make_node("Relu", ["a"], ["b"], name="relu")]
    nodes = [
        helper.make_node("Conv", ["x", "w1"], ["a"], name="conv1"),
        *between,
        helper.make_node("Conv", [last, "w2"], ["c"], name="conv2"),
        helper.make_node("GlobalAveragePool", ["c"], ["y"], name="pool"),
    ]
    stored = [weight("w1", 8, 3, 3, 3), weight("w2", 4, 8, 1, 1), *weights]
    graph = helper.make_graph(nodes, "net", [floats("x", "n", 3, 8, 8)], [floats("y", "n", 4, 1, 1)], stored)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=ir)


def write(proto: onnx.ModelProto | bytes, path: Path) -> Path:
    path.write_bytes(proto if isinstance(proto, bytes) else proto.SerializeToString())
    return path


def run(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(a) for a in arguments], prog_name="onnxprune")


def shrink(model: Path, *arguments: object) -> Result:
    """Half of the channels, to the unit, by the weights alone."""
    plain = ("--criterion", "l2", "--allocation", "uniform", "--repair", "none")
    return run("shrink", model, "--channels", 0.5, "--align", 1, *plain, *arguments)


def check_refused(result: Result, *words: object, code: int = 2) -> None:
    """One line on stderr that holds the words and nothing that moves the cursor; nothing on stdout."""
    assert result.exit_code == code, result.output
    assert result.stdout == ""
    assert result.stderr.startswith("onnxprune: ")
    assert result.stderr.count("\n") == 1
    assert result.stderr.rstrip("\n").isprintable()
    assert "Traceback" not in result.stderr
    for word in words:
        assert str(word) in result.stderr


def even_classes(model: onnx.ModelProto, feeds: np.ndarray) -> onnx.ModelProto:
    """The model with its last bias such that no class leads on these images on the whole."""
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    scores = session.run(None, {"image": feeds})[0]
    bias = next(t for t in model.graph.initializer if t.name == model.graph.node[-1].input[2])
    level = numpy_helper.to_array(bias) - scores.mean(axis=0)
    bias.CopyFrom(numpy_helper.from_array(level.astype(np.float32), bias.name))
    return model
