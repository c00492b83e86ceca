"""What criteria look at: the weights of a model, where its units are read, and what they do on data."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from onnxprune.axes import IntArray
from onnxprune.criteria.slices import Scores, Slices
from onnxprune.dependency import DependencyGraph, Group
from onnxprune.errors import UserError
from onnxprune.readers import Floats as Matrix
from onnxprune.readers import Reader, Readers, Source
from onnxprune.statistics import Floats, Moments, Statistics


@dataclass
class Evidence:
    """Weights, readers and, with data, statistics of a model."""

    graph: DependencyGraph
    readers: Readers
    statistics: Statistics | None = None
    slices: Slices = field(init=False)

    def __post_init__(self) -> None:
        self.slices = Slices(self.graph)
        self._moments: dict[Source, Moments] = {}

    @classmethod
    def of(cls, graph: DependencyGraph) -> Evidence:
        """Without data."""
        return cls(graph, Readers(graph))

    def weight(self, reader: Reader) -> Matrix:
        """[groups, outputs, channels, taps]. Raises `UserError` where it is not finite."""
        weight = reader.matrix(self.graph.model.array(reader.weight))
        if not np.isfinite(weight).all():
            raise UserError(
                f"{self.graph.model.name}: weight '{reader.weight}' (node '{reader.node.label}') holds NaN or Inf, so "
                "its units cannot be ranked; repair the model or pass --exclude for that weight"
            )
        return weight

    def energy(self, reader: Reader) -> Floats:
        """Squared norm of a reader's weight for every channel, [groups, channels]."""
        energy: Floats = np.square(self.weight(reader)).sum(axis=(1, 3), dtype=np.float64)
        return energy

    def moments(self, reader: Reader) -> Moments:
        """Of the reader's source, over all samples. Raises `UserError` where squares of it are not finite."""
        assert self.statistics is not None
        if reader.source not in self._moments:
            moments = self.statistics.of(reader.source)
            if not np.isfinite(moments.scatter).all():
                raise UserError(
                    f"{self.graph.model.name}: '{reader.source.tensor}' is too large on the data for its covariance; "
                    "check the preprocessing"
                )
            self._moments[reader.source] = moments
        return self._moments[reader.source]

    def seen(self, group: Group) -> list[tuple[Reader, IntArray]]:
        """Each reader of a group's units with the unit at every one of its channels, [groups, channels]; -1: none.

        Where a unit's outputs all go with it (a depthwise filter), nobody sees what they lose: -1.
        """
        found = []
        for reader in self.readers.of(group):
            units = np.full((reader.source.groups, reader.source.size), -1, dtype=np.int64)
            for occurrence in reader.units(group):
                units = np.where(occurrence >= 0, occurrence, units)
            stays = reader.made({group.var: np.zeros(group.size, dtype=bool)}).any(axis=1)
            alone = (units >= 0).all(axis=1) & (units == units[:, :1]).all(axis=1)
            units[alone & ~stays] = -1
            if (units >= 0).any():
                found.append((reader, units))
        return found

    def sources(self, group: Group) -> list[tuple[Reader, IntArray]]:
        """As `seen`, with the first reader of every activation alone."""
        first: dict[Source, tuple[Reader, IntArray]] = {}
        for reader, units in self.seen(group):
            first.setdefault(reader.source, (reader, units))
        return list(first.values())


def per_unit(units: IntArray, values: Floats, size: int) -> Scores:
    """Sums of channel values [groups, channels] by unit."""
    inside = units >= 0
    return np.bincount(units[inside], values[inside], size).astype(np.float64)
