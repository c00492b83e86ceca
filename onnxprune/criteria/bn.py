"""BatchNorm scale: |gamma| of the normalisations a unit passes through.

Liu et al., "Learning Efficient Convolutional Networks through Network Slimming" (2017). Groups
without a normalisation fall back to L2 magnitude. Needs no data.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from onnxprune.criteria import magnitude
from onnxprune.criteria.slices import Slices, normalised
from onnxprune.dependency import Group


def score(group: Group, slices: Slices) -> npt.NDArray[np.float64]:
    """Sum over normalisations of |gamma|, each normalised to mean 1."""
    total = np.zeros(group.size)
    gains = [o for o in group.occurrences if o.role == "gain"]
    for occurrence in gains:
        norms = slices.norm(group, occurrence, 1)
        if norms is not None:
            total += normalised(norms)
    return total if gains else magnitude.l2(group, slices)
