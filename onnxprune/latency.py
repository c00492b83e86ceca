"""How long a model takes on a target, as a sum over its pieces, and what a multiply-accumulate costs in each.

A piece is one node that multiplies and accumulates, with everything behind it up to the next such node: what a
runtime fuses stays together. Pieces are timed alone, at the shapes they have in the model, and kept in a table by
what their time depends on, so that a shape is measured once. Ratios of sums are held against measured ones, since
borders between pieces cost something of their own (Shen et al., "HALP: Hardware-Aware Latency Pruning", 2022; Kurtic
et al., "ZipLM", NeurIPS 2023; Shen et al., "Multi-Dimensional Pruning", 2025).

Where a target does not run, times come from a table that was made where it does (`measuring`): of a piece on a grid
of counts, and between them by interpolation (`grids`).
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import math
import os
import platform
import re
import subprocess
import sys
import tempfile
import time
import weakref
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from onnxprune import axes, flow
from onnxprune.axes import Axis, Var
from onnxprune.cost import CostModel, Counts
from onnxprune.dependency import DependencyGraph, Link
from onnxprune.errors import UserError
from onnxprune.grids import Grid, Place, Whole
from onnxprune.model import Array, atomic, save
from onnxprune.parts import ancestors
from onnxprune.runtime import Feeds, Session, inner
from onnxprune.targets import Engine, Target, TargetError, target

FORMAT = 2  # of table files
WARM = 3  # runs before any is timed
TURNS, RUNS, SECONDS = 5, 3, 0.006  # of a piece and of a call: of each at least so many runs, and so long
UNIT = 1e-12  # seconds: prices of multiply-accumulates are whole numbers of it


def timed(name: str) -> Target:
    """A target whose times mean something."""
    aim = target(name)
    if not aim.timed:
        raise UserError(f"--latency: times on {aim} mean nothing ({aim.title}); name another --target first")
    return aim


@dataclass(frozen=True)
class Piece:
    """A part of a model that is timed alone.

    heart    output of the node that multiplies and accumulates, which keeps its name when channels go
    proto    the piece as a model
    feeds    what it reads from the pieces before it
    digest   of what its time depends on: operators, attributes, shapes and types, not the values of weights
    nodes    of the model that are in it, by index; none where the model is in one piece
    """

    heart: str
    proto: onnx.ModelProto = field(repr=False)
    feeds: Feeds = field(repr=False)
    digest: str
    nodes: tuple[int, ...] = ()


def pieces(graph: DependencyGraph, feeds: Feeds) -> list[Piece]:
    """The pieces of a model in order; together they are the whole of it. Models with bodies are one piece.

    feeds  inputs of the model, for the shapes and integers between pieces. Raises `RunError`.
    """
    model = graph.model
    owners = _owners(graph)
    if any(node.captured or node.domain == flow.DOMAIN for node in model.nodes) or not owners:
        proto = model.proto
        return [Piece("", proto, dict(feeds), _digest(proto, feeds, graph.shapes.shapes))]
    results = {output.name for output in model.outputs}
    given: dict[int, dict[str, None]] = {}
    made: dict[int, dict[str, None]] = {}
    for node in model.nodes:
        owner = owners[node.index]
        for name in filter(None, node.inputs):
            maker = model.producers.get(name)
            if maker is None or name in model.constants:  # a constant goes with each of its readers
                continue
            if owners[maker.index] != owner:
                given.setdefault(owner, {})[name] = None
                made.setdefault(owners[maker.index], {})[name] = None
        made.setdefault(owner, {}).update(dict.fromkeys(n for n in node.outputs if n in results))
    borders = list(dict.fromkeys(name for names in given.values() for name in names))
    values: dict[str, Array] = dict(feeds)
    if borders:
        values |= Session(model.proto, expose=inner(model.proto, borders)).run(feeds, borders)
    nodes = {node.index: node for node in model.nodes}
    found = []
    for owner in sorted(made):
        known = {name: values[name] for name in (*given.get(owner, ()), *feeds) if name in values}
        part = ancestors(model.proto, list(made[owner]), known)
        read = {name for node in part.graph.node for name in node.input}
        inputs = {name: value for name, value in known.items() if name in read}
        del part.graph.input[:]
        for name, value in inputs.items():
            element = onnx.helper.np_dtype_to_tensor_dtype(value.dtype)
            part.graph.input.append(onnx.helper.make_tensor_value_info(name, element, value.shape))
        if part.graph.node:
            digest = _digest(part, inputs, graph.shapes.shapes)
            inside = tuple(index for index, of in owners.items() if of == owner)
            found.append(Piece(nodes[owner].result, part, inputs, digest, inside))
    return found


def _owners(graph: DependencyGraph) -> dict[int, int]:
    """For every node the node that multiplies and accumulates to whose piece it belongs: the last one it depends on;
    where it depends on none, the first one that depends on it. Empty where there is none at all."""
    model = graph.model
    hearts = {link.node.index for link in graph.links if any(link.rule.products)}
    owners: dict[int, int] = {}
    for node in model.nodes:
        makers = [model.producers[name] for name in node.inputs if name in model.producers]
        before = max((owners[maker.index] for maker in makers), default=-1)
        owners[node.index] = max(node.index, before) if node.index in hearts else before
    last = max(hearts, default=-1)
    for node in reversed(model.nodes):
        if owners[node.index] < 0:
            readers = [reader for name in node.outputs for reader in model.consumers.get(name, ())]
            owners[node.index] = min((owners[reader.index] for reader in readers), default=last)
    return owners if hearts else {}


def digest_of(graph: DependencyGraph, feeds: Feeds) -> str:
    """Of a whole model, as of a piece."""
    return _digest(graph.model.proto, feeds, graph.shapes.shapes)


def _digest(proto: onnx.ModelProto, feeds: Mapping[str, Array], shapes: Mapping[str, tuple[int, ...]]) -> str:
    """Of operators, attributes, wiring, shapes and types; names and the values of floats do not matter, but where they
    decide on shapes (scales of a Resize).

    shapes  of tensors at the sizes of the analysis
    """
    names: dict[str, int] = {}
    whole = hashlib.sha256()

    def say(*parts: object) -> None:
        whole.update(repr(parts).encode())

    say(sorted((opset.domain, opset.version) for opset in proto.opset_import))
    for name, value in feeds.items():
        say("input", names.setdefault(name, len(names)), value.shape, str(value.dtype))
    weights = {tensor.name: tensor for tensor in proto.graph.initializer}
    for node in proto.graph.node:
        for name in node.input:
            if name in weights and name not in names:
                tensor = weights[name]
                small = onnx.numpy_helper.to_array(tensor).tolist() if _counts(tensor) else None
                say("weight", len(names), list(tensor.dims), tensor.data_type, small)
            names.setdefault(name, len(names))
        for name in node.output:
            names.setdefault(name, len(names))
        attributes = sorted(a.SerializeToString(deterministic=True) for a in node.attribute)
        say(
            node.domain,
            node.op_type,
            attributes,
            [names[n] for n in node.input],
            [names[n] for n in node.output],
            [shapes.get(n) for n in node.output],
        )
    say([names.get(output.name, -1) for output in proto.graph.output])
    return whole.hexdigest()[:24]


def _counts(tensor: onnx.TensorProto) -> bool:
    """Whether a tensor holds shapes, axes or the like, on which work depends."""
    return tensor.data_type in (onnx.TensorProto.INT64, onnx.TensorProto.INT32) and len(tensor.dims) <= 1


def _call() -> Piece:
    """Next to nothing: what it takes is what a call takes, which a piece of a whole does not."""
    value = onnx.helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, [1])
    made = onnx.helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, [1])
    node = onnx.helper.make_node("Neg", ["x"], ["y"])
    graph = onnx.helper.make_graph([node], "call", [value], [made])
    proto = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 17)], ir_version=8)
    return Piece("", proto, {"x": np.ones(1, dtype=np.float32)}, "call")


CALL = _call()


class Table:
    """Times of pieces on one target, in milliseconds, by what they depend on; kept in a file.

    Times are less the time of a call that does nothing. A table belongs to one target, version, device, processor and
    number of threads (`key`). Where these are not the ones here, `path` is a table of another machine: it is read, and
    neither added to nor written.

    times   of pieces, by digest
    grids   of pieces, by the key of their form: at other counts, too
    wholes  whole models, by digest
    foreign how its machine differs from this one, in words; empty for this machine's own
    runs    whether what is missing can be measured here
    """

    def __init__(self, target: Target, threads: int, path: Path | None = None) -> None:
        self.target, self.threads = target, threads
        state = target.state()
        self.key: dict[str, Any] = {
            "target": f"{target}",
            "version": state.version,
            "device": state.device,
            "processor": processor(),
            "threads": threads,
        }
        self.path = path or _place(self.key)
        self.times: dict[str, float] = {}
        self.grids: dict[str, Grid] = {}
        self.wholes: dict[str, Whole] = {}
        self.foreign = ""
        here = state.reach == "runs" and target.timed
        if os.path.exists(self.path):  # noqa: PTH110  where nobody may look, there is none
            stated = self._read()
            self.foreign = "; ".join(
                f"{name} {stated[name]!r}, here {value!r}"
                for name, value in self.key.items()
                if here and stated[name] != value
            )
            if not here or self.foreign:
                self.key = {name: stated[name] for name in self.key}
        self.runs = here and not self.foreign
        if self.runs and path is not None:
            self._refuse_unwritable()

    def __str__(self) -> str:
        """Whose times it holds."""
        told = (self.key[name] for name in ("version", "device", "processor"))
        threads = "1 thread" if self.key["threads"] == 1 else f"{self.key['threads']} threads"
        return ", ".join(filter(None, (*told, threads)))

    def time(self, piece: Piece) -> float:
        """Milliseconds of a piece. Raises `UserError` if they are neither known nor can be measured here."""
        if piece.digest not in self.times:
            if not self.runs:
                raise UserError(self._lacking())
            with _loaded(self.target, piece, self.threads) as engine:
                self.times[piece.digest] = beyond(self._call, engine, piece.feeds)
        return self.times[piece.digest]

    def again(self, piece: Piece) -> None:
        """Time a piece once more, and keep the smaller time: other work on the machine only ever adds to it."""
        before = self.times.pop(piece.digest, math.inf)
        self.times[piece.digest] = min(self.time(piece), before)

    def _lacking(self) -> str:
        made = f"make it with `onnxprune measure MODEL --target {self.target} -o {self.path.name}`"
        if self.foreign:
            return (
                f"{self.path}: the table of another machine ({self.foreign}) lacks a shape of this model, and times of two "
                f"machines are not mixed; {made} there, or leave it out to measure here"
            )
        missing = self.target.state().missing
        if not self.path.exists():
            return f"--latency: {self.target} does not run here ({missing}); give --latency-table, and {made} on the device"
        return (
            f"{self.path}: the table of {self.target} lacks a shape of this model, and {self.target} does not run here "
            f"({missing}); {made} on the device"
        )

    @functools.cached_property
    def _call(self) -> Engine:
        """Next to nothing, loaded as long as the table is there."""
        stack = contextlib.ExitStack()
        weakref.finalize(self, stack.close)
        return stack.enter_context(_loaded(self.target, CALL, self.threads))

    def save(self) -> None:
        """Write the table, whole or not at all; one that nothing can be added to stays as it is. Raises `UserError`."""
        if not self.runs:
            return
        stated = {
            "format": FORMAT,
            **self.key,
            "milliseconds": dict(sorted(self.times.items())),
            "grids": {key: grid.as_dict() for key, grid in sorted(self.grids.items())},
            "wholes": {key: whole.as_dict() for key, whole in sorted(self.wholes.items())},
        }
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise self._unwritable(error) from None
        with atomic(self.path) as temporary:
            temporary.write_text(json.dumps(stated, indent=1) + "\n", encoding="utf-8")

    def _refuse_unwritable(self) -> None:
        """Where no table could be written: before anything is timed for it, and leaving nothing behind."""
        folder = Path(os.path.realpath(self.path)).parent
        while not os.path.lexists(folder):  # made when it is saved
            folder = folder.parent
        try:
            tempfile.TemporaryFile(dir=folder).close()
        except OSError as error:
            raise self._unwritable(error) from None

    def _unwritable(self, error: OSError) -> UserError:
        return UserError(f"{self.path}: no table can be written there ({error.strerror}); give another path")

    def _read(self) -> dict[str, Any]:
        try:
            stated: dict[str, Any] = json.loads(self.path.read_text(encoding="utf-8"))
            if stated["format"] != FORMAT:
                raise ValueError("of another version of onnxprune")
            if stated["target"] != f"{self.target}":
                raise ValueError(f"of {stated['target']}, not of {self.target}")
            if type(stated["threads"]) is not int:
                raise ValueError(f"with {stated['threads']!r} threads")
            self.times = {str(digest): float(one) for digest, one in stated["milliseconds"].items()}
            if not all(0 < one < math.inf for one in self.times.values()):
                raise ValueError("with times that are not positive")
            self.grids = {str(key): Grid.read(one) for key, one in stated["grids"].items()}
            self.wholes = {str(key): Whole.read(one) for key, one in stated["wholes"].items()}
            return stated | {name: str(stated[name]) for name in ("version", "device", "processor")}
        except (
            OSError,
            ValueError,
            KeyError,
            TypeError,
            AttributeError,
            ArithmeticError,
            RecursionError,
        ) as error:
            raise UserError(
                f"{self.path}: not a latency table that fits ({error}); delete it or give another"
            ) from None


def _place(key: Mapping[str, object]) -> Path:
    """Where the table of a target on this machine lies."""
    root = os.environ.get("ONNXPRUNE_CACHE") or Path.home() / ".cache" / "onnxprune"
    digest = hashlib.sha256(json.dumps([FORMAT, key], sort_keys=True).encode()).hexdigest()[:12]
    name = f"{key['target']}".replace(":", "-")
    return Path(root) / "latency" / f"{name}-{digest}.json"


def processor() -> str:
    """The model of this machine's processor, as its system calls it."""
    if sys.platform == "darwin":
        command = ["sysctl", "-n", "machdep.cpu.brand_string"]
        named = subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
    else:
        named = _cpuinfo(Path("/proc/cpuinfo"))
    return named or platform.processor()


