"""The whole flow in one direction: model -> graph -> plan -> surgery -> proof -> report."""

from __future__ import annotations

import functools
import math
import os
import tempfile
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from onnxprune import (
    allocation,
    comparison,
    criteria,
    flow,
    graphsurgeon,
    latency,
    measuring,
    metrics,
    outcome,
    passes,
    surgery,
    timing,
)  # fmt: skip
from onnxprune.axes import Keep
from onnxprune.blocks import Block, Blocks
from onnxprune.calibration import Calibration
from onnxprune.comparison import OnTarget
from onnxprune.cost import CostModel, Counts
from onnxprune.data import Data, Preprocess, Spec, open_data, synthetic
from onnxprune.dependency import DependencyGraph
from onnxprune.errors import InternalError, NotFaster, NothingToPrune, UserError, WrongOnTarget
from onnxprune.model import FLOATS, Layout, Model, load, materialised, places, save
from onnxprune.passes import Options, iterative, units
from onnxprune.passes import fold as folding
from onnxprune.plan import Keep as KeepUnits
from onnxprune.plan import Plan, SetWeight
from onnxprune.repair import Repairs, repair
from onnxprune.report import Candidates, Mended, Quality, Report
from onnxprune.runtime import OutOfMemory, RunError
from onnxprune.targets import Target, TargetError, target
from onnxprune.validation import equivalence

Source = str | os.PathLike[str] | onnx.ModelProto | graphsurgeon.Graph
"""The path of a model, the model, or an `onnx_graphsurgeon.Graph`."""
Progress = Callable[[str, float | None], None]
"""Called with the stage at work, and the share of it that is done, where that is known."""

