"""Accuracy at equal MACs, without training: onnxprune beside the other pruners, on every accuracy task.

    python -m benchmarks.accuracy [--tasks a,b] [--update]

Every tool gets the same model and the same 256 calibration inputs; its ratio is found by bisection so that the MACs,
counted by one counter on the written file, meet the target. What is measured is kept in the cache, by task, column,
target and the digests of everything it depends on, so that an interrupted run goes on where it stopped and peers are
not run again. With --tasks, the rows of the others stay as they are kept in the results.
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import json
import math
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx

import onnxprune
from benchmarks import common, tasks
from benchmarks.common import Benchmark, Figure, NotHereError, Results, isolated, median, stamp, table
from benchmarks.peers import PEER as ONNXSIM
from benchmarks.peers import count, peer_environment, share_of
from benchmarks.serving import NEAR, PeerError, bisected
from benchmarks.tasks import TASKS, Task, fashion_calibration
from models.environments import NotInstallable, environment
from models.fetch import TORCH, NoNetwork, code_version, default_cache

TARGETS = (0.80, 0.70, 0.50)
ALIGN = 4  # of our columns: at the default of 16 small networks miss the MACs
CRITERIA = ("magnitude", "bn-scale", "taylor", "hessian")

Found = dict[str, Any]
"""Either `macs`, `points` and `beside`, or why there are none: `failed`."""


# Digests


def _digest(*parts: bytes | str) -> str:
    whole = hashlib.sha256()
    for part in parts:
        whole.update(hashlib.sha256(part if isinstance(part, bytes) else part.encode()).digest())
    return whole.hexdigest()[:24]


def _content(model: Path) -> bytes:
    """The model with the weights that lie in other files."""
    content: bytes = onnx.load(model).SerializeToString()
    return content


@functools.cache
def _versions(*names: str) -> str:
    return " ".join(code_version(Path(__file__).with_name(name)) for name in names)


SHOWING = (
    "api",
    "cli",
    "comparison",
    "graphsurgeon",
    "html",
    "inspection",
    "latency",
    "naming",
    "outcome",
    "plugins",
    "quantisation",
    "report",
    "survey",
    "targets",
    "timing",
)
"""Modules of ours that pass on, show and measure: they do not decide what is written here."""


@functools.cache
def _own_version() -> str:
    package = Path(onnxprune.__file__).parent
    files = sorted(package.rglob("*.py"))
    deciding = [
        path for path in files if path.relative_to(package).parts[0].removesuffix(".py") not in SHOWING
    ]
    return _digest(*(code_version(path) for path in deciding))


# The models that tools write


@dataclass(frozen=True)
class Inputs:
    """What every tool gets for a task."""

    task: Task
    model: Path
    calibration: Path
    digest: str


@dataclass(frozen=True)
class Column:
    """A tool and its setting. `version` changes when its results may; `cuts` opens a tool on a task: targets to files,
    with `PeerError` for what it cannot do."""

    name: str
    ours: bool
    version: Callable[[], str]
    cuts: Callable[[Inputs], Any]
    fits: Callable[[Task], bool] = lambda _: True


def _bisected(inputs: Inputs, interpreter: Path, module: str, arguments: list[str | Path]) -> Any:
    """Cut by a peer that takes a ratio."""
    return bisected(interpreter, module, arguments, share_of(inputs.model))


def _onnxsim(criterion: str) -> Column:
    def cuts(inputs: Inputs) -> Any:
        layout = "apart" if inputs.task.apart else "together"
        arguments: list[str | Path] = [inputs.model, criterion, inputs.calibration, layout]
        return _bisected(inputs, peer_environment(), "benchmarks.onnxsim_prune", arguments)

    return Column(f"onnxsim {criterion}", False, lambda: f"{ONNXSIM} {_versions('onnxsim_prune.py')}", cuts)


def _torch_pruning(criterion: str) -> Column:
    @contextmanager
    def cuts(inputs: Inputs) -> Iterator[Any]:
        try:
            interpreter = environment(default_cache(), TORCH)
        except NotInstallable as error:
            raise NotHereError(str(error)) from error
        with tempfile.TemporaryDirectory() as folder:
            pictures = Path(folder) / "labelled.npz"
            images, labels = fashion_calibration()
            np.savez(pictures, image=images, label=labels)
            weights = inputs.model.with_suffix(".pt")
            arguments: list[str | Path] = [inputs.task.name, weights, criterion, pictures]
            with _bisected(inputs, interpreter, "benchmarks.torch_pruning_prune", arguments) as cut:
                yield cut

    def version() -> str:
        return f"{TORCH[1]} {_versions('torch_pruning_prune.py')}"

    return Column(
        f"Torch-Pruning {criterion}", False, version, cuts, lambda task: task.name.startswith("fashion-")
    )


def _onnxprune(name: str, *, data: bool) -> Column:
    @contextmanager
    def cuts(inputs: Inputs) -> Iterator[Any]:
        with tempfile.TemporaryDirectory() as folder:

            def cut(target: float) -> Path:
                path = Path(folder) / f"{target}.onnx"
                failed = isolated(
                    _shrink,
                    inputs.model,
                    path,
                    target,
                    inputs.calibration if data else None,
                    inputs.task.apart,
                )
                if failed:
                    raise PeerError(failed)
                return path

            yield cut

    return Column(name, True, _own_version, cuts)


def _shrink(model: Path, target: Path, macs: float, calibration: Path | None, apart: bool) -> str:
    """Prune through the public interface; returns what went wrong."""
    options: dict[str, Any] = {"align": ALIGN}
    if calibration is not None:
        with np.load(calibration) as stored:
            arrays = dict(stored)
        count = min(len(array) for array in arrays.values())
        one_by_one = [{name: array[i] for name, array in arrays.items()} for i in range(count)]
        options["data"] = one_by_one if apart else calibration
    try:
        onnxprune.shrink(model, macs=macs, **options).save(target)
    except Exception as error:  # shown in the table in place of a score
        return f"{type(error).__name__}: {error}".partition("\n")[0]
    return ""


COLUMNS = (
    _onnxsim("l2"),
    _onnxsim("wanda"),
    *(_torch_pruning(criterion) for criterion in CRITERIA),
    _onnxprune("onnxprune, no data", data=False),
    _onnxprune("onnxprune, 256 inputs", data=True),
)


# Measuring, with what was measured before


def measure(names: Iterable[str] = tuple(TASKS), columns: Iterable[str] | None = None) -> Results:
    """The scores of the tasks named; those of the others as they were kept.

    columns  names of those to measure (all); of the others what was measured before is shown
    """
    known: dict[str, Any] = (common.kept("accuracy") or {"rows": {}})["rows"]
    chosen = [column for column in COLUMNS if columns is None or column.name in set(columns)]
    rows = {**known, **{name: _row(TASKS[name], chosen) for name in names}}
    return {"rows": {name: rows[name] for name in TASKS if name in rows}}


def _row(task: Task, chosen: Iterable[Column]) -> dict[str, Any]:
    try:
        model = task.model()
    except NoNetwork as error:
        raise NotHereError(str(error)) from error
    with tempfile.TemporaryDirectory() as folder:
        calibration = Path(folder) / "calibration.npz"
        task.write_calibration(calibration)
        scored = _versions("tasks.py", "samples.py")
        inputs = Inputs(task, model, calibration, _digest(_content(model), calibration.read_bytes(), scored))
        original = _once(("original", task.name, inputs.digest), lambda: _scored(inputs, model))
        measured = {column.name for column in chosen}
        cells = {
            column.name: _cells(column, inputs, column.name in measured)
            for column in COLUMNS
            if column.fits(task)
        }
    return {"kind": task.kind, "measure": task.measure, "original": original, "cells": cells}


def _cells(column: Column, inputs: Inputs, measured: bool) -> dict[str, Found]:
    """The results of a column by target; the tool is opened when the first of them is missing."""
    with ExitStack() as stack:
        cut = functools.cache(lambda: stack.enter_context(column.cuts(inputs)))
        found = {}
        for target in TARGETS:
            key = (column.name, column.version(), f"{target}", inputs.task.name, inputs.digest)
            if measured or _place(key).exists():
                found[f"{target}"] = _once(key, functools.partial(_judged, inputs, column, cut, target))
        return found


def _judged(
    inputs: Inputs, column: Column, cut: Callable[[], Callable[[float], Path]], target: float
) -> Found:
    print(f"{inputs.task.name}, {column.name}, {target} ...", file=sys.stderr, flush=True)
    start = time.perf_counter()
    try:
        path = cut()(target)
        seconds = time.perf_counter() - start
        return {**_scored(inputs, path), "seconds": round(seconds, 1)}
    except PeerError as error:
        return {"failed": str(error)}


def _scored(inputs: Inputs, path: Path) -> Found:
    """MACs and points of a file."""
    score = isolated(_evaluate, inputs.task.name, path)
    macs = count(path).macs / count(inputs.model).macs
    return {"macs": macs, "points": score.points, "samples": score.samples, "beside": dict(score.beside)}


def _evaluate(name: str, path: Path) -> tasks.Score:
    return TASKS[name].evaluate(path)


def _place(key: tuple[str, ...]) -> Path:
    """Where it is kept."""
    return default_cache() / "accuracy" / f"{_digest(*key)}.json"


def _once(key: tuple[str, ...], make: Callable[[], Found]) -> Found:
    """What was found before under a key, or what is found now."""
    path = _place(key)
    if path.exists():
        kept: Found = json.loads(path.read_text(encoding="utf-8"))["found"]
        return kept
    found = make()
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"key": key, "found": found}), encoding="utf-8")
    return found


# Rendering


def render(results: Results) -> str:
    """A table per target: points, and the MACs where they are not the target's."""
    parts = [stamp(results)]
    rows = results["rows"]
    for target in TARGETS:
        names = [column.name for column in COLUMNS]
        lines = [
            (
                name,
                row["kind"],
                f"{row['original']['points']:.1f}",
                *(_cell(row, column, target) for column in names),
            )
            for name, row in rows.items()
        ]
        parts.append(
            f"**MACs {target:.2f}**\n\n" + table(("task", "", "original", *names), lines, numbers_from=2)
        )
    beside = [
        (
            f"{name}: {key}",
            f"{row['original']['beside'][key]:.1f}",
            *(
                _beside(row, column.name, target, key)
                for target in TARGETS
                for column in COLUMNS
                if column.ours
            ),
        )
        for name, row in rows.items()
        for key in row["original"]["beside"]
        if key != "types"
    ]
    if beside:
        header = [f"{column.name}, {target:.2f}" for target in TARGETS for column in COLUMNS if column.ours]
        parts.append("Beside the judged figures:\n\n" + table(("figure", "original", *header), beside))
    return "\n\n".join([*parts, *_failures(rows)])


