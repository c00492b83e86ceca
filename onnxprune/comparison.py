"""The original and a candidate side by side on a target: whether both load there, whether their nodes really run
there, whether the outputs are those of the CPU, how long they take and what they weigh."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from rich.table import Table

from onnxprune import flow, timing
from onnxprune.data import synthetic
from onnxprune.dependency import DependencyGraph
from onnxprune.errors import UserError
from onnxprune.model import load, materialised, save
from onnxprune.outputs import unsaturated
from onnxprune.runtime import EXTERNAL_BYTES, Feeds, RunError, Session
from onnxprune.shapes import accepted_runs
from onnxprune.targets import TARGETS, Engine, State, Target, TargetError, target
from onnxprune.validation.difference import difference

INSIDE = 2**30  # bytes of a model whose weights stay in its file
WRONG = 0.2  # of scale: no precision alone takes outputs so far from the CPU's
TIMES = 3  # the original's error on a target, and the CPU's own, that a candidate may have


@dataclass(frozen=True)
class OnTarget:
    """What became of both models on one target.

    failed    why there is no result: the target is not here, or refuses a model; empty where there is one
    built     what the target's compiler made of the candidate, where it builds
    nodes     of the candidate, by who runs them
    elsewhere which of them ran elsewhere than on the target, in words; empty where none did
    errors    largest difference of the candidate's outputs from the CPU's, as a share of their scale
    original  the same of the original: what the target does to any model
    noise     how far the CPU is from itself with other optimisations, of the candidate
    agrees    whether errors are within the target's tolerance, or a few times the original's or the noise
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
    agrees: bool | None = None
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
        """Whether the candidate is no faster, as far as the machine let that be seen: what a contended machine hides
        is no reason to refuse a result."""
        if self.timing is None:
            return False
        outcome = timing.verdict(self.timing).outcome
        return outcome == "not faster" or (outcome == "cannot tell" and not self.timing.contended)

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
            "agrees": self.agrees,
            "timing": None if self.timing is None else self.timing.as_dict(),
            "size": _pair(self.size),
            "memory": _pair(self.memory),
        }


def _pair(values: tuple[int, int] | None) -> dict[str, int] | None:
    return None if values is None else dict(zip(("before", "after"), values, strict=True))


def table(found: Sequence[OnTarget]) -> Table:
    """One row for each target: outputs, time, memory and size, before and after."""
    made = Table()
    made.add_column("target")
    made.add_column("outputs")
    for name in ("ms", "ratio (rounds)", "memory, MiB", "file, MB"):
        made.add_column(name, justify="right")
    for one in found:
        made.add_row(
            one.target, one.outcome, *_times(one.timing), _change(one.memory, 2**20), _change(one.size, 10**6)
        )
    return made


def _times(found: timing.Timing | None) -> tuple[str, str]:
    if found is None:
        return "-", "-"
    low, high = found.range
    before, after = found.engines[0].milliseconds, found.candidate.milliseconds
    return f"{before:.4g} -> {after:.4g}", f"{found.ratio:.3f} ({low:.3f} to {high:.3f})"


def _change(values: tuple[int, int] | None, unit: int) -> str:
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
) -> list[OnTarget]:
    """Two models, as they are in memory, on every target named (`all`: that is here)."""
    found = []
    with tempfile.TemporaryDirectory(prefix="onnxprune-") as folder:
        paths = [Path(folder) / "original.onnx", Path(folder) / "candidate.onnx"]
        for path, proto in zip(paths, (original, candidate), strict=True):
            nested = flow.nest(materialised(proto))
            large = {t.name: "" for t in nested.graph.initializer if len(t.raw_data) > EXTERNAL_BYTES}
            save(nested, path, large if nested.ByteSize() > INSIDE else {})
        for where in chosen(names):
            found.append(compare(where, paths[0], paths[1], feeds, threads=threads, started=started))
    return found


