"""Small networks, one per tricky topology, that build and run in milliseconds.

Each function draws one network on a `Graph`; the decorator names it, seeds it and registers a
function of no arguments in `TOPOLOGIES` (or `NOT_RUNNABLE`, for what cannot be checked and run).
Nearly all take an image (batch, 3, 8, 8) and end in a classifier of five classes, so that every
channel count between is free to change.

`python -m models.topologies --check` builds, checks and runs all of them.
"""

from __future__ import annotations

import argparse
import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import onnx
import onnxruntime as ort
from onnx import ModelProto, TensorProto, helper

from models.builder import Array, Graph, Storage, Tensor

Result = Tensor | tuple[Tensor, ...] | ModelProto
Draw = Callable[[Graph], Result]
Build = Callable[[], ModelProto]

TOPOLOGIES: dict[str, Build] = {}
"""Networks that onnxruntime runs, by name."""

NOT_RUNNABLE: dict[str, Build] = {}
"""Networks that onnx's checker or onnxruntime refuses."""

INT_MAX = 2**63 - 1


def topology(
    *, opset: int = 17, ir: int = 8, storage: Storage = "initializer", runnable: bool = True
) -> Callable[[Draw], Build]:
    """Register a drawing function under its own name."""

    def register(draw: Draw) -> Build:
        name = draw.__name__

        def build() -> ModelProto:
            seed = zlib.crc32(name.encode())
            g = Graph(name, opset=opset, ir=ir, seed=seed, storage=storage)
            result = draw(g)
            if isinstance(result, ModelProto):
                return result
            return g.model(*(result if isinstance(result, tuple) else (result,)))

        build.__name__ = build.__qualname__ = name
        build.__doc__ = draw.__doc__
        (TOPOLOGIES if runnable else NOT_RUNNABLE)[name] = build
        return build

    return register


def _image(g: Graph, channels: int = 3, side: int = 8, *, name: str = "image") -> Tensor:
    return g.input("batch", channels, side, side, name=name)


def _stem(g: Graph, width: int = 16) -> Tensor:
    """The input and a first prunable convolution."""
    return g.relu(g.conv(_image(g), width))


def _classify(g: Graph, x: Tensor) -> Tensor:
    """Global pooling and a classifier of fixed width."""
    return g.gemm(g.flatten(g.gap(x)), 5)


# Chains


@topology()
def conv_bn_relu(g: Graph) -> Result:
    """Conv, BatchNormalization, Relu, twice."""
    return _classify(g, g.conv_bn(g.conv_bn(_image(g), 16), 24))


@topology()
def conv_is_output(g: Graph) -> Result:
    """The last convolution is the graph output, so its channels are fixed."""
    return g.conv(_stem(g), 6)


@topology()
def conv_1d(g: Graph) -> Result:
    """Convolutions over one axis, with batch normalisation."""
    x = g.input("batch", 3, 20, name="signal")
    return _classify(g, g.conv_bn(g.conv_bn(x, 16, 5, stride=2), 24, 3))


@topology()
def conv_3d(g: Graph) -> Result:
    """Convolutions over three axes, with batch normalisation."""
    x = g.input("batch", 2, 4, 6, 6, name="volume")
    return _classify(g, g.conv_bn(g.conv_bn(x, 12), 16, 1))


@topology()
def conv_dilated_asymmetric(g: Graph) -> Result:
    """1x3 and 3x1 kernels, dilation, unequal padding."""
    x = g.relu(g.conv(_stem(g), 12, (1, 3)))
    x = g.relu(g.conv(x, 16, (3, 1)))
    x = g.relu(g.conv(x, 20, 3, dilation=2))
    return _classify(g, g.conv(x, 8, 2, pad=(0, 1, 1, 0)))


@topology()
def single_channel_conv(g: Graph) -> Result:
    """A convolution with one output channel in the middle: nothing there may be removed."""
    x = g.relu(g.conv(_stem(g), 1))
    return _classify(g, g.relu(g.conv(x, 12)))


@topology()
def pass_through(g: Graph) -> Result:
    """Pooling, Dropout, Identity and Cast between two convolutions."""
    x = g.max_pool(_stem(g), 3, stride=1, pad=1)
    x = g.op("Identity", g.dropout(g.avg_pool(x, 2)))
    x = g.op("Cast", g.op("Cast", x, to=TensorProto.DOUBLE), to=TensorProto.FLOAT)
    return _classify(g, g.relu(g.conv(x, 12)))


@topology()
def activations(g: Graph) -> Result:
    """A chain through many elementwise functions."""
    x = g.conv(_image(g), 16)
    for op_type in ("Elu", "Softplus", "Tanh", "Erf", "Abs", "Neg", "Sigmoid", "Exp", "Sqrt"):
        x = g.op(op_type, x)
    x = g.op("LeakyRelu", g.op("Pow", x, g.const(2.0, np.float32)), alpha=0.2)
    x = g.op("Max", g.op("HardSwish", x), g.const(0.1, np.float32))
    return _classify(g, g.conv(x, 12))


# Residual sums


@topology()
def residual(g: Graph) -> Result:
    """A plain residual block."""
    x = _stem(g)
    y = g.bn(g.conv(g.conv_bn(x, 24), x.channels))
    return _classify(g, g.relu(g.add(x, y)))


@topology()
def residual_projection_stage(g: Graph) -> Result:
    """A projected block and two plain ones: four producers in one sum."""
    x = _stem(g)
    y = g.conv_bn(g.conv_bn(x, 12, stride=2), 24, act=None)
    x = g.relu(g.add(y, g.conv_bn(x, 24, 1, stride=2, act=None)))
    for _ in range(2):
        x = g.relu(g.add(g.conv_bn(g.conv_bn(x, 12), 24, act=None), x))
    return _classify(g, x)


@topology()
def residual_with_input(g: Graph) -> Result:
    """A sum with the graph input, which fixes the channels of the other operand."""
    x = _image(g)
    y = g.add(x, g.conv(g.relu(g.conv(x, 16)), 3))
    return _classify(g, g.relu(g.conv(y, 12)))


@topology()
def sum_operands_used_elsewhere(g: Graph) -> Result:
    """Two convolutions are summed, and each is read by another convolution too."""
    x = _stem(g)
    a, b = g.conv(x, 12), g.conv(x, 12)
    return _classify(g, g.concat(g.conv(a, 8), g.conv(g.add(a, b), 8), g.conv(b, 8)))


@topology()
def sum_of_three(g: Graph) -> Result:
    """One Sum node over three branches."""
    x = _stem(g)
    branches = [g.conv(x, 12, k) for k in (1, 3, 5)]
    return _classify(g, g.relu(g.op("Sum", *branches)))


@topology()
def nested_adds(g: Graph) -> Result:
    """Four branches summed in a tree."""
    a, b, c, d = (g.conv(x, 12) for x in [_stem(g)] * 4)
    return _classify(g, g.relu(g.add(g.add(a, b), g.add(c, d))))


@topology()
def residual_layer_scale(g: Graph) -> Result:
    """A residual branch scaled per channel by a parameter (c, 1, 1)."""
    x = _stem(g)
    gamma = g.store("gamma", g.uniform(0.1, 1.0, 16, 1, 1))
    return _classify(g, g.add(x, g.mul(g.conv(g.relu(g.conv(x, 24)), 16), gamma)))


# Gates


@topology()
def se_conv(g: Graph) -> Result:
    """Squeeze-and-excitation by 1x1 convolutions."""
    x = _stem(g)
    gate = g.act(g.conv(g.relu(g.conv(g.gap(x), 4, 1)), 16, 1), "sigmoid")
    return _classify(g, g.conv(g.mul(x, gate), 12))


@topology()
def se_gemm(g: Graph) -> Result:
    """Squeeze-and-excitation by Gemm, through Reshape to (b, c) and to (b, c, 1, 1)."""
    x = _stem(g)
    pooled = g.reshape(g.gap(x), 0, 16)
    gate = g.act(g.gemm(g.relu(g.gemm(pooled, 4)), 16), "sigmoid")
    return _classify(g, g.conv(g.mul(x, g.reshape(gate, 0, 16, 1, 1)), 12))


