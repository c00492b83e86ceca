"""Made-up inputs: the patterns are what they are called, and inputs get those that suit them."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from onnxprune.data import Data, patterns, synthetic
from onnxprune.model import Array, Model
from onnxprune.runtime import Session
from onnxprune.shapes import analyse
from tests.small import floats, weight

node = helper.make_node
INT64, UINT8 = TensorProto.INT64, TensorProto.UINT8


def integers(name: str, *dims: Any, kind: int = INT64) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, kind, list(dims))


def model_of(
    nodes: Sequence[onnx.NodeProto],
    inputs: Sequence[onnx.ValueInfoProto],
    outputs: Sequence[onnx.ValueInfoProto],
    stored: Sequence[onnx.TensorProto] = (),
) -> Model:
    graph = helper.make_graph(list(nodes), "net", list(inputs), list(outputs), list(stored))
    return Model(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8))


def made(model: Model, samples: int = 48) -> Data:
    """Inputs on which the model runs, the same each time."""
    data, again = (synthetic(model, analyse(model), samples=samples, seed=0) for _ in range(2))
    session = Session(model.proto)
    for batch, other in zip(data.batches(), again.batches(), strict=True):
        session.run(batch.feeds)
        assert all(np.array_equal(array, other.feeds[name]) for name, array in batch.feeds.items())
    return data


def rows(data: Data, name: str) -> Array:
    return np.concatenate([batch.feeds[name] for batch in data.batches()])


def neighbours(values: Array) -> float:
    """Correlation of values side by side along the last axis."""
    return float(np.corrcoef(values[..., 1:].ravel(), values[..., :-1].ravel())[0, 1])


# ------------------------------------------------------------------------------------------- patterns


def slope(power: Array) -> float:
    """How a spectrum [frequencies from 1] rises, in logarithms."""
    return float(np.polyfit(np.log(np.arange(1, len(power) + 1)), np.log(power), 1)[0])


@pytest.mark.parametrize("fall", [0.0, 0.5, 1.5])
def test_coloured_noise_has_the_stated_spectrum(fall: float) -> None:
    noise = patterns.coloured(np.random.default_rng(0), (400, 1, 256), fall)[:, 0]
    spectrum = np.sqrt(np.square(np.abs(np.fft.rfft(noise, axis=1))).mean(axis=0))[1:100]
    assert slope(spectrum) == pytest.approx(-fall, abs=0.05)
    assert np.allclose(noise.mean(axis=1), 0, atol=1e-9)
    assert np.allclose(noise.std(axis=1), 1)


def test_sounds_differ_in_colour_and_strength() -> None:
    generator = np.random.default_rng(0)
    sounds = [patterns.sound(generator, 2048) for _ in range(200)]
    deviations = np.array([sound.std() for sound in sounds])
    assert np.isclose(deviations, 1).mean() == pytest.approx(0.5, abs=0.1)
    assert deviations.min() < 0.03
    assert deviations.max() < 1 + 1e-9
    alike = np.array([neighbours(sound) for sound in sounds])
    assert alike.min() < 0.3  # nearly white
    assert alike.max() > 0.95  # nearly red, or a low tone


def test_tones_have_lines() -> None:
    """Though they glide: nothing is far below the lowest, and most of the energy is in few places."""
    generator = np.random.default_rng(1)
    for _ in range(20):
        power = np.square(np.abs(np.fft.rfft(patterns._tone(generator, np.linspace(0, 1, 4096)))))
        first = int(np.flatnonzero(power > 0.01 * power.max())[0])
        assert power[: first // 2].sum() < 0.02 * power.sum()
        lines = np.sort(power)[::-1][:205]  # a tenth
        assert lines.sum() > 0.55 * power.sum()  # of noise a third


def test_surfaces_have_levels_that_neighbours_share() -> None:
    generator = np.random.default_rng(0)
    surfaces = np.stack([patterns.surface(generator, 40, 64) for _ in range(200)])
    deviations = surfaces.std(axis=(1, 2))
    assert deviations.min() >= 0.5 - 1e-9
    assert deviations.max() <= 2 + 1e-9
    assert surfaces.mean(axis=(1, 2)).std() == pytest.approx(1, abs=0.15)
    centred = surfaces - surfaces.mean(axis=(1, 2), keepdims=True)
    level = np.mean(np.square(centred.mean(axis=2))) / np.mean(np.square(centred))
    assert level > 0.1  # of even noise 1 / 64
    assert neighbours(centred) > 0.3
    assert neighbours(centred.swapaxes(1, 2)) > 0.3


def test_written_lines_are_thin_strokes_on_an_even_ground() -> None:
    generator = np.random.default_rng(0)
    inked = []
    for _ in range(60):
        image = patterns.written(generator, 1, 48, 160)
        paper = np.median(image)
        far = np.abs(image - paper) > 0.35
        inked.append(far.mean())
        assert np.isfinite(image).all()
    assert 0.01 < np.mean(inked) < 0.35
    assert np.std(inked) > 0.02


@pytest.mark.parametrize("bound", [3, 257, 30_000])
def test_symbols_are_few_and_come_again(bound: int) -> None:
    generator = np.random.default_rng(0)
    sequences = [patterns.symbols(generator, 200, bound) for _ in range(150)]
    assert all(s.min() >= 0 and s.max() < bound and len(s) == 200 for s in sequences)
    assert len(np.unique(np.concatenate(sequences))) > min(0.9 * bound, 2_500)
    if bound < 100:
        return
    different = [len(np.unique(s)) for s in sequences]
    even = bound * (1 - (1 - 1 / bound) ** 200)  # of 200 even ones that many are different
    assert np.median(different) < 0.4 * even
    pairs = [len({(a, b) for a, b in itertools.pairwise(s)}) / 199 for s in sequences]
    assert np.median(pairs) < 0.75  # of even ones nearly all pairs are different


# --------------------------------------------------------------------------------------------- inputs


def test_frames_and_features_are_signals() -> None:
    """Neither white nor all of one kind, one axis or two; the short open axis is made longer."""
    model = model_of([node("Relu", ["x"], ["y"])], [floats("x", "n", 1024)], [floats("y", "n", 1024)])
    found = rows(made(model, 128), "x")
    alike = np.array([neighbours(frame) for frame in found])
    assert np.mean(alike > 0.5) > 0.3
    assert np.mean(np.abs(alike) < 0.15) > 0.1
    features = [floats("x", "n", "t", 40)], [floats("y", "n", "t", 40)]
    data = made(model_of([node("Relu", ["x"], ["y"])], *features))
    assert rows(data, "x").shape[1] >= 32
    assert neighbours(rows(data, "x")) > 0.2


def test_short_vectors_are_normal() -> None:
    model = model_of([node("Relu", ["x"], ["y"])], [floats("x", "n", 20)], [floats("y", "n", 20)])
    found = rows(made(model, 200), "x")
    assert abs(neighbours(found)) < 0.05
    assert found.std() == pytest.approx(1, abs=0.05)


def test_states_are_zero_in_some_samples() -> None:
    """All states of a sample together; what is no state never is."""
    nodes = [node("Add", ["x", "h"], ["hn"]), node("Tanh", ["c"], ["cn"])]
    values = [floats(name, "n", 16) for name in ("x", "h", "c", "hn", "cn")]
    nodes.append(node("Concat", ["x", "x"], ["y"], axis=1))
    model = model_of(nodes, values[1:3] + values[:1], [*values[3:], floats("y", "n", 32)])
    data = made(model)
    still = {name: (rows(data, name) == 0).all(axis=1) for name in ("x", "h", "c")}
    assert 10 < still["h"].sum() < 38
    assert np.array_equal(still["h"], still["c"])
    assert not still["x"].any()


def test_masks_are_ones_up_to_the_end_of_the_symbols() -> None:
    """One end for all sequences of a sample; behind it symbols are one and the same."""
    nodes = [
        node("Gather", ["table", "ids"], ["e"]),
        node("Cast", ["mask"], ["m"], to=TensorProto.FLOAT),
        node("Unsqueeze", ["m", "two"], ["u"]),
        node("Mul", ["e", "u"], ["y"]),
    ]
    stored = [weight("table", 50, 4), numpy_helper.from_array(np.array([2]), "two")]
    inputs = [integers("ids", "n", "t"), integers("mask", "n", "t")]
    data = made(model_of(nodes, inputs, [floats("y", "n", "t", 4)], stored))
    ids, mask = rows(data, "ids"), rows(data, "mask")
    assert ids.shape[1] >= 32
    assert (np.diff(mask, axis=1) <= 0).all()
    assert (mask[:, 0] == 1).all()
    lengths = mask.sum(axis=1)
    assert len(set(lengths.tolist())) > 10
    assert np.mean(lengths == ids.shape[1]) == pytest.approx(0.5, abs=0.2)
    for row, length in zip(ids, lengths, strict=True):
        assert len(set(row[length:].tolist())) <= 1


def test_positions_count() -> None:
    nodes = [node("Gather", ["table", "position_ids"], ["y"])]
    stored = [weight("table", 50, 4)]
    data = made(model_of(nodes, [integers("position_ids", "n", 6)], [floats("y", "n", 6, 4)], stored))
    assert (rows(data, "position_ids") == np.arange(6)).all()


def test_a_one_hot_is_a_table() -> None:
    """Integers that are compared with 0, 1, ..., 10 are below 11."""
    nodes = [
        node("Unsqueeze", ["ids", "two"], ["u"]),
        node("Equal", ["u", "all"], ["hot"]),
        node("Cast", ["hot"], ["y"], to=TensorProto.FLOAT),
    ]
    stored = [
        numpy_helper.from_array(np.array([2]), "two"),
        numpy_helper.from_array(np.arange(11)[None, None], "all"),
    ]
    data = made(model_of(nodes, [integers("ids", "n", 12)], [floats("y", "n", 12, 11)], stored))
    assert set(rows(data, "ids").ravel().tolist()) == set(range(11))


def test_images_of_bytes_use_their_range() -> None:
    nodes = [node("Cast", ["x"], ["y"], to=TensorProto.FLOAT)]
    data = made(model_of(nodes, [integers("x", "n", 32, 32, 3, kind=UINT8)], [floats("y", "n", 32, 32, 3)]))
    found = rows(data, "x").astype(float)
    assert found.min() == 0
    assert found.max() == 255
    assert neighbours(found[..., 0]) > 0.5


def test_what_does_not_run_longer_stays_short() -> None:
    """The open axis is joined with a constant of nine: no multiple fits."""
    nodes = [node("Add", ["x", "b"], ["y"])]
    model = model_of(nodes, [floats("x", "n", "t", 8)], [floats("y", "n", "t", 8)], [weight("b", 9, 8)])
    assert rows(made(model), "x").shape[1:] in ((9, 8), (1, 8))
