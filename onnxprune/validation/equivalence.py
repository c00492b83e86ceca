"""Translation validation: the pruned model must equal the masked original on real inputs.

Both run in onnxruntime (optimisations off) on several seeded inputs, at two batch sizes and two lengths
where axes are dynamic. It needs no data and no labels, and holds whatever was removed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import onnx

from onnxprune.axes import Keep, kept_positions
from onnxprune.dependency import DependencyGraph
from onnxprune.errors import UserError
from onnxprune.model import FLOATS
from onnxprune.runtime import Feeds, RunError, Session, index_bounds, make_feeds
from onnxprune.sizes import Sizes, assignments, dynamic_dims
from onnxprune.validation import comparable
from onnxprune.validation.masked import masked

TOLERANCE = 1e-4  # of the largest value of an output, for float32 and float64
TOLERANCE_16 = 1e-2  # the same where weights are float16 or bfloat16
OPTIMISED_TOLERANCE = 1e-2  # between a model with and without onnxruntime's optimisations
RUNS = 2
RETRIES = 3  # further seeds where an output behind a ranking (TopK, NonMaxSuppression) differs


@dataclass(frozen=True)
class Equivalence:
    """The verdict: the largest difference of any output, as a share of that output's largest value."""

    error: float
    tolerance: float
    outputs: tuple[str, ...]
    sizes: tuple[Sizes, ...]
    notes: tuple[str, ...] = ()

    @property
    def passed(self) -> bool:
        return self.error <= self.tolerance

    def as_dict(self) -> dict[str, Any]:
        return {**asdict(self), "passed": self.passed}


def check(graph: DependencyGraph, keep: Keep, pruned: onnx.ModelProto) -> Equivalence:
    """Compare a pruned model with the masked original.

    Raises `UserError` if onnxruntime cannot run the original, `RunError` if it cannot run the pruned one.
    """
    reference = masked(graph, keep)
    notes: list[str] = []
    if foreign := comparable.foreign(reference):
        notes.append(f"onnxruntime has no {', '.join(foreign)}; the graph was checked around it")
        reference, pruned = comparable.around(graph, reference), comparable.around(graph, pruned)
    if any(node.op_type == "QuantizeLinear" for node in reference.graph.node):
        notes.append("checked without the rounding of activations (QuantizeLinear)")
        reference, pruned = comparable.unrounded(reference), comparable.unrounded(pruned)
    names = _compared(graph, reference, pruned, keep)
    runs, expected = _reference_runs(graph, reference, names)
    del reference
    session = Session(pruned, expose=_inner(pruned, names, graph))
    worst = 0.0
    for _, feeds, want in runs:
        worst = max(worst, _difference(want, session.run(feeds, names)))
    tolerance = _tolerance(graph)
    if worst > tolerance and expected is not None:
        again = [_difference(want, session.run(feeds, names)) for feeds, want in expected()]
        if again and min(again) <= tolerance:
            notes.append("an order decided by nearly equal values differed on some inputs")
            worst = min(again)
    if worst <= tolerance and names:
        why = _optimised(graph, pruned, session, [feeds for _, feeds, _ in runs], names)
        if why is not None:
            raise RunError(why)
    if not any(
        (value != value.flat[0]).any() for _, _, want in runs for value in want.values() if value.size
    ):
        notes.append("the outputs are constant on these inputs, so the check says little")
    return Equivalence(worst, tolerance, tuple(names), tuple(sizes for sizes, _, _ in runs), tuple(notes))


def _optimised(
    graph: DependencyGraph, pruned: onnx.ModelProto, plain: Session, feeds: list[Feeds], names: list[str]
) -> str | None:
    """Why the pruned model fails where onnxruntime optimises it (it trusts the shapes stated in the file
    there); None if it does not, or if the original fails in the same way. The basic level does that; at the
    higher ones onnxruntime can crash on odd graphs and take the process along."""

    def failure(proto: onnx.ModelProto, plain: Session) -> str | None:
        try:
            session = Session(proto, "basic", expose=_inner(proto, names, graph))
            worst = max(_difference(plain.run(feed, names), session.run(feed, names)) for feed in feeds)
        except RunError as error:
            return str(error)
        return f"outputs differ by {worst:.1e}" if worst > OPTIMISED_TOLERANCE else None

    why = failure(pruned, plain)
    if why is None:
        return None
    original = graph.model.proto
    try:
        fails_too = failure(original, Session(original, expose=_inner(original, names, graph))) is not None
    except RunError:
        fails_too = True
    return None if fails_too else f"with basic optimisations: {why}"


Run = tuple[Sizes, Feeds, dict[str, Any]]
Retry = Callable[[], Iterator[tuple[Feeds, dict[str, Any]]]]


