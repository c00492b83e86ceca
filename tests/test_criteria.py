"""Criteria against their formulas: slices of weights, moments of activations, and greedy elimination against
least squares that is solved again after every unit."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from onnx import ModelProto, TensorProto, numpy_helper

from models.builder import Array, Graph, Tensor
from onnxprune import criteria, statistics
from onnxprune.allocation import kept_units
from onnxprune.criteria import CRITERIA, NAMES, Evidence, elimination, obs, slices
from onnxprune.criteria.elimination import Elimination, rising
from onnxprune.criteria.slices import Slices
from onnxprune.data import Data, open_data
from onnxprune.dependency import DependencyGraph, Group, Occurrence
from onnxprune.errors import UserError
from onnxprune.parts import inner_values
from onnxprune.readers import Readers
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


WEIGHTS_ONLY = sorted(name for name, criterion in CRITERIA.items() if not criterion.needs_data)
WITH_DATA = sorted(CRITERIA.keys() - set(WEIGHTS_ONLY))


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("criterion", WEIGHTS_ONLY)
@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_weights_that_are_not_finite_are_refused(bad: float, criterion: str, dtype: Any) -> None:
    values = np.random.default_rng(0).standard_normal((6, 3, 3, 3)).astype(dtype)
    values[4, 1, 2, 0] = bad
    graph = stored(values)
    evidence = Evidence(graph, Readers(graph))
    with pytest.raises(UserError, match=r"weight 'weight'.*NaN or Inf"):
        criteria.score(evidence, graph.groups, criterion)
    assert criteria.score(evidence, graph.groups, "random")


def replaced(proto: ModelProto, **arrays: Array) -> ModelProto:
    """A copy with other weights; a dot in a name is written as two underscores."""
    changed = ModelProto()
    changed.CopyFrom(proto)
    wanted = {name.replace("__", "."): array for name, array in arrays.items()}
    for tensor in changed.graph.initializer:
        if tensor.name in wanted:
            array = np.asarray(wanted.pop(tensor.name), dtype=np.float32)
            tensor.CopyFrom(numpy_helper.from_array(array, tensor.name))
    assert not wanted
    return changed


def inputs(graph: DependencyGraph, samples: int) -> Data:
    """Normal ones."""
    (value,) = graph.model.inputs
    shape = [d.dim_value or 5 for d in value.type.tensor_type.shape.dim[1:]]
    values = np.random.default_rng(7).standard_normal((samples, *shape)).astype(np.float32)
    return open_data({value.name: values}, graph.model, graph.shapes, samples=None)


def looked_at(proto: ModelProto, samples: int = 24) -> Evidence:
    """With statistics on these inputs."""
    graph = graph_of(proto)
    readers = Readers(graph)
    sources = [reader.source for reader in readers.all]
    found = statistics.collect(graph.model, graph.shapes, sources, inputs(graph, samples))
    return Evidence(graph, readers, found)


def activation(evidence: Evidence, tensor: str) -> Array:
    """All of it on the inputs, the batch first."""
    run = inner_values(evidence.graph.model, evidence.graph.shapes, [tensor])
    batches = inputs(evidence.graph, 24).batches(8)
    return np.concatenate([run(batch.feeds)[tensor] for batch in batches]).astype(np.float64)


@pytest.mark.parametrize("criterion", [*CRITERIA])
def test_each_weight_counts_alike(criterion: str) -> None:
    """A scale on one weight changes no score."""
    proto = layered()
    weight = graph_of(proto).model.array("gemm_1.weight")
    both = [looked_at(p) for p in (proto, replaced(proto, gemm_1__weight=weight * 1000))]
    want, got = (criteria.score(e, e.graph.groups, criterion) for e in both)
    assert len(want) == len(got) > 0
    for a, b in zip(want.values(), got.values(), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-9)


@pytest.mark.parametrize("criterion", WITH_DATA)
def test_criteria_that_look_at_activations_ask_for_data(criterion: str) -> None:
    graph = graph_of(layered())
    with pytest.raises(UserError, match=f"'{criterion}'.*--data.*l1, l2, bn, fpgm, lamp, random"):
        criteria.score(Evidence(graph, Readers(graph)), graph.groups, criterion)


def test_unknown_criteria_are_refused() -> None:
    graph = graph_of(layered())
    with pytest.raises(UserError, match="'l3' is unknown; choose one of l1"):
        criteria.score(Evidence(graph, Readers(graph)), graph.groups, "l3")


@pytest.mark.parametrize("criterion", NAMES)
def test_scores_are_finite_and_the_same_twice(criterion: str) -> None:
    for group, scores in criteria.score(
        evidence := looked_at(layered()), evidence.graph.groups, criterion
    ).items():
        assert scores.shape == (group.size,)
        assert np.isfinite(scores).all()
        again = looked_at(layered())
        (same,) = (g for g in again.graph.groups if g.name == group.name)
        np.testing.assert_array_equal(criteria.score(again, [same], criterion)[same], scores)


# ------------------------------------------------------------------------------------- closed formulas


def test_lamp_is_the_share_of_what_is_no_smaller() -> None:
    graph = stored(np.random.default_rng(0).standard_normal((6, 3, 3, 3)).astype(np.float32))
    group, _ = found(graph, "weight", 0)
    (read,) = (o for o in group.occurrences if o.role == "consume")
    energy = np.square(graph.model.array("weight").reshape(6, -1)).sum(axis=1)
    dense = np.square(np.moveaxis(graph.model.array(read.tensor), read.axis, 0).reshape(6, -1)).sum(axis=1)
    energy = energy / energy.mean() + dense / dense.mean()
    wanted = [e / sum(other for other in energy if other >= e) for e in energy]
    got = criteria.score(Evidence(graph, Readers(graph)), [group], "lamp")[group]
    np.testing.assert_allclose(got, wanted, rtol=1e-5)
    assert got.max() == 1


def shares(*values: Array) -> Array:
    """The sum of several scores, each of mean 1."""
    return np.sum([v / v.mean() for v in values], axis=0)


def test_criteria_of_moments() -> None:
    """Of six channels that a 1x1 filter reads in two places and a Gemm at 16 positions: by channel, and with
    the statistics of the activation that each reads (the same here)."""
    evidence = looked_at(layered())
    group, _ = found(evidence.graph, "conv_2.weight", 1)
    arrays = {name: evidence.graph.model.array(name) for name in evidence.graph.model.constants}
    (relu,) = (n.outputs[0] for n in evidence.graph.model.nodes if n.op == "Relu")
    x = activation(evidence, relu).transpose(1, 0, 2, 3).reshape(6, -1)
    twice = arrays["conv_2.weight"].reshape(4, 2, 6).transpose(2, 0, 1).reshape(6, -1).astype(np.float64)
    dense = arrays["gemm_1.weight"].reshape(5, 6, 16).transpose(1, 0, 2).reshape(6, -1).astype(np.float64)
    norm, spread = np.sqrt(np.square(x).mean(axis=1)), x.var(axis=1)
    wanted = {
        "activation": shares(np.abs(x).mean(axis=1), np.abs(x).mean(axis=1)),
        "apoz": (x > 0).mean(axis=1),
        "wanda": shares(*(np.abs(w).sum(axis=1) * norm for w in (twice, dense))),
        "variance": shares(*(np.square(w).sum(axis=1) * spread for w in (twice, dense))),
    }
    for criterion, values in wanted.items():
        np.testing.assert_allclose(criteria.score(evidence, [group], criterion)[group], values, rtol=1e-4)


# --------------------------------------------------------------- elimination against least squares


@dataclass
class Read:
    """What a reader does, said again: rows [n, channels], weight [channels, outputs], whether it has a bias, and
    the unit of each channel."""

    rows: Array
    weight: Array
    bias: bool
    units: list[int]

    def residual(self, gone: list[int]) -> float:
        """The share of the output's energy that least squares on what stays cannot make; the ridge keeps
        weights near the old ones, in proportion to the energy of each channel."""
        rows = self.rows - self.rows.mean(axis=0) if self.bias else self.rows
        rows = rows / np.sqrt(len(rows))
        energies = np.square(rows).sum(axis=0)
        rows = np.concatenate([rows, np.diag(np.sqrt(obs.DAMPING * energies))])
        wanted = rows @ self.weight
        left = rows[:, [unit not in gone for unit in self.units]]
        error = wanted - left @ np.linalg.lstsq(left, wanted)[0]
        return float(np.square(error).sum() / np.square(wanted).sum())


def flat(value: Array) -> Array:
    """[rows, channels], channels on axis 1."""
    return np.moveaxis(value, 1, -1).reshape(-1, value.shape[1])


def taps(weight: Array) -> Array:
    """[channels, outputs and taps] of a filter."""
    return np.moveaxis(weight, 1, 0).reshape(weight.shape[1], -1).astype(np.float64)


Case = tuple[Evidence, Group, list[Read]]


def several_readers() -> Case:
    """A 3x3 filter, and a matrix without a bias on the means over the image."""
    g = Graph(seed=3)
    x = g.relu(g.conv(g.input("batch", 3, 5, 5), 7, 3))
    seen = g.op("Transpose", x, perm=[0, 2, 3, 1])
    evidence = looked_at(g.model(g.conv(x, 4, 3), g.matmul(seen, 3)))
    group, _ = named(evidence, "conv_2.weight")
    value = activation(evidence, x.name)
    arrays = evidence.graph.model.array
    return (
        evidence,
        group,
        [
            Read(flat(value), taps(arrays("conv_2.weight")), True, list(range(7))),
            Read(flat(value), arrays("matmul_1.weight").astype(np.float64), False, list(range(7))),
        ],
    )


def beside_others() -> Case:
    """Behind a Concat, once and again, with channels of another group that stay."""
    g = Graph(seed=4)
    x = g.input("batch", 3, 5, 5)
    a, b = g.relu(g.conv(x, 5, 3)), g.relu(g.conv(x, 4, 3))
    both = g.concat(a, b, a)
    evidence = looked_at(g.model(g.conv(both, 6, 1)))
    group, _ = named(evidence, "conv_1.weight", 0)
    units = [*range(5), *[-1] * 4, *range(5)]
    weight = taps(evidence.graph.model.array("conv_3.weight"))
    return evidence, group, [Read(flat(activation(evidence, both.name)), weight, True, units)]


def in_groups() -> Case:
    """Two groups of four channels, of which a unit is one channel of each."""
    g = Graph(seed=5)
    x = g.relu(g.conv(g.input("batch", 3, 5, 5), 8, 3))
    evidence = looked_at(g.model(g.conv(x, 6, 3, group=2)))
    (group,) = (group for group in evidence.graph.groups if group.size == 4)
    value = activation(evidence, x.name)
    weight = evidence.graph.model.array("conv_2.weight").astype(np.float64)
    reads = [
        Read(flat(value[:, 4 * i : 4 * i + 4]), taps(weight[3 * i : 3 * i + 3]), True, list(range(4)))
        for i in range(2)
    ]
    return evidence, group, reads


def named(evidence: Evidence, tensor: str, axis: int = 1) -> tuple[Group, Occurrence]:
    for group in evidence.graph.groups:
        for occurrence in group.occurrences:
            if (occurrence.tensor, occurrence.axis) == (tensor, axis):
                return group, occurrence
    raise AssertionError(tensor)


def lost(case: Case, gone: list[int]) -> float:
    """The sum over readers; the groups of one reader share its variance."""
    _, _, reads = case
    if len({len(read.units) for read in reads}) == 1 and len(reads[0].units) == 4:
        energy = [np.square((r.rows - r.rows.mean(axis=0)) @ r.weight).mean(axis=0).sum() for r in reads]
        damped = [
            e + obs.DAMPING * float((r.rows.var(axis=0) * np.square(r.weight).sum(axis=1)).sum())
            for e, r in zip(energy, reads, strict=True)
        ]
        return float(sum(r.residual(gone) * d for r, d in zip(reads, damped, strict=True)) / sum(damped))
    return sum(read.residual(gone) for read in reads)


def minorant(values: list[float]) -> Array:
    """The largest convex sequence below the values."""
    ends = range(len(values))
    found = list(values)
    for i in ends:
        for j in ends[i + 1 :]:
            for k in range(i, j + 1):
                found[k] = min(found[k], values[i] + (values[j] - values[i]) * (k - i) / (j - i))
    return np.array(found)


CASES = [several_readers, beside_others, in_groups]


@pytest.mark.parametrize("panel", [1, 3, 64])
@pytest.mark.parametrize("make", CASES)
def test_obs_takes_the_unit_that_least_squares_misses_least(
    make: Callable[[], Case], panel: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And the scores of what is removed add up to the residual."""
    monkeypatch.setattr(elimination, "PANEL", panel)
    case = make()
    evidence, group, _ = case
    gone: list[int] = []
    residuals = [0.0]
    while len(gone) < group.size:
        left = [u for u in range(group.size) if u not in gone]
        costs = {u: lost(case, [*gone, u]) for u in left}
        gone.append(min(costs, key=lambda u: costs[u]))
        residuals.append(costs[gone[-1]])
    scores = criteria.score(evidence, [group], "obs")[group]
    assert np.argsort(scores, kind="stable").tolist() == gone
    np.testing.assert_allclose(np.cumsum(np.sort(scores)), minorant(residuals)[1:], rtol=1e-3, atol=1e-6)
    for count in range(1, group.size):
        assert set(kept_units(scores, count)) == set(gone[-count:])


