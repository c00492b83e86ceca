"""How long engines take, measured so that the numbers can be believed, and guards against numbers that cannot.

All engines are alive in one process and run in turns, so that whatever slows the machine down slows all of them.
The least time of each round is kept, because other work only ever adds to it, and ratios are taken within a round
(docs/measuring.md).
"""

from __future__ import annotations

import contextlib
import os
import pickle
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median, quantiles
from typing import Any, Literal

import numpy as np
import onnx
from rich.table import Table

from onnxprune.errors import UserError, printable
from onnxprune.model import Array, save, save_whole, uncollected
from onnxprune.runtime import Feeds
from onnxprune.targets import Engine, Target, TargetError

THREADS = 1  # of engines, where nobody asks for more
ROUNDS = 7
SECONDS = 0.25  # for each engine in each round
WARM = 5  # runs before: the first costs up to 40 times as much
SHARE = 0.9  # of a processor: below it other work got in between
SPREAD = 0.1  # between the quartiles of the ratios, over their median: above it they say little
LEAST = 0.01  # difference that counts: two sessions of one file differ by up to 0.6 %, round after round
PATIENCE = 600  # seconds for a process that loads a model and runs it

Progress = Callable[[float], None]


@dataclass(frozen=True)
class Start:
    """One engine in a process of its own, in which the target's software is already loaded.

    load, first     milliseconds to load the model, and of its first run
    peak, resident  bytes by which the largest memory ever held grew, and by which more is held after some runs; of the
                    process and those that it started; none where the system does not say
    """

    load: float
    first: float
    peak: int | None
    resident: int | None


@dataclass(frozen=True)
class Measured:
    """One engine.

    rounds    milliseconds of its fastest run, of each round
    ratios    these over the original's of the same round
    work      milliseconds of CPU time of its cheapest run, of each round; empty where it computes elsewhere
    share     CPU time of all runs over wall time and threads; none where it computes elsewhere
    runs      how many were timed
    threads   that it was given
    settings  of the engine
    nodes     by who runs them
    start     what `startup` found, where the caller asked
    """

    name: str
    rounds: tuple[float, ...]
    ratios: tuple[float, ...]
    work: tuple[float, ...]
    share: float | None
    runs: int
    threads: int
    settings: Mapping[str, Any]
    nodes: Mapping[str, int]
    start: Start | None = None

    @property
    def milliseconds(self) -> float:
        """The median of the rounds."""
        return median(self.rounds)

    @property
    def ratio(self) -> float:
        """The median of the ratios."""
        return median(self.ratios)

    def as_dict(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "milliseconds": self.milliseconds,
            "range": [min(self.rounds), max(self.rounds)],
            "rounds": list(self.rounds),
            "ratio": self.ratio,
            "ratio_range": [min(self.ratios), max(self.ratios)],
            "ratios": list(self.ratios),
            "cpu": self.share,
            "cpu_rounds": list(self.work),
            "runs": self.runs,
            "threads": self.threads,
            "settings": dict(self.settings),
            "nodes": dict(self.nodes),
            "start": None if self.start is None else asdict(self.start),
        }


