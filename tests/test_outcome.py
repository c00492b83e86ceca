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


@pytest.mark.parametrize(("ratio", "left", "filled"), [(0.06, 60, 64), (0.1, 58, 76)])
def test_what_blocks_of_channels_cost(ratio: float, left: int, filled: int) -> None:
    """60 of 64 channels fill 64 again, and nothing is saved; off multiples of 4 they take slower kernels."""
    report = onnxprune.shrink(chain(64, 64, 16), ratio, align=1, **PLAIN).report

    def work(count: int) -> int:
        return 8 * count + count**2 + count * 16

    assert report.padding is not None
    assert report.padding.padded == work(filled) / work(64)
    assert report.kept["macs"] == pytest.approx(work(left) / work(64))
    assert report.padding.asked == pytest.approx(report.kept["macs"])
    assert any("blocks of 16" in note for note in report.notes)


def test_an_original_off_the_blocks_costs_more_than_its_blocks() -> None:
    """27 channels cost 36 (onnxruntime on x86 takes 1.3 times as long as for 24), 24 cost 32."""
    report = onnxprune.shrink(chain(27, 27, 16), 0.1, **PLAIN).report
    assert [part.after for part in report.parts] == [24, 24]
    assert report.padding is not None
    assert report.padding.padded == (8 * 32 + 32**2 + 32 * 16) / (8 * 36 + 36**2 + 36 * 16)
    assert not any("kernels" in note for note in report.notes)


def test_a_least_count_is_rounded_to_what_depthwise_convolutions_take() -> None:
    proto = ARCHITECTURES["mobilenet_v2"](width=1.0, image=32, classes=10)
    report = onnxprune.shrink(proto, 0.7, min_channels=50, **PLAIN).report
    kept = [(part.before, part.after) for part in report.parts]
    assert all(after >= min(before, 50) for before, after in kept)
    assert all(after == before or after % 16 == 0 for before, after in kept)
    assert (96, 64) in kept


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
