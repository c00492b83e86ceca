"""The Python interface: the same steps as the command line, as functions.

A model is a path, an `onnx.ModelProto` or an `onnx_graphsurgeon.Graph`; of what is made of one, `.model` is the
ModelProto, `.graph()` a new Graph and `.save(path)` writes the file. A plan belongs to the model as it was given: a Graph
exports without the metadata that the file it was read from may have, so that a plan of one may not fit the other.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from onnxprune import comparison, metrics, outcome, pipeline, quantisation, surgery, survey, timing
from onnxprune.blocks import Blocks
from onnxprune.comparison import OnTarget
from onnxprune.cost import Cost, CostModel
from onnxprune.data import Data, Preprocess, Spec, open_data, synthetic
from onnxprune.dependency import DependencyGraph
from onnxprune.errors import UserError
from onnxprune.inspection import Inspection
from onnxprune.job import MADE_UP, SAMPLES, Inputs, Judge, Source, described, open_model
from onnxprune.measuring import Measured
from onnxprune.metrics import Agreement
from onnxprune.model import Model
from onnxprune.passes import Options
from onnxprune.pipeline import Folded, Result
from onnxprune.plan import Plan
from onnxprune.quantisation import Quantised
from onnxprune.report import Part, Quality, counted, verdict
from onnxprune.runtime import Feeds, RunError, Session
from onnxprune.shapes import accepted_runs
from onnxprune.survey import Asked, Survey
from onnxprune.targets import TargetError, target
from onnxprune.timing import Timing
from onnxprune.validation import equivalence, mended, structure
from onnxprune.validation.drift import Drift, compare_outputs
from onnxprune.validation.equivalence import Equivalence
from onnxprune.validation.mended import Mending

MOST_THREADS = 1024  # at most: runtimes start as many as they are told to, and take memory for each


def shrink(
    model: Source,
    channels: float | None = None,
    *,
    heads: float | None = None,
    head_width: float | None = None,
    ffn: float | None = None,
    hidden: float | None = None,
    layers: int | float | str | None = None,
    layer_criterion: str = "influence",
    macs: float | None = None,
    params: float | None = None,
    bytes: float | None = None,  # noqa: A002
    data: Spec | None = None,
    samples: int = SAMPLES,
    preprocess: Preprocess | str | None = None,
    max_drop: float | None = None,
    latency: float | None = None,
    latency_table: str | os.PathLike[str] | None = None,
    judge: Spec | None = None,
    metric: str | None = None,
    criterion: str = "auto",
    allocation: str = "auto",
    repair: str = "auto",
    steps: int = 1,
    targets: Sequence[str] = (),
    align: int | None = None,
    min_channels: int = 1,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    allow_lossy: bool = False,
    allow_slower: bool = False,
    seed: int = 0,
) -> Result:
    """Prune a model, prove the cut equal to the masked original, and repair what stays.

    channels is the share of units to remove from every prunable group; heads, head_width, ffn and hidden
    are shares for groups of that role; layers is how many residual blocks to remove, a share of them, or
    patterns on their names. macs, params and bytes are the shares of the model's MACs, parameters or weight
    bytes to keep, instead of shares to remove; max_drop is what the metric may lose, and latency the share of the time
    to keep on the first of the targets (times of pieces are kept in latency_table), instead of either.

    data (see `onnxprune.data.open_data`) are unlabelled inputs to score and repair with, `samples` of them;
    without, inputs are made up. judge is data for the metric (default: data), which is measured before and after
    where `judge`, `metric` or `max_drop` is given. repair is `auto`, `none`, `mean`, `ridge` or `sequential`; steps
    is in how many steps to prune. targets are where it is to run (`onnxprune.targets`): counts are rounded to what fills
    their kernels, or to multiples of align, and both models are compared there; a result that is no faster is refused with
    `NotFaster`, unless allow_slower, and one that is wrong there with `WrongOnTarget`. Raises `NothingToPrune`, `UserError` or `InternalError`.
    """
    options = Options(
        channels=channels, heads=heads, head_width=head_width, ffn=ffn, hidden=hidden,
        layers=None if layers is None else str(layers), layer_criterion=layer_criterion, macs=macs,
        params=params, bytes=bytes, criterion=criterion, strategy=allocation, repair=repair, steps=steps,
        max_drop=max_drop, latency=latency, targets=tuple(targets), align=align, minimum=min_channels,
        include=tuple(include), exclude=tuple(exclude), allow_lossy=allow_lossy, seed=seed,
    )  # fmt: skip
    table = None if latency_table is None else Path(latency_table)
    inputs = Inputs(data, samples, _parsed(preprocess), judge, metric, table, allow_slower)
    return pipeline.prune(model, options, inputs=inputs)


def apply(
    model: Source,
    plan: Plan | str | os.PathLike[str],
    data: Spec | None = None,
    *,
    preprocess: Preprocess | str | None = None,
    cut_only: bool = False,
) -> Result:
    """Replay a plan, or a plan file, on the model it was made for.

    Where the plan repairs, `data` and `preprocess` must be what it was made with; cut_only leaves repair out.
    """
    loaded = plan if isinstance(plan, Plan) else Plan.load(Path(plan))
    return pipeline.apply_plan(
        model, loaded, inputs=Inputs(data, preprocess=_parsed(preprocess)), cut_only=cut_only
    )


def sensitivities(
    model: Source,
    data: Spec,
    *,
    ratios: Sequence[float] = survey.RATIOS,
    criterion: str = "auto",
    metric: str | None = None,
    samples: int = survey.SAMPLES,
    preprocess: Preprocess | str | None = None,
    seed: int = 0,
    path: str | os.PathLike[str] | None = None,
) -> Survey:
    """What a metric, or the outputs, lose when one group or residual block alone is cut.

    With `path` the survey is kept there while it goes on, and taken up again after an interruption. Raises
    `UserError` for data that does not fit, and for another file at that path.
    """
    asked = Asked(tuple(ratios), criterion, metric, samples, seed)
    place = None if path is None else Path(path)
    return survey.survey(open_model(model), data, asked, _parsed(preprocess), place)


def calibration_data(
    model: Source,
    data: Spec | None = None,
    *,
    samples: int = SAMPLES,
    preprocess: Preprocess | str | None = None,
    batch: int = 1,
    seed: int = 0,
) -> Iterator[Feeds]:
    """The inputs that `shrink` scores and repairs with, for calibrators and loaders of other tools: arrays by name.

    Runs of up to `batch` samples each, or of as many as the model fixes. Raises `UserError` as `shrink` does.
    """
    opened = open_model(model)
    shapes = DependencyGraph(opened).shapes
    if data is None:
        found = synthetic(opened, shapes, samples=min(samples, MADE_UP), seed=seed)
    else:
        parsed = _parsed(preprocess)
        found = open_data(data, opened, shapes, samples=samples, seed=seed, preprocess=parsed)
    return (one.feeds for one in found.batches(batch))


def _parsed(preprocess: Preprocess | str | None) -> Preprocess | None:
    return Preprocess.parse(preprocess) if isinstance(preprocess, str) else preprocess


def inspect(model: Source) -> Inspection:
    """Groups, pinned axes and their reasons."""
    return Inspection(Blocks(DependencyGraph(open_model(model))))


@dataclass(frozen=True)
class Validation:
    """Structure, equivalence (where a plan is given), outputs on data (where some are given), drift and latency.

    equivalence  of the candidate; where it is repaired, of what its plan cuts
    mending      how a repaired candidate differs from what its plan cuts
    agreement    of each output with the original's on data
    quality      a metric of both models on data
    notes        on the data
    targets      both models on every target that was named
    before, after
                 what both models cost; none of a broken candidate
    parts        units of every group, as far as the plan or the names of weights tell
    provenance   versions, and the digests of both models
    """

    problems: tuple[str, ...]
    equivalence: Equivalence | None
    drift: tuple[Drift, ...]
    latency: Timing | None
    mending: Mending | None = None
    data: Mapping[str, Any] | None = None
    agreement: tuple[Agreement, ...] = ()
    quality: Quality | None = None
    notes: tuple[str, ...] = ()
    targets: tuple[OnTarget, ...] = ()
    before: Cost | None = None
    after: Cost | None = None
    parts: tuple[Part, ...] = ()
    provenance: Mapping[str, Any] = field(default_factory=dict)

    @property
    def passed(self) -> bool:
        proven = self.equivalence is None or self.equivalence.passed
        mended = self.mending is None or self.mending.passed
        return not self.problems and proven and mended and not any(one.broken for one in self.targets)

    def as_dict(self) -> dict[str, Any]:
        return {
            "passed": self.passed,
            "problems": list(self.problems),
            "equivalence": self.equivalence.as_dict() if self.equivalence else None,
            "repair": self.mending.as_dict() if self.mending else None,
            "data": None if self.data is None else dict(self.data),
            "agreement": [asdict(a) for a in self.agreement],
            "quality": asdict(self.quality) if self.quality else None,
            "notes": list(self.notes),
            "drift": [asdict(d) for d in self.drift],
            "latency": self.latency.as_dict() if self.latency else None,
            "targets": [one.as_dict() for one in self.targets],
            "before": None if self.before is None else self.before.as_dict(),
            "after": None if self.after is None else self.after.as_dict(),
            "parts": [asdict(part) for part in self.parts],
            "provenance": dict(self.provenance),
        }

    def print(self, console: Console) -> None:
        console.print("structure: " + ("sound, same interface" if not self.problems else "BROKEN"))
        for problem in self.problems:
            console.print(f"  {problem}")
        for line in self._proof():
            console.print(line, soft_wrap=True)
        if self.agreement and self.data is not None:
            console.print(f"agreement with the original on {self.data['source']}:", soft_wrap=True)
            console.print(_agreements(self.agreement))
        if self.quality:
            console.print(str(self.quality), soft_wrap=True)
        for note in self.notes:
            console.print(f"note: {note}", soft_wrap=True)
        if self.drift:
            table = Table(title="output drift on random inputs", title_justify="left")
            for name in ("output", "largest difference", "cosine"):
                table.add_column(name)
            for d in self.drift:
                table.add_row(d.output, f"{d.error:.2e} of scale", f"{d.cosine:.4f}")
            console.print(table)
        if self.latency:
            judged = timing.verdict(self.latency)
            console.print(f"latency (onnxruntime CPU, 1 thread): {judged.text}", soft_wrap=True)
        comparison.show(self.targets, console)

    def _proof(self) -> list[str]:
        """What is proven, in sentences."""
        if self.equivalence is None:
            return ["equivalence: not checked (give --plan)"]
        lines = verdict(self.equivalence).splitlines()
        mending = self.mending
        if mending is None or (mending.passed and not mending.repaired + mending.added):
            return lines
        lines[0] = f"repaired: what the plan cuts {lines[0]}"
        if mending.passed:
            added = f", and {counted(mending.added, 'bias')} added" if mending.added else ""
            return [
                *lines,
                f"the candidate is that cut with {mending.repaired} of {mending.repairable} weights and biases of other "
                f"values{added}; nothing else differs",
                "values that repair computes cannot be proven: judge them on data (--data), or apply the plan to the "
                "data it was made with, which gives the same bytes",
            ]
        return [
            *lines,
            "the candidate is NOT that cut with other weights:",
            *(f"  {why}" for why in mending.broken),
        ]


def _agreements(agreements: Sequence[Agreement]) -> Table:
    table = Table()
    for name in ("output", "same class", "KL", "cosine", "SNR"):
        table.add_column(name)
    for a in agreements:
        table.add_row(
            a.output,
            _cell(a.top1, "{:.2%}"),
            _cell(a.kl, "{:.3g} nats"),
            _cell(a.cosine, "{:.4f}"),
            _cell(a.snr, "{:.1f} dB") + (f" ({a.unlike} batches of other shapes)" if a.unlike else ""),
        )
    return table


def _cell(value: float | None, form: str) -> str:
    return "-" if value is None else form.format(value)


def validate(
    original: Source,
    candidate: Source,
    plan: Plan | None = None,
    *,
    data: Spec | None = None,
    samples: int | None = None,
    preprocess: Preprocess | str | None = None,
    metric: str | None = None,
    targets: Sequence[str] = (),
    threads: int = 1,
) -> Validation:
    """Judge a candidate from outside: is it sound, is it what the plan says, how far and how fast is it.

    Of a candidate whose plan repairs it is checked that it is the plan's cut but for the values of weights and
    biases, and the cut is proven. On `data`, `samples` of it, outputs are compared, and with labels, or where one
    is named, a metric of both models. On each of `targets` (`all`: those that are here) outputs and metric are compared
    again, and both timed with `threads`.
    """
    if metric is not None and data is None:
        raise UserError("--metric needs data to measure on; give --data")
    before, after = open_model(original), open_model(candidate)
    graph = DependencyGraph(before)
    opened = None
    if data is not None:
        opened = open_data(data, before, graph.shapes, samples=samples, preprocess=_parsed(preprocess))
        if metric is not None and metrics.metric(metric)().needs_labels and not opened.labelled:
            raise UserError(
                f"--metric {metric} needs labels and {opened.source} has none; use {', '.join(metrics.AGREEMENTS)}"
            )
    provenance = {
        **outcome.versions(),
        "original_sha256": before.digest(),
        "candidate_sha256": after.digest(),
        "threads": threads,
    }
    feeds = _feeds(before, graph)
    problems = structure.check(before, after, feeds)
    proof, mending = None, None
    if plan is not None:
        if plan.model != before.digest():
            raise UserError(
                f"{before.name}: the plan was made for another model; give the original it was made on"
            )
        try:
            proof, mending = _proven(graph, plan, after)
        except RunError as error:
            problems.append(f"equivalence: {error}")
    if problems:
        unsound = tuple(dict.fromkeys(problems))
        return Validation(unsound, proof, (), None, mending, provenance=provenance)
    first, second = (Session(model.proto, optimise="all", threads=1) for model in (before, after))
    drift = tuple(compare_outputs(first, second, feeds))
    del first, second  # what is timed is loaded afresh
    agreement: tuple[Agreement, ...] = ()
    quality, judge = None, None
    if opened is not None:
        agreement = tuple(metrics.compare(before, after, opened))
        if metric is not None or opened.labelled:
            judge = Judge(before, opened, metric)
            quality = Quality(judge.metric, opened.source, judge.before, judge(after.proto))
    stated = None if opened is None else described(opened)
    notes = () if opened is None else opened.notes
    found = _on_targets(graph, after, targets, threads, opened, judge)
    latency = next((one.timing for one in found if one.target == "cpu" and threads == 1), None)
    if latency is None:
        latency = timing.compare_models(target("cpu"), (before.proto, after.proto), feeds[0])
    blocks = Blocks(graph)
    return Validation(
        (),
        proof,
        drift,
        latency,
        mending,
        stated,
        agreement,
        quality,
        notes,
        found,
        CostModel(graph)(),
        CostModel(DependencyGraph(after))(),
        outcome.found_parts(blocks, after) if plan is None else outcome.parts(blocks, plan),
        provenance,
    )


def bench(
    original: Source,
    candidates: Sequence[Source],
    targets: Sequence[str] = ("cpu",),
    *,
    threads: int = 1,
) -> list[tuple[Source, OnTarget]]:
    """Every candidate beside the original on every target: who runs its nodes, how far its outputs are from the CPU's,
    and how long both take."""
    graph = DependencyGraph(open_model(original))
    opened = [open_model(candidate) for candidate in candidates]
    return [
        (candidate, one)
        for candidate, after in zip(candidates, opened, strict=True)
        for one in _on_targets(graph, after, targets, threads)
    ]


def measure(model: Source, table: str | os.PathLike[str], target: str = "cpu") -> Measured:
    """Time the pieces of a model on a target, and keep the times in a table: with it `shrink(latency=..., latency_table=...)`
    finds a share of the target's time on machines where the target does not run.

    What the table holds is not timed again. Raises `UserError` where the target does not run here, or refuses a piece, and
    for a table of another machine.
    """
    return pipeline.measure(model, target, Path(table))


def quantize(
    model: Source,
    data: Spec,
    target: str = "cpu",
    *,
    samples: int = SAMPLES,
    preprocess: Preprocess | str | None = None,
    exclude: Sequence[str] = (),
    judge: Spec | None = None,
    metric: str | None = None,
    original: Source | None = None,
    seed: int = 0,
) -> Quantised:
    """A model in integers (QDQ format), with ranges from data, as a target takes it (`Target.scheme`).

    exclude are patterns on names of nodes and weights that stay in float. The metric is measured on judge (default:
    data) where either is named, of this model, of the result, and of the `original` that it was pruned from. Raises
    `UserError`, `NothingToPrune` where nothing can be quantised, or `InternalError`.
    """
    return quantisation.quantise(
        model,
        data,
        target,
        samples=samples,
        preprocess=_parsed(preprocess),
        seed=seed,
        exclude=tuple(exclude),
        judge=judge,
        metric=metric,
        original=original,
    )


def build(
    model: str | os.PathLike[str], name: str, output: str | os.PathLike[str] | None = None
) -> dict[str, Any]:
    """Compile a model file for a target, and write the engine where `output` says.

    Returns what was `built`, `objections` that the target is known to have, and `commands` of its own tools that do the
    same. Raises `UserError` where the target is not here, has no engine files, or refuses the model.
    """
    path, where = Path(model), target(name)
    opened = open_model(path)
    if (state := where.state()).reach == "absent":
        raise UserError(f"{path}: {where} is not here: {state.missing}")
    objections = where.objections(opened)
    try:
        built = where.build(path, None if output is None else Path(output))
    except TargetError as error:
        why = f" ({'; '.join(objections)})" if objections else ""
        raise UserError(f"{path}: {where} does not build it: {error}{why}") from None
    return {
        "target": f"{where}",
        "objections": objections,
        "built": dict(built),
        "commands": where.commands(path),
    }


def _on_targets(
    graph: DependencyGraph,
    after: Model,
    names: Sequence[str],
    threads: int,
    data: Data | None = None,
    judge: Judge | None = None,
) -> tuple[OnTarget, ...]:
    """Raises `UserError` for a target that is named and not here: silence about it would pass for a proof."""
    if not 1 <= threads <= MOST_THREADS:
        raise UserError(f"--threads {threads}: give a number from 1 to {MOST_THREADS}")
    if not names:
        return ()
    for where in map(target, (name for name in names if name != "all")):
        if (state := where.state()).reach == "absent":
            raise UserError(f"--target {where}: not here: {state.missing}")
    feeds = comparison.inputs(graph, data)
    return tuple(
        comparison.on_targets(
            names, graph.model.proto, after.proto, feeds, threads=threads, started=True, judge=judge
        )
    )


def _proven(graph: DependencyGraph, plan: Plan, candidate: Model) -> tuple[Equivalence, Mending | None]:
    """The proof of a candidate; of one that differs from its plan's cut because the plan repairs, of the cut.

    Raises `RunError` if onnxruntime cannot run it.
    """
    blocks = Blocks(graph)
    removed = surgery.removed_blocks(blocks, plan) if plan.removals else []
    keep = surgery.keep_masks(graph, plan)
    if plan.options.get("repair", "none") == "none":
        return equivalence.check(graph, keep, candidate.proto, removed), None
    cut = surgery.apply(graph, plan, blocks)
    mending = mended.check(graph, cut, candidate)
    return equivalence.check(graph, keep, cut, removed), mending


def _feeds(model: Model, graph: DependencyGraph) -> list[Feeds]:
    """Two seeded inputs that the original accepts."""
    try:
        session = Session(model.proto)
    except RunError as error:
        raise UserError(f"{model.name}: onnxruntime cannot load the original: {error}") from None
    try:
        runs = accepted_runs(model, graph.shapes, session.run, equivalence.RUNS)
    except RunError as error:
        raise UserError(f"{model.name}: onnxruntime cannot run the original: {error}") from None
    return [feeds for _, feeds, _ in runs]


def fold(model: Source) -> Folded:
    """Exact canonicalisation: BatchNorm into weights, constants evaluated."""
    return pipeline.fold(open_model(model))