@dataclass(frozen=True)
class Timing:
    """Engines measured against the first, which is the original."""

    engines: tuple[Measured, ...]
    seconds: float
    seed: int

    @property
    def candidate(self) -> Measured:
        """The engine that is compared; the last."""
        return self.engines[-1]

    @property
    def ratio(self) -> float:
        """Of the candidate's time over the original's: below 1 is faster."""
        return self.candidate.ratio

    @property
    def range(self) -> tuple[float, float]:
        """The least and the largest ratio of any round."""
        return min(self.candidate.ratios), max(self.candidate.ratios)

    @property
    def contended(self) -> str:
        """Why times mean little, in words; empty where they do mean something.

        With several threads one of them, at least, should have had a processor all the time.
        """
        found = [
            f"the {one.name} had a processor for {one.share * one.threads:.0%} of its time"
            for one in self.engines
            if one.share is not None and one.share * one.threads < SHARE
        ]
        for one in self.engines[1:]:
            if (spread := _spread(one.ratios)) > SPREAD:
                found.append(f"ratios of the {one.name} spread by {spread:.0%} between rounds")
        return "; ".join(found)

    def as_dict(self) -> dict[str, Any]:
        """For JSON. `before` and `after` are the first engine and the last; `rounds` has one list for each round."""
        first, last = self.engines[0], self.engines[-1]
        return {
            "before": first.milliseconds,
            "after": last.milliseconds,
            "ratio": self.ratio,
            "range": list(self.range),
            "ratios": list(last.ratios),
            "rounds": [list(row) for row in zip(*(one.rounds for one in self.engines), strict=True)],
            "cpu": {"before": first.share, "after": last.share},
            "contended": self.contended,
            "verdict": verdict(self).outcome,
            "settings": dict(last.settings),
            "method": {"seconds": self.seconds, "seed": self.seed, "warm": WARM},
            "engines": [one.as_dict() for one in self.engines],
        }

    def table(self) -> Table:
        """One row for each engine; columns of which nothing is known are left out."""
        started = any(one.start for one in self.engines)
        held = any(one.start and one.start.peak is not None for one in self.engines)
        table = Table()
        table.add_column("")
        for name in ("ms", "rounds", "ratio", "rounds", "CPU"):
            table.add_column(name, justify="right")
        for name in ("load", "first run") * started + ("memory",) * held:
            table.add_column(name, justify="right")
        for number, one in enumerate(self.engines):
            cells = [one.name, f"{one.milliseconds:.4g}", _range(one.rounds, "{:.4g}")]
            cells += [f"{one.ratio:.3f}", _range(one.ratios, "{:.3f}")] if number else ["", ""]
            cells.append("elsewhere" if one.share is None else f"{one.share:.0%}")
            if one.start:
                cells += [f"{one.start.load:.4g} ms", f"{one.start.first:.4g} ms"]
                if one.start.peak is not None:
                    cells.append(f"{one.start.peak / 2**20:.1f} MiB")
            table.add_row(*cells)
        return table


def _range(values: Sequence[float], form: str) -> str:
    return f"{form.format(min(values))} to {form.format(max(values))}"


def _spread(ratios: Sequence[float]) -> float:
    """Between the quartiles, so that one bad round does not count; over the median."""
    if len(ratios) < 2:
        return 0.0
    low, middle, high = quantiles(ratios, n=4, method="inclusive")
    return (high - low) / middle


def compare(
    engines: Sequence[Engine],
    feeds: Feeds,
    *,
    rounds: int = ROUNDS,
    seconds: float | None = None,
    seed: int = 0,
    starts: Sequence[Start] = (),
    progress: Progress = lambda _: None,
) -> Timing:
    """Engines in turns; the first is the original.

    engines  freshly loaded, on one target, of the same settings
    seconds  for each engine in each round (default `SECONDS`); every engine runs at least once
    seed     of the order of the engines, which is drawn for every round
    starts   of the engines, where `startup` was asked

    Raises `TargetError`, saying which engine it was.
    """
    names = [_name(number, len(engines)) for number in range(len(engines))]
    for name, engine in zip(names, engines, strict=True):
        try:
            for _ in range(WARM):
                engine.run(feeds)
        except TargetError as error:
            raise TargetError(f"the {name} does not run: {error}") from None
    budget = SECONDS if seconds is None else seconds
    order = np.random.default_rng(seed)
    clocks = [_Clock(engine, feeds) for engine in engines]
    for number in range(rounds):
        _round([clocks[place] for place in order.permutation(len(clocks))], budget)
        progress((number + 1) / rounds)
    base = clocks[0].walls
    found = []
    for number, (name, clock) in enumerate(zip(names, clocks, strict=True)):
        settings = dict(clock.engine.settings)
        threads = settings.get("threads")
        threads = threads if isinstance(threads, int) and threads > 0 else 1
        here = bool(settings.get("on_cpu", True))
        found.append(
            Measured(
                name,
                rounds=tuple(one * 1e3 for one in clock.walls),
                ratios=tuple(own / other for own, other in zip(clock.walls, base, strict=True)),
                work=tuple(one * 1e3 for one in clock.works) if here else (),
                share=clock.work / clock.wall / threads if here else None,
                runs=clock.runs,
                threads=threads,
                settings=settings,
                nodes=dict(clock.engine.nodes),
                start=starts[number] if number < len(starts) else None,
            )
        )
    return Timing(tuple(found), budget, seed)


