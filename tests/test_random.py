"""Graphs with random operators: both sides of the check see the same numbers."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto

from models.builder import Graph, Tensor
from onnxprune import pipeline
from onnxprune.dependency import DependencyGraph
from onnxprune.model import Model
from onnxprune.passes import Options
from onnxprune.runtime import Session
from onnxprune.validation.repeatable import repeatable

FLOAT = np.float32
BOUNDS: dict[str, dict[str, Any]] = {
    "Multinomial": {"sample_size": 4},
    "RandomNormal": {"mean": 3.0, "scale": 2.0, "shape": [1, 4]},
    "RandomNormalLike": {"mean": 3.0, "scale": 2.0},
    "RandomUniform": {"low": -2.0, "high": 5.0, "shape": [1, 4]},
    "RandomUniformLike": {"low": -2.0, "high": 5.0},
}
KINDS = "Bernoulli", "Multinomial", "RandomNormal", "RandomNormalLike", "RandomUniform", "RandomUniformLike"


def made(g: Graph, kind: str, x: Tensor) -> Tensor:
    """What a random operator makes of a tensor, or of nothing."""
    operands = [] if "shape" in BOUNDS.get(kind, {}) else [g.op("Sigmoid", x)]
    return g.op("Cast", *g.ops(kind, *operands, outputs=1, **BOUNDS.get(kind, {})), to=TensorProto.FLOAT)


def noisy(kind: str) -> onnx.ModelProto:
    g = Graph(kind)
    x = g.gemm(g.relu(g.gemm(g.input("batch", 6), 8)), 4)
    return g.model(g.add(x, made(g, kind, x)))


def assert_cut_with_a_note(model: onnx.ModelProto, operator: str) -> None:
    report = pipeline.prune(model, Options(0.5, align=1)).report
    assert report.after.channels < report.before.channels
    assert report.equivalence is not None
    assert any(operator in note for note in report.equivalence.notes)


@pytest.mark.parametrize("kind", KINDS)
def test_a_model_with_random_numbers_is_cut_and_checked(kind: str) -> None:
    assert_cut_with_a_note(noisy(kind), kind)


@pytest.mark.parametrize(
    ("kind", "low", "high", "mean"),
    [
        ("Bernoulli", 0, 1, 0.3),
        ("Multinomial", 0, 2, 1),
        ("RandomNormalLike", -1, 7, 3),
        ("RandomUniformLike", -2, 5, 1.5),
    ],
)
def test_the_numbers_are_in_the_operators_range(kind: str, low: float, high: float, mean: float) -> None:
    g = Graph()
    samples = {"sample_size": 400} if kind == "Multinomial" else {}
    model = g.model(*g.ops(kind, g.input("rows", 3), outputs=1, **BOUNDS.get(kind, {}) | samples))
    session = Session(repeatable(DependencyGraph(Model(model)), model))
    feeds = {"input": np.full((400, 3), 0.3, FLOAT)}
    (first,), (second,) = session.run(feeds).values(), session.run(feeds).values()
    assert (first == second).all()
    assert low <= first.min() < first.max() <= high
    assert first.mean() == pytest.approx(mean, abs=0.1 * (high - low))


def test_dropout_that_is_on_is_checked_as_if_off() -> None:
    g = Graph()
    x = g.gemm(g.relu(g.gemm(g.input("batch", 6), 8)), 5)
    x = g.op("Dropout", x, g.const(0.5, FLOAT), g.const(True, np.bool_))
    assert_cut_with_a_note(g.model(g.gemm(x, 4)), "Dropout")
