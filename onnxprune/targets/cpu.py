"""onnxruntime's CPU provider, on this machine."""

from __future__ import annotations

import functools
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import onnxruntime as ort

from onnxprune.allocation import Alignment
from onnxprune.runtime import Feeds, RunError, Session, newest
from onnxprune.targets.target import Engine, Scheme, State, Target, TargetError, Versions

PROVIDER = "CPUExecutionProvider"
X86 = ("x86_64", "AMD64")


UNSIGNED = Scheme(
    "uint8", None, symmetric=False, biases=True, reach="chains",
    why="kernels of MLAS take uint8 by int8; matrix products give floats, convolutions need an output border",
)  # fmt: skip


class Cpu(Target):
    """Convolutions run on channels in blocks of 16 (AVX-512) or 8 (AVX2), padded up, and where the outputs fill no block
    on other kernels: a 1x1 convolution with 8 outputs takes 1.3 times as long as with 16. ARM has no such blocks, its
    matrix kernels fill registers of 4 and tiles of 8 or 16 (MLAS, `nchwc_transformer.cc` and the kernels beside it).
    """

    name = "cpu"
    title = "onnxruntime, CPU"
    scheme = UNSIGNED

    def alignment(self) -> Alignment:
        block = 16 if _wide() else 8
        return Alignment(block, block, block, whole=platform.machine() in X86)

    def state(self) -> State:
        kind = platform.machine() + (", AVX-512" if _wide() else "")
        return State("runs", f"onnxruntime {ort.__version__}", kind)

    def newest(self) -> Versions:
        return Versions(*newest())

    def load(self, path: Path, threads: int = 1) -> Engine:
        return CpuEngine(path, threads)


class CpuEngine(Engine):
    """A session with all optimisations.

    Threads that have nothing to do sleep. By default they spin, and those of one engine take the processors from the
    other (onnxruntime, Thread management).
    """

    place = PROVIDER

    def __init__(self, path: Path, threads: int) -> None:
        try:
            self._session = Session(path, optimise="all", threads=threads, placement=True, spinning=False)
        except RunError as error:
            raise TargetError(f"{error}") from None
        self.nodes = self._session.placement
        self.settings = {
            "provider": PROVIDER,
            "version": f"onnxruntime {ort.__version__}",
            "level": "all",
            "threads": threads,
            "spinning": False,
            "precision": "as stored",
        }

    def run(self, feeds: Feeds) -> dict[str, Any]:
        try:
            return self._session.run(feeds)
        except RunError as error:
            raise TargetError(f"{error}") from None


@functools.cache
def _wide() -> bool:
    """Whether the machine has AVX-512, and so blocks of 16."""
    return "avx512f" in _flags()


def _flags() -> str:
    """What the CPU can do, as its system words it; empty where it does not say."""
    if sys.platform == "linux":
        try:
            return Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
        except OSError:
            return ""
    if sys.platform == "darwin":
        command = ["sysctl", "-n", "machdep.cpu.leaf7_features"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        return done.stdout.lower()
    return ""


TARGET = Cpu
