"""tract, an inference engine in Rust, on the CPU."""

from __future__ import annotations

import os
import platform
import re
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from onnxprune.allocation import Alignment
from onnxprune.runtime import Feeds
from onnxprune.targets import tract_program
from onnxprune.targets.cpu import UNSIGNED, Cpu
from onnxprune.targets.fixed import dtypes, fixed, opened
from onnxprune.targets.messages import one_line
from onnxprune.targets.target import Engine, State, Target, TargetError, version_of

PATIENCE = 300  # seconds for the trial of a model
PREPARED = 8  # sets of shapes that are kept ready
_PANIC = re.compile(r"panicked at \S+\s+(.*?)(?:\nnote:|\nstack backtrace|\n\n|\Z)", re.DOTALL)


class Tract(Target):
    """Convolutions are matrix products in tiles of whole vector registers. Measured with 0.23.9 and AVX-512, in
    units of 64 channels: 3x3 of 56 to 63 channels 0.94 to 1.02, of 48 0.75, of 65 1.34; a matrix product of 65
    1.12; a depthwise convolution costs in proportion to its channels, whatever their number.
    """

    name = "tract"
    title = "tract, CPU"
    scheme = UNSIGNED
    extra = "tract"

    def alignment(self) -> Alignment:
        block = Cpu().alignment().channels
        return Alignment(block, 1, block)

    def state(self) -> State:
        device = platform.machine()
        if version := version_of("tract"):
            return State("runs", f"tract {version}", device)
        return State("absent", device=device, missing=f"tract is not installed: {self.install()}")

    def load(self, path: Path, threads: int = 1) -> Engine:
        return TractEngine(path)


class TractEngine(Engine):
    """A model, prepared for every set of input shapes that it meets.

    Where tract has no answer it may abort the process, so that each set of shapes is tried in another process
    first. Values are not: an index out of range, which onnxruntime refuses, would still end this one. It computes
    on one thread, however many there are.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        version = version_of("tract")
        if not version:
            raise TargetError(f"tract is not installed: {Tract().install()}")
        model, feeds = opened(path)
        self._outputs = [output.name for output in model.outputs]
        self._types = dtypes(model.inputs, "input")
        self._ready: dict[tuple[tuple[int, ...], ...], tract_program.Prepared] = {}
        self._prepared(feeds)
        self.nodes: dict[str, int] = {}
        self.settings = {
            "provider": "tract",
            "version": f"tract {version}",
            "device": platform.machine(),
            "precision": "as stored",
            "threads": 1,
        }

    def _prepared(self, feeds: Feeds) -> tract_program.Prepared:
        key = tuple(feeds[name].shape for name in self._types if name in feeds)
        if key not in self._ready:
            with tempfile.TemporaryDirectory(prefix="onnxprune-") as folder:
                path = fixed(self._path, feeds, Path(folder))
                _try(path, feeds, Path(folder))
                while len(self._ready) >= PREPARED:
                    del self._ready[next(iter(self._ready))]
                self._ready[key] = tract_program.Prepared(str(path), feeds)
        return self._ready[key]

    def run(self, feeds: Feeds) -> dict[str, Any]:
        given = {k: v.astype(self._types[k], copy=False) for k, v in feeds.items() if k in self._types}
        try:
            return dict(zip(self._outputs, self._prepared(given).run(given), strict=True))
        except TargetError:
            raise
        except Exception as error:  # its class is only known where tract is imported
            raise TargetError(_worded(f"{error}")) from None


def _try(path: Path, feeds: Feeds, folder: Path) -> None:
    """Run a model once in a process of its own. Raises `TargetError`, also where that process dies."""
    stored = folder / "feeds.npz"
    numbered: dict[str, Any] = {f"value{i:06}": value for i, value in enumerate(feeds.values())}
    np.savez(stored, names=np.array(list(feeds), dtype=np.str_), **numbered)
    command = [sys.executable, "-P", tract_program.__file__, str(path), str(stored)]
    environment = os.environ | {"RUST_BACKTRACE": "0"}
    try:
        done = subprocess.run(command, capture_output=True, timeout=PATIENCE, check=False, env=environment)
    except subprocess.TimeoutExpired:
        raise TargetError(f"tract did not finish in {PATIENCE} seconds") from None
    if done.returncode:
        said = done.stderr.decode(errors="replace")
        if done.returncode > 0:
            raise TargetError(_worded(said))
        panics = [match.strip() for match in _PANIC.findall(said)] or said.strip().splitlines()
        why = one_line(panics[0]) if panics else "without a word"
        raise TargetError(f"tract died of {signal.Signals(-done.returncode).name}: {why}")


def _worded(text: str) -> str:
    """tract's chain of causes: what it was at, and the innermost cause."""
    lines = [line.strip() for line in text.splitlines() if line.strip() and line.strip() != "Caused by:"]
    lines = [re.sub(r"^\d+: ", "", line) for line in lines]
    return one_line(": ".join(dict.fromkeys([*lines[:1], *lines[-1:]]))) or "tract says nothing"


TARGET = Tract
