"""The equivalence check of models too large to run at once.

The masked original runs part by part, and every part of the pruned model is fed with what the original
computed before it, less the removed positions: each part must give what the original gives, again less
those positions. Together the parts cover the whole graph, so the models are equal where all parts are.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np
import onnx

from onnxprune.axes import Keep, kept_positions
from onnxprune.dependency import DependencyGraph
from onnxprune.model import Array
from onnxprune.parts import Part, Runner, partition
from onnxprune.runtime import Feeds, RunError, index_bounds, make_feeds
from onnxprune.sizes import Sizes, assignments, dynamic_dims
from onnxprune.validation.difference import difference


def compare(
    graph: DependencyGraph,
    keep: Keep,
    reference: onnx.ModelProto,
    pruned: onnx.ModelProto,
    names: Sequence[str],
    extra: Feeds,
) -> tuple[float, list[Sizes], int]:
    """The largest difference at any border of parts, the sizes compared at, and the number of parts; `extra`
    are feeds besides the model's inputs.

    Raises `RunError` if onnxruntime refuses a part.
    """
    shared = {name for name in _made(reference) & _made(pruned) if _sliceable(graph, keep, name)}
    parts = partition(graph.model, graph.shapes, shared, names)
    sizes = [graph.shapes.sizes]
    if graph.shapes.other is not None:  # of the same sizes if the analysis has found one set only
        candidates = (graph.shapes.other.sizes, *itertools.islice(assignments(dynamic_dims(graph.model)), 2))
        sizes += [other for other in candidates if other != sizes[0]][:1]
    bounds = index_bounds(graph.model, graph.shapes.shapes)
    feeds = [make_feeds(graph.model, here, seed, bounds) | extra for seed, here in enumerate(sizes)]
    full, short = [dict(feed) for feed in feeds], [dict(feed) for feed in feeds]
    runners = Runner(reference), Runner(pruned)
    worst = 0.0
    for part in parts:
        wanted = _run(runners[0], part, full, sizes)
        got = runners[1].run(part, short)
        for k, (values, others) in enumerate(zip(wanted, got, strict=True)):
            cut = {name: _kept(graph, keep, name, value) for name, value in values.items()}
            worst = max(worst, difference(cut, others))
            full[k] |= values
            short[k] |= cut
    return worst, sizes, len(parts)


def _run(runner: Runner, part: Part, feeds: list[Feeds], sizes: list[Sizes]) -> list[dict[str, Array]]:
    """The part's outputs; sizes that the original does not accept are given up, unless no other is left."""
    try:
        return runner.run(part, feeds)
    except RunError:
        if len(feeds) == 1:
            raise
        del feeds[1:], sizes[1:]
        return runner.run(part, feeds)


def _made(proto: onnx.ModelProto) -> set[str]:
    return {output for node in proto.graph.node for output in node.output if output}


def _sliceable(graph: DependencyGraph, keep: Keep, name: str) -> bool:
    """Whether the kept positions of every axis are the same at all sizes of the inputs."""
    typed = graph.types.get(name)
    return typed is not None and not any(
        kept_positions(axis, keep) is not None and graph.shapes.is_dynamic(name, i)
        for i, axis in enumerate(typed)
    )


def _kept(graph: DependencyGraph, keep: Keep, name: str, value: Array) -> Array:
    for i, axis in enumerate(graph.types.get(name) or ()):
        if (positions := kept_positions(axis, keep)) is not None:
            value = np.take(value, positions, axis=i)
    return value
