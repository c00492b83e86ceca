"""Small networks in every quantised form, with random weights.

Each function draws one network on a `Graph`; sizes are odd on purpose. The decorator names the network, seeds
it and registers a function of no arguments in `QUANTISED`.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import DTypeLike
from onnx import ModelProto, TensorProto

from models.builder import Array, Dim, Graph, Tensor

DOMAIN = "com.microsoft"
HIDDEN, NEURONS, CLASSES = 20, 28, 5

Draw = Callable[[Graph], Tensor]
Build = Callable[[], ModelProto]

QUANTISED: dict[str, Build] = {}
"""The networks by name."""


def network(*, opset: int = 17) -> Callable[[Draw], Build]:
    """Register a drawing function under its own name."""

    def register(draw: Draw) -> Build:
        name = draw.__name__

        def build() -> ModelProto:
            g = Graph(name, opset=opset, ir=10 if opset >= 21 else 8, seed=zlib.crc32(name.encode()))
            return g.model(draw(g))

        build.__doc__ = draw.__doc__
        QUANTISED[name] = build
        return build

    return register


# Weights and scales


def quantised(
    array: Array, axis: int | None = None, dtype: DTypeLike = np.int8, symmetric: bool = True
) -> tuple[Array, Array, Array]:
    """An array as integers, with one scale and zero point, or one for each position on `axis`."""
    rest = tuple(i for i in range(array.ndim) if i != axis) if axis is not None else None
    limits = ml_dtypes.iinfo(dtype)  # type: ignore[no-untyped-call]
    low = np.minimum(array.min(rest, keepdims=True), 0)
    high = np.maximum(array.max(rest, keepdims=True), 0)
    if symmetric:
        scale = np.maximum(-low, high) / limits.max
        zero = np.zeros_like(scale)
    else:
        scale = (high - low) / (limits.max - limits.min)
        zero = np.round(limits.min - low / scale)
    values = np.clip(np.round(array / scale) + zero, limits.min, limits.max)
    shape: tuple[int, ...] = () if axis is None else (-1,)
    return values.astype(dtype), scale.astype(np.float32).reshape(shape), zero.astype(dtype).reshape(shape)


class Parts:
    """Stored parameters of one layer, by name."""

    def __init__(self, g: Graph, name: str) -> None:
        self.g = g
        self.name = name

    def __call__(self, part: str, value: Any, dtype: DTypeLike | None = None) -> Tensor:
        """Store one of them."""
        return self.g.store(f"{self.name}.{part}", np.asarray(value, dtype))

    def weight(self, array: Array, **options: Any) -> tuple[Tensor, Tensor, Tensor]:
        """A quantised weight with its scale and zero point."""
        values, scale, zero = quantised(array, **options)
        return self("weight", values), self("scale", scale), self("zero", zero)

    def activation(self, scale: float, zero: int, dtype: DTypeLike = np.uint8) -> tuple[Tensor, Tensor]:
        """The scale and zero point of what the layer makes."""
        return self("out_scale", scale, np.float32), self("out_zero", zero, dtype)


class Quantised:
    """An activation in integers, with its scale and zero point."""

    def __init__(self, value: Tensor, scale: Tensor, zero: Tensor) -> None:
        self.value, self.scale, self.zero = value, scale, zero

    @property
    def operands(self) -> tuple[Tensor, Tensor, Tensor]:
        """As operators take it."""
        return self.value, self.scale, self.zero


def quantise(g: Graph, x: Tensor, scale: float = 0.04, zero: int = 120) -> Quantised:
    """A QuantizeLinear."""
    parts = Parts(g, g.fresh("quantise"))
    return Quantised(g.op("QuantizeLinear", x, *(p := parts.activation(scale, zero))), *p)


def dequantise(g: Graph, x: Quantised) -> Tensor:
    """A DequantizeLinear."""
    return g.op("DequantizeLinear", *x.operands)


def microsoft(
    g: Graph, op: str, x: tuple[Tensor | None, ...], shape: tuple[Dim, ...], **options: Any
) -> Tensor:
    """An operator of onnxruntime's own domain, named after itself."""
    dtype = options.pop("dtype", TensorProto.UINT8)
    return g.op(op, *x, domain=DOMAIN, shape=shape, dtype=dtype, **options)


