"""How the time of analysis, plan and surgery grows with the number of nodes.

    python -m benchmarks.growth [--update]

Graphs of several families at some 200, 2,000 and 20,000 nodes, with few channels, so that the graph and
not the weights is what takes the time. Each family runs in a process of its own, in rounds: in each
round every size in turn, the small ones several times, so that other work on the machine falls on all
alike; the ratios are taken within a round, and medians over the rounds. Processor time. What the
libraries allocated on import is set aside from the garbage collector first: walking it costs a constant
that has nothing to do with the graph.
"""

from __future__ import annotations

import gc
import sys
import time
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import onnx

from benchmarks.analysis import transformer
from benchmarks.common import Benchmark, Figure, Results, isolated, median, run, stamp, table
from models.builder import Graph, Tensor
from onnxprune import passes, surgery
from onnxprune.blocks import Blocks
from onnxprune.dependency import DependencyGraph
from onnxprune.model import Model
from onnxprune.passes import Options

SIZES = (200, 2_000, 20_000)
REPEATS = (20, 5, 1)  # of each size in a round
ROUNDS = 5
LIMIT = 12.0  # times the time for ten times the nodes


def _chain(g: Graph, x: Tensor) -> Tensor:
    """Convolution, normalisation, ReLU."""
    return g.conv_bn(x, 8, 3)


def _residual(g: Graph, x: Tensor) -> Tensor:
    """Two convolutions beside a skip: one Add after another couples the whole tower."""
    return g.relu(g.add(x, g.conv_bn(g.conv_bn(x, 8, 3), 8, 3, act=None)))


def _dense(g: Graph, x: Tensor) -> Tensor:
    """A DenseNet block of 16 layers and a transition."""
    for _ in range(16):
        y = g.conv_bn(g.relu(g.bn(x)), 16, 1)
        x = g.concat(x, g.conv(y, 4, 3, bias=False))
    return g.conv(g.relu(g.bn(x)), 8, 1, bias=False)


def _shuffle(g: Graph, x: Tensor) -> Tensor:
    """A ShuffleNetV2 unit: Split, depthwise branch, Concat, channel shuffle."""
    left, right = g.split(x, 2)
    right = g.conv_bn(g.conv_bn(right, 4, 1), 4, 3, group=4, act=None)
    return g.channel_shuffle(g.concat(left, g.conv_bn(right, 4, 1)), 2)


def _csp(g: Graph, x: Tensor) -> Tensor:
    """A C2f block: Split, a bottleneck with a skip, Concat of all parts."""
    parts = g.split(g.conv_bn(x, 8, 1), 2)
    parts.append(g.add(parts[-1], g.conv_bn(parts[-1], 4, 3)))
    return g.conv_bn(g.concat(*parts), 8, 1)


FAMILIES: dict[str, Callable[[Graph, Tensor], Tensor]] = {
    "chain": _chain,
    "residual tower": _residual,
    "DenseNet blocks": _dense,
    "ShuffleNet units": _shuffle,
    "C2f blocks": _csp,
}
DECODER = (
    "decoder with computed shapes"  # as TorchScript exports it: Shape, Gather, Unsqueeze, Concat, Reshape
)


def measure() -> Results:
    """Seconds per family, size and step."""
    rows = {}
    for family in (*FAMILIES, DECODER):
        print(f"{family} ...", file=sys.stderr, flush=True)
        rows[family] = isolated(_family, family)
    return {"rows": rows}


def _family(family: str) -> list[dict[str, Any]]:
    protos = [_build(family, size) for size in SIZES]
    gc.collect()
    gc.freeze()
    rounds = [[_mean(proto, n) for proto, n in zip(protos, REPEATS, strict=True)] for _ in range(ROUNDS)]
    return [
        {"nodes": len(proto.graph.node), "rounds": [found[i] for found in rounds]}
        for i, proto in enumerate(protos)
    ]


def _mean(proto: onnx.ModelProto, repeats: int) -> list[float]:
    timed = [_timed(proto) for _ in range(repeats)]
    return [sum(step) / repeats for step in zip(*timed, strict=True)]


def _build(family: str, size: int) -> onnx.ModelProto:
    if family == DECODER:
        return transformer("llama", size)
    g = Graph(family)
    x = g.conv_bn(g.input("batch", 3, 8, 8), 8, 3)
    while len(g.nodes) < size:
        x = FAMILIES[family](g, x)
    return g.model(g.gemm(g.flatten(g.gap(x)), 10))


def _timed(proto: onnx.ModelProto) -> list[float]:
    """Seconds of each step."""
    model = Model(proto)
    gc.collect()
    laps = [time.process_time()]
    graph = DependencyGraph(model)
    laps.append(time.process_time())
    plan = passes.plan(Blocks(graph), Options(0.3, align=1), model.digest())
    laps.append(time.process_time())
    surgery.apply(graph, plan)
    laps.append(time.process_time())
    return [after - before for before, after in pairwise(laps)]


def _seconds(row: dict[str, Any]) -> float:
    return median([sum(steps) for steps in row["rounds"]])


def _growths(rows: list[dict[str, Any]]) -> list[float]:
    """For each tenfold size: how many times the time, brought to exactly ten times the nodes."""
    return [
        median([sum(after) / sum(before) for before, after in zip(a["rounds"], b["rounds"], strict=True)])
        * (10 * a["nodes"] / b["nodes"])
        for a, b in pairwise(rows)
    ]


def render(results: Results) -> str:
    """Seconds at each size, and the ratios."""
    growths = [f"{a:,} to {b:,}" for a, b in pairwise(SIZES)]
    seconds = [f"{size:,} nodes, s" for size in SIZES]
    header = ("family", *seconds, *growths, "of the last: analysis / plan / surgery")
    rows = []
    for family, found in results["rows"].items():
        last = " / ".join(f"{median(list(step)):.2f}" for step in zip(*found[-1]["rounds"], strict=True))
        growths = [f"x {growth:.1f}" for growth in _growths(found)]
        rows.append((family, *(f"{_seconds(row):.3f}" for row in found), *growths, last))
    return f"{stamp(results)}\n\n{table(header, rows)}"


def figures(results: Results) -> list[Figure]:
    """Ten times the nodes may take at most twelve times as long."""
    return [
        Figure(f"{family}: times the time for 10 times the nodes", max(_growths(rows)), LIMIT)
        for family, rows in results["rows"].items()
    ]


BENCHMARK = Benchmark("growth", measure, render, figures)

if __name__ == "__main__":
    raise SystemExit(run(BENCHMARK))