def _found(row: dict[str, Any], column: str, target: float) -> Found:
    found: Found = row["cells"].get(column, {}).get(f"{target}", {})
    return found


def _cell(row: dict[str, Any], column: str, target: float) -> str:
    found = _found(row, column, target)
    if "points" not in found:
        return "-" if found else ""
    off = "" if abs(found["macs"] - target) <= 2 * NEAR else f" at {found['macs']:.2f}"
    return f"{found['points']:.1f}{off}"


def _beside(row: dict[str, Any], column: str, target: float, key: str) -> str:
    found = _found(row, column, target)
    return f"{found['beside'][key]:.1f}" if "points" in found else ""


def _failures(rows: dict[str, Any]) -> list[str]:
    """Why cells are empty, each reason once."""
    reasons: dict[str, list[str]] = {}
    for name, row in rows.items():
        for column, by_target in row["cells"].items():
            for target, found in by_target.items():
                if "failed" in found:
                    reasons.setdefault(f"{name}, {column}: {found['failed']}", []).append(target)
    lines = [f"* {reason} (at {', '.join(targets)})" for reason, targets in reasons.items()]
    return ["Not reached:\n\n" + "\n".join(lines)] if lines else []


# Figures


LIMITS = {("wide", 0.80): 0.5, ("wide", 0.70): 1.0, ("compact", 0.80): 4.0, ("compact", 0.70): 8.0}


