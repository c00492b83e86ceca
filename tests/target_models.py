"""Small networks that targets are asked to run, with inputs and what onnxruntime makes of them; and broken ones."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from models.builder import Graph
from models.quantised import QUANTISED
from models.recurrent import RECURRENT
from models.transformers import TRANSFORMERS
from onnxprune import model as models
from onnxprune.runtime import Feeds, Session, index_bounds, make_feeds
from onnxprune.shapes import analyse


def convolutions(channels: int = 16, classes: int = 5) -> onnx.ModelProto:
    """Convolutions with BatchNormalization, a residual, a depthwise and a grouped one; the batch is open."""
    g = Graph("convolutions", seed=3)
    x = g.input("batch", 3, 12, 12, name="image")
    x = g.conv_bn(x, channels, 3, act="relu")
    y = g.conv_bn(x, channels, 3, group=channels, act="relu6")
    x = g.add(x, g.conv_bn(y, channels, 1))
    x = g.conv_bn(x, 2 * channels, 3, stride=2, group=2, act="relu")
    return g.model(g.gemm(g.flatten(g.gap(x)), classes), names=["logits"])


def symmetric(channels: int = 16) -> onnx.ModelProto:
    """Two convolutions in QDQ format as TensorRT takes it: int8, zero points of 0, biases in float."""
    generator = np.random.default_rng(5)
    nodes: list[onnx.NodeProto] = []
    stored = [numpy_helper.from_array(np.array(0, np.int8), "zero")]

    def add(op: str, inputs: list[str], output: str, **attributes: Any) -> str:
        nodes.append(helper.make_node(op, inputs, [output], name=output, **attributes))
        return output

    def store(name: str, value: Any) -> str:
        stored.append(numpy_helper.from_array(np.asarray(value), name))
        return name

    def both(x: str, scale: float, name: str) -> str:
        operands = [store(f"{name}.scale", np.float32(scale)), "zero"]
        quantised = add("QuantizeLinear", [x, *operands], f"{name}.q")
        return add("DequantizeLinear", [quantised, *operands], f"{name}.dq")

    def convolve(x: str, cin: int, name: str) -> str:
        weight = generator.integers(-127, 128, (channels, cin, 3, 3)).astype(np.int8)
        scales = generator.uniform(0.5, 1, channels).astype(np.float32) / np.float32(127 * 3 * np.sqrt(cin))
        inputs = [store(f"{name}.weight", weight), store(f"{name}.scales", scales)]
        inputs.append(store(f"{name}.zeros", np.zeros(channels, np.int8)))
        w = add("DequantizeLinear", inputs, f"{name}.w", axis=0)
        bias = store(f"{name}.bias", generator.standard_normal(channels).astype(np.float32) / 8)
        return add("Conv", [x, w, bias], f"{name}.out", pads=[1, 1, 1, 1])

    x = add("Relu", [convolve(both("image", 0.03, "first"), 3, "conv1")], "relu")
    x = convolve(both(x, 0.02, "second"), channels, "conv2")
    nodes[-1].output[0] = "y"
    image = helper.make_tensor_value_info("image", TensorProto.FLOAT, ["batch", 3, 8, 8])
    result = helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", channels, 8, 8])
    graph = helper.make_graph(nodes, "symmetric", [image], [result], stored)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


SMALL: dict[str, Callable[[], onnx.ModelProto]] = {
    "convolutions": convolutions,
    "off-blocks": lambda: convolutions(channels=18),
    "transformer": TRANSFORMERS["torchscript"],
    "lstm": RECURRENT["lstm"],
    "gru": RECURRENT["gru"],
    "quantised": symmetric,
    "integers": QUANTISED["transformer_of_integers"],
}


def broken() -> onnx.ModelProto:
    """A convolution whose weight reads one channel too many; the ONNX checker finds nothing wrong with it."""
    proto = convolutions()
    node = next(node for node in proto.graph.node if node.op_type == "Conv" and len(node.attribute) >= 1)
    weight = next(t for t in proto.graph.initializer if t.name == node.input[1])
    values = numpy_helper.to_array(weight)
    more = np.concatenate([values, values[:, :1]], axis=1)
    weight.CopyFrom(numpy_helper.from_array(more, weight.name))
    del proto.graph.value_info[:]
    onnx.checker.check_model(proto)
    return proto


def other_than_numbers(kind: str) -> onnx.ModelProto:
    """A classifier whose output `made` is no tensor of numbers: texts, a sequence of tensors, or one of maps."""
    weight = numpy_helper.from_array(np.random.default_rng(0).normal(size=(8, 4)).astype(np.float32), "w")
    floats = helper.make_tensor_type_proto(TensorProto.FLOAT, None)
    node, made = {
        "texts": (
            helper.make_node("Cast", ["scores"], ["made"], to=TensorProto.STRING),
            helper.make_tensor_type_proto(TensorProto.STRING, None),
        ),
        "tensors": (
            helper.make_node("SplitToSequence", ["scores"], ["made"]),
            helper.make_sequence_type_proto(floats),
        ),
        "maps": (
            helper.make_node(
                "ZipMap", ["scores"], ["made"], domain="ai.onnx.ml", classlabels_int64s=list(range(4))
            ),
            helper.make_sequence_type_proto(helper.make_map_type_proto(TensorProto.INT64, floats)),
        ),
    }[kind]
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["scores"]), node],
        kind,
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [2, 8])],
        [helper.make_value_info("made", made)],
        [weight],
    )
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("ai.onnx.ml", 3)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=8)


OTHER = ("texts", "tensors", "maps")


def written(proto: onnx.ModelProto, folder: Path) -> Path:
    path = folder / "model.onnx"
    onnx.save(proto, path)
    return path


def truth(path: Path, seed: int = 0) -> tuple[Feeds, dict[str, np.ndarray]]:
    """Inputs for a model, and what onnxruntime's CPU provider makes of them."""
    model = models.load(path)
    shapes = analyse(model)
    feeds = make_feeds(model, shapes.sizes, seed, index_bounds(model, shapes.shapes))
    return feeds, Session(path, optimise="all", threads=1).run(feeds)


def error(result: dict[str, Any], expected: dict[str, np.ndarray]) -> float:
    """The largest difference of all outputs, as a share of their scale."""
    assert list(result) == list(expected)
    worst = 0.0
    for name, value in expected.items():
        assert result[name].shape == value.shape
        assert result[name].dtype == value.dtype
        scale = float(np.abs(value).max())
        assert scale > 0
        worst = max(worst, float(np.abs(result[name].astype(np.float64) - value).max()) / scale)
    return worst