def _cpuinfo(path: Path) -> str:
    """The name in Linux's list of processors; kernels for ARM give numbers instead, and the board's name at the end."""
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
    found: dict[str, str] = dict(re.findall(r"^([^:\n]*?)\s*:[ \t]*(.*?)\s*$", text, re.MULTILINE))
    if found.get("model name"):
        return found["model name"]
    numbers = (found.get(name, "") for name in ("Model", "Hardware", "CPU implementer", "CPU part"))
    return " ".join(filter(None, numbers))


@contextlib.contextmanager
def _loaded(target: Target, piece: Piece, threads: int) -> Iterator[Engine]:
    """Raises `UserError`, also where the engine then does not run."""
    with tempfile.TemporaryDirectory(prefix="onnxprune-") as folder:
        path = Path(folder) / "piece.onnx"
        save(piece.proto, path, {})
        try:
            engine = target.load(path, threads)
            try:
                yield engine
            finally:
                engine.close()
        except TargetError as error:
            where = f"the part of the model around '{piece.heart}'" if piece.heart else "the model"
            raise UserError(f"--target {target}: it does not run {where} alone: {error}") from None


def beyond(call: Engine, engine: Engine, feeds: Feeds) -> float:
    """Milliseconds of the fastest run beyond those of a call that does nothing, in turns: the call of the same turn counts,
    since what it takes changes with what else the machine does. Raises `TargetError`."""
    for one, given in ((call, CALL.feeds), (engine, feeds)):
        for _ in range(WARM):
            one.run(given)
    turns = [(_fastest(call, CALL.feeds), _fastest(engine, feeds)) for _ in range(TURNS)]
    idle, spent = min(turns, key=lambda turn: turn[1])
    return max(spent - idle, idle / 10)


