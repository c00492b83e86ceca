"""How far the outputs moved from the original, and how long both take."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from onnxprune.runtime import Feeds, Session

ROUNDS = 7
ROUND_SECONDS = 0.25  # spent on each model in each round


@dataclass(frozen=True)
class Drift:
    """Of one output: largest difference over the original's scale, and the cosine of both."""

    output: str
    error: float
    cosine: float


def compare_outputs(original: Session, candidate: Session, feeds: Sequence[Feeds]) -> list[Drift]:
    """Output drift on random inputs: a sign of how much was cut, not of accuracy."""
    pairs: dict[str, list[tuple[np.ndarray, np.ndarray]]] = {}
    for feed in feeds:
        before, after = original.run(feed), candidate.run(feed)
        for name, a in before.items():
            b = after.get(name)
            if isinstance(a, np.ndarray) and isinstance(b, np.ndarray) and a.dtype.kind in "fiub":
                pairs.setdefault(name, []).append((a, b))
    drifts = []
    for name, values in pairs.items():
        if any(a.shape != b.shape for a, b in values):
            drifts.append(Drift(name, float("inf"), 0.0))
            continue
        x = np.concatenate([a.ravel() for a, _ in values]).astype(np.float64)
        y = np.concatenate([b.ravel() for _, b in values]).astype(np.float64)
        finite = np.isfinite(x) & np.isfinite(y)
        x, y = x[finite], y[finite]
        scale = max(float(np.abs(x).max(initial=0)), 1e-30)
        norms = float(np.linalg.norm(x) * np.linalg.norm(y))
        cosine = float(x @ y) / norms if norms else 1.0
        drifts.append(Drift(name, float(np.abs(x - y).max(initial=0)) / scale, cosine))
    return drifts


@dataclass(frozen=True)
class Latency:
    """Milliseconds of one inference (the least of each round, then the median) and the ratio of both.

    `ratios` are the paired ratios of each round, sorted; `contended` says that the machine was busy
    with other work, so that times mean little.
    """

    before: float
    after: float
    ratio: float
    ratios: tuple[float, ...]
    contended: bool


def time_both(original: Session, candidate: Session, feed: Feeds) -> Latency:
    """Both models alternated in one process, one round after the other."""
    for session in (original, candidate):
        for _ in range(3):
            session.run(feed)
    wall, cpu = time.perf_counter(), time.process_time()
    rounds = []
    for number in range(ROUNDS):
        best = {0: float("inf"), 1: float("inf")}
        until = time.perf_counter() + 2 * ROUND_SECONDS
        first = number % 2
        while time.perf_counter() < until or best[0] == float("inf"):
            for which in (first, 1 - first):
                start = time.perf_counter()
                (original, candidate)[which].run(feed)
                best[which] = min(best[which], time.perf_counter() - start)
        rounds.append((best[0], best[1]))
    busy = (time.process_time() - cpu) / (time.perf_counter() - wall)
    ratios = tuple(sorted(after / before for before, after in rounds))
    return Latency(
        float(np.median([before for before, _ in rounds])) * 1e3,
        float(np.median([after for _, after in rounds])) * 1e3,
        float(np.median(ratios)),
        ratios,
        busy < 0.9,
    )
