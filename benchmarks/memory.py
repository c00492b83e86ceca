"""How much memory pruning takes at most, beside the size of the model's file.

    python -m benchmarks.memory [--update]

Peak resident memory (getrusage, interpreter and libraries included) of a fresh process that cuts and
saves without the equivalence check, and of one that runs the whole of `shrink`.
"""

from __future__ import annotations

import resource
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.common import Benchmark, Figure, Results, isolated, run, stamp, table
from benchmarks.subjects import subject
from onnxprune import passes, pipeline, surgery
from onnxprune.blocks import Blocks
from onnxprune.dependency import DependencyGraph
from onnxprune.model import load, save
from onnxprune.passes import Options

NAMES = ("resnet50", "vgg16_bn")
MEGABYTE = 1_000_000
BASE = 400  # MB
OPTIONS = Options(0.3)


def measure() -> Results:
    """Megabytes per model: file, cut, shrink."""
    rows = {}
    with tempfile.TemporaryDirectory() as folder:
        for name in NAMES:
            print(f"{name} ...", file=sys.stderr, flush=True)
            path = isolated(subject, name, Path(folder))
            rows[name] = {
                "file": path.stat().st_size / MEGABYTE,
                "cut": isolated(_cut, path),
                "shrink": isolated(_shrink, path),
            }
            path.unlink()
    return {"rows": rows, "libraries": isolated(_peak)}


def _peak() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / MEGABYTE


def _cut(path: Path) -> float:
    model = load(path)
    graph = DependencyGraph(model)
    plan = passes.plan(Blocks(graph), OPTIONS, model.digest())
    save(surgery.apply(graph, plan), path.with_suffix(".pruned.onnx"))
    return _peak()


def _shrink(path: Path) -> float:
    pipeline.prune(path, OPTIONS).save(path.with_suffix(".pruned.onnx"))
    return _peak()


def _limits(row: dict[str, Any]) -> dict[str, float]:
    return {"cut": 3 * row["file"] + BASE, "shrink": 5 * row["file"] + BASE}


def render(results: Results) -> str:
    """Megabytes beside what they may be."""
    rows = []
    for name, row in results["rows"].items():
        limits = _limits(row)
        cells = [f"{value:,.0f}" for key in ("cut", "shrink") for value in (row[key], limits[key])]
        rows.append((name, f"{row['file']:,.0f}", *cells))
    header = ("model", "file, MB", "plan, cut, save: peak MB", "limit", "whole shrink: peak MB", "limit")
    note = f"The interpreter and its libraries alone take {results['libraries']:,.0f} MB."
    return f"{stamp(results)}\n\n{table(header, rows)}\n\n{note}"


def figures(results: Results) -> list[Figure]:
    """Three times the file + 400 MB to cut, five times + 400 MB with the check."""
    words = {"cut": "plan, surgery and save", "shrink": "whole shrink with the check"}
    return [
        Figure(f"{name}: peak MB of the {word}", row[key], _limits(row)[key], strict=True)
        for name, row in results["rows"].items()
        for key, word in words.items()
    ]


BENCHMARK = Benchmark("memory", measure, render, figures)

if __name__ == "__main__":
    raise SystemExit(run(BENCHMARK))
