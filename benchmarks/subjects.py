"""The models that benchmarks run on."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import onnx

from models.architectures import ARCHITECTURES
from models.fetch import LIGHT, fetch

TRAINED = (
    "ppocr-det",
    "ppocr-rec",
    "ppocr-cls",
    "open-nsfw",
    "vgg16-mri",
    "efficientnet-lite0",
    "efficientnet-lite0-folded",
    "efficientnet-lite0-fp16",
    "efficientnet-lite0-qdq",
    "crepe-tiny",
)
RANDOM = (
    "resnet50",
    "mobilenet_v2",
    "mobilenet_v3_large",
    "efficientnet_b0",
    "densenet121",
    "vgg16_bn",
    "shufflenet_v2",
    "resnext50_32x4d",
    "yolov8n",
    "unet",
)
KINDS = {"random weights": RANDOM, "trained": TRAINED, "structure only": LIGHT}


def filled(path: Path, folder: Path) -> Path:
    """A copy of a model of which only the structure is given, with random weights in place of constant ones:
    on constant weights every output is constant, and a comparison says nothing."""
    model = onnx.load(path)
    shapes = {t.name: onnx.numpy_helper.to_array(t) for t in model.graph.initializer}
    generator = np.random.default_rng(0)
    nodes = []
    for node in model.graph.node:
        if node.op_type != "ConstantOfShape" or node.input[0] not in shapes:
            nodes.append(node)
            continue
        shape = [int(size) for size in shapes[node.input[0]]]
        if len(shape) < 2:  # biases, and the vectors of a normalisation: around 1
            values = generator.uniform(0.5, 1.5, shape)
        else:
            values = generator.standard_normal(shape) * math.sqrt(2 / math.prod(shape[1:]))
        tensor = onnx.numpy_helper.from_array(values.astype(np.float32), node.output[0])
        model.graph.initializer.append(tensor)
        model.graph.input.append(onnx.helper.make_tensor_value_info(tensor.name, tensor.data_type, shape))
    kept = onnx.GraphProto(node=nodes)
    del model.graph.node[:]
    model.graph.node.extend(kept.node)
    onnx.save(model, folder / path.name)
    return folder / path.name


def subject(name: str, folder: Path) -> Path:
    """The file of a model: fetched, or built with random weights into `folder`."""
    if name not in ARCHITECTURES:
        return fetch(name)
    path = folder / f"{name}.onnx"
    if not path.exists():
        onnx.save(ARCHITECTURES[name](), path)
    return path
