"""Magnitude: the norm of a unit's weights, summed over every layer it occurs in.

Li et al., "Pruning Filters for Efficient ConvNets" (2017); summed over coupled layers as in Fang et
al., "DepGraph" (2023). Each weight's norms are divided by their mean first. Needs no data.
"""

from __future__ import annotations

import numpy as np

from onnxprune.criteria.evidence import Evidence
from onnxprune.criteria.slices import Scores, normalised
from onnxprune.dependency import Group


def l1(group: Group, evidence: Evidence) -> Scores:
    """Sum over weights of ||slice||_1, each weight normalised to mean 1."""
    return _score(group, evidence, 1)


def l2(group: Group, evidence: Evidence) -> Scores:
    """Sum over weights of ||slice||_2, each weight normalised to mean 1."""
    return _score(group, evidence, 2)


def _score(group: Group, evidence: Evidence, order: int) -> Scores:
    total = np.zeros(group.size)
    for occurrence in group.occurrences:
        if occurrence.role == "shift":
            continue
        norms = evidence.slices.norm(group, occurrence, order)
        if norms is not None:
            total += normalised(norms)
    return total
