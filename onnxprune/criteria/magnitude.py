"""Magnitude: the norm of a unit's weights, summed over every layer it occurs in.

Li et al., "Pruning Filters for Efficient ConvNets" (2017); summed over coupled layers as in Fang et
al., "DepGraph" (2023). Each weight's norms are divided by their mean first. Needs no data.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from onnxprune.criteria.slices import Rows, Slices, normalised
from onnxprune.dependency import Group

Scores = npt.NDArray[np.float64]


def l1(group: Group, slices: Slices) -> Scores:
    """Sum over weights of ||slice||_1, each weight normalised to mean 1."""
    return _score(group, slices, 1)


def l2(group: Group, slices: Slices) -> Scores:
    """Sum over weights of ||slice||_2, each weight normalised to mean 1."""
    return _score(group, slices, 2)


def _score(group: Group, slices: Slices, order: int) -> Scores:
    total = np.zeros(group.size)
    for occurrence in group.occurrences:
        if occurrence.role == "shift":
            continue
        rows = slices.rows(group, occurrence)
        if rows is not None:
            total += normalised(norm(rows, order))
    return total


def norm(rows: Rows, order: int) -> Scores:
    """||row||_1 or ||row||_2 of each row."""
    result: Scores
    if order == 1:
        result = np.abs(rows).sum(axis=1, dtype=np.float64)
    else:
        result = np.sqrt(np.einsum("ij,ij->i", rows, rows, dtype=np.float64))
    return result
