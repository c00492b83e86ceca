"""The whole flow in one direction: model -> graph -> plan -> surgery -> proof -> report."""

from __future__ import annotations

import functools
import math
import os
import platform
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import onnx
import onnxruntime

from onnxprune import __version__, flow, metrics, passes, surgery
from onnxprune.axes import Keep
from onnxprune.blocks import Block, Blocks
from onnxprune.calibration import Calibration
from onnxprune.cost import Cost, CostModel
from onnxprune.data import Data, Preprocess, Spec, open_data, synthetic
from onnxprune.dependency import DependencyGraph
from onnxprune.errors import InternalError, NothingToPrune, UserError
from onnxprune.model import FLOATS, Layout, Model, expected_bytes, load, materialised, places, save
from onnxprune.passes import Options, iterative, units
from onnxprune.passes import fold as folding
from onnxprune.plan import Plan, SetWeight
from onnxprune.repair import Repairs, repair
from onnxprune.report import Change, Mended, Quality, Report
from onnxprune.runtime import OutOfMemory, RunError, crash
from onnxprune.validation import equivalence

Source = str | os.PathLike[str] | onnx.ModelProto
Progress = Callable[[str, float | None], None]
"""Called with the stage at work, and the share of it that is done, where that is known."""

SAMPLES = 256  # to calibrate on
MADE_UP = 128  # where there is no data
TRIALS = 7  # of the bisection for the largest cut that a metric allows


def _quiet(_stage: str, _share: float | None) -> None:
    """No progress to show."""


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


@dataclass(frozen=True)
class Inputs:
    """Data to calibrate on and to judge by.

    data        what `onnxprune.data.open_data` reads; None: inputs are made up
    samples     that calibration takes
    preprocess  of images; None: a guess, which a note states
    judge       data for the metric; None: `data`
    metric      of `onnxprune.metrics`; None: the one that fits the data
    """

    data: Spec | None = None
    samples: int = SAMPLES
    preprocess: Preprocess | None = None
    judge: Spec | None = None
    metric: str | None = None

    def __post_init__(self) -> None:
        if self.samples < 2:
            raise UserError(f"{self.samples} samples are too few to measure anything; take 2 or more")


NO_DATA = Inputs()


class _Session:
    """One model on its way through the pipeline: what is found about it is found once."""

    def __init__(self, model: Model, options: Options, inputs: Inputs, clock: _Clock) -> None:
        self.model = model
        self.inputs = inputs
        self.clock = clock
        self.notes: list[str] = []
        with clock("analyse"):
            self.blocks = Blocks(DependencyGraph(model))
        self.graph = self.blocks.graph
        self.data = self._data(options)
        measured = self.data is not None and self.data.measured
        self.options = options.resolved(measured, self.data is not None)
        self.calibration = None
        if self.data is not None:
            self.notes += self.data.notes
            self.calibration = Calibration(self.graph, self.data, clock.share)

    def _data(self, options: Options) -> Data | None:
        if self.inputs.data is not None:
            with self.clock("read data"):
                return open_data(
                    self.inputs.data, self.model, self.graph.shapes, samples=self.inputs.samples,
                    seed=options.seed, preprocess=self.inputs.preprocess,
                )  # fmt: skip
        if not options.wants_data or not self.graph.groups:
            return None
        try:
            with self.clock("make inputs up"):
                return synthetic(
                    self.model,
                    self.graph.shapes,
                    samples=min(self.inputs.samples, MADE_UP),
                    seed=options.seed,
                )
        except UserError as error:
            if options.needs_data:
                raise
            self.notes.append(
                f"no data was given, so nothing was repaired or measured on data: inputs cannot be made up ({error})"
            )
            return None

    @property
    def judged(self) -> bool:
        """Whether the result is to be measured."""
        given = self.inputs
        return given.judge is not None or given.metric is not None or self.options.max_drop is not None

    @functools.cached_property
    def judge(self) -> Judge:
        """Raises `UserError` where there is no data to judge by."""
        spec = self.inputs.judge if self.inputs.judge is not None else self.inputs.data
        if spec is None:
            raise UserError(f"{self.model.name}: a metric needs data; give --eval or --data")
        data = open_data(
            spec, self.model, self.graph.shapes, samples=None, seed=self.options.seed,
            preprocess=self.inputs.preprocess,
        )  # fmt: skip
        return Judge(self.model, data, self.inputs.metric)

    @functools.cached_property
    def planner(self) -> passes.Planner:
        with self.clock("plan"):
            return passes.Planner(self.blocks, self.options, self.model.digest(), self.calibration)

    def plan(self, target: tuple[str, float] | None = None) -> Plan:
        planner = self.planner
        with self.clock("plan"):
            if self.options.steps > 1 and self.calibration is not None:
                plan = iterative.plan(self.blocks, planner, self.calibration, target)
            else:
                plan = planner.plan(target)
            if self.data is not None:
                plan = replace(plan, options={**plan.options, "data": dict(self.data.provenance)})
            return plan

    def cut(self, plan: Plan) -> onnx.ModelProto:
        with self.clock("cut"):
            return surgery.apply(self.graph, plan, self.blocks)

    def repaired(self, plan: Plan, pruned: onnx.ModelProto) -> Repairs | None:
        """The pruned model repaired, where that was asked for and can be."""
        if self.options.repair == "none" or self.calibration is None or self.data is None:
            return None
        with self.clock("repair"):
            keep = surgery.keep_masks(self.graph, plan)
            removed = surgery.removed_blocks(self.blocks, plan)
            return repair(
                self.options.repair, self.blocks, keep, removed, pruned, self.calibration.evidence,
                self.data, self.options.seed, lambda share: self.clock.share("repair", share),
            )  # fmt: skip


