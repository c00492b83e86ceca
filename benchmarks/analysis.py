"""How long analysis takes beside loading and onnx's own shape inference, on large graphs.

    python -m benchmarks.analysis [--update]

Some 20,000 nodes each, with tiny widths, in the idioms of exporters: transformers whose every target shape is
put together at run time, recurrent layers whose first states are, and an If around every layer.
DependencyGraph, Blocks, the groups and their roles, beside `onnx.load` and strict shape inference with data
propagation of the same file. Processor time; both in turns, and the ratio is taken in every round.
"""

from __future__ import annotations

import gc
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper

from benchmarks.common import Benchmark, Figure, Results, isolated, median, run, stamp, table
from models.builder import Graph, Tensor
from models.exported import EXPORTED, Sizes
from onnxprune.blocks import Blocks
from onnxprune.dependency import DependencyGraph
from onnxprune.model import load

NODES = 20_000
ROUNDS = 5
LIMIT = 10.0
TINY = {
    "bert": Sizes(16, 4, 24, words=20, positions=16),
    "gpt2": Sizes(16, 4, 24, words=20, positions=16),
    "llama": Sizes(16, 4, 24, groups=2, words=20),
    "t5": Sizes(16, 4, 24, words=20),
    "whisper": Sizes(16, 4, 24, words=20, positions=16),
    "vit": Sizes(16, 4, 24, words=5, positions=16),
}
OURS = ("graph", "blocks", "groups")
THEIRS = ("load", "inference")


def transformer(name: str, nodes: int) -> onnx.ModelProto:
    """As many layers of tiny width as make up the nodes."""
    counts = [_count(EXPORTED[name](_layered(name, layers)).graph) for layers in (1, 2)]
    return EXPORTED[name](_layered(name, 1 + (nodes - counts[0]) // (counts[1] - counts[0])))


def _layered(name: str, layers: int) -> Sizes:
    given = TINY[name]
    return Sizes(given.hidden, given.heads, given.neurons, layers, given.groups, given.words, given.positions)


def _recurrent(nodes: int) -> onnx.ModelProto:
    """LSTM layers over a sequence, each with states of zeros whose shape is put together from the input's."""
    g = Graph("recurrent")
    x = g.input("steps", "batch", 6)
    while len(g.nodes) < nodes:
        size = g.unsqueeze(g.op("Gather", g.op("Shape", x), g.const(1), axis=0), 0)
        target = g.concat(g.const([1]), size, g.const([6]), axis=0)
        zeros = g.op("ConstantOfShape", target, shape=(1, "batch", 6), dtype=TensorProto.FLOAT)
        weights = [g.store(g.fresh("weight"), g.normal(1, 24, 6)) for _ in range(2)]
        bias = g.store(g.fresh("bias"), g.normal(1, 48))
        y = g.ops("LSTM", x, *weights, bias, None, zeros, zeros, outputs=1, hidden_size=6)[0]
        x = g.squeeze(y, 1)
    return g.model(g.matmul(x, 3))


def _choices(nodes: int) -> onnx.ModelProto:
    """Residual layers behind an If: both branches have weights of their own, and read the tensor outside."""
    g = Graph("choices")
    x = g.conv_bn(g.input("batch", 3, 4, 4), 4, 1)
    while _count(g.graph()) < nodes:
        for _ in range(50):
            flag = g.op(
                "Greater", g.reduce("ReduceMax", x, 0, 1, 2, 3, keepdims=False), g.const(0, np.float32)
            )
            x = g.add(x, _if(g, flag, x))
    return g.model(g.gemm(g.flatten(g.gap(x)), 2))


def _if(g: Graph, flag: Tensor, x: Tensor) -> Tensor:
    bodies = {}
    for branch in ("then_branch", "else_branch"):
        body = g.subgraph()
        bodies[branch] = body.graph(body.conv_bn(body.conv_bn(x, 5, 1), 4, 1, act=None))
    result = Tensor(g.fresh("chosen"), x.shape)
    node = helper.make_node("If", [flag.name], [result.name], name=g.fresh("if"))
    node.attribute.extend(helper.make_attribute(branch, body) for branch, body in bodies.items())
    g.nodes.append(node)
    return result


def _count(graph: onnx.GraphProto) -> int:
    bodies = (a.g for node in graph.node for a in node.attribute if a.type == onnx.AttributeProto.GRAPH)
    return len(graph.node) + sum(map(_count, bodies))


SUBJECTS: dict[str, Callable[[int], onnx.ModelProto]] = {
    "BERT": partial(transformer, "bert"),
    "GPT-2": partial(transformer, "gpt2"),
    "LLaMA (grouped, rotary)": partial(transformer, "llama"),
    "T5": partial(transformer, "t5"),
    "Whisper": partial(transformer, "whisper"),
    "ViT": partial(transformer, "vit"),
    "LSTM layers": _recurrent,
    "If around every layer": _choices,
}


def measure() -> Results:
    """Seconds of each step in each round."""
    rows = {}
    for name in SUBJECTS:
        print(f"{name} ...", file=sys.stderr, flush=True)
        rows[name] = isolated(_row, name)
    return {"rows": rows}


def _row(name: str) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        proto = SUBJECTS[name](NODES)
        onnx.save(proto, path)
        nodes = _count(proto.graph)
        del proto
        gc.collect()
        gc.freeze()  # what the libraries made on import is not part of the work
        rounds = [_round(path) for _ in range(ROUNDS + 1)]
    return {"nodes": nodes, "rounds": rounds[1:]}  # the first one warms caches


def _round(path: Path) -> dict[str, float]:
    clock = _Clock()
    proto = onnx.load(path)
    clock.lap("load")
    onnx.shape_inference.infer_shapes(proto, strict_mode=True, data_prop=True)
    clock.lap("inference")
    del proto
    model = load(path)
    gc.collect()
    clock.lap("read")
    graph = DependencyGraph(model)
    clock.lap("graph")
    blocks = Blocks(graph)
    clock.lap("blocks")
    for group in graph.groups:
        blocks.role(group)
    clock.lap("groups")
    return clock.seconds


class _Clock:
    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._last = time.process_time()

    def lap(self, name: str) -> None:
        now = time.process_time()
        self.seconds[name], self._last = now - self._last, now


def _ratios(row: dict[str, Any]) -> list[float]:
    return sorted(sum(r[s] for s in OURS) / sum(r[s] for s in THEIRS) for r in row["rounds"])


def render(results: Results) -> str:
    """Medians of the steps, and the ratio with its spread."""
    header = ("graph", "nodes", *(f"{step}, s" for step in (*THEIRS, "analysis")), "ratio", "from", "to")
    rows = []
    for name, row in results["rows"].items():
        ratios = _ratios(row)
        ours = median([sum(r[step] for step in OURS) for r in row["rounds"]])
        theirs = [median([r[step] for r in row["rounds"]]) for step in THEIRS]
        seconds = [f"{value:.3f}" for value in (*theirs, ours)]
        spread = [f"{value:.1f}" for value in (median(ratios), ratios[0], ratios[-1])]
        rows.append((name, f"{row['nodes']:,}", *seconds, *spread))
    return f"{stamp(results)}\n\n{table(header, rows)}"


def figures(results: Results) -> list[Figure]:
    """Ten times as long as loading and shape inference, at most."""
    return [
        Figure(f"{name}, {NODES:,} nodes: analysis / load and shape inference", median(_ratios(row)), LIMIT)
        for name, row in results["rows"].items()
    ]


BENCHMARK = Benchmark("analysis", measure, render, figures)

if __name__ == "__main__":
    raise SystemExit(run(BENCHMARK))
