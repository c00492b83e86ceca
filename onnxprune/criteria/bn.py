"""BatchNorm scale: |gamma| of the normalisations a unit passes through.

Liu et al., "Learning Efficient Convolutional Networks through Network Slimming" (2017). Groups
without a normalisation (those of models whose normalisations were folded) fall back to L2 magnitude. Needs no
data.
"""

from __future__ import annotations

import numpy as np

from onnxprune.criteria import magnitude
from onnxprune.criteria.evidence import Evidence
from onnxprune.criteria.slices import Scores, normalised
from onnxprune.dependency import Group


def score(group: Group, evidence: Evidence) -> Scores:
    """Sum over normalisations of |gamma|, each normalised to mean 1."""
    total = np.zeros(group.size)
    gains = [o for o in group.occurrences if o.role == "gain"]
    for occurrence in gains:
        norms = evidence.slices.norm(group, occurrence, 1)
        if norms is not None:
            total += normalised(norms)
    return total if gains else magnitude.l2(group, evidence)
