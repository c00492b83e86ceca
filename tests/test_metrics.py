"""Metrics against their definitions written out, in one piece and in batches."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper

from onnxprune import metrics
from onnxprune.data import Data, open_data
from onnxprune.errors import UserError
from onnxprune.metrics import Agreement, Comparison, Metric, compare, default_metric, evaluate, metric
from onnxprune.model import Array, Model
from onnxprune.runtime import Feeds, Session
from onnxprune.shapes import analyse
from tests.small import floats, weight

node = helper.make_node


def linear(seed: str = "w", classes: int = 7, last: str = "Identity") -> Model:
    """x (n, 5) times a seeded matrix."""
    nodes = [node("MatMul", ["x", seed], ["a"]), node(last, ["a"], ["y"])]
    stored = [weight(seed, 5, classes)]
    graph = helper.make_graph(nodes, "net", [floats("x", "n", 5)], [floats("y", "n", classes)], stored)
    return Model(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8))


def data_for(model: Model, **arrays: Array) -> Data:
    return open_data(arrays, model, analyse(model), samples=None)


def normal(*shape: int, seed: int = 0) -> Array:
    return np.random.default_rng(seed).standard_normal(shape)


def softmax(x: Array) -> Array:
    e = np.exp(x - x.max(axis=-1, keepdims=True))
    result: Array = e / e.sum(axis=-1, keepdims=True)
    return result


def measured(name: str, output: Array, labels: Array, sizes: Sequence[int] = ()) -> float:
    """The metric, over batches of these sizes."""
    found: Metric = metric(name)()
    for part in np.split(np.arange(len(output)), np.cumsum(sizes)):
        found.update({"y": output[part]}, None, labels[part])
    return found.result()


# -------------------------------------------------------------------------------------------- labelled


def brute_top(output: Array, labels: Array, k: int) -> float:
    """Sorted stably by score, is the label among the first k?"""
    hits = [label in np.argsort(-row, kind="stable")[:k] for row, label in zip(output, labels, strict=True)]
    return float(np.mean(hits))


def brute_f1(guess: Array, labels: Array) -> float:
    each = []
    for c in sorted({*guess.tolist(), *labels.tolist()}):
        hit = np.sum((guess == c) & (labels == c))
        precision = hit / max(np.sum(guess == c), 1)
        recall = hit / max(np.sum(labels == c), 1)
        each.append(2 * precision * recall / (precision + recall) if hit else 0.0)
    return float(np.mean(each))


@given(
    st.integers(0, 2**32 - 1), st.integers(1, 40), st.integers(6, 9), st.lists(st.integers(0, 9), max_size=4)
)
@settings(max_examples=80, deadline=None)
def test_classification_against_brute_force(seed: int, count: int, classes: int, sizes: list[int]) -> None:
    """With many ties, in batches of any size."""
    generator = np.random.default_rng(seed)
    output = generator.integers(0, 4, (count, classes)).astype(np.float32)
    labels = generator.integers(0, classes, count)
    assert measured("top1", output, labels, sizes) == pytest.approx(brute_top(output, labels, 1))
    assert measured("top5", output, labels, sizes) == pytest.approx(brute_top(output, labels, 5))
    assert measured("f1", output, labels, sizes) == pytest.approx(brute_f1(output.argmax(axis=1), labels))
    target = generator.standard_normal(output.shape)
    assert measured("mse", output, target, sizes) == pytest.approx(np.mean((output - target) ** 2))


def test_the_class_axis() -> None:
    """Last of two or three axes, axis 1 of four; the other one where only it fits the labels."""
    flat, labels = normal(60, 7), np.random.default_rng(1).integers(0, 7, 60)
    expected = brute_top(flat, labels, 1)
    for output, target in [
        (flat.reshape(6, 10, 7), labels.reshape(6, 10)),
        (flat.reshape(6, 10, 7).transpose(0, 2, 1), labels.reshape(6, 10)),
        (flat.reshape(6, 5, 2, 7).transpose(0, 3, 1, 2), labels.reshape(6, 5, 2)),
        (flat.reshape(6, 5, 2, 7), labels.reshape(6, 5, 2)),
        (flat.reshape(60, 7, 1, 1), labels),
        (flat, labels[:, None]),
        (flat, labels.astype(np.float32)),
    ]:
        assert measured("top1", output, target) == pytest.approx(expected)
    seen = normal(6, 5, 2, 7)
    assert metrics.class_axis(seen) == 1
    assert metrics.class_axis(softmax(seen)) == 3


@pytest.mark.parametrize("logits", [True, False])
def test_a_single_score_decides_between_two_classes(logits: bool) -> None:
    """At 0 for logits, at 0.5 for probabilities: told apart over all batches, not by the first."""
    z = np.array([0.2, 0.7, -3.0, 2.0, 0.3, 0.4])
    output = (z if logits else 1 / (1 + np.exp(-z)))[:, None]
    labels = np.array([1, 1, 0, 0, 0, 1])
    assert measured("top1", output, labels, [2, 2]) == pytest.approx(4 / 6)
    assert measured("f1", output, labels, [2, 2]) == pytest.approx(brute_f1((z > 0).astype(int), labels))
    assert measured("top1", output.ravel(), labels) == pytest.approx(4 / 6)


def test_broken_outputs_are_never_right() -> None:
    output = np.full((4, 7), np.nan)
    labels = np.zeros(4, dtype=np.int64)
    for name in ("top1", "top5", "f1"):
        assert measured(name, output, labels) == 0
    half = np.where(np.arange(4)[:, None] < 2, np.eye(7)[[0] * 4], np.nan)
    assert measured("top1", half, labels) == 0.5
    assert math.isnan(measured("mse", output, np.zeros((4, 7))))


@pytest.mark.parametrize(
    ("name", "output", "labels", "words"),
    [
        ("top1", normal(4, 7), np.array([0, 1, 2, 7]), "from 0 to 7; the model has 7 classes"),
        ("top1", normal(4, 7), np.array([0, 1, 2, -1]), "from -1"),
        ("top1", normal(4, 7), np.array([0.5, 1, 2, 3]), "mse"),
        ("top1", normal(4, 7), np.zeros((4, 3)), "for \\[4\\] decisions"),
        ("top5", normal(4, 5), np.array([0, 1, 2, 3]), "always right"),
        ("mse", normal(4, 7), np.array([0, 1, 2, 3]), "top1"),
        ("f1", normal(0, 7), np.zeros(0, dtype=np.int64), "nothing to measure"),
    ],
)
def test_labels_that_do_not_fit(name: str, output: Array, labels: Array, words: str) -> None:
    with pytest.raises(UserError, match=words):
        measured(name, output, labels)


# ------------------------------------------------------------------------------------------- agreement


def agreement(before: Array, after: Array, sizes: Sequence[int] = ()) -> Agreement:
    found = Comparison("y")
    for part in np.split(np.arange(len(before)), np.cumsum(sizes)):
        found.update(before[part], after[part])
    return found.result()


def brute(before: Array, after: Array, distribution: bool) -> tuple[float, float, float, float]:
    p, q = (before, after) if distribution else (softmax(before), softmax(after))
    kl = np.mean(np.sum(p * np.log(p / q), axis=-1))
    same = np.mean(before.argmax(axis=-1) == after.argmax(axis=-1))
    pairs = [(a.ravel(), b.ravel()) for a, b in zip(before, after, strict=True)]
    cosine = np.mean([a @ b / np.linalg.norm(a) / np.linalg.norm(b) for a, b in pairs])
    snr = 10 * np.log10(np.sum(before**2) / np.sum((before - after) ** 2))
    return float(same), float(kl), float(cosine), float(snr)


@given(st.integers(0, 2**32 - 1), st.lists(st.integers(0, 9), max_size=3), st.booleans())
@settings(max_examples=60, deadline=None)
def test_agreement_against_brute_force(seed: int, sizes: list[int], distribution: bool) -> None:
    generator = np.random.default_rng(seed)
    for shape in ((12, 5), (12, 3, 5)):
        before = 3 * generator.standard_normal(shape)
        after = before + generator.standard_normal(shape)
        if distribution:
            before, after = softmax(before), softmax(after)
        found = agreement(before, after, sizes)
        assert found.softmax is not distribution
        expected = brute(before, after, distribution)
        assert (found.top1, found.kl, found.cosine, found.snr) == pytest.approx(expected, rel=1e-9, abs=1e-12)


def test_equal_outputs_agree_fully() -> None:
    for output in (normal(8, 5), softmax(normal(8, 5)), normal(8, 3, 4, 4), normal(8), np.zeros((8, 5))):
        assert agreement(output, output) == Agreement(
            "y", 1.0, 0.0, agreement(output, output).softmax, pytest.approx(1.0), math.inf, 0
        )


def test_known_figures() -> None:
    before = np.array([[0.5, 0.5], [0.25, 0.75]])
    after = np.array([[0.25, 0.75], [0.25, 0.75]])
    found = agreement(before, after)
    assert found.kl == pytest.approx(0.5 * (0.5 * math.log(2) + 0.5 * math.log(2 / 3)))
    assert found.top1 == 0.5
    twice = agreement(normal(8, 5), 2 * normal(8, 5))
    assert twice.snr == pytest.approx(0)
    assert twice.cosine == pytest.approx(1)
    assert agreement(normal(8, 5), -normal(8, 5)).cosine == pytest.approx(-1)
    assert agreement(normal(8, 5), 1.1 * normal(8, 5)).snr == pytest.approx(20)
    # a single probability is a distribution over two classes
    single = agreement(np.array([[0.9], [0.2]]), np.array([[0.6], [0.7]]))
    expected = 0.9 * math.log(0.9 / 0.6) + 0.1 * math.log(0.1 / 0.4)
    expected += 0.2 * math.log(0.2 / 0.7) + 0.8 * math.log(0.8 / 0.3)
    assert single.kl == pytest.approx(expected / 2)
    assert single.top1 == 0.5
    assert single.softmax is False


@pytest.mark.parametrize("order", [1, -1])
def test_whether_a_softmax_is_due_is_decided_over_all(order: int) -> None:
    before = np.vstack([softmax(normal(4, 5)), normal(4, 5, seed=1)][::order])
    after = before + 0.1 * normal(8, 5, seed=2)
    parts, whole = agreement(before, after, [4]), agreement(before, after)
    assert parts.kl == pytest.approx(whole.kl)
    assert parts.softmax is whole.softmax is True


def test_segmentations_compare_along_axis_1() -> None:
    before, after = normal(4, 6, 3, 2), normal(4, 6, 3, 2, seed=1)
    found = agreement(before, after)
    same, kl, _, snr = brute(*(np.moveaxis(a, 1, -1) for a in (before, after)), distribution=False)
    assert (found.top1, found.kl, found.snr) == pytest.approx((same, kl, snr))


def test_outputs_that_are_not_finite() -> None:
    before = normal(4, 5)
    broken = np.where(np.arange(5) == 2, np.nan, before)
    found = agreement(before, broken)
    assert (found.top1, found.kl, found.cosine, found.snr) == (0, math.inf, 0, -math.inf)
    masked = np.where(np.arange(5) == 2, -np.inf, before)
    found = agreement(masked, masked)
    assert (found.top1, found.kl, found.snr) == (1, 0, math.inf)
    assert found.cosine == pytest.approx(1)
    zero = agreement(np.array([[1.0, 0.0]]), np.array([[0.0, 1.0]]))
    assert zero.kl is not None
    assert 50 < zero.kl < 100  # nothing where everything was: large, not infinite


def test_integers_and_shapes_that_depend_on_data() -> None:
    found = agreement(np.array([[1, 2], [3, 4]]), np.array([[1, 2], [3, 5]]))
    assert found == Agreement("y", 0.75, None, None, None, None, 0)
    comparison = Comparison("y")
    comparison.update(normal(2, 3), normal(2, 3))
    comparison.update(normal(2, 3), normal(1, 3))
    comparison.update(normal(0, 3), normal(0, 3))
    assert comparison.result().unlike == 1
    assert comparison.result().top1 == 1
    nothing = Comparison("y")
    nothing.update(normal(2, 3), normal(1, 3))
    assert nothing.result() == Agreement("y", None, None, None, None, None, 1)


# --------------------------------------------------------------------------------------------- running


def test_models_are_evaluated_on_data() -> None:
    model, other = linear(), linear("other")
    x = normal(50, 5).astype(np.float32)
    y = np.random.default_rng(1).integers(0, 7, 50)
    data = data_for(model, x=x, label=y)
    before, after = (x @ weight_of(m) for m in (model, other))
    assert evaluate(model, data, "top1") == pytest.approx(brute_top(before, y, 1))
    assert evaluate(other.proto, data, "top5", size=7) == pytest.approx(brute_top(after, y, 5))
    same, kl, cosine, snr = brute(before.astype(np.float64), after.astype(np.float64), distribution=False)
    kept = list(metrics.outputs_of(model, data))
    for name, expected in {"agreement": same, "kl": kl, "cosine": cosine, "snr": snr}.items():
        assert evaluate(other, data, name, original=model) == pytest.approx(expected, rel=1e-4)
        assert evaluate(other, data, name, original=kept) == evaluate(other, data, name, original=model)
    [found] = compare(model, other, data)
    assert (found.output, found.top1, found.softmax) == ("y", same, True)
    assert found.kl == pytest.approx(kl, rel=1e-4)
    with pytest.raises(UserError, match="original"):
        evaluate(model, data, "kl")
    with pytest.raises(UserError, match="needs labels and arrays"):
        evaluate(model, data_for(model, x=x), "top1")


@pytest.mark.parametrize("room", [0, 2 * 7 * 4 * 4, 2**20])
def test_recorded_outputs_are_the_same_however_often(room: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever share of them is kept; those that are do not run again. Two readers may take turns."""
    monkeypatch.setattr(metrics, "ROOM", room)
    model = linear()
    data = data_for(model, x=normal(20, 5).astype(np.float32))
    runs: list[int] = []
    session = Session(model.proto)

    class Counted:
        def run(self, feeds: Feeds, /) -> metrics.Outputs:
            runs.append(len(feeds["x"]))
            return session.run(feeds)

    recorded = metrics.Recorded(Counted(), data, 4)
    wanted = [outputs["y"] for outputs in metrics.outputs_of(model, data, 4)]
    for y, one, other in zip(wanted, recorded, recorded, strict=True):
        np.testing.assert_array_equal(one["y"], y)
        np.testing.assert_array_equal(other["y"], y)
    for y, again in zip(wanted, recorded, strict=True):
        np.testing.assert_array_equal(again["y"], y)
    kept = min(room // (4 * 7 * 4), 5)
    assert len(runs) == kept + 3 * (5 - kept)
    assert metrics.evaluate(recorded, data, "kl", original=recorded, size=4) == 0


def weight_of(model: Model) -> Array:
    return model.array(next(iter(model.initializers)))


def test_every_output_is_compared() -> None:
    def both(name: str) -> Model:
        nodes = [
            node("MatMul", ["x", name], ["y"]),
            node("ArgMax", ["y"], ["i"], axis=1, keepdims=0),
            node("Sigmoid", ["y"], ["p"]),
        ]
        ends = [
            floats("y", "n", 7),
            helper.make_tensor_value_info("i", TensorProto.INT64, ["n"]),
            floats("p", "n", 7),
        ]
        graph = helper.make_graph(nodes, "net", [floats("x", "n", 5)], ends, [weight(name, 5, 7)])
        return Model(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8))

    model, other = both("w"), both("other")
    data = data_for(model, x=normal(40, 5).astype(np.float32))
    y, i, p = compare(model, other, data)
    assert (y.output, i.output, p.output) == ("y", "i", "p")
    assert y.top1 == i.top1 == p.top1
    assert i.kl is None
    assert y.snr != p.snr


