"""Is the file a sound model with the same interface? The checker and shape inference miss most broken weights, so
the declarations of the operators are held against it, and it is loaded and run."""

from __future__ import annotations

from collections.abc import Sequence

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
            session = Session(candidate.proto, level)
            for feed in feeds:
                session.run(feed)
        except RunError as error:
            problems.append(f"onnxruntime (optimisations: {level}): {error}")
    return problems


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
