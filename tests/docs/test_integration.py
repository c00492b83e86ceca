"""docs/integration.md and its examples, run as written."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import helper

import onnxprune
from models.builder import Graph
from onnxprune import errors
from tests.small import floats, write

DOCS = Path(__file__).parents[2] / "docs"
TEXT = (DOCS / "integration.md").read_text(encoding="utf-8")
EXAMPLES = DOCS / "examples"
RTX = importlib.util.find_spec("tensorrt_rtx") is not None


def blocks(section: str) -> list[tuple[str, str]]:
    """Language and text of the code blocks under a heading."""
    (found,) = (part for part in re.split(r"^## ", TEXT, flags=re.MULTILINE)[1:] if part.startswith(section))
    return re.findall(r"^```(\w+)\n(.*?)^```$", found, re.DOTALL | re.MULTILINE)


def run(code: str, folder: Path, language: str = "bash", expect: int = 0) -> str:
    command = {"bash": ["bash", "-e", "-c", code], "python": [sys.executable, "-W", "error", "-c", code]}[
        language
    ]
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    env = {**os.environ, "PATH": path}
    done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == expect, done.stdout + done.stderr
    return done.stdout


def convolutions() -> onnx.ModelProto:
    g = Graph("convolutions", seed=3)
    x = g.input("batch", 3, 12, 12, name="image")
    x = g.conv_bn(g.conv_bn(x, 32, 3, act="relu"), 32, 3, act="relu")
    return g.model(g.gemm(g.flatten(g.gap(x)), 5), names=["logits"])


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The models and data that the document speaks of, and the examples."""
    shutil.copytree(EXAMPLES, tmp_path, dirs_exist_ok=True)
    write(convolutions(), tmp_path / "net.onnx")
    one = helper.make_node("Relu", ["x"], ["y"])
    write(
        helper.make_model(helper.make_graph([one], "tiny", [floats("x", 2)], [floats("y", 2)])),
        tmp_path / "tiny.onnx",
    )
    generator = np.random.default_rng(0)
    for name in ("calib.npz", "val.npz"):
        np.savez(tmp_path / name, image=generator.standard_normal((8, 3, 12, 12), dtype=np.float32))
    return tmp_path


def shrunk(folder: Path) -> onnxprune.Result:
    result = onnxprune.shrink(folder / "net.onnx", macs=0.5, data=folder / "calib.npz")
    result.save(folder / "small.onnx")
    return result


def test_the_sections_that_are_run_here_are_all_there_are() -> None:
    assert re.findall(r"^## (.*)$", TEXT, re.MULTILINE) == [
        "Shell and CI", "Python", "onnx-graphsurgeon", "Polygraphy and TensorRT", "Olive",
    ]  # fmt: skip
    assert {path.name for path in EXAMPLES.iterdir() if path.is_file()} == set(
        re.findall(r"\(examples/([\w.]+)\)", TEXT)
    )


def test_shell(folder: Path) -> None:
    first, nothing = blocks("Shell")
    run(first[1], folder)
    verdict = json.loads((folder / "verdict.json").read_text())
    assert verdict["passed"]
    assert verdict["quality"]["after"] > 0.9
    assert {"ratio", "range"} <= verdict["latency"].keys()
    assert json.loads((folder / "report.json").read_text())["kept"]["macs"] <= 0.5
    assert (folder / "plan.json").exists()
    run(nothing[1], folder)
    assert (folder / "smaller.onnx").read_bytes() == (folder / "tiny.onnx").read_bytes()


def test_exit_codes() -> None:
    table = {int(code) for code in re.findall(r"^\| (\d+) \|", TEXT, re.MULTILINE)}
    raised = {one.exit_code for one in vars(errors).values() if isinstance(one, type)}
    assert table == raised | {0, 1, 130}


def test_steps_of_a_workflow(folder: Path) -> None:
    steps = re.findall(r"^  run: \|\n((?:    .*\n)+)", (folder / "workflow.yml").read_text(), re.MULTILINE)
    shrink, validate, gate = (re.sub(r"^    ", "", step, flags=re.MULTILINE) for step in steps)
    assert shrink + validate == blocks("Shell")[0][1], "which test_shell runs"
    for after, code in ((0.95, 0), (0.85, 1)):
        (folder / "verdict.json").write_text(json.dumps({"quality": {"after": after}}))
        run(gate, folder, expect=code)


def test_python(folder: Path) -> None:
    ((language, code),) = blocks("Python")
    run(code, folder, language)
    assert onnx.load(folder / "small.onnx") == shrunk(folder).model


def dims(model: onnx.ModelProto) -> dict[str, list[int]]:
    return {tensor.name: list(tensor.dims) for tensor in model.graph.initializer}


def test_graphsurgeon(folder: Path) -> None:
    ((language, code),) = blocks("onnx-graphsurgeon")
    run(code, folder, language)
    small = onnx.load(folder / "small.onnx")
    assert dims(small) == dims(shrunk(folder).model)


def test_polygraphy(folder: Path) -> None:
    shrunk(folder)
    compare, alone, _ = blocks("Polygraphy")
    run(compare[1], folder)
    said = run(alone[1], folder)
    assert "original vs. pruned | Passed: 8/8" in said
    run(f"ALIKE=1.1 {alone[1]}", folder, expect=1)


@pytest.mark.skipif(not RTX, reason="tensorrt_rtx is not installed")
def test_hand_over_to_tensorrt(folder: Path) -> None:
    shrunk(folder)
    *_, build = blocks("Polygraphy")
    run(build[1], folder)
    assert (folder / "small.engine").stat().st_size > 0
    commands = json.loads((folder / "build.json").read_text())["commands"]
    assert any(line.startswith("trtexec ") and "--minShapes=image:1x3x12x12" in line for line in commands)
    assert any(
        line.startswith("polygraphy run small.onnx --trt --strongly-typed --onnxrt") for line in commands
    )
