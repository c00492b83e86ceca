"""The weights that belong to each unit of a group, as rows of a matrix."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from onnxprune import axes
from onnxprune.dependency import DependencyGraph, Group, Occurrence
from onnxprune.errors import UserError

Rows = npt.NDArray[np.float32]


class Slices:
    """Looks up unit slices of a model's weights; arrays are read once per tensor."""

    def __init__(self, graph: DependencyGraph) -> None:
        self.graph = graph
        self._checked: set[str] = set()

    def rows(self, group: Group, occurrence: Occurrence) -> Rows | None:
        """[units, elements of one unit's slice], or None for a weight that is not stored."""
        model = self.graph.model
        if occurrence.tensor not in model.constants:
            return None
        array = model.array(occurrence.tensor).astype(np.float32, copy=False)
        if occurrence.tensor not in self._checked:
            self._checked.add(occurrence.tensor)
            if not np.isfinite(array).all():
                raise UserError(
                    f"{model.name}: weight '{occurrence.tensor}' (node '{occurrence.node.label}') holds NaN or Inf, "
                    "so its units cannot be ranked; repair the model or pass --exclude for that weight"
                )
        typed = self.graph.axes_of(occurrence.node, occurrence.input)
        assert typed is not None
        moved = np.moveaxis(array, occurrence.axis, 0)
        moved = moved.reshape(moved.shape[0], -1)
        parts = []
        for _, units in axes.unit_maps(typed[occurrence.axis], group.var):
            order = np.argsort(units, kind="stable")[int((units < 0).sum()) :]
            parts.append(moved[order].reshape(group.size, -1))
        return parts[0] if len(parts) == 1 else np.concatenate(parts, axis=1)


def normalised(values: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Divided by the mean, so that layers of different scale count alike."""
    mean = values.mean()
    return values / mean if mean > 0 else np.ones_like(values)
