"""Holds what a declaration says of an operator against what onnxruntime computes.

The index arithmetic here is written anew, on purpose: nothing of `onnxprune.axes` is used.
"""

from __future__ import annotations

import functools
import math
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime as ort
from onnx import helper, numpy_helper

from onnxprune.ops import NodeView, OpSpec, Pinned, Resize, Rule, Sample, Take
from onnxprune.ops.spec import AxisPattern, Pattern

Array = npt.NDArray[Any]
Keep = Mapping[str, Array]  # label -> units that stay

RANGES = ((-2.0, 2.0), (0.1, 2.0), (-2.0, -0.1))  # extrema only tell on data of one sign
TOLERANCE = 1e-4

RUN_ERRORS = (
    ort.capi.onnxruntime_pybind11_state.Fail,
    ort.capi.onnxruntime_pybind11_state.InvalidArgument,
    ort.capi.onnxruntime_pybind11_state.InvalidGraph,
    ort.capi.onnxruntime_pybind11_state.RuntimeException,
    ort.capi.onnxruntime_pybind11_state.NotImplemented,
    onnx.shape_inference.InferenceError,
)


class NotRunnableError(Exception):
    """onnxruntime (or shape inference) refuses the node."""


@dataclass(frozen=True)
class Call:
    """One node with its operands; those in `stored` are initializers, the others graph inputs."""

    op: str
    domain: str
    opset: int
    operands: tuple[Array | None, ...]
    attributes: Mapping[str, Any]
    stored: frozenset[int]
    outputs: int

    def run(self) -> list[Array]:
        names = [f"i{i}" if value is not None else "" for i, value in enumerate(self.operands)]
        given = {name: v for name, v in zip(names, self.operands, strict=True) if v is not None}
        stored = {names[i] for i in self.stored}
        results = [f"o{i}" for i in range(self.outputs)]
        node = helper.make_node(self.op, names, results, domain=self.domain, **_plain(self.attributes))
        graph = helper.make_graph(
            [node],
            "one",
            [
                helper.make_tensor_value_info(n, helper.np_dtype_to_tensor_dtype(v.dtype), v.shape)
                for n, v in given.items()
                if n not in stored
            ],
            [onnx.ValueInfoProto(name=name) for name in results],
            [numpy_helper.from_array(v, n) for n, v in given.items() if n in stored],
        )
        opsets = [helper.make_opsetid("", self.opset)]
        if self.domain:
            opsets.append(helper.make_opsetid(self.domain, 1))
        minimum = helper.find_min_ir_version_for(opsets[:1])
        model = helper.make_model(graph, opset_imports=opsets, ir_version=max(8, minimum))
        try:
            if not self.domain:
                model = onnx.shape_inference.infer_shapes(model, data_prop=True)
            session = ort.InferenceSession(model.SerializeToString(), _quiet(), ["CPUExecutionProvider"])
            return session.run(None, {n: v for n, v in given.items() if n not in stored})
        except RUN_ERRORS as error:
            raise NotRunnableError(str(error)) from None


@functools.cache
def _quiet() -> ort.SessionOptions:
    options = ort.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = 1
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    return options


def _plain(attributes: Mapping[str, Any]) -> dict[str, Any]:
    return {k: v.tolist() if isinstance(v, np.ndarray) else v for k, v in attributes.items() if v is not None}


def call(spec: OpSpec, sample: Sample, low: float, high: float) -> Call:
    """The sample with random numbers in [low, high) where it gives only a shape."""
    rng = np.random.default_rng(zlib.crc32(f"{spec.name}{sample.attributes}{low}".encode()))
    operands: list[Array | None] = []
    stored = set()
    for i, given in enumerate(sample.inputs):
        if isinstance(given, tuple):
            operands.append(rng.uniform(low, high, given).astype(np.float32))
        else:
            operands.append(given)
            if given is not None:
                stored.add(i)
    return Call(
        spec.name,
        spec.domain,
        sample.opset,
        tuple(operands),
        sample.attributes,
        frozenset(stored),
        sample.outputs,
    )