class Judge:
    """A metric on data, and what the original scores."""

    def __init__(self, model: Model, data: Data, metric: str | None) -> None:
        self.model = model
        self.data = data
        self.metric = metric or metrics.default_metric(data, next(iter(metrics.outputs_of(model, data))))
        self.higher = metrics.metric(self.metric)().higher_is_better
        self.before = self(model.proto)

    def __call__(self, proto: onnx.ModelProto) -> float:
        return metrics.evaluate(proto, self.data, self.metric, original=self.model)

    def drop(self, proto: onnx.ModelProto) -> float:
        """How much worse a model is than the original, in the metric's unit."""
        after = self(proto)
        return self.before - after if self.higher else after - self.before


def make_plan(
    source: Source | Model, options: Options, inputs: Inputs = NO_DATA, progress: Progress | None = None
) -> Plan:
    """Decide what to remove, without removing it. Raises `NothingToPrune` if that is nothing."""
    model = source if isinstance(source, Model) else open_model(source)
    if options.max_drop is not None:
        raise UserError(
            f"{model.name}: a largest drop is found by making models, not by a plan alone; use shrink"
        )
    session = _Session(model, options, inputs, _Clock(progress or _quiet))
    plan = session.plan()
    if plan.removes_nothing:
        raise NothingToPrune(_nothing(session.blocks, session.options))
    return plan


def prune(
    source: Source, options: Options, progress: Progress | None = None, inputs: Inputs = NO_DATA
) -> Result:
    """Plan, cut, prove and repair.

    Raises `NothingToPrune` if nothing would be removed, `UserError` for bad input, and `InternalError`
    if the result is not the graph it claims to be (it is not returned then).
    """
    clock = _Clock(progress or _quiet)
    with clock("load"):
        model = open_model(source)
    if (options.max_drop is not None or inputs.metric is not None) and inputs.judge is inputs.data is None:
        asked = "--max-drop" if options.max_drop is not None else "--metric"
        raise UserError(f"{model.name}: {asked} needs data to measure on; give --eval or --data")
    session = _Session(model, options, inputs, clock)
    if session.judged:
        with clock("evaluate"):
            session.judge  # noqa: B018  before any work is done, whatever is wrong with its data
    if options.max_drop is not None:
        plan = _smallest(session, options.max_drop)
    else:
        plan = session.plan()
    if plan.removes_nothing:
        raise NothingToPrune(_nothing(session.blocks, session.options))
    gone = session.blocks.gone(surgery.removed_blocks(session.blocks, plan))
    skipped = units.skipped_reasons(units.choose(session.blocks, session.options, gone))
    return _finish(session, plan, skipped)


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
    clock = _Clock(progress or _quiet)
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
    session = _Session(model, options, inputs, clock)
    if isinstance(made_on, Mapping) and (
        session.data is None or session.data.provenance.get("sha256") != made_on.get("sha256")
    ):
        raise UserError(
            f"{model.name}: the plan was made with other data (or another --preprocess); give the same, or make the "
            "cut alone with --repair none"
        )
    return _finish(session, plan, {})


