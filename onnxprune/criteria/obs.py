"""Optimal brain surgeon: what the readers' outputs lose when a unit goes and the others make up for it.

Hassibi and Stork, "Second order derivatives for network pruning: Optimal Brain Surgeon" (1992), with the Gram
matrix H of the reader's input as the curvature of its squared output error (Frantar and Alistarh, "Optimal
Brain Compression", 2022), blocks of channels as in Kurtic et al., "ZipLM" (2023), and the errors of all readers
of a group added up:

    rho_S = tr(W_S ([H^-1]_SS)^-1 W_S^T),   then   W -= W_S ([H^-1]_SS)^-1 [H^-1]_S,:

The least goes first; W and H^-1 are brought up to date after every unit, so that of two units that say the same
only one is cheap. A unit's score is the share of its readers' output variance that is lost when it goes, so the
scores of the units removed add up to the predicted error (see `elimination.rising`). Needs data: covariances of
what is read, about the mean where the reader has a bias; of very many channels those of blocks.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from onnxprune.axes import IntArray
from onnxprune.criteria import magnitude
from onnxprune.criteria.elimination import Elimination, greedy, rising
from onnxprune.criteria.evidence import Evidence
from onnxprune.criteria.slices import Scores
from onnxprune.dependency import Group
from onnxprune.readers import Reader
from onnxprune.statistics import Floats, Moments

DAMPING = 1e-3  # of each channel's own variance, added to it: scores do not depend on the scale of a channel
SMALLEST = float(np.finfo(np.float32).tiny)  # variance; below it a channel is constant


def score(group: Group, evidence: Evidence) -> Scores:
    """The share of output variance lost as each unit goes, in the order in which they go."""
    forms = quadratics(group, evidence)
    if not forms:
        return unread(group, evidence)
    parts = []
    for form in forms:
        own = np.flatnonzero(form.units >= 0)
        inverse = np.linalg.inv(form.gram)[np.ix_(own, own)]
        parts.append(Elimination(form.units[own], (inverse + inverse.T) / 2, form.weight[np.ix_(own, own)]))
    return rising(*greedy(parts, group.size, largest=False))


def unread(group: Group, evidence: Evidence) -> Scores:
    """For units that no stored weight reads (widths of queries and keys): shares of the squared magnitude."""
    energy = np.square(magnitude.l2(group, evidence))
    total = float(energy.sum())
    return energy / total if total > 0 else np.full(group.size, 1 / group.size)


@dataclass(frozen=True, eq=False, slots=True)
class Quadratic:
    """The error of one group of channels of one reader: tr(weight gram) is its share of the reader's variance.

    units   [channels], -1: of another group, or of none
    gram    [channels, channels], positive definite: correlations with the damping
    weight  [channels, channels]: W^T W, for channels of variance 1
    """

    units: IntArray
    gram: Floats
    weight: Floats


def quadratics(group: Group, evidence: Evidence) -> list[Quadratic]:
    """Of all readers of a group."""
    forms: list[Quadratic] = []
    for reader, units in evidence.seen(group):
        forms += _forms(evidence, reader, units, evidence.moments(reader))
    return forms


def _forms(evidence: Evidence, reader: Reader, units: IntArray, moments: Moments) -> list[Quadratic]:
    """One for each group of channels, and for each block of it whose covariance is known."""
    deviations = _deviations(reader, moments)
    flat = evidence.weight(reader).transpose(0, 2, 1, 3).reshape(*deviations.shape, -1)
    found, total = [], 0.0
    for block, here in enumerate(moments.slices):
        own = deviations[:, here]
        scale = own[:, :, None] * own[:, None, :]
        grams = moments.second(reader.bias is not None, block) / np.where(scale > 0, scale, 1.0)
        weights = (flat[:, here] @ flat[:, here].transpose(0, 2, 1)).astype(np.float64) * scale
        along = np.arange(grams.shape[1])
        grams[:, along, along] = (
            1.0 + DAMPING
        )  # a constant channel, too: it has no correlations and no weight
        total += float(np.einsum("gcd,gcd->", weights, grams))
        found += list(zip(units[:, here], grams, weights, strict=True))
    return [
        Quadratic(units, gram, weight / total)
        for units, gram, weight in found
        if total > 0 and (units >= 0).any()
    ]


def _deviations(reader: Reader, moments: Moments) -> Floats:
    """[groups, channels]: square roots of the variances, or of the second moments; 0 for a constant."""
    squares = moments.variance + (0.0 if reader.bias is not None else np.square(moments.mean))
    return np.sqrt(np.where(squares > SMALLEST, squares, 0.0))