@topology()
def se_reduce_mean(g: Graph) -> Result:
    """Squeeze-and-excitation by ReduceMean, MatMul and Unsqueeze."""
    x = _stem(g)
    pooled = g.reduce("ReduceMean", x, 2, 3, keepdims=False)
    gate = g.matmul(g.relu(g.matmul(pooled, 4, bias=True)), 16, bias=True)
    gate = g.unsqueeze(g.act(gate, "hardsigmoid"), 2, 3)
    return _classify(g, g.conv(g.mul(gate, x), 12))


@topology()
def softmax_channel_gate(g: Graph) -> Result:
    """A gate normalised by Softmax over channels."""
    x = _stem(g)
    gate = g.op("Softmax", g.conv(g.gap(x), 16, 1), axis=1)
    return _classify(g, g.conv(g.mul(x, gate), 12))


@topology()
def selective_kernel(g: Graph) -> Result:
    """Two branches weighed per channel by a Softmax over branches, as in SK-Net."""
    x = _stem(g)
    a, b = g.relu(g.conv(x, 12, 3)), g.relu(g.conv(x, 12, 5))
    squeezed = g.relu(g.conv(g.gap(g.add(a, b)), 6, 1))
    logits = g.reshape(g.conv(squeezed, 24, 1), 0, 2, 12, 1, 1)
    first, second = g.split(g.op("Softmax", logits, axis=1), 2)
    mixed = g.add(g.mul(a, g.squeeze(first, 1)), g.mul(b, g.squeeze(second, 1)))
    return _classify(g, g.conv(mixed, 8))


def _spatial_gate(g: Graph, x: Tensor) -> Tensor:
    mean = g.reduce("ReduceMean", x, 1)
    peak = g.reduce("ReduceMax", x, 1)
    return g.mul(x, g.act(g.conv(g.concat(mean, peak), 1, 3), "sigmoid"))


@topology()
def cbam_spatial(g: Graph) -> Result:
    """A spatial gate from the mean and the maximum over channels."""
    return _classify(g, g.conv(_spatial_gate(g, _stem(g)), 12))


@topology()
def cbam(g: Graph) -> Result:
    """A channel gate by two pooled paths through shared weights, then a spatial gate."""
    x = _stem(g)
    down = g.store("mlp.down", g.he(4, 16, 1, 1, fan_in=16))
    up = g.store("mlp.up", g.he(16, 4, 1, 1, fan_in=4))
    paths = [
        g.conv(g.relu(g.conv(pooled, weight=down, bias=False)), weight=up, bias=False)
        for pooled in (g.gap(x), g.op("GlobalMaxPool", x))
    ]
    x = g.mul(x, g.act(g.add(*paths), "sigmoid"))
    return _classify(g, g.conv(_spatial_gate(g, x), 12))


@topology()
def attention_scale_from_shape(g: Graph) -> Result:
    """Attention over positions whose scale is read from a Shape of the channel axis."""
    x = _stem(g)
    query, key, value = (g.reshape(g.conv(x, 12, 1), 0, 12, 64) for _ in range(3))
    width = g.op("Gather", g.op("Shape", query), g.const(1), axis=0, shape=())
    width = g.op("Sqrt", g.op("Cast", width, to=TensorProto.FLOAT))
    scores = g.op("Div", g.op("MatMul", g.transpose(query, 0, 2, 1), key), width)
    mixed = g.op("MatMul", value, g.transpose(g.op("Softmax", scores, axis=-1), 0, 2, 1))
    return _classify(g, g.conv(g.reshape(mixed, 0, 12, 8, 8), 8))


# Concat


@topology()
def concat_two(g: Graph) -> Result:
    """Two branches of different width side by side."""
    x = _stem(g)
    return _classify(g, g.conv(g.concat(g.conv(x, 8), g.conv(x, 12, 1)), 10))


@topology()
def concat_nested(g: Graph) -> Result:
    """Concats of concats, four levels deep."""
    x = _stem(g, 8)
    y = g.conv(x, 6)
    for width in (4, 6, 8, 10):
        y = g.concat(g.conv(x, width, 1), y)
    return _classify(g, g.conv(g.relu(y), 12))


@topology()
def dense_block(g: Graph) -> Result:
    """Each layer reads the concat of all before, through its own batch normalisation."""
    x = _stem(g, 12)
    for _ in range(4):
        y = g.conv(g.relu(g.bn(x)), 16, 1, bias=False)
        x = g.concat(x, g.conv(g.relu(g.bn(y)), 6, bias=False))
    return _classify(g, g.relu(g.bn(x)))


def _two_branches(g: Graph) -> Tensor:
    x = _stem(g)
    return g.concat(g.conv(x, 8), g.conv(x, 12, 1))


@topology()
def concat_bn(g: Graph) -> Result:
    """Batch normalisation directly on a concat."""
    return _classify(g, g.conv(g.relu(g.bn(_two_branches(g))), 10))


@topology()
def concat_prelu(g: Graph) -> Result:
    """Slopes per channel directly on a concat."""
    x = _two_branches(g)
    slope = g.store("slope", g.uniform(0.1, 0.4, 20, 1, 1))
    return _classify(g, g.conv(g.op("PRelu", x, slope), 10))


@topology()
def concat_scale(g: Graph) -> Result:
    """A Mul and an Add per channel directly on a concat."""
    x = _two_branches(g)
    scale = g.store("scale", g.uniform(0.5, 1.5, 1, 20, 1, 1))
    shift = g.store("shift", g.normal(1, 20, 1, 1))
    return _classify(g, g.conv(g.relu(g.add(g.mul(x, scale), shift)), 10))


@topology()
def concat_same_twice(g: Graph) -> Result:
    """One tensor twice in a concat, with another between."""
    x = _stem(g)
    a, b = g.conv(x, 8), g.conv(x, 6)
    return _classify(g, g.conv(g.relu(g.concat(a, b, a)), 10))


@topology()
def concat_spatial_then_split(g: Graph) -> Result:
    """A concat over height, a shared convolution, and a split back: channels stay aligned."""
    x = _stem(g)
    stacked = g.concat(g.conv(x, 8), g.conv(x, 8, 1), axis=2)
    top, bottom = g.split(g.relu(g.conv(stacked, 12)), 2, axis=2)
    return _classify(g, g.concat(g.conv(top, 6), g.conv(bottom, 6)))


@topology()
def concat_with_input(g: Graph) -> Result:
    """A prunable branch beside the graph input, whose segment is fixed."""
    x = _image(g)
    return _classify(g, g.conv(g.concat(x, g.relu(g.conv(x, 12))), 16))


@topology()
def concat_conv_and_conv_transpose(g: Graph) -> Result:
    """Producers whose weights have their output channels on different axes."""
    x = _stem(g)
    up = g.conv_transpose(g.max_pool(x, 2), 8)
    return _classify(g, g.conv(g.relu(g.concat(g.conv(x, 12), up)), 10))


# Split


@topology()
def split_equal(g: Graph) -> Result:
    """Equal parts without stated sizes, each to its own convolution."""
    parts = g.split(_stem(g, 24), 3)
    return _classify(g, g.concat(*(g.relu(g.conv(part, 6)) for part in parts)))


@topology()
def split_unequal(g: Graph) -> Result:
    """Unequal parts, each to its own convolution."""
    parts = g.split(_stem(g, 24), [4, 12, 8])
    return _classify(g, g.concat(*(g.relu(g.conv(part, 6)) for part in parts)))


@topology(opset=11, ir=6)
def split_sizes_attribute(g: Graph) -> Result:
    """Sizes as an attribute, as before operator set 13."""
    parts = g.split(_stem(g, 24), [8, 16])
    return _classify(g, g.concat(*(g.relu(g.conv(part, 6)) for part in parts)))


