"""Published convolutional networks with random weights, built node by node.

At `width=1` channel counts, and so parameters, are the published ones; `PUBLISHED` holds the
counts and `python -m models.architectures` compares and prints them. Smaller `width` and `image`
give the same topology in miniature. The batch axis is dynamic and called `batch`, and batch
normalisation is kept as its own node.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from onnx import ModelProto

from models.builder import Array, Graph, Tensor, macs, parameters

PUBLISHED = {
    "resnet18": 11_689_512,
    "resnet50": 25_557_032,
    "resnext50_32x4d": 25_028_904,
    "mobilenet_v2": 3_504_872,
    "mobilenet_v3_large": 5_483_032,
    "efficientnet_b0": 5_288_548,
    "densenet121": 7_978_856,
    "vgg16_bn": 138_365_992,
    "shufflenet_v2": 2_278_604,
    "googlenet": 6_624_904,
    "yolov8n": 3_157_200,
    "unet": 31_037_698,
}
"""Trained parameters of each network at its default size."""


def scaled(channels: int, width: float, multiple: int = 8) -> int:
    """`channels` times `width`, to the nearest multiple of 8 and at least 8; exact at width 1."""
    if width == 1:
        return channels
    return max(multiple, round(channels * width / multiple) * multiple)


# Residual networks


def resnet18(*, width: float = 1.0, image: int = 224, classes: int = 1000, seed: int = 0) -> ModelProto:
    """ResNet-18 with basic blocks: 11.69 M parameters, 1.81 G MACs."""
    g = Graph("resnet18", seed=seed)
    return _resnet(g, (2, 2, 2, 2), width, image, classes, bottleneck=False)


def resnet50(*, width: float = 1.0, image: int = 224, classes: int = 1000, seed: int = 0) -> ModelProto:
    """ResNet-50, stride in the 3x3 convolutions: 25.56 M parameters, 4.09 G MACs."""
    return _resnet(Graph("resnet50", seed=seed), (3, 4, 6, 3), width, image, classes)


def resnext50_32x4d(
    *, width: float = 1.0, image: int = 224, classes: int = 1000, seed: int = 0
) -> ModelProto:
    """ResNeXt-50 with 32 groups of 4 channels: 25.03 M parameters, 4.23 G MACs.

    `width` scales the number of groups and keeps their size.
    """
    g = Graph("resnext50_32x4d", seed=seed)
    return _resnet(g, (3, 4, 6, 3), width, image, classes, groups=max(2, round(32 * width)))


def _resnet(
    g: Graph,
    depths: Sequence[int],
    width: float,
    image: int,
    classes: int,
    *,
    bottleneck: bool = True,
    groups: int = 1,
) -> ModelProto:
    x = g.input("batch", 3, image, image, name="image")
    with g.scope("stem"):
        x = g.conv_bn(x, scaled(64, width), 7, stride=2)
        x = g.max_pool(x, 3, stride=2, pad=1)
    for stage, depth in enumerate(depths):
        planes = 64 * 2**stage
        for block in range(depth):
            stride = 2 if stage and not block else 1
            with g.scope(f"layer{stage + 1}.{block}"):
                if not bottleneck:
                    cout = scaled(planes, width)
                    y = g.conv_bn(x, cout, 3, stride=stride)
                    y = g.conv_bn(y, cout, 3, act=None, gain=0.5)
                else:
                    cout = scaled(4 * planes, width)
                    mid = scaled(planes, width) if groups == 1 else groups * 4 * 2**stage
                    y = g.conv_bn(x, mid, 1)
                    y = g.conv_bn(y, mid, 3, stride=stride, group=groups)
                    y = g.conv_bn(y, cout, 1, act=None, gain=0.5)
                if stride != 1 or x.channels != cout:
                    x = g.conv_bn(x, cout, 1, stride=stride, act=None)
                x = g.relu(g.add(y, x))
    return g.model(_classifier(g, x, classes), names=["logits"])


def _classifier(g: Graph, x: Tensor, classes: int) -> Tensor:
    with g.scope("head"):
        return g.gemm(g.flatten(g.gap(x)), classes)


# Mobile networks


def mobilenet_v2(*, width: float = 1.0, image: int = 224, classes: int = 1000, seed: int = 0) -> ModelProto:
    """MobileNetV2, inverted residuals with ReLU6: 3.50 M parameters, 0.30 G MACs."""
    g = Graph("mobilenet_v2", seed=seed)
    x = g.input("batch", 3, image, image, name="image")
    with g.scope("stem"):
        x = g.conv_bn(x, scaled(32, width), 3, stride=2, act="relu6")
    stages = [
        (1, 16, 1, 1),
        (6, 24, 2, 2),
        (6, 32, 3, 2),
        (6, 64, 4, 2),
        (6, 96, 3, 1),
        (6, 160, 3, 2),
        (6, 320, 1, 1),
    ]
    for stage, (expand, channels, depth, first_stride) in enumerate(stages):
        cout = scaled(channels, width)
        for block in range(depth):
            with g.scope(f"stage{stage + 1}.{block}"):
                mid = x.channels * expand
                x = _mbconv(g, x, mid, cout, 3, first_stride if not block else 1, "relu6")
    with g.scope("last"):
        x = g.conv_bn(x, scaled(1280, width), 1, act="relu6")
    return g.model(_classifier(g, x, classes), names=["logits"])


def _mbconv(
    g: Graph,
    x: Tensor,
    mid: int,
    cout: int,
    k: int,
    stride: int,
    act: str,
    *,
    squeeze: int = 0,
    gates: tuple[str, str] = ("relu", "hardsigmoid"),
    eps: float = 1e-5,
) -> Tensor:
    """Expand, depthwise, optional squeeze-and-excitation, project, optional skip."""
    y = g.conv_bn(x, mid, 1, act=act, eps=eps) if mid != x.channels else x
    y = g.conv_bn(y, mid, k, stride=stride, group=mid, act=act, eps=eps)
    if squeeze:
        s = g.act(g.conv(g.gap(y), squeeze, 1), gates[0])
        y = g.mul(y, g.act(g.conv(s, mid, 1), gates[1]))
    skip = stride == 1 and x.channels == cout
    y = g.conv_bn(y, cout, 1, act=None, eps=eps, gain=0.5 if skip else 1.0)
    return g.add(x, y) if skip else y


def mobilenet_v3_large(
    *, width: float = 1.0, image: int = 224, classes: int = 1000, seed: int = 0
) -> ModelProto:
    """MobileNetV3-Large, squeeze-and-excitation and HardSwish: 5.48 M parameters, 0.22 G MACs."""
    g = Graph("mobilenet_v3_large", seed=seed)
    x = g.input("batch", 3, image, image, name="image")
    with g.scope("stem"):
        x = g.conv_bn(x, scaled(16, width), 3, stride=2, act="hardswish", eps=1e-3)
    blocks = [
        (3, 16, 16, False, "relu", 1),
        (3, 64, 24, False, "relu", 2),
        (3, 72, 24, False, "relu", 1),
        (5, 72, 40, True, "relu", 2),
        (5, 120, 40, True, "relu", 1),
        (5, 120, 40, True, "relu", 1),
        (3, 240, 80, False, "hardswish", 2),
        (3, 200, 80, False, "hardswish", 1),
        (3, 184, 80, False, "hardswish", 1),
        (3, 184, 80, False, "hardswish", 1),
        (3, 480, 112, True, "hardswish", 1),
        (3, 672, 112, True, "hardswish", 1),
        (5, 672, 160, True, "hardswish", 2),
        (5, 960, 160, True, "hardswish", 1),
        (5, 960, 160, True, "hardswish", 1),
    ]
    for block, (k, expand, channels, gated, act, stride) in enumerate(blocks):
        mid = scaled(expand, width)
        squeeze = _multiple_of_8(mid / 4) if gated else 0
        with g.scope(f"block{block + 1}"):
            cout = scaled(channels, width)
            x = _mbconv(g, x, mid, cout, k, stride, act, squeeze=squeeze, eps=1e-3)
    with g.scope("last"):
        x = g.conv_bn(x, scaled(960, width), 1, act="hardswish", eps=1e-3)
    with g.scope("head"):
        x = g.flatten(g.gap(x))
        x = g.act(g.gemm(x, scaled(1280, width)), "hardswish")
        x = g.gemm(x, classes)
    return g.model(x, names=["logits"])


def _multiple_of_8(value: float) -> int:
    """The nearest multiple of 8 that is not below nine tenths of `value`."""
    near = max(8, int(value + 4) // 8 * 8)
    return near if near >= 0.9 * value else near + 8


def efficientnet_b0(
    *, width: float = 1.0, image: int = 224, classes: int = 1000, seed: int = 0
) -> ModelProto:
    """EfficientNet-B0, Swish as Sigmoid and Mul: 5.29 M parameters, 0.39 G MACs."""
    g = Graph("efficientnet_b0", seed=seed)
    x = g.input("batch", 3, image, image, name="image")
    with g.scope("stem"):
        x = g.conv_bn(x, scaled(32, width), 3, stride=2, act="silu")
    stages = [
        (1, 3, 1, 16, 1),
        (6, 3, 2, 24, 2),
        (6, 5, 2, 40, 2),
        (6, 3, 2, 80, 3),
        (6, 5, 1, 112, 3),
        (6, 5, 2, 192, 4),
        (6, 3, 1, 320, 1),
    ]
    for stage, (expand, k, first_stride, channels, depth) in enumerate(stages):
        cout = scaled(channels, width)
        for block in range(depth):
            stride = first_stride if not block else 1
            squeeze = max(1, x.channels // 4)
            with g.scope(f"stage{stage + 1}.{block}"):
                mid = x.channels * expand
                gates = ("silu", "sigmoid")
                x = _mbconv(g, x, mid, cout, k, stride, "silu", squeeze=squeeze, gates=gates)
    with g.scope("last"):
        x = g.conv_bn(x, scaled(1280, width), 1, act="silu")
    return g.model(_classifier(g, x, classes), names=["logits"])


def shufflenet_v2(*, width: float = 1.0, image: int = 224, classes: int = 1000, seed: int = 0) -> ModelProto:
    """ShuffleNetV2 x1.0, Split and channel shuffle: 2.28 M parameters, 0.15 G MACs."""
    g = Graph("shufflenet_v2", seed=seed)
    x = g.input("batch", 3, image, image, name="image")
    with g.scope("stem"):
        x = g.conv_bn(x, scaled(24, width), 3, stride=2)
        x = g.max_pool(x, 3, stride=2, pad=1)
    for stage, (channels, depth) in enumerate([(116, 4), (232, 8), (464, 4)]):
        half = scaled(channels, width) // 2
        for block in range(depth):
            with g.scope(f"stage{stage + 2}.{block}"):
                if block:
                    left, right = g.split(x, 2)
                else:
                    left, right = x, x
                    left = g.conv_bn(left, left.channels, 3, stride=2, group=left.channels, act=None)
                    left = g.conv_bn(left, half, 1)
                right = g.conv_bn(right, half, 1)
                right = g.conv_bn(right, half, 3, stride=1 if block else 2, group=half, act=None)
                right = g.conv_bn(right, half, 1)
                x = g.channel_shuffle(g.concat(left, right), 2)
    with g.scope("last"):
        x = g.conv_bn(x, scaled(1024, width), 1)
    with g.scope("head"):
        x = g.gemm(g.reduce("ReduceMean", x, 2, 3, keepdims=False), classes)
    return g.model(x, names=["logits"])


# Plain, dense and inception networks


def vgg16_bn(*, width: float = 1.0, image: int = 224, classes: int = 1000, seed: int = 0) -> ModelProto:
    """VGG-16 with batch normalisation and Flatten before Gemm: 138.37 M parameters, 15.5 G MACs.

    `image` is a multiple of 32; the flattened map is image / 32 on a side.
    """
    g = Graph("vgg16_bn", seed=seed)
    x = g.input("batch", 3, image, image, name="image")
    for stage, (channels, depth) in enumerate([(64, 2), (128, 2), (256, 3), (512, 3), (512, 3)]):
        with g.scope(f"stage{stage + 1}"):
            for _ in range(depth):
                x = g.relu(g.bn(g.conv(x, scaled(channels, width), 3)))
            x = g.max_pool(x, 2)
    with g.scope("head"):
        x = g.flatten(x)
        for _ in range(2):
            x = g.relu(g.gemm(x, scaled(4096, width)))
        x = g.gemm(x, classes)
    return g.model(x, names=["logits"])


def densenet121(*, width: float = 1.0, image: int = 224, classes: int = 1000, seed: int = 0) -> ModelProto:
    """DenseNet-121, batch normalisation before convolution: 7.98 M parameters, 2.83 G MACs."""
    g = Graph("densenet121", seed=seed)
    growth = scaled(32, width)
    x = g.input("batch", 3, image, image, name="image")
    with g.scope("stem"):
        x = g.conv_bn(x, 2 * growth, 7, stride=2)
        x = g.max_pool(x, 3, stride=2, pad=1)
    depths = (6, 12, 24, 16)
    for stage, depth in enumerate(depths):
        for layer in range(depth):
            with g.scope(f"block{stage + 1}.{layer}"):
                y = g.conv_bn(g.relu(g.bn(x)), 4 * growth, 1)
                x = g.concat(x, g.conv(y, growth, 3, bias=False))
        if stage < len(depths) - 1:
            with g.scope(f"transition{stage + 1}"):
                x = g.conv(g.relu(g.bn(x)), x.channels // 2, 1, bias=False)
                x = g.avg_pool(x, 2)
    with g.scope("last"):
        x = g.relu(g.bn(x))
    return g.model(_classifier(g, x, classes), names=["logits"])


def googlenet(*, width: float = 1.0, image: int = 224, classes: int = 1000, seed: int = 0) -> ModelProto:
    """GoogLeNet with batch normalisation, four-way inception: 6.62 M parameters, 1.5 G MACs.

    As in common implementations the third branch has a 3x3 kernel, not 5x5.
    """
    g = Graph("googlenet", seed=seed)
    x = g.input("batch", 3, image, image, name="image")
    with g.scope("stem"):
        x = g.conv_bn(x, scaled(64, width), 7, stride=2, eps=1e-3)
        x = g.max_pool(x, 3, stride=2, ceil=True)
        x = g.conv_bn(x, scaled(64, width), 1, eps=1e-3)
        x = g.conv_bn(x, scaled(192, width), 3, eps=1e-3)
        x = g.max_pool(x, 3, stride=2, ceil=True)
    modules: list[tuple[str, tuple[int, ...]]] = [
        ("3a", (64, 96, 128, 16, 32, 32)),
        ("3b", (128, 128, 192, 32, 96, 64)),
        ("pool", (3,)),
        ("4a", (192, 96, 208, 16, 48, 64)),
        ("4b", (160, 112, 224, 24, 64, 64)),
        ("4c", (128, 128, 256, 24, 64, 64)),
        ("4d", (112, 144, 288, 32, 64, 64)),
        ("4e", (256, 160, 320, 32, 128, 128)),
        ("pool", (2,)),
        ("5a", (256, 160, 320, 32, 128, 128)),
        ("5b", (384, 192, 384, 48, 128, 128)),
    ]
    for name, sizes in modules:
        if name == "pool":
            x = g.max_pool(x, sizes[0], stride=2, ceil=True)
            continue
        one, reduce3, three, reduce5, five, pool = (scaled(size, width) for size in sizes)
        with g.scope(f"inception{name}"):
            branches = [
                g.conv_bn(x, one, 1, eps=1e-3),
                g.conv_bn(g.conv_bn(x, reduce3, 1, eps=1e-3), three, 3, eps=1e-3),
                g.conv_bn(g.conv_bn(x, reduce5, 1, eps=1e-3), five, 3, eps=1e-3),
                g.conv_bn(g.max_pool(x, 3, stride=1, pad=1), pool, 1, eps=1e-3),
            ]
            x = g.concat(*branches)
    return g.model(_classifier(g, x, classes), names=["logits"])


# Dense prediction


def unet(*, width: float = 1.0, image: int = 256, classes: int = 2, seed: int = 0) -> ModelProto:
    """U-Net, 64 to 1,024 channels, ConvTranspose and skip Concat: 31.04 M parameters.

    `image` is a multiple of 16; the output is a map of logits of the same size.
    """
    g = Graph("unet", seed=seed)
    x = g.input("batch", 3, image, image, name="image")
    widths = [scaled(64 * 2**level, width) for level in range(5)]
    skips: list[Tensor] = []
    for level, channels in enumerate(widths):
        with g.scope(f"down{level}"):
            if level:
                skips.append(x)
                x = g.max_pool(x, 2)
            x = g.conv_bn(g.conv_bn(x, channels, 3), channels, 3)
    for channels, skip in zip(reversed(widths[:-1]), reversed(skips), strict=True):
        with g.scope(f"up{widths.index(channels)}"):
            x = g.concat(skip, g.conv_transpose(x, channels))
            x = g.conv_bn(g.conv_bn(x, channels, 3), channels, 3)
    with g.scope("head"):
        x = g.conv(x, classes, 1)
    return g.model(x, names=["mask"])


def yolov8n(*, width: float = 1.0, image: int = 640, classes: int = 80, seed: int = 0) -> ModelProto:
    """YOLOv8n with its decoded detection head: 3.16 M parameters, 4.4 G MACs.

    `image` is a multiple of 32. The output is (batch, 4 + classes, anchors): box centre and size
    in pixels, then class scores. The weight 0..15 of the last convolution of the box branch
    turns a distribution into a distance and is not trained.
    """
    g = Graph("yolov8n", seed=seed)
    w16, w32, w64, w128, w256 = (scaled(channels, width) for channels in (16, 32, 64, 128, 256))
    x = g.input("batch", 3, image, image, name="image")
    with g.scope("backbone"):
        x = _yolo_conv(g, _yolo_conv(g, x, w16, 3, 2), w32, 3, 2)
        x = _c2f(g, x, w32, 1, shortcut=True)
        p3 = _c2f(g, _yolo_conv(g, x, w64, 3, 2), w64, 2, shortcut=True)
        p4 = _c2f(g, _yolo_conv(g, p3, w128, 3, 2), w128, 2, shortcut=True)
        p5 = _c2f(g, _yolo_conv(g, p4, w256, 3, 2), w256, 1, shortcut=True)
        p5 = _sppf(g, p5, w256)
    with g.scope("neck"):
        n4 = _c2f(g, g.concat(g.upsample(p5), p4), w128, 1)
        n3 = _c2f(g, g.concat(g.upsample(n4), p3), w64, 1)
        m4 = _c2f(g, g.concat(_yolo_conv(g, n3, w64, 3, 2), n4), w128, 1)
        m5 = _c2f(g, g.concat(_yolo_conv(g, m4, w128, 3, 2), p5), w256, 1)
    with g.scope("detect"):
        boxes = _detect(g, [n3, m4, m5], scaled(64, width), max(w64, min(classes, 100)), classes)
    return g.model(boxes, names=["detections"])


def _yolo_conv(g: Graph, x: Tensor, cout: int, k: int = 1, stride: int = 1) -> Tensor:
    return g.conv_bn(x, cout, k, stride=stride, act="silu", eps=1e-3)


def _c2f(g: Graph, x: Tensor, cout: int, depth: int, *, shortcut: bool = False) -> Tensor:
    """Split, a chain of bottlenecks, and a concat of every intermediate result."""
    parts = g.split(_yolo_conv(g, x, cout), 2)
    for _ in range(depth):
        last = parts[-1]
        y = _yolo_conv(g, _yolo_conv(g, last, last.channels, 3), last.channels, 3)
        parts.append(g.add(last, y) if shortcut else y)
    return _yolo_conv(g, g.concat(*parts), cout)


def _sppf(g: Graph, x: Tensor, cout: int) -> Tensor:
    """Three chained poolings side by side."""
    levels = [_yolo_conv(g, x, x.channels // 2)]
    for _ in range(3):
        levels.append(g.max_pool(levels[-1], 5, stride=1, pad=2))
    return _yolo_conv(g, g.concat(*levels), cout)


def _detect(g: Graph, levels: Sequence[Tensor], box_width: int, class_width: int, classes: int) -> Tensor:
    """Decoupled heads per level, then boxes decoded from distributions over 16 bins."""
    bins = 16
    outputs = []
    for level in levels:
        box = _yolo_conv(g, _yolo_conv(g, level, box_width, 3), box_width, 3)
        score = _yolo_conv(g, _yolo_conv(g, level, class_width, 3), class_width, 3)
        both = g.concat(g.conv(box, 4 * bins, 1), g.conv(score, classes, 1))
        outputs.append(g.reshape(both, 0, both.channels, both.extent(2) * both.extent(3)))
    boxes, scores = g.split(g.concat(*outputs, axis=2), [4 * bins, classes])
    anchors, strides = _anchors([level.extent(2) for level in levels])

    count = boxes.extent(2)
    distribution = g.transpose(g.reshape(boxes, 0, 4, bins, count), 0, 2, 1, 3)
    distribution = g.op("Softmax", distribution, axis=1)
    ramp = np.arange(bins, dtype=np.float32).reshape(1, bins, 1, 1)
    expected = g.conv(distribution, bias=False, weight=g.store(g.fresh("dfl.weight"), ramp))
    near, far = g.split(g.reshape(expected, 0, 4, count), 2)
    centre = g.const(anchors, np.float32)
    low, high = g.op("Sub", centre, near), g.add(centre, far)
    middle = g.op("Div", g.add(low, high), g.const(2.0, np.float32))
    box = g.mul(g.concat(middle, g.op("Sub", high, low)), g.const(strides, np.float32))
    return g.concat(box, g.op("Sigmoid", scores))


def _anchors(sides: Sequence[int]) -> tuple[Array, Array]:
    """Cell centres (1, 2, anchors) in cells, and pixels per cell (1, anchors), for 8, 16, 32."""
    centres, strides = [], []
    for level, side in enumerate(sides):
        rows, columns = np.meshgrid(np.arange(side) + 0.5, np.arange(side) + 0.5, indexing="ij")
        centres.append(np.stack([columns.ravel(), rows.ravel()]))
        strides.append(np.full(side * side, 8.0 * 2**level))
    return np.concatenate(centres, axis=1)[None], np.concatenate(strides)[None]


ARCHITECTURES: dict[str, Callable[..., ModelProto]] = {
    "resnet18": resnet18,
    "resnet50": resnet50,
    "resnext50_32x4d": resnext50_32x4d,
    "mobilenet_v2": mobilenet_v2,
    "mobilenet_v3_large": mobilenet_v3_large,
    "efficientnet_b0": efficientnet_b0,
    "densenet121": densenet121,
    "vgg16_bn": vgg16_bn,
    "shufflenet_v2": shufflenet_v2,
    "googlenet": googlenet,
    "yolov8n": yolov8n,
    "unet": unet,
}
"""Every network by name; each takes `width`, `image`, `classes` and `seed`."""


def main() -> int:
    """Print parameters and MACs of every network; 1 if one differs from the published count."""
    wrong = 0
    for name, build in ARCHITECTURES.items():
        model = build()
        count = parameters(model)
        wrong += count != PUBLISHED[name]
        verdict = "" if count == PUBLISHED[name] else f"  should be {PUBLISHED[name]:,}"
        print(f"{name:20} {count:>12,} parameters {macs(model) / 1e9:8.3f} G MACs{verdict}")
    return 1 if wrong else 0


if __name__ == "__main__":
    raise SystemExit(main())
