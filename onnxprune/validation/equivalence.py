"""Translation validation: the pruned model must equal the masked original on real inputs.

Both run in onnxruntime (optimisations off) on several seeded inputs, at two batch sizes and two lengths
where axes are dynamic. It needs no data and no labels, and holds whatever was removed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import onnx

from onnxprune import flow
from onnxprune.axes import Keep, kept_positions
from onnxprune.blocks import Block
from onnxprune.dependency import DependencyGraph
from onnxprune.errors import UserError
from onnxprune.model import FLOATS, Array
from onnxprune.outputs import unsaturated
from onnxprune.parts import too_large
from onnxprune.runtime import Feeds, OutOfMemory, RunError, Session, inner, make_feeds
from onnxprune.shapes import accepted_runs
from onnxprune.sizes import Sizes
from onnxprune.validation import comparable, in_parts, repeatable, unrounded, widened
from onnxprune.validation.difference import difference
from onnxprune.validation.masked import masked

TOLERANCE = 1e-4  # of the largest value of an output, for float32 and float64
TOLERANCE_16 = 1e-2  # the same where weights are float16 or bfloat16
OPTIMISED_TOLERANCE = 1e-2  # between a model with and without onnxruntime's optimisations
RUNS = 2
SHOWN = 4  # branches named in a note
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


def check(
    graph: DependencyGraph, keep: Keep, pruned: onnx.ModelProto, removed: Sequence[Block] = ()
) -> Equivalence:
    """Compare a pruned model with the masked original.

    Raises `UserError` if onnxruntime cannot run the original, `RunError` if it cannot run the pruned one.
    """
    pair = _runnable(graph, masked(graph, keep, removed), flow.flatten(pruned).proto)
    reference, pruned, notes = pair.reference, pair.pruned, pair.notes
    names = _compared(graph, reference, pruned, keep)
    if too_large(graph.model):
        extra = _extra_feeds(graph, reference)
        worst, sizes, count = in_parts.compare(graph, keep, reference, pruned, names, extra)
        notes.append(f"too large to run twice: checked in {count} parts, each on what the original gives it")
        return Equivalence(worst, _tolerance(graph), tuple(names), tuple(sizes), tuple(notes))
    if pair.foreign and not names:
        raise UserError(
            f"{graph.model.name}: onnxruntime has no {', '.join(pair.foreign)}, and without it nothing of the graph "
            "can be checked; nothing was written"
        )
    runs, expected, idle = _reference_runs(graph, reference, names)
    if idle:
        named = ", ".join(idle[:SHOWN]) + (f" and {len(idle) - SHOWN} more" if len(idle) > SHOWN else "")
        notes.append(f"branches that no input of the check takes: {named}")
    del reference
    session = Session(pruned, expose=inner(pruned, names))
    errors = [difference(want, session.run(feeds, names)) for _, feeds, want in runs]
    if pair.rounded is not None:  # that it runs is not said by the other form of it
        _run_rounded(graph, pair.rounded, runs[0][1])
    tolerance = _tolerance(graph)
    if max(errors) > tolerance and expected is not None:
        for i, run in enumerate(runs):
            if errors[i] > tolerance:
                again = (difference(want, session.run(feeds, names)) for feeds, want in expected(run))
                errors[i] = min(errors[i], *again)
        if max(errors) <= tolerance:
            notes.append("an order decided by nearly equal values differed on some inputs")
    worst = max(errors)
    if worst <= tolerance and names:
        why = _optimised(graph, pruned, session, [feeds for _, feeds, _ in runs], names)
        if why is not None:
            raise RunError(why)
    if not any(_varies(value) for _, _, want in runs for value in want.values()):
        notes.append("the outputs are constant or not finite on these inputs, so the check says little")
    return Equivalence(worst, tolerance, tuple(names), tuple(sizes for sizes, _, _ in runs), tuple(notes))


def _varies(values: Array) -> bool:
    finite = values[np.isfinite(values)] if values.dtype.kind == "f" else values.ravel()
    return bool((finite != finite[:1]).any())


@dataclass
class _Pair:
    """Both graphs in a form that onnxruntime runs and that is worth comparing, and what was done to them.

    rounded   the pruned graph as it rounds, where the comparison does without
    foreign   operators that onnxruntime does not have
    """

    reference: onnx.ModelProto
    pruned: onnx.ModelProto
    notes: list[str]
    rounded: onnx.ModelProto | None = None
    foreign: Sequence[str] = ()

    def turn(self, note: str, form: Callable[[onnx.ModelProto], onnx.ModelProto]) -> None:
        self.notes.append(note)
        self.reference, self.pruned = form(self.reference), form(self.pruned)


def _runnable(graph: DependencyGraph, reference: onnx.ModelProto, pruned: onnx.ModelProto) -> _Pair:
    pair = _Pair(reference, pruned, [])
    if random := repeatable.random(graph, pair.reference):
        note = f"checked with the same numbers at each run in place of random ones ({', '.join(random)})"
        pair.turn(note, lambda proto: repeatable.repeatable(graph, proto))
    if foreign := comparable.foreign(pair.reference):
        pair.foreign = foreign
        note = f"onnxruntime has no {', '.join(foreign)}; the graph was checked around it"
        pair.turn(note, lambda proto: comparable.around(graph, proto))
    if any(map(comparable.is_batch_first, pair.reference.graph.node)):
        pair.turn("checked with recurrent layers of layout 1 written in layout 0", comparable.steps_first)
    if any(map(comparable.is_rounded_recurrence, pair.reference.graph.node)):
        note = "checked without the rounding of states (DynamicQuantizeLSTM)"
        pair.turn(note, comparable.real_recurrence)
    if rounding := unrounded.rounding(pair.reference):
        pair.rounded = pair.pruned
        note = f"checked without the rounding of activations ({', '.join(rounding)})"
        try:
            pair.turn(note, lambda proto: unrounded.unrounded(proto, graph.shapes))
        except (ValueError, IndexError, KeyError, TypeError):
            _blame(graph, None)
            raise
    rare = widened.rare(pair.reference)
    if rare and (too_large(graph.model) or widened.needed(pair.reference)):
        pair.turn(f"checked in float32 in place of {' and '.join(rare)}", widened.widened)
    return pair


def _run_rounded(graph: DependencyGraph, pruned: onnx.ModelProto, feeds: Feeds) -> None:
    """Run the pruned model as it is; if that fails, the original may be to blame."""
    try:
        Session(pruned).run(feeds)
    except OutOfMemory:
        raise
    except RunError:
        _blame(graph, feeds)
        raise


def _blame(graph: DependencyGraph, feeds: Feeds | None) -> None:
    """Raises `UserError` if onnxruntime cannot load the original, or run it where inputs are given."""
    original = graph.model.proto
    if comparable.foreign(original):
        original = comparable.around(graph, original)
    if any(map(comparable.is_batch_first, original.graph.node)):
        original = comparable.steps_first(original)
    try:
        session = Session(original)
        if feeds is not None:
            session.run(feeds)
    except RunError as error:
        raise UserError(
            f"{graph.model.name}: onnxruntime cannot run the model: {error}; nothing was written"
        ) from None


def _optimised(
    graph: DependencyGraph, pruned: onnx.ModelProto, plain: Session, feeds: list[Feeds], names: list[str]
) -> str | None:
    """Why the pruned model fails where onnxruntime optimises it (it trusts the shapes stated in the file
    there); None if it does not, or if the original fails in the same way. The basic level does that; at the
    higher ones onnxruntime can crash on odd graphs and take the process along."""

    def failure(proto: onnx.ModelProto, plain: Session) -> str | None:
        try:
            session = Session(proto, "basic", expose=inner(proto, names))
            worst = max(difference(plain.run(feed, names), session.run(feed, names)) for feed in feeds)
        except RunError as error:
            return str(error)
        return f"outputs differ by {worst:.1e}" if worst > OPTIMISED_TOLERANCE else None

    why = failure(pruned, plain)
    if why is None:
        return None
    original = repeatable.repeatable(graph, graph.model.proto)
    try:
        fails_too = failure(original, Session(original, expose=inner(original, names))) is not None
    except RunError:
        fails_too = True
    return None if fails_too else f"with basic optimisations: {why}"


Run = tuple[Sizes, Feeds, dict[str, Any]]
Retry = Callable[[Run], Iterator[tuple[Feeds, dict[str, Any]]]]


def _reference_runs(
    graph: DependencyGraph, reference: onnx.ModelProto, names: list[str]
) -> tuple[list[Run], Retry | None, list[str]]:
    """Run the masked original at sizes it accepts; and more seeds, later, where it ranks values. Also the
    branches that never ran."""
    model = graph.model
    watching, watches = flow.watched(reference)
    marks = [watch.name for watch in watches]
    shown = [onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None) for name in marks]
    try:
        session = Session(watching, expose=[*inner(reference, names), *shown])
    except RunError as error:
        raise UserError(
            f"{model.name}: onnxruntime cannot load the model: {error}; nothing was written"
        ) from None
    extra = _extra_feeds(graph, reference)
    try:
        runs = accepted_runs(
            model, graph.shapes, lambda feeds: session.run(feeds | extra, [*names, *marks]), RUNS
        )
    except OutOfMemory:
        raise
    except RunError as error:
        raise UserError(
            f"{model.name}: onnxruntime cannot run the model: {error}; nothing was written"
        ) from None
    idle = _idle(graph, watches, [want for _, _, want in runs])
    runs = [(sizes, feeds | extra, {name: want[name] for name in names}) for sizes, feeds, want in runs]

    def more(run: Run) -> Iterator[tuple[Feeds, dict[str, Any]]]:
        """Other values for the same way through the graph."""
        sizes, given, _ = run
        kept = {name: array for name, array in given.items() if array.dtype.kind in "biu"} | extra
        for seed in range(100, 100 + RETRIES):
            feeds = make_feeds(model, sizes, seed, {}) | kept
            yield feeds, session.run(feeds, names)

    ranked = any(node.op in _RANKING or node.captured or node.domain == flow.DOMAIN for node in model.nodes)
    return runs, more if ranked else None, idle


def _idle(graph: DependencyGraph, watches: Sequence[flow.Watch], values: list[dict[str, Any]]) -> list[str]:
    """The branches that no run took, though their condition is not the same at all sizes."""
    found = []
    for watch in watches:
        known = watch.condition in graph.shapes.values
        if known and graph.shapes.static_entries(watch.condition).all():
            continue
        taken = {float(value[watch.name].item()) for value in values}
        found += [
            f"{branch} of '{watch.label}'"
            for branch, mark in (("then", 1.0), ("else", 0.0))
            if mark not in taken
        ]
    return found


_RANKING = {"TopK", "NonMaxSuppression", "ArgMax", "ArgMin", "NonZero", "Round"}


def _extra_feeds(graph: DependencyGraph, reference: onnx.ModelProto) -> Feeds:
    """What stands for the results of operators that onnxruntime does not have."""
    known = {value.name for value in graph.model.proto.graph.input}
    return comparable.extra_feeds([v for v in reference.graph.input if v.name not in known])


def _tolerance(graph: DependencyGraph) -> float:
    halves = (onnx.TensorProto.FLOAT16, onnx.TensorProto.BFLOAT16)
    half = any(t.data_type in halves for t in graph.model.constants.values())
    return TOLERANCE_16 if half else TOLERANCE


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
        inside = graph.model.scopes.of(name)  # a body, whose tensors no run gives
        return not cut and not inside and name in both and elements.get(name) in FLOATS

    for output in reference.graph.output:
        waiting, seen = [output.name], {output.name}
        while waiting:
            name = waiting.pop()
            element = elements.get(name) or _stated(graph, name)
            stated = {element, output.type.tensor_type.elem_type}  # integers may be written as floats here
            if (name == output.name and not stated.isdisjoint(FLOATS)) or whole(name):
                names[unsaturated(graph.model, name, whole)] = None
            elif name in producers:
                fresh = [i for i in producers[name].input if i and i not in seen]
                seen.update(fresh)
                waiting.extend(fresh)
    return list(names)


def _stated(graph: DependencyGraph, name: str) -> int:
    for output in graph.model.outputs:
        if output.name == name:
            return int(output.type.tensor_type.elem_type)
    return 0