@topology(opset=18)
def split_num_outputs(g: Graph) -> Result:
    """The number of parts as an attribute, with 18."""
    parts = g.split(_stem(g, 24), 4)
    return _classify(g, g.concat(*(g.relu(g.conv(part, 6)) for part in parts)))


@topology()
def split_concat_add(g: Graph) -> Result:
    """Part of a split beside a new branch, added to another part."""
    x = _stem(g, 24)
    small, large = g.split(x, [8, 16])
    y = g.concat(small, g.conv(small, 8))
    return _classify(g, g.conv(g.add(y, large), 12))


@topology()
def split_two_and_three(g: Graph) -> Result:
    """The same tensor in halves and in thirds: the cuts between parts interleave."""
    x = _stem(g, 24)
    halves, thirds = g.split(x, [12, 12]), g.split(x, [8, 8, 8])
    return _classify(g, g.conv(g.concat(halves[0], thirds[1], halves[1], thirds[2]), 12))


@topology()
def split_into_one(g: Graph) -> Result:
    """A split into one part, which is the identity."""
    (whole,) = g.split(_stem(g), [16])
    return _classify(g, g.conv(whole, 12))


@topology()
def split_spatial(g: Graph) -> Result:
    """A split over height, with all channels in each part."""
    top, bottom = g.split(_stem(g), [3, 5], axis=2)
    return _classify(g, g.add(g.gap(g.conv(top, 12)), g.gap(g.conv(bottom, 12))))


@topology()
def split_shared_conv(g: Graph) -> Result:
    """All parts pass through one weight, which aligns their channels."""
    weight = g.store("shared.weight", g.he(12, 8, 3, 3, fan_in=72))
    parts = g.split(_stem(g, 24), 3)
    return _classify(g, g.concat(*(g.relu(g.conv(part, weight=weight)) for part in parts)))


@topology()
def split_then_reshape(g: Graph) -> Result:
    """Parts that are reshaped before they meet again."""
    parts = g.split(_stem(g, 24), 3)
    flat = [g.reshape(part, 0, 8, 64) for part in parts]
    joined = g.concat(flat[2], flat[0], flat[1])
    return _classify(g, g.conv(g.reshape(joined, 0, 24, 8, 8), 12))


@topology()
def res2net(g: Graph) -> Result:
    """A split with hierarchical sums between its parts."""
    first, *rest = g.split(_stem(g, 24), 4)
    outputs = [first]
    carried: Tensor | None = None
    for part in rest:
        carried = g.conv_bn(part if carried is None else g.add(part, carried), part.channels)
        outputs.append(carried)
    return _classify(g, g.conv(g.concat(*outputs), 16, 1))


@topology()
def c2f(g: Graph) -> Result:
    """Split, a chain of residual bottlenecks, a concat of all intermediate results."""
    parts = g.split(g.conv_bn(_stem(g), 16, 1, act="silu"), 2)
    for _ in range(2):
        y = g.conv_bn(g.conv_bn(parts[-1], 8, act="silu"), 8, act="silu")
        parts.append(g.add(parts[-1], y))
    return _classify(g, g.conv_bn(g.concat(*parts), 20, 1, act="silu"))


@topology()
def csp(g: Graph) -> Result:
    """Two 1x1 convolutions in place of a split, one with residual blocks behind."""
    x = _stem(g)
    left, right = g.conv_bn(x, 8, 1, act="silu"), g.conv_bn(x, 8, 1, act="silu")
    for _ in range(2):
        left = g.add(left, g.conv_bn(g.conv_bn(left, 6, 1, act="silu"), 8, act="silu"))
    return _classify(g, g.conv_bn(g.concat(left, right), 20, 1, act="silu"))


# Channel shuffle


@topology()
def shufflenet_v2_units(g: Graph) -> Result:
    """Four units of split, branch, concat and shuffle: channels pair up across units."""
    x = _stem(g)
    for _ in range(4):
        kept, y = g.split(x, 2)
        y = g.conv_bn(y, 8, 1)
        y = g.conv_bn(g.conv_bn(y, 8, group=8, act=None), 8, 1)
        x = g.channel_shuffle(g.concat(kept, y), 2)
    return _classify(g, g.conv(x, 12, 1))


@topology()
def shufflenet_v1_units(g: Graph) -> Result:
    """Grouped 1x1 convolutions, a shuffle between them, and a residual sum."""
    x = _stem(g, 24)
    for _ in range(2):
        y = g.channel_shuffle(g.conv_bn(x, 12, 1, group=3), 3)
        y = g.conv_bn(y, 12, group=12, act=None)
        x = g.relu(g.add(x, g.conv_bn(y, 24, 1, group=3, act=None)))
    return _classify(g, x)


@topology()
def shuffle_by_gather(g: Graph) -> Result:
    """A channel shuffle written as a Gather with constant indices."""
    x = g.conv_bn(_stem(g), 16, 1, group=2)
    indices = g.const(np.arange(16).reshape(2, 8).T.ravel())
    return _classify(g, g.conv(g.op("Gather", x, indices, axis=1), 12, 3, group=2))


# Grouped convolution


@topology()
def depthwise(g: Graph) -> Result:
    """A depthwise separable pair."""
    return _classify(g, g.conv_bn(g.conv_bn(_stem(g), 16, group=16), 24, 1))


@topology()
def depthwise_multiplier(g: Graph) -> Result:
    """A depthwise convolution with two outputs per input."""
    return _classify(g, g.conv_bn(g.conv_bn(_stem(g), 32, group=16), 12, 1))


@topology()
def grouped_conv(g: Graph) -> Result:
    """Four groups of six channels."""
    return _classify(g, g.conv_bn(g.conv_bn(_stem(g, 24), 24, group=4), 12, 1))


@topology()
def grouped_then_depthwise(g: Graph) -> Result:
    """A grouped convolution, then a depthwise one."""
    x = g.conv_bn(_stem(g, 24), 24, group=4)
    return _classify(g, g.conv_bn(g.conv_bn(x, 24, group=24), 12, 1))


@topology()
def grouped_two_sizes(g: Graph) -> Result:
    """Three groups, then four, over the same twenty-four channels."""
    x = g.conv_bn(_stem(g, 24), 24, group=3)
    return _classify(g, g.conv_bn(g.conv_bn(x, 24, group=4), 12, 1))


@topology()
def grouped_conv_transpose(g: Graph) -> Result:
    """A transposed convolution in two groups."""
    return _classify(g, g.conv(g.relu(g.conv_transpose(_stem(g), 24, group=2)), 12))


@topology()
def depthwise_conv_transpose(g: Graph) -> Result:
    """A depthwise transposed convolution."""
    x = g.conv_transpose(_stem(g), 16, 4, group=16, pad=1, bias=False)
    return _classify(g, g.conv(g.relu(x), 12))


# Views


@topology()
def flatten_spatial(g: Graph) -> Result:
    """Flatten of a map wider than one pixel: each channel owns a block of columns."""
    x = g.max_pool(g.conv_bn(_stem(g), 12), 2)
    return g.gemm(g.relu(g.gemm(g.flatten(x), 20)), 5)


@topology()
def pool_then_reshape(g: Graph) -> Result:
    """Global pooling, then a Reshape to (batch, -1)."""
    x = g.gap(g.conv_bn(_stem(g), 12))
    return g.gemm(g.reshape(x, 0, -1), 5)


@topology()
def gemm_to_map(g: Graph) -> Result:
    """A Gemm whose rows become channels and pixels for a transposed convolution."""
    x = g.input("batch", 10, name="latent")
    x = g.reshape(g.relu(g.gemm(x, 12 * 4 * 4)), 0, 12, 4, 4)
    return g.conv(g.relu(g.bn(g.conv_transpose(x, 8))), 3)


@topology()
def view_mixes_channel_and_space(g: Graph) -> Result:
    """A Reshape that turns part of the height into channels."""
    x = g.reshape(g.conv(_stem(g), 8), 0, 32, 4, 4)
    return _classify(g, g.conv(g.relu(x), 12))