def _name(number: int, count: int) -> str:
    if not number:
        return "original"
    return "candidate" if count == 2 else f"candidate {number}"


def compare_models(
    where: Target, protos: Sequence[onnx.ModelProto], feeds: Feeds, *, threads: int = 1
) -> Timing:
    """Models in memory, loaded afresh on a target and compared; the first is the original. Raises `TargetError`."""
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="onnxprune-")))
        engines = []
        for number, proto in enumerate(protos):
            path = folder / f"{number}.onnx"
            save_whole(proto, path)
            try:
                engine = where.load(path, threads)
            except TargetError as error:
                raise TargetError(f"the {_name(number, len(protos))} does not load: {error}") from None
            stack.callback(engine.close)
            engines.append(engine)
        return compare(engines, feeds)


class _Clock:
    """An engine, and the times of its runs in seconds: the least of each round, and all together."""

    def __init__(self, engine: Engine, feeds: Feeds) -> None:
        self.engine, self._feeds = engine, feeds
        self.walls: list[float] = []
        self.works: list[float] = []
        self.wall = self.work = 0.0
        self.runs = 0

    def start(self) -> None:
        """A new round."""
        self.walls.append(float("inf"))
        self.works.append(float("inf"))

    def run(self) -> None:
        spent = time.process_time()
        start = time.perf_counter()
        self.engine.run(self._feeds)
        wall = time.perf_counter() - start
        work = time.process_time() - spent
        self.walls[-1] = min(self.walls[-1], wall)
        self.works[-1] = min(self.works[-1], work)
        self.wall += wall
        self.work += work
        self.runs += 1


@uncollected
def _round(clocks: Sequence[_Clock], seconds: float) -> None:
    for clock in clocks:
        clock.start()
    until = time.perf_counter() + seconds * len(clocks)
    while True:
        for clock in clocks:
            clock.run()
        if time.perf_counter() >= until:
            return


Outcome = Literal["faster", "not faster", "cannot tell"]


@dataclass(frozen=True)
class Verdict:
    """What a measurement comes to; the text is the outcome with its numbers, in a sentence."""

    outcome: Outcome
    text: str


def verdict(timing: Timing) -> Verdict:
    """Faster, or not: where all rounds agree, and by more than two sessions of one file differ. On a contended machine
    ratios of CPU time have to agree with those of wall time.
    """
    outcome = _side(timing.candidate.ratios)
    low, high = timing.range
    why = []
    if outcome == "cannot tell":
        why.append("the rounds do not agree" if low <= 1 <= high else f"the difference is below {LEAST:.0%}")
    if timing.contended:
        original, candidate = timing.engines[0].work, timing.candidate.work
        spent = [own / other for own, other in zip(candidate, original, strict=True) if other > 0]
        if spent and outcome != _side(spent):
            outcome = "cannot tell"
            why.append(f"the ratio of CPU times is {median(spent):.3f} ({_range(spent, '{:.3f}')})")
        why.append(f"contended: {timing.contended}")
    before, after = timing.engines[0].milliseconds, timing.candidate.milliseconds
    times = f"{before:.4g} ms -> {after:.4g} ms, x{timing.ratio:.3f} (rounds {low:.3f} to {high:.3f})"
    return Verdict(outcome, "; ".join([f"{outcome}, {times}", *why]))


def _side(ratios: Sequence[float]) -> Outcome:
    if max(ratios) < 1 and median(ratios) <= 1 - LEAST:
        return "faster"
    return "not faster" if min(ratios) > 1 and median(ratios) >= 1 + LEAST else "cannot tell"


# Guards


