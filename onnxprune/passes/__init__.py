"""What to change: each pass reads the graph and returns edits of a plan."""

from __future__ import annotations

from onnxprune.blocks import Blocks
from onnxprune.model import uncollected
from onnxprune.passes import layers, units
from onnxprune.passes.options import Options
from onnxprune.plan import Plan

__all__ = ["Options", "plan"]


@uncollected
def plan(blocks: Blocks, options: Options, digest: str) -> Plan:
    """Decide what goes: residual blocks first, then units of what stays.

    Raises `UserError` if a target cannot be reached.
    """
    removed = []
    if options.layers is not None:
        removed = layers.plan(blocks, options.layers, options.layer_criterion, options.exclude, options.seed)
    keeps, solved = units.plan(blocks, options, removed)
    given = options.stated() | ({} if solved is None else {"solved_ratio": solved})
    return Plan(digest, (*removed, *keeps), given)
