"""A decoder of 3 GB, pruned in a fresh process: how much memory beside its file, how long beside a copy.

    python -m benchmarks.large [--update]
    python -m benchmarks.large --gigabytes 0.3

The weights lie in one external file, which is mapped and not read into memory: what counts is the anonymous
memory of the process (RssAnon of Linux, sampled), interpreter and libraries included. Copying the two files,
and pruning them, in turns; wall-clock time, since both wait for the disk. Everything is written into a
temporary folder, which needs three times the size.
"""

from __future__ import annotations

import argparse
import functools
import resource
import shutil
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import onnx

from benchmarks.common import Benchmark, Figure, NotHereError, Results, isolated, median, run, stamp, table
from models import large
from onnxprune import pipeline
from onnxprune.passes import Options

GIGABYTES = 3.0
ROUNDS = 3
OPTIONS = Options(heads=0.25, ffn=0.3)
MEGABYTE = 1_000_000
INTERVAL = 0.005  # seconds between samples
TENSORS, BASE = 1.5, 500  # times the largest tensor, and MB
COPIES = 3.0
STATUS = Path("/proc/self/status")


def measure(gigabytes: float = GIGABYTES) -> Results:
    """Seconds and megabytes of every round."""
    if not STATUS.exists():
        raise NotHereError("anonymous memory is read from /proc, which this system lacks")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if shutil.disk_usage(folder).free < 3.5e9 * gigabytes:
            raise NotHereError(f"the temporary folder has no room for three times {gigabytes} GB")
        path = isolated(large.write, _new(folder / "original"), gigabytes)
        tensors = onnx.load(path, load_external_data=False).graph.initializer
        rounds = []
        for i in range(ROUNDS):
            print(f"round {i + 1} ...", file=sys.stderr, flush=True)
            rounds.append(
                {"copy": _copied(path, folder / "copy"), **isolated(_pruned, path, folder / "pruned")}
            )
        return {
            "file": _size(path) / MEGABYTE,
            "largest": max(4 * functools.reduce(int.__mul__, t.dims, 1) for t in tensors) / MEGABYTE,
            "rounds": rounds,
        }


def _new(folder: Path) -> Path:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    return folder


def _files(path: Path) -> tuple[Path, Path]:
    return path, path.with_name(path.name + ".data")


def _size(path: Path) -> int:
    return sum(file.stat().st_size for file in _files(path))


def _copied(path: Path, folder: Path) -> float:
    """Seconds that it takes to read and write the model."""
    _new(folder)
    start = time.perf_counter()
    for file in _files(path):
        with file.open("rb") as source, (folder / file.name).open("wb") as target:
            shutil.copyfileobj(source, target, 1 << 20)  # through memory, as every program has to
    seconds = time.perf_counter() - start
    shutil.rmtree(folder)
    return seconds


def _pruned(path: Path, folder: Path) -> dict[str, Any]:
    """One run in this process: seconds by stage, and peaks in megabytes."""
    target = _new(folder) / path.name
    with _Peak() as peak:
        start = time.perf_counter()
        result = pipeline.prune(path, OPTIONS)
        proved = time.perf_counter()
        result.save(target)
        end = time.perf_counter()
    report = result.report
    assert report.equivalence is not None
    found = {
        "seconds": end - start,
        "stages": {**report.seconds, "save": end - proved},
        "anonymous": peak.anonymous / MEGABYTE,
        "resident": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / MEGABYTE,
        "written": _size(target) / MEGABYTE,
        "error": report.equivalence.error,
        "changes": {role: (change.before, change.after) for role, change in report.changes.items()},
    }
    shutil.rmtree(folder)
    return found


class _Peak:
    """The largest anonymous memory of this process while it lasts, sampled by a thread."""

    def __init__(self) -> None:
        self.anonymous = 0
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch)

    def _watch(self) -> None:
        while not self._done.wait(INTERVAL):
            self._sample()

    def _sample(self) -> None:
        fields = dict(line.split(":", 1) for line in STATUS.read_text(encoding="ascii").splitlines())
        self.anonymous = max(self.anonymous, 1024 * int(fields["RssAnon"].split()[0]))

    def __enter__(self) -> _Peak:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()
        self._sample()


def _limit(results: Results) -> float:
    return TENSORS * float(results["largest"]) + BASE


def _ratios(results: Results) -> list[float]:
    return sorted(r["seconds"] / r["copy"] for r in results["rounds"])


def render(results: Results) -> str:
    """What was pruned, then medians and spreads."""
    rounds = results["rounds"]
    changes = ", ".join(f"{role} {had:,} -> {left:,}" for role, (had, left) in rounds[0]["changes"].items())
    rows = [
        ("file", f"{results['file']:,.0f} MB", ""),
        ("largest tensor", f"{results['largest']:,.1f} MB", ""),
        ("written", f"{rounds[0]['written']:,.0f} MB", changes),
        ("equivalence error", f"{max(r['error'] for r in rounds):.0e}", ""),
    ]
    for title, key in (
        ("peak of anonymous memory", "anonymous"),
        ("peak resident, mapped file included", "resident"),
    ):
        values = sorted(r[key] for r in rounds)
        rows.append((title, f"{median(values):,.0f} MB", f"{values[0]:,.0f} to {values[-1]:,.0f}"))
    for title, key in (("copying the file", "copy"), ("pruning it", "seconds")):
        values = sorted(r[key] for r in rounds)
        rows.append((title, f"{median(values):.1f} s", f"{values[0]:.1f} to {values[-1]:.1f}"))
    for stage in rounds[0]["stages"]:
        values = sorted(r["stages"][stage] for r in rounds)
        rows.append((f"of it: {stage}", f"{median(values):.1f} s", f"{values[0]:.1f} to {values[-1]:.1f}"))
    ratios = _ratios(results)
    rows.append(("pruning / copying", f"x {median(ratios):.2f}", f"{ratios[0]:.2f} to {ratios[-1]:.2f}"))
    return f"{stamp(results)}\n\n{table(('', 'median', 'of the rounds'), rows)}"


def figures(results: Results) -> list[Figure]:
    """Anonymous memory by the largest tensor, time by copies."""
    peak = max(r["anonymous"] for r in results["rounds"])
    title = f"decoder of {results['file'] / 1000:.1f} GB"
    return [
        Figure(f"{title}: peak MB of anonymous memory", peak, _limit(results)),
        Figure(f"{title}: time to prune / to copy", median(_ratios(results)), COPIES),
    ]


BENCHMARK = Benchmark("large", measure, render, figures)


def main() -> int:
    """Measure at the size that is asked for; only the full size is kept."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.large", add_help=False)
    parser.add_argument("--gigabytes", type=float, default=GIGABYTES)
    given, sys.argv[1:] = parser.parse_known_args()
    if given.gigabytes != GIGABYTES and "--update" in sys.argv:
        parser.error("only results at the full size are kept")
    return run(Benchmark("large", functools.partial(measure, given.gigabytes), render, figures))


if __name__ == "__main__":
    raise SystemExit(main())
