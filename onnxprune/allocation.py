"""How many units each group keeps, and how counts are rounded for fast kernels."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from onnxprune.dependency import Group
from onnxprune.errors import UserError

Scores = Mapping[Group, npt.NDArray[np.float64]]
STRATEGIES = ("uniform", "global")
GROUPED = 4  # grouped and depthwise convolutions off a multiple of this fall to slow kernels
GLOBAL_FLOOR = 0.1  # the least share of a group that global allocation leaves


@dataclass(frozen=True, slots=True)
class Rounding:
    """Channels per group are rounded to multiples of `align`, and never fall below `minimum`."""

    align: int = 16
    minimum: int = 1

    def __post_init__(self) -> None:
        if self.align < 1:
            raise UserError(f"--align {self.align}: give a positive number of channels (1 turns it off)")
        if self.minimum < 1:
            raise UserError(f"--min-channels {self.minimum}: at least 1 channel must stay")

    def step(self, group: Group) -> int:
        """Units between two allowed counts: the alignment in channels over the channels per unit.

        Groups smaller than two blocks use half blocks (down to 4 channels), so that they can be cut at all.
        """
        block = math.lcm(self.align, GROUPED) if group.grouped else self.align
        while block > GROUPED and group.size * group.stride < 2 * block:
            block = max(block // 2, GROUPED)
        return max(block // math.gcd(block, group.stride), 1)

    def count(self, group: Group, wish: float) -> int:
        """The allowed count nearest to `wish`, at most the group's size and at least the minimum. Half a
        unit goes (a quarter of two heads is one), half a block stays."""
        step = 1 if self.align == 1 else self.step(group)
        if step == 1:
            count = math.ceil(wish - 0.5)
        elif group.size < 2 * step:
            count = group.size
        else:
            count = max(step, step * math.floor(wish / step + 0.5))
        return min(group.size, max(count, self.minimum, 1))


def counts(
    groups: Sequence[Group], scores: Scores, ratio: float, strategy: str, rounding: Rounding
) -> dict[Group, int]:
    """Units kept per group when the share `ratio` of all units is to go.

    uniform   the same share of every group
    global    the least important units wherever they are; scores are divided by their group's mean
              first, and no group falls below a tenth
    """
    if strategy == "uniform":
        return {g: rounding.count(g, g.size * (1 - ratio)) for g in groups}
    if strategy != "global":
        raise UserError(f"allocation '{strategy}' is unknown; choose one of {', '.join(STRATEGIES)}")
    pooled = [_normalised(scores[g]) for g in groups]
    floors = [max(math.ceil(g.size * GLOBAL_FLOOR), rounding.minimum) for g in groups]
    removable = [np.sort(p)[: max(g.size - f, 0)] for p, g, f in zip(pooled, groups, floors, strict=True)]
    everything = np.sort(np.concatenate([*removable, np.empty(0)]))
    wanted = min(round(ratio * sum(g.size for g in groups)), len(everything))
    if not wanted:
        return {g: g.size for g in groups}
    threshold = everything[wanted - 1]
    gone = [int(np.searchsorted(r, threshold, side="left")) for r in removable]
    for i, values in enumerate(removable):  # ties at the threshold, in group order
        ties = int(np.searchsorted(values, threshold, side="right")) - gone[i]
        gone[i] += min(ties, wanted - sum(gone))
    return {g: rounding.count(g, g.size - n) for g, n in zip(groups, gone, strict=True)}


def _normalised(values: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    mean = values.mean()
    return values / mean if mean > 0 else np.zeros_like(values)


def kept_units(values: npt.NDArray[np.float64], count: int) -> tuple[int, ...]:
    """The `count` units of highest score, in order; ties keep the lower index."""
    order = np.argsort(-values, kind="stable")[:count]
    return tuple(int(u) for u in np.sort(order))
