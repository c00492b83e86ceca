"""Streamed moments and regressions against numpy on all rows at once."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import ModelProto

from models.builder import Graph
from onnxprune import statistics
from onnxprune.data import open_data
from onnxprune.errors import UserError
from onnxprune.parts import inner_values
from onnxprune.readers import Readers, Source
from onnxprune.statistics import Floats, Moments, Regression, batch_size, collect, is_held
from tests.reference import Array, graph_of


def rows(seed: int, groups: int, count: int, columns: int, mean: float = 0.0) -> Array:
    """Correlated columns of different spreads, float32."""
    rng = np.random.default_rng(seed)
    mixed = rng.standard_normal((groups, count, columns)) @ rng.standard_normal((groups, columns, columns))
    return (mixed * rng.uniform(0.5, 2.0, columns) + mean).astype(np.float32)


def cuts(array: Array, places: list[int]) -> list[Array]:
    return np.split(array, sorted({place % (array.shape[1] + 1) for place in places}), axis=1)


def gathered(parts: list[Array], width: int | None = None) -> Moments:
    moments = Moments(parts[0].shape[0], parts[0].shape[2], width)
    for part in parts:
        moments.add(part)
    return moments


def covariance(array: Array) -> Floats:
    return np.stack([np.cov(part, rowvar=False, bias=True) for part in array.astype(np.float64)])


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**16),
    groups=st.integers(1, 3),
    count=st.integers(2, 80),
    columns=st.integers(2, 6),
    places=st.lists(st.integers(0, 100), max_size=5),
    width=st.integers(1, 7),
)
def test_moments_are_those_of_all_rows(
    seed: int, groups: int, count: int, columns: int, places: list[int], width: int
) -> None:
    """However the rows come; also where parts are merged afterwards."""
    array = rows(seed, groups, count, columns, mean=3.0)
    parts = cuts(array, places)
    merged = gathered(parts[:1], width)
    for part in parts[1:]:
        merged = merged.merged(gathered([part], width))
    wanted = covariance(array)
    for moments in (gathered(parts, width), merged):
        assert moments.count == count
        np.testing.assert_allclose(moments.mean, array.mean(axis=1, dtype=np.float64), rtol=1e-6, atol=1e-6)
        diagonal = np.einsum("gcc->gc", wanted)
        np.testing.assert_allclose(moments.variance, diagonal, rtol=1e-4)
        scale = diagonal.max()
        mean = array.mean(axis=1)
        assert [c for here in moments.slices for c in range(here.start, here.stop)] == list(range(columns))
        for block, here in enumerate(moments.slices):
            assert here.stop - here.start <= width
            own = wanted[:, here, here]
            np.testing.assert_allclose(moments.covariance(block), own, atol=1e-5 * scale)
            about_zero = own + mean[:, here, None] * mean[:, None, here]
            np.testing.assert_allclose(moments.second(False, block), about_zero, atol=1e-5 * (scale + 10))
        np.testing.assert_allclose(moments.absolute, np.abs(array).sum(axis=1), rtol=1e-5)
        np.testing.assert_array_equal(moments.active, (array > 0).sum(axis=1))


@pytest.mark.parametrize("mean", [1e4, 1e5, 1e6])
def test_a_large_mean_does_not_swallow_a_small_variance(mean: float) -> None:
    """Sums of squares in float32 would: 1e12 + 1 is 1e12."""
    base = rows(1, 2, 4000, 4)
    shifted = (base * 16).round() / 16 + np.float32(mean)  # exact in float32 at all three means
    exact = shifted.astype(np.float64)
    moments = gathered(np.array_split(shifted, 7, axis=1))
    np.testing.assert_allclose(moments.covariance(), covariance(exact), rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(moments.mean, exact.mean(axis=1), rtol=1e-12)


def test_batches_of_very_different_means_are_told_apart() -> None:
    """The variance between the batches counts: each is constant on its own."""
    parts = [np.full((1, 5, 2), value, np.float32) for value in (-1000.0, 1000.0, 0.0, 4.0)]
    whole = np.concatenate(parts, axis=1)
    np.testing.assert_allclose(gathered(parts).covariance(), covariance(whole), rtol=1e-12)


def test_nothing_added_is_nothing() -> None:
    moments = Moments(2, 3)
    moments.add(np.zeros((2, 0, 3), np.float32))
    assert moments.count == 0
    assert not moments.covariance().any()
    one = gathered([rows(0, 2, 5, 3)])
    for both in (moments.merged(one), one.merged(moments)):
        np.testing.assert_allclose(both.covariance(), one.covariance())
        np.testing.assert_allclose(both.mean, one.mean)


# ------------------------------------------------------------------------------------------- regressions


def regressed(x: list[Array], e: list[Array]) -> Regression:
    regression = Regression(x[0].shape[0], x[0].shape[2], e[0].shape[2])
    for a, b in zip(x, e, strict=True):
        regression.add(a, b)
    return regression


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**16),
    groups=st.integers(1, 3),
    count=st.integers(12, 60),
    columns=st.integers(1, 4),
    outputs=st.integers(1, 3),
    places=st.lists(st.integers(0, 100), max_size=4),
)
def test_regression_is_least_squares(
    seed: int, groups: int, count: int, columns: int, outputs: int, places: list[int]
) -> None:
    """The error of any weight and shift, the normal equations, and the same in parts."""
    rng = np.random.default_rng(seed)
    x = (rng.standard_normal((groups, count, columns)) + 2).astype(np.float32)
    e = (rng.standard_normal((groups, count, outputs)) - 1).astype(np.float32)
    whole = regressed([x], [e])
    parts = cuts(x, places), cuts(e, places)
    pieces = regressed(*parts)
    merged = regressed([x[:, :0]], [e[:, :0]])
    for a, b in zip(*parts, strict=True):
        merged = merged.merged(regressed([a], [b]))
    weight = rng.standard_normal((groups, columns, outputs))
    shift = rng.standard_normal((groups, outputs))
    for regression in (whole, pieces, merged):
        for w, s in ((None, None), (weight, None), (weight, shift)):
            left = e.astype(np.float64)
            left = left if w is None else left - x @ w
            left = left if s is None else left - s[:, None]
            wanted = np.square(left).sum(axis=(0, 2)).mean()
            assert regression.error(w, s) == pytest.approx(wanted, rel=1e-4)
        for g in range(groups):
            for centred in (True, False):
                xx, xe = regression.moments(centred)
                design = np.hstack([x[g], np.ones((count, 1))]) if centred else x[g]
                solution = np.linalg.lstsq(design.astype(np.float64), e[g].astype(np.float64), rcond=None)[0]
                found = np.linalg.solve(xx[g], xe[g])
                np.testing.assert_allclose(found, solution[:columns], rtol=2e-3, atol=2e-4)


@pytest.mark.parametrize("mean", [1e4, 1e6])
def test_regression_on_columns_of_a_large_mean(mean: float) -> None:
    rng = np.random.default_rng(0)
    x = (rng.integers(-32, 33, (1, 3000, 3)) / 16 + mean).astype(np.float32)
    slope = np.array([[1.0], [-2.0], [0.5]])
    e = ((x.astype(np.float64) - mean) @ slope).astype(np.float32)
    xx, xe = regressed(np.array_split(x, 5, 1), np.array_split(e, 5, 1)).moments(True)
    np.testing.assert_allclose(np.linalg.solve(xx[0], xe[0]), slope, rtol=1e-4)


@given(seed=st.integers(0, 2**16), steps=st.integers(2, 6))
@settings(max_examples=30, deadline=None)
def test_more_rows_never_lower_the_fitted_residual(seed: int, steps: int) -> None:
    """Least squares on nested sets of rows: the sum of squares left over can only grow, each new row brings a
    square of its own, and the minimum of a sum is at least the sum of the minima."""
    rng = np.random.default_rng(seed)
    x, e = rng.standard_normal((1, 20 * steps, 4)), rng.standard_normal((1, 20 * steps, 2))
    x, e = x.astype(np.float32), e.astype(np.float32)
    last = 0.0
    for step in range(1, steps + 1):
        regression = regressed([x[:, : 20 * step]], [e[:, : 20 * step]])
        xx, xe = regression.moments(True)
        weight = np.linalg.solve(xx, xe)
        shift = regression.e - np.einsum("gc,gco->go", regression.x, weight)
        left = regression.error(weight, shift) * regression.count
        assert left >= last * (1 - 1e-5)
        last = left


# ------------------------------------------------------------------------------------------- collecting


def images() -> tuple[ModelProto, Array]:
    g = Graph(seed=1)
    x = g.relu(g.conv(g.input("batch", 3, 5, 5), 6, 3))
    return g.model(g.gap(g.conv(x, 4, 3))), np.random.default_rng(0).standard_normal((13, 3, 5, 5)).astype(
        np.float32
    )


def test_collected_moments_are_those_of_the_activations() -> None:
    """Fitted and held-out rows are disjoint, and together all of them."""
    proto, array = images()
    graph = graph_of(proto)
    data = open_data(array, graph.model, graph.shapes, samples=None)
    (reader,) = [r for r in Readers(graph).all if r.source.size == 6]
    seen: list[float] = []
    statistics = collect(graph.model, graph.shapes, [reader.source], data, seen.append)
    batches = list(data.batches(batch_size(data, graph.shapes, [reader.source.tensor])))
    fed = [
        np.concatenate([b.feeds["input"] for i, b in enumerate(batches) if is_held(i) == held])
        for held in (False, True)
    ]
    run = inner_values(graph.model, graph.shapes, [reader.source.tensor])
    for part, moments in zip(fed, (statistics.fitted, statistics.held), strict=True):
        value = run({"input": part})[reader.source.tensor]
        flat = value.transpose(0, 2, 3, 1).reshape(1, -1, 6)
        assert moments[reader.source].count == flat.shape[1]
        np.testing.assert_allclose(
            moments[reader.source].covariance(), covariance(flat), rtol=1e-3, atol=1e-5
        )
    assert statistics.of(reader.source).count == 13 * 25
    assert seen == sorted(seen)
    assert seen[-1] == 1.0


def test_two_batches_are_enough_to_hold_one_out() -> None:
    assert [is_held(i) for i in range(6)] == [False, True, False, False, False, True]


def test_of_very_many_channels_covariances_of_blocks_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """In no more room than those of as many channels as are taken whole."""
    monkeypatch.setattr(statistics, "LARGEST", 64)
    g = Graph(seed=1)
    wide = 65
    x = g.relu(g.matmul(g.input("batch", 4), wide))
    graph = graph_of(g.model(g.matmul(x, 3)))
    array = np.random.default_rng(0).standard_normal((8, 4)).astype(np.float32)
    data = open_data(array, graph.model, graph.shapes, samples=None)
    source: Source = next(r.source for r in Readers(graph).all if r.source.size == wide)
    moments = collect(graph.model, graph.shapes, [source], data).of(source)
    value = np.maximum(array @ graph.model.array(Readers(graph).all[0].weight), 0)
    np.testing.assert_allclose(moments.variance[0], value.var(axis=0), rtol=1e-3, atol=1e-6)
    assert len(moments.slices) == 2
    assert moments.scatter.size <= 64**2
    last = moments.slices[1]
    whole = np.cov(value[:, last], rowvar=False, bias=True)
    np.testing.assert_allclose(moments.covariance(1)[0], whole, rtol=1e-3, atol=1e-5)


def test_activations_that_are_not_finite_are_refused() -> None:
    g = Graph(seed=1)
    x = g.op("Log", g.input("batch", 4))
    graph = graph_of(g.model(g.matmul(g.relu(g.matmul(x, 6)), 3)))
    data = open_data(-np.eye(4, dtype=np.float32) - 1, graph.model, graph.shapes, samples=None)
    with pytest.raises(UserError, match="is NaN or infinite on the data"):
        collect(graph.model, graph.shapes, [r.source for r in Readers(graph).all], data)
