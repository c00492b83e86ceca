"""The original and a candidate side by side on a target: whether both load there, whether their nodes really run
there, whether the outputs are those of the CPU, how long they take and what they weigh."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from rich.console import Console
from rich.table import Table

from onnxprune import timing
from onnxprune.data import Data, synthetic
from onnxprune.dependency import DependencyGraph
from onnxprune.errors import UserError
from onnxprune.model import save_whole
from onnxprune.reference import Reference, arrays
from onnxprune.runtime import Feeds, RunError, Session, crash
from onnxprune.shapes import accepted_runs
from onnxprune.targets import TARGETS, Engine, State, Target, TargetError, target
from onnxprune.validation import structure

WRONG = 0.2  # of scale: no precision alone takes outputs so far from the CPU's
TIMES = 3  # the original's error on a target, and the CPU's own, that a candidate may have
FOLLOWED = 0.1  # of the tolerance: changes of an output from one input to another that a target has to show
UNKNOWN = "{}: nothing can be said of the candidate"

Judge = Callable[[Engine], float]


@dataclass(frozen=True)
class OnTarget:
    """What became of both models on one target.

    failed    why there is no result: the target is not here, or refuses a model; empty where there is one
    built     what the target's compiler made of the candidate, where it builds
    nodes     of the candidate, by who runs them
    elsewhere which of them ran elsewhere than on the target, in words; empty where none did
    errors    largest difference of the candidate's outputs from the CPU's, as a share of their scale
    original  the same of the original: what the target does to any model
    noise     how far the CPU is from itself with other optimisations, of either
    limit     of errors: the target's tolerance, or a few times the original's or the noise, where that is more
    agrees    whether errors are within it
    quality   the metric of both, run there, where one was asked for
    settings  provider, version, options, threads, precision: whatever a result depends on
    timing    of both, where times mean anything
    size      bytes of both: of the files that it loads, or of the engines that it builds
    """

    target: str
    title: str
    state: State
    objections: tuple[str, ...] = ()
    failed: str = ""
    built: Mapping[str, Any] = field(default_factory=dict)
    nodes: Mapping[str, int] = field(default_factory=dict)
    elsewhere: str = ""
    errors: Mapping[str, float] = field(default_factory=dict)
    original: Mapping[str, float] = field(default_factory=dict)
    noise: float = 0.0
    limit: float = 0.0
    agrees: bool | None = None
    quality: tuple[float, float] | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)
    timing: timing.Timing | None = None
    size: tuple[int, int] | None = None

    @property
    def memory(self) -> tuple[int, int] | None:
        """The most bytes that both held, with what they started, in a process of their own; none where that was not
        measured."""
        starts = [one.start for one in self.timing.engines] if self.timing else []
        peaks = [start.peak for start in starts if start is not None and start.peak is not None]
        return (peaks[0], peaks[-1]) if len(peaks) > 1 else None

    @property
    def slower(self) -> bool:
        """Whether the candidate is not shown to be faster. A contended machine may hide that it is, but not make it look
        slower all the time."""
        if self.timing is None or timing.verdict(self.timing).outcome == "faster":
            return False
        return not self.timing.contended or self.timing.ratio >= 1

    def __str__(self) -> str:
        if self.failed:
            return f"{self.target}: {self.failed}"
        if self.agrees is None:
            return f"{self.target}: builds"
        worst, usual = (max(one.values(), default=0.0) for one in (self.errors, self.original))
        far = f"{worst:.1e} of scale from the CPU (the original {usual:.1e})"
        agreed = f"outputs {'agree' if self.agrees else 'are WRONG'}, {far}"
        if self.elsewhere:
            agreed += f"; {self.elsewhere}"
        times = f"; {timing.verdict(self.timing).text}" if self.timing else "; times mean nothing here"
        return f"{self.target}: {agreed}{times}"

    @property
    def outcome(self) -> str:
        """What became of the candidate's outputs, in a few words."""
        if self.failed:
            return "refused" if self.failed.startswith("candidate") else "no result"
        if self.agrees is None:
            return "builds"
        worst = max(self.errors.values(), default=0.0)
        return f"{'agree' if self.agrees else 'WRONG'}, {worst:.1e} of scale"

    @property
    def broken(self) -> bool:
        """Whether the target is here and the candidate is wrong, or refused, where the original is not."""
        return self.agrees is False or (bool(self.failed) and self.failed.startswith("candidate"))

    def as_dict(self) -> dict[str, Any]:
        return {
            "target": self.target,
            "title": self.title,
            "state": asdict(self.state),
            "objections": list(self.objections),
            "failed": self.failed,
            "built": dict(self.built),
            "nodes": dict(self.nodes),
            "elsewhere": self.elsewhere,
            "errors": dict(self.errors),
            "original_errors": dict(self.original),
            "noise": self.noise,
            "limit": self.limit,
            "agrees": self.agrees,
            "quality": _pair(self.quality),
            "settings": dict(self.settings),
            "slower": self.slower,
            "timing": None if self.timing is None else self.timing.as_dict(),
            "size": _pair(self.size),
            "memory": _pair(self.memory),
        }