SAMPLES = 256  # to calibrate on
MADE_UP = 256  # where there is no data
TRIALS = 12  # models that are made in search of the smallest one that a metric allows
PROPOSALS = 4 * TRIALS  # shares that are asked for, of which several may come to the same model
NEAR = 2.0**-7  # shares of the MACs that need not be told apart
BELOW = (0.95, 0.9, 0.85, 0.8)  # of the least share that is known to hold, where to look for smaller ones
ATTEMPTS = 8  # cuts that are timed in search of a share of the time
SLACK, OVER = 0.04, 0.01  # below and above that share, what is near enough
THREADS = 1  # that times are taken with
MISSED = 0.02  # a share that misses its target by more deserves a note
UNMEASURED = ", and nothing was measured on data"  # what notes on made-up inputs say


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

    def graph(self) -> Any:
        """A new `onnx_graphsurgeon.Graph` of the model, which holds less than the model does (`onnxprune.graphsurgeon`).

        Raises `UserError` where onnx-graphsurgeon is not installed, and for models with overloads of functions.
        """
        return graphsurgeon.imported(self.model)

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
    """A checked model. Raises `UserError` for what is none."""
    if isinstance(source, str | os.PathLike):
        return load(source)
    if not isinstance(source, onnx.ModelProto):
        source = graphsurgeon.exported(source)
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
    table       file of times that a latency is predicted from; None: this machine's own
    allow_slower  return a result that is no faster on a target, too
    """

    data: Spec | None = None
    samples: int = SAMPLES
    preprocess: Preprocess | None = None
    judge: Spec | None = None
    metric: str | None = None
    table: Path | None = None
    allow_slower: bool = False

    @property
    def same(self) -> bool:
        """Whether the metric is measured on the data that calibration takes its samples from."""
        paths = [spec for spec in (self.data, self.judge) if isinstance(spec, str | os.PathLike)]
        return (
            self.judge is None
            or self.judge is self.data
            or (len(paths) == 2 and len(set(map(_real, paths))) == 1)
        )

    def __post_init__(self) -> None:
        if self.samples < 2:
            raise UserError(f"{self.samples} samples are too few to measure anything; take 2 or more")


def _real(path: str | os.PathLike[str]) -> str:
    return os.path.realpath(os.fspath(path))


NO_DATA = Inputs()


class _Session:
    """One model on its way through the pipeline: what is found about it is found once."""

    def __init__(self, model: Model, options: Options, inputs: Inputs, clock: _Clock) -> None:
        self.model = model
        self.inputs = inputs
        self.clock = clock
        self.notes: list[str] = []
        self.candidates: Candidates | None = None  # of a search
        wishes = (inputs.judge, inputs.metric, options.max_drop)
        self.judged = any(wish is not None for wish in wishes)  # whether the result is to be measured
        with clock("analyse"):
            self.blocks = Blocks(DependencyGraph(model))
        self.graph = self.blocks.graph
        self.data = self._data(options)
        self.options = options.resolved(self.data is not None)
        self.calibration = None
        if self.data is not None:
            found = self.data.notes
            self.notes += [note.replace(UNMEASURED, "") for note in found] if self.judged else found
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
            nothing = "nothing was repaired" if self.judged else "nothing was repaired or measured on data"
            self.notes.append(f"no data was given, so {nothing}: inputs cannot be made up ({error})")
            return None

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
    """A metric on data, and what the original scores; what metrics of agreement compare with is computed once."""

    def __init__(self, model: Model, data: Data, metric: str | None) -> None:
        self.data = data
        original = metrics.Recorded(model, data)
        self.metric = metric or metrics.default_metric(data, next(iter(original)))
        made = metrics.metric(self.metric)()
        self.higher = made.higher_is_better
        self._original = original if made.needs_original else None
        self.before = metrics.evaluate(self._original or model, data, self.metric, original=self._original)

    def __call__(self, model: onnx.ModelProto | metrics.Runner) -> float:
        return metrics.evaluate(model, self.data, self.metric, original=self._original)

    def drop(self, after: float) -> float:
        """How much worse this score is than the original's, in the metric's unit."""
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
        raise NothingToPrune(outcome.nothing(session.blocks, session.options))
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
    ready = None
    if options.max_drop is not None:
        ready = _smallest(session, options.max_drop)
    if options.latency is not None:
        plan = _fast(session, options.latency)
    else:
        plan = session.plan() if ready is None else ready.plan
    if plan.removes_nothing:
        raise NothingToPrune(outcome.nothing(session.blocks, session.options))
    gone = session.blocks.gone(surgery.removed_blocks(session.blocks, plan))
    skipped = units.skipped_reasons(units.choose(session.blocks, session.options, gone))
    return _finish(session, plan, skipped, ready, session.planner.units)


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


@dataclass(frozen=True)
class _Trial:
    """A cut of the search, repaired and measured.

    kept    the share of the MACs that it keeps
    after   its score
    """

    plan: Plan
    pruned: onnx.ModelProto = field(repr=False)
    repairs: Repairs | None = field(repr=False)
    kept: float
    after: float


def _smallest(session: _Session, most: float) -> _Trial:
    """Of the cuts that `descent` proposes the one of the least MACs that, repaired, loses no more than `most` of
    the metric. A cut that was tried before is not made again. Raises `NothingToPrune` if there is none."""
    judge, name = session.judge, session.model.name
    if not session.graph.groups and not session.blocks.residual:
        raise NothingToPrune(outcome.nothing(session.blocks, session.options))
    if not math.isfinite(judge.before):
        raise UserError(
            f"{name}: --max-drop: {judge.metric} of the original is {judge.before}, from which nothing can be "
            "subtracted; use another --metric"
        )
    best: _Trial | None = None
    points: list[tuple[float, float]] = []
    refused: UserError | None = None
    tried: dict[object, bool] = {}
    shares = descent()
    share = next(shares)
    for _ in range(PROPOSALS):
        if len(tried) == TRIALS:
            break
        session.clock.share("search", len(tried) / TRIALS)
        held = None
        try:
            plan = session.plan(("macs", share))
        except UserError as error:
            refused = error
        else:
            cut = tuple((e.group, e.units) if isinstance(e, KeepUnits) else e.block for e in plan.edits)
            if cut not in tried:
                trial = _tried(session, plan)
                tried[cut] = holds = judge.drop(trial.after) <= most
                points.append((trial.kept, trial.after))
                if holds and not plan.removes_nothing and (best is None or trial.kept < best.kept):
                    best = trial
            held = tried[cut]
        try:
            share = shares.send(held)
        except StopIteration:
            break
    if not tried and refused is not None:
        raise refused
    if best is None:
        raise NothingToPrune(
            f"{name}: every cut that was tried loses more than {most:g} of {judge.metric} "
            f"(it is {judge.before:.4g}); no file was written"
        )
    session.candidates = Candidates(
        "macs",
        judge.metric,
        "higher" if judge.higher else "lower",
        judge.before,
        judge.before - most if judge.higher else judge.before + most,
        tuple((*point, point == (best.kept, best.after)) for point in points),
    )
    return replace(best, plan=replace(best.plan, options={**best.plan.options, "max_drop": most}))


def _tried(session: _Session, plan: Plan) -> _Trial:
    pruned = session.cut(plan)
    repairs = session.repaired(plan, pruned)
    with session.clock("evaluate"):
        after = session.judge(pruned if repairs is None else repairs.proto)
    whole = CostModel(session.graph)().macs
    return _Trial(plan, pruned, repairs, outcome.cost(session.blocks, plan).macs / max(whole, 1), after)


def descent() -> Generator[float, bool | None, None]:
    """Shares of the MACs to try, for the least that holds; is sent whether each does, or None where no cut is so small.

    Bisection between the least that holds and the largest below it that does not. Scores are noisy, so that what fails
    proves little about what is smaller: then places some steps BELOW the least that holds, and where one of them
    holds, bisection again from there.
    """
    good, floor, looks = 1.0, 0.0, 0
    failed: list[float] = []
    while True:
        low = max((share for share in failed if share < good), default=0.0)
        low = max(low, floor)
        if good - low > NEAR:
            share = (low + good) / 2
        elif looks < len(BELOW) and good * BELOW[looks] > max(floor, NEAR):
            share = good * BELOW[looks]
            looks += 1
        else:
            return
        holds = yield share
        if holds is None:
            floor = share
        elif holds:
            good, looks = share, 0
        else:
            failed.append(share)


def measure(source: Source, where: str, table: Path, progress: Progress | None = None) -> measuring.Measured:
    """Time a model's pieces on a target at all counts that `--latency` may ask for, or between which what it asks for
    lies, and keep the times in a table that `--latency-table` takes on machines where the target does not run.

    Raises `UserError` where the target does not run here, or refuses a piece.
    """
    clock = _Clock(progress or _quiet)
    with clock("load"):
        model = open_model(source)
    with clock("analyse"):
        blocks = Blocks(DependencyGraph(model))
        aim = _timed(where)
        options = Options(latency=1.0, targets=(where,), allow_lossy=True)
        allowed = {group.var: counts for group, counts in units.Units(blocks, options).allowed().items()}
        feeds = comparison.inputs(blocks.graph)[0]
    with clock("measure"):
        return measuring.measure(
            blocks,
            allowed,
            feeds,
            latency.Table(aim, THREADS, table),
            lambda done: clock.share("measure", done),
        )


def _timed(name: str) -> Target:
    """A target whose times mean something."""
    aim = target(name)
    if not aim.timed:
        raise UserError(f"--latency: times on {aim} mean nothing ({aim.title}); name another --target first")
    return aim


@dataclass(frozen=True)
class TimedCandidates(Candidates):
    """Models that a search for a share of the time has looked at.

    predicted  of every point the share of the time that the pieces' times add up to
    measured   whether costs were measured from end to end, else they are read from a table
    sum        of the times of the original's pieces over that of the whole; none where nobody has measured it
    """

    predicted: tuple[float, ...]
    measured: bool
    sum: float | None

    def as_dict(self) -> dict[str, Any]:
        stated = super().as_dict()
        told = stated.pop("predicted")
        points = [{**point, "predicted": one} for point, one in zip(stated.pop("points"), told, strict=True)]
        return {**stated, "points": points}


@dataclass(frozen=True)
class _Cut:
    """A plan, and the share of the original's time that its cut takes: as its pieces predict it, and as it was measured
    or, where it cannot be, as the table's whole models lead to expect."""

    plan: Plan
    predicted: float
    ratio: float