def test_sequences_of_varying_length() -> None:
    """Each position is a decision; batches of equal lengths give what single samples give."""
    nodes = [node("MatMul", ["x", "w"], ["y"])]
    graph = helper.make_graph(
        nodes, "net", [floats("x", "n", "t", 5)], [floats("y", "n", "t", 7)], [weight("w", 5, 7)]
    )
    model = Model(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8))
    lengths = [3, 3, 8, 1, 3, 8, 8]
    items = [
        (normal(n, 5, seed=i), np.random.default_rng(i).integers(0, 7, n)) for i, n in enumerate(lengths)
    ]
    data = open_data(lambda: items, model, analyse(model))
    x, y = (np.concatenate([item[k] for item in items]) for k in (0, 1))
    output = x.astype(np.float32) @ weight_of(model)
    for size in (1, 16):
        assert evaluate(model, data, "top1", size=size) == pytest.approx(brute_top(output, y, 1))
        assert evaluate(model, data, "f1", size=size) == pytest.approx(brute_f1(output.argmax(axis=1), y))
        assert evaluate(model, data, "cosine", original=model, size=size) == pytest.approx(1)


def test_functions_of_the_user(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Called once, with everything; a list where shapes vary."""
    (tmp_path / "judges_of_mine.py").write_text(
        "def share(outputs, labels):\n    return (outputs.argmax(axis=1) == labels).mean()\n"
        "def error(outputs, labels):\n    return len(outputs)\n"
        "error.higher_is_better = False\n"
        "def broken(outputs, labels):\n    raise KeyError('a')\n"
        "def nothing(outputs, labels):\n    return float('nan')\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    model = linear()
    y = np.random.default_rng(1).integers(0, 7, 50)
    data = data_for(model, x=normal(50, 5).astype(np.float32), label=y)
    assert evaluate(model, data, "judges_of_mine:share", size=7) == pytest.approx(
        evaluate(model, data, "top1")
    )
    assert evaluate(model, data, "judges_of_mine:error", size=7) == 50
    assert metric("judges_of_mine:share")().higher_is_better
    assert not metric("judges_of_mine:error")().higher_is_better
    for name, words in {"broken": "KeyError", "nothing": "NaN"}.items():
        with pytest.raises(UserError, match=words):
            evaluate(model, data, f"judges_of_mine:{name}")
    with pytest.raises(UserError, match="top1, top5, f1, mse, agreement, kl, cosine, snr"):
        metric("accuracy")
    varying = metric("judges_of_mine:error")()
    varying.update({"y": normal(2, 3)}, None, np.zeros((2, 3)))
    varying.update({"y": normal(2, 4)}, None, np.zeros((2, 4)))
    assert varying.result() == 2


def test_defaults() -> None:
    model = linear()
    x = normal(50, 5).astype(np.float32)

    def chosen(output: Array, **labels: Any) -> str:
        return default_metric(data_for(model, x=x, **labels), {"y": output})

    ints = np.arange(50) % 7
    assert chosen(normal(16, 7), label=ints) == "top1"
    assert chosen(normal(16, 7), label=normal(50, 7)) == "mse"
    assert chosen(normal(5, 7), label=ints) == chosen(normal(32, 7), label=ints) == "top1"
    assert chosen(normal(16, 1), label=ints % 2) == "top1"
    assert chosen(normal(16, 1), label=normal(50)) == "mse"
    assert chosen(normal(16, 1), label=ints) == "mse"
    assert chosen(normal(16, 7)) == "agreement"
    assert chosen(softmax(normal(16, 3, 7))) == "agreement"
    assert chosen(np.arange(16)) == "agreement"
    assert chosen(normal(16, 3, 7)) == "cosine"
    unit = normal(16, 7)
    assert chosen(unit / np.linalg.norm(unit, axis=1, keepdims=True)) == "cosine"


def test_models_that_do_not_run() -> None:
    model = linear()
    data = data_for(model, x=normal(50, 5).astype(np.float32))
    wider = linear(classes=3)
    wider.proto.graph.initializer[0].CopyFrom(weight("w", 6, 3))
    with pytest.raises(UserError, match=r"cannot load|does not run"):
        compare(model, wider, data)
    renamed = onnx.ModelProto()
    renamed.CopyFrom(model.proto)
    renamed.graph.node[1].output[0] = renamed.graph.output[0].name = "z"
    with pytest.raises(UserError, match="no output 'y'"):
        compare(model, renamed, data)
