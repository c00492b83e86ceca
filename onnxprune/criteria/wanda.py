"""Wanda: magnitude of weights times the norm of what they multiply.

Sun et al., "A Simple and Effective Pruning Approach for Large Language Models" (2023), summed over the outputs
and taps of every reader to score whole units:

    score_j = sum_o,t |W_ojt| ||x_j||_2

Needs data: second moments of what is read.
"""

from __future__ import annotations

import numpy as np

from onnxprune.criteria import magnitude
from onnxprune.criteria.evidence import Evidence, per_unit
from onnxprune.criteria.slices import Scores, normalised
from onnxprune.dependency import Group


def score(group: Group, evidence: Evidence) -> Scores:
    """Sum over readers, with the root of the mean square for the norm, each normalised to mean 1."""
    total = np.zeros(group.size)
    seen = evidence.seen(group)
    for reader, units in seen:
        moments = evidence.moments(reader)
        norms = np.sqrt(moments.variance + np.square(moments.mean))
        sizes = np.abs(evidence.weight(reader)).sum(axis=(1, 3), dtype=np.float64)
        total += normalised(per_unit(units, norms * sizes, group.size))
    return total if seen else magnitude.l2(group, evidence)
