"""LAMP: squared magnitude as a share of what is left once everything smaller has gone.

Lee et al., "Layer-adaptive sparsity for the magnitude-based pruning" (2021), for slices instead of weights:

    score_u = ||W_u||^2 / sum of ||W_v||^2 over v with ||W_v|| >= ||W_u||

Inside a group it ranks as the magnitude does; between groups it bounds what the output loses, so that the last
unit of every group scores 1. Each weight's squared norms are divided by their mean before they are summed over
coupled layers. Needs no data.
"""

from __future__ import annotations

import numpy as np

from onnxprune.criteria.evidence import Evidence
from onnxprune.criteria.slices import Scores, normalised
from onnxprune.dependency import Group


def score(group: Group, evidence: Evidence) -> Scores:
    """In (0, 1], and 0 for units without weight; of equal units the one of lower index counts as larger."""
    energy = np.zeros(group.size)
    for occurrence in group.occurrences:
        norms = None if occurrence.role == "shift" else evidence.slices.norm(group, occurrence, 2)
        if norms is not None:
            energy += normalised(np.square(norms))
    order = np.argsort(-energy, kind="stable")
    left = np.cumsum(energy[order])
    scores = np.zeros(group.size)
    scores[order] = np.divide(energy[order], left, out=np.zeros(group.size), where=left > 0)
    return scores
