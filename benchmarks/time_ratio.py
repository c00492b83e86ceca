"""How long pruning takes beside what a user waits for anyway.

    python -m benchmarks.time_ratio [--update]

Analysis, plan and surgery of ResNet-50 against loading it with onnx, saving it, and creating one
onnxruntime session, in turns in one process; the ratio of the two is taken in every round.
"""

from __future__ import annotations

import tempfile
import time
from pathlib import Path
from typing import Any

import onnx
import onnxruntime

from benchmarks.common import Benchmark, Figure, Results, isolated, median, run, stamp, table
from benchmarks.subjects import subject
from onnxprune import passes, surgery
from onnxprune.blocks import Blocks
from onnxprune.dependency import DependencyGraph
from onnxprune.model import load
from onnxprune.passes import Options

ROUNDS = 11
OURS = ("analysis", "plan", "surgery")
THEIRS = ("load", "save", "session")


def measure() -> Results:
    """Seconds of every step in every round."""
    return isolated(_rounds)


def _rounds() -> Results:
    with tempfile.TemporaryDirectory() as folder:
        path = subject("resnet50", Path(folder))
        rounds = [_round(path, Path(folder) / "copy.onnx") for _ in range(ROUNDS + 1)]
    return {"rounds": rounds[1:]}  # the first one warms caches


def _round(path: Path, copy: Path) -> dict[str, float]:
    clock = _Clock()
    model = load(path)
    clock.start()
    graph = DependencyGraph(model)
    clock.lap("analysis")
    plan = passes.plan(Blocks(graph), Options(0.3), model.digest())
    clock.lap("plan")
    surgery.apply(graph, plan)
    clock.lap("surgery")
    del graph, model
    clock.start()
    proto = onnx.load(path)
    clock.lap("load")
    onnx.save(proto, copy)
    clock.lap("save")
    onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    clock.lap("session")
    return clock.seconds


class _Clock:
    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._last = 0.0

    def start(self) -> None:
        self._last = time.perf_counter()

    def lap(self, name: str) -> None:
        now = time.perf_counter()
        self.seconds[name], self._last = now - self._last, now


def _ratios(results: Results) -> list[float]:
    return sorted(sum(r[s] for s in OURS) / sum(r[s] for s in THEIRS) for r in results["rounds"])


def render(results: Results) -> str:
    """Medians and spreads of each step, and the ratio."""
    rounds: list[dict[str, Any]] = results["rounds"]
    rows = []
    for title, steps in (("onnxprune", OURS), ("onnx and onnxruntime", THEIRS)):
        rows += [(f"{title}: {step}", *_spread([r[step] for r in rounds])) for step in steps]
        rows.append((f"**{title}, together**", *_spread([sum(r[s] for s in steps) for r in rounds])))
    ratios = _ratios(results)
    return "\n".join(
        (
            stamp(results),
            "",
            table(("step", "median, ms", "fastest", "slowest"), rows),
            "",
            f"The ratio of {len(ratios)} rounds: median {median(ratios):.2f}, "
            f"from {ratios[0]:.2f} to {ratios[-1]:.2f}.",
        )
    )


def _spread(seconds: list[float]) -> tuple[str, str, str]:
    return tuple(f"{1000 * value:.1f}" for value in (median(seconds), min(seconds), max(seconds)))  # type: ignore[return-value]


def figures(results: Results) -> list[Figure]:
    """The ratio must stay below 1."""
    name = "ResNet-50: analysis, plan and surgery / load, save and one session"
    return [Figure(name, median(_ratios(results)), 1, strict=True)]


BENCHMARK = Benchmark("time_ratio", measure, render, figures)

if __name__ == "__main__":
    raise SystemExit(run(BENCHMARK))