def _fastest(engine: Engine, feeds: Feeds) -> float:
    """Milliseconds of the fastest of some runs."""
    best, count, until = float("inf"), 0, time.perf_counter() + SECONDS
    while count < RUNS or time.perf_counter() < until:
        start = time.perf_counter()
        engine.run(feeds)
        best = min(best, time.perf_counter() - start)
        count += 1
    return best * 1e3


@dataclass(frozen=True)
class Predicted:
    """Milliseconds of a model's pieces, by their hearts."""

    pieces: Mapping[str, float]

    @property
    def total(self) -> float:
        return sum(self.pieces.values())


@dataclass(frozen=True)
class Form:
    """What of a piece changes with the counts of groups, in three directions.

    key   of a piece's times on a grid of counts
    axes  of the inputs that its heart sums over; of its outputs; and what else is in it
    free  the groups of each, of which no two directions share one
    """

    key: str
    axes: tuple[tuple[Axis, ...], ...]
    free: tuple[tuple[Var, ...], ...]

    def place(self, counts: Mapping[Var, int]) -> Place:
        """Extents of the three directions, each at the original's counts of the others."""
        inputs, outputs, rest = (
            [axes.extent(axis, {var: counts[var] for var in free if var in counts}) for axis in among]
            for among, free in zip(self.axes, self.free, strict=True)
        )
        return math.prod(inputs), math.prod(outputs), max(sum(rest), 1)


