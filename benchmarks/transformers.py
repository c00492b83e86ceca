"""Transformers of published widths: heads, neurons, the residual stream and whole blocks removed.

    python -m benchmarks.transformers [--update]

Networks of few layers with random weights, as TorchScript exports them (`models/exported.py`), and a trained
sentence encoder. Each runs in a process of its own; what is kept is counted again on the written file.
"""

from __future__ import annotations

import re
import sys
import tempfile
from pathlib import Path
from typing import Any

import onnx

from benchmarks.common import Benchmark, Figure, Results, isolated, run, stamp, table
from models.exported import EXPORTED, WIDE
from models.fetch import fetch
from onnxprune import job, pipeline
from onnxprune.blocks import Blocks
from onnxprune.cost import CostModel
from onnxprune.dependency import DependencyGraph
from onnxprune.errors import NothingToPrune
from onnxprune.passes import Options

TRAINED = ("minilm-int8",)
SETTINGS = {
    "units": Options(heads=0.25, ffn=0.3),
    "layers": Options(layers="0.2"),
    "hidden": Options(hidden=0.1, allow_lossy=True),
}
ROLES = {"units": ("heads", "ffn"), "layers": ("layers",), "hidden": ("hidden",)}
TOLERANCE = 1e-4


def measure() -> Results:
    """A row per network and setting; one that fails leaves its reason."""
    rows: dict[str, Any] = {}
    for name in (*EXPORTED, *TRAINED):
        print(f"{name} ...", file=sys.stderr, flush=True)
        rows[name] = {setting: isolated(_row, name, setting) for setting in SETTINGS}
    return {"rows": rows}


def _row(name: str, setting: str) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        if name in TRAINED:
            path = fetch(name)
        else:
            path = Path(folder) / "model.onnx"
            onnx.save(EXPORTED[name](WIDE[name]), path)
        try:
            return _pruned(path, SETTINGS[setting], Path(folder) / "pruned.onnx")
        except Exception as error:  # a crash is a row of the table too
            why = re.sub(r"\S*/", "", str(error).partition("\n")[0])  # without folders
            return {"failed": type(error).__name__, "why": why, "nothing": isinstance(error, NothingToPrune)}


def _pruned(path: Path, options: Options, target: Path) -> dict[str, Any]:
    result = pipeline.prune(path, options)
    result.save(target)
    report = result.report
    assert report.equivalence is not None
    before, after = (_parts(file) for file in (path, target))
    changes = {role: (change.before, change.after) for role, change in report.changes.items()}
    gone = {role: had - left for role, (had, left) in changes.items()}
    counted = CostModel(DependencyGraph(job.open_model(target)))()
    return {
        "nodes": len(onnx.load(path, load_external_data=False).graph.node),
        "changes": changes,
        "gone": all(before[role] - after[role] == count for role, count in gone.items()),
        "recounted": (report.after.macs, report.after.params) == (counted.macs, counted.params),
        "kept": report.kept,
        "error": report.equivalence.error,
        "pinned": dict(report.pinned),
    }


def _parts(path: Path) -> dict[str, int]:
    """Units by role, and residual blocks, of a file."""
    blocks = Blocks(DependencyGraph(job.open_model(path)))
    counts: dict[str, int] = {"layers": len(blocks.residual), "heads": 0, "ffn": 0, "hidden": 0}
    for group in blocks.graph.groups:
        role = blocks.role(group)
        counts[role] = counts.get(role, 0) + group.size
    return counts


def render(results: Results) -> str:
    """One table for heads and neurons, one for layers and the residual stream."""
    rows = results["rows"]
    header = ("model", "nodes", "heads", "neurons", "parameters", "MACs", "error")
    units = [_cells(name, row["units"], ROLES["units"]) for name, row in rows.items()]
    deeper = "model|blocks|parameters|MACs|error|hidden width|parameters, hidden|MACs, hidden|error, hidden"
    others = [
        (
            name,
            *(
                cell
                for setting in ("layers", "hidden")
                for cell in _cells(name, row[setting], ROLES[setting])[2:]
            ),
        )
        for name, row in rows.items()
    ]
    parts = [stamp(results), "\n**`--heads 0.25 --ffn 0.3`**\n", table(header, units)]
    parts += [
        "\n**`--layers 0.2`, and `--hidden 0.1 --allow-lossy`**\n",
        table(deeper.split("|"), others),
    ]
    return "\n".join(parts)


def _cells(name: str, row: dict[str, Any], roles: tuple[str, ...]) -> tuple[str, ...]:
    if "failed" in row:
        return (name, "", *["" for _ in roles], "", "", "nothing" if row["nothing"] else row["failed"])
    changes = ["{:,} -> {:,}".format(*row["changes"].get(role, (0, 0))) for role in roles]
    kept = [f"{row['kept'][key]:.3f}" for key in ("params", "macs")]
    return (name, f"{row['nodes']:,}", *changes, *kept, f"{row['error']:.0e}")


def figures(results: Results) -> list[Figure]:
    """Heads and neurons are gone from every file, and every result equals its masked original."""
    rows = results["rows"]
    runs = [row[setting] for row in rows.values() for setting in SETTINGS]
    whole = sum(not _lost(row["units"], role) for row in rows.values() for role in ROLES["units"])
    failed = sum("failed" in run and not run["nothing"] for run in runs)
    differing = sum(not run.get("recounted", True) for run in runs)
    worst = max(run["error"] for run in runs if "error" in run)
    return [
        Figure("transformers: runs that end in an error", failed, 0),
        Figure("transformers: networks of which heads or neurons are not gone", whole, 0),
        Figure("transformers: files whose count differs from the predicted cost", differing, 0),
        Figure("transformers: largest equivalence error", worst, TOLERANCE),
    ]


def _lost(row: dict[str, Any], role: str) -> bool:
    had, left = row.get("changes", {}).get(role, (0, 0))
    return bool(had > left and row["gone"])


BENCHMARK = Benchmark("transformers", measure, render, figures)

if __name__ == "__main__":
    raise SystemExit(run(BENCHMARK))
