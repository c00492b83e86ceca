"""Fluctuation: how much of what a reader makes varies with a unit.

An et al., "Fluctuation-based Adaptive Structured Pruning for Large Language Models" (FLAP, 2023):

    score_j = Var(x_j) ||W_:j||^2

A channel that hardly varies can be replaced by its mean in the reader's bias; where there is no bias the second
moment takes the place of the variance. Needs data: means and variances of what is read.
"""

from __future__ import annotations

import numpy as np

from onnxprune.criteria import magnitude
from onnxprune.criteria.evidence import Evidence, per_unit
from onnxprune.criteria.slices import Scores, normalised
from onnxprune.dependency import Group


def score(group: Group, evidence: Evidence) -> Scores:
    """Sum over readers, each normalised to mean 1."""
    total = np.zeros(group.size)
    seen = evidence.seen(group)
    for reader, units in seen:
        moments = evidence.moments(reader)
        squares = moments.variance + (0.0 if reader.bias is not None else np.square(moments.mean))
        total += normalised(per_unit(units, squares * evidence.energy(reader), group.size))
    return total if seen else magnitude.l2(group, evidence)
