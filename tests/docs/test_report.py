"""docs/report.md names every key that programs can read."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx

import onnxprune
from models.builder import Graph
from onnxprune import api

PAGE = Path(__file__).parents[2] / "docs" / "report.md"
FREE = {"settings", "method", "engines", "provenance", "options", "seconds", "skipped", "pinned", "changes", "errors",
        "original_errors", "nodes", "sizes", "built", "kept"}  # fmt: skip
"""Mappings whose keys are names, or documented where they come from."""


def keys(value: Any) -> set[str]:
    """Of a mapping and those inside."""
    if isinstance(value, Mapping):
        inside = [keys(one) for key, one in value.items() if key not in FREE]
        return set(value).union(*inside)
    return set[str]().union(*map(keys, value)) if isinstance(value, list | tuple) else set()


def test_every_key_is_named(tmp_path: Path) -> None:
    graph = Graph("small", seed=0)
    value = graph.input("batch", 3, 8, 8, name="image")
    for _ in range(2):
        value = graph.relu(graph.conv(value, 32))
    proto = graph.model(graph.gemm(graph.flatten(graph.gap(value)), 5))
    path, small = tmp_path / "model.onnx", tmp_path / "small.onnx"
    onnx.save(proto, path)
    images = np.random.default_rng(0).standard_normal((24, 3, 8, 8), dtype=np.float32)
    result = onnxprune.shrink(
        path, max_drop=1.0, metric="agreement", data=images, targets=["cpu"], allow_slower=True
    )
    result.save(small)
    validated = api.validate(path, small, result.plan, data=images, metric="agreement", targets=["cpu"])
    text = PAGE.read_text(encoding="utf-8")
    found = keys(result.report.as_dict()) | keys(validated.as_dict())
    assert {"candidates", "padding", "parts", "timing", "memory", "agreement"} <= found
    told = {"top1", "kl", "cosine", "snr", "softmax", "unlike"}  # metrics, explained in the README
    assert sorted(key for key in found - told if f"`{key}`" not in text) == []
