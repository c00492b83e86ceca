"""Repair in one shot: every reader that lost channels gets the best map from those that stay (see `maps`)."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

import numpy as np

from onnxprune.axes import BoolArray, Keep, kept_positions
from onnxprune.model import Array
from onnxprune.readers import Reader, Readers
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
        if reader.node.index in gone or reader.source not in statistics.fitted:
            continue
        chosen = lost(reader, keep)
        if chosen is None:
            continue
        node = weights.model.producers.get(reader.node.outputs[0])
        name = weights.constant(node, reader.operand) if node is not None else None
        if node is None or name is None:
            done.append(Repaired(reader.node.label, "none: its weight is shared", 0.0, 0.0))
            continue
        groups, kept, made = chosen
        whole = reader.matrix(readers.graph.model.array(reader.weight))
        part = np.stack([whole[g][made[g]] for g in np.flatnonzero(groups)])
        moments = [m[reader.source].restricted(groups) for m in (statistics.fitted, statistics.held)]
        fix = maps.fit(reader, part, kept[groups], moments[0], moments[1], mean_only)
        if fix.method != "none":
            for i, g in enumerate(np.flatnonzero(groups)):
                whole[np.ix_([g], made[g], kept[g])] = fix.weight[i]
            weights.set(name, cut(reader, reader.weight_of(whole), keep))
            if fix.shift is not None and reader.bias is not None:
                holder = weights.model.producers[reader.bias.node.outputs[0]]
                weights.shift(holder, reader.bias, fix.shift)
        done.append(Repaired(reader.node.label, fix.method, fix.before, fix.after))
    return done


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