def forms(graph: DependencyGraph, found: Sequence[Piece]) -> dict[str, Form]:
    """The forms of a model's pieces, by their hearts; of a model in one piece none."""
    links: dict[int, list[Link]] = {}
    for link in graph.links:
        links.setdefault(link.node.index, []).append(link)
    hearts = {node.result: node.index for node in graph.model.nodes}
    return {
        piece.heart: _form(piece.digest, links[hearts[piece.heart]], [links.get(n, []) for n in piece.nodes])
        for piece in found
        if piece.nodes
    }


def _form(digest: str, heart: Sequence[Link], inside: Sequence[Sequence[Link]]) -> Form:
    inputs: list[Axis] = []
    outputs: list[Axis] = []
    for link in heart:
        summed = set(link.contracted())
        for name in dict.fromkeys(name for product in link.rule.products for name in product):
            if name in link.labels:
                (inputs if name in summed else outputs).append(axes.resolve(link.labels[name]))
    rest = [
        axes.resolve(axis)
        for links in inside
        for link in links
        for operand in (*link.inputs, *link.outputs)
        for axis in operand or ()
    ]
    taken: dict[Var, None] = {}
    free: list[tuple[Var, ...]] = []
    for among in (outputs, inputs, rest):  # a group on both sides counts as one of the outputs
        fresh = dict.fromkeys(v for axis in among for v in axes.free_vars(axis) if v not in taken)
        free.append(tuple(fresh))
        taken |= fresh
    free = [free[1], free[0], free[2]]
    numbers = {var: number for number, var in enumerate(var for among in free for var in among)}
    kept: list[tuple[Axis, ...]] = []
    for among, own in zip((inputs, outputs, rest), free, strict=True):
        told = {_told(axis, numbers): axis for axis in among if any(v in own for v in axes.free_vars(axis))}
        kept.append(tuple(told.values()))
    said = [[_told(axis, numbers) for axis in among] for among in kept]
    signature = hashlib.sha256(repr((digest, said, [len(own) for own in free])).encode()).hexdigest()[:24]
    return Form(signature, tuple(kept), tuple(free))


