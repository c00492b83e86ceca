"""Size of activations: what is small, or mostly zero, where it is read goes first.

mean |x|: Molchanov et al., "Pruning Convolutional Neural Networks for Resource Efficient Inference" (2017).
APoZ: Hu et al., "Network Trimming: A Data-Driven Neuron Pruning Approach towards Efficient Deep Architectures"
(2016): the average percentage of zeros; here what is not positive counts as zero. Needs data: means of |x| and
of x > 0 by channel.
"""

from __future__ import annotations

import numpy as np

from onnxprune.criteria import magnitude
from onnxprune.criteria.evidence import Evidence, per_unit
from onnxprune.criteria.slices import Scores, normalised
from onnxprune.dependency import Group


def score(group: Group, evidence: Evidence) -> Scores:
    """Sum over the activations that hold the units of mean |x|, each normalised to mean 1."""
    total = np.zeros(group.size)
    seen = evidence.sources(group)
    for reader, units in seen:
        moments = evidence.moments(reader)
        total += normalised(per_unit(units, moments.absolute / max(moments.count, 1), group.size))
    return total if seen else magnitude.l2(group, evidence)


def apoz(group: Group, evidence: Evidence) -> Scores:
    """1 - APoZ, in [0, 1]: the mean over channels and activations of the share of x > 0."""
    positive = np.zeros(group.size)
    counted = np.zeros(group.size)
    seen = evidence.sources(group)
    for reader, units in seen:
        moments = evidence.moments(reader)
        positive += per_unit(units, moments.active / max(moments.count, 1), group.size)
        counted += per_unit(units, np.ones_like(moments.active), group.size)
    return positive / np.maximum(counted, 1) if seen else magnitude.l2(group, evidence)
