"""What only large or deep graphs bring out. Nothing here is timed; `benchmarks/growth.py` is."""

from __future__ import annotations

import gc
from itertools import pairwise

import numpy as np
import pytest

from models.architectures import shufflenet_v2
from models.builder import Graph
from onnxprune import axes
from onnxprune.axes import Var
from onnxprune.dependency import DependencyGraph
from onnxprune.model import Model, uncollected


def test_a_long_chain_of_bound_axes_resolves() -> None:
    chain = [Var(4) for _ in range(5000)]
    for here, there in pairwise(chain):
        here.bound = there
    assert axes.resolve(chain[0]) is chain[-1]


def test_a_deep_residual_tower_is_one_group() -> None:
    g = Graph()
    x = g.conv(g.input("batch", 3, 4, 4), 4, 1)
    for _ in range(1200):
        x = g.add(x, g.conv(x, 4, 1))
    graph = DependencyGraph(Model(g.model(g.gemm(g.flatten(g.gap(x)), 2))))
    assert [group.size for group in graph.groups] == [4]


def test_pieces_of_one_split_axis_are_cut_independently() -> None:
    """The stage axes of ShuffleNetV2 are sums of uneven pieces inside one factor of a product."""
    graph = DependencyGraph(Model(shufflenet_v2(image=32, classes=10)))
    for group in graph.groups:
        assert not group.siblings, group


def test_kept_positions_follow_from_unit_maps() -> None:
    a, b, c = Var(3), Var(2), Var(4)
    axis = axes.concat([axes.product([a, b]), axes.product([axes.concat([b, c]), axes.fresh(1), a]), c])
    keep = {a: np.array([True, False, True]), c: np.array([False, True, True, True])}
    gone = np.zeros(axis.extent, dtype=bool)
    for var, units in axes.unit_maps(axis):
        if var in keep:
            gone |= (units >= 0) & ~keep[var][units]
    assert axes.kept_positions(axis, keep).tolist() == np.flatnonzero(~gone).tolist()
    for var in (a, b, c):
        every = [units for other, units in axes.unit_maps(axis) if other is var]
        only = [units for _, units in axes.unit_maps(axis, var)]
        assert len(every) == len(only)
        assert all((x == y).all() for x, y in zip(every, only, strict=True))


@pytest.mark.parametrize("enabled", [True, False])
def test_the_garbage_collector_is_left_as_it_was(enabled: bool) -> None:
    was = gc.isenabled()
    try:
        (gc.enable if enabled else gc.disable)()
        with pytest.raises(ZeroDivisionError):
            uncollected(lambda: 1 / 0)()
        assert gc.isenabled() == enabled
        assert uncollected(gc.isenabled)() is False
    finally:
        (gc.enable if was else gc.disable)()