def view(this: Call, results: Sequence[Array]) -> NodeView:
    return NodeView(
        this.op,
        this.opset,
        this.attributes,
        tuple(None if v is None else v.shape for v in this.operands),
        tuple(r.shape for r in results),
        lambda i: this.operands[i] if i in this.stored else None,
    )


# --------------------------------------------------------------------------------- index arithmetic


def label_sizes(rule: Rule, ins: Sequence[Any], outs: Sequence[Any]) -> dict[str, int]:
    """Extents of all labels, solved from the shapes; raises AssertionError where they disagree."""
    sizes = dict(rule.sizes)
    axes = [
        (terms, extent)
        for patterns, shapes in ((rule.inputs, ins), (rule.outputs, outs))
        for pattern, shape in zip(patterns, shapes, strict=False)
        if pattern is not None and shape is not None
        for terms, extent in _paired(pattern, shape)
    ]
    for _ in range(len(axes) + 1):
        for terms, extent in axes:
            unknown = [(term, name) for term in terms for name in term if name not in sizes]
            if len(unknown) != 1:
                continue
            (term, name) = unknown[0]
            rest = extent - sum(math.prod(sizes[n] for n in t) for t in terms if t is not term)
            inside = math.prod(sizes[n] for n in term if n != name)
            assert rest % inside == 0, f"{name} does not divide {extent}"
            sizes[name] = rest // inside
    for terms, extent in axes:
        missing = [n for term in terms for n in term if n not in sizes]
        assert not missing, f"no size follows for {missing}"
        stated = sum(math.prod(sizes[n] for n in term) for term in terms)
        assert stated == extent, f"an axis of {extent} is declared as {terms} with {sizes}"
    for name, other in rule.tied.items():
        assert sizes[name] == sizes[other], f"{name} is tied to {other}, but their sizes differ"
    return sizes


def _paired(pattern: Pattern, shape: Sequence[int]) -> Iterator[tuple[AxisPattern, int]]:
    assert len(pattern) == len(shape), f"pattern {pattern} has not the rank of {tuple(shape)}"
    yield from zip(pattern, shape, strict=True)


def kept(terms: AxisPattern, sizes: Mapping[str, int], keep: Keep) -> Array:
    """Positions that stay on an axis: the labelled arange with the other units taken out."""
    parts = [np.empty(0, np.int64)]
    offset = 0
    for term in terms:
        shape = [sizes[name] for name in term]
        grid = np.arange(math.prod(shape)).reshape(shape)
        for axis, name in enumerate(term):
            if name in keep:
                grid = grid.take(keep[name], axis=axis)
        parts.append(grid.ravel() + offset)
        offset += math.prod(shape)
    return np.concatenate(parts)


def cut(array: Array, pattern: Pattern, sizes: Mapping[str, int], keep: Keep) -> Array:
    for axis, terms in enumerate(pattern):
        array = array.take(kept(terms, sizes, keep), axis=axis)
    return array


def zeroed(array: Array, pattern: Pattern, sizes: Mapping[str, int], keep: Keep, zero: Array) -> Array:
    mask = np.zeros(array.shape, dtype=bool)
    mask[np.ix_(*(kept(terms, sizes, keep) for terms in pattern))] = True
    return np.where(mask, array, zero.astype(array.dtype))


# -------------------------------------------------------------------------------------- the equations