def figures(results: Results) -> list[Figure]:
    """What the tables decide."""
    rows = results["rows"]
    found = []
    calibrated = next(column.name for column in COLUMNS if column.ours and "inputs" in column.name)
    for (kind, target), limit in LIMITS.items():
        losses = [loss(row, calibrated, target) for row in rows.values() if row["kind"] == kind]
        if losses:
            name = f"accuracy, MACs {target:.2f}: largest loss of a {kind} network, points"
            found.append(Figure(name, max(losses), limit))
    losses = [loss(row, calibrated, 0.50) for row in rows.values() if row["kind"] == "wide"]
    if losses:
        found.append(
            Figure(
                "accuracy, MACs 0.50: median loss of a wide network, points", median(losses), 3, strict=True
            )
        )
    for column in (column.name for column in COLUMNS if column.ours):
        known = [row for row in rows.values() if column in row["cells"]]
        beaten = sum(not wins(row, column, target) for row in known for target in TARGETS)
        found.append(
            Figure(f"accuracy, {column}: cells with a third of the best peer's loss or more", beaten, 0)
        )
    return found


def loss(row: dict[str, Any], column: str, target: float) -> float:
    """Points lost; everything where there is no model at that target."""
    points = _found(row, column, target).get("points", -math.inf)
    return float(row["original"]["points"] - points)


def wins(row: dict[str, Any], column: str, target: float) -> bool:
    """Whether a column loses less than a third of what the best peer loses at that target (or nothing); so it
    does where no peer was measured."""
    ours = loss(row, column, target)
    peers = [loss(row, p.name, target) for p in COLUMNS if not p.ours and _found(row, p.name, target)]
    return ours <= 0 or ours < min(peers, default=math.inf) / 3


BENCHMARK = Benchmark("accuracy", measure, render, figures)


def main() -> int:
    """Measure and print; with --update also keep the results and rewrite the document."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.accuracy", description=main.__doc__)
    parser.add_argument("--tasks", default=",".join(TASKS), help="which tasks to run (all)")
    names = "; ".join(column.name for column in COLUMNS)
    parser.add_argument(
        "--columns", help=f"which columns to measure, with semicolons; others as they were ({names})"
    )
    parser.add_argument("--update", action="store_true", help="keep the results, rewrite the document")
    arguments = parser.parse_args()
    chosen = arguments.tasks.split(",")
    unknown = sorted(set(chosen) - set(TASKS))
    if unknown:
        parser.error(f"no such task: {', '.join(unknown)}; there are {', '.join(TASKS)}")
    columns = arguments.columns.split(";") if arguments.columns else None
    benchmark = Benchmark("accuracy", functools.partial(measure, chosen, columns), render, figures)
    return common.report(benchmark, update=arguments.update)


if __name__ == "__main__":
    raise SystemExit(main())
