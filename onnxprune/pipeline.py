"""The whole flow in one direction: model -> graph -> plan -> surgery -> proof -> report."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import onnx

from onnxprune import allocation, comparison, criteria, flow, latency, measuring, outcome, surgery, timing
from onnxprune.axes import Keep
from onnxprune.blocks import Block, Blocks
from onnxprune.comparison import OnTarget
from onnxprune.cost import CostModel
from onnxprune.dependency import DependencyGraph
from onnxprune.errors import InternalError, NotFaster, NothingToPrune, UserError, WrongOnTarget
from onnxprune.job import Clock, Inputs, Job, Made, Progress, Source, described, open_model, quiet
from onnxprune.model import FLOATS, Model, save
from onnxprune.passes import Options, units
from onnxprune.passes import fold as folding
from onnxprune.plan import Plan, SetWeight
from onnxprune.report import Mended, Quality, Report
from onnxprune.runtime import OutOfMemory, RunError
from onnxprune.search import Trial, fast, smallest
from onnxprune.validation import equivalence

NO_DATA = Inputs()


@dataclass(frozen=True)
class Result(Made):
    """A pruned model, the plan that made it and the report."""

    plan: Plan
    report: Report


def make_plan(
    source: Source | Model, options: Options, inputs: Inputs = NO_DATA, progress: Progress | None = None
) -> Plan:
    """Decide what to remove, without removing it. Raises `NothingToPrune` if that is nothing."""
    model = source if isinstance(source, Model) else open_model(source)
    for asked, what in ((options.max_drop, "a largest drop"), (options.latency, "a share of the time")):
        if asked is not None:
            raise UserError(
                f"{model.name}: {what} is found by making models, not by a plan alone; use shrink"
            )
    job = Job(model, options, inputs, Clock(progress or quiet))
    plan = job.plan()
    if plan.removes_nothing:
        raise NothingToPrune(outcome.nothing(job.blocks, job.options))
    return plan


def prune(
    source: Source, options: Options, progress: Progress | None = None, inputs: Inputs = NO_DATA
) -> Result:
    """Plan, cut, prove and repair.

    Raises `NothingToPrune` if nothing would be removed, `UserError` for bad input, and `InternalError`
    if the result is not the graph it claims to be (it is not returned then).
    """
    clock = Clock(progress or quiet)
    with clock("load"):
        model = open_model(source)
    if (options.max_drop is not None or inputs.metric is not None) and inputs.judge is inputs.data is None:
        asked = "--max-drop" if options.max_drop is not None else "--metric"
        raise UserError(f"{model.name}: {asked} needs data to measure on; give --eval or --data")
    job = Job(model, options, inputs, clock)
    if job.judged:
        with clock("evaluate"):
            job.judge  # noqa: B018  before any work is done, whatever is wrong with its data
    ready = None
    if options.max_drop is not None:
        ready = smallest(job, options.max_drop)
    if options.latency is not None:
        plan = fast(job, options.latency)
    else:
        plan = job.plan() if ready is None else ready.plan
    if plan.removes_nothing:
        raise NothingToPrune(outcome.nothing(job.blocks, job.options))
    gone = job.blocks.gone(surgery.removed_blocks(job.blocks, plan))
    skipped = units.skipped_reasons(units.choose(job.blocks, job.options, gone))
    return _finish(job, plan, skipped, ready, job.planner.units)


def apply_plan(
    source: Source,
    plan: Plan,
    progress: Progress | None = None,
    inputs: Inputs = NO_DATA,
    cut_only: bool = False,
) -> Result:
    """Replay a plan on the model it was made for: the same bytes as when it was made.

    A plan that repairs on data needs the same data again. Raises `UserError` where it is another. cut_only makes
    the plan's cut and no repair.
    """
    clock = Clock(progress or quiet)
    with clock("load"):
        model = open_model(source)
        digest = model.digest()
        if digest != plan.model:
            raise UserError(
                f"{model.name}: the plan was made for another model (SHA-256 {plan.model[:12]}..., this one is "
                f"{digest[:12]}...); make the plan again for this model"
            )
    if plan.removes_nothing:
        raise NothingToPrune(f"{model.name}: the plan removes nothing; no file was written")
    if cut_only:
        plan = replace(plan, options={**plan.options, "repair": "none"})
    options = Options.replayed(plan.options)
    made_on = plan.options.get("data") if options.repair != "none" else None
    if isinstance(made_on, Mapping):
        if made_on.get("kind") != "synthetic" and inputs.data is None:
            raise UserError(
                f"{model.name}: the plan repairs on data; give the same with --data ({made_on.get('samples')} samples "
                "of it are read), or make the cut alone with --repair none"
            )
        if type(made_on.get("samples")) is int:
            inputs = replace(inputs, samples=made_on["samples"])
    job = Job(model, options, inputs, clock)
    if isinstance(made_on, Mapping) and (
        job.data is None or job.data.provenance.get("sha256") != made_on.get("sha256")
    ):
        raise UserError(
            f"{model.name}: the plan was made with other data (or another --preprocess); give the same, or make the "
            "cut alone with --repair none"
        )
    return _finish(job, plan, {})


def measure(source: Source, where: str, table: Path, progress: Progress | None = None) -> measuring.Measured:
    """Time a model's pieces on a target at all counts that `--latency` may ask for, or between which what it asks for
    lies, and keep the times in a table that `--latency-table` takes on machines where the target does not run.

    Raises `UserError` where the target does not run here, or refuses a piece.
    """
    clock = Clock(progress or quiet)
    with clock("load"):
        model = open_model(source)
    with clock("analyse"):
        blocks = Blocks(DependencyGraph(model))
        aim = latency.timed(where)
        options = Options(latency=1.0, targets=(where,), allow_lossy=True)
        allowed = {group.var: counts for group, counts in units.Units(blocks, options).allowed().items()}
        feeds = comparison.inputs(blocks.graph)[0]
    with clock("measure"):
        return measuring.measure(
            blocks,
            allowed,
            feeds,
            latency.Table(aim, timing.THREADS, table),
            lambda done: clock.share("measure", done),
        )


def _on_targets(job: Job, made: onnx.ModelProto) -> list[OnTarget]:
    """The original and the result on every target that was named. Raises `WrongOnTarget` and `NotFaster`."""
    names = job.options.targets or (("cpu",) if job.options.latency is not None else ())
    if not names:
        return []
    measured = job.data if job.data is not None and job.data.measured else None
    feeds = comparison.inputs(job.graph, measured)
    with job.clock("measure"):
        found = comparison.on_targets(names, job.model.proto, made, feeds, threads=timing.THREADS)
    name = job.model.name
    if wrong := next((one for one in found if one.broken), None):
        known = f" (known of it: {wrong.objections[0]})" if wrong.objections else ""
        raise WrongOnTarget(
            f"{name}: {wrong}{known}; the cut is proven on the CPU, so that the fault is there; nothing was written"
        )
    if not job.inputs.allow_slower and (slow := next((one for one in found if one.slower), None)):
        raise NotFaster(f"{name}: {slow}; nothing was written (--allow-slower writes it all the same)")
    return found


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


def _finish(
    job: Job,
    plan: Plan,
    skipped: dict[str, int],
    ready: Trial | None = None,
    made_by: units.Units | None = None,
) -> Result:
    """Cut, prove, repair and measure; `ready` is a plan's cut, repaired and measured, that is yet to be proven, and
    `made_by` is none where the plan was read."""
    blocks, graph, model, clock = job.blocks, job.graph, job.model, job.clock
    keep = surgery.keep_masks(graph, plan)
    removed = surgery.removed_blocks(blocks, plan)
    pruned = job.cut(plan) if ready is None else ready.pruned
    with clock("prove"):
        proof = _prove(graph, plan, keep, removed, pruned)
    repairs = job.repaired(plan, pruned) if ready is None else ready.repairs
    made = pruned if repairs is None else repairs.proto
    quality = None
    if job.judged:
        with clock("evaluate"):
            judge = job.judge
            after = judge(made) if ready is None else ready.after
            quality = Quality(judge.metric, judge.data.source, judge.before, after, described(judge.data))
    on_targets = _on_targets(job, made)
    whole, cost = CostModel(graph)(), outcome.cost(blocks, plan)
    kept = cost.ratio(whole)
    padding = outcome.padding(blocks, plan, job.options, made_by)
    notes = (*job.notes, *_seen(job), *outcome.missed(plan, kept), *padding.notes(kept["macs"]))
    report = Report(
        model.name,
        whole,
        outcome.with_added(cost, pruned, made),
        outcome.changes(blocks, plan),
        len(graph.groups),
        len(keep),
        proof,
        skipped,
        outcome.pinned_reasons(graph),
        (*notes, *outcome.notes(blocks, plan)),
        clock.seconds,
        outcome.provenance(model, plan),
        None if repairs is None else Mended(repairs.chosen, repairs.errors, repairs.layers),
        quality,
        None if job.data is None else described(job.data),
        tuple(on_targets),
        outcome.parts(blocks, plan),
        padding,
        job.candidates,
    )
    return Result(made, model.external, model.files, plan, report)


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


def _seen(job: Job) -> list[str]:
    """What a score says nothing about: data that scores and repair have seen, or the other way about."""
    data, options = job.data, job.options
    used = (
        options.repair != "none"
        or criteria.needs_data(options.criterion)
        or options.strategy in allocation.MEASURED
    )
    if data is None or not used or not job.judged:
        return []
    if not data.measured:
        return ["scores and repair saw made-up inputs only; give some like those of --eval with --data"]
    if not job.inputs.same:
        return []
    judge = job.judge
    return [
        f"{judge.metric} was measured on inputs that scores and repair have seen ({len(data)} of {len(judge.data)}); "
        "give others with --eval"
    ]
