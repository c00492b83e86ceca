"""Prunes a model with onnxsim; run by `benchmarks.peers` in an environment that has onnxsim.

    python onnxsim_prune.py MODEL.onnx OUTPUT.onnx RATIO

As its documentation asks, the model is simplified first (BatchNormalization folded), and weights in
Constant nodes, which it does not look at, are made initializers.
"""

import sys

import onnx
import onnxsim  # type: ignore[import-not-found, unused-ignore]


def main(source: str, target: str, ratio: float) -> None:
    model = onnx.load(source)
    _promote(model.graph)
    model, _ = onnxsim.simplify(model)
    _promote(model.graph)
    onnx.save(onnxsim.apply_structured_pruning(model, ratio), target)


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
    main(sys.argv[1], sys.argv[2], float(sys.argv[3]))