@topology()
def mixed_view_added(g: Graph) -> Result:
    """A view of another layout, added to a convolution."""
    x = _stem(g)
    mixed = g.reshape(g.transpose(g.conv(x, 8), 0, 2, 3, 1), 0, 8, 8, 8)
    return _classify(g, g.conv(g.relu(g.add(mixed, g.conv(x, 8))), 12))


@topology()
def matmul_on_width(g: Graph) -> Result:
    """A MatMul over the last axis of a map, with channels passing by."""
    x = g.matmul(_stem(g), 10)
    return _classify(g, g.conv(g.relu(x), 12))


@topology()
def vector_over_map(g: Graph) -> Result:
    """A Gemm's output broadcast over a map of as many channels."""
    x = _image(g)
    y = g.relu(g.conv(x, 16))
    style = g.input("batch", 7, name="style")
    shift = g.unsqueeze(g.gemm(style, 16), 2, 3)
    return _classify(g, g.conv(g.relu(g.add(y, shift)), 12))


@topology()
def mean_over_channels(g: Graph) -> Result:
    """A mean over the channel axis, subtracted."""
    x = g.conv(_stem(g), 12)
    centred = g.op("Sub", x, g.reduce("ReduceMean", x, 1))
    return _classify(g, g.conv(g.relu(centred), 8))


# Normalisation


@topology()
def layer_norm_channels(g: Graph) -> Result:
    """LayerNormalization over channels, through Transpose to NHWC and back."""
    x = g.transpose(g.conv(_stem(g), 12), 0, 2, 3, 1)
    scale, bias = g.store("norm.scale", g.uniform(0.5, 1.5, 12)), g.store("norm.bias", g.normal(12))
    x = g.op("LayerNormalization", x, scale, bias, axis=-1, epsilon=1e-6)
    x = g.relu(g.matmul(x, 24, bias=True))
    return _classify(g, g.conv(g.transpose(x, 0, 3, 1, 2), 8))


@topology()
def layer_norm_spelled(g: Graph) -> Result:
    """LayerNormalization over channels, written out."""
    x = g.transpose(g.conv(_stem(g), 12), 0, 2, 3, 1)
    centred = g.op("Sub", x, g.reduce("ReduceMean", x, -1))
    square = g.op("Pow", centred, g.const(2.0, np.float32))
    variance = g.add(g.reduce("ReduceMean", square, -1), g.const(1e-5, np.float32))
    x = g.op("Div", centred, g.op("Sqrt", variance))
    x = g.mul(x, g.store("norm.scale", g.uniform(0.5, 1.5, 12)))
    x = g.add(x, g.store("norm.bias", g.normal(12)))
    return _classify(g, g.conv(g.transpose(x, 0, 3, 1, 2), 8))


@topology()
def rms_norm_spelled(g: Graph) -> Result:
    """Division by the root mean square over channels, written out."""
    x = g.conv(_stem(g), 12)
    square = g.op("Pow", x, g.const(2.0, np.float32))
    mean = g.add(g.reduce("ReduceMean", square, 1), g.const(1e-5, np.float32))
    x = g.mul(x, g.op("Reciprocal", g.op("Sqrt", mean)))
    x = g.mul(x, g.store("norm.scale", g.uniform(0.5, 1.5, 1, 12, 1, 1)))
    return _classify(g, g.conv(x, 8))


def _group_norm(g: Graph, parameters: int) -> Result:
    x = g.conv(_stem(g), 24)
    scale = g.store("norm.scale", g.uniform(0.5, 1.5, parameters))
    bias = g.store("norm.bias", g.normal(parameters))
    x = g.op("GroupNormalization", x, scale, bias, num_groups=4, shape=x.shape)
    return _classify(g, g.conv(g.relu(x), 8))


@topology(opset=18, runnable=False)
def group_norm_18(g: Graph) -> Result:
    """GroupNormalization with one scale per group, as in operator set 18.

    onnxruntime runs it, but onnx deprecated this form, and its checker refuses it.
    """
    return _group_norm(g, 4)


@topology(opset=21, ir=10)
def group_norm_21(g: Graph) -> Result:
    """GroupNormalization with one scale per channel, as from 21 on."""
    return _group_norm(g, 24)


@topology()
def group_norm_spelled(g: Graph) -> Result:
    """Group normalisation as Reshape, InstanceNormalization, Reshape, Mul, Add."""
    x = g.conv(_stem(g), 24)
    y = g.reshape(x, 0, 4, -1, shape=("batch", 4, 384))
    ones, zeros = g.const(np.ones(4), np.float32), g.const(np.zeros(4), np.float32)
    y = g.op("InstanceNormalization", y, ones, zeros)
    y = g.op("Reshape", y, g.op("Shape", x), shape=x.shape)
    y = g.mul(y, g.store("norm.scale", g.uniform(0.5, 1.5, 24, 1, 1)))
    y = g.add(y, g.store("norm.bias", g.normal(24, 1, 1)))
    return _classify(g, g.conv(g.relu(y), 8))


@topology()
def instance_norm(g: Graph) -> Result:
    """InstanceNormalization with scales and shifts."""
    x = g.conv(_stem(g), 12)
    scale, bias = g.store("norm.scale", g.uniform(0.5, 1.5, 12)), g.store("norm.bias", g.normal(12))
    return _classify(g, g.conv(g.relu(g.op("InstanceNormalization", x, scale, bias)), 8))


@topology()
def local_response_norm(g: Graph) -> Result:
    """LRN, which mixes neighbouring channels."""
    x = g.op("LRN", _stem(g), size=5, alpha=0.1, beta=0.75, bias=1.0)
    return _classify(g, g.conv(x, 12))


@topology()
def bn_before_conv(g: Graph) -> Result:
    """Batch normalisation behind an activation, where it cannot be folded backwards."""
    return _classify(g, g.conv(g.bn(g.relu(g.conv(g.bn(_image(g)), 16))), 12))


@topology()
def bn_flatten_gemm(g: Graph) -> Result:
    """Batch normalisation, Flatten, Gemm, and batch normalisation of its vector."""
    x = g.flatten(g.bn(g.max_pool(_stem(g), 4)))
    return g.gemm(g.relu(g.bn(g.gemm(x, 20))), 5)


@topology()
def two_bns_summed(g: Graph) -> Result:
    """Two batch normalisations of one convolution, summed."""
    x = g.conv(_stem(g), 12)
    return _classify(g, g.conv(g.relu(g.add(g.bn(x), g.bn(x))), 8))


@topology()
def prelu_per_channel(g: Graph) -> Result:
    """PRelu with a slope per channel."""
    x = g.conv(_image(g), 12)
    slope = g.store("slope", g.uniform(0.1, 0.4, 12, 1, 1))
    return _classify(g, g.conv(g.op("PRelu", x, slope), 8))


@topology()
def prelu_single(g: Graph) -> Result:
    """PRelu with one slope for all channels."""
    x = g.conv(_image(g), 12)
    return _classify(g, g.conv(g.op("PRelu", x, g.store("slope", g.uniform(0.1, 0.4, 1))), 8))


# Padding and resizing


@topology()
def pad_constant(g: Graph) -> Result:
    """A Pad of space by a value other than zero."""
    x, pads = _stem(g), g.const([0, 0, 1, 2, 0, 0, 2, 1])
    x = g.op("Pad", x, pads, g.const(0.5, np.float32))
    return _classify(g, g.conv(x, 12, pad=0))


@topology()
def pad_reflect(g: Graph) -> Result:
    """A Pad of space by reflection."""
    x = g.pad(_stem(g), [0, 0, 1, 1], [0, 0, 1, 1], "reflect")
    return _classify(g, g.conv(x, 12, pad=0))