def _pair(values: tuple[float, float] | None) -> dict[str, float] | None:
    return None if values is None else dict(zip(("before", "after"), values, strict=True))


def show(found: Sequence[OnTarget], console: Console) -> None:
    """One row for each target: outputs, time, memory and size, before and after; then a sentence on each."""
    if not found:
        return
    made = Table()
    made.add_column("target")
    made.add_column("outputs")
    judged = any(one.quality for one in found)
    for name in ("ms", "ratio (rounds)", *(["metric"] if judged else []), "memory, MiB", "file, MB"):
        made.add_column(name, justify="right")
    for one in found:
        made.add_row(
            one.target,
            one.outcome,
            *_times(one.timing),
            *([_change(one.quality)] if judged else []),
            _change(one.memory, 2**20),
            _change(one.size, 10**6),
        )
    console.print(made)
    for one in found:
        console.print(f"{one}", soft_wrap=True)


def _times(found: timing.Timing | None) -> tuple[str, str]:
    if found is None:
        return "-", "-"
    low, high = found.range
    before, after = found.engines[0].milliseconds, found.candidate.milliseconds
    return f"{before:.4g} -> {after:.4g}", f"{found.ratio:.3f} ({low:.3f} to {high:.3f})"


def _change(values: tuple[float, float] | None, unit: int = 1) -> str:
    return "-" if values is None else f"{values[0] / unit:.4g} -> {values[1] / unit:.4g}"


def chosen(names: Sequence[str]) -> list[Target]:
    """Targets by name; `all` is every one that runs or builds here."""
    found: dict[str, Target] = {}
    for name in names:
        for one in [target(n) for n in TARGETS] if name == "all" else [target(name)]:
            if name != "all" or one.state().reach != "absent":
                found.setdefault(f"{one}", one)
    if not found:
        raise UserError(f"none of the targets {', '.join(TARGETS)} is here; see `onnxprune targets`")
    return list(found.values())


def on_targets(
    names: Sequence[str],
    original: onnx.ModelProto,
    candidate: onnx.ModelProto,
    feeds: Sequence[Feeds],
    *,
    threads: int = 1,
    started: bool = False,
    judge: Judge | None = None,
) -> list[OnTarget]:
    """Two models, as they are in memory, on every target named (`all`: that is here)."""
    with tempfile.TemporaryDirectory(prefix="onnxprune-") as folder:
        both = []
        for role, proto in (("original", original), ("candidate", candidate)):
            both.append(Reference(Path(folder) / f"{role}.onnx", feeds))
            save_whole(proto, both[-1].path)
        return [
            compare(where, *both, threads=threads, started=started, judge=judge) for where in chosen(names)
        ]


def compare(
    where: Target,
    original: Reference,
    candidate: Reference,
    *,
    threads: int = 1,
    started: bool = False,
    judge: Judge | None = None,
) -> OnTarget:
    """Both models on one target, with two or more different inputs that the original accepts.

    started  whether to measure loading and memory, too, in a new process for each model
    judge    gives the score of a metric; raises `UserError`
    """
    state = where.state()
    stated = OnTarget(f"{where}", where.title, state)
    if state.reach == "absent":
        return replace(stated, failed=f"not here: {state.missing}")
    if changed := structure.interface(original.model, candidate.model):
        return replace(stated, failed=f"candidate is another function: {changed[0]}")
    stated = replace(stated, objections=tuple(where.objections(candidate.model)))
    if state.reach == "builds":
        return _built(stated, where, original, candidate)
    both = {"original": original, "candidate": candidate}
    with contextlib.ExitStack() as stack:
        engines: list[Engine] = []
        for role, one in both.items():
            try:
                engines.append(_loaded(where, one, threads))
            except TargetError as error:
                return replace(stated, failed=f"{role} refused: {error}")
            stack.callback(engines[-1].close)
        stated = replace(
            stated,
            settings=engines[1].settings,
            nodes=engines[1].nodes,
            elsewhere=timing.placement(engines[1], engines[1].place).text if engines[1].place else "",
            size=(original.bytes, candidate.bytes),
        )
        errors: list[dict[str, float]] = []
        noise = 0.0
        for (role, one), engine in zip(both.items(), engines, strict=True):
            try:
                errors.append(_errors(where, one, engine))
                noise = max(noise, one.noise)
            except (TargetError, RunError) as error:
                return replace(stated, failed=f"{role} fails: {error}")
        usual, worst = (max(found.values(), default=0.0) for found in errors)
        if broken := structure.unbounded(original.outputs, candidate.outputs):
            return replace(stated, failed=f"candidate fails: {broken[0]}")
        stated = replace(stated, errors=errors[1], original=errors[0], noise=noise)
        if not np.isfinite(noise):
            return replace(
                stated, failed=UNKNOWN.format("the CPU gives other results with optimisations than without")
            )
        if usual > WRONG:
            why = f"original is computed wrong there ({usual:.1e} of scale from the CPU)"
            return replace(
                stated, objections=tuple(where.objections(original.model)), failed=UNKNOWN.format(why)
            )
        limit = min(max(where.tolerance, TIMES * usual, TIMES * noise), max(WRONG, where.tolerance))
        stated = replace(stated, limit=limit, agrees=worst <= limit)
        try:
            if judge is not None:
                stated = replace(stated, quality=(judge(engines[0]), judge(engines[1])))
            if where.timed:
                feeds = original.feeds[0]
                starts = [timing.startup(where, one.path, feeds, threads) for one in both.values() if started]
                stated = replace(stated, timing=timing.compare(engines, feeds, starts=starts))
        except TargetError as error:
            return replace(stated, failed=f"agrees on two inputs, and then: {error}" if stated.agrees else "")
    return stated


