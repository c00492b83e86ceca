"""How much faster pruned models are on the CPU, and whether a share of the time is met.

    python -m benchmarks.latency [--update]

Target cpu, one thread, original and result in turns in one process (docs/measuring.md); ratios mean more than any
number of milliseconds. Counts are chosen by magnitude and the same share everywhere, without repair, which changes no
shape. *Speed-up* is set against MACs before over MACs after. The ladder cuts every network by many shares.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx

import onnxprune
from benchmarks.common import Benchmark, Figure, Results, isolated, run, stamp, table
from benchmarks.subjects import subject
from benchmarks.tasks import TASKS
from onnxprune import comparison, latency, timing
from onnxprune.dependency import DependencyGraph
from onnxprune.errors import OnnxPruneError
from onnxprune.model import Model
from onnxprune.targets import target

SHARE = 0.6  # of the time
LADDER = (0.05, 0.1, 0.2, 0.3, 0.5, 0.7, 0.9)
SUBJECTS: dict[str, Callable[[Path], Path]] = {
    **{
        name: lambda folder, name=name: subject(name, folder)  # type: ignore[misc]
        for name in ("mobilenet_v2", "efficientnet-lite0", "resnet50", "yolov8n", "ppocr-det", "ppocr-rec")
    },
    "minilm": lambda _: TASKS["minilm"].model(),
    "fashion-vit": lambda _: TASKS["fashion-vit"].model(),
}
PLAIN: dict[str, Any] = {
    "criterion": "l2", "allocation": "uniform", "repair": "none", "targets": ("cpu",), "allow_slower": True,
}  # fmt: skip


def measure() -> Results:
    """Every network in a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        return {"rows": {name: isolated(_row, name, Path(folder)) for name in SUBJECTS}}


def _row(name: str, folder: Path) -> dict[str, Any]:
    path = SUBJECTS[name](folder)
    os.environ["ONNXPRUNE_CACHE"] = str(folder / "tables")  # times of today
    return {
        "half": _shrunk(path, macs=0.5),
        "share": _shrunk(path, latency=SHARE),
        "ladder": {f"{ratio}": _shrunk(path, channels=ratio) for ratio in LADDER},
        "predicted": _predicted(path),
    }


def _shrunk(path: Path, **options: Any) -> dict[str, Any]:
    """MACs kept and the time; or why there is no result."""
    try:
        report = onnxprune.shrink(path, **options, **PLAIN).report
    except OnnxPruneError as error:
        return {"failed": f"{error}"}
    (found,) = report.targets
    assert found.timing is not None
    given = found.timing.as_dict()
    return {
        "macs": report.kept["macs"],
        "error": max(found.errors.values()),
        **{key: given[key] for key in ("before", "after", "ratio", "range", "contended")},
    }


def _predicted(path: Path) -> dict[str, float]:
    """The ratio that the times of pieces predict at half the MACs, and the one that is measured."""
    cpu = target("cpu")
    original = onnx.load(path)
    result = onnxprune.shrink(path, macs=0.5, **PLAIN)
    graph = DependencyGraph(Model(original))
    feeds = comparison.inputs(graph)[0]
    times = latency.Table(cpu, 1)
    whole = latency.predict(graph, feeds, times).total
    after = latency.predict(DependencyGraph(Model(result.proto)), feeds, times).total
    measured = timing.compare_models(cpu, (original, result.proto), feeds)
    return {
        "sum": whole / measured.engines[0].milliseconds,
        "predicted": after / whole,
        "measured": measured.ratio,
    }


def render(results: Results) -> str:
    """One row for each network, and the ladder."""
    rows, steps = [], []
    for name, row in results["rows"].items():
        half, share, told = row["half"], row["share"], row["predicted"]
        rows.append(
            (
                name,
                f"{half['macs']:.3f}",
                f"{half['ratio']:.3f} ({half['range'][0]:.2f} to {half['range'][1]:.2f})",
                f"{_yield(half):.2f}",
                _time(share),
                f"{share['macs']:.3f}" if "macs" in share else "",
                f"{told['predicted'] / told['measured'] - 1:+.0%}",
            )
        )
        steps.append((name, *(_time(row["ladder"][f"{ratio}"]) for ratio in LADDER)))
    header = (
        "network", "MACs", "time at `--macs 0.5` (rounds)", "speed-up over MACs", f"time at `--latency {SHARE}`",
        "MACs", "ratio of sums",
    )  # fmt: skip
    return "\n\n".join(
        (
            stamp(results),
            table(header, rows),
            "Times over the original's, at `--channels`:",
            table(("network", *map(str, LADDER)), steps),
        )
    )


def _time(found: dict[str, Any]) -> str:
    return f"{found['ratio']:.3f}" if "ratio" in found else "refused"


def _yield(half: dict[str, Any]) -> float:
    """Speed-up over MACs before / MACs after."""
    return float(half["macs"] / half["ratio"])


def figures(results: Results) -> list[Figure]:
    """What was promised."""
    rows = results["rows"]
    found = []
    for name, row in rows.items():
        found.append(
            Figure(f"{name}: MACs before / after over the speed-up", 1 / _yield(row["half"]), 1 / 0.85)
        )
    times = [step["ratio"] for row in rows.values() for step in row["ladder"].values() if "ratio" in step]
    found.append(Figure("time at any ratio from 0.05 to 0.9 over the original's", max(times), 1.0))
    shares = [row["share"]["ratio"] for row in rows.values() if "ratio" in row["share"]]
    found.append(Figure(f"--latency {SHARE}: largest time", max(shares), 0.62))
    found.append(Figure(f"--latency {SHARE}: how far the smallest is below 0.62", 0.62 - min(shares), 0.07))
    found.append(Figure("networks that --latency refuses", len(rows) - len(shares), 0))
    wrong = [abs(row["predicted"]["predicted"] / row["predicted"]["measured"] - 1) for row in rows.values()]
    found.append(Figure("error of predicted ratios", max(wrong), 0.15))
    return found


BENCHMARK = Benchmark("latency", measure, render, figures)

if __name__ == "__main__":
    raise SystemExit(run(BENCHMARK))
