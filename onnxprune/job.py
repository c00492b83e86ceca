"""One model on its way through the pipeline: what it is given with, what is found about it, how long each stage took."""

from __future__ import annotations

import functools
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import onnx

from onnxprune import flow, graphsurgeon, metrics, passes, surgery
from onnxprune.blocks import Blocks
from onnxprune.calibration import Calibration
from onnxprune.data import Data, Preprocess, Spec, open_data, synthetic
from onnxprune.dependency import DependencyGraph
from onnxprune.errors import UserError
from onnxprune.model import Layout, Model, load, materialised, places, save
from onnxprune.passes import Options, iterative
from onnxprune.plan import Plan
from onnxprune.repair import Repairs, repair
from onnxprune.report import Candidates

Source = str | os.PathLike[str] | onnx.ModelProto | graphsurgeon.Graph
"""The path of a model, the model, or an `onnx_graphsurgeon.Graph`."""
Progress = Callable[[str, float | None], None]
"""Called with the stage at work, and the share of it that is done, where that is known."""

SAMPLES = 256  # to calibrate on
MADE_UP = 256  # where there is no data
UNMEASURED = ", and nothing was measured on data"  # what notes on made-up inputs say


def quiet(_stage: str, _share: float | None) -> None:
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


class Job:
    """One model on its way through the pipeline: what is found about it is found once."""

    def __init__(self, model: Model, options: Options, inputs: Inputs, clock: Clock) -> None:
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


def described(data: Data) -> dict[str, object]:
    """Data as a report remembers it."""
    return {"source": data.source, "measured": data.measured, **data.provenance}


class Clock:
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
