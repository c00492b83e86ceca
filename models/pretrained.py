"""ONNX graphs around trained weights that packages carry as PyTorch state dicts."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import onnx
from onnx import ModelProto, TensorProto, helper, numpy_helper
from onnxruntime.quantization import (
    CalibrationDataReader,
    QuantFormat,
    QuantType,
    quantize_static,
)

from models.builder import Array, Graph, Tensor

State = Mapping[str, Array]
"""Tensors by name."""


# EfficientNet-Lite0


def efficientnet_lite0(state: State, *, fold: bool = False) -> ModelProto:
    """EfficientNet-Lite0 for 224 x 224 images in [-1, 1] and the 1,000 classes of ImageNet.

    Batch normalisation is its own node, or folded into the convolutions and the operator set 20.
    """
    g = Graph("efficientnet_lite0", opset=20, ir=10) if fold else Graph("efficientnet_lite0")

    def layer(x: Tensor, conv: str, bn: str, *, stride: int = 1, act: bool = True) -> Tensor:
        kernel, vectors = state[f"{conv}.weight"], _bn_vectors(state, bn)
        total = max(kernel.shape[-1] - stride, 0)
        options = {
            "stride": stride,
            "group": x.channels // kernel.shape[1],
            "pad": [total // 2, total // 2, total - total // 2, total - total // 2],
        }
        if fold:
            scale, bias, mean, var = vectors
            factor = scale / np.sqrt(var + 1e-3)
            weight = g.store(f"{conv}.weight", kernel * factor[:, None, None, None])
            shift = g.store(f"{conv}.bias", bias - mean * factor)
            x = g.conv(x, weight=weight, bias=shift, **options)
        else:
            weight = g.store(f"{conv}.weight", kernel)
            x = g.conv(x, weight=weight, bias=False, **options)
            x = _bn(g, x, bn, vectors)
        return g.act(x, "relu6") if act else x

    x = g.input("batch", 3, 224, 224, name="image")
    x = layer(x, "_conv_stem", "_bn0", stride=2)
    for block, stride in enumerate((1, 2, 1, 2, 1, 2, 1, 1, 1, 1, 1, 2, 1, 1, 1, 1)):
        root = f"_blocks.{block}"
        y = x
        if f"{root}._expand_conv.weight" in state:
            y = layer(y, f"{root}._expand_conv", f"{root}._bn0")
        y = layer(y, f"{root}._depthwise_conv", f"{root}._bn1", stride=stride)
        y = layer(y, f"{root}._project_conv", f"{root}._bn2", act=False)
        x = g.add(x, y) if stride == 1 and x.channels == y.channels else y
    x = layer(x, "_conv_head", "_bn1")
    x = _gemm(g, g.reduce("ReduceMean", x, 2, 3, keepdims=False), state, "_fc")
    return g.model(x, names=["logits"])


def save_efficientnet_lite0(state: State, path: Path) -> None:
    """Write EfficientNet-Lite0 with batch normalisation."""
    onnx.save_model(efficientnet_lite0(state), path)


def save_efficientnet_lite0_folded(state: State, path: Path) -> None:
    """Write EfficientNet-Lite0 without batch normalisation, weights in a file beside it."""
    onnx.save_model(
        efficientnet_lite0(state, fold=True),
        path,
        save_as_external_data=True,
        location=f"{path.name}.data",
    )


def save_efficientnet_lite0_fp16(state: State, path: Path) -> None:
    """Write EfficientNet-Lite0 in half precision, with float inputs and outputs."""
    onnx.save_model(half_precision(efficientnet_lite0(state)), path)


def save_efficientnet_lite0_qdq(state: State, path: Path) -> None:
    """Write EfficientNet-Lite0 in int8 with QuantizeLinear and DequantizeLinear pairs."""
    model = onnx.shape_inference.infer_shapes(efficientnet_lite0(state, fold=True))
    helper.set_model_props(model, {"onnx.quant.pre_process": "onnxruntime.quant"})
    quantize_static(
        model,
        path,
        _Calibration(),
        quant_format=QuantFormat.QDQ,
        per_channel=True,
        activation_type=QuantType.QUInt8,
        weight_type=QuantType.QInt8,
    )


class _Calibration(CalibrationDataReader):  # type: ignore[misc]
    """Eight seeded images of coarse coloured patches with fine noise."""

    def __init__(self) -> None:
        self._images = self._draw()

    @staticmethod
    def _draw() -> Iterator[dict[str, Array]]:
        rng = np.random.default_rng(0)
        for _ in range(8):
            patches = np.kron(rng.uniform(-1, 1, (1, 3, 7, 7)), np.ones((32, 32)))
            image = patches + rng.normal(0, 0.1, patches.shape)
            yield {"image": image.clip(-1, 1).astype(np.float32)}

    def get_next(self) -> dict[str, Array] | None:
        """The next image, or None after the last."""
        return next(self._images, None)


def half_precision(model: ModelProto) -> ModelProto:
    """Turn float weights into half precision, and cast at every graph input and output."""
    graph = model.graph
    for tensor in graph.initializer:
        if tensor.data_type == TensorProto.FLOAT:
            half = numpy_helper.to_array(tensor).astype(np.float16)
            tensor.CopyFrom(numpy_helper.from_array(half, tensor.name))
    inner = {info.name: f"{info.name}.half" for info in [*graph.input, *graph.output]}
    for node in graph.node:
        for names in (node.input, node.output):
            names[:] = [inner.get(name, name) for name in names]
    first = [_cast(info.name, inner[info.name], TensorProto.FLOAT16) for info in graph.input]
    last = [_cast(inner[info.name], info.name, TensorProto.FLOAT) for info in graph.output]
    nodes = [*first, *graph.node, *last]
    del graph.node[:]
    graph.node.extend(nodes)
    return model


def _cast(source: str, target: str, dtype: int) -> onnx.NodeProto:
    return helper.make_node("Cast", [source], [target], name=f"{target}.cast", to=dtype)


# CREPE


def save_crepe(state: State, path: Path) -> None:
    """Write CREPE: frames of 1,024 samples at 16 kHz to 360 pitch bins of 20 cents.

    Batch normalisation follows the activation, so it cannot be folded into the layer before it.
    """
    g = Graph("crepe")
    x = g.unsqueeze(g.input("batch", 1024, name="frames"), 1, 3)
    for number in range(1, 7):
        name = f"conv{number}"
        weight = g.store(f"{name}.weight", state[f"{name}.weight"])
        bias = g.store(f"{name}.bias", state[f"{name}.bias"])
        above, below = (254, 254) if number == 1 else (31, 32)
        strides = (4, 1) if number == 1 else (1, 1)
        x = g.conv(x, stride=strides, pad=(above, 0, below, 0), weight=weight, bias=bias)
        x = _bn(g, g.relu(x), f"{name}_BN", _bn_vectors(state, f"{name}_BN"))
        x = g.op("MaxPool", x, kernel_shape=[2, 1], strides=[2, 1])
    x = g.reshape(g.transpose(x, 0, 2, 1, 3), 0, x.channels * x.extent(2))
    x = g.act(_gemm(g, x, state, "classifier"), "sigmoid")
    onnx.save_model(g.model(x, names=["probabilities"]), path)


# Parts


def _bn_vectors(state: State, name: str) -> list[Array]:
    return [state[f"{name}.{part}"] for part in ("weight", "bias", "running_mean", "running_var")]


def _bn(g: Graph, x: Tensor, name: str, vectors: list[Array]) -> Tensor:
    parts = zip(("scale", "bias", "mean", "var"), vectors, strict=True)
    stored = [g.store(f"{name}.{part}", array) for part, array in parts]
    return g.op("BatchNormalization", x, *stored, name=name, epsilon=1e-3)


def _gemm(g: Graph, x: Tensor, state: State, name: str) -> Tensor:
    weight = g.store(f"{name}.weight", state[f"{name}.weight"])
    bias = g.store(f"{name}.bias", state[f"{name}.bias"])
    return g.gemm(x, weight.extent(0), weight=weight, bias=bias)
