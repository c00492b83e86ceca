"""The command as a process: entry points, determinism, pipes and terminals."""

from __future__ import annotations

import json
import os
import pty
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from models.topologies import TOPOLOGIES
from onnxprune import __version__
from tests.small import write

MODULE = [sys.executable, "-m", "onnxprune"]
HALF = ["--channels", "0.5", "--align", "1"]
PLAIN = ["--criterion", "l2", "--allocation", "uniform", "--repair", "none"]  # looks at weights alone


ROOT = Path(__file__).parents[2]


def call(
    *arguments: object, folder: Path | None = None, **environment: str
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*MODULE, *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
    )


@pytest.fixture
def small(tmp_path: Path) -> Path:
    """Residual blocks; image [batch, 3, 8, 8] to 5 classes."""
    return write(TOPOLOGIES["residual_projection_stage"](), tmp_path / "small.onnx")


@pytest.fixture
def data(tmp_path: Path) -> Path:
    random = np.random.default_rng(0)
    images = random.standard_normal((40, 3, 8, 8), dtype=np.float32)
    np.savez(tmp_path / "data.npz", image=images, labels=random.integers(0, 5, 40))
    return tmp_path / "data.npz"


def test_entry_points() -> None:
    assert (
        call("--version").stdout == f"onnxprune, version {__version__}\n"
        or "onnxprune" in call("--version").stdout
    )
    script = Path(sys.executable).with_name("onnxprune")
    if not script.exists():
        pytest.skip("the package is not installed here")
    done = subprocess.run([script, "--version"], capture_output=True, text=True, check=True)
    assert done.stdout == f"onnxprune, version {__version__}\n"


def test_the_same_bytes_in_every_process(small: Path, data: Path) -> None:
    """Scores, budget and repair on data, whatever the order of hashes."""
    outputs = []
    for seed in ("0", "1"):
        target, plan = small.with_name(f"{seed}.onnx"), small.with_name(f"{seed}.json")
        options = ("--macs", 0.6, "--align", 1, "--data", data, "-o", target, "--plan-out", plan)
        done = call("shrink", small, *options, "--json", "-", PYTHONHASHSEED=seed)
        assert done.returncode == 0, done.stderr
        report = json.loads(done.stdout)
        for changing in ("seconds", "output"):
            report.pop(changing)
        outputs.append((target.read_bytes(), plan.read_bytes(), report))
    assert outputs[0] == outputs[1]


def test_a_pipe_sees_plain_text_and_no_progress(small: Path, data: Path) -> None:
    for command in (
        ["shrink", small, *HALF, "--data", data],
        ["inspect", small],
        ["plan", small, *HALF, "--data", data, "-o", "-"],
        ["sensitivity", small, "--data", data, "--ratios", 0.5, "-o", small.with_name("found.json")],
        ["sensitivity", small, "--data", data, "--ratios", 0.5, "-o", "-"],
    ):
        done = call(*command, TERM="xterm-256color", COLUMNS="40")
        assert done.returncode == 0
        assert done.stderr == ""
        assert "\x1b" not in done.stdout
        assert "\r" not in done.stdout
        if command[-1] == "-":
            json.loads(done.stdout)


def test_a_closed_pipe_is_no_crash(model: Path) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(
        [*MODULE, "inspect", str(model)], stdout=writer, stderr=subprocess.PIPE, text=True, check=False
    )
    os.close(writer)
    assert "Traceback" not in done.stderr
    assert "internal error" not in done.stderr


def left_on_screen(stream: str) -> list[str]:
    """The lines of a terminal that was sent this: text, returns, line feeds, cursor up, erased lines."""
    lines, row, column = [""], 0, 0
    for control, final, text in re.findall(r"\x1b\[([0-9;?]*)([A-Za-z])|([^\x1b])", stream):
        if text == "\r":
            column = 0
        elif text == "\n":
            row += 1
            lines += [""] * (row + 1 - len(lines))
        elif text:
            lines[row] = lines[row][:column].ljust(column) + text + lines[row][column + 1 :]
            column += 1
        elif final == "A":
            row = max(row - int(control or 1), 0)
        elif final == "K":
            assert control == "2"
            lines[row] = ""
        else:
            assert final in "mhl", f"sequence {control}{final}"
    return lines


