"""Reconstruction: the units from which the readers' outputs can best be made again.

Luo et al., "ThiNet: A Filter Level Pruning Method for Deep Neural Network Compression" (2017): choose channels
greedily by the squared error of the next layer's output, which least squares on the chosen ones leave. Here
what is kept grows: with R the covariance of the input that the kept channels leave unexplained, a unit S gains

    tr(W R_:S (R_SS)^-1 R_S: W^T),   then   R -= R_:S (R_SS)^-1 R_S:

(pivoted Cholesky, as in orthogonal matching pursuit). The most goes in first; channels of other groups are in
from the start. A unit's score is the share of output variance that it added to what was explained, so that
the scores of what is left out add up to the residual.

`obs` has the same residual and looks at it from the other end: it starts with everything and takes the least
away, which is the better choice where most units stay; this starts with nothing, which is the better one where
few do. Needs data: covariances of what is read, about the mean where the reader has a bias.
"""

from __future__ import annotations

import numpy as np

from onnxprune.criteria import obs
from onnxprune.criteria.elimination import Elimination, greedy, rising
from onnxprune.criteria.evidence import Evidence
from onnxprune.criteria.slices import Scores
from onnxprune.dependency import Group


def score(group: Group, evidence: Evidence) -> Scores:
    """The share of output variance that each unit adds to what those chosen before it explain."""
    forms = obs.quadratics(group, evidence)
    if not forms:
        return obs.unread(group, evidence)
    parts = []
    for form in forms:
        own, others = form.units >= 0, form.units < 0
        left = form.gram[np.ix_(own, own)]
        if others.any():
            cross = form.gram[np.ix_(others, own)]
            left = left - cross.T @ np.linalg.solve(form.gram[np.ix_(others, others)], cross)
            left = (left + left.T) / 2
        explained = left @ form.weight[np.ix_(own, own)] @ left
        parts.append(Elimination(form.units[own], left, explained))
    order, values = greedy(parts, group.size, largest=True)
    return rising(order[::-1], values[::-1])
