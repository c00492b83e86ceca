"""The weights that belong to each unit of a group: their norms, or the weights themselves."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from onnxprune import axes
from onnxprune.dependency import DependencyGraph, Group, Occurrence
from onnxprune.errors import UserError
from onnxprune.model import Array

Rows = npt.NDArray[np.float32]
Scores = npt.NDArray[np.float64]
BLOCK = 2**18  # elements looked at together


class Slices:
    """Looks up unit slices of a model's weights; each tensor is read once for all its axes, block by block."""

    def __init__(self, graph: DependencyGraph) -> None:
        self.graph = graph
        self._sums: dict[tuple[str, int], dict[int, Scores]] = {}

    def norm(self, group: Group, occurrence: Occurrence, order: int) -> Scores | None:
        """||slice||_1 or ||slice||_2 of each unit, or None for a weight that is not stored."""
        if occurrence.tensor not in self.graph.model.constants:
            return None
        sums = self._sums.setdefault((occurrence.tensor, order), {})
        if occurrence.axis not in sums:
            sums |= self._totals(occurrence, order)
        along = sums[occurrence.axis]
        total = np.zeros(group.size)
        for units in self._maps(group, occurrence):
            total += np.bincount(units[units >= 0], along[units >= 0], group.size)
        return total if order == 1 else np.sqrt(total)

    def rows(self, group: Group, occurrence: Occurrence) -> Rows | None:
        """[units, elements of one unit's slice], or None for a weight that is not stored."""
        if occurrence.tensor not in self.graph.model.constants:
            return None
        self.norm(group, occurrence, 1)  # refuses what is not finite
        array = self.graph.model.array(occurrence.tensor).astype(np.float32, copy=False)
        moved = np.moveaxis(array, occurrence.axis, 0)
        moved = moved.reshape(moved.shape[0], -1)
        parts = []
        for units in self._maps(group, occurrence):
            order = np.argsort(units, kind="stable")[int((units < 0).sum()) :]
            parts.append(moved[order].reshape(group.size, -1))
        return parts[0] if len(parts) == 1 else np.concatenate(parts, axis=1)

    def _maps(self, group: Group, occurrence: Occurrence) -> list[axes.IntArray]:
        typed = self.graph.axes_of(occurrence.node, occurrence.input)
        assert typed is not None
        return [units for _, units in axes.unit_maps(typed[occurrence.axis], group.var)]

    def _totals(self, occurrence: Occurrence, order: int) -> dict[int, Scores]:
        array = self.graph.model.array(occurrence.tensor)
        axes = range(min(array.ndim, 2)) if occurrence.axis < 2 else [occurrence.axis]
        with np.errstate(over="ignore", invalid="ignore"):
            totals = _power_sums(array, order, np.float32, axes)
            if not all(np.isfinite(total).all() for total in totals.values()):
                totals = _power_sums(array, order, np.float64, axes)
        if not all(np.isfinite(total).all() for total in totals.values()):
            raise UserError(
                f"{self.graph.model.name}: weight '{occurrence.tensor}' (node '{occurrence.node.label}') holds NaN or "
                "Inf, so its units cannot be ranked; repair the model or pass --exclude for that weight"
            )
        return totals


def _power_sums(array: Array, order: int, dtype: type[np.floating], axes: Sequence[int]) -> dict[int, Scores]:
    """For each of some axes, the sums of |w|^order over everything else."""
    totals = {axis: np.zeros(array.shape[axis]) for axis in axes}
    step = max(BLOCK // max(array[:1].size, 1), 1)
    for start in range(0, len(array), step):
        block = array[start : start + step].astype(dtype, copy=False)
        powers = np.abs(block) if order == 1 else np.square(block)
        if array.ndim > 2 and max(axes) < 2:  # windows first: they are small, and contiguous
            window = math.prod(array.shape[2:])
            powers = (powers.reshape(-1, window) @ np.ones(window, dtype)).reshape(block.shape[:2])
        for axis, total in totals.items():
            here = total[start : start + step] if axis == 0 else total
            others = tuple(a for a in range(powers.ndim) if a != axis)
            here += powers.sum(axis=others, dtype=np.float64)
    return totals


def normalised(values: Scores) -> Scores:
    """Divided by the mean, so that layers of different scale count alike."""
    mean = values.mean()
    return values / mean if mean > 0 else np.ones_like(values)
