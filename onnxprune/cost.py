"""What a model costs as a function of the units kept: multiply-accumulates, parameters, bytes.

Every label of every declaration has an extent that is a polynomial in the kept counts, so the cost of
a plan is known exactly before anything is cut.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from onnxprune import axes
from onnxprune.axes import Axis, Var
from onnxprune.dependency import DependencyGraph
from onnxprune.model import WEIGHTS, bits_of
from onnxprune.sizes import is_dynamic

Counts = dict[Var, int]
# One term of a cost: a constant factor times the product of the extents of some axes.
Term = tuple[int, tuple[Axis, ...]]


@dataclass(frozen=True, slots=True)
class Cost:
    """Multiply-accumulates of one inference, elements and bytes of the weights, channels.

    Dynamic dimensions count at the sizes of the analysis, a dynamic batch as 1. `channels` are the
    units of all groups.
    """

    macs: int
    params: int
    bytes: int
    channels: int

    def ratio(self, other: Cost) -> dict[str, float]:
        """This cost as shares of another."""
        return {
            name: getattr(self, name) / max(getattr(other, name), 1)
            for name in ("channels", "params", "macs", "bytes")
        }


class CostModel:
    """The cost polynomials of a model, or of what is left of it when the nodes in `gone` are taken out."""

    def __init__(self, graph: DependencyGraph, gone: frozenset[int] = frozenset()) -> None:
        self.graph = graph
        links = [link for link in graph.links if link.node.index not in gone]
        self._batch = _batch(graph)
        self._macs: list[Term] = []
        for link in links:
            for product in link.rule.products:
                if any(name in link.labels for name in product):
                    self._macs.append(_term(1, [link.labels[n] for n in product if n in link.labels]))
        self._params: list[Term] = []
        self._bytes: list[Term] = []
        typed: dict[str, tuple[Axis, ...]] = {}
        for link in links:
            for i, operand in enumerate(link.inputs):
                name = link.node.inputs[i] if operand is not None else ""
                if operand is not None and graph.is_parameter(name):
                    typed.setdefault(name, tuple(operand))
        for name, tensor in graph.model.constants.items():
            if name not in typed and tensor.dims and not _all_gone(graph, name, gone):
                typed[name] = tuple(axes.Const(d, axes.UNIT) for d in tensor.dims)
        for name, shape in typed.items():
            element = graph.model.constants[name].data_type if name in graph.model.constants else 1
            if element in WEIGHTS:
                self._params.append(_term(1, shape))
            if name in graph.model.constants:
                self._bytes.append(_term(_bits(element), shape))

    def __call__(self, counts: Mapping[Var, int] | None = None) -> Cost:
        kept = dict(counts or {})
        channels = sum(kept.get(g.var, g.size) for g in self.graph.groups)
        return Cost(
            _total(self._macs, kept) // self._batch,
            _total(self._params, kept),
            _total(self._bytes, kept) // 8,
            channels,
        )

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


def _all_gone(graph: DependencyGraph, name: str, gone: frozenset[int]) -> bool:
    """Whether everything that read a constant is taken out."""
    readers = graph.model.consumers.get(name, ())
    return bool(gone and readers) and all(node.index in gone for node in readers)


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
