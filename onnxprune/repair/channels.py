"""Repair in one shot: every reader that lost channels gets the best map from those that stay (see `maps`)."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

import numpy as np

from onnxprune.axes import BoolArray, Keep, kept_positions
from onnxprune.model import Array
from onnxprune.readers import Floats, Reader, Readers
from onnxprune.repair import maps
from onnxprune.repair.weights import Weights
from onnxprune.statistics import Statistics


@dataclass(frozen=True, slots=True)
class Repaired:
    """What became of one reader: the share of its output's variance lost on held-out samples."""

    node: str
    method: str
    before: float
    after: float


def repair(
    readers: Readers,
    keep: Keep,
    gone: Collection[int],
    weights: Weights,
    statistics: Statistics,
    mean_only: bool = False,
) -> list[Repaired]:
    """Set the weights and biases of every reader that lost channels.

    gone  indices of nodes that left with a removed layer
    """
    done = []
    for reader in readers.all:
        if reader.node.index in gone:
            continue
        fitted = fit(reader, readers.graph.model.array(reader.weight), keep, statistics, mean_only)
        if fitted is None:
            continue
        node = weights.model.producers.get(reader.node.result)
        name = weights.constant(node, reader.operand) if node is not None else None
        if node is None or name is None:
            done.append(Repaired(reader.node.label, "none: its weight is shared", 0.0, 0.0))
            continue
        fix = fitted.fix
        if fix.method != "none":
            weights.set(name, cut(reader, fitted.weight, keep))
            if fix.shift is not None and reader.bias is not None:
                holder = weights.model.producers[reader.bias.node.result]
                weights.shift(holder, reader.bias, fix.shift)
        done.append(Repaired(reader.node.label, fix.method, fix.before, fix.after))
    return done


@dataclass(frozen=True, eq=False, slots=True)
class Fitted:
    """A reader of which the channels that stay make up for those that went.

    fix     the map that was chosen, of the groups and outputs that stay
    weight  of the original's shape, zero at the channels that went
    shift   [groups, outputs] to add to what the reader makes; zero where there is no bias, and for outputs that went
    """

    fix: maps.Fix
    weight: Floats
    shift: Floats


def fit(
    reader: Reader,
    weight: Array,
    keep: Keep,
    statistics: Statistics,
    mean_only: bool = False,
    apart: bool = False,
) -> Fitted | None:
    """A reader fitted to what stays; None where it has lost no channels (see `lost`) or nothing is known of them.

    weight  the original's
    apart   nothing is fitted to the samples that are held out (see `maps.fit`)
    """
    chosen = lost(reader, keep)
    if chosen is None or reader.source not in statistics.fitted:
        return None
    groups, kept, made = chosen
    staying = np.flatnonzero(groups)
    whole = reader.matrix(weight)
    part = np.stack([whole[g][made[g]] for g in staying])
    moments = [m[reader.source].restricted(groups) for m in (statistics.fitted, statistics.held)]
    fix = maps.fit(reader, part, kept[groups], moments[0], moments[1], mean_only, apart)
    shift = np.zeros(whole.shape[:2])
    for i, g in enumerate(staying):
        rows = np.flatnonzero(made[g])
        whole[g, rows] = 0
        whole[np.ix_([g], rows, np.flatnonzero(kept[g]))] = fix.weight[i]
        if fix.shift is not None:
            shift[g, rows] = fix.shift[i]
    return Fitted(fix, reader.weight_of(whole), shift)


def lost(reader: Reader, keep: Keep) -> tuple[BoolArray, BoolArray, BoolArray] | None:
    """(groups that stay [g], channels that stay [g, i], outputs that stay [g, o]) of a reader that lost channels;
    None where it lost none, or where its groups lost different numbers."""
    kept = reader.channels(keep)
    if kept is None:
        return None
    made = reader.made(keep)
    groups: BoolArray = np.logical_and(kept.any(axis=1), made.any(axis=1))
    if not groups.any() or kept[groups].all():
        return None
    even = len(set(kept[groups].sum(axis=1))) == len(set(made[groups].sum(axis=1))) == 1
    return (groups, kept, made) if even else None


def cut(reader: Reader, weight: Array, keep: Keep) -> Array:
    """A weight of the original as surgery cuts it."""
    typed = reader.link.inputs[reader.operand] or []
    for axis, kind in enumerate(typed):
        positions = kept_positions(kind, keep)
        if positions is not None:
            weight = np.take(weight, positions, axis=axis)
    return weight
