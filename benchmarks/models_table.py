"""Every model the project names, pruned at 0.3: what is prunable, what is kept, is it right, how long.

    python -m benchmarks.models_table [--update]

Each model runs in a process of its own. What is kept is counted again on the written file.
"""

from __future__ import annotations

import re
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.common import Benchmark, Figure, Results, isolated, run, stamp, table
from benchmarks.subjects import KINDS, filled, subject
from models.fetch import LIGHT
from onnxprune import axes, job, outcome, pipeline
from onnxprune.cost import Cost, CostModel, Counts
from onnxprune.dependency import DependencyGraph, Link
from onnxprune.model import Node
from onnxprune.passes import Options
from onnxprune.surgery import keep_masks

RATIO = 0.3
ALIGNS = (1, 16)
LIMITS = {
    "resnet50": {"macs": 0.50, "params": 0.50},
    "mobilenet_v2": {"macs": 0.52},
    "densenet121": {"macs": 0.52},
    "vgg16_bn": {"macs": 0.52},
    "yolov8n": {"macs": 0.60},
    "ppocr-det": {"macs": 0.60},
    "ppocr-rec": {"macs_rest": 0.60},
    "ppocr-cls": {"macs": 0.60},
}
WORDS = {"macs": "MACs kept", "params": "parameters kept", "macs_rest": "MACs kept outside attention"}
TOLERANCE = 1e-4


def measure() -> Results:
    """A row per model; a model that fails leaves its reason."""
    rows = {}
    for names in KINDS.values():
        for name in names:
            print(f"{name} ...", file=sys.stderr, flush=True)
            rows[name] = isolated(_row, name)
    return {"rows": rows}


def _row(name: str) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        path = subject(name, Path(folder))
        row: dict[str, Any] = {}
        for align in ALIGNS:
            try:
                row[str(align)] = _pruned(path, align, Path(folder) / "pruned.onnx")
            except Exception as error:  # a crash is a row of the table too
                why = re.sub(r"\S*/", "", str(error).partition("\n")[0])  # without folders
                row[str(align)] = {"failed": type(error).__name__, "why": why}
        if name in LIGHT:
            row["filled"] = _pruned(filled(path, Path(folder)), 1, Path(folder) / "pruned.onnx")
        graph = DependencyGraph(job.open_model(path))
        row["groups"] = len(graph.groups)
        row["nodes"] = len(graph.model.nodes)
        row["prunable"] = CostModel(graph).prunable_share()
        row["pinned"] = outcome.pinned_reasons(graph)
    return row


def _pruned(path: Path, align: int, target: Path) -> dict[str, Any]:
    start = time.perf_counter()
    result = pipeline.prune(path, Options(RATIO, align=align))
    result.save(target)
    seconds = time.perf_counter() - start
    report = result.report
    assert report.equivalence is not None
    graph = DependencyGraph(job.open_model(path))
    counts = {var: int(mask.sum()) for var, mask in keep_masks(graph, result.plan).items()}
    return {
        "kept": report.kept,
        "attention": _attention_share(graph),
        "macs_rest": _rest(graph, counts),
        "recounted": _same(report.after, CostModel(DependencyGraph(job.open_model(target)))()),
        "cut": report.cut,
        "skipped": dict(report.skipped),
        "error": report.equivalence.error,
        "notes": list(report.equivalence.notes),
        "seconds": seconds,
        "stages": dict(report.seconds),
    }


def _same(predicted: Cost, counted: Cost) -> bool:
    return (predicted.macs, predicted.params) == (counted.macs, counted.params)


def _rest(graph: DependencyGraph, counts: Counts) -> float | None:
    """The share of the MACs kept outside attention; None where there is no attention."""
    attention = _attention(graph)
    rest = [link for link in graph.links if link.node.index not in attention]
    kept, whole = (sum(_macs(link, given) for link in rest) for given in (counts, {}))
    return kept / whole if attention else None


def _attention_share(graph: DependencyGraph) -> float:
    """The share of all MACs that attention takes."""
    attention = _attention(graph)
    inside = sum(_macs(link, {}) for link in graph.links if link.node.index in attention)
    return inside / sum(_macs(link, {}) for link in graph.links)


def _macs(link: Link, counts: Counts) -> int:
    extents = [axes.extent(link.labels[name], counts) for name in link.rule.macs if name in link.labels]
    product = 1 if extents else 0
    for extent in extents:
        product *= extent
    return product