@topology()
def pad_channels(g: Graph) -> Result:
    """A shortcut whose channels are padded with zeros, as in ResNet option A."""
    x = _stem(g, 12)
    y = g.conv_bn(g.conv_bn(x, 16, stride=2), 20, act=None)
    shortcut = g.slice(x, [0, 0], [INT_MAX, INT_MAX], [2, 3], [2, 2])
    shortcut = g.pad(shortcut, [0, 4, 0, 0], [0, 4, 0, 0])
    return _classify(g, g.relu(g.add(y, shortcut)))


@topology()
def resize_scales(g: Graph) -> Result:
    """A Resize by factors."""
    x = g.resize(_stem(g), scales=[1, 1, 2, 2], mode="linear")
    return _classify(g, g.conv(x, 12))


@topology()
def resize_sizes(g: Graph) -> Result:
    """A Resize to sizes that hold the channel count, the batch taken from a Shape."""
    x = _stem(g)
    batch = g.slice(g.op("Shape", x), [0], [1], [0])
    sizes = g.concat(batch, g.const([16, 16, 16]), axis=0)
    shape = ("batch", 16, 16, 16)
    x = g.op("Resize", x, None, None, sizes, mode="nearest", shape=shape)
    return _classify(g, g.conv(x, 12))


@topology(opset=9, ir=4)
def upsample_9(g: Graph) -> Result:
    """Upsample, as in operator set 9."""
    x = g.op("Upsample", _stem(g), g.const([1, 1, 2, 2], np.float32), mode="nearest")
    return _classify(g, g.conv(x, 12))


# Space to depth and back


@topology()
def pixel_shuffle_dcr(g: Graph) -> Result:
    """DepthToSpace with the block index outermost."""
    x = g.op("DepthToSpace", g.conv(_stem(g), 24), blocksize=2, mode="DCR")
    return g.conv(g.relu(x), 3)


@topology()
def pixel_shuffle_crd(g: Graph) -> Result:
    """DepthToSpace with the block index innermost."""
    x = g.op("DepthToSpace", g.conv(_stem(g), 24), blocksize=2, mode="CRD")
    return g.conv(g.relu(x), 3)


@topology()
def pixel_shuffle_reshape(g: Graph) -> Result:
    """Pixel shuffle as Reshape, Transpose, Reshape."""
    x = g.reshape(g.conv(_stem(g), 24), 0, 6, 2, 2, 8, 8)
    x = g.reshape(g.transpose(x, 0, 1, 4, 2, 5, 3), 0, 6, 16, 16)
    return g.conv(g.relu(x), 3)


@topology()
def space_to_depth(g: Graph) -> Result:
    """SpaceToDepth between convolutions."""
    x = g.op("SpaceToDepth", g.conv(_stem(g), 6), blocksize=2)
    return _classify(g, g.conv(g.relu(x), 12))


@topology()
def focus(g: Graph) -> Result:
    """Every second pixel in four phases, side by side, as in YOLOv5."""
    x = _stem(g, 6)
    phases = [
        g.slice(g.slice(x, [row], [INT_MAX], [2], [2]), [column], [INT_MAX], [3], [2])
        for column in (0, 1)
        for row in (0, 1)
    ]
    return _classify(g, g.conv_bn(g.concat(*phases), 12))


# Multi-scale


@topology()
def fpn(g: Graph) -> Result:
    """Lateral 1x1 convolutions summed top-down."""
    c2 = g.conv_bn(_stem(g), 12)
    c3 = g.conv_bn(c2, 16, stride=2)
    c4 = g.conv_bn(c3, 20, stride=2)
    top = g.conv(c4, 10, 1)
    middle = g.add(g.conv(c3, 10, 1), g.upsample(top))
    bottom = g.add(g.conv(c2, 10, 1), g.upsample(middle))
    return tuple(g.conv(level, 4) for level in (top, middle, bottom))


@topology()
def unet_skip(g: Graph) -> Result:
    """An encoder map beside the decoder's transposed convolution."""
    skip = g.conv_bn(_stem(g), 12)
    deep = g.conv_bn(g.max_pool(skip, 2), 20)
    return g.conv(g.conv_bn(g.concat(skip, g.conv_transpose(deep, 10)), 14), 2, 1)


@topology()
def shared_head(g: Graph) -> Result:
    """One detection head applied to three levels, which aligns their channels."""
    weights = [
        g.store("head.0.weight", g.he(12, 10, 3, 3, fan_in=90)),
        g.store("head.1.weight", g.he(6, 12, 1, 1, fan_in=12)),
    ]
    x, outputs = _stem(g), []
    for _ in range(3):
        x = g.conv_bn(x, 14, stride=2)
        hidden = g.relu(g.conv(g.conv(x, 10, 1), weight=weights[0], bias=False))
        y = g.conv(hidden, weight=weights[1], bias=False)
        outputs.append(g.reshape(y, 0, 6, y.extent(2) * y.extent(3)))
    return g.concat(*outputs, axis=2)


# Sharing


@topology()
def siamese(g: Graph) -> Result:
    """Two images through the same weights, then their difference."""
    inner = g.store("shared.0.weight", g.he(12, 3, 3, 3, fan_in=27))
    outer = g.store("shared.1.weight", g.he(16, 12, 3, 3, fan_in=108))
    bias = g.store("shared.1.bias", g.normal(16, scale=0.1))
    maps = [
        g.conv(g.relu(g.conv(_image(g, name=name), weight=inner, bias=False)), weight=outer, bias=bias)
        for name in ("left", "right")
    ]
    return _classify(g, g.op("Abs", g.op("Sub", *maps)))


@topology()
def unrolled_loop(g: Graph) -> Result:
    """One convolution applied four times to its own output."""
    weight = g.store("step.weight", g.he(12, 12, 3, 3, fan_in=108))
    bias = g.store("step.bias", g.normal(12, scale=0.1))
    x = _stem(g, 12)
    for _ in range(4):
        x = g.relu(g.conv(x, weight=weight, bias=bias))
    return _classify(g, x)


@topology()
def shared_bias(g: Graph) -> Result:
    """One bias for three convolutions of equal width that are otherwise unrelated."""
    bias = g.store("shared.bias", g.normal(12, scale=0.1))
    x = _stem(g)
    for _ in range(3):
        x = g.relu(g.conv(x, 12, bias=bias))
    return _classify(g, x)


@topology()
def shared_scale_and_bias(g: Graph) -> Result:
    """One vector as the scale of one layer's normalisation and the bias of another layer."""
    vector = g.store("shared.vector", g.uniform(0.5, 1.5, 12))
    x = g.conv(_stem(g), 12, bias=False)
    others = [g.const(value, np.float32) for value in (g.normal(12), g.normal(12))]
    variance = g.const(g.uniform(0.5, 1.5, 12), np.float32)
    x = g.op("BatchNormalization", x, vector, *others, variance)
    return _classify(g, g.relu(g.conv(g.relu(x), 12, bias=vector)))


@topology()
def shared_kernel_two_producers(g: Graph) -> Result:
    """One weight applied to the outputs of two convolutions, used apart afterwards."""
    weight = g.store("shared.weight", g.he(10, 12, 3, 3, fan_in=108))
    x = _stem(g)
    a, b = (g.conv(g.relu(g.conv(x, 12, k)), weight=weight) for k in (1, 3))
    return _classify(g, g.concat(g.conv(a, 6), g.conv(b, 8)))


# Where weights come from


@topology(storage="constant")
def weights_in_constant_nodes(g: Graph) -> Result:
    """Every weight is a Constant node."""
    return _classify(g, g.conv_bn(g.conv_bn(_image(g), 16), 24))


@topology(opset=8, ir=3, storage="input")
def weights_are_inputs(g: Graph) -> Result:
    """Every weight is a graph input too, as IR version 3 requires."""
    return _classify(g, g.conv_bn(g.conv_bn(_image(g), 16), 24))


@topology()
def weight_behind_transpose(g: Graph) -> Result:
    """Matrices stored (out, in) and transposed before MatMul; a kernel stored HWIO."""
    kernel = g.store("conv.hwio", g.he(3, 3, 16, 12, fan_in=144))
    x = g.relu(g.conv(_stem(g), weight=g.transpose(kernel, 3, 2, 0, 1)))
    x = g.flatten(g.gap(x))
    matrix = g.store("fc.weight", g.he(20, 12, fan_in=12))
    x = g.relu(g.op("MatMul", x, g.transpose(matrix, 1, 0)))
    return g.gemm(x, 5)


