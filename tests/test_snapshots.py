"""Groups and plan of every fixture as text: a refactoring must leave them untouched.

Rewrite them with `pytest tests/test_snapshots.py --update-snapshots`.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import onnx
import pytest

from models.architectures import ARCHITECTURES
from models.topologies import TOPOLOGIES
from onnxprune import passes
from onnxprune.blocks import Blocks
from onnxprune.dependency import DependencyGraph
from onnxprune.model import Model
from onnxprune.outcome import pinned_reasons
from onnxprune.passes import Options
from onnxprune.passes.units import choose
from onnxprune.plan import format_units

FOLDER = Path(__file__).parent / "snapshots"


def describe(model: onnx.ModelProto) -> Iterator[str]:
    """One line per group, per reason for a pin, and per edit of a plan at 0.5."""
    graph = DependencyGraph(Model(model))
    blocks = Blocks(graph)
    options = Options(0.5, align=1)
    skipped = {choice.group.name: choice.skipped for choice in choose(blocks, options)}
    kept = {edit.group: format_units(edit.units) for edit in passes.plan(blocks, options, "").keeps}
    for group in graph.groups:
        state = f"keep {kept[group.name]}" if group.name in kept else f"whole ({skipped[group.name]})"
        yield f"{group.name} | {group.size} x{group.stride} {group.kind} | {len(group.nodes)} nodes | {state}"
    for reason, count in sorted(pinned_reasons(graph).items()):
        yield f"pinned {count}: {reason}"


def compare(name: str, lines: list[str], update: bool) -> None:
    path = FOLDER / f"{name}.txt"
    text = "\n".join(lines) + "\n"
    if update:
        FOLDER.mkdir(exist_ok=True)
        path.write_text(text, encoding="utf-8")
    assert path.read_text(encoding="utf-8") == text


def test_topologies(request: pytest.FixtureRequest) -> None:
    lines = []
    for name, build in sorted(TOPOLOGIES.items()):
        lines += [f"== {name}", *describe(build())]
    compare("topologies", lines, request.config.getoption("--update-snapshots"))


@pytest.mark.parametrize("name", sorted(ARCHITECTURES))
def test_architectures(name: str, request: pytest.FixtureRequest) -> None:
    model = ARCHITECTURES[name](width=0.125, image=64, classes=10)
    compare(name, list(describe(model)), request.config.getoption("--update-snapshots"))