@dataclass(frozen=True)
class Placement:
    """Who ran the nodes of an engine.

    own     nodes on the provider or device that was asked for
    others  nodes elsewhere, by where
    """

    wanted: str
    own: int
    others: Mapping[str, int]

    @property
    def share(self) -> float | None:
        """Of the nodes; none where the target does not say."""
        total = self.own + sum(self.others.values())
        return self.own / total if total else None

    @property
    def fell_back(self) -> bool:
        """Whether nothing ran where it should have."""
        return self.share == 0

    @property
    def text(self) -> str:
        """Which nodes ran elsewhere, in words; empty where none did, or where the target does not say."""
        if not self.others:
            return ""
        total = self.own + sum(self.others.values())
        places = ", ".join(f"{count} on {name}" for name, count in sorted(self.others.items()))
        if self.fell_back:
            return f"fell back: none of {total} nodes ran on {self.wanted} ({places})"
        return f"{self.own} of {total} nodes ran on {self.wanted} ({places})"


def placement(engine: Engine, wanted: str) -> Placement:
    """Who ran the nodes of an engine, against the provider or device that was asked for."""
    others = {name: count for name, count in engine.nodes.items() if name != wanted and count}
    return Placement(wanted, engine.nodes.get(wanted, 0), others)


def unresponsive(
    expected: Sequence[Mapping[str, Any]], results: Sequence[Mapping[str, Any]], tolerance: float = 0.0
) -> str:
    """Why an engine does not seem to compute at all, in words: it answers the same to different inputs, or with one value
    all over.

    expected   outputs of onnxruntime on the CPU, one mapping for each of two or more different inputs
    results    the engine's, for the same inputs
    tolerance  change of an output, of its scale, that the engine need not follow

    Empty where some output does as the CPU's, or where the CPU's outputs do not change, either: then nothing is known.
    """
    moving = [name for name in expected[0] if _change([run[name] for run in expected]) > tolerance]
    if moving and not any(_change([run.get(name) for run in results]) for name in moving):
        return f"returned the same values for different inputs: output '{moving[0]}'"
    varied = [name for name, value in expected[0].items() if variation(value) > tolerance]
    if varied and not any(variation(run.get(name)) for name in varied for run in results):
        return f"returned one value all over: output '{varied[0]}'"
    return ""


def _change(values: Sequence[Any]) -> float:
    """The largest difference of any array from the first, over the latter's scale; infinite between shapes, and between
    what is finite and what is not; 0 of what is no array of numbers."""
    first, *rest = [np.asarray(value) for value in values]
    worst = 0.0
    for other in rest:
        if other.shape != first.shape:
            return float("inf")
        if first.dtype.kind in "OSU" or np.array_equal(first, other):
            continue
        a, b = _numbers(first), _numbers(other)
        finite = np.isfinite(a) & np.isfinite(b)
        if not np.array_equal(a[~finite], b[~finite], equal_nan=True):
            return float("inf")
        if finite.any():
            scale = float(np.abs(a[finite]).max()) or 1e-30
            worst = max(worst, float(np.abs(a[finite] - b[finite]).max()) / scale)
    return worst


def variation(value: Any) -> float:
    """Between the least and the largest finite number of an array, over its scale; 0 of what are no numbers."""
    array = np.asarray(value)
    finite = array[np.isfinite(array)].astype(np.float64) if array.dtype.kind in "fiu" else np.empty(0)
    if not finite.size or finite.max() == finite.min():
        return 0.0
    return float((finite.max() - finite.min()) / np.abs(finite).max())


def _numbers(value: Array) -> Array:
    return value.astype(np.complex128 if value.dtype.kind == "c" else np.float64)


def refusal(where: Target, path: Path, feeds: Feeds, threads: int = 1) -> str:
    """Why a target does not take a model, in its own words; empty where it loads and runs it."""
    try:
        engine = where.load(path, threads)
        try:
            engine.run(feeds)
        finally:
            engine.close()
    except TargetError as error:
        return f"{error}"
    return ""


# Starts