def _reference_runs(
    graph: DependencyGraph, reference: onnx.ModelProto, names: list[str]
) -> tuple[list[Run], Retry | None]:
    """Run the masked original at sizes it accepts; and more seeds, later, where it ranks values."""
    model = graph.model
    try:
        session = Session(reference, expose=_inner(reference, names, graph))
    except RunError as error:
        raise UserError(
            f"{model.name}: onnxruntime cannot load the model: {error}; nothing was written"
        ) from None
    bounds = index_bounds(model, graph.shapes.shapes)
    extra = [v for v in reference.graph.input if v.name not in {i.name for i in model.proto.graph.input}]
    runs: list[Run] = []
    failure = ""
    for seed, sizes in enumerate(candidate_sizes(graph)):
        try:
            feeds = make_feeds(model, sizes, seed, bounds) | comparable.extra_feeds(extra, seed)
            want = session.run(feeds, names)
        except RunError as error:
            failure = failure or str(error)
            continue
        runs.append((sizes, feeds, want))
        if len(runs) == RUNS:
            break
    if not runs:
        raise UserError(f"{model.name}: onnxruntime cannot run the model: {failure}; nothing was written")

    def more() -> Iterator[tuple[Feeds, dict[str, Any]]]:
        sizes = runs[0][0]
        for seed in range(100, 100 + RETRIES):
            feeds = make_feeds(model, sizes, seed, bounds) | comparable.extra_feeds(extra, seed)
            yield feeds, session.run(feeds, names)

    ranked = any(node.op in _RANKING or node.captured for node in model.nodes)
    return runs, more if ranked else None


_RANKING = {"TopK", "NonMaxSuppression", "ArgMax", "ArgMin", "NonZero", "Round", "Loop", "If"}


def candidate_sizes(graph: DependencyGraph) -> Iterator[Sizes]:
    """Sizes of dynamic dimensions to run at, most telling first."""
    shapes = graph.shapes
    yield shapes.sizes
    if shapes.other is not None and shapes.other.sizes != shapes.sizes:
        yield shapes.other.sizes
    keys = dynamic_dims(graph.model)
    if keys:
        yield from assignments(keys)
        yield from (dict.fromkeys(keys, size) for size in (1, 2, 8, 32, 64, 256))
    yield shapes.sizes


def _tolerance(graph: DependencyGraph) -> float:
    halves = (onnx.TensorProto.FLOAT16, onnx.TensorProto.BFLOAT16)
    half = any(t.data_type in halves for t in graph.model.constants.values())
    return TOLERANCE_16 if half else TOLERANCE


def _difference(want: Mapping[str, Any], got: Mapping[str, Any]) -> float:
    """The largest |want - got| / max |want| over the outputs; infinite where shapes or finiteness differ."""
    worst = 0.0
    for name, a in want.items():
        b = got[name]
        if not isinstance(a, np.ndarray) or not isinstance(b, np.ndarray) or a.shape != b.shape:
            if isinstance(a, np.ndarray):
                return float("inf")
            continue
        if not a.size:
            continue
        x, y = a.astype(np.float64), b.astype(np.float64)
        finite = np.isfinite(x)
        if (finite != np.isfinite(y)).any() or not np.array_equal(x[~finite], y[~finite], equal_nan=True):
            return float("inf")
        if finite.any():
            scale = max(float(np.abs(x[finite]).max()), 1e-30)
            worst = max(worst, float(np.abs(x[finite] - y[finite]).max()) / scale)
    return worst


def _compared(
    graph: DependencyGraph, reference: onnx.ModelProto, pruned: onnx.ModelProto, keep: Keep
) -> list[str]:
    """The tensors to compare: float outputs, in front of saturating functions where no cut touches the
    tensor there; for each other output the nearest such float tensors it depends on."""
    elements = graph.shapes.elements
    producers = {o: node for node in reference.graph.node for o in node.output}
    both = {o for node in pruned.graph.node for o in node.output} & set(producers)
    names: dict[str, None] = {}

    def whole(name: str) -> bool:
        typed = graph.types.get(name)
        cut = typed is None or any(kept_positions(axis, keep) is not None for axis in typed)
        return not cut and name in both and elements.get(name) in FLOATS

    for output in reference.graph.output:
        waiting, seen = [output.name], {output.name}
        while waiting:
            name = waiting.pop()
            element = elements.get(name) or _stated(graph, name)
            if (name == output.name and element in FLOATS) or whole(name):
                names[_unsaturated(graph, name, whole)] = None
            elif name in producers:
                fresh = [i for i in producers[name].input if i and i not in seen]
                seen.update(fresh)
                waiting.extend(fresh)
    return list(names)


# Functions that flatten differences: far from zero their results say little about their inputs.
_SATURATING = {"Sigmoid", "HardSigmoid", "Softmax", "LogSoftmax", "Tanh", "Erf", "Clip", "Identity"}


def _unsaturated(graph: DependencyGraph, name: str, whole: Callable[[str], bool]) -> str:
    """The float tensor in front of the saturating functions that end in `name`."""
    while (node := graph.model.producers.get(name)) is not None and node.op in _SATURATING:
        if not whole(node.inputs[0]):
            break
        name = node.inputs[0]
    return name


def _stated(graph: DependencyGraph, name: str) -> int:
    for output in graph.model.outputs:
        if output.name == name:
            return int(output.type.tensor_type.elem_type)
    return 0


def _inner(proto: onnx.ModelProto, names: list[str], graph: DependencyGraph) -> list[onnx.ValueInfoProto]:
    """The compared tensors that are no outputs of the model."""
    known = {o.name for o in proto.graph.output}
    elements = graph.shapes.elements
    return [
        onnx.helper.make_tensor_value_info(name, elements.get(name, 0), None)
        for name in names
        if name not in known
    ]