def fused(
    g: Graph, op: str, x: tuple[Quantised, ...], shape: tuple[Dim, ...], scale: float = 0.05, **options: Any
) -> Quantised:
    """A quantised operator without weights."""
    parts = Parts(g, g.fresh(op.lower()))
    end = parts.activation(scale, 110)
    operands = tuple(t for each in x for t in each.operands)
    if op == "QLinearConcat":
        return Quantised(microsoft(g, op, (*end, *operands), shape, **options), *end)
    return Quantised(microsoft(g, op, (*operands, *end), shape, **options), *end)


# QOperator form


def qlinear_conv(g: Graph, x: Quantised, cout: int, k: int, scale: float = 0.05, group: int = 1) -> Quantised:
    """A QLinearConv with weights scaled by channel."""
    parts = Parts(g, g.fresh("conv"))
    cin = x.value.channels // group
    weight, *rest = parts.weight(g.he(cout, cin, k, k, fan_in=2 * cin * k * k), axis=0)
    bias = parts("bias", g.rng.integers(-400, 400, cout), np.int32)
    end = parts.activation(scale, 117)
    y = g.op(
        "QLinearConv",
        *x.operands,
        weight,
        *rest,
        *end,
        bias,
        pads=[k // 2] * 4,
        kernel_shape=[k, k],
        group=group,
    )
    return Quantised(y, *end)


@network()
def residual_of_qlinear(g: Graph) -> Tensor:
    """Convolutions by channel, QLinearAdd, pooling and a QGemm."""
    x = quantise(g, g.input("batch", 3, 9, 9))
    stem = qlinear_conv(g, x, 11, 3)
    y = qlinear_conv(g, qlinear_conv(g, stem, 13, 3), 11, 1)
    y = fused(g, "QLinearAdd", (stem, y), ("batch", 11, 9, 9))
    y = fused(g, "QLinearLeakyRelu", (y,), ("batch", 11, 9, 9), alpha=0.1)
    y = Quantised(g.op("MaxPool", y.value, kernel_shape=[3, 3], strides=[2, 2]), y.scale, y.zero)
    y = fused(g, "QLinearGlobalAveragePool", (y,), ("batch", 11, 1, 1), 0.02, channels_last=0)
    flat = Quantised(g.flatten(y.value), y.scale, y.zero)
    parts = Parts(g, g.fresh("gemm"))
    weight = parts.weight(g.he(CLASSES, 11, fan_in=11), axis=0)
    bias = parts("bias", g.rng.integers(-400, 400, CLASSES), np.int32)
    operands = (*flat.operands, *weight, bias, None, None)
    return microsoft(g, "QGemm", operands[:7], ("batch", CLASSES), transB=1, dtype=TensorProto.FLOAT)


@network()
def branches_of_qlinear(g: Graph) -> Tensor:
    """A depthwise and a grouped convolution, joined, a gate and an average pool."""
    x = quantise(g, g.input("batch", 3, 8, 8))
    stem = qlinear_conv(g, x, 12, 3)
    depthwise = qlinear_conv(g, stem, 12, 3, group=12)
    grouped = qlinear_conv(g, stem, 9, 3, group=3)
    y = fused(g, "QLinearConcat", (depthwise, grouped), ("batch", 21, 8, 8), axis=1)
    gate = fused(g, "QLinearSigmoid", (qlinear_conv(g, y, 21, 1),), ("batch", 21, 8, 8), 0.004)
    y = fused(g, "QLinearMul", (y, gate), ("batch", 21, 8, 8))
    y = fused(g, "QLinearAveragePool", (y,), ("batch", 21, 4, 4), kernel_shape=[2, 2], strides=[2, 2])
    return dequantise(g, qlinear_conv(g, y, 7, 1))


def qlinear_matmul(g: Graph, x: Quantised, cout: int, axis: int | None = 1, scale: float = 0.12) -> Quantised:
    """A QLinearMatMul with weights that have zero points, scaled by column (axis 1) or as a whole."""
    parts = Parts(g, g.fresh("matmul"))
    cin = x.value.extent(-1)
    array = g.he(cin, cout, fan_in=2 * cin) + np.float32(0.1)
    weight = parts.weight(array, axis=axis, dtype=np.uint8, symmetric=False)
    end = parts.activation(scale, 112)
    return Quantised(g.op("QLinearMatMul", *x.operands, *weight, *end), *end)


@network()
def mlp_of_qlinear(g: Graph) -> Tensor:
    """QLinearMatMul by column and as a whole."""
    x = quantise(g, g.input("batch", 6, HIDDEN))
    for width, axis in ((NEURONS, 1), (15, None), (CLASSES, 1)):
        x = qlinear_matmul(g, x, width, axis)
    return dequantise(g, x)


# Dynamic form


def dynamic(g: Graph, op: str, x: Tensor, array: Array, axis: int | None, **attributes: Any) -> Tensor:
    """What quantize_dynamic writes for a MatMul or a Conv: the scale is measured, the product an integer."""
    parts = Parts(g, g.fresh(op.lower()))
    name = g.fresh("dynamic")
    value, scale, zero = g.ops("DynamicQuantizeLinear", x, outputs=3)
    values, by, offset = quantised(array, axis, np.uint8 if axis is None else np.int8, axis is not None)
    if op == "ConvInteger":
        offset = offset.reshape(-1)[0]  # onnxruntime takes one only
    weight = parts("weight", values)
    product = g.op(op, value, weight, zero, parts("zero", offset), name=f"{name}.product", **attributes)
    real = g.op("Cast", product, to=TensorProto.FLOAT)
    if op == "ConvInteger" and axis is not None:
        by = by.reshape(-1, 1, 1)
    y = g.mul(real, g.mul(scale, parts("scale", by)))
    cout = array.shape[0] if op == "ConvInteger" else array.shape[1]
    shape = (cout, 1, 1) if op == "ConvInteger" else (cout,)
    return g.add(y, parts("bias", g.normal(*shape, scale=0.1)))


def _linear(g: Graph, x: Tensor, cout: int, axis: int | None = None) -> Tensor:
    cin = x.extent(-1)
    return dynamic(g, "MatMulInteger", x, g.he(cin, cout, fan_in=2 * cin), axis)


@network()
def transformer_of_integers(g: Graph) -> Tensor:
    """Attention of 5 heads and a feed-forward part around DynamicQuantizeLinear and MatMulInteger."""
    x = g.input("batch", 6, HIDDEN)
    heads = []
    for perm in ((0, 2, 1, 3), (0, 2, 3, 1), (0, 2, 1, 3)):
        y = g.reshape(_linear(g, x, HIDDEN, 1), 0, 6, 5, 4, shape=("batch", 6, 5, 4))
        heads.append(g.transpose(y, *perm))
    query, key, value = heads
    scores = g.op("Softmax", g.op("MatMul", query, key), axis=-1)
    y = g.transpose(g.op("MatMul", scores, value), 0, 2, 1, 3)
    y = g.reshape(y, 0, 6, HIDDEN, shape=("batch", 6, HIDDEN))
    x = g.add(x, _linear(g, y, HIDDEN, 1))
    x = g.add(x, _linear(g, g.relu(_linear(g, x, NEURONS)), HIDDEN))
    return _linear(g, x, CLASSES)


@network()
def convolutions_of_integers(g: Graph) -> Tensor:
    """ConvInteger by channel and as a whole, a depthwise one between."""
    x = g.input("batch", 3, 9, 9)
    for cout, axis, group in ((10, 0, 1), (10, None, 10), (14, None, 1)):
        array = g.he(cout, x.channels // group, 3, 3, fan_in=9 * x.channels // group)
        attributes = {"pads": [1, 1, 1, 1], "kernel_shape": [3, 3], "group": group}
        x = g.relu(dynamic(g, "ConvInteger", x, array, axis, **attributes))
    return g.gemm(g.flatten(g.gap(x)), CLASSES)


@network()
def mlp_fused_dynamic(g: Graph) -> Tensor:
    """The same as onnxruntime fuses it: DynamicQuantizeMatMul and MatMulIntegerToFloat."""
    x = g.input("batch", HIDDEN)
    parts = Parts(g, g.fresh("fused"))
    weight, scale, zero = parts.weight(g.he(HIDDEN, NEURONS, fan_in=HIDDEN), axis=1)
    left = (x, weight, scale, zero, parts("bias", g.normal(NEURONS)))
    y = microsoft(g, "DynamicQuantizeMatMul", left, ("batch", NEURONS), dtype=TensorProto.FLOAT)
    value, measured, offset = g.ops("DynamicQuantizeLinear", g.relu(y), outputs=3)
    parts = Parts(g, g.fresh("fused"))
    weight, scale, zero = parts.weight(g.he(NEURONS, CLASSES, fan_in=NEURONS), axis=1)
    operands = (value, weight, measured, scale, offset, zero, parts("bias", g.normal(CLASSES)))
    return microsoft(g, "MatMulIntegerToFloat", operands, ("batch", CLASSES), dtype=TensorProto.FLOAT)


@network()
def attention_of_integers(g: Graph) -> Tensor:
    """QAttention of 4 heads on a static scale, weights scaled by column."""
    units = qlinear_matmul(g, quantise(g, g.input("batch", 6, 12)), 14, scale=0.03)
    parts = Parts(g, g.fresh("attention"))
    weight, scale, zero = parts.weight(g.he(14, 60, fan_in=28), axis=1)
    bias = parts("bias", g.normal(60, scale=0.1))
    operands = (units.value, weight, bias, units.scale, scale, None, units.zero, zero)
    y = microsoft(g, "QAttention", operands, ("batch", 6, 20), num_heads=4, dtype=TensorProto.FLOAT)
    return g.matmul(y, CLASSES)


# Weights alone


def matmul_n_bits(g: Graph, x: Tensor, cout: int, block: int, *, zeros: bool, **attributes: Any) -> Tensor:
    """A MatMulNBits of 4 bits: two values in a byte, low bits first, and so with zero points."""
    parts = Parts(g, g.fresh("nbits"))
    cin = x.extent(-1)
    count = cin // block
    array = g.he(cout, cin, fan_in=cin).reshape(cout * count, block)
    values, scale, zero = quantised(array, 0, ml_dtypes.uint4, symmetric=False)
    operands: list[Tensor | None] = [x, parts("weight", _packed(values).reshape(cout, count, block // 2))]
    operands.append(parts("scale", scale.reshape(cout, count) if zeros else scale))
    if zeros:
        operands.append(parts("zero", _packed(zero.reshape(cout, count))))
    operands += [None] * (5 - len(operands)) + [parts("bias", g.normal(cout, scale=0.1))]
    attributes |= {"K": cin, "N": cout, "bits": 4, "block_size": block}
    return g.op("MatMulNBits", *operands, domain=DOMAIN, shape=(*x.shape[:-1], cout), **attributes)


def _packed(values: Array) -> Array:
    """Pairs of values along the last axis as bytes."""
    return values[..., ::2].astype(np.uint8) | values[..., 1::2].astype(np.uint8) << 4


@network()
def ffn_of_4_bits(g: Graph) -> Tensor:
    """MatMulNBits without zero points: neurons go by whole blocks of 16, which the second layer reads."""
    x = matmul_n_bits(g, g.input("batch", 3, 32), 80, 16, zeros=False)
    return matmul_n_bits(g, g.relu(x), CLASSES, 16, zeros=False)


@network()
def ffn_of_4_bits_with_zeros(g: Graph) -> Tensor:
    """MatMulNBits with packed zero points, two blocks in a byte, so that neurons go in pairs of blocks."""
    x = matmul_n_bits(g, g.input("batch", 3, 32), 128, 16, zeros=True, accuracy_level=4)
    return matmul_n_bits(g, g.relu(x), CLASSES, 16, zeros=True, accuracy_level=4)


@network(opset=21)
def blocked_weights(g: Graph) -> Tensor:
    """4-bit weights behind DequantizeLinear in blocks of 4 along the axis that is summed over."""
    x = g.input("batch", 12)
    for cout in (NEURONS, CLASSES):
        parts = Parts(g, g.fresh("blocked"))
        count = x.extent(-1) // 4
        array = g.he(count, 4, cout, fan_in=4 * count)
        scale = np.abs(array).max(1) / 7
        values = np.clip(np.round(array / scale[:, None]), -7, 7).reshape(4 * count, cout)
        weight, by = parts("weight", values.astype(ml_dtypes.int4)), parts("scale", scale, np.float32)
        x = g.op("MatMul", x, g.op("DequantizeLinear", weight, by, axis=0, block_size=4))
    return x


@network()
def cast_weights(g: Graph) -> Tensor:
    """8-bit weights that are cast to float and scaled, as a whole and by row."""
    x = g.input("batch", HIDDEN)
    for cout, axis in ((NEURONS, None), (CLASSES, 0)):
        parts = Parts(g, g.fresh("layer"))
        values, scale, _ = quantised(g.he(cout, x.extent(-1), fan_in=x.extent(-1)), axis)
        real = g.op("Cast", parts("weight", values), to=TensorProto.FLOAT)
        weight = g.mul(real, parts("scale", scale if axis is None else scale[:, None]))
        x = g.relu(g.op("MatMul", x, g.transpose(weight, 1, 0)))
    return x


# QDQ form


@network()
def qdq_by_channel(g: Graph) -> Tensor:
    """QuantizeLinear and DequantizeLinear around each convolution, weights and biases by channel."""
    x = g.input("batch", 3, 9, 9)
    for cout, k in ((11, 3), (14, 1), (CLASSES, 1)):
        parts = Parts(g, g.fresh("qdq"))
        unit = quantise(g, x)
        weight, scale, zero = parts.weight(g.he(cout, x.channels, k, k, fan_in=x.channels * k * k), axis=0)
        real = g.op("DequantizeLinear", weight, scale, zero, axis=0)
        bias = g.op(
            "DequantizeLinear",
            parts("bias", g.rng.integers(-90, 90, cout), np.int32),
            parts("bias_scale", g.uniform(1e-3, 2e-3, cout)),
            axis=0,
        )
        y = g.op("Conv", dequantise(g, unit), real, bias, pads=[k // 2] * 4)
        unit = quantise(g, g.relu(y), 0.05, 0)
        x = dequantise(g, Quantised(g.max_pool(unit.value, 2), unit.scale, unit.zero))
    return g.flatten(g.gap(x))


@network()
def qdq_of_16_bits(g: Graph) -> Tensor:
    """The same pair in 16 bits, of onnxruntime's own domain."""
    x = g.input("batch", HIDDEN)
    for cout in (NEURONS, CLASSES):
        parts = Parts(g, g.fresh("wide"))
        end = parts.activation(4e-4, 30000, np.uint16)
        unit = microsoft(
            g, "QuantizeLinear", (g.matmul(x, cout), *end), ("batch", cout), dtype=TensorProto.UINT16
        )
        x = microsoft(g, "DequantizeLinear", (unit, *end), ("batch", cout), dtype=TensorProto.FLOAT)
    return x
