"""What to change: each pass reads the graph and returns edits of a plan."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from onnxprune import criteria
from onnxprune.blocks import Blocks
from onnxprune.calibration import Calibration
from onnxprune.dependency import Group
from onnxprune.model import uncollected
from onnxprune.passes import layers, units
from onnxprune.passes.options import REPAIRS, Options
from onnxprune.plan import Plan, Remove

__all__ = ["REPAIRS", "Options", "Planner", "plan"]


class Planner:
    """Makes plans for one model; layers are ranked and units scored once.

    options      resolved (`Options.resolved`)
    calibration  data, for what needs it

    Raises `UserError` for options that cannot be met.
    """

    @uncollected
    def __init__(
        self, blocks: Blocks, options: Options, digest: str, calibration: Calibration | None = None
    ) -> None:
        self.options = options
        self.digest = digest
        self.removed: list[Remove] = []
        if options.layers is not None:
            data = None if calibration is None else calibration.data
            self.removed = layers.plan(
                blocks, options.layers, options.layer_criterion, options.exclude, options.seed, data
            )
        self.units = units.Units(blocks, options, self.removed, calibration)

    @uncollected
    def plan(self, target: tuple[str, float] | None = None) -> Plan:
        """Residual blocks first, then units of what stays; for this target (cost, share to keep), or the
        options' own. Raises `UserError` if it cannot be reached."""
        return self._plan(self.units.decide(target), target)

    @uncollected
    def part(
        self, share: float, target: tuple[str, float] | None, scores: Mapping[Group, criteria.Scores]
    ) -> Plan:
        """A plan that goes this share of the way, with these scores."""
        if target is not None:
            target = target[0], 1 - share * (1 - target[1])
        return self._plan(self.units.rescored(scores).decide(target, share), target)

    def _plan(self, decision: units.Decision, target: tuple[str, float] | None) -> Plan:
        stated: dict[str, Any] = self.options.stated()
        if target is not None:
            stated[target[0]] = target[1]
        if decision.solved is not None:
            stated["solved_ratio"] = decision.solved
        if decision.error is not None:
            stated["predicted_error"] = decision.error
        return Plan(self.digest, (*self.removed, *decision.removed, *decision.keeps), stated)


def plan(blocks: Blocks, options: Options, digest: str, calibration: Calibration | None = None) -> Plan:
    """Decide what goes: residual blocks first, then units of what stays.

    Raises `UserError` if a target cannot be reached.
    """
    resolved = options.resolved(calibration is not None)
    return Planner(blocks, resolved, digest, calibration).plan()
