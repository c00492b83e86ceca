"""Cuts that cannot be planned at once, since what limits them is measured: a drop of the metric, a share of the time."""

from __future__ import annotations

import math
from collections.abc import Generator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import onnx

from onnxprune import comparison, latency, outcome, surgery, timing
from onnxprune.cost import CostModel, Counts
from onnxprune.dependency import DependencyGraph
from onnxprune.errors import NothingToPrune, Unreachable, UserError
from onnxprune.job import Job
from onnxprune.model import Model
from onnxprune.plan import Keep as KeepUnits
from onnxprune.plan import Plan
from onnxprune.repair import Repairs
from onnxprune.report import Candidates
from onnxprune.targets import TargetError

TRIALS = 12  # models that are made in search of the smallest one that a metric allows
PROPOSALS = 4 * TRIALS  # shares that are asked for, of which several may come to the same model
NEAR = 2.0**-7  # shares of the MACs that need not be told apart
BELOW = (0.95, 0.9, 0.85, 0.8)  # of the least share that is known to hold, where to look for smaller ones
ATTEMPTS = 8  # cuts that are timed in search of a share of the time
SLACK, OVER = 0.04, 0.01  # below and above that share, what is near enough


@dataclass(frozen=True)
class Trial:
    """A cut of the search, repaired and measured.

    kept    the share of the MACs that it keeps
    after   its score
    """

    plan: Plan
    pruned: onnx.ModelProto = field(repr=False)
    repairs: Repairs | None = field(repr=False)
    kept: float
    after: float


def smallest(job: Job, most: float) -> Trial:
    """Of the cuts that `descent` proposes the one of the least MACs that, repaired, loses no more than `most` of
    the metric. A cut that was tried before is not made again. Raises `NothingToPrune` if there is none."""
    judge, name = job.judge, job.model.name
    if not job.graph.groups and not job.blocks.residual:
        raise NothingToPrune(outcome.nothing(job.blocks, job.options))
    if not math.isfinite(judge.before):
        raise UserError(
            f"{name}: --max-drop: {judge.metric} of the original is {judge.before}, from which nothing can be "
            "subtracted; use another --metric"
        )
    best: Trial | None = None
    points: list[tuple[float, float]] = []
    refused: UserError | None = None
    tried: dict[object, bool] = {}
    shares = descent()
    share = next(shares)
    for _ in range(PROPOSALS):
        if len(tried) == TRIALS:
            break
        job.clock.share("search", len(tried) / TRIALS)
        held = None
        try:
            plan = job.plan(("macs", share))
        except UserError as error:
            refused = error
        else:
            cut = tuple((e.group, e.units) if isinstance(e, KeepUnits) else e.block for e in plan.edits)
            if cut not in tried:
                trial = _trial(job, plan)
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
    job.candidates = Candidates(
        "macs",
        judge.metric,
        "higher" if judge.higher else "lower",
        judge.before,
        judge.before - most if judge.higher else judge.before + most,
        tuple((*point, point == (best.kept, best.after)) for point in points),
    )
    return replace(best, plan=replace(best.plan, options={**best.plan.options, "max_drop": most}))