@topology()
def weight_behind_identity(g: Graph) -> Result:
    """Two convolutions read one kernel, one of them through Identity."""
    weight = g.store("conv.weight", g.he(16, 16, 3, 3, fan_in=144))
    x = g.relu(g.conv(_stem(g), weight=weight))
    x = g.relu(g.conv(x, weight=g.op("Identity", weight)))
    return _classify(g, x)


@topology()
def weight_behind_cast(g: Graph) -> Result:
    """A half-precision kernel and bias cast to float."""
    kernel = g.store("conv.weight", g.he(12, 16, 3, 3, fan_in=144).astype(np.float16))
    bias = g.store("conv.bias", g.normal(12, scale=0.1).astype(np.float16))
    kernel, bias = (g.op("Cast", tensor, to=TensorProto.FLOAT) for tensor in (kernel, bias))
    return _classify(g, g.relu(g.conv(_stem(g), weight=kernel, bias=bias)))


@topology()
def weight_behind_reshape(g: Graph) -> Result:
    """A matrix reshaped to a 1x1 kernel."""
    matrix = g.store("conv.matrix", g.he(12, 16, fan_in=16))
    return _classify(g, g.relu(g.conv(_stem(g), weight=g.reshape(matrix, 12, 16, 1, 1))))


@topology()
def weight_from_constant_of_shape(g: Graph) -> Result:
    """A kernel made by ConstantOfShape."""
    fill = helper.make_tensor("value", TensorProto.FLOAT, [1], [0.05])
    kernel = g.op("ConstantOfShape", g.const([12, 16, 3, 3]), value=fill)
    x = g.relu(g.conv(_stem(g), weight=kernel))
    return _classify(g, g.conv(x, 8))


@topology()
def weight_standardised(g: Graph) -> Result:
    """A kernel centred and scaled per output channel by nodes of the graph."""
    kernel = g.store("conv.weight", g.he(12, 16, 3, 3, fan_in=144))
    centred = g.op("Sub", kernel, g.reduce("ReduceMean", kernel, 1, 2, 3))
    variance = g.reduce("ReduceMean", g.mul(centred, centred), 1, 2, 3)
    spread = g.op("Sqrt", g.add(variance, g.const(1e-5, np.float32)))
    gain = g.store("conv.gain", g.uniform(0.1, 0.3, 12, 1, 1, 1))
    kernel = g.mul(g.op("Div", centred, spread), gain)
    return _classify(g, g.relu(g.conv(g.relu(g.conv(_stem(g), weight=kernel)), 8)))


@topology()
def weight_normalised(g: Graph) -> Result:
    """A kernel divided by its norm per output channel."""
    kernel = g.store("conv.v", g.he(12, 16, 3, 3, fan_in=144))
    norm = g.reduce("ReduceL2", kernel, 1, 2, 3)
    kernel = g.mul(g.op("Div", kernel, norm), g.store("conv.g", g.uniform(0.5, 1.5, 12, 1, 1, 1)))
    return _classify(g, g.relu(g.conv(g.relu(g.conv(_stem(g), weight=kernel)), 8)))


@topology()
def dynamic_conv(g: Graph) -> Result:
    """A kernel mixed from four experts by weights computed from the input."""
    x = _stem(g)
    mean = g.reduce("ReduceMean", g.gap(x), 0)
    mixture = g.op("Softmax", g.gemm(g.flatten(mean), 4), axis=-1)
    experts = g.store("experts.weight", g.he(4, 12 * 16 * 9, fan_in=144))
    kernel = g.reshape(g.op("MatMul", mixture, experts), 12, 16, 3, 3)
    return _classify(g, g.conv(g.relu(g.conv(x, weight=kernel, bias=False)), 8))


@topology()
def weight_quantised(g: Graph) -> Result:
    """An int8 kernel with a scale per output channel, behind DequantizeLinear."""
    codes = g.store("conv.codes", g.rng.integers(-127, 128, (12, 16, 3, 3)).astype(np.int8))
    scale = g.store("conv.scale", g.uniform(0.001, 0.003, 12))
    zero = g.store("conv.zero", np.zeros(12, np.int8))
    kernel = g.op("DequantizeLinear", codes, scale, zero, axis=0)
    return _classify(g, g.conv(g.relu(g.conv(_stem(g), weight=kernel)), 8))


# Matrix products


def _vector(g: Graph, width: int = 20) -> Tensor:
    """An input vector through a first prunable layer."""
    return g.relu(g.gemm(g.input("batch", 10, name="vector"), width))


@topology()
def gemm_plain(g: Graph) -> Result:
    """Gemm with its weight stored (in, out)."""
    return g.gemm(g.relu(g.gemm(_vector(g), 16, trans_b=False)), 5, trans_b=False)


@topology()
def gemm_alpha_beta(g: Graph) -> Result:
    """Gemm with factors on product and bias, both weight layouts."""
    x = g.relu(g.gemm(_vector(g), 16, alpha=0.5, beta=2.0))
    return g.gemm(x, 5, trans_b=False, alpha=1.5, beta=0.25)


@topology()
def gemm_trans_a(g: Graph) -> Result:
    """Gemm of a transposed activation, both weight layouts."""
    x = g.transpose(_vector(g), 1, 0)
    x = g.relu(g.gemm(x, 16, trans_a=True))
    return g.gemm(g.transpose(x, 1, 0), 5, trans_a=True, trans_b=False)


@topology()
def gemm_weight_left(g: Graph) -> Result:
    """Gemm with the weight as its first operand and a column of biases."""
    x = _vector(g)
    weight = g.store("left.weight", g.he(16, 20, fan_in=20))
    bias = g.store("left.bias", g.normal(16, 1, scale=0.1))
    y = g.relu(g.op("Gemm", weight, x, bias, transB=1))
    weight = g.store("left.second", g.he(16, 12, fan_in=16))
    y = g.relu(g.op("Gemm", weight, y, transA=1))
    return g.gemm(g.transpose(y, 1, 0), 5)


@topology()
def gemm_bias_forms(g: Graph) -> Result:
    """Gemm with a scalar, a row, and no bias."""
    x = g.relu(g.gemm(_vector(g), 16, bias=g.const(0.1, np.float32)))
    x = g.relu(g.gemm(x, 12, bias=g.store("row.bias", g.normal(1, 12, scale=0.1))))
    return g.gemm(x, 5, bias=False)


@topology()
def matmul_add(g: Graph) -> Result:
    """MatMul and Add in place of Gemm."""
    return g.matmul(g.relu(g.matmul(_vector(g), 16, bias=True)), 5, bias=True)


@topology()
def matmul_weight_left(g: Graph) -> Result:
    """A matrix applied from the left to a map flattened over space."""
    x = g.reshape(_stem(g), 0, 16, 64)
    y = g.relu(g.op("MatMul", g.store("mix.weight", g.he(12, 16, fan_in=16)), x))
    return _classify(g, g.conv(g.reshape(y, 0, 12, 8, 8), 8))


@topology()
def matmul_batched_weight(g: Graph) -> Result:
    """A weight with a leading axis: one matrix per head."""
    x = g.reshape(_vector(g, 24), 0, 4, 1, 6)
    y = g.op("MatMul", x, g.store("heads.weight", g.he(4, 6, 8, fan_in=6)))
    return g.gemm(g.reshape(g.relu(y), 0, 32), 5)


@topology()
def einsum_map(g: Graph) -> Result:
    """A 1x1 convolution as an Einsum that also swaps axes."""
    weight = g.store("einsum.weight", g.he(12, 16, fan_in=16))
    y = g.op("Einsum", _stem(g), weight, equation="bchw,oc->bohw")
    return _classify(g, g.conv(g.relu(y), 8))