def _smallest(session: _Session, most: float) -> Plan:
    """The plan of the least MACs whose repaired model loses no more than `most` of the metric; by bisection."""
    judge = session.judge
    low, high = 0.0, 1.0
    best: Plan | None = None
    for trial in range(TRIALS):
        share = (low + high) / 2
        session.clock.share("search", trial / TRIALS)
        try:
            plan = session.plan(("macs", share))
        except UserError:
            low = share
            continue
        pruned = session.cut(plan)
        repairs = session.repaired(plan, pruned)
        lost = 0.0 if plan.removes_nothing else judge.drop(pruned if repairs is None else repairs.proto)
        if lost <= most:
            high, best = share, plan
        else:
            low = share
    if best is None or best.removes_nothing:
        raise NothingToPrune(
            f"{session.model.name}: every cut that was tried loses more than {most:g} of {judge.metric} "
            f"(it is {judge.before:.4g}); no file was written"
        )
    return replace(best, options={**best.options, "max_drop": most})


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


def _finish(session: _Session, plan: Plan, skipped: dict[str, int]) -> Result:
    blocks, graph, model, clock = session.blocks, session.graph, session.model, session.clock
    keep = surgery.keep_masks(graph, plan)
    removed = surgery.removed_blocks(blocks, plan)
    pruned = session.cut(plan)
    with clock("prove"):
        proof = _prove(graph, plan, keep, removed, pruned)
    repairs = session.repaired(plan, pruned)
    made = pruned if repairs is None else repairs.proto
    quality = None
    if session.judged:
        with clock("evaluate"):
            judge = session.judge
            quality = Quality(
                judge.metric, judge.data.source, judge.before, judge(made), described(judge.data)
            )
    cost = CostModel(graph, blocks.gone(removed))({var: int(mask.sum()) for var, mask in keep.items()})
    report = Report(
        model.name,
        CostModel(graph)(),
        _with_added(cost, pruned, made),
        _changes(blocks, plan),
        len(graph.groups),
        len(keep),
        proof,
        skipped,
        pinned_reasons(graph),
        (*session.notes, *_notes(blocks, plan)),
        clock.seconds,
        provenance(model, plan),
        None if repairs is None else Mended(repairs.chosen, repairs.errors, repairs.layers),
        quality,
        None if session.data is None else described(session.data),
    )
    return Result(made, model.external, model.files, plan, report)


def _with_added(cost: Cost, pruned: onnx.ModelProto, made: onnx.ModelProto) -> Cost:
    """The cost of a pruned model with the biases that repair has added."""
    known = {tensor.name for tensor in pruned.graph.initializer}
    added = [tensor for tensor in made.graph.initializer if tensor.name not in known]
    return replace(
        cost,
        params=cost.params + sum(math.prod(tensor.dims) for tensor in added),
        bytes=cost.bytes + sum(expected_bytes(tensor) for tensor in added),
    )


def described(data: Data) -> dict[str, object]:
    """Data as a report remembers it."""
    return {"source": data.source, "measured": data.measured, **data.provenance}


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
        self._progress(stage, None)
        start = time.perf_counter()
        yield
        self.seconds[stage] = self.seconds.get(stage, 0.0) + time.perf_counter() - start

    def share(self, stage: str, done: float) -> None:
        """How much of a stage is done."""
        self._progress(stage, done)