class _Stopwatch:
    """The time of a model on the first target, of what is cut from it, and plans at the prices that these come to.

    Raises `UserError` where nothing can be known about times.
    """

    def __init__(self, session: _Session) -> None:
        self.session = session
        self.graph = session.graph
        self.aim = _timed(next(iter(session.options.targets), "cpu"))
        self.table = latency.Table(self.aim, THREADS, session.inputs.table)
        with session.clock("measure"):
            self.feeds = comparison.inputs(self.graph)[0]
            self.whole = latency.predict(self.graph, self.feeds, self.table)
            parts = [] if self.table.runs else latency.pieces(self.graph, self.feeds)
            self.forms = latency.forms(self.graph, parts)
        self.known = self.table.wholes.get(latency.digest_of(self.graph, self.feeds))
        self.milliseconds = None if self.known is None else self.known.milliseconds
        self.trials: list[tuple[Counts, latency.Predicted]] = []

    def plan(self, wish: float) -> Plan:
        """For this share of the time, at the prices so far. Raises `UserError` where they call it impossible."""
        prices = latency.prices(self.graph, self.whole, self.trials)
        self.session.planner.units.prices = prices.by_node
        priced = CostModel(self.graph, prices=prices.by_node)().time
        limit = (wish * (priced + prices.constant) - prices.constant) / priced
        return self.session.plan(("time", min(limit, 1.0)))

    def cut(self, plan: Plan) -> _Cut:
        """The time of a plan's cut, which the next prices take into account."""
        pruned = self.session.cut(plan)
        kept = {var: int(mask.sum()) for var, mask in surgery.keep_masks(self.graph, plan).items()}
        with self.session.clock("measure"):
            after = latency.predict(DependencyGraph(Model(pruned)), self.feeds, self.table, self.forms, kept)
            self.trials.append((kept, after))
            predicted = after.total / self.whole.total
            return _Cut(plan, predicted, self._ratio(pruned, predicted))

    def _ratio(self, pruned: onnx.ModelProto, predicted: float) -> float:
        if not self.table.runs:
            return predicted if self.known is None else self.known.ratio(predicted)
        protos = (self.session.model.proto, pruned)
        try:
            found = timing.compare_models(self.aim, protos, self.feeds, threads=THREADS)
        except TargetError as error:
            raise UserError(f"--latency on {self.aim}: {error}") from None
        self.milliseconds = found.engines[0].milliseconds
        return found.ratio

    def told(self, found: Sequence[_Cut], chosen: _Cut) -> TimedCandidates:
        """For the report: times against the predicted error, where the budget predicts one, else against MACs."""
        whole = max(CostModel(self.graph)().macs, 1)
        errors = [one.plan.options.get("predicted_error") for one in found]
        if None in errors:
            value, better, original = "share of the MACs", "higher", 1.0
            values = [outcome.cost(self.session.blocks, one.plan).macs / whole for one in found]
        else:
            value, better, original = "predicted error", "lower", 0.0
            values = [float(error) for error in errors if error is not None]
        return TimedCandidates(
            "latency",
            value,
            better,
            original,
            None,
            tuple((one.ratio, worth, one is chosen) for one, worth in zip(found, values, strict=True)),
            tuple(one.predicted for one in found),
            self.table.runs,
            None if self.milliseconds is None else self.whole.total / self.milliseconds,
        )

    def note(self, chosen: _Cut, total: float | None) -> str:
        """How far the sum of pieces is from the truth, for people."""
        summed = "" if total is None else f"; the original's add up to {total:.2f} of its time"
        if self.table.runs:
            return f"times of pieces predicted {chosen.predicted:.3f} of the time, measured {chosen.ratio:.3f}{summed}"
        return (
            f"{chosen.ratio:.3f} of the time on {self.aim} is what {self.table.path} says ({self.table}; times of pieces "
            f"predicted {chosen.predicted:.3f}{summed}); it was not measured"
        )


