"""onnxruntime in a process of its own: because it is another one, or because a provider needs the process for
itself. Times would be those of the pipe, too, and are not taken."""

from __future__ import annotations

import json
import os
import platform
import signal
import subprocess
import sys
import threading
import weakref
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

from onnxprune.runtime import Feeds
from onnxprune.targets import ort_program
from onnxprune.targets.messages import one_line
from onnxprune.targets.target import Engine, TargetError, Versions

PATIENCE = 300  # seconds for one answer
_NEWEST = {  # by release of onnxruntime, found by trial
    "1.24": Versions(25, 13),
    "1.26": Versions(26, 13),
    "1.27": Versions(26, 13),
    "1.30": Versions(26, 13),
    "1.31": Versions(26, 13),
}


def newest_of(version: str) -> Versions | None:
    """What an onnxruntime of another environment loads, of the releases of which that is known."""
    return _NEWEST.get(".".join(version.split(".")[:2]))


class RemoteEngine(Engine):
    """A session in the onnxruntime of an interpreter.

    interpreter  this one, unless the provider lives in another environment
    program      what it runs; one that is spoken to like `ort_program.py`
    plugin       library that brings the provider, where onnxruntime does not
    environment  variables that the process has besides those of this one
    precision    in which the provider was told to compute

    Raises `TargetError` where that process dies, is silent for too long, or runs no node on the provider.
    """

    def __init__(
        self,
        path: Path,
        provider: str,
        options: Mapping[str, str],
        threads: int,
        *,
        interpreter: Path = Path(sys.executable),
        program: str = ort_program.__file__,
        plugin: str = "",
        environment: Mapping[str, str] | None = None,
        precision: str = "as stored",
        device: str = "",
    ) -> None:
        command = [str(interpreter), "-P", program, str(path.resolve())]
        command += [provider, json.dumps(dict(options)), f"{threads}", plugin]
        try:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                env={**os.environ, **(environment or {})},
            )
        except OSError as error:
            raise TargetError(f"{interpreter} cannot be run ({error.strerror})") from None
        self._end = weakref.finalize(self, _end, self._process)
        try:
            _, facts = self._answer()
            self.nodes: dict[str, int] = facts["nodes"]
            taken(self.nodes, provider)
        except TargetError:
            self.close()
            raise
        self.place = provider
        self.settings = {
            "provider": provider,
            "version": f"{facts['software']} {facts['version']}",
            "device": device or platform.machine(),
            "precision": precision,
            "threads": threads,
            "options": dict(options),
            "on_cpu": False,
        }

    def run(self, feeds: Feeds) -> dict[str, Any]:
        try:
            ort_program.send(_pipe(self._process.stdin), feeds)
        except OSError:  # it has died: its answer says of what
            pass
        except TypeError as error:
            raise TargetError(f"{error}") from None
        except ValueError:
            raise TargetError("the process of this engine has ended") from None
        return self._answer()[0]

    def _answer(self) -> tuple[dict[str, Any], dict[str, Any]]:
        late, process = threading.Event(), self._process

        def end() -> None:  # without `self`, which the clock's thread would keep alive
            late.set()
            process.kill()

        clock = threading.Timer(PATIENCE, end)
        clock.daemon = True
        clock.start()
        try:
            frame = ort_program.receive(_pipe(self._process.stdout))
        finally:
            clock.cancel()
        if frame is None:
            code = self._process.wait()
            if late.is_set():
                raise TargetError(f"no answer in {PATIENCE} seconds")
            why = f"of {signal.Signals(-code).name}" if code < 0 else f"with exit code {code}"
            raise TargetError(f"the process died {why}")
        if "error" in frame[1]:
            raise TargetError(one_line(frame[1]["error"]))
        return frame

    def close(self) -> None:
        """End the process."""
        self._end()


def taken(nodes: Mapping[str, int], provider: str) -> None:
    """Raises `TargetError` where a provider took no node: onnxruntime then runs all on the CPU and says nothing."""
    if not nodes.get(provider):
        told = ", ".join(f"{count} on {name}" for name, count in nodes.items())
        raise TargetError(f"no node runs on {provider} ({told or 'none at all'})")


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
