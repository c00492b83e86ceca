"""What a model does on data, found once and used by scores, allocation and repair."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from onnxprune import axes
from onnxprune.allocation import Curve, kept_units
from onnxprune.blocks import Block
from onnxprune.criteria import Evidence, Scores
from onnxprune.data import Data
from onnxprune.dependency import DependencyGraph, Group
from onnxprune.readers import Readers
from onnxprune.sensitivity import Probe, masks
from onnxprune.statistics import collect, is_held

Progress = Callable[[str, float], None]

PROBED = (0.5, 0.25, 0.75)  # shares of a group that stay when its error is measured, the most telling first
SAMPLES = 48  # that a probe runs on, at most
FEWEST = 16  # and at least
APART = 8  # samples held out, for probes to run on them alone
RUNS = 1536  # samples that all probes run on: with many groups fewer shares, then fewer samples
MEASURED_FLOOR, MADE_UP_FLOOR = 0.1, 0.25  # the least share of a group that stays
FLOOR = 1e-9  # the least error of a unit: what seems to cost nothing on a few samples


class Calibration:
    """A model and data for it; statistics and probes are made when they are first asked for.

    progress   called with what is being done and the share of it that is done
    """

    def __init__(
        self, graph: DependencyGraph, data: Data, progress: Progress = lambda _stage, _share: None
    ) -> None:
        self.graph = graph
        self.data = data
        self.progress = progress

    @functools.cached_property
    def evidence(self) -> Evidence:
        """With statistics of every source that may lose channels."""
        readers = Readers(self.graph)
        sources = [
            reader.source
            for reader in readers.all
            if reader.source.size > 1 and any(True for _ in axes.free_vars(reader.typed))
        ]
        statistics = collect(
            self.graph.model,
            self.graph.shapes,
            sources,
            self.data,
            lambda share: self.progress("calibrate", share),
        )
        return Evidence(self.graph, readers, statistics)

    def curves(
        self, scores: Mapping[Group, Scores], allowed: Mapping[Group, Sequence[int]], removals: int = 0
    ) -> dict[Group, Curve]:
        """What each group costs the outputs: sums of its scores, scaled to what is measured when the group alone
        is masked down to a few shares of its units.

        allowed   counts that may be kept, ascending
        removals  probes to leave room for
        """
        groups = [group for group in scores if len(allowed[group]) > 1]
        shares, samples = _affordable(len(groups), removals)
        probe = self.probe(samples)
        found: dict[Group, Curve] = {}
        for number, group in enumerate(groups):
            lost = np.cumsum(np.sort(np.maximum(scores[group], 0)))
            floor = min(math.ceil(group.size * self._floor), allowed[group][-1])
            counts = tuple(c for c in allowed[group] if c >= floor)
            summed = np.array([lost[group.size - c - 1] if c < group.size else 0.0 for c in counts])
            summed += FLOOR * (group.size - np.array(counts))
            factors = {}
            for share in shares if len(counts) > 1 else ():
                count = min(counts[:-1], key=lambda c: (abs(c - share * group.size), c))
                if count not in factors and probe.probes(group):
                    error = probe.error(masks([(group, kept_units(scores[group], count))]))
                    factors[count] = max(error, FLOOR) / summed[counts.index(count)]
            if not factors:  # quantised, or in a body: no more than what its scores say
                shares_lost = summed / max(float(lost[-1]), FLOOR)
                found[group] = Curve(counts, np.where(np.array(counts) == group.size, 0.0, shares_lost))
                continue
            places = sorted(factors)
            scale = np.exp(np.interp(counts, places, np.log([factors[place] for place in places])))
            errors = np.maximum.accumulate((summed * scale)[::-1])[::-1]
            found[group] = Curve(counts, np.where(np.array(counts) == group.size, 0.0, errors))
            self.progress("probe", (number + 1) / len(groups))
        return found if self.data.measured else _cautious(found)

    @property
    def _floor(self) -> float:
        """The least share of a group that stays."""
        return MEASURED_FLOOR if self.data.measured else MADE_UP_FLOOR

    def without(self, blocks: Sequence[Block], groups: int) -> dict[str, float]:
        """What the outputs lose when each of these residual blocks adds no more than its mean."""
        return self.probe(_affordable(groups, len(blocks))[1]).errors_without(blocks)

    def probe(self, samples: int) -> Probe:
        """One that runs on the first samples that are held out: a map that makes up for many channels fits what it
        was fitted to ever so well. Of all samples, where few are held out."""
        if samples not in self._probes:
            assert self.evidence.statistics is not None
            data = self.data.part(self.evidence.statistics.size, is_held)
            apart = data is not None and len(data) >= APART
            if data is None or not apart:
                data = self.data
            data = data if len(data) <= samples else data.subset(samples)
            self._probes[samples] = Probe(self.evidence, data, apart)
        return self._probes[samples]

    @functools.cached_property
    def _probes(self) -> dict[int, Probe]:
        return {}


def _cautious(curves: Mapping[Group, Curve]) -> dict[Group, Curve]:
    """Half way (as powers go) between each curve and the mean of all at the same share: made-up inputs miss what
    only real ones excite."""
    shares = np.linspace(0, 1, 33)[1:]
    logs = []
    for group, curve in curves.items():
        gone = 1 - np.array(curve.counts, dtype=float) / group.size
        logs.append(np.log(np.interp(shares, gone[::-1], np.maximum(curve.errors[::-1], FLOOR))))
    if not logs:
        return {}
    mean = np.mean(logs, axis=0)
    found = {}
    for group, curve in curves.items():
        gone = 1 - np.array(curve.counts, dtype=float) / group.size
        shared = np.exp(np.interp(gone, shares, mean))
        errors = np.sqrt(curve.errors * shared)
        found[group] = Curve(curve.counts, np.maximum.accumulate(errors[::-1])[::-1])
    return found


def _affordable(groups: int, removals: int) -> tuple[tuple[float, ...], int]:
    """(shares to probe, samples) for so many groups and residual blocks."""
    for count in range(len(PROBED), 0, -1):
        samples = min(SAMPLES, RUNS // max(count * groups + removals, 1))
        if samples >= FEWEST or count == 1:
            return PROBED[:count], max(samples, FEWEST)
    raise AssertionError


__all__ = ["Calibration", "Progress"]