def _attention(graph: DependencyGraph) -> set[int]:
    """Indices of the nodes that multiply two activations (queries with keys, scores with values), and of
    the projections that they read from and write to: the nearest contractions on each side."""
    by_node = {link.node.index: link for link in graph.links}
    activations = {value.name for value in graph.model.inputs}
    for node in graph.model.nodes:
        if node.op != "Shape" and activations.intersection(node.inputs):
            activations.update(node.outputs)
    found: set[int] = set()
    for link in graph.links:
        if not _multiplies(link) or not activations.issuperset(link.node.inputs[:2]):
            continue
        found.add(link.node.index)
        for forward in (False, True):
            waiting, seen = [link.node], {link.node.index}
            while waiting:
                for other in _next(graph, waiting.pop(), forward):
                    if other.index in seen or other.index not in by_node:
                        continue
                    seen.add(other.index)
                    if _multiplies(by_node[other.index]):
                        found.add(other.index)
                    else:
                        waiting.append(other)
    return found


def _next(graph: DependencyGraph, node: Node, forward: bool) -> list[Node]:
    if forward:
        return [other for name in node.outputs for other in graph.model.consumers.get(name, ())]
    return [graph.model.producers[name] for name in node.inputs if name in graph.model.producers]


def _multiplies(link: Link) -> bool:
    return any(name in link.labels for name in link.rule.macs)


def render(results: Results) -> str:
    """One table per kind of model."""
    header = (
        "model|nodes|groups|prunable|MACs|parameters|MACs, align 16|parameters, align 16|error|seconds|proof"
    )
    parts = [stamp(results)]
    for kind, names in KINDS.items():
        parts.append(f"\n**{kind.capitalize()}**\n")
        parts.append(table(header.split("|"), [_cells(name, results["rows"][name]) for name in names]))
    rec = results["rows"]["ppocr-rec"]["1"]
    if "macs_rest" in rec:
        parts.append(
            f"\nIn ppocr-rec attention takes {rec['attention']:.3f} of the MACs; "
            f"of the others {rec['macs_rest']:.3f} "
            "are kept (align 1)."
        )
    return "\n".join(parts)


def _judged(row: dict[str, Any]) -> list[dict[str, Any]]:
    """The runs whose comparison counts: on random weights where the model comes without any."""
    runs = [row["filled"]] if "filled" in row else [row[str(align)] for align in ALIGNS]
    return [run for run in runs if "error" in run]


def _cells(name: str, row: dict[str, Any]) -> tuple[str, ...]:
    one, sixteen = row["1"], row["16"]
    head = (name, str(row["nodes"]), str(row["groups"]), f"{row['prunable']['params']:.3f}")
    kept = [
        f"{run['kept'][key]:.3f}" if "kept" in run else run["failed"]
        for run in (one, sixteen)
        for key in ("macs", "params")
    ]
    if "kept" not in one:
        return (*head, *kept, "", "", "")
    error = max(run["error"] for run in _judged(row))
    return (*head, *kept, f"{error:.0e}", f"{one['seconds']:.1f}", f"{one['stages']['prove']:.1f}")


def figures(results: Results) -> list[Figure]:
    """The shares to be kept, the equivalence, and that the predicted cost is the cost of the file."""
    rows = results["rows"]
    runs = [row[str(align)] for row in rows.values() for align in ALIGNS]
    failed = sum("failed" in run for run in runs)
    judged = [run for row in rows.values() for run in _judged(row)]
    worst = max(run["error"] for run in judged)
    constant = sum("constant" in note for run in judged for note in run["notes"])
    different = sum(not run.get("recounted", True) for run in runs)
    found = [
        Figure("runs that end in an error instead of a model", failed, 0),
        Figure("largest equivalence error, share of the output's scale", worst, TOLERANCE),
        Figure("comparisons that say little, since the outputs are constant", constant, 0),
        Figure("files whose count differs from the predicted cost", different, 0),
    ]
    for name, limits in LIMITS.items():
        for key, limit in limits.items():
            run = rows[name]["1"]
            kept = run.get("kept", {}).get(key, run.get(key))
            title = f"{name}: {WORDS[key]} at {RATIO}, align 1"
            found.append(Figure(title, float("inf") if kept is None else kept, limit))
    return found


BENCHMARK = Benchmark("models_table", measure, render, figures)

if __name__ == "__main__":
    raise SystemExit(run(BENCHMARK))
