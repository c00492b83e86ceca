"""Axis types: what the positions of a tensor axis are made of, and how two axes are made equal.

An axis of extent n has one of four types:

    Var(n)      n independent units that live or die together wherever the Var occurs
    Product     (a b): row-major, what Reshape and Flatten make
    Sum         a + b: what Concat makes, Split and Slice take apart
    Const(n)    a pinned extent: graph interfaces, batch, space

Coupling two axes is unification of their types. It refines (a Var is bound to a product or a sum)
and enumerates single units only where an index map leaves no other way. Where two layouts have no
common refinement both are pinned, with the reason.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

IntArray = npt.NDArray[np.int64]
BoolArray = npt.NDArray[np.bool_]


@dataclass(frozen=True, slots=True)
class Reason:
    """Why an axis cannot be cut (or only lossily): a short class, a sentence, and the node."""

    kind: str
    text: str
    node: str = ""

    def __str__(self) -> str:
        return f"{self.text} (node '{self.node}')" if self.node else self.text


UNIT = Reason("unit", "extent 1")
SINGLE = Reason("single", "one unit left over by uneven splits")


class Var:
    """`extent` independent units; `bound` once unification has found what they are."""

    __slots__ = ("bound", "extent")

    def __init__(self, extent: int) -> None:
        self.extent = extent
        self.bound: Axis | None = None

    def __repr__(self) -> str:
        return str(self.extent) if self.bound is None else repr(resolve(self))


class Const:
    """A pinned extent and the reason it is pinned."""

    __slots__ = ("extent", "reason")

    def __init__(self, extent: int, reason: Reason) -> None:
        self.extent = extent
        self.reason = reason

    def __repr__(self) -> str:
        return str(self.extent)


class Product:
    """Row-major product of factors. Build with `product`."""

    __slots__ = ("extent", "factors")

    def __init__(self, factors: tuple[Axis, ...]) -> None:
        self.factors = factors
        self.extent: int = math.prod(f.extent for f in factors)

    def __repr__(self) -> str:
        return f"({' '.join(map(repr, self.factors))})"


class Sum:
    """Concatenation of terms. Build with `concat`."""

    __slots__ = ("extent", "terms")

    def __init__(self, terms: tuple[Axis, ...]) -> None:
        self.terms = terms
        self.extent: int = sum(t.extent for t in terms)

    def __repr__(self) -> str:
        return " + ".join(map(repr, self.terms))


Axis = Var | Const | Product | Sum
ONE = Const(1, UNIT)


def fresh(extent: int) -> Axis:
    """A new free axis; an extent of 1 (or 0) holds nothing to choose from and is a Const."""
    return Var(extent) if extent > 1 else Const(extent, UNIT)


def product(factors: Iterable[Axis]) -> Axis:
    """The product of `factors`, flattened and without constant factors of 1."""
    flat: list[Axis] = []
    for factor in factors:
        axis = resolve(factor)
        if isinstance(axis, Product):
            flat.extend(axis.factors)
        elif not (isinstance(axis, Const) and axis.extent == 1):
            flat.append(axis)
    if not flat:
        return ONE
    return flat[0] if len(flat) == 1 else Product(tuple(flat))


def concat(terms: Iterable[Axis]) -> Axis:
    """The sum of `terms`, flattened and without empty terms."""
    flat: list[Axis] = []
    for term in terms:
        axis = resolve(term)
        if isinstance(axis, Sum):
            flat.extend(axis.terms)
        elif axis.extent > 0:
            flat.append(axis)
    if not flat:
        return Const(0, UNIT)
    return flat[0] if len(flat) == 1 else Sum(tuple(flat))


def resolve(axis: Axis) -> Axis:
    """The axis with every bound Var replaced by what it is bound to."""
    if isinstance(axis, Const):
        return axis
    trail: list[Var] = []
    while isinstance(axis, Var):  # a loop: a long chain of additions binds one Var to the next
        if axis.bound is None:
            break
        trail.append(axis)
        axis = axis.bound
    else:
        if not isinstance(axis, Const):
            axis = _resolve_parts(axis)
    for var in trail:
        var.bound = axis
    return axis


def _resolve_parts(axis: Product | Sum) -> Axis:
    parts = axis.factors if isinstance(axis, Product) else axis.terms
    resolved = [resolve(part) for part in parts]
    if all(new is old for new, old in zip(resolved, parts, strict=True)):
        return axis
    return product(resolved) if isinstance(axis, Product) else concat(resolved)


def free_vars(axis: Axis) -> Iterator[Var]:
    """The unbound Vars of an axis in order of first occurrence."""
    axis = resolve(axis)
    if isinstance(axis, Var):
        yield axis
    if isinstance(axis, (Var, Const)):
        return
    seen: set[int] = set()
    for leaf in leaves(axis):
        if isinstance(leaf, Var) and id(leaf) not in seen:
            seen.add(id(leaf))
            yield leaf


def leaves(axis: Axis) -> Iterator[Var | Const]:
    """The Vars and Consts of a resolved axis, left to right."""
    if isinstance(axis, Var | Const):
        yield axis
    else:
        for part in axis.factors if isinstance(axis, Product) else axis.terms:
            yield from leaves(part)


def products(axis: Axis) -> Iterator[tuple[Axis, ...]]:
    """The factor lists of every product inside a resolved axis."""
    if isinstance(axis, Product):
        yield axis.factors
    if isinstance(axis, Product | Sum):
        for part in axis.factors if isinstance(axis, Product) else axis.terms:
            yield from products(part)


# Occurrences of a Var on an axis: for each position the unit it belongs to, or -1.
UnitMap = tuple[Var, IntArray]


def unit_maps(axis: Axis, only: Var | None = None) -> list[UnitMap]:
    """For each occurrence of a free Var (or `only` of one), the unit at every position of an axis (-1: none).

    A position is removed when the unit of any of its maps is removed.
    """
    return _unit_maps(resolve(axis), only)


def _unit_maps(axis: Axis, only: Var | None) -> list[UnitMap]:
    if isinstance(axis, Const):
        return []
    if isinstance(axis, Var):
        return [(axis, np.arange(axis.extent, dtype=np.int64))] if only is None or only is axis else []
    maps: list[UnitMap] = []
    if isinstance(axis, Product):
        outer, inner = 1, axis.extent
        for factor in axis.factors:
            inner //= factor.extent
            for var, units in _unit_maps(factor, only):
                maps.append((var, np.tile(np.repeat(units, inner), outer)))
            outer *= factor.extent
        return maps
    merged: dict[int, list[UnitMap]] = {}
    offset = 0
    for term in axis.terms:
        taken: dict[int, int] = {}
        for var, units in _unit_maps(term, only):
            rank = taken.get(id(var), 0)
            taken[id(var)] = rank + 1
            slots = merged.setdefault(id(var), [])
            if rank == len(slots):
                slots.append((var, np.full(axis.extent, -1, dtype=np.int64)))
            slots[rank][1][offset : offset + term.extent] = units
        offset += term.extent
    for slots in merged.values():
        maps.extend(slots)
    return maps


Keep = dict[Var, BoolArray]
"""Which units of a Var stay; a Var that is missing stays whole."""


def kept_positions(axis: Axis, keep: Keep) -> IntArray | None:
    """The positions of the axis that stay, or None where all of them do."""
    mask = _kept(resolve(axis), keep)
    return None if mask is None or mask.all() else np.flatnonzero(mask)


def _kept(axis: Axis, keep: Keep) -> BoolArray | None:
    if isinstance(axis, Var):
        return keep.get(axis)
    if isinstance(axis, Const):
        return None
    parts = axis.factors if isinstance(axis, Product) else axis.terms
    masks = [_kept(part, keep) for part in parts]
    if all(mask is None for mask in masks):
        return None
    whole = [np.ones(p.extent, dtype=bool) if m is None else m for p, m in zip(parts, masks, strict=True)]
    if isinstance(axis, Sum):
        return np.concatenate(whole)
    return functools.reduce(lambda major, minor: np.logical_and.outer(major, minor).ravel(), whole)


def extent(axis: Axis, counts: dict[Var, int]) -> int:
    """The extent of the axis when `counts[v]` units of Var v are kept (all where missing)."""
    if isinstance(axis, Var):
        if axis.bound is None:
            return counts.get(axis, axis.extent)
        return extent(resolve(axis), counts)
    if isinstance(axis, Const):
        return axis.extent
    if isinstance(axis, Product):
        return math.prod(extent(factor, counts) for factor in axis.factors)
    return sum(extent(term, counts) for term in axis.terms)


class Contradiction(ValueError):
    """Two axes that must be equal have different extents."""


def pin(axis: Axis, reason: Reason) -> None:
    """Fix every free unit of the axis."""
    for var in list(free_vars(axis)):
        var.bound = Const(var.extent, reason)


def unify(a: Axis, b: Axis, reason: Reason) -> None:
    """Make two axes equal; `reason` says where they meet, for a pin that may follow.

    Raises `Contradiction` if the extents differ.
    """
    a, b = resolve(a), resolve(b)
    if a is b:
        return
    if a.extent != b.extent:
        raise Contradiction(f"{a.extent} and {b.extent}")
    if isinstance(a, Const):
        pin(b, a.reason)
    elif isinstance(b, Const):
        pin(a, b.reason)
    elif isinstance(a, Var) and not _occurs(a, b):
        a.bound = b
    elif isinstance(b, Var) and not _occurs(b, a):
        b.bound = a
    elif isinstance(a, Sum) or isinstance(b, Sum):
        _unify_sums(a, b, reason)
    else:
        _unify_products(a, b, reason)


def _occurs(var: Var, axis: Axis) -> bool:
    return any(leaf is var for leaf in leaves(axis))


def _unify_sums(a: Axis, b: Axis, reason: Reason) -> None:
    """Cut both at the union of their boundaries, then unify piece by piece."""
    left, right = [a], [b]  # stacks, next piece last
    while left and right:
        x, y = _pop_term(left), _pop_term(right)
        if x.extent < y.extent:
            y, rest = split(y, x.extent)
            right.append(rest)
        elif y.extent < x.extent:
            x, rest = split(x, y.extent)
            left.append(rest)
        if isinstance(resolve(x), Sum) and isinstance(resolve(y), Sum):
            left.append(x)  # a split may have made new boundaries inside
            right.append(y)
        else:
            unify(x, y, reason)


def _pop_term(stack: list[Axis]) -> Axis:
    axis = resolve(stack.pop())
    if isinstance(axis, Sum):
        stack.extend(reversed(axis.terms[1:]))
        return axis.terms[0]
    return axis


def split(axis: Axis, at: int) -> tuple[Axis, Axis]:
    """The axis as two: its first `at` positions and the rest (0 < at < extent)."""
    axis = resolve(axis)
    if isinstance(axis, Const):
        return Const(at, axis.reason), Const(axis.extent - at, axis.reason)
    if isinstance(axis, Var):
        parts = _part(at), _part(axis.extent - at)
        axis.bound = concat(parts)
        return parts
    if isinstance(axis, Sum):
        return _split_sum(axis, at)
    head, rest = axis.factors[0], product(axis.factors[1:])
    count, remainder = divmod(at, rest.extent)
    if remainder == 0:
        low, high = split(head, count)
        return product((low, rest)), product((high, rest))
    if head.extent == 1:  # a single unit in front: the cut goes through what it multiplies
        low, high = split(rest, remainder)
        return product((head, low)), product((head, high))
    before: list[Axis] = []
    middle, after = head, []
    if count:
        low, middle = split(middle, count)
        before.append(product((low, rest)))
    if resolve(middle).extent > 1:
        middle, high = split(middle, 1)
        after.append(product((high, rest)))
    low, high = split(rest, remainder)
    return concat([*before, product((middle, low))]), concat([product((middle, high)), *after])


def _part(size: int) -> Axis:
    return Var(size) if size > 1 else Const(size, SINGLE)


def _split_sum(axis: Sum, at: int) -> tuple[Axis, Axis]:
    done: list[Axis] = []
    terms = list(axis.terms)
    while at:
        term = terms.pop(0)
        if term.extent > at:
            low, high = split(term, at)
            done.append(low)
            terms.insert(0, high)
            at = 0
        else:
            done.append(term)
            at -= term.extent
    return concat(done), concat(terms)


def slice_axis(axis: Axis, start: int, stop: int) -> tuple[Axis, Axis, Axis]:
    """The axis as three: before `start`, from `start` to `stop`, and after (each may be empty)."""
    empty: Axis = Const(0, UNIT)
    before, middle, after = empty, axis, empty
    if stop < axis.extent:
        middle, after = split(middle, stop) if stop else (empty, middle)
    if start:
        before, middle = split(middle, start) if start < middle.extent else (middle, empty)
    return before, middle, after


def explode(axis: Axis) -> list[Axis]:
    """The axis as one single-unit axis per position: for index maps that follow no pattern."""
    axis = resolve(axis)
    if isinstance(axis, Const):
        return [Const(1, axis.reason)] * axis.extent
    if isinstance(axis, Var):
        if axis.extent == 1:
            return [axis]
        units: list[Axis] = [Var(1) for _ in range(axis.extent)]
        axis.bound = Sum(tuple(units))
        return units
    if isinstance(axis, Sum):
        return [unit for term in axis.terms for unit in explode(term)]
    grid: list[tuple[Axis, ...]] = [()]
    for factor in axis.factors:
        grid = [(*head, unit) for head in grid for unit in explode(factor)]
    return [product(cell) for cell in grid]


def _unify_products(a: Axis, b: Axis, reason: Reason) -> None:
    """Align the factors from the right, splitting the larger one wherever it divides."""
    left, right = _factors(a), _factors(b)
    while left and right:
        x, y = _pop_factor(left), _pop_factor(right)
        if x.extent == y.extent:
            unify(x, y, reason)
        elif x.extent == 1 or y.extent == 1:
            single, other, stack = (x, y, right) if x.extent == 1 else (y, x, left)
            pin(single, reason)
            stack.append(other)
        elif x.extent % y.extent == 0 and (cut := _factor(x, y.extent, reason)):
            left.append(cut[0])
            unify(cut[1], y, reason)
        elif y.extent % x.extent == 0 and (cut := _factor(y, x.extent, reason)):
            right.append(cut[0])
            unify(cut[1], x, reason)
        else:
            for axis in (x, y, *left, *right):
                pin(axis, Reason("layout", f"two layouts of one axis, {a} and {b}", reason.node))
            return
    for axis in (*left, *right):
        pin(axis, reason)


def _factors(axis: Axis) -> list[Axis]:
    return list(axis.factors) if isinstance(axis, Product) else [axis]


def _pop_factor(stack: list[Axis]) -> Axis:
    axis = resolve(stack.pop())
    if isinstance(axis, Product):
        stack.extend(axis.factors[:-1])
        return axis.factors[-1]
    return axis


def _factor(axis: Axis, minor: int, reason: Reason) -> tuple[Axis, Axis] | None:
    """The axis as (major, minor) with the given minor extent, or None where a sum prevents it."""
    if isinstance(axis, Const):
        return Const(axis.extent // minor, axis.reason), Const(minor, axis.reason)
    if isinstance(axis, Var):
        pair = Var(axis.extent // minor), Var(minor)
        axis.bound = Product(pair)
        return pair
    if not isinstance(axis, Sum) or any(term.extent % minor for term in axis.terms):
        return None
    shared: Axis = Var(minor)
    majors: list[Axis] = []
    for term in axis.terms:
        major = fresh(term.extent // minor)
        unify(term, product((major, shared)), reason)
        majors.append(major)
    return concat(majors), resolve(shared)


def take(axis: Axis, index: Sequence[int] | IntArray, limit: int, reason: Reason) -> Axis | None:
    """The axis made of the positions `index` of another, or None if that needs more than `limit` units.

    Runs of consecutive positions stay whole; a stride or a shuffle (rows and columns swapped) becomes a
    product; anything else is cut into single units.
    """
    positions = np.asarray(index, dtype=np.int64)
    axis = resolve(axis)
    if positions.size == 0 or isinstance(axis, Const):
        return Const(positions.size, axis.reason if isinstance(axis, Const) else UNIT)
    breaks = np.flatnonzero(np.diff(positions) != 1) + 1
    runs = [(int(run[0]), int(run[-1]) + 1) for run in np.split(positions, breaks)]
    if len(runs) == 1 or len(runs) * 4 <= positions.size:
        return concat([slice_axis(axis, start, stop)[1] for start, stop in runs])
    if (grid := _grid(axis.extent, positions)) is not None:
        major, minor = fresh(axis.extent // grid), fresh(grid)
        if positions.size == axis.extent:
            unify(axis, product((major, minor)), reason)
            return product((minor, major))
        unify(axis, product((major, Const(grid, reason))), reason)
        return resolve(major)
    if axis.extent > limit or positions.size > limit:
        return None
    units = explode(axis)
    return concat([units[position] for position in positions])


def _grid(size: int, positions: IntArray) -> int | None:
    """The row length of a stride over, or a shuffle of, `size` positions; None for anything else."""
    step = int(positions[1] - positions[0])
    if step < 2 or size % step:
        return None
    rows = np.arange(size).reshape(size // step, step)
    if np.array_equal(positions, rows.T.ravel()):
        return step
    start = int(positions[0])
    return step if start < step and np.array_equal(positions, rows[:, start]) else None