def _fast(session: _Session, share: float) -> Plan:
    """The plan whose cut takes this share of the original's time on the first target, or comes nearest below it.

    Times of pieces (see `latency`) price the work in each node, the budget is solved for these prices, and what it
    cuts is measured from end to end where the target runs here: new times give new prices, and what was missed moves
    the target. Raises `UserError` where the share cannot be reached, or nothing can be known about times.
    """
    watch = _Stopwatch(session)
    found = _search(session, watch, share)
    watch.table.save()
    reached = [one for one in found if one.ratio <= share + OVER]
    if not reached:
        best = f"; the least found is {min(one.ratio for one in found):.3f}" if found else ""
        raise UserError(
            f"{session.model.name}: --latency {share} cannot be reached on {watch.aim}{best} (see `onnxprune inspect` "
            "for what is pinned)"
        )
    chosen = max(reached, key=lambda one: one.ratio)
    session.candidates = told = watch.told(found, chosen)
    session.notes.append(watch.note(chosen, told.sum))
    return replace(chosen.plan, options={**chosen.plan.options, "latency": share})


def _search(session: _Session, watch: _Stopwatch, share: float) -> list[_Cut]:
    """Cuts between too slow and too fast, in the order in which they were made; the last is near enough, if any is."""
    found: list[_Cut] = []
    wish = share  # what is asked of prices
    low, high = 0.0, 1.0  # what gave too little time, or was refused; what gave too much
    while len(found) < ATTEMPTS and high - low > OVER:
        session.clock.share("search", len(found) / ATTEMPTS)
        try:
            plan = watch.plan(wish)
        except UserError:  # prices are estimates: what they call impossible may yet be reached from above
            low, wish = wish, (wish + high) / 2
            continue
        found.append(watch.cut(plan))
        ratio = found[-1].ratio
        if share - SLACK <= ratio <= share + OVER:
            break
        if len(found) == 1:  # prices are other ones from here on
            low, high = 0.0, 1.0
        else:
            low, high = (low, min(wish, high)) if ratio > share else (max(wish, low), high)
        wish *= min(max(share / ratio, 0.6), 1.4)
        if not low < wish < high:
            wish = (low + high) / 2
    return found


