"""OpenVINO as a provider of onnxruntime: the package onnxruntime-openvino.

It brings an onnxruntime of its own under the same name, so that it lives in an environment of its own and is
asked through a process there. Times would be those of the pipe, too, and are not taken.
"""

from __future__ import annotations

import platform
import shlex
from dataclasses import replace
from pathlib import Path

from onnxprune.allocation import Alignment
from onnxprune.targets.cache import kept
from onnxprune.targets.cpu import UNSIGNED, Cpu
from onnxprune.targets.remote import RemoteEngine, newest_of
from onnxprune.targets.target import Engine, State, Target, TargetError, Versions

PROVIDER = "OpenVINOExecutionProvider"


def environment() -> Path:
    """Where its environment is looked for: a folder of the cache."""
    return kept("openvino-ort")


class OpenVinoOrt(Target):
    """The provider's CPU device computes in fp32 where that is stated, in kernels of OpenVINO."""

    name = "openvino-ort"
    title = "onnxruntime with OpenVINO's provider, CPU"
    scheme = UNSIGNED
    timed = False

    def alignment(self) -> Alignment:
        """As onnxruntime's; parts of a block run on no slower kernels here."""
        return replace(Cpu().alignment(), whole=False)

    def install(self) -> str:
        folder = shlex.quote(str(environment()))
        return f"python -m venv {folder} && {folder}/bin/pip install onnxruntime-openvino numpy"

    def state(self) -> State:
        if version := _version():
            return State("runs", f"onnxruntime-openvino {version}", platform.machine())
        return State("absent", device=platform.machine(), missing=f"not installed: {self.install()}")

    def newest(self) -> Versions | None:
        return newest_of(_version())

    def load(self, path: Path, threads: int = 1) -> Engine:
        state = self.state()
        if state.reach != "runs":
            raise TargetError(f"{self.name} does not run here: {state.missing}")
        options = {
            "device_type": "CPU",
            "precision": "FP32",
            "num_of_threads": f"{threads}",
            "num_streams": "1",
        }
        interpreter = environment() / "bin" / "python"
        return RemoteEngine(path, PROVIDER, options, threads, interpreter=interpreter, precision="fp32")


def _version() -> str:
    """Of the package; empty where it is not there."""
    found = sorted(environment().glob("lib/python*/site-packages/onnxruntime_openvino-*.dist-info"))
    return found[-1].name.removesuffix(".dist-info").partition("-")[2] if found else ""


TARGET = OpenVinoOrt