@dataclass(frozen=True)
class Trial:
    """A sample with one draw of data, its results and its rule."""

    call: Call
    results: tuple[Array, ...]
    rule: Rule
    sizes: Mapping[str, int]

    def smaller(self, keep: Keep) -> list[Array]:
        """The node run on cut operands, with attributes and integer operands restated."""
        operands = [
            v if v is None or i >= len(self.rule.inputs) or (p := self.rule.inputs[i]) is None
            else cut(v, p, self.sizes, keep)
            for i, v in enumerate(self.call.operands)
        ]  # fmt: skip
        attributes = dict(self.call.attributes)
        stored = set(self.call.stored)
        for name, label in self.rule.attributes.items():
            if label in keep:
                attributes[name] = len(keep[label])
        if self.rule.resize is not None:
            for where, value in self.rule.resize(self.change(keep)).items():
                if isinstance(where, str):
                    attributes[where] = value
                    continue
                operands += [None] * (where + 1 - len(operands))
                operands[where] = value
                stored.add(where)
        return replace(
            self.call, operands=tuple(operands), attributes=attributes, stored=frozenset(stored)
        ).run()

    def change(self, keep: Keep) -> Resize:
        def shapes(patterns: Sequence[Pattern | None], values: Sequence[Array | None]) -> list[Any]:
            padded = [*patterns, *[None] * len(values)]
            return [
                None if p is None or v is None else tuple(len(kept(t, self.sizes, keep)) for t in p)
                for p, v in zip(padded, values, strict=False)
            ]

        extents = {name: len(keep[name]) if name in keep else size for name, size in self.sizes.items()}
        return Resize(
            view(self.call, self.results),
            shapes(self.rule.inputs, self.call.operands),
            shapes(self.rule.outputs, self.results),
            extents,
        )

    def expected(self, keep: Keep) -> Iterator[list[Array]]:
        """What the smaller node should give: the results cut, after zeroing what is summed over.

        The zeros may be put on any operand that has the label: one answer for each, and all must agree. Where
        only stored weights have it, they hold it together.
        """
        free = {n: units for n, units in keep.items() if n in self.made}
        summed = {n: units for n, units in keep.items() if n not in self.made}
        holders = [i for i, p in enumerate(self.rule.inputs) if p and summed.keys() & _names(p)]
        holders = [i for i in holders if self.rule.zero.get(i, i) is not None]
        together = len(summed) > 1 or self.call.stored.issuperset(holders)
        choices = [holders] if together else [[holder] for holder in holders]
        for chosen in choices or [[]]:
            operands = list(self.call.operands)
            for i in chosen:
                pattern, operand = self.rule.inputs[i], operands[i]
                if pattern is not None and operand is not None:
                    operands[i] = zeroed(operand, pattern, self.sizes, summed, self.zero(i))
            masked = replace(self.call, operands=tuple(operands)).run() if chosen else self.results
            yield [self.cut_result(i, r, free) for i, r in enumerate(masked)]

    def zero(self, i: int) -> Array:
        """What says nothing in operand i: 0, or its zero point, shaped to be broadcast against it."""
        where, pattern = self.rule.zero.get(i), self.rule.inputs[i] or ()
        value = self.call.operands[where] if where is not None and where < len(self.call.operands) else None
        if where is None or value is None:
            return np.zeros(())
        own = self.rule.inputs[where] or ()
        return value.reshape(
            [n if terms in own else 1 for terms, n in zip(pattern, self.shape(i), strict=True)]
        )

    def shape(self, i: int) -> tuple[int, ...]:
        operand = self.call.operands[i]
        assert operand is not None
        return operand.shape

    @property
    def made(self) -> set[str]:
        """Labels of the outputs."""
        return {name for pattern in self.rule.outputs if pattern for name in _names(pattern)}

    def cut_result(self, i: int, result: Array, keep: Keep) -> Array:
        pattern = self.rule.outputs[i] if i < len(self.rule.outputs) else None
        return result if pattern is None else cut(result, pattern, self.sizes, keep)

    def compared(self) -> list[int]:
        return [i for i, p in enumerate(self.rule.outputs[: len(self.results)]) if p is not None]


def _names(pattern: Pattern) -> set[str]:
    return {name for terms in pattern for term in terms for name in term}


def difference(got: Sequence[Array], want: Sequence[Array], which: Sequence[int]) -> str:
    """How two lists of results differ, or an empty string."""
    for i in which:
        if got[i].shape != want[i].shape:
            return f"output {i} has shape {got[i].shape}, not {want[i].shape}"
        if not np.allclose(got[i], want[i], rtol=TOLERANCE, atol=TOLERANCE, equal_nan=True):
            return f"output {i} differs"
    return ""


