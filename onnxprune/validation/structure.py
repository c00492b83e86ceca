"""Is the file a sound model with the same interface? The checker and shape inference miss most broken weights, so
the declarations of the operators are held against it, and it is loaded and run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx

from onnxprune.dependency import DependencyGraph
from onnxprune.errors import UserError
from onnxprune.model import Model, copy_without_weights
from onnxprune.runtime import Feeds, Level, RunError, Session


def check(original: Model, candidate: Model, feeds: Sequence[Feeds]) -> list[str]:
    """What is wrong with the candidate, one line each; empty if nothing is."""
    problems = interface(original, candidate)
    problems += _checker(original, candidate)
    problems += _axes(candidate)
    levels: tuple[Level, ...] = ("none", "basic", "all")
    for level in levels:
        try:
            made = _runs(candidate, feeds, level)
        except RunError as error:
            problems.append(f"onnxruntime (optimisations: {level}): {error}")
        else:
            if not problems:
                problems += unbounded(_runs(original, feeds, level), made)
    return problems


def _runs(model: Model, feeds: Sequence[Feeds], level: Level) -> list[dict[str, Any]]:
    session = Session(model.proto, level)
    return [session.run(feed) for feed in feeds]


def unbounded(before: Sequence[Mapping[str, Any]], after: Sequence[Mapping[str, Any]]) -> list[str]:
    """Outputs that are NaN or infinite where the original's are not, of the same runs."""
    found: dict[str, None] = {}
    for wanted, made in zip(before, after, strict=True):
        for name in wanted:
            numbers = [np.asarray(run.get(name)) for run in (wanted, made)]
            finite = [array.dtype.kind not in "fc" or bool(np.isfinite(array).all()) for array in numbers]
            if finite == [True, False]:
                found[f"output '{name}' is NaN or infinite, the original's is not"] = None
    return list(found)


def interface(original: Model, candidate: Model) -> list[str]:
    """Inputs and outputs whose name, type or shape changed."""
    problems = []
    for kind in ("inputs", "outputs"):
        before = [_signature(value) for value in getattr(original, kind)]
        after = [_signature(value) for value in getattr(candidate, kind)]
        if before != after:
            changed = [f"{a} -> {b}" for a, b in zip(before, after, strict=False) if a != b]
            detail = changed[0] if changed else f"{len(before)} -> {len(after)}"
            problems.append(f"{kind} changed: {detail}")
    return problems


def _signature(value: onnx.ValueInfoProto) -> str:
    tensor = value.type.tensor_type
    element = onnx.TensorProto.DataType.Name(tensor.elem_type)
    if not tensor.HasField("shape"):
        return f"{value.name}: {element}"
    dims = [d.dim_param or (str(d.dim_value) if d.HasField("dim_value") else "?") for d in tensor.shape.dim]
    return f"{value.name}: {element}[{', '.join(dims)}]"


def _axes(candidate: Model) -> list[str]:
    """Axes that contradict each other by the operators' declarations, as a Conv whose weights have other input channels
    than its input: onnx's checker and shape inference do not look at most of them."""
    try:
        DependencyGraph(candidate)
    except UserError as error:
        return [f"axes: {error}"]
    return []


def _checker(original: Model, candidate: Model) -> list[str]:
    """onnx's checker and strict shape inference, with stale value_info taken out first; what the original
    fails too does not count."""
    problems = []
    for name, test in (("checker", _check), ("shape inference", _infer)):
        if (why := test(candidate)) is not None and test(original) is None:
            problems.append(f"onnx {name}: {why}")
    return problems


def _check(model: Model) -> str | None:
    try:
        onnx.checker.check_model(model.source, full_check=False)
    except (onnx.checker.ValidationError, ValueError) as error:
        return _first_line(error)
    return None


def _infer(model: Model) -> str | None:
    proto = onnx.ModelProto()
    copy_without_weights(model.source, proto)
    del proto.graph.value_info[:]
    proto.graph.initializer.extend(model.source.graph.initializer)
    try:
        onnx.shape_inference.infer_shapes(proto, check_type=True, strict_mode=True, data_prop=True)
    except (onnx.shape_inference.InferenceError, onnx.checker.ValidationError, ValueError) as error:
        return _first_line(error)
    return None


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0][:200]
