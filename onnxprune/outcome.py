"""What a plan comes to, in numbers and in words: the parts of a report that need no run."""

from __future__ import annotations

import math
import platform
from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import onnx
import onnxruntime

from onnxprune import __version__, allocation, surgery
from onnxprune.blocks import Blocks
from onnxprune.cost import Cost, CostModel
from onnxprune.dependency import DependencyGraph, Group, Occurrence
from onnxprune.model import Model, expected_bytes
from onnxprune.naming import group_names
from onnxprune.passes import Options, units
from onnxprune.passes.options import COSTS
from onnxprune.plan import Plan
from onnxprune.report import Change, Padding, Part
from onnxprune.runtime import crash

MISSED = 0.02  # a share that misses its target by more deserves a note


def cost(blocks: Blocks, plan: Plan) -> Cost:
    """Of what a plan leaves."""
    graph, keep = blocks.graph, surgery.keep_masks(blocks.graph, plan)
    gone = blocks.gone(surgery.removed_blocks(blocks, plan))
    return CostModel(graph, gone)({var: int(mask.sum()) for var, mask in keep.items()})


def with_added(cut: Cost, pruned: onnx.ModelProto, made: onnx.ModelProto) -> Cost:
    """The cost of a pruned model with the biases that repair has added."""
    known = {tensor.name for tensor in pruned.graph.initializer}
    added = [tensor for tensor in made.graph.initializer if tensor.name not in known]
    return replace(
        cut,
        params=cut.params + sum(math.prod(tensor.dims) for tensor in added),
        bytes=cut.bytes + sum(expected_bytes(tensor) for tensor in added),
    )


def changes(blocks: Blocks, plan: Plan) -> dict[str, Change]:
    """What goes, by role: units of groups, and residual blocks."""
    groups = {group.name: group for group in blocks.graph.groups}
    found: dict[str, Change] = {}
    for edit in plan.keeps:
        role = blocks.role(groups[edit.group])
        found[role] = found.get(role, Change()) + Change(1, edit.size, len(edit.units))
    if plan.removals:
        before = len(blocks.residual)
        found["layers"] = Change(len(plan.removals), before, before - len(plan.removals))
    return found


def parts(blocks: Blocks, plan: Plan) -> tuple[Part, ...]:
    """Every group and every removed block, in the order of the graph."""
    removed = surgery.removed_blocks(blocks, plan)
    gone = blocks.gone(removed)
    counts = {
        group: count
        for group, count in _kept(blocks.graph, plan).items()
        if not all(node.index in gone for node in group.nodes)
    }
    taken = [(min(blocks.gone([block])), Part(block.name, block.name, "layers", 1, 0)) for block in removed]
    return _ordered([*_parts(blocks, counts), *taken])


def found_parts(blocks: Blocks, candidate: Model) -> tuple[Part, ...]:
    """The same of a candidate whose plan is not known: units are counted on the weights that have kept their names."""
    counts = {}
    for group in blocks.graph.groups:
        left = [_left(group, place, blocks.graph.model, candidate) for place in group.occurrences]
        known = {count for count in left if count is not None}
        if len(known) == 1:
            counts[group] = known.pop()
    return _ordered(_parts(blocks, counts))


def _kept(graph: DependencyGraph, plan: Plan) -> dict[Group, int]:
    """Units that the edits of a plan leave in every group."""
    left = {edit.group: len(edit.units) for edit in plan.keeps}
    return {group: left.get(group.name, group.size) for group in graph.groups}


def _parts(blocks: Blocks, counts: Mapping[Group, int]) -> list[tuple[int, Part]]:
    labels = group_names(blocks)
    return [
        (
            min(node.index for node in group.nodes),
            Part(group.name, labels[group], blocks.role(group), group.size, count),
        )
        for group, count in counts.items()
    ]


def _ordered(placed: list[tuple[int, Part]]) -> tuple[Part, ...]:
    return tuple(part for _, part in sorted(placed, key=lambda one: (one[0], one[1].name)))


def _left(group: Group, place: Occurrence, original: Model, candidate: Model) -> int | None:
    """Units of a group on an axis of a weight of the candidate; none where others share the axis, or it has another
    rank or is gone."""
    before, after = original.constants.get(place.tensor), candidate.constants.get(place.tensor)
    if before is None or after is None or len(before.dims) != len(after.dims):
        return None
    extent, left = before.dims[place.axis], after.dims[place.axis]
    if extent % group.size or (left * group.size) % extent or extent != group.size * group.stride:
        return None
    return left * group.size // extent


def padding(blocks: Blocks, plan: Plan, options: Options, made_by: units.Units | None) -> Padding:
    """What is lost to kernels that compute whole blocks of channels; `made_by` is none where a plan was read.

    Both models are counted as kernels compute them. Without a target as onnxruntime does on x86: an original off multiples
    of 4 costs more than its blocks filled up.
    """
    graph = blocks.graph
    model = CostModel(graph, blocks.gone(surgery.removed_blocks(blocks, plan)))
    kernels = options.kernels if options.targets else replace(options.kernels, whole=True)

    def filled(group: Group, count: int) -> int:
        return kernels.filled(group, count)

    before = CostModel(graph)({group.var: filled(group, group.size) for group in graph.groups}).macs
    after = model({group.var: filled(group, count) for group, count in _kept(graph, plan).items()}).macs
    exact = made_by.unrounded() if made_by is not None else None
    asked = None
    if exact is not None:
        asked = model({group.var: count for group, count in exact.items()}).macs / max(
            CostModel(graph)().macs, 1
        )
    return Padding(f"{options.kernels}", after / max(before, 1), asked)