def _loaded(where: Target, one: Reference, threads: int) -> Engine:
    """Raises `TargetError`, too, for what would take the process along on the CPU, which every target is held against."""
    if (why := crash(one.model.source)) is not None:
        raise TargetError(why)
    return where.load(one.path, threads)


def _built(stated: OnTarget, where: Target, original: Reference, candidate: Reference) -> OnTarget:
    built = []
    for role, one in (("original", original), ("candidate", candidate)):
        try:
            built.append(where.build(one.path))
        except TargetError as error:
            return replace(stated, failed=f"{role} refused: {error}")
    return replace(stated, built=built[1], size=(built[0]["bytes"], built[1]["bytes"]))


def _errors(where: Target, one: Reference, engine: Engine) -> dict[str, float]:
    """Of every output the largest difference from the CPU's. Raises `TargetError` where nothing ran on the target, or
    nothing is computed there.

    Where what a saturating function makes hardly varies, what it is made from is compared, too: nearly all of a network's
    shares are next to nothing, as is what a target returns that computes nothing.
    """
    placed = timing.placement(engine, engine.place)
    if engine.place and placed.fell_back:
        raise TargetError(placed.text)
    blind = one.blind(where.tolerance)
    found = _held_against(where, one, engine, blind)
    if blind:
        with tempfile.TemporaryDirectory(prefix="onnxprune-") as folder:
            front = one.front(blind, Path(folder))
            within = where.load(front.path)
            try:
                found |= _held_against(where, front, within, ())
            finally:
                within.close()
    return found


def _held_against(where: Target, one: Reference, engine: Engine, blind: Collection[str]) -> dict[str, float]:
    there = [arrays(engine.run(feed)) for feed in one.feeds]
    for wanted, made in zip(one.outputs, there, strict=True):
        if missing := next((name for name in wanted if name not in made), None):
            raise TargetError(f"it does not give output '{missing}'")
    telling = [{name: value for name, value in run.items() if name not in blind} for run in one.outputs]
    if idle := timing.unresponsive(telling, there, where.tolerance * FOLLOWED):
        raise TargetError(idle)
    return one.errors(there)


def inputs(graph: DependencyGraph, data: Data | None = None) -> list[Feeds]:
    """Two different inputs that a model runs on, of the data or made up to suit it: batches of one, where the batch is
    open.

    Raises `UserError` if onnxruntime cannot run it.
    """
    model, shapes = graph.model, graph.shapes
    if data is not None and len(given := [batch.feeds for batch in islice(data.batches(1), 2)]) == 2:
        return given
    try:
        session = Session(model.proto)
        with contextlib.suppress(
            UserError, RunError
        ):  # inputs of no kind that can be made up, or a batch of its own
            made = [batch.feeds for batch in synthetic(model, shapes, samples=2, seed=0).batches(1)][:2]
            for feeds in made:
                session.run(feeds)
            if len(made) == 2:
                return made
        _, feeds, _ = next(iter(accepted_runs(model, shapes, session.run, 1)))
        other = {n: v[..., ::-1].copy() if v.ndim and v.dtype.kind == "f" else v for n, v in feeds.items()}
        session.run(other)
    except RunError as error:
        raise UserError(f"{model.name}: onnxruntime cannot run the original: {error}") from None
    return [feeds, other]
