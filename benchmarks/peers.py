"""onnxprune beside onnxsim, the other tool that prunes ONNX files, at the same ratio on the same models.

    python -m benchmarks.peers [--update]

onnxsim is installed into an environment of its own in the cache; where that is not possible the
benchmark is skipped. Both results are counted by the same counter on the written files, and
onnxruntime runs both.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

from benchmarks.common import ROOT, Benchmark, NotHereError, Results, isolated, run, stamp, table
from benchmarks.serving import PeerError
from benchmarks.subjects import RANDOM, TRAINED, subject
from models.environments import NotInstallable, environment
from models.fetch import default_cache
from onnxprune import passes, surgery
from onnxprune.blocks import Blocks
from onnxprune.cost import Cost, CostModel
from onnxprune.dependency import DependencyGraph
from onnxprune.errors import OnnxPruneError
from onnxprune.model import load, save
from onnxprune.passes import Options
from onnxprune.runtime import RunError, Session, index_bounds, make_feeds

PEER = "onnxsim==0.8.1"
RATIO = 0.3
NAMES = (*RANDOM, *TRAINED[:6], "crepe-tiny")  # not the folded, float16 and quantised forms
LIMIT_S = 600


def measure() -> Results:
    """Per model and tool: MACs and parameters kept, and whether onnxruntime runs the result."""
    interpreter = peer_environment()
    rows: dict[str, dict[str, Any]] = {}
    for name in NAMES:
        print(f"{name} ...", file=sys.stderr, flush=True)
        with tempfile.TemporaryDirectory() as folder:
            path = isolated(subject, name, Path(folder))
            before = isolated(count, path)
            rows[name] = {
                "onnxprune": _judged(before, _onnxprune(path, Path(folder) / "ours.onnx")),
                "onnxsim": _judged(before, _onnxsim(interpreter, path, Path(folder) / "theirs.onnx")),
            }
    return {"rows": rows}


def peer_environment() -> Path:
    """The interpreter of an environment that has the peer."""
    pinned = [f"{name}=={version(name)}" for name in ("onnx", "onnxruntime", "numpy")]
    try:
        return environment(default_cache(), [PEER, *pinned])
    except NotInstallable as error:
        raise NotHereError(str(error)) from error


def _onnxprune(path: Path, target: Path) -> Path | str:
    try:
        isolated(_cut, path, target)
    except OnnxPruneError as error:
        return str(error)
    return target


def _cut(path: Path, target: Path) -> None:
    model = load(path)
    graph = DependencyGraph(model)
    save(surgery.apply(graph, passes.plan(Blocks(graph), Options(RATIO, align=1), model.digest())), target)


def _onnxsim(interpreter: Path, path: Path, target: Path) -> Path | str:
    command = [str(interpreter), "-m", "benchmarks.onnxsim_prune", str(path), str(target), str(RATIO)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=LIMIT_S, cwd=ROOT)
    except subprocess.TimeoutExpired:
        return f"not done in {LIMIT_S} s"
    return target if done.returncode == 0 else (done.stderr.strip().splitlines() or ["failed"])[-1]


def _judged(before: Cost, written: Path | str) -> dict[str, Any]:
    """What a tool wrote (or why it wrote nothing), by the counter and by onnxruntime."""
    if isinstance(written, str):
        return {"failed": written}
    try:
        cost = isolated(count, written)
    except OnnxPruneError as error:
        return {"failed": str(error)}
    kept = cost.ratio(before)
    return {"macs": kept["macs"], "params": kept["params"], "refused": isolated(_refused, written)}


def count(path: Path) -> Cost:
    """What a model file costs, by the counter that counts every tool's results."""
    return CostModel(DependencyGraph(load(path)))()


def share_of(original: Path) -> Callable[[Path], float]:
    """What share of a model's MACs a file has; raises `PeerError` where it is no valid model."""
    before = count(original).macs

    def share(path: Path) -> float:
        try:
            return count(path).macs / before
        except OnnxPruneError as error:
            why = f"{error}".replace(f"{path.parent}/", "")
            raise PeerError(f"wrote an invalid model ({why})") from error

    return share


def _refused(path: Path) -> str:
    """What onnxruntime has against a model; empty if it runs."""
    model = load(path)
    shapes = DependencyGraph(model).shapes
    try:
        session = Session(path, optimise="all")
        session.run(make_feeds(model, shapes.sizes, 0, index_bounds(model, shapes.shapes)))
    except RunError as error:
        return str(error)
    return ""


def render(results: Results) -> str:
    """MACs and parameters kept by each tool, side by side."""
    rows = []
    for name, row in results["rows"].items():
        cells = [cell for tool in ("onnxprune", "onnxsim") for cell in _cells(row[tool])]
        rows.append((name, *cells))
    header = ("model", "onnxprune: MACs", "parameters", "runs", "onnxsim: MACs", "parameters", "runs")
    text = f"{stamp(results)}\n\n{table(header, rows)}"
    refused = {
        f"{tool} on {name}: {found.get('refused') or found.get('failed')}"
        for name, row in results["rows"].items()
        for tool, found in row.items()
        if found.get("refused") or found.get("failed")
    }
    return text + "".join(f"\n\n{line}" for line in sorted(refused))


def _cells(found: dict[str, Any]) -> tuple[str, str, str]:
    if "failed" in found:
        return "failed", "failed", "-"
    return f"{found['macs']:.3f}", f"{found['params']:.3f}", "no" if found["refused"] else "yes"


BENCHMARK = Benchmark("peers", measure, render)

if __name__ == "__main__":
    raise SystemExit(run(BENCHMARK))
