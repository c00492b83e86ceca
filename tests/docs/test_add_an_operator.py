"""The recipe in docs/add-an-operator.md, run as written."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]

# conv -> CropAndResize -> conv, judged before and after the declaration
CHECK = """
import numpy as np
from onnx import TensorProto
from models.builder import Graph
from onnxprune import NothingToPrune, shrink


def model():
    g = Graph("detector")
    x = g.conv(g.input("batch", 3, 8, 8), 8, 3, pad=1)
    boxes = g.const([[0.1, 0.1, 0.8, 0.8], [0.0, 0.2, 1.0, 0.9]], np.float32)
    index, size = g.const([0, 0], np.int32), g.const([4, 4], np.int32)
    y = g.op("CropAndResize", x, boxes, index, size, domain="com.microsoft",
             shape=(2, 8, 4, 4), dtype=TensorProto.FLOAT)
    return g.model(g.conv(y, 5, 1))


def channels_left():
    try:
        result = shrink(model(), channels=0.5, align=1)
    except NothingToPrune as error:
        return str(error)
    assert result.report.equivalence.passed
    return result.report.after.channels


before = channels_left()
assert "CropAndResize has no declaration" in before, before
{recipe}
after = channels_left()
assert after == 4, after
"""


def test_the_recipe_works() -> None:
    text = (ROOT / "docs/add-an-operator.md").read_text(encoding="utf-8")
    (recipe,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    code = CHECK.replace("{recipe}", recipe)
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
