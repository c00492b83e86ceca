"""Closed-form repair against brute force on explicit rows, and whole networks against their originals."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Callable, Sequence
from typing import cast

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto

from models.architectures import ARCHITECTURES
from models.attention import ATTENTION
from models.builder import Graph, Storage, Tensor
from models.control_flow import CONTROL_FLOW
from models.quantised import QUANTISED
from models.recurrent import RECURRENT
from models.topologies import TOPOLOGIES
from models.transformers import TRANSFORMERS
from onnxprune import axes, flow, passes, rewrite, shrink, surgery
from onnxprune.axes import BoolArray
from onnxprune.blocks import Blocks
from onnxprune.data import Data, open_data, synthetic
from onnxprune.dependency import Group
from onnxprune.model import Model
from onnxprune.passes import Options
from onnxprune.plan import Keep, Plan, Remove, SetWeight
from onnxprune.readers import Reader, Readers
from onnxprune.repair import channels, maps, normal, sequential
from onnxprune.repair.channels import Repaired
from onnxprune.repair.weights import Weights
from onnxprune.runtime import Session
from onnxprune.statistics import Floats, Moments, Regression, batch_size, collect, is_held
from tests.reference import Array, graph_of
from tests.test_readers import CASES, Net

# ------------------------------------------------------------------------------------------------- maps


def reader_of(groups: int, outputs: int, size: int, bias: bool = True) -> Reader:
    """A reader of that many channels, with a bias that could be had, or none."""
    g = Graph(seed=0)
    if bias:
        x = g.input("batch", groups * size, 3, 3)
        y = g.conv(x, groups * outputs, 1, group=groups)
    else:
        x = g.input("batch", groups, 3, size)
        y = g.op("MatMul", x, g.store("w", g.normal(groups, size, outputs)))
    (reader,) = Readers(graph_of(g.model(y))).all
    assert reader.matrix_shape == (groups, outputs, size, 1)
    assert (reader.bias is not None) == bias
    return reader


def gathered(rows: Array) -> Moments:
    moments = Moments(rows.shape[0], rows.shape[2])
    moments.add(rows)
    return moments


def correlated(rng: np.random.Generator, groups: int, count: int, size: int, noise: float = 0.3) -> Array:
    """Rows with a few common causes, and means of their own."""
    causes = rng.standard_normal((groups, count, 3))
    rows = causes @ rng.standard_normal((groups, 3, size)) + noise * rng.standard_normal(
        (groups, count, size)
    )
    return (rows + rng.standard_normal((groups, 1, size))).astype(np.float32)


def ridged(x: Floats, target: Floats, strength: float, centred: bool) -> Floats:
    """[kept, targets] by least squares on rows, with those of the penalty below them; nothing for an endless one."""
    if np.isinf(strength):
        return np.zeros((x.shape[1], target.shape[1]))
    if centred:
        x, target = x - x.mean(axis=0), target - target.mean(axis=0)
    penalty = np.sqrt(strength * np.square(x).sum() / x.shape[1]) * np.eye(x.shape[1])
    below = np.zeros((x.shape[1], target.shape[1]))
    return np.linalg.lstsq(np.vstack([x, penalty]), np.vstack([target, below]), rcond=None)[0]


def predicted(x: Floats, kept: BoolArray, option: str | float, on: Floats, centred: bool) -> Floats:
    """What is said of the channels that are gone from those that stay, fitted on the rows `on`."""
    gone = ~kept
    if option == "none":
        return np.zeros((len(x), int(gone.sum())))
    if isinstance(option, str):
        return np.broadcast_to(on[:, gone].mean(axis=0), (len(x), int(gone.sum())))
    m = ridged(on[:, kept], on[:, gone], option, centred)
    if not centred:
        return np.asarray(x[:, kept] @ m)
    return np.asarray(on[:, gone].mean(axis=0) + (x[:, kept] - on[:, kept].mean(axis=0)) @ m)


def brute(
    weight: Floats, kept: BoolArray, fitted: Floats, held: Floats, centred: bool
) -> tuple[dict[str | float, float], Floats]:
    """Held-out errors of each choice on explicit rows, and what the best, fitted on all rows, says of all rows:
    [groups, rows, outputs]."""
    options: tuple[str | float, ...] = ("none", *(("mean",) if centred else ()), *maps.RIDGES)
    errors = {}
    for option in options:
        total = 0.0
        for g in range(len(weight)):
            left = held[g][:, ~kept[g]] - predicted(held[g], kept[g], option, fitted[g], centred)
            total += float(np.square(left @ weight[g][:, ~kept[g], 0].T).sum(axis=1).mean())
        errors[option] = total
    best = min(errors, key=lambda option: errors[option])
    every = np.concatenate([fitted, held], axis=1)
    made = []
    for g in range(len(weight)):
        said = predicted(every[g], kept[g], best, every[g], centred)
        w = weight[g][:, :, 0]
        made.append(every[g][:, kept[g]] @ w[:, kept[g]].T + said @ w[:, ~kept[g]].T)
    return errors, np.stack(made)


def some_kept(rng: np.random.Generator, groups: int, size: int) -> BoolArray:
    """The same number of channels in each group, at places of their own."""
    count = int(rng.integers(1, size))
    return np.stack([rng.permutation(size) < count for _ in range(groups)])


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**16), groups=st.integers(1, 2), size=st.integers(2, 7), bias=st.booleans())
def test_fit_is_ridge_regression_on_rows(seed: int, groups: int, size: int, bias: bool) -> None:
    """Chosen by the error on held-out rows, then fitted on all."""
    rng = np.random.default_rng(seed)
    rows = correlated(rng, groups, 90, size)
    fitted, held = rows[:, :60], rows[:, 60:]
    kept = some_kept(rng, groups, size)
    weight = rng.standard_normal((groups, 3, size, 1))
    fix = maps.fit(reader_of(groups, 3, size, bias), weight, kept, gathered(fitted), gathered(held))
    errors, wanted = brute(weight, kept, fitted.astype(np.float64), held.astype(np.float64), bias)
    ranked = sorted(errors.values())
    assert fix.after <= fix.before
    second = np.stack([np.cov(h, rowvar=False, bias=True) if bias else h.T @ h / 30 for h in held])
    energy = np.einsum("goi,gij,goj->", weight[..., 0], second, weight[..., 0])
    assert fix.before == pytest.approx(errors["none"] / energy, rel=1e-3)
    assert fix.after == pytest.approx(ranked[0] / energy, rel=1e-3, abs=1e-6)
    if len(ranked) > 1 and ranked[1] > ranked[0] * (1 + 1e-4):  # else rounding decides
        shift = np.zeros((groups, 3)) if fix.shift is None else fix.shift
        made = [
            rows[g][:, kept[g]].astype(np.float64) @ fix.weight[g][:, :, 0].T + shift[g]
            for g in range(groups)
        ]
        np.testing.assert_allclose(np.stack(made), wanted, rtol=1e-3, atol=1e-3 * np.abs(wanted).max())
    assert (fix.shift is None) == (not bias)


@pytest.mark.parametrize("bias", [False, True])
def test_held_out_rows_apart_choose_a_map_and_change_nothing_else(bias: bool) -> None:
    rng = np.random.default_rng(4)
    rows = correlated(rng, 1, 90, 6)
    fitted, held = gathered(rows[:, :60]), gathered(rows[:, 60:])
    kept, weight = np.array([[True, True, False, True, False, True]]), rng.standard_normal((1, 3, 6, 1))
    made = reader_of(1, 3, 6, bias)
    fix = maps.fit(made, weight, kept, fitted, held, apart=True)
    assert fix.method == maps.fit(made, weight, kept, fitted, held).method
    strength, mask = float(fix.method.removeprefix("ridge ")), kept[0]
    gram = fitted.second(bias)[0]
    inner = gram[np.ix_(mask, mask)]
    inner = inner + strength * np.trace(inner) / len(inner) * np.eye(len(inner))
    by = np.linalg.solve(inner, gram[np.ix_(mask, ~mask)])
    np.testing.assert_allclose(
        fix.weight[0, :, :, 0], weight[0][:, mask, 0] + weight[0][:, ~mask, 0] @ by.T, rtol=1e-6
    )


def one_group(rows: Array, kept: Sequence[bool], weight: Floats | None = None, bias: bool = True) -> maps.Fix:
    """A fit of one group, a third of the rows held out."""
    size, third = rows.shape[1], len(rows) // 3
    made = np.random.default_rng(9).standard_normal((1, 4, size, 1)) if weight is None else weight
    moments = gathered(rows[None, third:]), gathered(rows[None, :third])
    return maps.fit(reader_of(1, 4, size, bias), made, np.array([kept]), *moments)


def test_a_duplicate_costs_nothing() -> None:
    rng = np.random.default_rng(0)
    rows = rng.standard_normal((300, 4)).astype(np.float32)
    rows = np.hstack([rows, rows[:, :1], 2 * rows[:, 1:2] - rows[:, 2:3] + 5])
    weight = rng.standard_normal((1, 4, 6, 1))
    fix = one_group(rows, [True] * 4 + [False] * 2, weight)
    assert fix.before > 0.1
    assert fix.after < 1e-6
    assert fix.shift is not None
    made = rows[:, :4] @ fix.weight[0, :, :, 0].T + fix.shift[0]
    np.testing.assert_allclose(made, rows @ weight[0, :, :, 0].T, atol=1e-2)


def test_a_constant_is_the_mean() -> None:
    """Nothing is asked of the others."""
    rng = np.random.default_rng(0)
    rows = np.hstack([rng.standard_normal((300, 4)), np.full((300, 1), 7.0)]).astype(np.float32)
    weight = rng.standard_normal((1, 4, 5, 1))
    fix = one_group(rows, [True] * 4 + [False], weight)
    assert fix.after < 1e-10
    np.testing.assert_allclose(fix.weight[0], weight[0][:, :4], atol=1e-6)
    assert fix.shift is not None
    np.testing.assert_allclose(fix.shift[0], 7.0 * weight[0, :, 4, 0], rtol=1e-5)


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 2**16), bias=st.booleans())
def test_permuted_channels_permute_the_result(seed: int, bias: bool) -> None:
    rng = np.random.default_rng(seed)
    rows = correlated(rng, 1, 60, 6)[0]
    kept, weight = some_kept(rng, 1, 6)[0], rng.standard_normal((1, 4, 6, 1))
    order = rng.permutation(6)
    fix = one_group(rows, list(kept), weight, bias)
    turned = one_group(rows[:, order], list(kept[order]), weight[:, :, order], bias)
    assert turned.method == fix.method
    whole = np.zeros((4, 6))
    whole[:, kept] = fix.weight[0, :, :, 0]
    np.testing.assert_allclose(
        turned.weight[0, :, :, 0], whole[:, order][:, kept[order]], rtol=1e-3, atol=1e-3
    )
    if fix.shift is not None and turned.shift is not None:
        np.testing.assert_allclose(turned.shift, fix.shift, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("spoil", ["zero", "same", "dead", "scales", "few", "huge", "tiny"])
def test_bad_grams(spoil: str, bias: bool) -> None:
    """Rank-deficient and ill-conditioned: finite, and never worse than no repair."""
    rng = np.random.default_rng(0)
    rows = correlated(rng, 1, 90, 8, noise=0.01)[0].astype(np.float64)
    match spoil:
        case "zero":
            rows[:] = 0
        case "same":
            rows[:] = rows[:, :1]
        case "dead":
            rows[:, :4] = 0
        case "scales":
            rows *= 10.0 ** np.arange(-6, 10, 2)
        case "few":
            rows = rows[:3]
        case "huge":
            rows *= 1e15
        case "tiny":
            rows *= 1e-18
    fix = one_group(rows.astype(np.float32), [True, False] * 4, bias=bias)
    assert np.isfinite(fix.weight).all()
    assert fix.shift is None or np.isfinite(fix.shift).all()
    assert 0 <= fix.after <= fix.before
    assert np.isfinite(fix.before)


def test_few_samples_change_little() -> None:
    """Six rows of sixty independent channels: a weak ridge would say them all by heart, and be wrong."""
    rng = np.random.default_rng(0)
    rows = rng.standard_normal((9, 60)).astype(np.float32)
    weight = rng.standard_normal((1, 4, 60, 1))
    kept = [True] * 30 + [False] * 30
    fix = one_group(rows, kept, weight, bias=False)
    assert fix.method in ("none", "ridge 1")
    fresh = rng.standard_normal((2000, 60))
    wanted, plain = fresh @ weight[0, :, :, 0].T, fresh[:, :30] @ weight[0, :, :30, 0].T
    repaired = fresh[:, :30] @ fix.weight[0, :, :, 0].T
    assert np.square(repaired - wanted).mean() < 1.5 * np.square(plain - wanted).mean()


def test_without_held_out_rows_no_ridge_is_taken() -> None:
    """Nothing could tell how strong it must be."""
    rng = np.random.default_rng(0)
    rows = correlated(rng, 1, 6, 8)
    weight = rng.standard_normal((1, 4, 8, 1))
    kept = np.array([[True, False] * 4])
    for bias, wanted in ((True, "mean"), (False, "none")):
        fix = maps.fit(reader_of(1, 4, 8, bias), weight, kept, gathered(rows), Moments(1, 8))
        assert fix.method == wanted
        np.testing.assert_array_equal(fix.weight, weight[:, :, ::2])


def test_mean_only() -> None:
    rng = np.random.default_rng(0)
    rows = correlated(rng, 1, 60, 8)
    weight = rng.standard_normal((1, 4, 8, 1))
    kept = np.array([[True, False] * 4])
    moments = gathered(rows[:, :40]), gathered(rows[:, 40:])
    fix = maps.fit(reader_of(1, 4, 8), weight, kept, *moments, mean_only=True)
    assert fix.method in ("mean", "none")
    np.testing.assert_array_equal(fix.weight, weight[:, :, ::2])
    assert fix.shift is not None
    np.testing.assert_allclose(fix.shift[0], weight[0, :, 1::2, 0] @ rows[0, :, 1::2].mean(axis=0), rtol=1e-4)


@pytest.mark.parametrize("bias", [True, False])
def test_blocks_are_fitted_apart(bias: bool) -> None:
    """Of very many channels: what goes from a block is said by what stays of it."""
    rng = np.random.default_rng(0)
    rows = correlated(rng, 2, 60, 8) + np.float32(1)
    weight = rng.standard_normal((2, 4, 8, 1))
    kept = np.array(
        [[True, False, True, False, True, True, False, False], [False] * 3 + [True] * 4 + [False]]
    )
    parts = [Moments(2, 8, 3), Moments(2, 8, 3)]
    parts[0].add(rows[:, :40])
    parts[1].add(rows[:, 40:])
    fix = maps.fit(reader_of(2, 4, 8, bias), weight, kept, *parts)
    strength = float(fix.method.removeprefix("ridge "))
    assert fix.after < fix.before
    for g, mask in enumerate(kept):
        wanted = weight[g, :, :, 0].copy()
        for here in (slice(0, 3), slice(3, 6), slice(6, 8)):
            stay, go = mask[here], ~mask[here]
            x = rows[g, :, here].astype(np.float64)
            change = ridged(x[:, stay], x[:, go], strength, centred=bias) if stay.any() else np.zeros((0, 3))
            wanted[:, here][:, stay] += wanted[:, here][:, go] @ change.T[: go.sum()]
        np.testing.assert_allclose(fix.weight[g, :, :, 0], wanted[:, mask], rtol=1e-4, atol=1e-5)


def test_one_block_for_independent_ones() -> None:
    """Where blocks are uncorrelated it makes no difference that they are fitted apart."""
    rng = np.random.default_rng(0)
    signs = np.array([[1, 1], [1, -1], [-1, 1], [-1, -1]], np.float32).repeat(16, 0)
    half = correlated(rng, 1, 16, 4)[0]
    half = np.tile(half - half.mean(axis=0), (4, 1))
    rows = np.hstack([half * signs[:, :1], half * signs[:, 1:]])[None]  # products across average out
    weight = rng.standard_normal((1, 4, 8, 1))
    kept = np.array([[True, True, True, False] * 2])
    fixes = []
    for width in (8, 4):
        parts = [Moments(1, 8, width), Moments(1, 8, width)]
        for moments in parts:
            moments.add(rows)
        fixes.append(maps.fit(reader_of(1, 4, 8), weight, kept, *parts))
    assert fixes[0].method == fixes[1].method
    assert fixes[0].after == pytest.approx(fixes[1].after, rel=1e-3)
    np.testing.assert_allclose(fixes[0].weight, fixes[1].weight, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", sorted(CASES))
def test_coverage_is_what_a_constant_makes(name: str) -> None:
    """A constant on the channels, in the mean over all positions of the output; exact at every border."""
    net = Net(CASES[name][0])
    reader, source = net.reader, net.source
    if reader.bias is None:
        pytest.skip("has no bias to fold it into")
    constant = np.random.default_rng(4).standard_normal((source.groups, source.size))
    difference = net.run(with_constant(net, constant)) - net.run(net.value)
    matrix = reader.matrix(net.weight)
    share = maps.coverage(reader, matrix.shape[3])
    gain = float(reader.node.attributes.get("alpha", 1.0))
    wanted = gain * np.einsum("goit,gi,t->go", matrix, constant, share).ravel()
    axis = 1 if reader.node.op in ("Conv", "ConvTranspose") else -1
    made = np.moveaxis(difference, axis, -1).reshape(-1, wanted.size).mean(axis=0)
    np.testing.assert_allclose(made, wanted, rtol=1e-3, atol=1e-4)


def with_constant(net: Net, constant: Floats) -> Array:
    """The value with a constant added to each channel."""
    source = net.source
    assert not source.moved
    layout = np.broadcast_to(
        constant.reshape(source.groups, 1, source.size, 1),
        (source.groups, source.before, source.size, source.after),
    ).ravel()
    shape = [-1 if a == source.axis else 1 for a in range(net.value.ndim)]
    return (net.value + layout.reshape(shape)).astype(np.float32)


# ------------------------------------------------------------------------------------ whole networks


class Cut:
    """A network, some of its units removed, and data."""

    def __init__(
        self, proto: onnx.ModelProto, plan: Plan | None = None, samples: int = 48, ratio: float = 0.3
    ) -> None:
        self.proto = proto
        self.graph = graph_of(proto)
        self.model = self.graph.model
        self.blocks = Blocks(self.graph)
        self.readers = Readers(self.graph)
        options = Options(channels=ratio, align=1)
        self.plan = plan or passes.plan(self.blocks, options, self.model.digest())
        self.keep = surgery.keep_masks(self.graph, self.plan)
        self.pruned = flow.flatten(surgery.apply(self.graph, self.plan, self.blocks)).proto
        self.data = synthetic(self.model, self.graph.shapes, samples=samples, seed=0)
        self.fresh = synthetic(self.model, self.graph.shapes, samples=8, seed=1)

    def repaired(self, mean_only: bool = False) -> tuple[onnx.ModelProto, list[Repaired]]:
        sources = [reader.source for reader in self.readers.all]
        statistics = collect(self.model, self.graph.shapes, sources, self.data)
        weights = Weights(Model(self.pruned))
        done = channels.repair(self.readers, self.keep, (), weights, statistics, mean_only)
        return rewrite.edited(weights.model, weights.edits("repair")), done

    def refitted(
        self, proto: onnx.ModelProto | None = None, data: Data | None = None
    ) -> tuple[onnx.ModelProto, list[Repaired]]:
        return sequential.refit(self.graph, self.keep, [], proto or self.pruned, data or self.data)

    def error(self, proto: onnx.ModelProto, data: Data | None = None) -> float:
        """Share of the square of the original's float outputs."""
        ours, theirs = Session(flow.nest(proto)), Session(self.proto)
        error = energy = 0.0
        for batch in (data or self.fresh).batches(8):
            made, wanted = ours.run(batch.feeds), theirs.run(batch.feeds)
            assert made.keys() == wanted.keys()
            for name, value in wanted.items():
                if np.asarray(value).dtype.kind == "f" and made[name].shape == value.shape:
                    assert np.isfinite(made[name]).all()
                    error += float(np.square(made[name].astype(np.float64) - value).sum())
                    energy += float(np.square(value.astype(np.float64)).sum())
        return error / max(energy, 1e-30)


