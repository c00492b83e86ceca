"""onnxruntime for 64-bit ARM, on an x86-64 Linux machine: its aarch64 wheel in qemu's user-mode emulation.

Its kernels are other ones than on x86 (NEON, no blocked layout), and are run for their results. Times would be those
of the emulator and are not taken. On a machine that is 64-bit ARM, `cpu` is the same and timed.
"""

from __future__ import annotations

import platform
import sys
from pathlib import Path

from onnxprune.allocation import Alignment
from onnxprune.targets.cache import kept
from onnxprune.targets.cpu import PROVIDER, UNSIGNED
from onnxprune.targets.remote import RemoteEngine, newest_of
from onnxprune.targets.target import Engine, State, Target, TargetError, Versions

DEVICE = "Cortex-A76, emulated"
HOSTS = ("x86_64", "AMD64")


def environment() -> Path:
    """Where its environment is looked for: `models/targets.py` makes it. `bin/python` in it is an ARM interpreter."""
    return kept("arm64")


class Arm64(Target):
    """Matrix kernels fill registers of 4 and tiles of 8; convolutions are matrix products (MLAS). Not measured: an
    emulator has no times.
    """

    name = "arm64"
    title = "onnxruntime, 64-bit ARM CPU"
    scheme = UNSIGNED
    timed = False

    def alignment(self) -> Alignment:
        return Alignment(8, 8, 8)

    def install(self) -> str:
        return "in a clone of onnxprune's repository, python -m models.targets arm64"

    def state(self) -> State:
        machine = platform.machine()
        if machine in ("aarch64", "arm64"):
            return State("absent", device=machine, missing="this machine is 64-bit ARM itself: use cpu")
        if sys.platform != "linux" or machine not in HOSTS:
            return State(
                "absent", device=machine, missing="the emulator (qemu-user) runs on x86-64 Linux only"
            )
        version = _version()
        if not version or not _interpreter().exists():
            return State("absent", device=DEVICE, missing=f"not installed: {self.install()}")
        return State("runs", f"onnxruntime {version}", DEVICE)

    def newest(self) -> Versions | None:
        return newest_of(_version())

    def load(self, path: Path, threads: int = 1) -> Engine:
        state = self.state()
        if state.reach != "runs":
            raise TargetError(f"{self.name} does not run here: {state.missing}")
        return RemoteEngine(path, PROVIDER, {}, threads, interpreter=_interpreter(), device=DEVICE)


def _version() -> str:
    """Of its onnxruntime; empty where there is none."""
    found = sorted(environment().glob("site/onnxruntime-*.dist-info"))
    return found[-1].name.removesuffix(".dist-info").partition("-")[2] if found else ""


def _interpreter() -> Path:
    return environment() / "bin" / "python"


TARGET = Arm64