def _on_targets(session: _Session, made: onnx.ModelProto) -> list[OnTarget]:
    """The original and the result on every target that was named. Raises `WrongOnTarget` and `NotFaster`."""
    names = session.options.targets or (("cpu",) if session.options.latency is not None else ())
    if not names:
        return []
    measured = session.data if session.data is not None and session.data.measured else None
    feeds = comparison.inputs(session.graph, measured)
    with session.clock("measure"):
        found = comparison.on_targets(names, session.model.proto, made, feeds, threads=THREADS)
    name = session.model.name
    if wrong := next((one for one in found if one.broken), None):
        known = f" (known of it: {wrong.objections[0]})" if wrong.objections else ""
        raise WrongOnTarget(
            f"{name}: {wrong}{known}; the cut is proven on the CPU, so that the fault is there; nothing was written"
        )
    if not session.inputs.allow_slower and (slow := next((one for one in found if one.slower), None)):
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
    session: _Session,
    plan: Plan,
    skipped: dict[str, int],
    ready: _Trial | None = None,
    made_by: units.Units | None = None,
) -> Result:
    """Cut, prove, repair and measure; `ready` is a plan's cut, repaired and measured, that is yet to be proven, and
    `made_by` is none where the plan was read."""
    blocks, graph, model, clock = session.blocks, session.graph, session.model, session.clock
    keep = surgery.keep_masks(graph, plan)
    removed = surgery.removed_blocks(blocks, plan)
    pruned = session.cut(plan) if ready is None else ready.pruned
    with clock("prove"):
        proof = _prove(graph, plan, keep, removed, pruned)
    repairs = session.repaired(plan, pruned) if ready is None else ready.repairs
    made = pruned if repairs is None else repairs.proto
    quality = None
    if session.judged:
        with clock("evaluate"):
            judge = session.judge
            after = judge(made) if ready is None else ready.after
            quality = Quality(judge.metric, judge.data.source, judge.before, after, described(judge.data))
    on_targets = _on_targets(session, made)
    whole, cost = CostModel(graph)(), outcome.cost(blocks, plan)
    kept = cost.ratio(whole)
    padding = outcome.padding(blocks, plan, session.options, made_by)
    notes = (*session.notes, *_seen(session), *outcome.missed(plan, kept), *padding.notes(kept["macs"]))
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
        None if session.data is None else described(session.data),
        tuple(on_targets),
        outcome.parts(blocks, plan),
        padding,
        session.candidates,
    )
    return Result(made, model.external, model.files, plan, report)


def described(data: Data) -> dict[str, object]:
    """Data as a report remembers it."""
    return {"source": data.source, "measured": data.measured, **data.provenance}


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


def _seen(session: _Session) -> list[str]:
    """What a score says nothing about: data that scores and repair have seen, or the other way about."""
    data, options = session.data, session.options
    used = (
        options.repair != "none"
        or criteria.needs_data(options.criterion)
        or options.strategy in allocation.MEASURED
    )
    if data is None or not used or not session.judged:
        return []
    if not data.measured:
        return ["scores and repair saw made-up inputs only; give some like those of --eval with --data"]
    if not session.inputs.same:
        return []
    judge = session.judge
    return [
        f"{judge.metric} was measured on inputs that scores and repair have seen ({len(data)} of {len(judge.data)}); "
        "give others with --eval"
    ]


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
