"""The models that benchmarks run on."""

from __future__ import annotations

from pathlib import Path

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


def subject(name: str, folder: Path) -> Path:
    """The file of a model: fetched, or built with random weights into `folder`."""
    if name not in ARCHITECTURES:
        return fetch(name)
    path = folder / f"{name}.onnx"
    if not path.exists():
        onnx.save(ARCHITECTURES[name](), path)
    return path
