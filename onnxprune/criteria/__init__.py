"""How important each unit of a group is: one file per criterion, one protocol."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from onnxprune.criteria import (
    activation,
    bn,
    fpgm,
    lamp,
    magnitude,
    obs,
    random,
    reconstruction,
    variance,
    wanda,
)
from onnxprune.criteria.evidence import Evidence
from onnxprune.criteria.slices import Scores
from onnxprune.dependency import Group
from onnxprune.errors import UserError

__all__ = ["CRITERIA", "NAMES", "Criterion", "Evidence", "Scores", "needs_data", "score"]


@dataclass(frozen=True, slots=True)
class Criterion:
    """A score per unit of a group, [size], higher is more important; and whether it looks at activations."""

    score: Callable[[Group, Evidence], Scores]
    needs_data: bool = False


CRITERIA: Mapping[str, Criterion] = {
    "l1": Criterion(magnitude.l1),
    "l2": Criterion(magnitude.l2),
    "bn": Criterion(bn.score),
    "fpgm": Criterion(fpgm.score),
    "lamp": Criterion(lamp.score),
    "activation": Criterion(activation.score, needs_data=True),
    "apoz": Criterion(activation.apoz, needs_data=True),
    "variance": Criterion(variance.score, needs_data=True),
    "wanda": Criterion(wanda.score, needs_data=True),
    "obs": Criterion(obs.score, needs_data=True),
    "reconstruction": Criterion(reconstruction.score, needs_data=True),
}
NAMES = (*CRITERIA, "random")


def needs_data(name: str) -> bool:
    """Whether a criterion looks at activations."""
    return name in CRITERIA and CRITERIA[name].needs_data


def score(evidence: Evidence, groups: Sequence[Group], name: str, seed: int = 0) -> dict[Group, Scores]:
    """A score per unit for each group by the criterion of this name; the seed is for `random`.

    Raises `UserError` for an unknown criterion, for one that needs data where there are no statistics, and for
    weights or activations that are not finite.
    """
    if name == "random":
        return {group: random.score(group, seed) for group in groups}
    if name not in CRITERIA:
        raise UserError(f"criterion '{name}' is unknown; choose one of {', '.join(NAMES)}")
    criterion = CRITERIA[name]
    if criterion.needs_data and evidence.statistics is None:
        without = ", ".join(other for other in NAMES if not needs_data(other))
        raise UserError(
            f"{evidence.graph.model.name}: criterion '{name}' looks at activations; give inputs with --data, or "
            f"choose one of {without}"
        )
    return {group: criterion.score(group, evidence) for group in groups}