@topology()
def einsum_sequence(g: Graph) -> Result:
    """A linear layer over a sequence as an Einsum."""
    x = g.transpose(g.reshape(_stem(g), 0, 16, 64), 0, 2, 1)
    weight = g.store("einsum.weight", g.he(16, 12, fan_in=16))
    y = g.relu(g.op("Einsum", x, weight, equation="bij,jk->bik"))
    return g.matmul(g.reduce("ReduceMean", y, 1, keepdims=False), 5)


# Shapes in the graph


@topology()
def reshape_from_shape(g: Graph) -> Result:
    """A Reshape target put together from Shape, Gather, Unsqueeze and Concat."""
    x = g.conv(_stem(g), 12)
    batch = g.op("Gather", g.op("Shape", x), g.const(0), axis=0, shape=())
    target = g.concat(g.unsqueeze(batch, 0), g.const([12]), g.const([-1]), axis=0)
    y = g.op("Reshape", x, target, shape=("batch", 12, 64))
    y = g.relu(g.reduce("ReduceMean", y, 2, keepdims=False))
    return g.gemm(y, 5)


@topology()
def reshape_channels_from_shape(g: Graph) -> Result:
    """A Reshape target whose channel count is read from a Shape."""
    x = g.conv(_stem(g), 12)
    extents = g.slice(g.op("Shape", x), [0], [2], [0])
    target = g.concat(extents, g.const([64]), axis=0)
    y = g.op("Reshape", x, target, shape=("batch", 12, 64))
    return g.gemm(g.reduce("ReduceMax", y, 2, keepdims=False), 5)


@topology()
def reshape_baked(g: Graph) -> Result:
    """Reshape to numbers, the batch as -1."""
    x = g.reshape(g.conv(_stem(g), 12), -1, 12, 64, shape=("batch", 12, 64))
    x = g.reshape(g.relu(x), -1, 768, shape=("batch", 768))
    return g.gemm(x, 5)


@topology()
def reshape_minus_one(g: Graph) -> Result:
    """Reshape with -1 for the channel axis."""
    x = g.reshape(g.conv(_stem(g), 12), 0, -1, 64, shape=("batch", 12, 64))
    x = g.reshape(g.relu(x), 0, -1, 8, 8, shape=("batch", 12, 8, 8))
    return _classify(g, g.conv(x, 8))


@topology()
def reshape_zero(g: Graph) -> Result:
    """Reshape with 0 for batch and channels."""
    x = g.reshape(g.conv(_stem(g), 12), 0, 0, 64)
    x = g.reshape(g.relu(x), 0, 0, 8, 8)
    return _classify(g, g.conv(x, 8))


@topology()
def expand_channels(g: Graph) -> Result:
    """An Expand of one channel to the width of the map it is added to."""
    x = _stem(g)
    one = g.reduce("ReduceMean", x, 1)
    wide = g.op("Expand", one, g.const([1, 16, 1, 1]))
    return _classify(g, g.conv(g.add(x, wide), 12))


@topology()
def tile_channels(g: Graph) -> Result:
    """A Tile of one channel, and a Tile that repeats a prunable map."""
    x = _stem(g)
    wide = g.op("Tile", g.reduce("ReduceMean", x, 1), g.const([1, 16, 1, 1]))
    repeated = g.op("Tile", g.add(x, wide), g.const([1, 2, 1, 1]))
    return _classify(g, g.conv(repeated, 12))


@topology()
def constant_of_shape_channels(g: Graph) -> Result:
    """A map of a constant, with the channel count baked into its shape, in a sum."""
    x = _stem(g)
    batch = g.slice(g.op("Shape", x), [0], [1], [0])
    target = g.concat(batch, g.const([16, 8, 8]), axis=0)
    fill = helper.make_tensor("value", TensorProto.FLOAT, [1], [0.25])
    constant = g.op("ConstantOfShape", target, value=fill, shape=x.shape, dtype=x.dtype)
    return _classify(g, g.conv(g.add(x, constant), 12))


@topology()
def slice_channels(g: Graph) -> Result:
    """Slices of the channel axis with baked ends."""
    x = _stem(g, 24)
    low, high = g.slice(x, [0], [10], [1]), g.slice(x, [10], [24], [1])
    return _classify(g, g.concat(g.conv(low, 6), g.conv(high, 8)))


@topology()
def slice_negative(g: Graph) -> Result:
    """Slices of the channel axis that count from the end, axis -3."""
    x = _stem(g, 24)
    low, high = g.slice(x, [0], [-8], [-3]), g.slice(x, [-8], [INT_MAX], [-3])
    return _classify(g, g.concat(g.conv(low, 6), g.conv(high, 8)))


@topology()
def slice_to_int_max(g: Graph) -> Result:
    """A slice of everything and a slice to the largest integer."""
    x = g.slice(_stem(g, 24), [0], [INT_MAX], [1])
    return _classify(g, g.concat(g.conv(x, 6), g.conv(g.slice(x, [8], [INT_MAX], [1]), 8)))


@topology()
def slice_strided(g: Graph) -> Result:
    """Even and odd channels apart."""
    x = _stem(g, 24)
    even, odd = (g.slice(x, [start], [INT_MAX], [1], [2]) for start in (0, 1))
    return _classify(g, g.concat(g.conv(even, 6), g.conv(odd, 8)))


@topology(opset=9, ir=4)
def slice_attributes(g: Graph) -> Result:
    """Slices with bounds as attributes, as before operator set 10."""
    x = _stem(g, 24)
    low, high = g.slice(x, [0], [10], [1]), g.slice(x, [10], [INT_MAX], [1])
    return _classify(g, g.concat(g.conv(low, 6), g.conv(high, 8)))


@topology()
def gather_channels(g: Graph) -> Result:
    """Gather of contiguous channels by constant indices, and of a single one."""
    x = _stem(g, 24)
    block = g.op("Gather", x, g.const(np.arange(4, 16)), axis=1)
    single = g.unsqueeze(g.op("Gather", x, g.const(20), axis=1), 1)
    return _classify(g, g.conv(g.concat(block, single), 12))


@topology()
def squeeze_unsqueeze(g: Graph) -> Result:
    """Squeeze and Unsqueeze with axes as inputs."""
    x = g.squeeze(g.gap(_stem(g)), 2, 3)
    x = g.conv(g.unsqueeze(x, 2, 3), 12, 1)
    return g.gemm(g.squeeze(g.relu(x), -1, -2), 5)


@topology(opset=11, ir=6)
def squeeze_unsqueeze_attributes(g: Graph) -> Result:
    """Squeeze and Unsqueeze with axes as attributes."""
    x = g.squeeze(g.gap(_stem(g)), 2, 3)
    x = g.conv(g.unsqueeze(x, 2, 3), 12, 1)
    return g.gemm(g.squeeze(g.relu(x), 2, 3), 5)


# Reductions


def _reductions(g: Graph, *, keepdims: bool) -> Result:
    x = _stem(g)
    pooled = [
        g.reduce(op_type, g.conv(x, 8), 2, 3, keepdims=keepdims)
        for op_type in ("ReduceMean", "ReduceMax", "ReduceSum")
    ]
    y = g.concat(*pooled)
    return g.gemm(g.flatten(y) if keepdims else y, 5)


@topology()
def reduce_keep(g: Graph) -> Result:
    """Reductions over space that keep the axes; attribute form, but for ReduceSum."""
    return _reductions(g, keepdims=True)


@topology()
def reduce_drop(g: Graph) -> Result:
    """Reductions over space that drop the axes; attribute form, but for ReduceSum."""
    return _reductions(g, keepdims=False)


@topology(opset=18)
def reduce_keep_inputs(g: Graph) -> Result:
    """Reductions over space that keep the axes; input form."""
    return _reductions(g, keepdims=True)


@topology(opset=18)
def reduce_drop_inputs(g: Graph) -> Result:
    """Reductions over space that drop the axes; input form."""
    return _reductions(g, keepdims=False)


