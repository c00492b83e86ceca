"""Norms of unit slices against the formula, however the weights are stored and read."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from onnx import ModelProto, TensorProto

from models.builder import Array, Graph, Tensor
from onnxprune import criteria
from onnxprune.criteria import slices
from onnxprune.criteria.slices import Slices
from onnxprune.dependency import DependencyGraph, Group, Occurrence
from onnxprune.errors import UserError
from onnxprune.model import Model
from tests.reference import graph_of

BLOCKS = [1, 5, 64, 10**6]


def layered() -> ModelProto:
    """Six channels that are read twice by one filter, by place, and over each position of an image."""
    g = Graph(seed=2)
    x = g.relu(g.bn(g.conv(g.input("batch", 3, 4, 4), 6, 3)))
    both = g.gap(g.conv(g.concat(x, x), 4, 1))
    return g.model(g.gemm(g.flatten(x), 5), g.flatten(both))


def found(graph: DependencyGraph, tensor: str, axis: int) -> tuple[Group, Occurrence]:
    """The group of six, where it occurs in a weight."""
    (group,) = (group for group in graph.groups if group.size == 6)
    for occurrence in group.occurrences:
        if (occurrence.tensor, occurrence.axis) == (tensor, axis):
            return group, occurrence
    raise AssertionError(f"{tensor} has no units on axis {axis}")


def norms(array: Array, order: int) -> Array:
    """Of [units, elements]."""
    powers: Array = np.abs(array.astype(np.float64)) ** order
    return np.asarray(powers.sum(axis=1) ** (1 / order))


@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("order", [1, 2])
def test_norms_are_those_of_the_slices(block: int, order: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slices, "BLOCK", block)
    graph = graph_of(layered())
    arrays = {name: graph.model.array(name) for name in graph.model.constants}
    filters, twice, dense = arrays["conv_1.weight"], arrays["conv_2.weight"], arrays["gemm_1.weight"]
    wanted = {
        ("conv_1.weight", 0): filters.reshape(6, -1),
        ("bn_1.scale", 0): arrays["bn_1.scale"].reshape(6, 1),
        ("conv_2.weight", 1): twice.reshape(4, 2, 6).transpose(2, 0, 1).reshape(6, -1),
        ("gemm_1.weight", 1): dense.reshape(5, 6, 16).transpose(1, 0, 2).reshape(6, -1),
    }
    looked_up = Slices(graph)
    for (tensor, axis), rows in wanted.items():
        group, occurrence = found(graph, tensor, axis)
        got = looked_up.norm(group, occurrence, order)
        assert got is not None
        np.testing.assert_allclose(got, norms(rows, order), rtol=1e-5)


def test_rows_are_the_slices() -> None:
    """In any order of the elements, the same for all units: distances depend on that."""
    graph = graph_of(layered())
    twice = graph.model.array("conv_2.weight").reshape(4, 2, 6)
    rows = Slices(graph).rows(*found(graph, "conv_2.weight", 1))
    assert rows is not None
    assert rows.shape == (6, 8)
    wanted = twice.transpose(2, 0, 1).reshape(6, 8)
    for i in range(6):
        for j in range(i):
            assert np.linalg.norm(rows[i] - rows[j]) == pytest.approx(np.linalg.norm(wanted[i] - wanted[j]))


def stored(array: Array) -> DependencyGraph:
    """A first filter of this type and these values."""
    g = Graph()
    weight = g.store("weight", array)
    if array.dtype == np.int8:
        scale = g.const(0.1, np.float32)
        weight = g.op("DequantizeLinear", weight, scale, shape=array.shape, dtype=TensorProto.FLOAT)
    elif array.dtype != np.float32:
        weight = g.op("Cast", weight, to=TensorProto.FLOAT)
    x: Tensor = g.conv(g.input("batch", array.shape[1], 4, 4), weight=weight)
    return graph_of(g.model(g.gemm(g.flatten(g.gap(x)), 5)))


@pytest.mark.parametrize("dtype", [np.float16, np.float64, np.int8])
@pytest.mark.parametrize("shape", [(6, 1, 1, 1), (6, 3, 3, 3), (6, 5, 1, 3)])
@pytest.mark.parametrize("block", BLOCKS)
def test_norms_of_other_element_types(
    dtype: Any, shape: tuple[int, ...], block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(slices, "BLOCK", block)
    values = (np.random.default_rng(0).standard_normal(shape) * 40).astype(dtype)
    values.flat[0] = -128 if dtype == np.int8 else -1000
    graph = stored(values)
    group, occurrence = found(graph, "weight", 0)
    for order in (1, 2):
        got = Slices(graph).norm(group, occurrence, order)
        assert got is not None
        np.testing.assert_allclose(got, norms(values.reshape(6, -1), order), rtol=1e-5)


def test_squares_that_are_no_float32_are_ranked() -> None:
    values = np.full((6, 3, 1, 1), 1e30, np.float32) * np.arange(1, 7).reshape(6, 1, 1, 1)
    graph = stored(values.astype(np.float32))
    group, occurrence = found(graph, "weight", 0)
    got = Slices(graph).norm(group, occurrence, 2)
    assert got is not None
    np.testing.assert_allclose(got, np.sqrt(3) * 1e30 * np.arange(1, 7), rtol=1e-5)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("criterion", sorted(criteria.CRITERIA))
@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_weights_that_are_not_finite_are_refused(bad: float, criterion: str, dtype: Any) -> None:
    values = np.random.default_rng(0).standard_normal((6, 3, 3, 3)).astype(dtype)
    values[4, 1, 2, 0] = bad
    graph = stored(values)
    with pytest.raises(UserError, match=r"weight 'weight'.*NaN or Inf"):
        criteria.score(graph, graph.groups, criterion)
    assert criteria.score(graph, graph.groups, "random")


def test_each_weight_counts_alike() -> None:
    """A scale on one weight changes no score."""
    proto = layered()
    graph = graph_of(proto)
    (name,) = (t for t in proto.graph.initializer if t.name == "gemm_1.weight")
    scaled = ModelProto()
    scaled.CopyFrom(proto)
    (tensor,) = (t for t in scaled.graph.initializer if t.name == name.name)
    tensor.raw_data = (graph.model.array(name.name) * 1000).astype(np.float32).tobytes()
    other = DependencyGraph(Model(scaled))
    for criterion in criteria.CRITERIA:
        want, got = (criteria.score(g, g.groups, criterion) for g in (graph, other))
        for a, b in zip(want.values(), got.values(), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-5)
