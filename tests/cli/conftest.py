from __future__ import annotations

from pathlib import Path

import pytest

from models.architectures import resnet18
from onnxprune import timing
from tests.small import write


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return write(resnet18(width=0.125, image=32, classes=10), tmp_path / "model.onnx")


@pytest.fixture
def short_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    """Latency rounds of 10 ms: the numbers mean nothing, the table is there."""
    monkeypatch.setattr(timing, "SECONDS", 0.01)
