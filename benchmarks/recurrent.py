"""Trained recurrent networks pruned at 0.3: noise suppression and voice activity.

    python -m benchmarks.recurrent [--update]

Where the state of a layer comes in and goes out of the graph, its width belongs to whoever calls the model: it
is pinned, and the reason is shown instead of a figure.
"""

from __future__ import annotations

import re
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.common import Benchmark, Figure, Results, isolated, run, stamp, table
from models.fetch import fetch
from onnxprune import job, pipeline
from onnxprune.cost import CostModel
from onnxprune.dependency import DependencyGraph
from onnxprune.passes import Options

NAMES = (
    "nsnet2",
    "nsnet2-48k",
    "silero-vad",
    "silero-vad-16k",
    "silero-vad-sequence",
    "silero-vad-ifless",
    "silero-vad-openvino",
)
OPTIONS = Options(0.3)
LIMIT = 0.60
TOLERANCE = 1e-4


def measure() -> Results:
    """A row per network; one that fails leaves its reason."""
    rows = {}
    for name in NAMES:
        print(f"{name} ...", file=sys.stderr, flush=True)
        rows[name] = isolated(_row, name)
    return {"rows": rows}


def _row(name: str) -> dict[str, Any]:
    try:
        result = pipeline.prune(fetch(name), OPTIONS)
    except Exception as error:  # a crash is a row of the table too
        why = re.sub(r"\S*/", "", str(error).partition("\n")[0])  # without folders
        return {"failed": type(error).__name__, "why": why}
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder) / "pruned.onnx"
        result.save(target)
        counted = CostModel(DependencyGraph(job.open_model(target)))()
    report = result.report
    assert report.equivalence is not None
    _signal, *states = (value.name for value in job.open_model(fetch(name)).inputs)
    pinned = dict(report.pinned)
    return {
        "changes": {role: (change.before, change.after) for role, change in report.changes.items()},
        "kept": report.kept,
        "recounted": (report.after.macs, report.after.params) == (counted.macs, counted.params),
        "error": report.equivalence.error,
        "notes": list(report.equivalence.notes),
        "pinned": pinned,
        "states": {
            reason: count for reason, count in pinned.items() if any(f"'{s}'" in reason for s in states)
        },
    }


def render(results: Results) -> str:
    """Units, what is kept, and why the state stays where it does."""
    header = ("model", "units", "parameters", "MACs", "error", "state pinned by")
    rows = []
    for name, row in results["rows"].items():
        if "failed" in row:
            rows.append((name, "", "", "", row["failed"], row["why"]))
            continue
        before, after = (sum(counts) for counts in zip(*row["changes"].values(), strict=True))
        kept = [f"{row['kept'][key]:.3f}" for key in ("params", "macs")]
        states = ", ".join(f"{reason} ({count} weight axes)" for reason, count in row["states"].items())
        rows.append((name, f"{before:,} -> {after:,}", *kept, f"{row['error']:.0e}", states))
    return f"{stamp(results)}\n\n{table(header, rows)}"


def figures(results: Results) -> list[Figure]:
    """The share of the parameters where no state is part of the interface, and the equivalence."""
    rows = results["rows"]
    run = [row for row in rows.values() if "failed" not in row]
    found = [
        Figure("recurrent: runs that end in an error", len(rows) - len(run), 0),
        Figure(
            "recurrent: files whose count differs from the predicted cost",
            sum(not r["recounted"] for r in run),
            0,
        ),
        Figure("recurrent: largest equivalence error", max(row["error"] for row in run), TOLERANCE),
    ]
    free = {name: row for name, row in rows.items() if not row.get("states")}
    return found + [
        Figure(
            f"{name}: parameters kept at 0.3", row["kept"]["params"] if "kept" in row else float("inf"), LIMIT
        )
        for name, row in free.items()
    ]


BENCHMARK = Benchmark("recurrent", measure, render, figures)

if __name__ == "__main__":
    raise SystemExit(run(BENCHMARK))
