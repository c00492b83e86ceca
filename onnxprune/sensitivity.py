"""What the network's outputs lose when units go, measured: on the original, with the units masked and every
reader repaired, so that nothing has to be cut for it.

Weights and biases of the readers are inputs of one session. A reader that ignores some channels and makes up
for them is the same as one that never had them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import onnx

from onnxprune import axes, rewrite
from onnxprune.axes import Keep
from onnxprune.blocks import Block
from onnxprune.criteria.evidence import Evidence
from onnxprune.data import Data
from onnxprune.dependency import Group
from onnxprune.errors import UserError
from onnxprune.model import Array, Model
from onnxprune.outputs import Distance, telling
from onnxprune.readers import Reader
from onnxprune.repair import channels, maps
from onnxprune.repair.weights import Weights
from onnxprune.runtime import Feeds, RunError, Session, inner
from onnxprune.statistics import batch_size

Outputs = Mapping[str, Array]


class Probe:
    """Runs a model with some of its units masked.

    Raises `UserError` if onnxruntime cannot run the model on the data.
    """

    def __init__(self, evidence: Evidence, data: Data) -> None:
        self.evidence = evidence
        self.graph = evidence.graph
        self._weights = Weights(self.graph.model)
        for reader in evidence.readers.all:
            if reader.bias is not None and not reader.bias.tensor:
                self._weights.shift(reader.node, reader.bias, np.zeros(reader.outputs * reader.source.groups))
        self._model = Model(rewrite.edited(self.graph.model, self._weights.edits("room for a shift")))
        arrays = {name: self._model.array(name) for name in sorted(self._changeable())}
        self._fed: Feeds = {name: array for name, array in arrays.items() if array.dtype.kind == "f"}
        try:
            self.distance = Distance(
                self.graph.model, data, batch_size(data, self.graph.shapes, telling(self.graph.model))
            )
            proto = _fed_by(self._model.proto, self._fed)
            self._session = Session(proto, optimise="all", expose=inner(proto, self.distance.names))
        except RunError as error:
            raise UserError(
                f"{self.graph.model.name}: onnxruntime cannot run it on the data ({error})"
            ) from None

    def error(self, keep: Keep) -> float:
        """The distance of the outputs (see `outputs.Distance`) when all but the kept units are masked."""
        return self._error(self._masked(keep))

    def probes(self, group: Group) -> bool:
        """Whether masking a group can be told: some float weight reads its units, or makes them."""
        if self.evidence.readers.of(group):
            return True
        return any(o.role == "produce" and o.tensor in self._fed for o in group.occurrences)

    def error_without(self, block: Block) -> float:
        """The same when a residual block adds no more than its mean; infinite where that cannot be probed."""
        branch, statistics = block.join.inputs[block.branch], self.evidence.statistics
        for reader in self.evidence.readers.all:
            end = reader.bias.node if reader.bias is not None else reader.node
            known = statistics is not None and reader.source in statistics.fitted
            if reader.bias is not None and reader.affine and known and end.outputs[0] == branch:
                return self._error(self._constant(reader))
        return float("inf")

    def masked(self, keep: Keep) -> Changed:
        """The model with all but the kept units masked, for a metric."""
        return Changed(self, self._masked(keep))

    def error_of(self, proto: onnx.ModelProto) -> float:
        """The same of a model with the same outputs."""
        return self.distance.of(proto)

    # -------------------------------------------------------------------------------------- inside

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
        node = self._model.producers[reader.node.outputs[0]]
        names = [node.inputs[reader.operand]]
        if reader.bias is not None:
            holder = self._model.producers[reader.bias.node.outputs[0]]
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
        chosen = channels.lost(reader, keep)
        statistics = self.evidence.statistics
        names = self._of(reader)
        if chosen is None or statistics is None or names[0] in changed:
            return
        groups, kept, made = chosen
        whole = reader.matrix(self._fed[names[0]])
        part = np.stack([whole[g][made[g]] for g in np.flatnonzero(groups)])
        fitted, held = (m[reader.source].restricted(groups) for m in (statistics.fitted, statistics.held))
        fix = maps.fit(reader, part, kept[groups], fitted, held)
        shift = np.zeros(whole.shape[:2])
        for i, g in enumerate(np.flatnonzero(groups)):
            rows = np.flatnonzero(made[g])
            whole[g, rows] = 0
            whole[np.ix_([g], rows, np.flatnonzero(kept[g]))] = fix.weight[i]
            if fix.shift is not None:
                shift[g, rows] = fix.shift[i]
        changed[names[0]] = reader.weight_of(whole).astype(self._fed[names[0]].dtype)
        if reader.bias is not None:
            old = changed.get(names[1], self._fed[names[1]])
            changed[names[1]] = (old + (shift.ravel() / reader.bias.scale).reshape(old.shape)).astype(
                old.dtype
            )

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

    def _constant(self, reader: Reader) -> dict[str, Array]:
        """The reader makes nothing but the mean of what it made."""
        assert reader.bias is not None
        names = self._of(reader)
        weight, bias = (self._fed[name] for name in names)
        matrix = reader.matrix(weight)
        mean = np.einsum(
            "goct,gc,t->go",
            matrix,
            self.evidence.moments(reader).mean,
            maps.coverage(reader, matrix.shape[3]),
        )
        shifted = bias + (mean.ravel() / reader.bias.scale).reshape(bias.shape)
        return {names[0]: np.zeros_like(weight), names[1]: shifted.astype(bias.dtype)}


class Changed:
    """A model with some of its weights changed, as a `Runner` of metrics."""

    def __init__(self, probe: Probe, changed: Mapping[str, Array]) -> None:
        self._probe = probe
        self._changed = changed

    def run(self, feeds: Feeds, /) -> Outputs:
        return self._probe._run(feeds, self._changed)


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
    listed = {value.name for value in graph.input}
    for name, array in fed.items():
        if name not in listed:
            element = onnx.helper.np_dtype_to_tensor_dtype(array.dtype)
            graph.input.append(onnx.helper.make_tensor_value_info(name, element, list(array.shape)))
    return model


def masks(groups: Iterable[tuple[Group, Sequence[int]]]) -> Keep:
    """Masks that keep these units."""
    keep: Keep = {}
    for group, units in groups:
        keep[group.var] = np.isin(np.arange(group.size), list(units))
    return keep