def missed(plan: Plan, kept: Mapping[str, float]) -> list[str]:
    """That a target was overshot by far, as happens where whole blocks of channels go at once."""
    if "max_drop" in plan.options:
        return []
    found = []
    for name in COSTS:
        wish, align = plan.options.get(name), plan.options.get("align")
        if isinstance(wish, int | float) and kept[name] < wish - MISSED:
            why = "units are large"
            if align != 1:
                why = f"counts are rounded to {align}, a smaller --align comes nearer"
            found.append(f"--{name} {wish:g} could not be met exactly: {kept[name]:.3f} is kept ({why})")
    return found


def notes(blocks: Blocks, plan: Plan) -> tuple[str, ...]:
    """What a reader of the report should know about the graph and the cut."""
    graph = blocks.graph
    found = []
    if blocks.cached:
        found.append(f"attention heads are pinned by a key/value cache: {', '.join(blocks.cached)}")
    lossy = sum(edit.kind == "lossy" for edit in plan.keeps)
    if lossy:
        found.append(f"{lossy} groups are lossy: statistics are now taken over fewer units")
    if inlined := graph.model.inlined:
        named = ", ".join(f"{name} ({count})" for name, count in inlined.items())
        found.append(f"calls of local functions, unfolded into the graph: {named}")
    if graph.opaque:
        named = ", ".join(f"{name} ({count})" for name, count in sorted(graph.opaque.items()))
        found.append(f"operators without a declaration, whose axes are pinned: {named}")
    return tuple(found)


def pinned_reasons(graph: DependencyGraph) -> dict[str, int]:
    """How many weight axes are pinned, by reason."""
    counted: dict[str, int] = {}
    for axis in graph.pinned:
        counted[axis.reason.text] = counted.get(axis.reason.text, 0) + 1
    return dict(sorted(counted.items(), key=lambda item: (-item[1], item[0])))


def versions() -> dict[str, str]:
    """Of what results depend on."""
    return {
        "onnxprune": __version__,
        "onnx": onnx.__version__,
        "onnxruntime": onnxruntime.__version__,
        "numpy": np.__version__,
        "python": platform.python_version(),
    }


def provenance(model: Model, plan: Plan) -> dict[str, object]:
    """What it takes to repeat a run."""
    return {
        **versions(),
        "model_sha256": plan.model,
        "opset": model.opset(),
        "options": dict(plan.options),
    }


def nothing(blocks: Blocks, options: Options) -> str:
    """One sentence that says why nothing is removed."""
    graph = blocks.graph
    name = graph.model.name
    skipped = units.skipped_reasons(units.choose(blocks, options))
    if not graph.groups:
        reasons = [
            f"{_count(count, 'axis', 'axes')}: {reason}" for reason, count in pinned_reasons(graph).items()
        ]
        if (crashing := crash(graph.model.source)) is not None:
            reasons.insert(0, f"onnxruntime cannot run it, {crashing}")
        opaque = ", ".join(sorted(graph.opaque))
        unknown = "it holds no weights"
        names = (output for node in graph.model.nodes for output in node.outputs if output)
        if hidden := next((name for name in names if graph.shapes.shapes.get(name) is None), None):
            unknown = f"the shape of '{hidden}' is unknown"
        inputs = (value.name for value in graph.model.inputs)
        if shapeless := next((name for name in inputs if graph.shapes.shapes.get(name) is None), None):
            unknown = f"the shape of input '{shapeless}' is not stated"
        why = "; ".join(reasons[:4]) or (f"operators without a declaration: {opaque}" if opaque else unknown)
        return f"{name}: nothing is prunable ({why}); no file was written"
    left = ", ".join(f"{count} {reason}" for reason, count in skipped.items())
    rest = len(graph.groups) - sum(skipped.values())
    parts = [part for part in (left, f"{rest} too small to lose a whole block" if rest else "") if part]
    advice = (
        "; try a larger ratio or --align 1"
        if rest and options.alignment != allocation.Alignment.of(1)
        else ""
    )
    found = _count(len(graph.groups), "group", "groups")
    present = {blocks.role(group) for group in graph.groups}
    absent = ", ".join(role for role in options.asked if role not in present)
    why = f"; there are no {absent} that could be cut" if absent else ""
    if blocks.cached and "heads" in options.asked:
        why += f"; heads are pinned by a key/value cache, {blocks.cached[0]}"
    counted = f"{found}: {', '.join(parts)}"
    return f"{name}: nothing to remove at this setting ({counted}{why}){advice}; no file was written"


def _count(number: int, one: str, many: str) -> str:
    return f"{number} {one if number == 1 else many}"
