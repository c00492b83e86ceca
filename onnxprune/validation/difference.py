"""How far apart the outputs of two models are."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np


def difference(want: Mapping[str, Any], got: Mapping[str, Any]) -> float:
    """The largest |want - got| / max |want| over the outputs; infinite where shapes or finiteness differ."""
    worst = 0.0
    for name, a in want.items():
        b = got[name]
        if not isinstance(a, np.ndarray) or not isinstance(b, np.ndarray) or a.shape != b.shape:
            if isinstance(a, np.ndarray):
                return float("inf")
            continue
        if not a.size:
            continue
        x, y = a.astype(np.float64), b.astype(np.float64)
        finite = np.isfinite(x)
        if (finite != np.isfinite(y)).any() or not np.array_equal(x[~finite], y[~finite], equal_nan=True):
            return float("inf")
        if finite.any():
            scale = max(float(np.abs(x[finite]).max()), 1e-30)
            worst = max(worst, float(np.abs(x[finite] - y[finite]).max()) / scale)
    return worst
