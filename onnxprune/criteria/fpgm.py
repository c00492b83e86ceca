"""Distance to the geometric median: filters that the others can stand in for go first.

He et al., "Filter Pruning via Geometric Median" (2019): score_i = sum_j ||w_i - w_j||_2 over the
filters that make the units. Needs no data.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from onnxprune.criteria import magnitude
from onnxprune.criteria.evidence import Evidence
from onnxprune.criteria.slices import Scores, normalised
from onnxprune.dependency import Group


def score(group: Group, evidence: Evidence) -> Scores:
    """Sum over producing weights of each unit's distances to all others, normalised to mean 1."""
    total = np.zeros(group.size)
    makers = [o for o in group.occurrences if o.role == "produce"]
    for occurrence in makers:
        rows = evidence.slices.rows(group, occurrence)
        if rows is not None:
            total += normalised(_distances(rows.astype(np.float64)))
    return total if makers else magnitude.l2(group, evidence)


def _distances(rows: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    squares = np.einsum("ij,ij->i", rows, rows)
    gram = squares[:, None] + squares[None, :] - 2 * (rows @ rows.T)
    np.fill_diagonal(gram, 0)
    result: npt.NDArray[np.float64] = np.sqrt(np.maximum(gram, 0)).sum(axis=1)
    return result
