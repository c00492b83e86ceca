"""What a model costs as a function of the units kept: multiply-accumulates, parameters, bytes.

Every label of every declaration has an extent that is a polynomial in the kept counts, so the cost of
a plan is known exactly before anything is cut.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

from onnxprune import axes
from onnxprune.axes import Axis, Var
from onnxprune.dependency import DependencyGraph
from onnxprune.model import WEIGHTS, bits_of
from onnxprune.sizes import is_dynamic

Counts = dict[Var, int]
# One term of a cost: a constant factor times the product of the extents of some axes.
Term = tuple[int, tuple[Axis, ...]]
# What counts once, as alternatives: the first one counts of which a node is left (no nodes: always).
Entry = tuple[tuple[frozenset[int], Term], ...]
Measure = Literal["macs", "params", "bytes", "time"]


@dataclass(frozen=True, slots=True)
class Cost:
    """Multiply-accumulates of one inference, elements and bytes of the weights, channels.

    Dynamic dimensions count at the sizes of the analysis, a dynamic batch as 1. `channels` are the
    units of all groups; `time` is what the multiply-accumulates cost where they have prices, batch and all.
    """

    macs: int
    params: int
    bytes: int
    channels: int
    time: int = 0

    def as_dict(self) -> dict[str, int]:
        """What does not depend on prices."""
        return {name: getattr(self, name) for name in ("channels", "params", "macs", "bytes")}

    def ratio(self, other: Cost) -> dict[str, float]:
        """This cost as shares of another."""
        return {
            name: getattr(self, name) / max(getattr(other, name), 1)
            for name in ("channels", "params", "macs", "bytes")
        }


class CostModel:
    """The cost polynomials of a model, or of what is left of it when the nodes in `gone` are taken out.

    prices  of a multiply-accumulate in each node, by index
    """

    def __init__(
        self,
        graph: DependencyGraph,
        gone: frozenset[int] = frozenset(),
        prices: Mapping[int, int] = MappingProxyType({}),
    ) -> None:
        self.graph = graph
        self.gone = gone
        self.prices = prices
        self._batch = _batch(graph)
        self._entries = _entries(graph)
        self._entries["time"] = [_priced(entry, prices) for entry in self._entries["macs"]] if prices else []
        self._macs = _left(self._entries["macs"], gone)
        self._params = _left(self._entries["params"], gone)
        self._bytes = _left(self._entries["bytes"], gone)
        self._time = _left(self._entries["time"], gone)

    def __call__(self, counts: Mapping[Var, int] | None = None) -> Cost:
        kept = dict(counts or {})
        channels = sum(kept.get(g.var, g.size) for g in self.graph.groups)
        return Cost(
            _total(self._macs, kept) // self._batch,
            _total(self._params, kept),
            _total(self._bytes, kept) // 8,
            channels,
            _total(self._time, kept),
        )

    def work(self, counts: Mapping[Var, int] | None = None) -> dict[int, int]:
        """Multiply-accumulates of each node, by index, batch and all."""
        found: dict[int, int] = {}
        for ((nodes, term),) in self._entries["macs"]:
            for node in nodes - self.gone:
                found[node] = found.get(node, 0) + _total([term], dict(counts or {}))
        return found

    def ledger(self, name: Measure) -> Ledger:
        """One of the costs at full counts, to be followed through changes."""
        return Ledger(self._entries[name], self.gone, {"macs": self._batch, "bytes": 8}.get(name, 1))

    def prunable_share(self) -> dict[str, float]:
        """The share of parameters and MACs that touch at least one group."""
        shares = {}
        for name, terms in (("params", self._params), ("macs", self._macs)):
            total = _total(terms, {})
            inside = _total([t for t in terms if any(True for a in t[1] for _ in axes.free_vars(a))], {})
            shares[name] = inside / max(total, 1)
        return shares

    def of_group(self, var: Var) -> dict[str, float]:
        """The share of parameters and MACs that one group takes part in."""
        shares = {}
        for name, terms in (("params", self._params), ("macs", self._macs)):
            inside = [t for t in terms if any(v is var for a in t[1] for v in axes.free_vars(a))]
            shares[name] = _total(inside, {}) / max(_total(terms, {}), 1)
        return shares


class Ledger:
    """One cost, kept up to date while counts change and nodes go; a change costs what it touches.

    total   the cost times `unit`, a whole number: `CostModel` gives `total // unit`

    Every term is a factor times a product of extents, and an extent is a sum of monomials in the counts. The
    slope of each extent (the sum of the terms it is in, divided by it) is kept too, so that the price of a
    unit of the residual stream, which is in every term, is known at once.
    """

    def __init__(self, entries: Iterable[Entry], gone: frozenset[int], unit: int) -> None:
        self.unit = unit
        self.total = 0
        self.counts: Counts = {}
        self._values: list[int] = []
        self._slopes: list[int] = []
        self._extents: dict[object, int] = {}
        self._monomials: list[dict[tuple[Var, ...], int]] = []
        # For each Var the extents it is in, each with (coefficient, power, other Vars) per monomial.
        self._inside: dict[Var, list[tuple[int, list[tuple[int, int, tuple[Var, ...]]]]]] = {}
        self._terms: list[tuple[int, tuple[int, ...]]] = []
        self._terms_of: dict[Var, list[int]] = {}
        self._curved: dict[Var, list[int]] = {}  # terms where a Var is in several factors
        self._active: dict[int, None] = {}
        self._entries: list[tuple[tuple[frozenset[int], int], ...]] = []
        self._read: dict[int, list[int]] = {}  # node: entries
        self._counted: list[int] = []  # the term of each entry that counts now, -1 for none
        self._gone: Counter[int] = Counter(gone)
        for entry in entries:
            self._enter(entry)

    def set(self, var: Var, count: int) -> None:
        """Keep `count` units of a Var."""
        old = self.counts.get(var, var.extent)
        if old == count:
            return
        terms = [t for t in self._terms_of.get(var, ()) if t in self._active]
        for t in terms:
            self._count(t, -1)
        for extent, change in self._changes(var, old, count):
            self._values[extent] += change
        self.counts[var] = count
        for t in terms:
            self._count(t, 1)

    def saving(self, var: Var, count: int) -> int:
        """By how much the total falls when `count` units of a Var are kept (negative where it rises)."""
        old = self.counts.get(var, var.extent)
        changes = self._changes(var, old, count)
        change = sum(self._slopes[extent] * by for extent, by in changes)
        curved = self._curved.get(var)
        if curved:
            moved = dict(changes)
            for t in curved:
                if t in self._active:
                    change += self._curvature(t, moved)
        return -change

    def affine(self, var: Var) -> bool:
        """Whether every unit of a Var costs the same, whatever the other counts are."""
        powers = (power for _, monomials in self._inside.get(var, ()) for _, power, _ in monomials)
        return var not in self._curved and all(power == 1 for power in powers)

    def take_out(self, nodes: Iterable[int]) -> None:
        """Take nodes out; a node that is taken out twice comes back when it is put back twice."""
        fresh = [node for node in nodes if not self._add(node, 1)]
        self._choose(fresh)

    def put_back(self, nodes: Iterable[int]) -> None:
        """Undo `take_out`."""
        self._choose([node for node in nodes if self._add(node, -1) == 1])

    def entries_of(self, nodes: Iterable[int]) -> dict[int, None]:
        """What these nodes have a part in."""
        return dict.fromkeys(e for node in nodes for e in self._read.get(node, ()))

    def of_entries(self, entries: Iterable[int]) -> int:
        """The total of some entries, at the present counts."""
        terms = (self._terms[self._counted[e]] for e in entries if self._counted[e] >= 0)
        return sum(factor * math.prod(self._values[e] for e in extents) for factor, extents in terms)

    def tangent(self, logarithmic: bool) -> Tangent:
        """A lower bound of the total that is a sum over Vars, and equal to it at the present counts.

        A product of counts is convex in their logarithms, so that its tangent there is a lower bound
        everywhere. The plain tangent is one for counts that are nowhere above the present ones: a unit never
        saves more than while all others are there. What is a sum over Vars as it is stays exact.
        """
        found = Tangent(0.0, {}, {})
        for t in self._active:
            factor, extents = self._terms[t]
            alone = {var for e in extents for monomial in self._monomials[e] for var in monomial}
            if len(alone) <= 1 or (
                len(extents) == 1 and all(len(m) < 2 for m in self._monomials[extents[0]])
            ):
                self._separable(found, factor, extents)
                continue
            value = factor * math.prod(self._values[e] for e in extents)
            found.constant += value
            for e in extents:
                for monomial, coefficient in self._monomials[e].items():
                    share = value * coefficient * self._value(monomial) / max(self._values[e], 1)
                    for var in monomial:
                        if logarithmic:
                            found.logs[var] = found.logs.get(var, 0.0) + share
                        else:
                            found.constant -= share
                            found.add(var, 1, share / self._value((var,)))
        return found

    def _separable(self, found: Tangent, factor: int, extents: tuple[int, ...]) -> None:
        """Add a term that is a sum over Vars already."""
        expanded: dict[tuple[Var, ...], int] = {(): factor}
        for e in extents:
            expanded = _times(expanded, self._monomials[e])
        for monomial, coefficient in expanded.items():
            if not monomial:
                found.constant += coefficient
            else:
                found.add(monomial[0], len(monomial), coefficient)

    def _value(self, monomial: tuple[Var, ...]) -> int:
        return math.prod(self.counts.get(var, var.extent) for var in monomial)

    def _changes(self, var: Var, old: int, new: int) -> list[tuple[int, int]]:
        """(extent, change) of every extent that a Var is in."""
        found = []
        for extent, monomials in self._inside.get(var, ()):
            change = 0
            for coefficient, power, rest in monomials:
                by = new - old if power == 1 else new**power - old**power
                change += coefficient * by * (self._value(rest) if rest else 1)
            found.append((extent, change))
        return found

    def _curvature(self, t: int, moved: Mapping[int, int]) -> int:
        """The change of a term less its linear part."""
        factor, extents = self._terms[t]
        values = [self._values[e] for e in extents]
        changes = [moved.get(e, 0) for e in extents]
        whole = math.prod(v + c for v, c in zip(values, changes, strict=True)) - math.prod(values)
        for i, change in enumerate(changes):
            whole -= change * math.prod(values[:i]) * math.prod(values[i + 1 :])
        return factor * whole

    def _count(self, t: int, sign: int) -> None:
        factor, extents = self._terms[t]
        factor *= sign
        values, slopes = self._values, self._slopes
        if len(extents) == 1:
            slopes[extents[0]] += factor
            self.total += factor * values[extents[0]]
        elif len(extents) == 2:
            a, b = extents
            slopes[a] += factor * values[b]
            slopes[b] += factor * values[a]
            self.total += factor * values[a] * values[b]
        else:
            at = [values[e] for e in extents]
            for i, e in enumerate(extents):
                slopes[e] += factor * math.prod(at[:i]) * math.prod(at[i + 1 :])
            self.total += factor * math.prod(at)

    def _add(self, node: int, by: int) -> int:
        before = self._gone[node]
        self._gone[node] += by
        return before

    def _choose(self, nodes: Iterable[int]) -> None:
        """Count the alternative that counts now, of every entry of these nodes."""
        for e in self.entries_of(nodes):
            now = self._alternative(e)
            if now != self._counted[e]:
                self._switch(self._counted[e], -1)
                self._switch(now, 1)
                self._counted[e] = now

    def _switch(self, t: int, sign: int) -> None:
        if t < 0:
            return
        self._count(t, sign)
        if sign > 0:
            self._active[t] = None
        else:
            del self._active[t]

    def _alternative(self, e: int) -> int:
        for nodes, t in self._entries[e]:
            if not nodes or any(self._gone.get(node, 0) == 0 for node in nodes):
                return t
        return -1

    def _enter(self, entry: Entry) -> None:
        self._entries.append(tuple((nodes, self._new_term(term)) for nodes, term in entry))
        e = len(self._entries) - 1
        for node in dict.fromkeys(node for nodes, _ in entry for node in sorted(nodes)):
            self._read.setdefault(node, []).append(e)
        self._counted.append(self._alternative(e))
        self._switch(self._counted[e], 1)

    def _new_term(self, term: Term) -> int:
        factor, operand = term
        extents: list[int] = []
        for axis in operand:
            for part in axis.factors if isinstance(axis, axes.Product) else (axis,):
                if isinstance(part, axes.Const):
                    factor *= part.extent
                else:
                    extents.append(self._extent(part))
        t = len(self._terms)
        self._terms.append((factor, tuple(extents)))
        times = Counter(var for e in extents for var in {v: None for m in self._monomials[e] for v in m})
        for var, factors in times.items():
            self._terms_of.setdefault(var, []).append(t)
            if factors > 1:
                self._curved.setdefault(var, []).append(t)
        return t

    def _extent(self, axis: Axis) -> int:
        monomials = _polynomial(axis)
        key = tuple(monomials.items())
        if key in self._extents:
            return self._extents[key]
        e = self._extents[key] = len(self._values)
        self._monomials.append(monomials)
        self._values.append(sum(c * self._value(m) for m, c in monomials.items()))
        self._slopes.append(0)
        parts: dict[Var, list[tuple[int, int, tuple[Var, ...]]]] = {}
        for monomial, coefficient in monomials.items():
            for var, power in Counter(monomial).items():
                rest = tuple(v for v in monomial if v is not var)
                parts.setdefault(var, []).append((coefficient, power, rest))
        for var, found in parts.items():
            self._inside.setdefault(var, []).append((e, found))
        return e


@dataclass(slots=True)
class Tangent:
    """constant + sum over Vars of: coefficient * count^power, and weight * ln(count / present count)."""

    constant: float
    powers: dict[Var, dict[int, float]]
    logs: dict[Var, float]

    def add(self, var: Var, power: int, coefficient: float) -> None:
        powers = self.powers.setdefault(var, {})
        powers[power] = powers.get(power, 0) + coefficient


def _polynomial(axis: Axis) -> dict[tuple[Var, ...], int]:
    """The extent of a resolved axis: monomial (Vars in order of their first use) -> coefficient."""
    if isinstance(axis, axes.Var):
        return {(axis,): 1}
    if isinstance(axis, axes.Const):
        return {(): axis.extent}
    if isinstance(axis, axes.Product):
        product: dict[tuple[Var, ...], int] = {(): 1}
        for factor in axis.factors:
            product = _times(product, _polynomial(factor))
        return product
    total: dict[tuple[Var, ...], int] = {}
    for term in axis.terms:
        for monomial, coefficient in _polynomial(term).items():
            total[monomial] = total.get(monomial, 0) + coefficient
    return total


def _times(a: Mapping[tuple[Var, ...], int], b: Mapping[tuple[Var, ...], int]) -> dict[tuple[Var, ...], int]:
    product: dict[tuple[Var, ...], int] = {}
    for x, c in a.items():
        for y, d in b.items():
            product[x + y] = product.get(x + y, 0) + c * d
    return product


def _entries(graph: DependencyGraph) -> dict[str, list[Entry]]:
    """What makes up each cost, whatever nodes go."""
    macs: list[Entry] = []
    typed: dict[str, list[tuple[frozenset[int], tuple[Axis, ...]]]] = {}
    for link in graph.links:
        node = frozenset((link.node.index,))
        for product in link.rule.products:
            if any(name in link.labels for name in product):
                macs.append(((node, _term(1, [link.labels[n] for n in product if n in link.labels])),))
        for i, operand in enumerate(link.inputs):
            if operand is not None and graph.is_parameter(link.node.inputs[i]):
                typed.setdefault(link.node.inputs[i], []).append((node, tuple(operand)))
    for name, tensor in graph.model.constants.items():
        uses = typed.get(name, [])
        readers = frozenset(node.index for node in graph.model.consumers.get(name, ()))
        if tensor.dims and not (uses and readers.issubset(frozenset().union(*(nodes for nodes, _ in uses)))):
            whole = tuple(axes.Const(d, axes.UNIT) for d in tensor.dims)
            typed.setdefault(name, []).append((readers, whole))
    params: list[Entry] = []
    stored: list[Entry] = []
    for name, uses in typed.items():
        constant = graph.model.constants.get(name)
        element = constant.data_type if constant is not None else 1
        if element in WEIGHTS:
            params.append(tuple((nodes, _term(1, shape)) for nodes, shape in uses))
        if constant is not None:
            stored.append(tuple((nodes, _term(_bits(element), shape)) for nodes, shape in uses))
    return {"macs": macs, "params": params, "bytes": stored}


def _priced(entry: Entry, prices: Mapping[int, int]) -> Entry:
    """What multiply-accumulates cost."""
    return tuple(
        (nodes, (factor * max(prices.get(node, 0) for node in nodes), operand))
        for nodes, (factor, operand) in entry
    )


def _left(entries: Iterable[Entry], gone: frozenset[int]) -> list[Term]:
    """The terms that count when nodes are gone."""
    first = (next((term for nodes, term in e if not nodes or not nodes <= gone), None) for e in entries)
    return [term for term in first if term is not None]


def _term(factor: int, operand: Iterable[Axis]) -> Term:
    """Constant axes folded into the factor."""
    rest: list[Axis] = []
    for axis in operand:
        resolved = axes.resolve(axis)
        if any(True for _ in axes.free_vars(resolved)):
            rest.append(resolved)
        else:
            factor *= resolved.extent
    return factor, tuple(rest)


def _total(terms: list[Term], counts: Counts) -> int:
    total = 0
    for factor, operand in terms:
        for axis in operand:
            factor *= axes.extent(axis, counts)
        total += factor
    return total


def _bits(element: int) -> int:
    """Of one element as it is stored."""
    try:
        return bits_of(element)
    except (KeyError, ValueError):
        return 8


def _batch(graph: DependencyGraph) -> int:
    """The size given to a dynamic batch dimension during analysis."""
    for value in graph.model.inputs:
        dims = value.type.tensor_type.shape.dim
        if dims and is_dynamic(dims[0]):
            shape = graph.shapes.shapes.get(value.name)
            return shape[0] if shape and shape[0] else 1
    return 1
