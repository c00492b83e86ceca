"""The whole flow in one direction: model -> graph -> plan -> surgery -> proof -> report."""

from __future__ import annotations

import functools
import math
import os
import platform
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import onnx
import onnxruntime

from onnxprune import __version__, flow, passes, surgery
from onnxprune.axes import Keep
from onnxprune.blocks import Block, Blocks
from onnxprune.cost import CostModel
from onnxprune.dependency import DependencyGraph
from onnxprune.errors import InternalError, NothingToPrune, UserError
from onnxprune.model import FLOATS, Layout, Model, load, materialised, places, save
from onnxprune.passes import Options, units
from onnxprune.passes import fold as folding
from onnxprune.plan import Plan, SetWeight
from onnxprune.report import Change, Report
from onnxprune.runtime import OutOfMemory, RunError, crash
from onnxprune.validation import equivalence

Source = str | os.PathLike[str] | onnx.ModelProto
Progress = Callable[[str], None]


@dataclass(frozen=True)
class Made:
    """A model made from another. Its large weights may still lie in the original's data files."""

    proto: onnx.ModelProto = field(repr=False)
    external: Layout = field(repr=False)
    sources: frozenset[Path] = field(repr=False)

    @functools.cached_property
    def model(self) -> onnx.ModelProto:
        """The model with all its weights in memory."""
        return materialised(self.proto)

    def save(self, path: str | os.PathLike[str]) -> int:
        """Write the model (whole or not at all, never over its original); returns the bytes written."""
        return save(self.proto, path, self.external, self.sources)

    def data_files(self, path: Path) -> frozenset[Path]:
        """The data files that saving to a path may write beside it."""
        return frozenset(places(self.proto, path, self.external).values())


@dataclass(frozen=True)
class Result(Made):
    """A pruned model, the plan that made it and the report."""

    plan: Plan
    report: Report


def open_model(source: Source) -> Model:
    """A checked model from a path or a ModelProto."""
    if not isinstance(source, onnx.ModelProto):
        return load(source)
    try:
        flow.refuse_private(source)
    except flow.Invalid as error:
        raise UserError(str(error)) from None
    return Model(source)


def make_plan(source: Source | Model, options: Options) -> Plan:
    """Decide what to remove, without removing it. Raises `NothingToPrune` if that is nothing."""
    model = source if isinstance(source, Model) else open_model(source)
    return _plan(Blocks(DependencyGraph(model)), options)


def _plan(blocks: Blocks, options: Options) -> Plan:
    plan = passes.plan(blocks, options, blocks.graph.model.digest())
    if plan.removes_nothing:
        raise NothingToPrune(_nothing(blocks, options))
    return plan


def prune(source: Source, options: Options, progress: Progress = lambda _: None) -> Result:
    """Plan, cut and prove.

    Raises `NothingToPrune` if nothing would be removed, `UserError` for bad input, and `InternalError`
    if the result is not the graph it claims to be (it is not returned then).
    """
    clock = _Clock(progress)
    with clock("load"):
        model = open_model(source)
    with clock("analyse"):
        blocks = Blocks(DependencyGraph(model))
    with clock("plan"):
        plan = _plan(blocks, options)
    gone = blocks.gone(surgery.removed_blocks(blocks, plan))
    skipped = units.skipped_reasons(units.choose(blocks, options, gone))
    return _finish(blocks, plan, skipped, clock)


def apply_plan(source: Source, plan: Plan, progress: Progress = lambda _: None) -> Result:
    """Replay a plan on the model it was made for: the same bytes as when it was made."""
    clock = _Clock(progress)
    with clock("load"):
        model = open_model(source)
        digest = model.digest()
        if digest != plan.model:
            raise UserError(
                f"{model.name}: the plan was made for another model (SHA-256 {plan.model[:12]}..., this one is "
                f"{digest[:12]}...); make the plan again for this model"
            )
    with clock("analyse"):
        blocks = Blocks(DependencyGraph(model))
    if plan.removes_nothing:
        raise NothingToPrune(f"{model.name}: the plan removes nothing; no file was written")
    return _finish(blocks, plan, {}, clock)


@dataclass(frozen=True)
class Folded(Made):
    """A canonical model: the same function, `nodes` nodes fewer."""

    nodes: int


def fold(model: Model) -> Folded:
    """Exact canonicalisation; raises `InternalError` if the result computes something else."""
    graph = DependencyGraph(model)  # refuses what no pass should look at
    with np.errstate(all="ignore"):  # weights may be NaN or infinite; the check judges
        proto, edits = folding.fold(model)
    if edits:
        try:
            proof = equivalence.check(graph, {}, proto)
        except OutOfMemory as error:
            raise UserError(_too_large(model, error)) from None
        except RunError as error:
            raise InternalError(
                f"{model.name}: the folded model does not run ({error}); please report it"
            ) from None
        if not proof.passed:
            raise InternalError(
                f"{model.name}: the folded model differs by {proof.error:.2e}; please report it"
            )
    external = dict(model.external)
    if external:  # what was computed from weights in a data file goes to one, too
        place = next(iter(external.values()))
        external = {edit.name: place for edit in edits if isinstance(edit, SetWeight)} | external
    nodes = len(model.nodes) - len(flow.flatten(proto).proto.graph.node)
    return Folded(proto, external, model.files, nodes)


