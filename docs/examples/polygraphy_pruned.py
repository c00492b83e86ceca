"""A model that is pruned while Polygraphy loads it, and the data that it is pruned for.

    python polygraphy_pruned.py                     # the original and the pruned model in onnxruntime, compared
    polygraphy convert polygraphy_pruned.py -o small.engine     # TensorRT reads the pruned model: load_network
    polygraphy run any.onnx --onnxrt --data-loader-script polygraphy_pruned.py  # on the data: load_data

Copy this file and change what stands in capitals, or set environment variables.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import onnx
from polygraphy.backend.onnx import BytesFromOnnx
from polygraphy.backend.onnxrt import OnnxrtRunner, SessionFromOnnx
from polygraphy.backend.trt import NetworkFromOnnxBytes
from polygraphy.comparator import Comparator, CosineSimilarityCompareFunc

import onnxprune

MODEL = os.environ.get("MODEL", "model.onnx")
DATA = os.environ.get("DATA")  # what --data takes; without it inputs are made up
MACS = float(os.environ.get("MACS", "0.5"))  # share to keep
ALIKE = float(os.environ.get("ALIKE", "0.9"))  # least cosine of the outputs of both


def load_onnx() -> onnx.ModelProto:
    """The pruned model: the same bytes for the same settings and data."""
    return onnxprune.shrink(MODEL, macs=MACS, data=DATA).model


def load_network() -> Any:
    """Builder, network and parser of TensorRT: what Polygraphy asks of a script in place of a model."""
    return NetworkFromOnnxBytes(BytesFromOnnx(load_onnx))()


def load_data() -> Iterator[Mapping[str, np.ndarray[Any, Any]]]:
    """The inputs that the model is pruned for: what Polygraphy asks of a data loader script."""
    return onnxprune.calibration_data(MODEL, DATA)


def main() -> int:
    """0 where the outputs of both models are alike on every input."""
    both = [
        OnnxrtRunner(SessionFromOnnx(MODEL), name="original"),
        OnnxrtRunner(SessionFromOnnx(BytesFromOnnx(load_onnx)), name="pruned"),
    ]
    runs = Comparator.run(both, data_loader=list(load_data()))
    alike = CosineSimilarityCompareFunc(cosine_similarity_threshold=ALIKE)
    return 0 if Comparator.compare_accuracy(runs, compare_func=[alike]) else 1


if __name__ == "__main__":
    sys.exit(main())
