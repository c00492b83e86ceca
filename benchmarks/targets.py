"""Where pruned models run: public models, whole and pruned, on every target that is here.

    python -m benchmarks.targets [--only NAME ...] [--update]

30 % of the channels by magnitude, rounded to 16, and repaired on 64 made-up inputs: what matters here is the shapes.
Each model is run (or built) on each target as it is and pruned; errors are those of the outputs against onnxruntime's on
the CPU, as shares of their scale. A model that a target takes must be taken when pruned.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import onnxprune
from benchmarks.common import Benchmark, Figure, Results, isolated, kept, run, stamp, table
from benchmarks.subjects import TRAINED, filled, subject
from benchmarks.tasks import TASKS
from models.fetch import LIGHT
from onnxprune import comparison
from onnxprune.dependency import DependencyGraph
from onnxprune.errors import OnnxPruneError
from onnxprune.model import load
from onnxprune.reference import Reference
from onnxprune.targets import TARGETS, target

RATIO = 0.3
SAMPLES = 64
TYPED = ("tensorrt", "qnn")  # targets that take types as they are
OTHER = tuple(name for name in TASKS if name not in TRAINED)
VARIANTS = (
    "crepe-full", "silero-vad-16k", "silero-vad-sequence", "silero-vad-half", "silero-vad-ifless",
    "silero-vad-openvino", "nsnet2-48k", "minilm-int8",
)  # fmt: skip
NAMES = (*TRAINED, *OTHER, *VARIANTS, "resnet50", "mobilenet_v2", "yolov8n", *LIGHT)


def measure(names: Sequence[str] = NAMES) -> Results:
    """The models named; the others as they were kept."""
    rows: dict[str, Any] = dict((kept("targets") or {"rows": {}})["rows"])
    here = [name for name in TARGETS if target(name).state().reach != "absent"]
    with tempfile.TemporaryDirectory() as folder:
        for name in names:
            print(f"{name} ...", file=sys.stderr, flush=True)
            paths = isolated(_pruned, name, Path(folder))
            if isinstance(paths, str):
                rows[name] = {"failed": paths}
                continue
            rows[name] = {where: isolated(_compared, _suited(where, name), *paths) for where in here}
    return {"rows": {name: rows[name] for name in NAMES if name in rows}}


def _suited(where: str, model: str) -> str:
    """A target at the precision that a model is stored in, where it tells them apart."""
    stored = {"fp16": "fp16", "qdq": "int8"}.get(model.rpartition("-")[2], "")
    return f"{where}:{stored}" if stored in TARGETS[where].precisions and where in TYPED else where


def _pruned(name: str, folder: Path) -> tuple[Path, Path] | str:
    """A model and the same pruned; or why it is not."""
    path = TASKS[name].model() if name in OTHER else subject(name, folder)
    if name in LIGHT:
        path = filled(path, folder)
    small = folder / f"{name}.pruned.onnx"
    try:
        onnxprune.shrink(path, RATIO, criterion="l2", samples=SAMPLES).save(small)
    except OnnxPruneError as error:
        return f"{error}"
    return path, small


def _compared(where: str, original: Path, small: Path) -> dict[str, Any]:
    """Both on one target."""
    feeds = comparison.inputs(DependencyGraph(load(original)))
    both = (Reference(path, feeds) for path in (original, small))
    found = comparison.compare(target(where), *both)
    return {
        "failed": found.failed,
        "error": max(found.errors.values(), default=None),
        "original": max(found.original.values(), default=None),
        "agrees": found.agrees,
        "ratio": found.timing.ratio if found.timing else None,
    }


def render(results: Results) -> str:
    """One row for each model, one column for each target."""
    rows = results["rows"]
    places = list(dict.fromkeys(where for row in rows.values() if "failed" not in row for where in row))
    body = [
        (name, *(_cell(row, where) for where in places)) for name, row in rows.items() if "failed" not in row
    ]
    refused = [f"* {name} is not pruned: {row['failed']}" for name, row in rows.items() if "failed" in row]
    refused += sorted(
        f"* {name} on {where}: {found['failed']}"
        for name, row in rows.items()
        if "failed" not in row
        for where, found in row.items()
        if found["failed"]
    )
    return "\n\n".join((stamp(results), table(("model", *places), body), "\n".join(refused)))


def _cell(row: dict[str, Any], where: str) -> str:
    found = row.get(where)
    if found is None:
        return "-"
    if found["failed"]:
        return "**refused**" if found["failed"].startswith("candidate") else "not taken"
    if found["agrees"] is None:
        return "builds"
    errors = f"{found['error']:.0e} ({found['original']:.0e})"
    return errors if found["agrees"] else f"**{errors}**"


def figures(results: Results) -> list[Figure]:
    """What was promised."""
    cells = [found for row in results["rows"].values() if "failed" not in row for found in row.values()]
    lost = [found for found in cells if found["failed"].startswith("candidate") or found["agrees"] is False]
    return [
        Figure(
            "pruned models that a target refuses or computes wrongly, of those it takes whole", len(lost), 0
        )
    ]


BENCHMARK = Benchmark("targets", measure, render, figures, NAMES)

if __name__ == "__main__":
    raise SystemExit(run(BENCHMARK))
