"""Prunes a model with onnxsim; run by other benchmarks in an environment that has onnxsim.

    python -m benchmarks.onnxsim_prune MODEL.onnx OUTPUT.onnx RATIO
    python -m benchmarks.onnxsim_prune MODEL.onnx l2|wanda CALIBRATION.npz together|apart FOLDER

The second form answers ratios on its standard input (`benchmarks/serving.py`). As its documentation asks, the model
is simplified first (BatchNormalization folded), and weights in Constant nodes, which it does not look at, are made
initializers. Channels are pruned, then whole heads where it finds attention.
"""

import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxsim  # type: ignore[import-not-found, unused-ignore]

from benchmarks.serving import serve

BATCH = 16


def main(source: str, target: str, ratio: float) -> None:
    onnx.save(onnxsim.apply_structured_pruning(_simplified(source), ratio), target)


def answer(source: str, criterion: str, calibration: str, layout: str, folder: str) -> None:
    simplified = _simplified(source)
    feeds = _feeds(calibration, layout)

    def prune(ratio: float, path: Path) -> None:
        model = onnx.ModelProto()
        model.CopyFrom(simplified)
        if criterion == "wanda":
            pruned = onnxsim.apply_structured_wanda_pruning(model, feeds, sparsity=ratio)
            pruned = onnxsim.apply_attention_head_wanda_pruning(pruned, feeds, sparsity=ratio)
        else:
            pruned = onnxsim.apply_structured_pruning(model, ratio)
            pruned = onnxsim.apply_attention_head_pruning(pruned, ratio)
        onnx.save(pruned, path)

    serve(prune, Path(folder))


def _feeds(path: str, layout: str) -> list[dict[str, Any]]:
    """Batches of 16, or one sample at a time where samples stand apart."""
    with np.load(path) as stored:
        arrays = dict(stored)
    count = min(len(array) for array in arrays.values())
    if layout == "apart":
        return [{name: array[i] for name, array in arrays.items()} for i in range(count)]
    return [{name: a[i : i + BATCH] for name, a in arrays.items()} for i in range(0, count, BATCH)]


def _simplified(source: str) -> onnx.ModelProto:
    model = onnx.load(source)
    _promote(model.graph)
    model = onnx.ModelProto.FromString(onnxsim.simplify(model)[0].SerializeToString())
    _promote(model.graph)
    return model


def _promote(graph: onnx.GraphProto) -> None:
    kept = []
    for node in graph.node:
        value = node.attribute[0] if node.op_type == "Constant" else None
        if value is None or value.name != "value":
            kept.append(node)
            continue
        value.t.name = node.output[0]
        graph.initializer.append(value.t)
    kept = [onnx.NodeProto.FromString(node.SerializeToString()) for node in kept]
    del graph.node[:]
    graph.node.extend(kept)


if __name__ == "__main__":
    if len(sys.argv) == 4:
        main(sys.argv[1], sys.argv[2], float(sys.argv[3]))
    else:
        answer(*sys.argv[1:])
