"""Axis types and their index arithmetic, against enumeration."""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import numpy as np
import pytest
from hypothesis import HealthCheck, assume, example, given, settings
from hypothesis import strategies as st
from hypothesis.strategies import DrawFn, SearchStrategy

from onnxprune import axes
from onnxprune.axes import Axis, Const, Product, Reason, Sum, Var, concat, product
from onnxprune.ops.spec import Pattern, refine
from tests.ops.oracle import cut
from tests.reference import Array, stays

WHY = Reason("test", "pinned by a test", "node")
MEETING = Reason("meeting", "where two axes meet", "node")
EXTENTS = (1, 2, 3, 4, 6, 8, 9, 12, 16, 18, 24)
LIMIT = 64

quick = settings(
    max_examples=250,
    derandomize=True,
    deadline=None,
    database=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
)


# ---------------------------------------------------------------------------------------- random layouts


@dataclass
class Layouts:
    """Draws axes; Vars may occur again, in one axis or in several."""

    draw: DrawFn
    pool: list[Var] = field(default_factory=list)

    def axis(self, extent: int, depth: int = 3) -> Axis:
        if extent == 1:
            return axes.fresh(1)
        kinds = ["var", "var", "again", "const"]
        if depth and not _is_prime(extent):
            kinds += ["product"] * 3
        if depth:
            kinds += ["sum"] * 3
        kind = self.draw(st.sampled_from(kinds))
        if kind == "const":
            return Const(extent, WHY)
        if kind == "product":
            outer = self.draw(st.sampled_from([d for d in range(2, extent) if extent % d == 0]))
            return product((self.axis(outer, depth - 1), self.axis(extent // outer, depth - 1)))
        if kind == "sum":
            low = self.draw(st.integers(1, extent - 1))
            return concat((self.axis(low, depth - 1), self.axis(extent - low, depth - 1)))
        known = [var for var in self.pool if var.extent == extent]
        if kind == "again" and known:
            return self.draw(st.sampled_from(known))
        self.pool.append(Var(extent))
        return self.pool[-1]


def _is_prime(n: int) -> bool:
    return all(n % d for d in range(2, n))


@st.composite
def same_extent(draw: DrawFn, count: int) -> list[Axis]:
    extent = draw(st.sampled_from(EXTENTS))
    layouts = Layouts(draw)
    return [layouts.axis(extent) for _ in range(count)]


def keeps(seed: int, *those: Axis) -> dict[Var, Array]:
    """Random units to keep of every free Var, at least one of each."""
    rng = np.random.default_rng(seed)
    result = {}
    for var in {var for axis in those for var in axes.free_vars(axis)}:
        mask = rng.random(var.extent) < 0.6
        mask[rng.integers(var.extent)] = True
        result[var] = mask
    return result


def positions(axis: Axis, keep: dict[Var, Array]) -> list[int]:
    kept = axes.kept_positions(axis, keep)
    return list(range(axis.extent)) if kept is None else kept.tolist()


def free_units(*those: Axis) -> int:
    return sum(var.extent for var in {var for axis in those for var in axes.free_vars(axis)})


def seeds() -> SearchStrategy[int]:
    return st.integers(0, 2**16)


# --------------------------------------------------------------------------------------- index arithmetic


@quick
@given(same_extent(1), seeds())
def test_kept_positions_are_those_whose_every_unit_stays(those: list[Axis], seed: int) -> None:
    (axis,) = those
    keep = keeps(seed, axis)
    assert positions(axis, keep) == np.flatnonzero(stays(axis, keep)).tolist()


@quick
@given(same_extent(1), seeds())
def test_extent_counts_the_kept_positions(those: list[Axis], seed: int) -> None:
    (axis,) = those
    keep = keeps(seed, axis)
    counts = {var: int(mask.sum()) for var, mask in keep.items()}
    assert axes.extent(axis, counts) == len(positions(axis, keep))
    assert axes.extent(axis, {}) == axis.extent


@quick
@given(same_extent(1))
def test_unit_maps_hold_every_unit_equally_often(those: list[Axis]) -> None:
    for var, units in axes.unit_maps(those[0]):
        counts = np.bincount(units[units >= 0], minlength=var.extent)
        assert len(set(counts.tolist())) == 1
        assert counts[0] > 0


def test_nothing_removed_is_told_apart_from_something() -> None:
    var = Var(4)
    assert axes.kept_positions(var, {}) is None
    assert axes.kept_positions(var, {var: np.ones(4, dtype=bool)}) is None
    assert positions(var, {var: np.array([True, False, True, True])}) == [0, 2, 3]


def test_a_unit_on_both_factors_goes_from_both() -> None:
    var = Var(3)
    keep = {var: np.array([True, False, True])}
    assert positions(product((var, var)), keep) == [0, 2, 6, 8]


def test_building_flattens() -> None:
    a, b, c = Var(2), Var(3), Var(4)
    assert axes.product(()) is axes.ONE
    assert axes.product((a, axes.ONE)) is a
    assert axes.concat((a, Const(0, WHY))) is a
    assert axes.concat(()).extent == 0
    nested = product((a, product((b, c))))
    assert isinstance(nested, Product)
    assert nested.factors == (a, b, c)
    chain = concat((concat((a, b)), c))
    assert isinstance(chain, Sum)
    assert chain.terms == (a, b, c)


# --------------------------------------------------------------------------------------------- unification


@quick
@given(same_extent(2), seeds())
def test_unified_axes_keep_the_same_positions(those: list[Axis], seed: int) -> None:
    a, b = those
    axes.unify(a, b, MEETING)
    keep = keeps(seed, a, b)
    assert positions(a, keep) == positions(b, keep)


@quick
@given(same_extent(3), seeds())
def test_unification_is_transitive_and_never_undone(those: list[Axis], seed: int) -> None:
    a, b, c = those
    axes.unify(a, b, MEETING)
    axes.unify(c, b, MEETING)
    keep = keeps(seed, a, b, c)
    assert positions(a, keep) == positions(b, keep) == positions(c, keep)


@quick
@given(same_extent(2))
def test_unifying_again_changes_nothing(those: list[Axis]) -> None:
    a, b = those
    axes.unify(a, b, MEETING)
    before = free_units(a, b)
    axes.unify(b, a, MEETING)
    axes.unify(a, a, MEETING)
    assert free_units(a, b) == before


@quick
@given(same_extent(2))
def test_sides_are_alike(those: list[Axis]) -> None:
    a, b = those
    c, d = copy.deepcopy((a, b))
    axes.unify(a, b, MEETING)
    axes.unify(d, c, MEETING)
    assert free_units(a, b) == free_units(c, d)


@quick
@given(same_extent(1))
def test_a_fresh_axis_takes_on_any_layout(those: list[Axis]) -> None:
    (axis,) = those
    before = free_units(axis)
    other = axes.fresh(axis.extent)
    axes.unify(other, axis, MEETING)
    assert free_units(axis, other) == before


@quick
@given(st.lists(st.integers(1, 6), min_size=1, max_size=5), st.data())
def test_sums_are_cut_at_all_boundaries(left: list[int], data: st.DataObject) -> None:
    """Of sums of different Vars every unit stays free, but for pieces of a single one."""
    total = sum(left)
    cuts = sorted(data.draw(st.sets(st.integers(1, total - 1), max_size=4))) if total > 1 else []
    right = np.diff([0, *cuts, total]).tolist()
    a, b = (concat(axes.fresh(size) for size in side) for side in (left, right))
    bounds = sorted({0, *np.cumsum(left).tolist(), *np.cumsum(right).tolist()})
    axes.unify(a, b, MEETING)
    assert free_units(a, b) == sum(size for size in np.diff(bounds).tolist() if size > 1)


@pytest.mark.parametrize(
    ("left", "right", "free"),
    [
        ((12,), (12,), [12]),
        ((12,), (3, 4), [3, 4]),
        ((2, 6), (4, 3), [2, 2, 3]),
        ((24,), (2, 3, 4), [2, 3, 4]),
        ((4, 6), (2, 12), [2, 2, 6]),
        ((4, 3), (3, 4), []),
        ((8, 9), (9, 8), []),
        ((5, 4, 3), (5, 3, 4), []),
        ((5, 4), (5, 4), [5, 4]),
    ],
)
def test_products_meet_in_their_common_refinement(
    left: tuple[int, ...], right: tuple[int, ...], free: list[int]
) -> None:
    a, b = product(map(Var, left)), product(map(Var, right))
    axes.unify(a, b, MEETING)
    assert [var.extent for var in axes.free_vars(a)] == free
    assert [var.extent for var in axes.free_vars(b)] == free


def test_a_product_distributes_over_a_sum() -> None:
    heads, width = Var(6), Var(4)
    x, y = Var(8), Var(16)
    axes.unify(product((heads, width)), concat((x, y)), MEETING)
    assert [var.extent for var in axes.free_vars(heads)] == [2, 4]
    low, high = (axes.resolve(axis) for axis in (x, y))
    assert isinstance(low, Product)
    assert isinstance(high, Product)
    assert low.factors[1] is high.factors[1]


def test_pieces_of_a_sum_share_their_minor_factor() -> None:
    total = concat((Var(4), Var(8)))
    major, minor = Var(3), Var(4)
    axes.unify(total, product((major, minor)), MEETING)
    keep = {var: np.arange(var.extent) != 1 for var in axes.free_vars(total)}
    assert positions(total, keep) == positions(product((major, minor)), keep)
    assert free_units(total) > 0


def test_a_pinned_axis_pins_with_its_own_reason() -> None:
    axis = product((Var(3), Var(4)))
    axes.unify(axis, Const(12, WHY), MEETING)
    leaves = list(axes.leaves(axes.resolve(axis)))
    assert [leaf.reason for leaf in leaves if isinstance(leaf, Const)] == [WHY, WHY]


def test_axes_without_a_common_layout_are_pinned_with_the_node() -> None:
    a, b = product((Var(4), Var(3))), product((Var(3), Var(4)))
    axes.unify(a, b, MEETING)
    reasons = {leaf.reason for leaf in axes.leaves(axes.resolve(a)) if isinstance(leaf, Const)}
    assert {(reason.kind, reason.node) for reason in reasons} == {("layout", "node")}


def test_different_extents_are_refused() -> None:
    with pytest.raises(axes.Contradiction, match="3 and 4"):
        axes.unify(Var(3), Var(4), MEETING)


# ------------------------------------------------------------------------------------ taking axes apart


@quick
@given(same_extent(1), st.data(), seeds())
def test_split_parts_are_the_axis(those: list[Axis], data: st.DataObject, seed: int) -> None:
    (axis,) = those
    assume(axis.extent > 1)
    at = data.draw(st.integers(1, axis.extent - 1))
    low, high = axes.split(axis, at)
    assert (low.extent, high.extent) == (at, axis.extent - at)
    keep = keeps(seed, axis, low, high)
    assert positions(axis, keep) == [*positions(low, keep), *(at + p for p in positions(high, keep))]
    assert positions(concat((low, high)), keep) == positions(axis, keep)


@quick
@given(same_extent(1), st.data(), seeds())
def test_slices_are_three_parts(those: list[Axis], data: st.DataObject, seed: int) -> None:
    (axis,) = those
    start = data.draw(st.integers(0, axis.extent))
    stop = data.draw(st.integers(start, axis.extent))
    parts = axes.slice_axis(axis, start, stop)
    assert [part.extent for part in parts] == [start, stop - start, axis.extent - stop]
    keep = keeps(seed, axis, *parts)
    assert positions(axis, keep) == positions(concat(parts), keep)


@quick
@given(same_extent(1), seeds())
def test_exploded_units_are_the_positions(those: list[Axis], seed: int) -> None:
    (axis,) = those
    units = axes.explode(axis)
    assert [unit.extent for unit in units] == [1] * axis.extent
    keep = {var: np.random.default_rng(seed).random(1) < 0.5 for var in axes.free_vars(axis)}
    here = np.flatnonzero(stays(axis, keep)).tolist()
    assert here == [p for p, unit in enumerate(units) if stays(unit, keep).all()]


INDICES: dict[str, Callable[[DrawFn, int], Iterable[int]]] = {
    "contiguous": lambda draw, n: range(draw(st.integers(0, n - 1)), n),
    "strided": lambda draw, n: range(draw(st.integers(0, 1)), n, draw(st.sampled_from([2, 3, 4]))),
    "reversed": lambda draw, n: range(n - 1, -1, -draw(st.sampled_from([1, 2]))),
    "shuffled": lambda draw, n: np.arange(n).reshape(_divisor(draw, n), -1).T.ravel().tolist(),
    "repeated": lambda draw, n: np.repeat(np.arange(n), 2).tolist(),
    "rotated": lambda draw, n: np.roll(np.arange(n), draw(st.integers(0, n))).tolist(),
    "twice": lambda draw, n: [*range(n), *range(n)],
    "arbitrary": lambda draw, n: draw(st.lists(st.integers(0, n - 1), max_size=20)),
}


def _divisor(draw: DrawFn, n: int) -> int:
    return draw(st.sampled_from([d for d in range(1, n + 1) if n % d == 0]))


@quick
@given(same_extent(1), st.sampled_from(sorted(INDICES)), st.data(), seeds())
def test_taken_positions_follow_their_source(
    those: list[Axis], kind: str, data: st.DataObject, seed: int
) -> None:
    (axis,) = those
    index = list(INDICES[kind](data.draw, axis.extent))
    taken = axes.take(axis, index, LIMIT, WHY)
    assert taken is not None
    assert taken.extent == len(index)
    keep = keeps(seed, axis, taken)
    source = set(positions(axis, keep))
    assert positions(taken, keep) == [j for j, position in enumerate(index) if position in source]


@pytest.mark.parametrize(
    ("extent", "index", "free"),
    [
        (12, range(12), [12]),
        (12, range(3, 9), [3, 6, 3]),
        (12, [*range(8, 12), *range(8)], [8, 4]),
        (12, range(0, 12, 2), [6]),
        (12, range(1, 12, 3), [4]),
        (12, np.arange(12).reshape(3, 4).T.ravel(), [3, 4]),
        (12, np.arange(12).reshape(2, 6).T.ravel(), [2, 6]),
    ],
)
def test_regular_indices_leave_units_to_choose(extent: int, index: Iterable[int], free: list[int]) -> None:
    axis = Var(extent)
    assert axes.take(axis, list(index), LIMIT, WHY) is not None
    assert [var.extent for var in axes.free_vars(axis)] == free


def test_an_index_over_too_many_positions_is_refused() -> None:
    index = np.random.default_rng(0).permutation(LIMIT + 1)
    axis = Var(LIMIT + 1)
    assert axes.take(axis, index, LIMIT, WHY) is None
    assert axis.bound is None


# ------------------------------------------------------------------------------------------------- reshape


@st.composite
def reshapes(draw: DrawFn) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Two shapes of the same elements: one list of factors, gathered twice, perhaps in another order."""
    factors = draw(st.lists(st.sampled_from([1, 2, 2, 3, 4, 5]), min_size=1, max_size=5))
    left = _gather(draw, factors)
    other = draw(st.permutations(factors)) if draw(st.booleans()) else factors
    return left, _gather(draw, other)


def _gather(draw: DrawFn, factors: list[int]) -> tuple[int, ...]:
    dims = [factors[0]]
    for factor in factors[1:]:
        if draw(st.booleans()):
            dims.append(factor)
        else:
            dims[-1] *= factor
    return tuple(dims)


@quick
@given(reshapes(), seeds())
@example(((2, 12, 64), (2, 768)), 0)
@example(((6, 4), (4, 6)), 0)
@example(((1, 4, 1), (2, 1, 2, 1)), 0)
@example(((1,), (1, 1)), 0)
def test_a_cut_reshape_is_the_reshape_of_the_cut(
    shapes: tuple[tuple[int, ...], tuple[int, ...]], seed: int
) -> None:
    left, right, sizes, pinned = refine(*shapes)
    for pattern, shape in zip((left, right), shapes, strict=True):
        assert [_extent(pattern, i, sizes) for i in range(len(pattern))] == list(shape)
    rng = np.random.default_rng(seed)
    keep = {
        name: np.sort(rng.permutation(size)[: rng.integers(1, size + 1)])
        for name, size in sizes.items()
        if name not in pinned
    }
    array = np.arange(math.prod(shapes[0]))
    here = cut(array.reshape(shapes[0]), left, sizes, keep)
    there = cut(array.reshape(shapes[1]), right, sizes, keep)
    assert here.ravel().tolist() == there.ravel().tolist()


def _extent(pattern: Pattern, axis: int, sizes: dict[str, int]) -> int:
    return sum(math.prod(sizes[name] for name in term) for term in pattern[axis])


@pytest.mark.parametrize(
    ("left", "right", "free"),
    [
        ((2, 12, 64), (2, 768), {2, 12, 64}),
        ((2, 768), (2, 3, 4, 64), {2, 3, 4, 64}),
        ((6, 4), (4, 6), set()),
        ((7, 6, 4), (7, 4, 6), {7}),
        ((2, 8, 3), (2, 24), {2, 8, 3}),
        ((4, 6), (2, 12), {2, 6}),
    ],
)
def test_reshape_keeps_what_both_layouts_have(
    left: tuple[int, ...], right: tuple[int, ...], free: set[int]
) -> None:
    *_, sizes, pinned = refine(left, right)
    assert {size for name, size in sizes.items() if name not in pinned} == free


# ------------------------------------------------------------------------------------------------ endurance


def test_long_chains_end() -> None:
    chain = [Var(64) for _ in range(5000)]
    for a, b in itertools.pairwise(chain):
        axes.unify(a, b, MEETING)
    assert free_units(*chain) == 64
    axes.pin(chain[2500], WHY)
    assert free_units(*chain) == 0


def test_many_small_pieces_end() -> None:
    a = concat(Var(2) for _ in range(1500))
    b = concat(Var(3) for _ in range(1000))
    axes.unify(a, b, MEETING)
    assert a.extent == b.extent == 3000


def test_large_extents_end() -> None:
    a = product((Var(2**20), Var(3**10)))
    b = product((Var(2**10), Var(2**10 * 3**10)))
    axes.unify(a, b, MEETING)
    assert sorted(var.extent for var in axes.free_vars(a)) == [2**10, 2**10, 3**10]
    axes.unify(concat((a, Var(7))), concat((Var(10**9), Var(a.extent + 7 - 10**9))), MEETING)


def test_an_axis_that_meets_a_shifted_self_ends() -> None:
    a, b = Var(31), Var(7)
    axes.unify(concat((a, b)), concat((b, a)), MEETING)
    keep = keeps(1, a, b)
    assert positions(concat((a, b)), keep) == positions(concat((b, a)), keep)


def test_a_sum_of_itself_and_a_product_of_itself_end() -> None:
    a = Var(12)
    axes.unify(concat((a, a)), product((Var(2), a)), MEETING)
    axes.unify(concat((a, a)), product((Var(4), Var(6))), MEETING)
    axes.unify(concat((a, a)), product((Var(8), Var(3))), MEETING)
    keep = keeps(2, a)
    assert positions(a, keep) == np.flatnonzero(stays(a, keep)).tolist()