@topology()
def reduce_negative_axes(g: Graph) -> Result:
    """Reductions with axes counted from the end, one of them over channels."""
    x = _stem(g)
    gate = g.act(g.reduce("ReduceMean", x, -3), "sigmoid")
    return g.gemm(g.reduce("ReduceMean", g.conv(g.mul(x, gate), 12), -1, -2, keepdims=False), 5)


# Old operator sets


def _old_forms(g: Graph) -> Result:
    x = g.clip(g.bn(g.conv(_image(g), 16, bias=False)), 0.0, 6.0)
    x = g.dropout(g.conv(g.pad(x, [0, 0, 1, 1], [0, 0, 1, 1]), 12, pad=0))
    return g.gemm(g.flatten(g.gap(g.relu(x))), 5)


@topology(opset=7, ir=3, storage="input")
def forms_of_7(g: Graph) -> Result:
    """Attribute forms of Clip, Dropout and Pad in operator set 7."""
    return _old_forms(g)


@topology(opset=7, ir=3, storage="input")
def bn_spatial_attribute(g: Graph) -> Result:
    """BatchNormalization that states spatial=1."""
    x = g.conv(_image(g), 16, bias=False)
    vectors = [g.store(f"bn.{name}", g.uniform(0.5, 1.5, 16)) for name in ("s", "b", "m", "v")]
    x = g.op("BatchNormalization", x, *vectors, spatial=1, momentum=0.9)
    return _classify(g, g.conv(g.relu(x), 12))


@topology(opset=9, ir=4)
def forms_of_9(g: Graph) -> Result:
    """The same network in operator set 9."""
    return _old_forms(g)


@topology(opset=11, ir=6)
def forms_of_11(g: Graph) -> Result:
    """The same network in operator set 11, where Clip and Pad have inputs."""
    return _old_forms(g)


@topology(opset=7, ir=3, storage="input")
def broadcast_bias_7(g: Graph) -> Result:
    """A bias (c, 1, 1) made from a vector by Unsqueeze and added to a convolution."""
    x = g.conv(_image(g), 16, bias=False)
    bias = g.unsqueeze(g.store("bias", g.normal(16, scale=0.1)), 1, 2)
    return _classify(g, g.conv(g.relu(g.add(x, bias)), 12))


# Control flow, several inputs and outputs, leftovers


@topology()
def if_captures(g: Graph) -> Result:
    """An If whose bodies read a map and a weight of the outer graph."""
    x = _stem(g)
    weight = g.store("captured.weight", g.he(12, 16, 3, 3, fan_in=144))
    flag = g.op("Greater", g.reduce("ReduceSum", x, 0, 1, 2, 3, keepdims=False), g.const(0.0, np.float32))
    yes, no = g.subgraph(), g.subgraph()
    y = g.op(
        "If",
        flag,
        then_branch=yes.graph(yes.relu(yes.conv(x, weight=weight))),
        else_branch=no.graph(no.conv(x, 12, 1)),
        shape=("batch", 12, 8, 8),
        dtype=x.dtype,
    )
    return _classify(g, g.conv(y, 8))


@topology()
def output_used_inside(g: Graph) -> Result:
    """A map that is a graph output and feeds the next convolution too."""
    x = g.relu(g.conv(_stem(g), 12))
    return _classify(g, g.relu(g.conv(x, 8))), x


@topology()
def two_outputs(g: Graph) -> Result:
    """Two heads on one trunk."""
    x = g.conv_bn(_stem(g), 12)
    return _classify(g, x), g.conv(x, 2, 1)


def _towers(g: Graph, left: int, right: int) -> tuple[Tensor, Tensor]:
    image, vector = _image(g), g.input("batch", 10, name="vector")
    a = g.gemm(g.flatten(g.gap(g.conv_bn(image, 16))), left)
    return a, g.gemm(g.relu(g.gemm(vector, 20)), right)


@topology()
def two_towers_concat(g: Graph) -> Result:
    """An image tower and a vector tower, side by side."""
    return g.gemm(g.relu(g.concat(*_towers(g, 12, 8))), 5)


@topology()
def two_towers_dot(g: Graph) -> Result:
    """An image tower and a vector tower, normalised and multiplied."""
    a, b = (g.op("Div", tower, g.reduce("ReduceL2", tower, 1)) for tower in _towers(g, 12, 12))
    return g.reduce("ReduceSum", g.mul(a, b), 1)


@topology()
def two_towers_similarity(g: Graph) -> Result:
    """Every image against every vector by a MatMul of activations."""
    a, b = _towers(g, 12, 12)
    return g.op("MatMul", a, g.transpose(b, 1, 0))


@topology()
def dead_branch(g: Graph) -> Result:
    """An unused initializer and a convolution that nothing reads."""
    g.store("unused", g.normal(16))
    x = _stem(g)
    g.relu(g.conv(x, 10))
    return _classify(g, g.conv(x, 12))


@topology()
def disconnected(g: Graph) -> Result:
    """Two networks in one graph that share nothing."""
    first = _classify(g, g.conv_bn(_stem(g), 12))
    return first, g.gemm(_vector(g), 4)


@topology()
def stale_value_info(g: Graph) -> Result:
    """Declared shapes of intermediate values, right now but stale after pruning."""
    x = _stem(g)
    y = g.conv_bn(x, 12)
    model = g.model(_classify(g, y))
    model.graph.value_info.extend([x.value_info(), y.value_info()])
    return model


@topology(runnable=False)
def custom_domain(g: Graph) -> Result:
    """A node of an unknown domain between two convolutions."""
    x = _stem(g)
    x = g.op("Mystery", x, domain="example.custom", shape=x.shape, strength=0.5)
    return _classify(g, g.conv(x, 12))


def feeds(model: ModelProto, batch: int = 2, seed: int = 0) -> dict[str, Array]:
    """Random float inputs; every symbolic extent is `batch`."""
    rng = np.random.default_rng(seed)
    constants = {tensor.name for tensor in model.graph.initializer}
    return {
        info.name: rng.standard_normal(
            [dim.dim_value or batch for dim in info.type.tensor_type.shape.dim], dtype=np.float32
        )
        for info in model.graph.input
        if info.name not in constants
    }


def check(build: Build) -> str:
    """Build, check and run a network, and describe its outputs; raises where it is wrong."""
    model = build()
    onnx.checker.check_model(model, full_check=True)
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    outputs = session.run(None, feeds(model))
    for info, output in zip(model.graph.output, outputs, strict=True):
        declared = [dim.dim_value or 2 for dim in info.type.tensor_type.shape.dim]
        if list(output.shape) != declared:
            raise ValueError(f"{info.name} is {list(output.shape)}, declared {declared}")
        if not np.isfinite(output).all() or not output.std():
            raise ValueError(f"{info.name} is degenerate")
    spread = " ".join(f"{float(output.std()):.2g}" for output in outputs)
    return f"opset {model.opset_import[0].version:2} {len(model.graph.node):4} nodes  std {spread}"


def main() -> int:
    """List the networks, or check every one; 1 if one fails."""
    parser = argparse.ArgumentParser(prog="python -m models.topologies", description=main.__doc__)
    parser.add_argument("--check", action="store_true", help="build, check and run all")
    if not parser.parse_args().check:
        print("\n".join([*TOPOLOGIES, *NOT_RUNNABLE]))
        return 0
    failures = 0
    with ThreadPoolExecutor(2) as pool:
        results = {name: pool.submit(check, build) for name, build in TOPOLOGIES.items()}
    for name, result in results.items():
        error = result.exception()
        failures += error is not None
        print(f"{name:32} {result.result() if error is None else f'FAILED {error!r}'}")
    for name, build in NOT_RUNNABLE.items():
        print(f"{name:32} {len(build().graph.node)} nodes, not run")
    print(f"{len(TOPOLOGIES)} checked, {len(NOT_RUNNABLE)} only built, {failures} failed")
    return 1 if failures else 0


if __name__ == "__main__":
    raise SystemExit(main())
