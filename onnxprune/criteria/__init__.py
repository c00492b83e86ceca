"""How important each unit of a group is: one file per criterion, one protocol."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import numpy.typing as npt

from onnxprune.criteria import bn, fpgm, magnitude, random
from onnxprune.criteria.slices import Slices
from onnxprune.dependency import DependencyGraph, Group
from onnxprune.errors import UserError

Scores = npt.NDArray[np.float64]
Criterion = Callable[[Group, Slices], Scores]

CRITERIA: Mapping[str, Criterion] = {
    "l1": magnitude.l1,
    "l2": magnitude.l2,
    "bn": bn.score,
    "fpgm": fpgm.score,
}
NAMES = (*CRITERIA, "random")


def score(graph: DependencyGraph, groups: list[Group], criterion: str, seed: int = 0) -> dict[Group, Scores]:
    """A score per unit for each group; higher is more important.

    Raises `UserError` for an unknown criterion or weights that are not finite.
    """
    if criterion == "random":
        return {group: random.score(group, seed) for group in groups}
    if criterion not in CRITERIA:
        raise UserError(f"criterion '{criterion}' is unknown; choose one of {', '.join(NAMES)}")
    slices = Slices(graph)
    return {group: CRITERIA[criterion](group, slices) for group in groups}
