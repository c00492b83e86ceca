"""The Python interface: the same steps as the command line, as functions."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from onnxprune import pipeline, surgery
from onnxprune.blocks import Blocks
from onnxprune.dependency import DependencyGraph
from onnxprune.errors import UserError
from onnxprune.inspection import Inspection
from onnxprune.model import Model
from onnxprune.passes import Options
from onnxprune.pipeline import Folded, Result, Source
from onnxprune.plan import Plan
from onnxprune.report import verdict
from onnxprune.runtime import Feeds, RunError, Session
from onnxprune.shapes import accepted_runs
from onnxprune.validation import equivalence, structure
from onnxprune.validation.drift import Drift, Latency, compare_outputs, time_both
from onnxprune.validation.equivalence import Equivalence


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
    criterion: str = "l2",
    allocation: str = "uniform",
    align: int = 16,
    min_channels: int = 1,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    allow_lossy: bool = False,
    seed: int = 0,
) -> Result:
    """Prune a model and prove the result equal to the masked original.

    channels is the share of units to remove from every prunable group; heads, head_width, ffn and hidden
    are shares for groups of that role; layers is how many residual blocks to remove, a share of them, or
    patterns on their names. macs and params are the shares of the model's MACs or parameters to keep,
    instead of shares to remove. Raises `NothingToPrune`, `UserError` or `InternalError`.
    """
    options = Options(
        channels=channels, heads=heads, head_width=head_width, ffn=ffn, hidden=hidden,
        layers=None if layers is None else str(layers), layer_criterion=layer_criterion, macs=macs,
        params=params, criterion=criterion, strategy=allocation, align=align, minimum=min_channels,
        include=tuple(include), exclude=tuple(exclude), allow_lossy=allow_lossy, seed=seed,
    )  # fmt: skip
    return pipeline.prune(model, options)


def apply(model: Source, plan: Plan | str | os.PathLike[str]) -> Result:
    """Replay a plan, or a plan file, on the model it was made for."""
    return pipeline.apply_plan(model, plan if isinstance(plan, Plan) else Plan.load(Path(plan)))


def inspect(model: Source) -> Inspection:
    """Groups, pinned axes and their reasons."""
    return Inspection(Blocks(DependencyGraph(pipeline.open_model(model))))


@dataclass(frozen=True)
class Validation:
    """Structure, equivalence (where a plan is given), output drift and latency of two models."""

    problems: tuple[str, ...]
    equivalence: Equivalence | None
    drift: tuple[Drift, ...]
    latency: Latency | None

    @property
    def passed(self) -> bool:
        return not self.problems and (self.equivalence is None or self.equivalence.passed)

    def as_dict(self) -> dict[str, Any]:
        return {
            "passed": self.passed,
            "problems": list(self.problems),
            "equivalence": self.equivalence.as_dict() if self.equivalence else None,
            "drift": [asdict(d) for d in self.drift],
            "latency": asdict(self.latency) if self.latency else None,
        }

    def print(self, console: Console) -> None:
        console.print("structure: " + ("sound, same interface" if not self.problems else "BROKEN"))
        for problem in self.problems:
            console.print(f"  {problem}")
        proof = verdict(self.equivalence) if self.equivalence else "equivalence: not checked (give --plan)"
        for line in proof.splitlines():
            console.print(line)
        if self.drift:
            table = Table(title="output drift on random inputs", title_justify="left")
            for name in ("output", "largest difference", "cosine"):
                table.add_column(name)
            for d in self.drift:
                table.add_row(d.output, f"{d.error:.2e} of scale", f"{d.cosine:.4f}")
            console.print(table)
        if self.latency:
            spread = f"{self.latency.ratios[0]:.2f} to {self.latency.ratios[-1]:.2f}"
            busy = "; contended: the machine was busy" if self.latency.contended else ""
            console.print(
                f"latency (onnxruntime CPU, 1 thread): {self.latency.before:.3g} ms -> {self.latency.after:.3g} ms, "
                f"x{self.latency.ratio:.2f} (rounds {spread}){busy}"
            )


def validate(original: Source, candidate: Source, plan: Plan | None = None) -> Validation:
    """Judge a candidate from outside: is it sound, is it what the plan says, how far and how fast is it."""
    before, after = pipeline.open_model(original), pipeline.open_model(candidate)
    graph = DependencyGraph(before)
    feeds = _feeds(before, graph)
    problems = structure.check(before, after, feeds)
    proof = None
    if plan is not None:
        if plan.model != before.digest():
            raise UserError(
                f"{before.name}: the plan was made for another model; give the original it was made on"
            )
        try:
            removed = surgery.removed_blocks(Blocks(graph), plan) if plan.removals else []
            proof = equivalence.check(graph, surgery.keep_masks(graph, plan), after.proto, removed)
        except RunError as error:
            problems.append(f"equivalence: {error}")
    if problems:
        return Validation(tuple(dict.fromkeys(problems)), proof, (), None)
    sessions = (
        Session(before.proto, optimise="all", threads=1),
        Session(after.proto, optimise="all", threads=1),
    )
    return Validation((), proof, tuple(compare_outputs(*sessions, feeds)), time_both(*sessions, feeds[0]))


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
    return pipeline.fold(pipeline.open_model(model))