def halves(group: Group, rng: np.random.Generator) -> tuple[BoolArray, Array]:
    """Which units stay, about half, and for each unit the one that it becomes a copy of."""
    kept = np.zeros(group.size, dtype=bool)
    kept[rng.permutation(group.size)[: max(group.size // 2, 1)]] = True
    copied = np.arange(group.size)
    copied[~kept] = rng.choice(np.flatnonzero(kept), int((~kept).sum()))
    return kept, copied


def with_copies(proto: onnx.ModelProto, seed: int = 0) -> tuple[onnx.ModelProto, Plan]:
    """The network with units of all exact groups made copies of others, in all that makes them, and the plan that
    removes the copies. What reads them keeps weights of its own for each."""
    graph = graph_of(proto)
    rng = np.random.default_rng(seed)
    arrays: dict[str, Array] = {}
    edits = []
    for group in graph.groups:
        if group.kind != "exact":
            continue
        kept, copied = halves(group, rng)
        edits.append(Keep(group.name, group.size, tuple(map(int, np.flatnonzero(kept)))))
        done: set[tuple[str, int]] = set()
        for link in graph.links:
            summed = set(link.contracted())
            for i, typed in enumerate(link.inputs):
                name = link.node.inputs[i] if i < len(link.node.inputs) else ""
                if name not in graph.model.constants or typed is None:
                    continue
                pattern = link.rule.inputs[i] or ()
                for axis, kind in enumerate(typed):
                    labels = {n for term in pattern[axis] for n in term}
                    if labels <= summed or (name, axis) in done:
                        continue
                    index = np.arange(kind.extent)
                    for _, units in axes.unit_maps(kind, group.var):
                        for unit in np.flatnonzero(~kept):
                            index[units == unit] = index[units == copied[unit]]
                    if (index != np.arange(kind.extent)).any():
                        done.add((name, axis))
                        array = arrays.get(name, graph.model.array(name))
                        arrays[name] = np.take(array, index, axis=axis)
    model = Model(proto)
    changed = rewrite.apply(model, [SetWeight(name, array) for name, array in arrays.items()])
    return changed, Plan("", tuple(edits))


def miniature(name: str) -> onnx.ModelProto:
    return ARCHITECTURES[name](width=0.125, image=32, classes=4)


REDUNDANT: dict[str, Callable[[], onnx.ModelProto]] = {
    **{
        name: TOPOLOGIES[name]
        for name in (
            "concat_conv_and_conv_transpose",
            "concat_nested",
            "conv_3d",
            "conv_dilated_asymmetric",
            "csp",
            "depthwise_conv_transpose",
            "grouped_conv_transpose",
            "pass_through",
            "residual_projection_stage",
            "se_conv",
            "space_to_depth",
            "split_concat_add",
            "sum_of_three",
            "sum_operands_used_elsewhere",
        )
    },
    **{name: RECURRENT[name] for name in ("gru", "lstm", "lstm_peepholes", "bidirectional_stacked", "crnn")},
    "mobilenet_v3_large": lambda: miniature("mobilenet_v3_large"),
}


@pytest.mark.parametrize("name", sorted(REDUNDANT))
def test_removed_copies_are_made_up_for_exactly(name: str) -> None:
    """The pruned and repaired network is the original, however the copies are read: by every window, behind
    Concat, sums, pooling and gates, by several readers, and by the recurrence itself."""
    proto, plan = with_copies(REDUNDANT[name]())
    cut = Cut(proto, plan)
    assert cut.error(cut.pruned) > 1e-3
    assert cut.error(cut.repaired()[0]) < 1e-5  # the weakest ridge is not none


def constant_channel(bias: bool = True, pad: int = 0) -> tuple[onnx.ModelProto, Plan]:
    """A convolution that makes two constants among four channels, a second one that reads them, and the plan
    that removes them."""
    g = Graph(seed=5)
    w, c = g.normal(4, 3, 1, 1), g.normal(4)
    w[1:3], c[1:3] = 0, (2.0, -3.0)
    x = g.conv(g.input("batch", 3, 7, 7), weight=g.store("w", w), bias=g.store("c", c))
    y = g.conv(x, 5, 3, pad=pad, bias=bias)
    proto = g.model(g.relu(y))
    (group,) = (group for group in graph_of(proto).groups if group.size == 4)
    return proto, Plan("", (Keep(group.name, 4, (0, 3)),))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("mean_only", [True, False])
def test_constant_channels_fold_exactly(bias: bool, mean_only: bool) -> None:
    """Into a bias that is there, and into one that is added."""
    proto, plan = constant_channel(bias)
    cut = Cut(proto, plan)
    assert cut.error(cut.pruned) > 1e-2
    repaired, (entry,) = cut.repaired(mean_only)
    assert entry.method == "mean" or not mean_only
    assert cut.error(repaired) < 1e-9
    onnx.checker.check_model(flow.nest(repaired), full_check=True)


def test_constant_channels_behind_a_border_fold_in_the_mean() -> None:
    """Zeros around the image are no constants: the interior is not exact then, but the mean of each output is."""
    proto, plan = constant_channel(pad=1)
    last = proto.graph.node[-1]  # the mean of what is in front of the last Relu is compared
    proto.graph.node.remove(last)
    proto.graph.output[0].name = last.input[0]
    cut = Cut(proto, plan)
    repaired, _ = cut.repaired(mean_only=True)
    (batch,) = cut.fresh.batches(8)
    (wanted,), (made,) = (
        list(Session(flow.nest(p)).run(batch.feeds).values()) for p in (cut.proto, repaired)
    )
    np.testing.assert_allclose(made.mean(axis=(2, 3)), wanted.mean(axis=(2, 3)), rtol=1e-3, atol=1e-4)
    assert np.abs(made - wanted).max() > 1e-2


def test_repair_leaves_shared_weights_alone() -> None:
    """What one reader needs is wrong for the other: said, and not done."""
    cut = Cut(TOPOLOGIES["siamese"]())
    repaired, done = cut.repaired()
    shared = [entry.node for entry in done if "shared" in entry.method]
    assert shared
    model, before = Model(repaired), Model(cut.pruned)
    for node in model.nodes:
        if node.label in shared:
            for name in node.inputs[1:]:
                np.testing.assert_array_equal(model.array(name), before.array(name))


# --------------------------------------------------------------------------------------- sequential refit


def windows(
    x: Array, kernel: Sequence[int], strides: Sequence[int], dilations: Sequence[int], pads: Sequence[int]
) -> Array:
    """Explicit im2col: [samples, positions, channels x taps]."""
    padded = np.pad(x, ((0, 0), (0, 0), (pads[0], pads[2]), (pads[1], pads[3])))
    reach = [(k - 1) * d + 1 for k, d in zip(kernel, dilations, strict=True)]
    sides = [(padded.shape[2 + a] - reach[a]) // strides[a] + 1 for a in range(2)]
    rows = []
    for i in range(sides[0]):
        for j in range(sides[1]):
            top, left = i * strides[0], j * strides[1]
            patch = padded[:, :, top : top + reach[0] : dilations[0], left : left + reach[1] : dilations[1]]
            rows.append(patch.reshape(len(x), -1))
    return np.stack(rows, axis=1)


def arrays(x: Array, cut: Cut) -> Data:
    return open_data(x, cut.model, cut.graph.shapes, samples=None, seed=0)


FORMS = [
    ((3, 3), (1, 1), (1, 1), (1, 1, 1, 1)),
    ((3, 2), (2, 1), (1, 2), (2, 0, 0, 1)),
    ((1, 1), (2, 2), (1, 1), (0, 0, 0, 0)),
]


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("kernel", "strides", "dilations", "pads"), FORMS)
def test_refit_is_least_squares_on_windows(
    bias: bool,
    kernel: tuple[int, int],
    strides: tuple[int, int],
    dilations: tuple[int, int],
    pads: tuple[int, ...],
) -> None:
    """The weight and the bias, from nothing but the data and an explicit im2col: a ridge on the change of the
    weight, as strong as is best on the held-out batches, then fitted on all."""
    g = Graph(seed=7)
    y = g.relu(g.conv(g.input("batch", 3, 7, 8), 6, 1))
    w = g.store("w", g.normal(4, 6, *kernel))
    operands = [w, *([g.store("c", g.normal(4))] if bias else [])]
    given_ = {"strides": strides, "dilations": dilations, "pads": pads}
    proto = g.model(g.op("Conv", y, *operands, name="last", **{k: list(v) for k, v in given_.items()}))
    (group,) = (group for group in graph_of(proto).groups if group.size == 6)
    cut = Cut(proto, Plan("", (Keep(group.name, 6, (0, 2, 3)),)))
    x = np.random.default_rng(1).standard_normal((24, 3, 7, 8)).astype(np.float32)
    data = arrays(x, cut)
    refitted, (entry,) = cut.refitted(data=data)

    original, pruned, (output,) = (
        Model(proto),
        Model(cut.pruned),
        (value.name for value in proto.graph.output),
    )
    weight = pruned.array(pruned.producers[output].inputs[1])
    inner, bias_of = original.array("conv_1.weight")[:, :, 0, 0], original.array("conv_1.bias")
    held, fitted = [], []
    size = batch_size(data, cut.graph.shapes, ["relu_1.output", output])
    for index, batch in enumerate(data.batches(size)):
        value = np.maximum(
            np.einsum("oc,nchw->nohw", inner, batch.feeds["input"]) + bias_of[:, None, None], 0
        )
        kept = value[:, [0, 2, 3]]
        rows = windows(kept, kernel, strides, dilations, pads).reshape(-1, weight[0].size)
        full = windows(value, kernel, strides, dilations, pads).reshape(-1, 6 * kernel[0] * kernel[1])
        target = full @ original.array("w").reshape(4, -1).T - rows @ weight.reshape(4, -1).T
        (held if is_held(index) else fitted).append((rows, target))
    parts = [
        tuple(np.concatenate(p).astype(np.float64) for p in zip(*part, strict=True))
        for part in (fitted, held)
    ]

    def solved(x: Floats, e: Floats, ridge: float) -> tuple[Floats, Floats]:
        change = ridged(x, e, ridge, centred=True)
        return change, (e - x @ change).mean(axis=0)

    errors = {}
    for ridge in sequential.RIDGES:
        change, shift = solved(*parts[0], ridge)
        errors[ridge] = np.square(parts[1][1] - parts[1][0] @ change - shift).sum(axis=1).mean()
    best = min(errors, key=lambda ridge: errors[ridge])
    assert entry.method == f"refit {best:g}"
    assert entry.after == pytest.approx(errors[best] / np.square(parts[1][1]).sum(axis=1).mean(), rel=1e-3)
    change, shift = solved(*(np.concatenate(p) for p in zip(*parts, strict=True)), best)
    model = Model(refitted)
    node = model.producers[output]
    np.testing.assert_allclose(
        model.array(node.inputs[1]), weight + change.T.reshape(weight.shape), rtol=1e-3, atol=1e-4
    )
    before = original.array("c") if bias else np.zeros(4)  # where there was none one is added
    np.testing.assert_allclose(model.array(node.inputs[2]), before + shift, rtol=1e-3, atol=1e-3)
    assert cut.error(refitted, data) < cut.error(cut.pruned, data)


# ------------------------------------------------------------------------------------------------- wide layers


@pytest.mark.parametrize("kind", [np.float64, np.float32])
@pytest.mark.parametrize("size", [60, 1100])
def test_normal_equations(size: int, kind: type[np.floating]) -> None:
    """By blocks the same as by LAPACK, whatever is above the diagonal of a wide one."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((2, 2 * size, size)) + rng.standard_normal((2, 2 * size, 1))
    a = x.transpose(0, 2, 1) @ x / len(x[0]) + 0.01 * np.eye(size)
    b = rng.standard_normal((2, size, 3))
    found = normal.solve(a.astype(kind), b)
    exact = kind is np.float64
    np.testing.assert_allclose(
        found, np.linalg.solve(a, b), rtol=1e-8 if exact else 0, atol=0 if exact else 5e-3
    )


def test_normal_equations_without_a_solution() -> None:
    with pytest.raises(np.linalg.LinAlgError):
        normal.solve(-np.eye(1100)[None], np.ones((1, 1100, 1)))


def blocks_of(
    columns: int, monkeypatch: pytest.MonkeyPatch, cut: Cut
) -> tuple[onnx.ModelProto, list[Repaired]]:
    monkeypatch.setattr(sequential, "COLUMNS", columns)
    return cut.refitted()


@pytest.mark.parametrize("window", [1, 3])
def test_wide_layers_are_refitted_by_blocks(window: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """What one block could not make up for the next one does: no block is worse on held-out samples than what the
    earlier ones left, and the layer comes closer than by any one block alone."""
    g = Graph(seed=7)
    y = g.relu(g.conv(g.input("batch", 3, 7, 8), 12, 1))
    proto = g.model(g.conv(y, 4, window))
    (group,) = (group for group in graph_of(proto).groups if group.size == 12)
    cut = Cut(proto, Plan("", (Keep(group.name, 12, tuple(range(9))),)))
    before = cut.error(cut.pruned)
    whole, (entry,) = blocks_of(9 * window**2, monkeypatch, cut)
    assert "," not in entry.method
    errors = {}
    for width in (3, 5):
        refitted, (entry,) = blocks_of(width * window**2, monkeypatch, cut)
        assert entry.node == "conv_2"
        assert entry.method.count(",") == math.ceil(9 / width) - 1
        assert entry.after < entry.before
        errors[width] = cut.error(refitted)
        assert cut.error(whole) < errors[width] < before
    monkeypatch.setattr(sequential, "_parts", lambda reader: [slice(0, 3)])
    alone, _ = cut.refitted()
    assert errors[3] < cut.error(alone)


def test_independent_blocks_are_least_squares(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where columns of different blocks do not correlate, one sweep over them is the whole fit."""
    rng = np.random.default_rng(0)
    levels = np.array(
        list(itertools.product([-1.0, 1.0], repeat=4))
    )  # uncorrelated, of mean 0 and variance 1
    gone = levels @ rng.standard_normal((4, 2))
    x = np.empty((256, 6), np.float32)
    x[np.random.default_rng(0).permutation(256)] = np.tile(
        np.hstack([levels, gone]), (16, 1)
    )  # as it is drawn
    weight = rng.standard_normal((6, 5))
    g = Graph(seed=3)
    inner = g.op("MatMul", g.input("batch", 6), g.store("same", np.eye(6, dtype=np.float32)))
    proto = g.model(g.op("MatMul", inner, g.store("last", weight.astype(np.float32))))
    (group,) = graph_of(proto).groups
    cut = Cut(proto, Plan("", (Keep(group.name, 6, (0, 1, 2, 3)),)))
    change = np.linalg.lstsq(levels, gone @ weight[4:], rcond=None)[0] / (1 + sequential.RIDGES[0])
    for columns in (4, 2, 1):
        monkeypatch.setattr(sequential, "COLUMNS", columns)
        refitted, (entry,) = cut.refitted(data=arrays(x, cut))
        assert entry.method.split(", ") == [f"refit {sequential.RIDGES[0]:g}"] * (4 // columns)
        assert entry.after < 1e-5
        np.testing.assert_allclose(Model(refitted).array("last"), weight[:4] + change, atol=1e-5)


@given(st.integers(1, 8), st.integers(1, 300), st.integers(1, 30))
def test_blocks_cover_a_layer_and_fit_into_memory(groups: int, channels: int, taps: int) -> None:
    class Wide:
        matrix_shape = groups, 7, channels, taps

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sequential, "COLUMNS", 64)
        parts = sequential._parts(cast(Reader, Wide()))
    assert [c for part in parts for c in range(part.start, part.stop)] == list(range(channels))
    for part in parts:
        size = part.stop - part.start
        assert size == 1 or groups * (size * taps) ** 2 <= 64**2


def test_blocks_of_one_layer_are_never_in_one_stage(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where there are more layers than stages: each block is fitted to what the one before it has left."""
    cut = Cut(TOPOLOGIES["csp"]())
    monkeypatch.setattr(sequential, "COLUMNS", 16)
    monkeypatch.setattr(sequential, "STAGES", 1)
    layers = list(sequential._layers(cut.graph, cut.keep, [], Readers(graph_of(flow.nest(cut.pruned)))))
    stages = sequential._stages(layers)
    assert max(Counter(layer.reader for layer in layers).values()) > 1
    assert sum(map(len, stages)) == len(layers)
    for stage in stages:
        assert len({layer.reader for layer in stage}) == len(stage)
    for reader in {layer.reader for layer in layers}:
        order = [layer.part.start for stage in stages for layer in stage if layer.reader is reader]
        assert order == sorted(order)


# ------------------------------------------------------------------------------------------------------ match


@pytest.mark.parametrize("centred", [True, False])
def test_match_gives_mean_and_deviation(centred: bool) -> None:
    """Of explicit rows: what the scaled weight makes of the inputs has the deviation of the target, and with a bias
    its mean."""
    rng = np.random.default_rng(0)
    x = correlated(rng, 2, 50_000, 6) + np.float32(0.5)
    weight = rng.standard_normal((2, 6, 3))
    ours = x @ weight
    theirs = 1.3 * ours + 0.4 * rng.standard_normal(ours.shape) * ours.std(axis=1, keepdims=True) - 2
    rows = Regression(2, 6, 3)
    rows.add(x, (theirs - ours).astype(np.float32))
    change, shift = sequential._match(rows, weight, centred)
    made = x @ (weight + change)
    np.testing.assert_allclose(made.std(axis=1), theirs.std(axis=1), rtol=2e-3)
    np.testing.assert_allclose(
        change / weight, (change / weight)[:, :1].repeat(6, 1)
    )  # a scale of each output
    assert (shift is not None) == centred
    if shift is not None:
        np.testing.assert_allclose(made.mean(axis=1) + shift, theirs.mean(axis=1), atol=1e-3)
    few = Regression(2, 6, 3)
    few.add(x[:, : sequential.FEW], (theirs - ours)[:, : sequential.FEW].astype(np.float32))
    own = theirs[:, : sequential.FEW].std(axis=1) / ours[:, : sequential.FEW].std(axis=1)
    half = sequential._match(few, weight, centred)[0][:, 0] / weight[:, 0]
    np.testing.assert_allclose(half, (own - 1) / 2, rtol=1e-3)


def test_match_leaves_outputs_alone_that_are_constant() -> None:
    rows = Regression(1, 2, 2)
    rows.add(np.ones((1, 10, 2), np.float32), np.arange(20, dtype=np.float32).reshape(1, 10, 2))
    change, _ = sequential._match(rows, np.ones((1, 2, 2)), True)
    assert not change.any()


# ------------------------------------------------------------------------------- networks, sequentially


@pytest.mark.parametrize("padding", ["SAME_UPPER", "SAME_LOWER"])
def test_automatic_padding_follows_the_size_of_the_data(padding: str) -> None:
    """Where the image is of another size than the one that was analysed, the window begins elsewhere."""
    g = Graph(seed=7)
    y = g.conv(g.input("batch", 3, "height", "width"), 6, 1)
    proto = g.model(g.op("Conv", y, g.store("w", g.normal(4, 6, 3, 3)), strides=[2, 2], auto_pad=padding))
    (group,) = (group for group in graph_of(proto).groups if group.size == 6)
    cut = Cut(
        proto, Plan("", (Keep(group.name, 6, (0, 1, 2, 3)),))
    )  # four of them span what three inputs make
    for side in (8, 9):
        x = np.random.default_rng(1).standard_normal((24, 3, side, side)).astype(np.float32)
        refitted, _ = cut.refitted(data=arrays(x, cut))
        assert cut.error(refitted, arrays(x, cut)) < 0.02 * cut.error(cut.pruned, arrays(x, cut))


@pytest.mark.parametrize(("alpha", "beta"), [(1.0, 1.0), (0.25, 1.0), (-3.0, 0.5), (2.0, 0.0)])
def test_refit_through_alpha_and_beta(alpha: float, beta: float) -> None:
    """What stays spans what went, so the refit finds it."""
    g = Graph(seed=2)
    x = g.gemm(g.input("batch", 4), 12)
    proto = g.model(g.gemm(x, 5, alpha=alpha, beta=beta))
    (group,) = graph_of(proto).groups
    cut = Cut(proto, Plan("", (Keep(group.name, 12, tuple(range(6))),)), samples=200)
    refitted, _ = cut.refitted()
    assert cut.error(cut.pruned) > 0.05
    assert cut.error(refitted) < 1e-4


def test_a_linear_chain_is_recovered() -> None:
    """Each layer keeps more channels than what it is made of has, so nothing is lost."""
    g = Graph(seed=2)
    x = g.input("batch", 3, 4)
    for width in (16, 20, 12):
        x = g.matmul(x, width, bias=True)
    proto = g.model(g.matmul(x, 5))
    graph = graph_of(proto)
    edits = [Keep(group.name, group.size, tuple(range(group.size // 2))) for group in graph.groups]
    cut = Cut(proto, Plan("", tuple(edits)), samples=200)
    refitted, done = cut.refitted()
    assert len(done) == 3
    assert cut.error(cut.pruned) > 0.1
    assert cut.error(refitted) < 1e-4


def test_a_layer_in_front_of_a_sum_makes_up_for_the_stream() -> None:
    """The stream itself has lost something, and no layer of its own could say what."""
    g = Graph(seed=4)
    x = g.input("batch", 4)
    stem = g.relu(g.gemm(x, 24))
    stream = g.gemm(stem, 8)
    inner = g.relu(g.gemm(x, 40))
    proto = g.model(g.add(g.relu(stream), g.gemm(inner, 8)))
    (group,) = (group for group in graph_of(proto).groups if group.size == 24)
    cut = Cut(proto, Plan("", (Keep(group.name, 24, tuple(range(8))),)), samples=400)
    refitted, done = cut.refitted()
    assert [entry.node for entry in done] == ["gemm_2"]  # the inner layer reads nothing that has changed
    assert cut.error(refitted) < cut.error(cut.pruned)


def test_a_layer_waits_for_the_other_side_of_its_sum() -> None:
    """It is fitted to what that side lacks in the end: then nothing is left over in the mean of all samples."""
    g = Graph(seed=4)
    inner = g.relu(g.gemm(g.input("batch", 4), 24))
    deep = g.relu(g.gemm(g.relu(g.gemm(inner, 16)), 8))
    with g.scope("z"):  # nodes are looked at in the order of their names, where the graph leaves a choice
        own = g.gemm(inner, 8)
    proto = g.model(g.add(own, deep))
    (group,) = (group for group in graph_of(proto).groups if group.size == 24)
    cut = Cut(proto, Plan("", (Keep(group.name, 24, tuple(range(8))),)), samples=200)
    refitted, done = cut.refitted()
    assert [entry.node for entry in done] == ["gemm_2", "gemm_3", "z.gemm_1"]
    means = []
    for model in (cut.pruned, refitted):
        ours, theirs = Session(flow.nest(model)), Session(proto)
        left = [
            value - ours.run(batch.feeds)[name]
            for batch in cut.data.batches()
            for name, value in theirs.run(batch.feeds).items()
        ]
        means.append(np.abs(np.concatenate(left).mean(axis=0)).max())
    assert means[0] > 0.1
    assert means[1] < 1e-4


def test_a_size_that_depends_on_the_values() -> None:
    """Where the pruned network picks other rows than the original there is nothing to compare."""
    g = Graph(seed=4)
    inner = g.relu(g.gemm(g.relu(g.gemm(g.input("batch", 4), 16)), 6))
    picked = g.op("Greater", g.reduce("ReduceSum", inner, 1, keepdims=False), g.const(6.0, np.float32))
    places = g.squeeze(g.op("NonZero", picked, shape=(1, "some"), dtype=TensorProto.INT64), 0)
    proto = g.model(g.gemm(g.op("Gather", inner, places, axis=0), 5))
    (group,) = (group for group in graph_of(proto).groups if group.size == 16)
    cut = Cut(proto, Plan("", (Keep(group.name, 16, tuple(range(4))),)))
    refitted, done = cut.refitted()
    assert [(entry.node, entry.method != "none") for entry in done] == [("gemm_2", True), ("gemm_3", False)]
    onnx.checker.check_model(flow.nest(refitted), full_check=True)


@pytest.mark.parametrize("only_removed", [True, False])
def test_a_removed_block_is_stood_in_for(only_removed: bool) -> None:
    """A block without a bend in it is a map of the stream, which the layer in front of it takes on; two in a row
    as well."""
    g = Graph(seed=4)
    x = g.matmul(g.input("batch", 6), 8, bias=True)
    for _ in range(2):
        x = g.add(x, g.matmul(g.matmul(x, 16, bias=True), 8, bias=True))
    proto = g.model(g.matmul(g.relu(x), 5))
    names = [block.name for block in Blocks(graph_of(proto)).residual]
    assert len(names) == 2
    cut = Cut(proto, Plan("", tuple(Remove(name) for name in names)), samples=200)
    removed = surgery.removed_blocks(cut.blocks, cut.plan)
    assert cut.error(cut.pruned) > 0.05
    refitted, done = sequential.refit(
        cut.graph, cut.keep, removed, cut.pruned, cut.data, only_removed=only_removed
    )
    assert done[0].node == "matmul_1"
    assert len(done) == (1 if only_removed else 2)
    assert cut.error(refitted) < 1e-4


def test_without_held_out_batches_biases_alone_are_refitted() -> None:
    """One run of a fixed batch: nothing could tell how strong the ridge must be."""
    g = Graph(seed=3)
    proto = g.model(g.gemm(g.relu(g.gemm(g.input(8, 6), 24)), 5))
    (group,) = graph_of(proto).groups
    cut = Cut(proto, Plan("", (Keep(group.name, 24, tuple(range(12))),)), samples=8)
    refitted, (entry,) = cut.refitted()
    assert entry.method == "refit inf"
    before, after = Model(cut.pruned), Model(refitted)
    node = after.producers[proto.graph.output[0].name]
    np.testing.assert_array_equal(after.array(node.inputs[1]), before.array(node.inputs[1]))


def test_biases_alone_take_on_the_mean() -> None:
    cut = Cut(TOPOLOGIES["conv_bn_relu"]())
    repaired, done = sequential.refit(cut.graph, cut.keep, [], cut.pruned, cut.data, mean_only=True)
    assert all(entry.method in ("refit inf", "none") for entry in done)
    before, after = Model(cut.pruned), Model(repaired)
    for name, tensor in before.constants.items():
        if len(tensor.dims) > 1:
            np.testing.assert_array_equal(after.array(name), before.array(name))
    assert cut.error(repaired) < cut.error(cut.pruned)


def test_an_output_of_the_network_is_its_own_target() -> None:
    """Though it is added to a stream as well: what the stream lacks is none of its business."""

    def refitted(summed: bool) -> Array:
        g = Graph(seed=4)
        inner = g.relu(g.gemm(g.input("batch", 4), 24))
        first = g.relu(g.gemm(inner, 8))
        own = g.gemm(inner, 8)
        results = [own, g.add(own, first)] if summed else [own]
        proto = g.model(*results, names=["z", "total"][: len(results)])  # z: behind the other side
        (group,) = (group for group in graph_of(proto).groups if group.size == 24)
        cut = Cut(proto, Plan("", (Keep(group.name, 24, tuple(range(8))),)), samples=200)
        model = Model(cut.refitted()[0])
        (node,) = (node for node in model.nodes if node.label == "gemm_3")
        return model.array(node.inputs[1])

    np.testing.assert_allclose(refitted(True), refitted(False), rtol=1e-4, atol=1e-5)


RESIDUAL = ["residual", "residual_projection_stage", "sum_of_three", "nested_adds", "residual_layer_scale"]


@pytest.mark.parametrize("name", RESIDUAL)
def test_no_layer_is_worse_on_held_out_samples(name: str) -> None:
    cut = Cut(TOPOLOGIES[name]())
    repaired, one_shot = cut.repaired()
    refitted, done = cut.refitted(repaired)
    assert done
    assert all(entry.after <= entry.before for entry in [*one_shot, *done])
    assert any(entry.after < entry.before for entry in done)
    assert cut.error(refitted) < cut.error(repaired) < cut.error(cut.pruned)


def test_the_same_twice_is_the_same_bytes() -> None:
    results = []
    for _ in range(2):
        cut = Cut(TOPOLOGIES["csp"]())
        refitted, done = cut.refitted(cut.repaired()[0])
        results.append((refitted.SerializeToString(deterministic=True), done))
    assert results[0] == results[1]


def test_refit_leaves_shared_and_quantised_weights_alone() -> None:
    for build, floats in ((TOPOLOGIES["siamese"], False), (QUANTISED["qdq_by_channel"], True)):
        cut = Cut(build())
        refitted, done = cut.refitted()
        before, after = Model(cut.pruned), Model(refitted)
        assert before.constants.keys() <= after.constants.keys()
        for name, tensor in before.constants.items():
            alone = len(before.consumers.get(name, ())) == 1
            if not alone or tensor.data_type != TensorProto.FLOAT or (floats and not done):
                np.testing.assert_array_equal(before.array(name), after.array(name))


def stored(storage: Storage, ir: int) -> onnx.ModelProto:
    g = Graph(seed=3, storage=storage, ir=ir, opset=8)
    x = g.relu(g.conv_bn(g.input("batch", 3, 6, 6), 12, 3))
    return g.model(g.gemm(g.flatten(g.gap(g.conv(x, 8, 3))), 5))


@pytest.mark.parametrize(("storage", "ir"), [("initializer", 8), ("constant", 8), ("input", 3)])
def test_wherever_weights_are_stored(storage: Storage, ir: int) -> None:
    """The same network, the same repair."""
    cut, plain = Cut(stored(storage, ir)), Cut(stored("initializer", 8))
    repaired, _ = cut.repaired()
    refitted, done = cut.refitted(repaired)
    assert done == plain.refitted(plain.repaired()[0])[1]
    assert len(done) == 2
    nested = flow.nest(refitted)
    onnx.checker.check_model(nested, full_check=True)
    assert [v.name for v in nested.graph.input] == [v.name for v in flow.nest(cut.pruned).graph.input]
    assert cut.error(refitted) < 0.2 * cut.error(cut.pruned)


@pytest.mark.parametrize("dtype", [np.float16, np.float64])
def test_other_widths(dtype: type[np.floating]) -> None:
    """Weights keep their type."""
    g = Graph(seed=3)
    kind = int(onnx.helper.np_dtype_to_tensor_dtype(np.dtype(dtype)))

    def matmul(x: Tensor, cout: int) -> Tensor:
        scale = x.extent(-1) ** -0.5
        y = g.op("MatMul", x, g.store(g.fresh("w"), g.normal(x.extent(-1), cout, scale=scale).astype(dtype)))
        return g.add(y, g.store(g.fresh("c"), g.normal(cout).astype(dtype)))

    x = g.input("batch", 3, 6, dtype=kind)
    proto = g.model(matmul(g.relu(matmul(g.relu(matmul(x, 16)), 12)), 5))
    cut = Cut(proto, samples=100)
    refitted, done = cut.refitted(cut.repaired()[0])
    assert len(done) == 2
    assert {t.data_type for t in refitted.graph.initializer} == {kind}
    assert cut.error(refitted) < 0.5 * cut.error(cut.pruned)


@pytest.mark.parametrize("batch", ["batch", 4, 1])
def test_open_and_fixed_batches(batch: int | str) -> None:
    g = Graph(seed=3)
    x = g.relu(g.conv(g.input(batch, 3, 6, 6), 12, 3))
    proto = g.model(g.gap(g.conv(x, 8, 3)))
    cut = Cut(proto, samples=32)
    refitted, done = cut.refitted(cut.repaired()[0])
    assert done
    assert cut.error(refitted) < 0.2 * cut.error(cut.pruned)


# ------------------------------------------------------------------------------------------ whole corpora

NETS = {**TOPOLOGIES, **TRANSFORMERS, **ATTENTION, **RECURRENT, **QUANTISED, **CONTROL_FLOW}
SOME = [
    "bert",
    "cbam",
    "concat_same_twice",
    "gpt2",
    "if_captures",
    "loop_gru",
    "microsoft_attention",
    "multi_head_biased",
    "qdq_by_channel",
    "scan_rnn",
    "shared",
    "spatial_gate",
    "split_then_reshape",
    "transformer_of_integers",
]


def check_network(name: str) -> None:
    """A third removed, repaired on 32 made-up samples: the same structure, and no (much) larger error."""
    cut = Cut(NETS[name](), samples=32)
    if not cut.plan.edits:
        return
    repaired, _ = cut.repaired()
    refitted, _ = cut.refitted(repaired)
    before, after = Model(cut.pruned), Model(refitted)
    assert [(n.domain, n.op, n.outputs) for n in after.nodes] == [
        (n.domain, n.op, n.outputs) for n in before.nodes
    ]
    for tensor, stored_ in before.constants.items():
        assert list(after.constants[tensor].dims) == list(stored_.dims)
        assert after.constants[tensor].data_type == stored_.data_type
    onnx.checker.check_model(flow.nest(refitted), full_check=True)
    plain = cut.error(cut.pruned, cut.data)
    assert cut.error(repaired, cut.data) <= 1.05 * plain + 1e-6
    assert cut.error(refitted, cut.data) <= 1.05 * plain + 1e-6


@pytest.mark.parametrize("name", SOME)
def test_networks(name: str) -> None:
    check_network(name)


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(NETS))
def test_all_networks(name: str) -> None:
    check_network(name)


def test_outputs_that_hold_no_floats() -> None:
    """Classes alone tell repair nothing: no error of theirs is reported."""
    g = Graph(seed=0)
    x = g.relu(g.conv(g.input(2, 3, 8, 8), 16))
    result = shrink(g.model(g.op("ArgMax", g.conv(x, 8), axis=1)), 0.5, align=1, samples=8)
    assert result.report.as_dict()["repair"]["chosen"] == "none"
    told = result.report.repair.on("made-up inputs") if result.report.repair else ""
    assert told == "repair: none kept, since no output that holds floats has changed, on made-up inputs"