def _finish(blocks: Blocks, plan: Plan, skipped: dict[str, int], clock: _Clock) -> Result:
    graph = blocks.graph
    model = graph.model
    with clock("cut"):
        keep = surgery.keep_masks(graph, plan)
        removed = surgery.removed_blocks(blocks, plan)
        pruned = surgery.apply(graph, plan, blocks)
    with clock("prove"):
        proof = _prove(graph, plan, keep, removed, pruned)
    report = Report(
        model.name,
        CostModel(graph)(),
        CostModel(graph, blocks.gone(removed))({var: int(mask.sum()) for var, mask in keep.items()}),
        _changes(blocks, plan),
        len(graph.groups),
        len(keep),
        proof,
        skipped,
        pinned_reasons(graph),
        _notes(blocks, plan),
        clock.seconds,
        provenance(model, plan),
    )
    return Result(pruned, model.external, model.files, plan, report)


def _changes(blocks: Blocks, plan: Plan) -> dict[str, Change]:
    """What goes, by role: units of groups, and residual blocks."""
    groups = {group.name: group for group in blocks.graph.groups}
    changes: dict[str, Change] = {}
    for edit in plan.keeps:
        role = blocks.role(groups[edit.group])
        changes[role] = changes.get(role, Change()) + Change(1, edit.size, len(edit.units))
    if plan.removals:
        before = len(blocks.residual)
        changes["layers"] = Change(len(plan.removals), before, before - len(plan.removals))
    return changes


def _prove(
    graph: DependencyGraph, plan: Plan, keep: Keep, removed: list[Block], pruned: onnx.ModelProto
) -> equivalence.Equivalence:
    """The equivalence check; a failure keeps what is needed to reproduce it."""
    try:
        proof = equivalence.check(graph, keep, pruned, removed)
    except OutOfMemory as error:
        raise UserError(_too_large(graph.model, error)) from None
    except RunError as error:
        raise InternalError(_unsound(graph.model, plan, pruned, f"onnxruntime refuses it: {error}")) from None
    if not proof.passed:
        if math.isinf(proof.error) and (name := _not_finite(graph)) is not None:
            raise UserError(
                f"{graph.model.name}: weight '{name}' holds NaN or Inf, so the result cannot be checked; repair the "
                "model or pass --exclude for that weight"
            )
        why = f"it differs from the masked original by {proof.error:.2e} of the output's scale"
        raise InternalError(_unsound(graph.model, plan, pruned, why))
    return proof


def _not_finite(graph: DependencyGraph) -> str | None:
    """A weight of some group that holds NaN or Inf."""
    names = dict.fromkeys(o.tensor for group in graph.groups for o in group.occurrences)
    for name in names:
        tensor = graph.model.constants.get(name)
        if tensor is not None and tensor.data_type in FLOATS:
            if not np.isfinite(graph.model.array(name).astype(np.float64)).all():
                return name
    return None


def _too_large(model: Model, error: OutOfMemory) -> str:
    return f"{model.name}: too little memory to check the result ({error}); nothing was written"


def _unsound(model: Model, plan: Plan, pruned: onnx.ModelProto, why: str) -> str:
    """What to say about a wrong result; it is kept with its plan, for a report."""
    try:
        folder = Path(tempfile.mkdtemp(prefix="onnxprune-report-"))
        (folder / "plan.json").write_text(plan.to_json(), encoding="utf-8")
        save(pruned, folder / "rejected.onnx", model.external)
        kept = str(folder)
    except (OSError, UserError) as error:
        kept = f"the options you gave (nothing could be kept: {error})"
    return (
        f"{model.name}: the pruned model is wrong ({why}) and was not written; "
        f"this is a bug: please report it with the original model and {kept}"
    )


def _notes(blocks: Blocks, plan: Plan) -> tuple[str, ...]:
    graph = blocks.graph
    notes = []
    if blocks.cached:
        notes.append(f"attention heads are pinned by a key/value cache: {', '.join(blocks.cached)}")
    lossy = sum(edit.kind == "lossy" for edit in plan.keeps)
    if lossy:
        notes.append(f"{lossy} groups are lossy: statistics are now taken over fewer units")
    if inlined := graph.model.inlined:
        named = ", ".join(f"{name} ({count})" for name, count in inlined.items())
        notes.append(f"calls of local functions, unfolded into the graph: {named}")
    if graph.opaque:
        named = ", ".join(f"{name} ({count})" for name, count in sorted(graph.opaque.items()))
        notes.append(f"operators without a declaration, whose axes are pinned: {named}")
    return tuple(notes)


def pinned_reasons(graph: DependencyGraph) -> dict[str, int]:
    """How many weight axes are pinned, by reason."""
    counted: dict[str, int] = {}
    for axis in graph.pinned:
        counted[axis.reason.text] = counted.get(axis.reason.text, 0) + 1
    return dict(sorted(counted.items(), key=lambda item: (-item[1], item[0])))


def provenance(model: Model, plan: Plan) -> dict[str, object]:
    """What it takes to repeat a run."""
    return {
        "onnxprune": __version__,
        "onnx": onnx.__version__,
        "onnxruntime": onnxruntime.__version__,
        "numpy": np.__version__,
        "python": platform.python_version(),
        "model_sha256": plan.model,
        "opset": model.opset(),
        "options": dict(plan.options),
    }


def _nothing(blocks: Blocks, options: Options) -> str:
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
    advice = "; try a larger ratio or --align 1" if rest and options.align > 1 else ""
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


class _Clock:
    """Seconds per stage; names the stage to whoever shows progress."""

    def __init__(self, progress: Progress) -> None:
        self.seconds: dict[str, float] = {}
        self._progress = progress

    @contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        self._progress(stage)
        start = time.perf_counter()
        yield
        self.seconds[stage] = self.seconds.get(stage, 0.0) + time.perf_counter() - start
