"""How far the outputs moved from the original."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from onnxprune.runtime import Feeds, Session


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