def _told(axis: Axis, numbers: Mapping[Var, int]) -> str:
    """An axis in words that are the same in like pieces."""
    if isinstance(axis, axes.Var):
        return f"{numbers[axis]}:{axis.extent}"
    if isinstance(axis, axes.Const):
        return f"{axis.extent}"
    parts, sign = (axis.factors, " ") if isinstance(axis, axes.Product) else (axis.terms, "+")
    return f"({sign.join(_told(part, numbers) for part in parts)})"


def predict(
    graph: DependencyGraph,
    feeds: Feeds,
    table: Table,
    origin: Mapping[str, Form] | None = None,
    counts: Counts | None = None,
) -> Predicted:
    """The times of a model's pieces: as they were measured, or measured now where the table lacks them or, where it
    cannot be, from its grids.

    origin, counts  the forms of the original's pieces, and the counts at which this model was cut from it

    Raises `RunError`, `UserError`.
    """
    found: dict[str, float] = {}
    for piece in pieces(graph, feeds):
        spent = None
        if not table.runs and piece.digest not in table.times:
            form = (origin or {}).get(piece.heart)
            grid = None if form is None else table.grids.get(form.key)
            spent = None if form is None or grid is None else grid.at(form.place(counts or {}))
        found[piece.heart] = found.get(piece.heart, 0.0) + (table.time(piece) if spent is None else spent)
    return Predicted(found)


@dataclass(frozen=True)
class Prices:
    """What a multiply-accumulate costs in each node, in picoseconds, and what does not depend on counts.

    by_node   of the original, index to price
    constant  the rest of the time, in picoseconds; it may be negative where times grow faster than counts
    """

    by_node: Mapping[int, int]
    constant: int


def prices(
    graph: DependencyGraph, whole: Predicted, trials: Sequence[tuple[Counts, Predicted]] = ()
) -> Prices:
    """Prices from the times of the original, and of models cut to other counts: where a piece's work changed, from
    the line through the original and the last trial in which it did; elsewhere in proportion to its work. In a model
    that is one piece all work costs the same.
    """
    cost = CostModel(graph)
    work = cost.work()
    tried = [(cost.work(counts), trial) for counts, trial in reversed(trials)]
    nodes = {node.result: (node.index,) for node in graph.model.nodes if node.result} | {"": tuple(work)}
    by_node: dict[int, int] = {}
    constant = 0.0
    for heart, spent in whole.pieces.items():
        indices = nodes.get(heart, ())
        macs = sum(work.get(index, 0) for index in indices)
        if not macs:
            constant += spent * 1e-3 / UNIT
            continue
        slope = spent / macs
        for after, trial in tried:
            less = sum(after.get(index, 0) for index in indices)
            if heart in trial.pieces and less < 0.97 * macs:
                slope = max((spent - trial.pieces[heart]) / (macs - less), 0.05 * slope)
                break
        price = max(round(slope * 1e-3 / UNIT), 1)
        by_node |= dict.fromkeys(indices, price)
        constant += spent * 1e-3 / UNIT - price * macs
    return Prices(by_node, round(constant))
