"""What calibration, scores, allocation and repair cost beside running the network on the same inputs.

    python -m benchmarks.calibration [--update]

ResNet-50 (25.6 M parameters, random weights) with 256 inputs of 224 x 224, pruned to half its MACs with all
defaults; the forward passes are those of the original, in batches of 16, before and after. CPU seconds of all
threads, so that other work on the machine does not count.
"""

from __future__ import annotations

import tempfile
import time
from pathlib import Path

import numpy as np

import onnxprune
from benchmarks.common import Benchmark, Figure, Results, isolated, run, stamp, table
from benchmarks.subjects import subject
from onnxprune.data.patterns import pictures
from onnxprune.runtime import Session

SAMPLES = 256
BATCH = 16
LIMIT = 20


def measure() -> Results:
    """CPU seconds of the forward passes (twice) and of the whole run."""
    return isolated(_measured)


def _measured() -> Results:
    images = pictures(np.random.default_rng(0), SAMPLES, 3, 224, 224)
    with tempfile.TemporaryDirectory() as folder:
        path = subject("resnet50", Path(folder))
        np.save(Path(folder) / "images.npy", images)
        passes = [_forward(path, images)]
        start = time.process_time()
        result = onnxprune.shrink(path, macs=0.5, data=Path(folder) / "images.npy")
        spent = time.process_time() - start
        passes.append(_forward(path, images))
    return {"forward": passes, "shrink": spent, "stages": dict(result.report.seconds)}


def _forward(path: Path, images: np.ndarray) -> float:
    session = Session(path, optimise="all")
    name = next(iter(session.inputs))
    session.run({name: images[:BATCH]})
    start = time.process_time()
    for first in range(0, SAMPLES, BATCH):
        session.run({name: images[first : first + BATCH]})
    return time.process_time() - start


def _ratio(results: Results) -> float:
    return float(results["shrink"] / (sum(results["forward"]) / len(results["forward"])))


def render(results: Results) -> str:
    """Both sides, and the ratio."""
    rows = [
        ("256 forward passes, before", f"{results['forward'][0]:.0f}"),
        ("256 forward passes, after", f"{results['forward'][1]:.0f}"),
        ("the whole of `shrink --macs 0.5 --data`", f"{results['shrink']:.0f}"),
        ("**ratio**", f"**{_ratio(results):.1f}**"),
    ]
    return stamp(results) + "\n\n" + table(("", "CPU seconds"), rows, numbers_from=1)


def figures(results: Results) -> list[Figure]:
    """What it may cost."""
    name = "calibration, scores and repair of a 25.6 M-parameter CNN, in times its 256 forward passes"
    return [Figure(name, _ratio(results), LIMIT, strict=True)]


BENCHMARK = Benchmark("calibration", measure, render, figures)

if __name__ == "__main__":
    raise SystemExit(run(BENCHMARK))
