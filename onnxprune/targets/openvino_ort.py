"""OpenVINO as a provider of onnxruntime: the package onnxruntime-openvino.

It brings an onnxruntime of its own under the same name, so that it lives in an environment of its own and is
asked through a process there. Times would be those of the pipe, too, and are not taken.
"""

from __future__ import annotations

import json
import os
import platform
import shlex
import signal
import subprocess
import threading
import weakref
from pathlib import Path
from typing import IO, Any

from onnxprune.allocation import Alignment
from onnxprune.runtime import Feeds
from onnxprune.targets import ort_program
from onnxprune.targets.cpu import Cpu
from onnxprune.targets.messages import one_line
from onnxprune.targets.target import Engine, State, Target, TargetError

PROVIDER = "OpenVINOExecutionProvider"
PATIENCE = 300  # seconds for one answer


def environment() -> Path:
    """Where its environment is looked for: a folder of the cache."""
    cache = os.environ.get("ONNXPRUNE_CACHE") or Path.home() / ".cache" / "onnxprune"
    return Path(cache, "targets", "openvino-ort")


class OpenVinoOrt(Target):
    """The provider's CPU device computes in fp32 where that is stated, in kernels of OpenVINO."""

    name = "openvino-ort"
    title = "onnxruntime with OpenVINO's provider, CPU"
    timed = False

    def alignment(self) -> Alignment:
        return Cpu().alignment()

    def install(self) -> str:
        folder = shlex.quote(str(environment()))
        return f"python -m venv {folder} && {folder}/bin/pip install onnxruntime-openvino numpy"

    def state(self) -> State:
        found = sorted(environment().glob("lib/python*/site-packages/onnxruntime_openvino-*.dist-info"))
        if not found:
            return State("absent", device=platform.machine(), missing=f"not installed: {self.install()}")
        version = found[-1].name.removesuffix(".dist-info").partition("-")[2]
        return State("runs", f"onnxruntime-openvino {version}", platform.machine())

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
        return RemoteEngine(environment() / "bin" / "python", path, PROVIDER, options, threads)


class RemoteEngine(Engine):
    """A session in the onnxruntime of another environment. Raises `TargetError` where that process dies, is
    silent for too long, or runs no node on the provider."""

    def __init__(
        self, interpreter: Path, path: Path, provider: str, options: dict[str, str], threads: int
    ) -> None:
        command = [str(interpreter), "-P", ort_program.__file__, str(path.resolve())]
        command += [provider, json.dumps(options), f"{threads}"]
        try:
            self._process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
            )
        except OSError as error:
            raise TargetError(f"{interpreter} cannot be run ({error.strerror})") from None
        self._end = weakref.finalize(self, _end, self._process)
        try:
            _, facts = self._answer()
            self.nodes: dict[str, int] = facts["nodes"]
            if not self.nodes.get(provider):
                told = ", ".join(f"{count} on {name}" for name, count in self.nodes.items())
                raise TargetError(f"no node runs on {provider} ({told or 'none at all'})")
        except TargetError:
            self.close()
            raise
        self.settings = {
            "provider": provider,
            "version": f"onnxruntime {facts['version']}",
            "device": platform.machine(),
            "precision": "fp32",
            "threads": threads,
            "options": options,
        }

    def run(self, feeds: Feeds) -> dict[str, Any]:
        try:
            ort_program.send(_pipe(self._process.stdin), feeds)
        except OSError:  # it has died: its answer says of what
            pass
        except ValueError:
            raise TargetError("the process of this engine has ended") from None
        return self._answer()[0]

    def _answer(self) -> tuple[dict[str, Any], dict[str, Any]]:
        clock = threading.Timer(PATIENCE, self._process.kill)
        clock.daemon = True
        clock.start()
        try:
            frame = ort_program.receive(_pipe(self._process.stdout))
        finally:
            clock.cancel()
        if frame is None:
            code = self._process.wait()
            why = f"of {signal.Signals(-code).name}" if code < 0 else f"with exit code {code}"
            raise TargetError(f"the process died {why}")
        if "error" in frame[1]:
            raise TargetError(one_line(frame[1]["error"]))
        return frame

    def close(self) -> None:
        """End the process."""
        self._end()


def _pipe(stream: IO[bytes] | None) -> Any:
    assert stream is not None
    return stream


def _end(process: subprocess.Popen[bytes]) -> None:
    process.kill()
    for stream in (process.stdin, process.stdout):
        try:
            _pipe(stream).close()
        except OSError:  # what was not sent is lost
            continue
    process.wait()


TARGET = OpenVinoOrt