_PROGRAM = """
import pickle, sys
sys.path[:] = pickle.load(sys.stdin.buffer)
from onnxprune import timing
timing.begin(*pickle.load(sys.stdin.buffer))
"""


def startup(where: Target, path: Path, feeds: Feeds, threads: int = 1) -> Start:
    """Load a model and run it in a new process, which no other model has warmed up or filled.

    Raises `TargetError` if the target refuses the model or takes the process along.
    """
    with tempfile.TemporaryDirectory(prefix="onnxprune-") as folder:
        result = Path(folder) / "result"
        given = (where, path.absolute(), feeds, threads, result)
        try:
            done = subprocess.run(
                [sys.executable, "-c", _PROGRAM],
                input=pickle.dumps(sys.path) + pickle.dumps(given),
                capture_output=True,
                timeout=PATIENCE,
                check=False,
            )
        except subprocess.TimeoutExpired:
            raise TargetError(f"{where} did not load and run the model in {PATIENCE} seconds") from None
        if not result.exists():
            code = done.returncode
            how = signal.Signals(-code).name if code < 0 else f"exit code {code}"
            last = "".join(f": {printable(line)}" for line in _lines(done.stderr)[-1:])
            raise TargetError(f"{where} took the process along ({how}){last}")
        found = pickle.loads(result.read_bytes())
    if isinstance(found, Start):
        return found
    raise TargetError(found)


def _lines(text: bytes) -> list[str]:
    return text.decode(errors="replace").strip().splitlines()


def begin(where: Target, path: Path, feeds: Feeds, threads: int, result: Path) -> None:
    """The other process of `startup`: leaves a `Start`, or the text of an error, in a file."""
    found: Start | str
    try:
        found = _started(where, path, feeds, threads)
    except (TargetError, UserError) as error:
        found = f"{error}"
    result.write_bytes(pickle.dumps(found))


def _started(where: Target, path: Path, feeds: Feeds, threads: int) -> Start:
    with tempfile.TemporaryDirectory(prefix="onnxprune-") as folder:
        nothing = Path(folder) / "nothing.onnx"
        save(_nothing(), nothing, {})
        refusal(where, nothing, {"x": np.ones(1, dtype=np.float32)}, threads)  # loads the target's software
    _forget_peak()
    before = _held()
    start = time.perf_counter()
    engine = where.load(path, threads)
    loaded = time.perf_counter()
    try:
        engine.run(feeds)
        ran = time.perf_counter()
        for _ in range(WARM - 1):
            engine.run(feeds)
        after = _held()
    finally:
        engine.close()
    resident, peak = (None, None)
    if before is not None and after is not None:
        resident, peak = (max(late - early, 0) for early, late in zip(before, after, strict=True))
        peak = max(peak, resident)  # the system counts the two at different moments
    return Start((loaded - start) * 1e3, (ran - loaded) * 1e3, peak, resident)


def _nothing() -> onnx.ModelProto:
    """A model of one node that does next to nothing."""
    value = onnx.helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, [1])
    made = onnx.helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, [1])
    graph = onnx.helper.make_graph([onnx.helper.make_node("Neg", ["x"], ["y"])], "nothing", [value], [made])
    return onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 17)], ir_version=8)


def _forget_peak() -> None:
    """Linux counts the largest memory anew (proc(5), clear_refs); where it does not, the old peak is the base."""
    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    except OSError:
        return


def _held() -> tuple[int, int] | None:
    """Bytes that are held, and the most that ever were, by this process and those it started; Linux only."""
    held = peak = 0
    waiting = [os.getpid()]
    while waiting:
        process = Path(f"/proc/{waiting.pop()}")
        try:
            status = dict(line.split(":", 1) for line in (process / "status").read_text().splitlines())
            held += int(status["VmRSS"].split()[0]) * 1024
            peak += int(status["VmHWM"].split()[0]) * 1024
            for task in (process / "task").iterdir():
                waiting += map(int, (task / "children").read_text().split())
        except (OSError, KeyError, ValueError):
            if process.name == f"{os.getpid()}":
                return None
    return held, peak
