"""Prune in steps: a little goes, what stays is repaired, and the repaired network says what goes next.

The outcome is one plan for the original, made with the scores of the last network.
"""

from __future__ import annotations

import numpy as np

from onnxprune import criteria, surgery
from onnxprune.axes import Keep
from onnxprune.blocks import Blocks
from onnxprune.calibration import Calibration
from onnxprune.dependency import DependencyGraph, Group
from onnxprune.model import Model
from onnxprune.passes import Planner
from onnxprune.plan import Plan
from onnxprune.repair import repair

GONE = 0.0  # the score of a unit that went in an earlier step, below all others
LEAST = 1e-30  # of the others


def plan(
    blocks: Blocks,
    planner: Planner,
    calibration: Calibration,
    target: tuple[str, float] | None = None,
) -> Plan:
    """The plan after `planner.options.steps` steps of equal size.

    target  (cost, share to keep), or the options' own
    """
    options = planner.options
    target = target or options.aim
    scores = dict(planner.units.scores)
    for step in range(1, options.steps):
        part = step / options.steps
        here = planner.part(part, target, scores)
        keep = surgery.keep_masks(blocks.graph, here)
        removed = surgery.removed_blocks(blocks, here)
        pruned = surgery.apply(blocks.graph, here, blocks)
        method = "ridge" if options.repair == "none" else options.repair
        repaired = repair(
            method, blocks, keep, removed, pruned, calibration.evidence, calibration.data, options.seed
        )
        graph = DependencyGraph(Model(repaired.proto))
        pairs = correspondence(blocks.graph, keep, graph)
        again = Calibration(graph, calibration.data, calibration.progress)
        evidence = again.evidence if criteria.needs_data(options.criterion) else criteria.Evidence.of(graph)
        mine = [group for group in pairs if group in scores]
        fresh = criteria.score(evidence, [pairs[group] for group in mine], options.criterion, options.seed)
        for group in mine:
            mask = keep.get(group.var, np.ones(group.size, dtype=bool))
            scores[group] = np.full(group.size, GONE)
            scores[group][mask] = np.maximum(fresh[pairs[group]], LEAST)
    return planner.part(1.0, target, scores)


def correspondence(original: DependencyGraph, keep: Keep, pruned: DependencyGraph) -> dict[Group, Group]:
    """For groups of the original their counterparts in the pruned model: those of as many units, at the same
    place in the same tensors."""
    there: dict[tuple[object, ...], list[Group]] = {}
    for group in pruned.groups:
        there.setdefault(_place(group), []).append(group)
    here: dict[tuple[object, ...], list[Group]] = {}
    for group in original.groups:
        left = int(keep[group.var].sum()) if group.var in keep else group.size
        if left > 1:  # a single unit is no group any more
            here.setdefault(_place(group), []).append(group)
    found: dict[Group, Group] = {}
    for place, groups in here.items():
        others = there.get(place, [])
        if len(others) == len(groups):
            for group, other in zip(_ordered(groups), _ordered(others), strict=True):
                left = int(keep[group.var].sum()) if group.var in keep else group.size
                if other.size == left:
                    found[group] = other
    return found


def _place(group: Group) -> tuple[object, ...]:
    """Where a group occurs: node outputs keep their names through a cut."""
    return tuple(sorted({(o.node.result, o.input, o.axis, o.role) for o in group.occurrences}))


def _ordered(groups: list[Group]) -> list[Group]:
    """Parts of one axis by where they start."""
    return sorted(groups, key=lambda group: (group.inner, group.start))
