"""Times of a piece of a model at some counts of its channels, and between them."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
Place = tuple[int, int, int]  # extents of inputs, outputs and the rest

MOST = 2**53  # of an extent: floats count no further
LEAST = 0.1  # of the least time that was measured: nothing is taken for faster


@dataclass(frozen=True)
class Grid:
    """Times of one piece, in milliseconds.

    inputs, outputs  extents that were measured, ascending: the last are the original's
    times            [inputs, outputs], at the original's extent of the rest
    rest             extents of what else the piece has (a stream that its outputs are put beside), ascending
    spent            times at these, at the original's extents of inputs and outputs
    """

    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    times: tuple[tuple[float, ...], ...]
    rest: tuple[int, ...]
    spent: tuple[float, ...]

    def __post_init__(self) -> None:
        for extents in (self.inputs, self.outputs, self.rest):
            if not extents or not all(a < b for a, b in itertools.pairwise((0, *extents))):
                raise ValueError("with extents that do not ascend from 1")
        if len(self.times) != len(self.inputs) or len(self.spent) != len(self.rest):
            raise ValueError("with extents that have no time")
        if any(len(row) != len(self.outputs) for row in self.times):
            raise ValueError("with extents that have no time")
        if not all(0 < one < math.inf for one in (*itertools.chain(*self.times), *self.spent)):
            raise ValueError("with times that are not positive")

    @staticmethod
    def of(measured: Mapping[Place, float]) -> Grid:
        """From times at places: all pairs of inputs and outputs at the largest rest, and some of the rest at the largest
        inputs and outputs."""
        most = max(measured)
        inputs, outputs, rest = (tuple(sorted({place[i] for place in measured})) for i in range(3))
        return Grid(
            inputs,
            outputs,
            tuple(tuple(measured[i, o, most[2]] for o in outputs) for i in inputs),
            rest,
            tuple(measured[most[0], most[1], r] for r in rest),
        )

    @staticmethod
    def read(stated: Mapping[str, Any]) -> Grid:
        """From JSON. Raises `ValueError`, `KeyError` and `TypeError` for what is none."""
        inputs, outputs, rest = (
            tuple(_whole(one) for one in stated[name]) for name in ("inputs", "outputs", "rest")
        )
        times = tuple(tuple(float(one) for one in row) for row in stated["times"])
        return Grid(inputs, outputs, times, rest, tuple(float(one) for one in stated["spent"]))

    def as_dict(self) -> dict[str, Any]:
        return {
            "inputs": list(self.inputs),
            "outputs": list(self.outputs),
            "times": [list(row) for row in self.times],
            "rest": list(self.rest),
            "spent": list(self.spent),
        }

    def at(self, place: Place) -> float:
        """Milliseconds: bilinear between inputs and outputs, and what a smaller rest saves, linear.

        Nothing is said about what lies outside: below the smallest extent that was measured the time is that extent's.
        Fewer channels never take longer: where measured times say so, between them lies what does not.
        """
        rows = [np.interp(place[1], self.outputs, row) for row in monotone(np.array(self.times))]
        spent = monotone(np.array(self.spent))
        saved = spent[-1] - np.interp(place[2], self.rest, spent)
        return float(
            max(np.interp(place[0], self.inputs, rows) - saved, LEAST * min(*self.spent, *self.times[0]))
        )


def monotone(values: Floats) -> Floats:
    """Values that fall along no axis, halfway between the least above that do not and the greatest below."""
    above, below = values, values
    for axis in range(values.ndim):
        above = np.maximum.accumulate(above, axis=axis)
        below = np.flip(np.minimum.accumulate(np.flip(below, axis), axis=axis), axis)
    return (above + below) / 2


@dataclass(frozen=True)
class Whole:
    """A whole model, as it was measured from end to end.

    milliseconds  of the original
    pieces        the sum of its pieces' times
    ratios        (predicted from the grids, measured) of models cut from it, over the original
    """

    milliseconds: float
    pieces: float
    ratios: tuple[tuple[float, float], ...]

    def __post_init__(self) -> None:
        numbers = (self.milliseconds, self.pieces, *itertools.chain(*self.ratios))
        if not all(0 < one < math.inf for one in numbers):
            raise ValueError("with times that are not positive")

    @staticmethod
    def read(stated: Mapping[str, Any]) -> Whole:
        """From JSON. Raises `ValueError`, `KeyError` and `TypeError` for what is none."""
        ratios = tuple((float(predicted), float(found)) for predicted, found in stated["ratios"])
        return Whole(float(stated["milliseconds"]), float(stated["pieces"]), ratios)

    def as_dict(self) -> dict[str, Any]:
        return {
            "milliseconds": self.milliseconds,
            "pieces": self.pieces,
            "ratios": [list(pair) for pair in self.ratios],
        }

    def ratio(self, predicted: float) -> float:
        """The ratio that is to be expected where the pieces' sum says `predicted`: linear between 0, the ratios that were
        measured, and 1."""
        pairs = np.array(sorted({(0.0, 0.0), *((p, m) for p, m in self.ratios if p < 1), (1.0, 1.0)}))
        return float(np.interp(predicted, pairs[:, 0], monotone(pairs[:, 1])))


def spread(length: int, points: int) -> Sequence[int]:
    """At most so many positions of a row, evenly: the first and the last, and where there are as many, all."""
    steps = max(min(length, points) - 1, 1)
    return sorted({round(step * (length - 1) / steps) for step in range(steps + 1)})


def _whole(value: object) -> int:
    if type(value) is not int:
        raise ValueError(f"with the extent {value!r}")
    if value > MOST:
        raise ValueError(f"with an extent above {MOST}")
    return value
