"""The command as a process: entry points, determinism, pipes and terminals."""

from __future__ import annotations

import json
import os
import pty
import subprocess
import sys
from pathlib import Path

import pytest

from onnxprune import __version__

MODULE = [sys.executable, "-m", "onnxprune"]
HALF = ["--channels", "0.5", "--align", "1"]


def call(*arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*MODULE, *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        env={**os.environ, **environment},
    )


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


def test_the_same_bytes_in_every_process(model: Path) -> None:
    outputs = []
    for seed in ("0", "1", "random"):
        target, plan = model.with_name(f"{seed}.onnx"), model.with_name(f"{seed}.json")
        done = call(
            "shrink", model, *HALF, "-o", target, "--plan-out", plan, "--json", "-", PYTHONHASHSEED=seed
        )
        assert done.returncode == 0, done.stderr
        report = json.loads(done.stdout)
        for changing in ("seconds", "output"):
            report.pop(changing)
        outputs.append((target.read_bytes(), plan.read_bytes(), report))
    assert outputs[0] == outputs[1] == outputs[2]


def test_a_pipe_sees_plain_text_and_no_progress(model: Path) -> None:
    for command in (["shrink", model, *HALF], ["inspect", model], ["plan", model, *HALF, "-o", "-"]):
        done = call(*command, TERM="xterm-256color", COLUMNS="40")
        assert done.returncode == 0
        assert done.stderr == ""
        assert "\x1b" not in done.stdout
        assert "\r" not in done.stdout


def test_a_closed_pipe_is_no_crash(model: Path) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(
        [*MODULE, "inspect", str(model)], stdout=writer, stderr=subprocess.PIPE, text=True, check=False
    )
    os.close(writer)
    assert "Traceback" not in done.stderr
    assert "internal error" not in done.stderr


def test_a_terminal_sees_progress(model: Path) -> None:
    """On a terminal the stage at work is shown on stderr, and wiped."""
    controller, terminal = pty.openpty()
    with subprocess.Popen(
        [*MODULE, "shrink", str(model), *HALF],
        stdout=subprocess.PIPE,
        stderr=terminal,
        env={**os.environ, "TERM": "xterm-256color", "COLUMNS": "80"},
    ) as process:
        os.close(terminal)
        shown = b""
        while True:
            try:
                chunk = os.read(controller, 4096)
            except OSError:  # how Linux says that the other side is closed
                break
            if not chunk:
                break
            shown += chunk
        assert process.stdout is not None
        table = process.stdout.read()
    os.close(controller)
    assert process.returncode == 0
    assert b"prove" in shown
    assert b"\x1b" in shown
    assert b"\x1b" not in table
    assert b"groups cut" in table