@pytest.mark.parametrize("make", CASES)
def test_reconstruction_keeps_the_unit_that_explains_most(make: Callable[[], Case]) -> None:
    case = make()
    evidence, group, _ = case
    gone = list(range(group.size))
    order: list[int] = []
    residuals = [lost(case, gone)]
    while gone:
        errors = {u: lost(case, [g for g in gone if g != u]) for u in gone}
        order.append(min(errors, key=lambda u: errors[u]))
        gone.remove(order[-1])
        residuals.append(errors[order[-1]])
    scores = criteria.score(evidence, [group], "reconstruction")[group]
    assert np.argsort(scores, kind="stable").tolist() == order[::-1]
    wanted = minorant(residuals[::-1])[1:]
    np.testing.assert_allclose(np.cumsum(np.sort(scores)), wanted, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("panel", [1, 4, 64])
def test_units_of_different_numbers_of_channels(panel: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Worth tr(P_SS^-1 A_SS) at first, and after others were taken that of their joint elimination."""
    monkeypatch.setattr(elimination, "PANEL", panel)
    generator = np.random.default_rng(0)
    units = generator.permutation(np.repeat([1, 3, 4, 7, 8], [3, 1, 2, 4, 1]))
    pivots, targets = (a.T @ a + np.eye(11) for a in generator.standard_normal((2, 11, 11)))
    found = Elimination(units, pivots.copy(), targets.copy())
    gone: list[int] = []
    for unit in (3, 7, 1, 8):
        s, left = np.isin(units, gone), ~np.isin(units, gone)
        gain = pivots[np.ix_(left, s)] @ np.linalg.inv(pivots[np.ix_(s, s)])
        turn = np.hstack([-gain, np.eye(int(left.sum()))])
        order = np.concatenate([np.flatnonzero(s), np.flatnonzero(left)])
        a = turn @ targets[np.ix_(order, order)] @ turn.T
        p = pivots[np.ix_(left, left)] - gain @ pivots[np.ix_(s, left)]
        for row, other in enumerate(found.here):
            here = units[left] == other
            wanted = (
                np.trace(np.linalg.solve(p[np.ix_(here, here)], a[np.ix_(here, here)])) if here.any() else 0
            )
            assert found.values()[row] == pytest.approx(wanted)
        found.take(unit)
        gone.append(unit)


BACK_AND_FORTH = ["obs", "reconstruction"]


def pair(producer: Array, bias: Array, *, biased: bool = True) -> tuple[Evidence, Group]:
    """Channels that are made by these filters and read by one matrix."""
    g = Graph(seed=6)
    weight, shift = g.store("weight", producer.astype(np.float32)), g.store("shift", bias.astype(np.float32))
    x = g.relu(g.conv(g.input("batch", 3, 5, 5), weight=weight, bias=shift))
    seen = g.op("Transpose", x, perm=[0, 2, 3, 1])
    evidence = looked_at(g.model(g.matmul(seen, 4, bias=biased)))
    return evidence, named(evidence, "weight", 0)[0]


def filters(seed: int = 0, count: int = 8) -> tuple[Array, Array]:
    generator = np.random.default_rng(seed)
    return generator.standard_normal((count, 3, 3, 3)), generator.standard_normal(count)


@pytest.mark.parametrize("criterion", BACK_AND_FORTH)
def test_a_duplicate_costs_next_to_nothing_and_its_twin_the_whole(criterion: str) -> None:
    weight, bias = filters()
    weight[5], bias[5] = weight[2], bias[2]
    evidence, group = pair(weight, bias)
    scores = criteria.score(evidence, [group], criterion)[group]
    cheap, dear = sorted(scores[[2, 5]])
    assert cheap < 4 * obs.DAMPING * dear
    assert dear > scores.mean() / 10
    assert cheap < np.delete(scores, [2, 5]).min()


@pytest.mark.parametrize("criterion", BACK_AND_FORTH)
@pytest.mark.parametrize("biased", [True, False])
def test_a_constant_channel_costs_nothing_where_there_is_a_bias(criterion: str, biased: bool) -> None:
    weight, bias = filters()
    weight[3], bias[3] = 0, 0.7
    weight[6], bias[6] = 0, -1.0  # dead behind the Relu
    evidence, group = pair(weight, bias, biased=biased)
    scores = criteria.score(evidence, [group], criterion)[group]
    assert scores[6] < 1e-12
    assert (scores[3] < 1e-12) == biased
    assert np.delete(scores, [3, 6]).min() > 1e-6


@pytest.mark.parametrize("criterion", BACK_AND_FORTH)
def test_the_scale_of_a_channel_is_of_no_account(criterion: str) -> None:
    """Twelve orders of magnitude between filters that their reader evens out."""
    weight, bias = filters()
    scale = 10.0 ** np.array([-6, 6, 0, 1, -3, 2, 4, -5])
    plain, group = pair(weight, bias)
    wanted = criteria.score(plain, [group], criterion)[group]
    proto = plain.graph.model.proto
    read = plain.graph.model.array("matmul_1.weight") / scale[:, None]
    wide = scale[:, None, None, None]
    scaled = looked_at(replaced(proto, weight=weight * wide, shift=bias * scale, matmul_1__weight=read))
    other, _ = named(scaled, "weight", 0)
    np.testing.assert_allclose(criteria.score(scaled, [other], criterion)[other], wanted, rtol=1e-3)


@pytest.mark.parametrize("criterion", BACK_AND_FORTH)
def test_fewer_rows_than_channels(criterion: str) -> None:
    """Of two samples 47 of 48 channels can be told from the rest: together they still cost the whole."""
    g = Graph(seed=8)
    x = g.relu(g.gemm(g.input("batch", 6), 48))
    evidence = looked_at(g.model(g.gemm(x, 5)), samples=2)
    (group,) = evidence.graph.groups
    scores = criteria.score(evidence, [group], criterion)[group]
    assert (scores >= 0).all()
    assert scores.sum() == pytest.approx(1)
    assert np.sort(scores)[:-1].sum() < 0.05


@pytest.mark.parametrize("criterion", BACK_AND_FORTH)
def test_inputs_that_never_vary_leave_the_magnitude(criterion: str) -> None:
    weight, bias = filters()
    evidence, group = pair(weight * 0, bias)
    scores = criteria.score(evidence, [group], criterion)[group]
    assert scores.sum() == pytest.approx(1)
    squares = np.square(criteria.score(evidence, [group], "l2")[group])
    np.testing.assert_allclose(scores, squares / squares.sum())


@pytest.mark.parametrize("criterion", BACK_AND_FORTH)
def test_channels_of_different_blocks_are_independent(
    criterion: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(statistics, "LARGEST", 2)  # blocks of one
    evidence, group = pair(*filters())
    (relu,) = (n.outputs[0] for n in evidence.graph.model.nodes if n.op == "Relu")
    spread = flat(activation(evidence, relu)).var(axis=0)
    energy = spread * np.square(evidence.graph.model.array("matmul_1.weight")).sum(axis=1)
    scores = criteria.score(evidence, [group], criterion)[group]
    np.testing.assert_allclose(scores, energy / energy.sum(), rtol=1e-4)


@pytest.mark.parametrize("criterion", BACK_AND_FORTH)
def test_a_depthwise_filter_goes_with_its_channel(criterion: str) -> None:
    """What it makes of the channel is read by nobody then: the one reader is the filter behind it."""
    g = Graph(seed=9)
    x = g.relu(g.conv(g.input("batch", 3, 5, 5), 8, 3))
    inner = g.relu(g.conv(x, 8, 3, group=8))
    evidence = looked_at(g.model(g.conv(inner, 4, 1)))
    group, _ = named(evidence, "conv_3.weight")
    scores = criteria.score(evidence, [group], criterion)[group]
    weight = taps(evidence.graph.model.array("conv_3.weight"))
    read = Read(flat(activation(evidence, inner.name)), weight, True, list(range(8)))
    assert scores.sum() == pytest.approx(1)
    going = [int(u) for u in np.argsort(scores)[:1]]
    assert scores[going].sum() == pytest.approx(read.residual(going), rel=1e-3)


def test_units_that_no_weight_reads_share_their_squared_magnitude() -> None:
    g = Graph(seed=1)
    tokens = g.input("batch", "length", 6)
    query, key = (g.matmul(tokens, 8) for _ in range(2))
    product = g.op("MatMul", query, g.op("Transpose", key, perm=[0, 2, 1]))
    evidence = looked_at(g.model(product))
    (group,) = evidence.graph.groups
    squares = np.square(criteria.score(evidence, [group], "l2")[group])
    np.testing.assert_allclose(criteria.score(evidence, [group], "obs")[group], squares / squares.sum())


@given(st.lists(st.floats(0, 1, allow_subnormal=False), min_size=1, max_size=9))
def test_rising_scores_are_the_slopes_of_the_convex_minorant(values: list[float]) -> None:
    order = np.random.default_rng(len(values)).permutation(len(values))
    scores = rising(order, np.array(values))
    assert (np.diff(scores[order]) > 0).all()
    wanted = minorant([0.0, *np.cumsum(values)])[1:]
    np.testing.assert_allclose(np.cumsum(scores[order]), wanted, atol=1e-12)


def test_values_too_large_for_a_covariance_are_refused() -> None:
    g = Graph(seed=1)
    x = g.gemm(g.input("batch", 6), 8)
    proto = g.model(g.gemm(x, 5))
    huge = replaced(proto, gemm_1__weight=np.full((8, 6), 1e30))
    with np.errstate(over="ignore", invalid="ignore"):
        evidence = looked_at(huge)
    with pytest.raises(UserError, match="too large on the data"):
        criteria.score(evidence, evidence.graph.groups, "obs")