def subsets(size: int) -> list[Array]:
    """Units kept: all but one, for each; every second; the last ones."""
    everything = np.arange(size)
    single = [np.delete(everything, i) for i in range(min(size, 6))]
    return [*single, everything[1::2], everything[size // 2 :]]


def varied(array: Array) -> bool:
    """Whether an array holds at least two different values (of one element nothing can be asked)."""
    values = array[np.isfinite(array)] if array.dtype.kind == "f" else array
    return array.size <= 1 or len(np.unique(values)) > 1


# ------------------------------------------------------------------------------------------ the checks


def examine(
    spec: OpSpec, sample: Sample, constant: bool = False, unread: bool = False
) -> dict[str, list[str]]:
    """What is wrong with a declaration on one sample: label -> complaints. Empty where all is well.

    `constant` allows results that do not vary, `unread` units that do not reach them.
    """
    trials: list[Trial] = []
    complaints: dict[str, list[str]] = {}
    for low, high in RANGES:
        this = call(spec, sample, low, high)
        results = this.run()
        rule = spec.declare(view(this, results))
        if isinstance(rule, Pinned):
            return {"": [f"pinned as a whole: {rule.why}"]}
        if isinstance(rule, Take):
            return _examine_take(this, results, rule)
        try:
            shapes = [None if v is None else v.shape for v in this.operands]
            sizes = label_sizes(rule, shapes, [r.shape for r in results])
        except AssertionError as error:
            return {"": [str(error)]}
        trials.append(Trial(this, tuple(results), rule, sizes))
    if not constant and not any(varied(r) for trial in trials for r in trial.results):
        return {"": ["degenerate data: the results do not vary"]}
    for label, size in trials[0].sizes.items():
        if size > 1 and (found := _examine_label(trials, label, unread)):
            complaints[label] = found
    together = _examine_together(trials[0])
    return complaints | ({"*": together} if together else {})


def _examine_label(trials: list[Trial], label: str, unread: bool) -> list[str]:
    rule, size = trials[0].rule, trials[0].sizes[label]
    if label in rule.tied:  # cut with the axis that it is tied to
        return [] if unread or _matters(trials, label) else ["degenerate data: zeroing units changes nothing"]
    together = [label, *(name for name, other in rule.tied.items() if other == label)]
    verdicts = []
    for trial in trials:
        for units in subsets(size):
            verdict = _verdict(trial, dict.fromkeys(together, units))
            verdicts.append(verdict)
            if label not in rule.pinned and label not in rule.lossy and verdict != "":
                return [f"keeping {units.tolist()} of {size}: {verdict}"]
    if label in rule.pinned:
        return [] if any(verdicts) else ["declared pinned, but a cut agrees"]
    if label in rule.lossy:
        broken = [v for v in verdicts if v and not v.endswith("differs")]
        if broken:
            return [f"declared lossy, but the cut node does not run: {broken[0]}"]
        return [] if any(verdicts) else ["declared lossy, but a cut is exact"]
    if label not in trials[0].made and not unread and not _matters(trials, label):
        return ["degenerate data: zeroing units changes nothing"]
    return []


def _verdict(trial: Trial, keep: Keep) -> str:
    """Why the smaller node is not what the rule says, or an empty string."""
    which = trial.compared()
    try:
        got = trial.smaller(keep)
    except NotRunnableError as error:
        return f"does not run ({error})"
    for want in trial.expected(keep):
        if found := difference(got, want, which):
            return found
    return ""


def _matters(trials: list[Trial], label: str) -> bool:
    """Whether the units of a summed label reach the result at all."""
    return any(
        difference(trial.results, want, trial.compared())
        for trial in trials
        for want in trial.expected({label: np.arange(1, trial.sizes[label])})
    )


def _examine_together(trial: Trial) -> list[str]:
    """All labels that may be cut, cut at once."""
    keep = {
        label: subsets(size)[i % 2 - 2 if size > 2 else 0]
        for i, (label, size) in enumerate(trial.sizes.items())
        if size > 1 and label not in {*trial.rule.pinned, *trial.rule.lossy, *trial.rule.tied}
    }
    keep |= {name: keep[other] for name, other in trial.rule.tied.items() if other in keep}
    verdict = _verdict(trial, keep) if keep else ""
    return [f"keeping { ({k: v.tolist() for k, v in keep.items()}) }: {verdict}"] if verdict else []


def _examine_take(this: Call, results: list[Array], rule: Take) -> dict[str, list[str]]:
    """An index map: the result is those positions, and renumbering the index follows any cut."""
    source = this.operands[0]
    assert source is not None
    if not np.array_equal(results[0], source.take(rule.index, axis=rule.axis)):
        return {"take": ["the result is not made of the declared positions"]}
    complaints: dict[str, list[str]] = {}
    for axis, size in enumerate(source.shape):
        for units in subsets(size) if size > 1 else []:
            operands = [source.take(units, axis=axis), *this.operands[1:]]
            want = results[0]
            if axis != rule.axis:
                want = want.take(units, axis=axis)
            elif rule.operand is None:
                continue  # surgery writes a Gather, which has its own samples
            else:
                stays = np.isin(rule.index, units)
                if not stays.any():
                    continue
                index = np.searchsorted(units, rule.index[stays])
                operands[rule.operand] = index.astype(np.int64)
                want = want.take(np.flatnonzero(stays), axis=axis)
            got = replace(this, operands=tuple(operands)).run()
            if found := difference(got, [want], [0]):
                complaints[f"axis {axis}"] = [f"keeping {units.tolist()}: {found}"]
    return complaints


def linearity(spec: OpSpec, sample: Sample) -> dict[str, str]:
    """Each label whose units the rule says are scaled by two operands: what is wrong with that.

    These are the (weight, bias) of `linear`, and `gain` with the shift behind it.
    """
    this = call(spec, sample, *RANGES[0])
    results = this.run()
    rule = spec.declare(view(this, results))
    if not isinstance(rule, Rule) or (rule.linear is None and rule.gain is None):
        return {}
    pair = rule.linear or (rule.gain, (rule.gain or 0) + 1)
    shapes = [None if v is None else v.shape for v in this.operands]
    sizes = label_sizes(rule, shapes, [r.shape for r in results])
    given = [i for i in pair if i is not None and i < len(this.operands) and this.operands[i] is not None]
    made, *scaled = [rule.outputs[0] or (), *(rule.inputs[i] or () for i in given)]
    verdicts: dict[str, str] = {}
    for label in set.intersection(_names(made), *map(_names, scaled)):
        factors = np.linspace(-1.5, 2.0, sizes[label]).astype(np.float32)
        operands = list(this.operands)
        for i, pattern in zip(given, scaled, strict=True):
            operands[i] = _times(operands[i], pattern, sizes, label, factors)
        got = replace(this, operands=tuple(operands)).run()
        verdicts[label] = difference(got, [_times(results[0], made, sizes, label, factors)], [0])
    return verdicts


def _times(array: Any, pattern: Pattern, sizes: Mapping[str, int], label: str, factors: Array) -> Array:
    result = np.array(array)
    for unit in range(sizes[label]):
        where = np.ix_(*(kept(terms, sizes, {label: np.array([unit])}) for terms in pattern))
        result[where] = array[where] * factors[unit]
    return result


def evaluation(spec: OpSpec, sample: Sample) -> str:
    """How the declaration's own evaluation differs from onnxruntime's, or an empty string."""
    assert spec.evaluate is not None
    this = call(spec, sample, *RANGES[1])
    results = this.run()
    got = spec.evaluate(view(this, results), this.operands)
    for i, (mine, theirs) in enumerate(zip(got, results, strict=False)):
        if mine.dtype != theirs.dtype:
            return f"output {i} is {mine.dtype}, not {theirs.dtype}"
    return difference(got, results, range(len(got)))
