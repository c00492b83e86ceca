"""How long a model takes on a target, as a sum over its pieces, and what a multiply-accumulate costs in each.

A piece is one node that multiplies and accumulates, with everything behind it up to the next such node: what a
runtime fuses stays together. Pieces are timed alone, at the shapes they have in the model, and kept in a table by
what their time depends on, so that a shape is measured once. The sum is scaled to the measured time of the whole
original, since borders between pieces cost something of their own (Shen et al., "HALP: Hardware-Aware Latency
Pruning", 2022; Kurtic et al., "ZipLM", NeurIPS 2023; Shen et al., "Multi-Dimensional Pruning", 2025).
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from onnxprune import flow
from onnxprune.cost import CostModel, Counts
from onnxprune.dependency import DependencyGraph
from onnxprune.errors import UserError
from onnxprune.model import Array, atomic, save
from onnxprune.parts import ancestors
from onnxprune.runtime import Feeds, Session, inner
from onnxprune.targets import Engine, Target

FORMAT = 1  # of table files
WARM, RUNS, SECONDS = 3, 15, 0.03  # runs before, and then at least so many and so long
UNIT = 1e-12  # seconds: prices of multiply-accumulates are whole numbers of it


@dataclass(frozen=True)
class Piece:
    """A part of a model that is timed alone.

    heart    output of the node that multiplies and accumulates, which keeps its name when channels go
    proto    the piece as a model
    feeds    what it reads from the pieces before it
    digest   of what its time depends on: operators, attributes, shapes and types, not the values of weights
    """

    heart: str
    proto: onnx.ModelProto = field(repr=False)
    feeds: Feeds = field(repr=False)
    digest: str


def pieces(graph: DependencyGraph, feeds: Feeds) -> list[Piece]:
    """The pieces of a model in order; together they are the whole of it. Models with bodies are one piece.

    feeds  inputs of the model, for the shapes and integers between pieces. Raises `RunError`.
    """
    model = graph.model
    owners = _owners(graph)
    if any(node.captured or node.domain == flow.DOMAIN for node in model.nodes) or not owners:
        proto = model.proto
        return [Piece("", proto, dict(feeds), _digest(proto, feeds))]
    results = {output.name for output in model.outputs}
    given: dict[int, dict[str, None]] = {}
    made: dict[int, dict[str, None]] = {}
    for node in model.nodes:
        owner = owners[node.index]
        for name in filter(None, node.inputs):
            maker = model.producers.get(name)
            if maker is not None and owners[maker.index] != owner:
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
            found.append(Piece(nodes[owner].outputs[0], part, inputs, _digest(part, inputs)))
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


def _digest(proto: onnx.ModelProto, feeds: Mapping[str, Array]) -> str:
    """Of operators, attributes, wiring, shapes and types; names and the values of floats do not matter."""
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

    Times are less the time of a call that does nothing. A table belongs to one target, version, device and number of threads (`key`). `path` may come from another
    machine: what it holds is believed, and only what it lacks is measured, if the target runs here.
    """

    def __init__(self, target: Target, threads: int, path: Path | None = None) -> None:
        self.target, self.threads = target, threads
        state = target.state()
        self.key = {
            "target": f"{target}",
            "version": state.version,
            "device": state.device,
            "threads": threads,
        }
        self.runs = state.reach == "runs" and target.timed
        self.own = path is None
        self.path = path or _place(self.key)
        self.times: dict[str, float] = {}
        if self.path.exists():
            self._read()

    def time(self, piece: Piece) -> float:
        """Milliseconds of a piece. Raises `UserError` if they are neither known nor can be measured here."""
        if piece.digest not in self.times:
            if not self.runs:
                raise UserError(
                    f"{self.path}: the table of {self.target} lacks a shape of this model, and {self.target} does not "
                    f"run here ({self.target.state().missing}); make the table on the device"
                )
            if CALL.digest not in self.times:
                self.times[CALL.digest] = self._timed(CALL)
            call = self.times[CALL.digest]
            self.times[piece.digest] = max(self._timed(piece) - call, call / 10)
        return self.times[piece.digest]

    def _timed(self, piece: Piece) -> float:
        with tempfile.TemporaryDirectory(prefix="onnxprune-") as folder:
            path = Path(folder) / "piece.onnx"
            save(piece.proto, path, {})
            engine = self.target.load(path, self.threads)
            try:
                return timed(engine, piece.feeds)
            finally:
                engine.close()

    def save(self) -> None:
        """Write the table, whole or not at all."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        stated = {"format": FORMAT, **self.key, "milliseconds": dict(sorted(self.times.items()))}
        with atomic(self.path) as temporary:
            temporary.write_text(json.dumps(stated, indent=1) + "\n", encoding="utf-8")

    def _read(self) -> None:
        try:
            stated: Any = json.loads(self.path.read_text(encoding="utf-8"))
            times = stated["milliseconds"]
            if stated["format"] != FORMAT:
                raise ValueError("of another version of onnxprune")
            if stated["target"] != f"{self.target}":
                raise ValueError(f"of {stated['target']}, not of {self.target}")
            self.times = {str(digest): float(value) for digest, value in times.items()}
            if not all(value > 0 for value in self.times.values()):
                raise ValueError("with times that are not positive")
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(
                f"{self.path}: not a latency table that fits ({error}); delete it or give another"
            ) from None


def _place(key: Mapping[str, object]) -> Path:
    """Where the table of a target on this machine lies."""
    root = os.environ.get("ONNXPRUNE_CACHE") or Path.home() / ".cache" / "onnxprune"
    digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:12]
    name = f"{key['target']}".replace(":", "-")
    return Path(root) / "latency" / f"{name}-{digest}.json"


def timed(engine: Engine, feeds: Feeds) -> float:
    """Milliseconds of the fastest of some runs."""
    for _ in range(WARM):
        engine.run(feeds)
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


def predict(graph: DependencyGraph, feeds: Feeds, table: Table) -> Predicted:
    """The times of a model's pieces, measured where the table lacks them. Raises `RunError`, `TargetError`,
    `UserError`."""
    found: dict[str, float] = {}
    for piece in pieces(graph, feeds):
        found[piece.heart] = found.get(piece.heart, 0.0) + table.time(piece)
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
    the line through the original and the last trial in which it did; elsewhere in proportion to its work.
    """
    cost = CostModel(graph)
    work = cost.work()
    nodes = {node.outputs[0]: node.index for node in graph.model.nodes if node.outputs}
    by_node: dict[int, int] = {}
    constant = 0.0
    for heart, spent in whole.pieces.items():
        index = nodes.get(heart)
        macs = work.get(index, 0) if index is not None else 0
        if index is None or not macs:
            constant += spent * 1e-3 / UNIT
            continue
        slope = spent / macs
        for counts, trial in reversed(trials):
            less = cost.work(counts).get(index, 0)
            if heart in trial.pieces and less < 0.97 * macs:
                slope = max((spent - trial.pieces[heart]) / (macs - less), 0.05 * slope)
                break
        by_node[index] = max(round(slope * 1e-3 / UNIT), 1)
        constant += spent * 1e-3 / UNIT - by_node[index] * macs
    return Prices(by_node, round(constant))
