"""What the network's outputs lose when units go, measured: on the original, with the units masked and every
reader repaired, so that nothing has to be cut for it.

Weights and biases of the readers are inputs of one session. A reader that ignores some channels and makes up
for them is the same as one that never had them.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import onnx

from onnxprune import axes, rewrite
from onnxprune.axes import Keep
from onnxprune.blocks import Block
from onnxprune.criteria.evidence import Evidence
from onnxprune.data import Data
from onnxprune.dependency import DependencyGraph, Group
from onnxprune.errors import UserError
from onnxprune.model import FLOATS, Array, Model, copied_node, fresh_name
from onnxprune.outputs import Distance, telling
from onnxprune.plan import Rewire
from onnxprune.readers import Reader
from onnxprune.repair import channels
from onnxprune.repair.weights import Weights
from onnxprune.runtime import Feeds, RunError, Session, inner
from onnxprune.statistics import batch_size

Outputs = Mapping[str, Array]
BROADCASTING = 7  # the opset since which sums and products align shapes


class Probe:
    """Runs a model with some of its units masked.

    apart  the data are samples that the statistics hold out: readers are repaired without them

    Raises `UserError` if onnxruntime cannot run the model on the data.
    """

    def __init__(self, evidence: Evidence, data: Data, apart: bool = False) -> None:
        self.apart = apart
        self.evidence = evidence
        self.graph = evidence.graph
        self._data = data
        self._weights = Weights(self.graph.model)
        for reader in evidence.readers.all:
            if reader.bias is not None and not reader.bias.tensor:
                self._weights.shift(reader.node, reader.bias, np.zeros(reader.outputs * reader.source.groups))
        self._model = Model(rewrite.edited(self.graph.model, self._weights.edits("room for a shift")))
        arrays = {name: self._model.array(name) for name in sorted(self._changeable())}
        self._fed: Feeds = {name: array for name, array in arrays.items() if array.dtype.kind == "f"}
        try:
            size = batch_size(data, self.graph.shapes, telling(self.graph.model), batches=1)
            self.distance = Distance(self.graph.model, data, size)
            proto = _fed_by(self._model.proto, self._fed)
            self._session = Session(proto, optimise="all", expose=inner(proto, self.distance.names))
        except RunError as error:
            raise self._unrunnable(error) from None

    def error(self, keep: Keep) -> float:
        """The distance of the outputs (see `outputs.Distance`) when all but the kept units are masked."""
        return self._error(self._masked(keep))

    def probes(self, group: Group) -> bool:
        """Whether masking a group can be told: some float weight reads its units, or makes them."""
        if self.evidence.readers.of(group):
            return True
        return any(o.role == "produce" and o.tensor in self._fed for o in group.occurrences)

    def errors_without(self, blocks: Sequence[Block]) -> dict[str, float]:
        """The same, by name, when one residual block adds no more than its mean, whatever its branch ends in.

        The mean is over samples and positions, one value for each feature. Infinite where it cannot be told: in
        bodies of If, Loop and Scan, and of features whose number changes with the data.
        """
        found = dict.fromkeys((block.name for block in blocks), math.inf)
        usable = [block for block in blocks if self._can_be_switched(block)]
        if not usable:
            return found
        try:
            switches = _Switches(self.graph, usable)
            means = switches.means(self._data)
            for name, mean in means.items():
                found[name] = self.distance.between(
                    switches.run(batch.feeds, self.distance.names, name, mean)
                    for batch in self.distance.batches
                )
        except RunError as error:
            raise self._unrunnable(error) from None
        return found

    def masked(self, keep: Keep) -> Changed:
        """The model with all but the kept units masked, for a metric."""
        return Changed(self, self._masked(keep))

    def error_of(self, proto: onnx.ModelProto) -> float:
        """The same of a model with the same outputs."""
        return self.distance.of(proto)

    # -------------------------------------------------------------------------------------- inside

    def _unrunnable(self, error: RunError) -> UserError:
        return UserError(f"{self.graph.model.name}: onnxruntime cannot run it on the data ({error})")

    def _can_be_switched(self, block: Block) -> bool:
        """Whether what the block adds is a float tensor outside of bodies, with the same features for all data."""
        branch, model, shapes = block.join.inputs[block.branch], self.graph.model, self.graph.shapes
        here, there = shapes.shapes.get(branch, ()), (shapes.other or shapes).shapes.get(branch, ())
        if not here or len(here) != len(there) or model.scopes.of(branch) or model.opset() < BROADCASTING:
            return False
        axis = features(self.graph, block)
        element = shapes.elements.get(branch)
        plain = element in FLOATS and onnx.helper.tensor_dtype_to_np_dtype(element).kind == "f"
        return plain and here[axis] == there[axis] and None not in shapes.open.get(branch, ())[axis:][:1]

    def _changeable(self) -> set[str]:
        """Constants that a mask may change."""
        found = set()
        for reader in self.evidence.readers.all:
            found.update(self._of(reader))
        for group in self.graph.groups:
            if not self.evidence.readers.of(group):
                found.update(o.tensor for o in group.occurrences if o.role in ("produce", "shift"))
        return {name for name in found if name in self._model.constants}

    def _of(self, reader: Reader) -> list[str]:
        """The weight of a reader and its bias, in the model that runs."""
        node = self._model.producers[reader.node.result]
        names = [node.inputs[reader.operand]]
        if reader.bias is not None:
            holder = self._model.producers[reader.bias.node.result]
            names.append(holder.inputs[reader.bias.operand])
        return names

    def _run(self, feeds: Feeds, changed: Mapping[str, Array]) -> Outputs:
        return self._session.run({**feeds, **self._fed, **changed})

    def _error(self, changed: Mapping[str, Array]) -> float:
        return self.distance.between(self._run(batch.feeds, changed) for batch in self.distance.batches)

    def _masked(self, keep: Keep) -> dict[str, Array]:
        changed: dict[str, Array] = {}
        for group in self.graph.groups:
            if group.var in keep and not self.evidence.readers.of(group):
                self._mask_makers(group, keep, changed)
        for var in keep:
            for reader in self.evidence.readers.reading(var):
                self._mask_reader(reader, keep, changed)
        return changed

    def _mask_reader(self, reader: Reader, keep: Keep, changed: dict[str, Array]) -> None:
        names, statistics = self._of(reader), self.evidence.statistics
        if statistics is None or names[0] in changed:
            return
        weight = self._fed[names[0]]
        fitted = channels.fit(reader, weight, keep, statistics, apart=self.apart)
        if fitted is None:
            return
        changed[names[0]] = fitted.weight.astype(weight.dtype)
        if reader.bias is not None:
            old = changed.get(names[1], self._fed[names[1]])
            shift = (fitted.shift.ravel() / reader.bias.scale).reshape(old.shape)
            changed[names[1]] = (old + shift).astype(old.dtype)

    def _mask_makers(self, group: Group, keep: Keep, changed: dict[str, Array]) -> None:
        """Units that no weight reads: what makes them is zero."""
        for occurrence in group.occurrences:
            name = occurrence.tensor
            typed = self.graph.axes_of(occurrence.node, occurrence.input)
            if occurrence.role not in ("produce", "shift") or name not in self._fed or typed is None:
                continue
            array = changed.get(name, self._fed[name]).copy()
            kept = axes.kept_positions(typed[occurrence.axis], {group.var: keep[group.var]})
            if kept is not None:
                gone = np.setdiff1d(np.arange(array.shape[occurrence.axis]), kept)
                np.moveaxis(array, occurrence.axis, 0)[gone] = 0
                changed[name] = array


class Changed:
    """A model with some of its weights changed, as a `Runner` of metrics."""

    def __init__(self, probe: Probe, changed: Mapping[str, Array]) -> None:
        self._probe = probe
        self._changed = changed

    def run(self, feeds: Feeds, /) -> Outputs:
        return self._probe._run(feeds, self._changed)


class _Switches:
    """The model with a switch between each of these residual blocks and its stream: what the block adds becomes
    branch * gate + level, of which gate (1 or 0) and level (of each feature) are fed."""

    def __init__(self, graph: DependencyGraph, blocks: Sequence[Block]) -> None:
        model = graph.model
        taken = {name for node in model.nodes for name in (*node.inputs, *node.outputs)} | set(
            model.constants
        )
        self._shapes = graph.shapes
        self._branches: dict[str, tuple[str, int]] = {}  # by block: the tensor and its axis of features
        self._inputs: dict[str, tuple[str, str]] = {}  # gate and level
        self._open: Feeds = {}  # where nothing is switched off
        edits = []
        for block in blocks:
            branch, axis = block.join.inputs[block.branch], features(graph, block)
            shape, element = graph.shapes.shapes[branch], graph.shapes.elements[branch]
            extents = [1] * len(shape)
            extents[axis] = shape[axis]
            gate, level, closed, made = (
                fresh_name(f"{branch}.{what}", taken) for what in ("gate", "level", "closed", "switched")
            )
            join = copied_node(block.join.proto)
            join.input[block.branch] = made
            times = onnx.helper.make_node("Mul", [branch, gate], [closed])
            plus = onnx.helper.make_node("Add", [closed, level], [made])
            edits.append(Rewire(tuple(filter(None, join.output)), add=(times, plus, join)))
            self._branches[block.name], self._inputs[block.name] = (branch, axis), (gate, level)
            dtype = onnx.helper.tensor_dtype_to_np_dtype(element)
            self._open |= {gate: np.ones((), dtype), level: np.zeros(extents, dtype)}
        proto = _with_inputs(rewrite.edited(model, edits), self._open)
        names = [*telling(model), *(branch for branch, _ in self._branches.values())]
        self._session = Session(proto, optimise="all", expose=inner(proto, dict.fromkeys(names)))

    def run(
        self, feeds: Feeds, outputs: Sequence[str], without: str | None = None, mean: Array | None = None
    ) -> Outputs:
        """Outputs where one block, by name, adds this much."""
        switched = dict(self._open)
        if without is not None and mean is not None:
            gate, level = self._inputs[without]
            switched[gate] = np.zeros_like(switched[gate])
            switched[level] = mean.astype(switched[level].dtype)
        return self._session.run({**feeds, **switched}, outputs)

    def means(self, data: Data) -> dict[str, Array]:
        """By block the mean of its branch, in the shape of its level."""
        names = list(dict.fromkeys(branch for branch, _ in self._branches.values()))
        sums: dict[str, Array] = {}
        counts = dict.fromkeys(self._branches, 0)
        for batch in data.batches(batch_size(data, self._shapes, names)):
            values = self.run(batch.feeds, names)
            for name, (branch, axis) in self._branches.items():
                value = values[branch]
                rest = tuple(a for a in range(value.ndim) if a != axis % value.ndim)
                total = value.sum(axis=rest, dtype=np.float64, keepdims=True)
                sums[name] = sums[name] + total if name in sums else total
                counts[name] += value.size // value.shape[axis]
        return {name: total / max(counts[name], 1) for name, total in sums.items()}


def features(graph: DependencyGraph, block: Block) -> int:
    """The axis of a stream with the features of a token or pixel: the one whose width is free, where the graph
    pins it axis 1 of images and the last of others."""
    name = block.join.outputs[0]
    free = [i for i, a in enumerate(graph.types.get(name) or []) if any(True for _ in axes.free_vars(a))]
    if len(free) == 1:
        return free[0]
    return 1 if len(graph.shapes.shapes.get(name, ())) == 4 else -1


def _fed_by(proto: onnx.ModelProto, fed: Mapping[str, Array]) -> onnx.ModelProto:
    """The model with some of its constants as inputs."""
    model = onnx.ModelProto()
    model.CopyFrom(proto)
    graph = model.graph
    kept = [tensor for tensor in graph.initializer if tensor.name not in fed]
    del graph.initializer[:]
    graph.initializer.extend(kept)
    nodes = [node for node in graph.node if not (node.op_type == "Constant" and node.output[0] in fed)]
    del graph.node[:]
    graph.node.extend(nodes)
    return _with_inputs(model, fed)


def _with_inputs(model: onnx.ModelProto, fed: Mapping[str, Array]) -> onnx.ModelProto:
    """The same model, listing inputs of these names, types and shapes."""
    listed = {value.name for value in model.graph.input}
    for name, array in fed.items():
        if name not in listed:
            element = onnx.helper.np_dtype_to_tensor_dtype(array.dtype)
            model.graph.input.append(onnx.helper.make_tensor_value_info(name, element, list(array.shape)))
    return model


def masks(groups: Iterable[tuple[Group, Sequence[int]]]) -> Keep:
    """Masks that keep these units."""
    keep: Keep = {}
    for group, units in groups:
        keep[group.var] = np.isin(np.arange(group.size), list(units))
    return keep