def compare(
    where: Target,
    original: Path,
    candidate: Path,
    feeds: Sequence[Feeds],
    *,
    threads: int = 1,
    started: bool = False,
) -> OnTarget:
    """Both models on one target.

    feeds    two or more different inputs that the original accepts
    started  whether to measure loading and memory, too, in a new process for each model
    """
    state = where.state()
    stated = OnTarget(f"{where}", where.title, state)
    if state.reach == "absent":
        return _with(stated, failed=f"not here: {state.missing}")
    objections = tuple(where.objections(load(candidate)))
    if state.reach == "builds":
        return _built(stated, where, original, candidate, objections)
    with contextlib.ExitStack() as stack:
        engines: list[Engine] = []
        for role, path in (("original", original), ("candidate", candidate)):
            try:
                engine = where.load(path, threads)
            except TargetError as error:
                return _with(stated, objections=objections, failed=f"{role} refused: {error}")
            stack.callback(engine.close)
            engines.append(engine)
        errors: list[dict[str, float]] = []
        for role, path, engine in zip(("original", "candidate"), (original, candidate), engines, strict=True):
            try:
                errors.append(_errors(where, path, engine, feeds))
            except (TargetError, RunError) as error:
                return _with(stated, objections=objections, failed=f"{role} fails: {error}")
        worst, usual = (max(found.values(), default=0.0) for found in reversed(errors))
        if usual > max(WRONG, TIMES * _noise(original, feeds)):
            why = f"original is computed wrong there ({usual:.1e} of scale from the CPU): nothing can be said of the candidate"
            return _with(stated, objections=tuple(where.objections(load(original))), failed=why)
        noise = _noise(candidate, feeds)
        measured = None
        if where.timed:
            starts = (
                [timing.startup(where, path, feeds[0], threads) for path in (original, candidate)]
                if started
                else []
            )
            measured = timing.compare(engines, feeds[0], starts=starts)
        return _with(
            stated,
            objections=objections,
            nodes=engines[1].nodes,
            elsewhere=timing.placement(engines[1], engines[1].place).text if engines[1].place else "",
            errors=errors[1],
            original=errors[0],
            noise=noise,
            agrees=worst <= max(where.tolerance, TIMES * usual, TIMES * noise),
            timing=measured,
            size=(_bytes(original), _bytes(candidate)),
        )


def _bytes(path: Path) -> int:
    """Of a model's file, and of those that its weights lie in."""
    return sum(file.stat().st_size for file in load(path).files)


def _built(
    stated: OnTarget, where: Target, original: Path, candidate: Path, objections: tuple[str, ...]
) -> OnTarget:
    built = []
    for role, path in (("original", original), ("candidate", candidate)):
        try:
            built.append(where.build(path))
        except TargetError as error:
            return _with(stated, objections=objections, failed=f"{role} refused: {error}")
    return _with(stated, objections=objections, built=built[1], size=(built[0]["bytes"], built[1]["bytes"]))


def _with(stated: OnTarget, **found: Any) -> OnTarget:
    return OnTarget(stated.target, stated.title, stated.state, **found)


def _errors(where: Target, path: Path, engine: Engine, feeds: Sequence[Feeds]) -> dict[str, float]:
    """Of every output the largest difference from the CPU's. Raises `TargetError` where nothing ran on the target, or
    nothing is computed there."""
    placed = timing.placement(engine, engine.place)
    if engine.place and placed.fell_back:
        raise TargetError(placed.text)
    session = Session(path, optimise="basic")
    shares = _shares(path)
    here = [_raised(session.run(feed), shares) for feed in feeds]
    there = [_raised(engine.run(feed), shares) for feed in feeds]
    if missing := next((name for name in here[0] if name not in there[0]), None):
        raise TargetError(f"it does not give output '{missing}'")
    if idle := timing.unresponsive(here, there, where.tolerance):
        raise TargetError(idle)
    found: dict[str, float] = {}
    for wanted, made in zip(here, there, strict=True):
        for name, value in wanted.items():
            if isinstance(value, np.ndarray):
                error = difference({name: value}, {name: np.asarray(made[name])})
                found[name] = max(found.get(name, 0.0), error)
    return found


def _noise(path: Path, feeds: Sequence[Feeds]) -> float:
    """The largest difference between the CPU without optimisations and with all: what rounding does to the model."""
    plain, fast, shares = Session(path), Session(path, optimise="all"), _shares(path)
    return max(difference(_raised(plain.run(f), shares), _raised(fast.run(f), shares)) for f in feeds)


def _shares(path: Path) -> set[str]:
    """Outputs that a saturating function makes."""
    model = load(path)
    return {output.name for output in model.outputs if unsaturated(model, output.name) != output.name}


def _raised(values: Mapping[str, Any], shares: Collection[str]) -> dict[str, Any]:
    """Outputs, those that are shares raised by one: near zero they are what is left of large numbers, and say nothing
    in proportion to themselves."""
    return {
        name: value + np.float64(1) if name in shares and isinstance(value, np.ndarray) else value
        for name, value in values.items()
    }


def inputs(graph: DependencyGraph) -> list[Feeds]:
    """Two different inputs that a model runs on, made up to suit it: batches of one, where the batch is open.

    Raises `UserError` if onnxruntime cannot run it.
    """
    model, shapes = graph.model, graph.shapes
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