def _trial(job: Job, plan: Plan) -> Trial:
    pruned = job.cut(plan)
    repairs = job.repaired(plan, pruned)
    with job.clock("evaluate"):
        after = job.judge(pruned if repairs is None else repairs.proto)
    whole = CostModel(job.graph)().macs
    return Trial(plan, pruned, repairs, outcome.cost(job.blocks, plan).macs / max(whole, 1), after)


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

    def __init__(self, job: Job) -> None:
        self.job = job
        self.graph = job.graph
        self.aim = latency.timed(next(iter(job.options.targets), "cpu"))
        self.table = latency.Table(self.aim, timing.THREADS, job.inputs.table)
        with job.clock("measure"):
            self.feeds = comparison.inputs(self.graph)[0]
            self.whole = latency.predict(self.graph, self.feeds, self.table)
            parts = [] if self.table.runs else latency.pieces(self.graph, self.feeds)
            self.forms = latency.forms(self.graph, parts)
        self.known = self.table.wholes.get(latency.digest_of(self.graph, self.feeds))
        self.milliseconds = None if self.known is None else self.known.milliseconds
        self.trials: list[tuple[Counts, latency.Predicted]] = []

    def plan(self, wish: float) -> Plan:
        """For this share of the time, at the prices so far. Raises `Unreachable` where they call it impossible."""
        prices = latency.prices(self.graph, self.whole, self.trials)
        self.job.planner.units.prices = prices.by_node
        priced = CostModel(self.graph, prices=prices.by_node)().time
        limit = (wish * (priced + prices.constant) - prices.constant) / priced
        return self.job.plan(("time", min(limit, 1.0)))

    def cut(self, plan: Plan) -> _Cut:
        """The time of a plan's cut, which the next prices take into account."""
        pruned = self.job.cut(plan)
        kept = {var: int(mask.sum()) for var, mask in surgery.keep_masks(self.graph, plan).items()}
        with self.job.clock("measure"):
            after = latency.predict(DependencyGraph(Model(pruned)), self.feeds, self.table, self.forms, kept)
            self.trials.append((kept, after))
            predicted = after.total / self.whole.total
            return _Cut(plan, predicted, self._ratio(pruned, predicted))

    def _ratio(self, pruned: onnx.ModelProto, predicted: float) -> float:
        if not self.table.runs:
            return predicted if self.known is None else self.known.ratio(predicted)
        protos = (self.job.model.proto, pruned)
        try:
            found = timing.compare_models(self.aim, protos, self.feeds, threads=timing.THREADS)
        except TargetError as error:
            raise UserError(f"--latency on {self.aim}: {error}") from None
        self.milliseconds = min(found.engines[0].rounds)  # as of pieces: the fastest
        return found.ratio

    def told(self, found: Sequence[_Cut], chosen: _Cut) -> TimedCandidates:
        """For the report: times against the predicted error, where the budget predicts one, else against MACs."""
        whole = max(CostModel(self.graph)().macs, 1)
        errors = [one.plan.options.get("predicted_error") for one in found]
        if None in errors:
            value, better, original = "share of the MACs", "higher", 1.0
            values = [outcome.cost(self.job.blocks, one.plan).macs / whole for one in found]
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


def fast(job: Job, share: float) -> Plan:
    """The plan whose cut takes this share of the original's time on the first target, or comes nearest below it.

    Times of pieces (see `latency`) price the work in each node, the budget is solved for these prices, and what it
    cuts is measured from end to end where the target runs here: new times give new prices, and what was missed moves
    the target. Raises `UserError` where the share cannot be reached, or nothing can be known about times, and
    `NothingToPrune`.
    """
    if not job.graph.groups and not job.blocks.residual:
        raise NothingToPrune(outcome.nothing(job.blocks, job.options))
    if not CostModel(job.graph)().macs:
        raise UserError(
            f"{job.model.name}: --latency puts prices on multiply-accumulates, and no node here has any; use --channels"
        )
    watch = _Stopwatch(job)
    found = _search(job, watch, share)
    try:
        watch.table.save()
    except UserError as error:
        if job.inputs.table is not None:
            raise
        job.notes.append(f"the times of pieces are not kept for the next run: {error}")
    reached = [one for one in found if one.ratio <= share + OVER]
    if not reached:
        best = f"; the least found is {min(one.ratio for one in found):.3f}" if found else ""
        raise UserError(
            f"{job.model.name}: --latency {share} cannot be reached on {watch.aim}{best} (see `onnxprune inspect` "
            "for what is pinned)"
        )
    chosen = max(reached, key=lambda one: one.ratio)
    job.candidates = told = watch.told(found, chosen)
    job.notes.append(watch.note(chosen, told.sum))
    return replace(chosen.plan, options={**chosen.plan.options, "latency": share})


def _search(job: Job, watch: _Stopwatch, share: float) -> list[_Cut]:
    """Cuts between too slow and too fast, in the order in which they were made; the last is near enough, if any is."""
    found: list[_Cut] = []
    wish = share  # what is asked of prices
    low, high = 0.0, 1.0  # what gave too little time, or was refused; what gave too much
    while len(found) < ATTEMPTS and high - low > OVER:
        job.clock.share("search", len(found) / ATTEMPTS)
        try:
            plan = watch.plan(wish)
        except Unreachable:  # prices are estimates: what they call impossible may yet be reached from above
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