def test_the_terminal_of_these_tests() -> None:
    assert left_on_screen("one\r\ntwo\r\x1b[2K\x1b[1A\x1b[2Kx\x1b[31my") == ["xy", ""]
    assert left_on_screen("left\rr") == ["reft"]


@pytest.mark.parametrize("command", ["shrink", "sensitivity"])
def test_a_terminal_sees_progress(command: str, small: Path, data: Path) -> None:
    """On a terminal the stage at work and its share are shown on stderr, and wiped."""
    options = {"shrink": ["--macs", "0.6", "--align", "1"], "sensitivity": ["-o", str(small) + ".json"]}
    controller, terminal = pty.openpty()
    with subprocess.Popen(
        [*MODULE, command, str(small), "--data", str(data), *options[command]],
        stdout=subprocess.PIPE,
        stderr=terminal,
        env={**os.environ, "TERM": "xterm-256color", "COLUMNS": "80"},
    ) as process:
        os.close(terminal)
        chunks = b""
        while True:
            try:
                chunk = os.read(controller, 4096)
            except OSError:  # how Linux says that the other side is closed
                break
            if not chunk:
                break
            chunks += chunk
        assert process.stdout is not None
        table = process.stdout.read()
    os.close(controller)
    assert process.returncode == 0
    shown = chunks.decode()
    stages = {"shrink": ("calibrate", "probe", "prove", "repair"), "sensitivity": ("calibrate", "measure")}
    seen = [stage for stage in stages[command] if stage in shown]
    assert seen, shown
    assert "\x1b" in shown
    assert shown.count("\x1b[?25l") == shown.count("\x1b[?25h")  # the cursor is back
    assert not any(line.strip() for line in left_on_screen(shown))
    assert b"\x1b" not in table
    assert b"wrote" in table


JUDGE = """
import os, signal
calls = 0

def interrupted(outputs, labels):
    global calls
    calls += 1
    if calls == 4:
        os.kill(os.getpid(), signal.SIGINT)
    return float((outputs.argmax(axis=1) == labels).mean())
"""


def test_an_interrupted_survey_goes_on(small: Path, data: Path, tmp_path: Path) -> None:
    (tmp_path / "judge.py").write_text(JUDGE)
    found = tmp_path / "found.json"
    options = ("--data", data, "--ratios", "0.25,0.5", "--metric", "judge:interrupted", "-o", found)
    done = call("sensitivity", small, *options, folder=tmp_path)
    assert done.returncode == 130
    assert done.stdout == ""
    assert f"interrupted; {found} holds what was measured, and the same command goes on" in done.stderr
    assert done.stderr.count("\n") == 1
    partial = json.loads(found.read_text())
    assert partial["complete"] is False
    assert len(partial["entries"]) == 2  # the first call was for the whole
    (tmp_path / "judge.py").write_text(JUDGE.replace("calls == 4", "False"))
    assert call("sensitivity", small, *options, folder=tmp_path).returncode == 0
    whole = tmp_path / "whole.json"
    assert call("sensitivity", small, *options[:-1], whole, folder=tmp_path).returncode == 0
    assert found.read_bytes() == whole.read_bytes()
    assert json.loads(whole.read_text())["complete"] is True


def test_an_interrupted_run_writes_nothing(small: Path, data: Path, tmp_path: Path) -> None:
    (tmp_path / "judge.py").write_text(JUDGE.replace("calls == 4", "calls == 2"))
    before = sorted(path.name for path in tmp_path.iterdir())
    done = call(
        "shrink", small, *HALF, *PLAIN, "--eval", data, "--metric", "judge:interrupted", folder=tmp_path
    )
    assert done.returncode == 130
    assert done.stderr == "onnxprune: interrupted; nothing was written\n"
    after = sorted(path.name for path in tmp_path.iterdir() if path.name != "__pycache__")
    assert after == before
