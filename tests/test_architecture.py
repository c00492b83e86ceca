"""House rules that a machine can hold: import direction, one declaration per operator, documented options."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

from onnxprune.ops import declared

PACKAGE = Path(__file__).parents[1] / "onnxprune"

# Each module may import those to its left only.
LAYERS = [
    "errors", "axes", "stored", "flow", "graphsurgeon", "model", "ops", "sizes", "runtime", "shapes", "data", "outputs", "metrics", "parts", "dependency", "blocks", "naming", "cost", "plan", "rewrite", "surgery",
    "readers", "statistics", "criteria", "allocation", "targets", "timing", "grids", "latency", "measuring", "repair", "sensitivity", "calibration", "passes", "validation", "reference", "comparison", "report", "outcome", "inspection", "job", "search", "pipeline", "quantisation", "survey", "html", "api", "plugins", "cli",
]  # fmt: skip


def imports(path: Path) -> set[str]:
    """First-level modules of the package that a file imports."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "onnxprune":
            parts = node.module.split(".")[1:]
            found |= {parts[0]} if parts else {alias.name for alias in node.names}
        elif isinstance(node, ast.Import):
            found |= {a.name.split(".")[1] for a in node.names if a.name.startswith("onnxprune.")}
    return found & set(LAYERS)


def layer(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


@pytest.mark.parametrize(
    "path",
    [p for p in sorted(PACKAGE.rglob("*.py")) if layer(p) not in ("__init__", "__main__")],
    ids=lambda p: str(p.relative_to(PACKAGE)),
)
def test_imports_point_down(path: Path) -> None:
    here = LAYERS.index(layer(path))
    above = {name for name in imports(path) if LAYERS.index(name) > here}
    assert not above


def test_the_order_is_documented() -> None:
    text = (PACKAGE.parent / "docs" / "design.md").read_text(encoding="utf-8")
    listed = text.split("Modules, from the bottom:")[1].split("Imports point down only")[0]
    assert re.findall(r"`(\w+)`", listed) == LAYERS


def test_no_operator_is_named_outside_ops() -> None:
    """Weights, masks and costs come from declarations, never from a list of layer types."""
    layers = {"Conv", "ConvTranspose", "Gemm", "MatMul", "BatchNormalization", "LayerNormalization"}
    for path in PACKAGE.rglob("*.py"):
        if layer(path) == "ops" or path.name == "fold.py":
            continue
        strings = {
            node.value
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
            if isinstance(node, ast.Constant) and isinstance(node.value, str)
        }
        assert not strings & layers, path


def test_standard_operators_of_cnns_are_declared() -> None:
    names = {spec.name for spec in declared() if spec.domain == ""}
    expected = [
        "Conv",
        "ConvTranspose",
        "Gemm",
        "MatMul",
        "BatchNormalization",
        "InstanceNormalization",
        "LayerNormalization",
        "GroupNormalization",
        "LRN",
        "PRelu",
        "Clip",
        "AveragePool",
        "MaxPool",
        "LpPool",
        "GlobalAveragePool",
        "GlobalMaxPool",
        "ReduceMean",
        "ReduceSum",
        "ReduceMax",
        "ReduceMin",
        "ReduceL2",
        "Concat",
        "Split",
        "Slice",
        "Pad",
        "Resize",
        "Upsample",
        "Flatten",
        "Reshape",
        "Transpose",
        "Squeeze",
        "Unsqueeze",
        "Expand",
        "Tile",
        "Gather",
        "DepthToSpace",
        "SpaceToDepth",
        "Einsum",
        "Cast",
        "Identity",
        "Dropout",
        "Softmax",
        "Shape",
        "Constant",
        "ConstantOfShape",
        "Add",
        "Sum",
        "Mul",
        "Max",
        "Where",
        "Relu",
        "Sigmoid",
    ]
    assert set(expected) <= names
