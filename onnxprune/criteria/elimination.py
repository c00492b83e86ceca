"""Units taken one by one out of a pair of symmetric matrices over channels, each time the best of those left.

A unit with the channels S is worth tr(P_SS^-1 A_SS); when it is taken,

    A -> (I - G) A (I - G)^T,   P -> (I - G) P,   G = P_:S P_SS^-1 (in the columns S, zero elsewhere)

This is the elimination of a pivoted Cholesky factorisation, carried along by A. Columns are brought up to date
when they are needed and the whole matrices every `PANEL` channels, by products of matrices, as LAPACK's dpstrf
does (Lucas, "LAPACK-Style Codes for Level 2 and 3 Pivoted Cholesky Factorizations", 2004).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from onnxprune.axes import IntArray
from onnxprune.criteria.slices import Scores
from onnxprune.statistics import Floats

PANEL = 64  # channels between two updates of the whole matrices
SMALLEST = 1e-12  # pivot; those of the criteria are at least their damping


class Elimination:
    """One pair of matrices [channels, channels], which it takes over; units [channels], none negative."""

    def __init__(self, units: IntArray, pivots: Floats, targets: Floats) -> None:
        self.here, rows, counts = np.unique(units, return_inverse=True, return_counts=True)
        width = int(counts.max())
        order = np.argsort(rows, kind="stable")
        column = np.arange(len(units)) - np.repeat(np.cumsum(counts) - counts, counts)
        self.places = np.full((len(self.here), width), -1, dtype=np.int64)  # channels of each unit; -1: none
        self.places[rows[order], column] = order
        self.pivots, self.targets = pivots, targets
        self.gains = np.empty((max(PANEL, width), len(units)))
        self.moves = np.empty_like(self.gains)
        self.heights = np.empty(len(self.gains))
        self.used = 0
        self._look()

    def values(self) -> Scores:
        """What each unit `here` is worth now; of no meaning for one that was taken."""
        if self.places.shape[1] == 1:
            found = self.own_targets[:, 0, 0] / np.maximum(self.own_pivots[:, 0, 0], SMALLEST)
        else:
            found = np.einsum("uii->u", np.linalg.solve(self.own_pivots, self.own_targets))
        return np.maximum(found, 0.0)

    def take(self, unit: int) -> None:
        row = int(np.searchsorted(self.here, unit))
        places = self.places[row][self.places[row] >= 0]
        if self.used + len(places) > len(self.gains):
            self._update()
            places = self.places[row][self.places[row] >= 0]
        first = self.used
        for place in places:
            self._eliminate(int(place))
        gains, moves = self._own(self.gains[first : self.used]), self._own(self.moves[first : self.used])
        heights = self.heights[first : self.used]
        self.own_pivots -= np.einsum("k,kui,kuj->uij", heights, gains, gains)
        cross = np.einsum("kui,kuj->uij", moves, gains)
        self.own_targets -= cross + cross.transpose(0, 2, 1)
        self.places[row] = -1
        self.own_pivots[row] = np.eye(self.places.shape[1])
        self.own_targets[row] = 0.0

    def _eliminate(self, place: int) -> None:
        k = self.used
        gains, moves, heights = self.gains[:k], self.moves[:k], self.heights[:k]
        pivot = self.pivots[place] - (heights * gains[:, place]) @ gains
        target = self.targets[place] - moves[:, place] @ gains - gains[:, place] @ moves
        height = max(float(pivot[place]), SMALLEST)
        gain = pivot / height
        self.gains[k], self.heights[k] = gain, height
        self.moves[k] = target - (target[place] / 2) * gain
        self.used += 1

    def _update(self) -> None:
        """Bring the matrices up to date and leave out what was taken."""
        gains, moves = self.gains[: self.used], self.moves[: self.used]
        stay = np.sort(self.places[self.places >= 0])
        gains, moves = gains[:, stay], moves[:, stay]
        self.pivots = self.pivots[np.ix_(stay, stay)]
        self.pivots -= (gains * self.heights[: self.used, None]).T @ gains
        cross = moves.T @ gains
        self.targets = self.targets[np.ix_(stay, stay)]
        self.targets -= cross
        self.targets -= cross.T
        self.places = np.where(self.places >= 0, np.searchsorted(stay, self.places), -1)
        self.gains = np.empty((len(self.gains), len(stay)))
        self.moves = np.empty_like(self.gains)
        self.used = 0
        self._look()

    def _look(self) -> None:
        """The blocks of each unit, padded with those of the identity and of zero."""
        inside = self.places >= 0
        both = inside[:, :, None] & inside[:, None, :]
        rows, columns = self.places[:, :, None], self.places[:, None, :]
        self.own_pivots = np.where(both, self.pivots[rows, columns], np.eye(inside.shape[1]))
        self.own_targets = np.where(both, self.targets[rows, columns], 0.0)

    def _own(self, panel: Floats) -> Floats:
        """[columns of the panel, units, channels of a unit]."""
        return np.where(self.places >= 0, panel[:, self.places], 0.0)


def greedy(parts: Sequence[Elimination], size: int, largest: bool) -> tuple[IntArray, Scores]:
    """The order in which `size` units are taken, the least (or the largest) worth first, and what each was worth
    then."""
    holders: list[list[int]] = [[] for _ in range(size)]
    worth = np.zeros(size)
    latest = []
    for i, part in enumerate(parts):
        for unit in part.here:
            holders[unit].append(i)
        latest.append(part.values())
        worth[part.here] += latest[i]
    order = np.empty(size, dtype=np.int64)
    values = np.empty(size)
    barred = -np.inf if largest else np.inf
    for k in range(size):
        unit = int(np.argmax(worth) if largest else np.argmin(worth))
        order[k], values[k] = unit, max(worth[unit], 0.0)
        for i in holders[unit]:
            part = parts[i]
            part.take(unit)
            new = part.values()
            worth[part.here] += new - latest[i]
            latest[i] = new
        worth[unit] = barred
    return order, values


def rising(order: IntArray, values: Scores) -> Scores:
    """Scores by unit that rise along the order in which units go and add up to the values.

    Where values fall along the order they share their mean (isotonic regression by pooling adjacent violators;
    Barlow et al., "Statistical Inference under Order Restrictions", 1972): sums of the first scores are those of
    the values at the ends of a pool, and below them inside. Equal scores are told apart by the last bit.
    """
    pools: list[tuple[float, int]] = []
    for value in values:
        mean, count = float(value), 1
        while pools and pools[-1][0] > mean:
            other, number = pools.pop()
            mean = (mean * count + other * number) / (count + number)
            count += number
        pools.append((mean, count))
    level = np.repeat([mean for mean, _ in pools], [count for _, count in pools])
    scores = np.empty(len(order))
    last = -np.inf
    for unit, value in zip(order, level, strict=True):
        last = max(float(value), float(np.nextafter(last, np.inf)))
        scores[unit] = last
    return scores
