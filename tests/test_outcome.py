"""What a plan comes to: units of every group, and what rounding and blocks of channels make of the MACs."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest

import onnxprune
from models.architectures import ARCHITECTURES
from models.builder import Graph
from onnxprune import outcome
from onnxprune.blocks import Blocks
from onnxprune.dependency import DependencyGraph
from onnxprune.model import Model
from onnxprune.validation import structure

PLAIN: dict[str, Any] = {"criterion": "l2", "allocation": "uniform", "repair": "none"}


def chain(*channels: int) -> onnx.ModelProto:
    """3x3 convolutions, with Relu between them."""
    graph = Graph("chain")
    value = graph.input(1, 8, 12, 12)
    for count in channels:
        value = graph.relu(graph.conv(value, count, 3, pad=1))
    return graph.model(value)


@pytest.mark.parametrize("name", ["mobilenet_v2", "resnet18", "densenet121"])
def test_parts_are_what_the_weights_say(name: str) -> None:
    proto = ARCHITECTURES[name](width=0.5, image=32, classes=10)
    result = onnxprune.shrink(proto, 0.4, align=4, **PLAIN)
    parts = {part.name: part for part in result.report.parts}
    graph = DependencyGraph(Model(proto))
    assert list(parts) == [part.name for part in outcome.parts(Blocks(graph), result.plan)]
    assert set(parts) == {group.name for group in graph.groups}
    assert sum(part.before for part in parts.values()) == result.report.before.channels
    assert sum(part.after for part in parts.values()) == result.report.after.channels
    places = {group.name: min(node.index for node in group.nodes) for group in graph.groups}
    assert [places[name] for name in parts] == sorted(places.values())
    seen = outcome.found_parts(Blocks(graph), Model(result.proto))
    assert len(seen) > len(parts) / 2
    assert all(parts[part.name] == part for part in seen)


def test_a_removed_block_is_a_part() -> None:
    proto = ARCHITECTURES["resnet18"](width=0.5, image=32, classes=10)
    result = onnxprune.shrink(proto, layers=1, **PLAIN)
    removed = [part for part in result.report.parts if part.role == "layers"]
    assert [(part.before, part.after) for part in removed] == [(1, 0)]


def test_what_blocks_of_channels_cost() -> None:
    """64 -> 57 -> 57 -> out: every count fills 64 again, and nothing is saved."""
    proto = chain(64, 64, 16)
    report = onnxprune.shrink(proto, 0.1, align=1, **PLAIN).report
    assert report.padding is not None
    assert report.padding.padded == 1.0
    kept = 58 / 64
    work = [8 * 64, 64 * 64, 64 * 16]
    left = [8 * 64 * kept, 64 * 64 * kept**2, 64 * 16 * kept]
    assert report.kept["macs"] == pytest.approx(sum(left) / sum(work))
    assert report.padding.asked == pytest.approx(report.kept["macs"])
    assert any("blocks of 16" in note for note in report.notes)


def test_what_rounding_keeps() -> None:
    """A tenth of 64 channels is less than half a block of 16, and stays."""
    proto = chain(64, 128, 16)
    report = onnxprune.shrink(proto, 0.1, **PLAIN).report
    after = {part.before: part.after for part in report.parts}
    assert after == {64: 64, 128: 112}
    padding = report.padding
    assert padding is not None
    assert padding.padded == pytest.approx(report.kept["macs"])
    counts = np.array([8, 58, 115, 16])
    whole = np.array([8, 64, 128, 16])
    asked = (counts[:-1] * counts[1:]).sum() / (whole[:-1] * whole[1:]).sum()
    assert padding.asked == pytest.approx(asked)
    assert any("rounding keeps" in note for note in report.notes)


def test_a_target_asks_for_no_counts() -> None:
    padding = onnxprune.shrink(chain(64, 64, 16), macs=0.5, **PLAIN).report.padding
    assert padding is not None
    assert padding.asked is None


def test_declarations_find_what_onnx_does_not() -> None:
    """Input channels of a weight that are not those of its input pass the checker and shape inference."""
    proto = chain(16, 16)
    broken = onnx.ModelProto()
    broken.CopyFrom(proto)
    weight = next(t for t in broken.graph.initializer if tuple(t.dims) == (16, 16, 3, 3))
    weight.CopyFrom(onnx.numpy_helper.from_array(np.zeros((16, 12, 3, 3), np.float32), weight.name))
    problems = structure.check(Model(proto), Model(broken), [])
    assert any(problem.startswith("axes: ") for problem in problems)
    assert not any(problem.startswith("onnx ") for problem in problems)
    assert structure.check(Model(proto), Model(proto), []) == []
