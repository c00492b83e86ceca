"""ncnn, an inference engine for telephones and boards, on the CPU; pnnx converts the model.

The pnnx package requires PyTorch; the program in it does not, and is taken alone.
"""

from __future__ import annotations

import importlib.metadata
import platform
import re
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from onnxprune import flow
from onnxprune.allocation import Alignment
from onnxprune.model import Model
from onnxprune.runtime import Feeds, RunError, Session
from onnxprune.targets import ncnn_program
from onnxprune.targets.fixed import dtypes, fixed, opened
from onnxprune.targets.messages import one_line
from onnxprune.targets.target import Engine, State, Target, TargetError, Versions, version_of

PATIENCE = 300  # seconds for the conversion of a model, and for its trial
PREPARED = 8  # sets of shapes that are kept ready
_NEWEST = {"20261020": Versions(26, 13)}  # of the onnxruntime in pnnx, found by trial
_COLOURS = re.compile(r"\x1b\[[0-9;]*m")
_QUANTISED = {"QuantizeLinear", "DequantizeLinear", "DynamicQuantizeLinear"}


class Ncnn(Target):
    """Channels lie in packs of 4 or 8 (16 with AVX-512): `use_packing_layout`. Measured with 1.0.20261020 and
    AVX-512, in units of 64 channels: 3x3 of 56 channels 0.77, of 57 to 63 1.00 to 1.34, of 65 1.31, of 72 1.35.
    """

    name = "ncnn"
    title = "ncnn through pnnx, CPU"
    extra = "ncnn"
    precisions = ("fp32", "fp16")

    def alignment(self) -> Alignment:
        return Alignment(8, 8, 8)

    def install(self) -> str:
        return f"{super().install()} && pip install --no-deps pnnx"

    def state(self) -> State:
        device = platform.machine()
        version = version_of("ncnn")
        if not version:
            return State("absent", device=device, missing=f"ncnn is not installed: {self.install()}")
        version = f"ncnn {version}"
        try:
            _converter()
        except (importlib.metadata.PackageNotFoundError, TargetError):
            return State("absent", version, device, "pnnx is not installed: pip install --no-deps pnnx")
        return State("runs", f"{version}, pnnx {version_of('pnnx')}", device)

    def newest(self) -> Versions | None:
        return _NEWEST.get(version_of("pnnx"))

    def objections(self, model: Model) -> list[str]:
        found = super().objections(model)
        if any(node.domain == flow.DOMAIN for node in model.nodes):
            found.append("pnnx converts no bodies of If, Loop and Scan")
        if any(node.op in _QUANTISED for node in model.nodes):
            found.append("pnnx converts no quantised weights or activations")
        if self.precision == "fp16":
            found += _overflowing(model)
        return found

    def load(self, path: Path, threads: int = 1) -> Engine:
        state = self.state()
        if state.reach != "runs":
            raise TargetError(f"{self.name} does not run here: {state.missing}")
        return NcnnEngine(path, threads, self.precision, state.version)


class NcnnEngine(Engine):
    """A model, converted for every set of input shapes that it meets, and tried in another process first: for what
    it does not understand ncnn may have no answer but a crash."""

    def __init__(self, path: Path, threads: int, precision: str, version: str) -> None:
        self._path, self._threads, self._half = path, threads, precision == "fp16"
        model, feeds = opened(path)
        self._inputs = [value.name for value in model.inputs]
        self._types = dtypes(model.outputs, "output")
        self._ready: dict[tuple[tuple[int, ...], ...], ncnn_program.Prepared] = {}
        self._prepared({name: feeds[name] for name in self._inputs})
        self.nodes: dict[str, int] = {}
        self.settings = {
            "provider": "ncnn",
            "version": version,
            "device": platform.machine(),
            "precision": precision,
            "threads": threads,
        }

    def _prepared(self, feeds: Feeds) -> ncnn_program.Prepared:
        key = tuple(value.shape for value in feeds.values())
        if key not in self._ready:
            with tempfile.TemporaryDirectory(prefix="onnxprune-") as name:
                folder = Path(name)
                path = fixed(self._path, feeds, folder)
                _convert(path, self._half)
                results = _try(folder, feeds, self._threads, self._half)
                self._check(path, feeds, results)
                while len(self._ready) >= PREPARED:
                    del self._ready[next(iter(self._ready))]
                self._ready[key] = ncnn_program.Prepared(name, self._threads, self._half)
        return self._ready[key]

    def _check(self, path: Path, feeds: Feeds, results: Sequence[np.ndarray[Any, Any]]) -> None:
        """Refuse outputs that are not of the model's shapes: pnnx may lose an axis that it takes for the batch."""
        if len(results) != len(self._types):
            raise TargetError(f"pnnx kept {len(results)} of {len(self._types)} outputs")
        try:
            expected = Session(path, optimise="basic").run(feeds)
        except RunError as error:
            raise TargetError(f"{error}") from None
        for (name, value), result in zip(expected.items(), results, strict=True):
            if result.shape != value.shape:
                raise TargetError(
                    f"as pnnx converts it, output '{name}' is of shape {list(result.shape)}, not {list(value.shape)}"
                )

    def run(self, feeds: Feeds) -> dict[str, Any]:
        if missing := next((name for name in self._inputs if name not in feeds), None):
            raise TargetError(f"it takes an input '{missing}', for which nothing is given")
        given = {name: feeds[name] for name in self._inputs}
        try:
            results = self._prepared(given).run(given)
        except ValueError as error:
            raise TargetError(one_line(error)) from None
        pairs = zip(self._types.items(), results, strict=True)
        return {name: result.astype(kind, copy=False) for (name, kind), result in pairs}


def _overflowing(model: Model) -> list[str]:
    """One line where a weight has no value in half precision: a variance, for one, that a normalisation divides by."""
    for name, tensor in model.constants.items():
        if tensor.data_type == onnx.TensorProto.FLOAT:
            largest = float(np.abs(model.array(name)).max(initial=0))
            if largest > float(np.finfo(np.float16).max):
                told = f"weight '{name}' reaches {largest:.2g}, which is infinite in half precision"
                return [f"{told}: `onnxprune fold` may help, where it belongs to a normalisation"]
    return []


def _converter() -> Path:
    """The program pnnx. Raises `TargetError`."""
    package = importlib.metadata.distribution("pnnx")
    for name in ("pnnx/pnnx", "pnnx/pnnx.exe"):
        if (path := Path(str(package.locate_file(name)))).exists():
            return path
    raise TargetError("the package pnnx brings no program for this machine")


def _convert(path: Path, half: bool) -> None:
    """Write the network and its script beside the model. Raises `TargetError`."""
    done = _run([str(_converter()), path.name, f"fp16={int(half)}"], path.parent, "pnnx")
    said = _COLOURS.sub("", done.stderr + done.stdout)
    if done.returncode or not (path.parent / f"{ncnn_program.STEM}_ncnn.py").exists():
        wrong = [line for line in said.splitlines() if re.search(r"(?i)\berror\b|fail|Status Message", line)]
        why = wrong[-1].rpartition("Status Message: ")[2] if wrong else _died(done.returncode)
        raise TargetError(f"pnnx does not convert it: {one_line(why)}")


def _try(folder: Path, feeds: Feeds, threads: int, half: bool) -> list[np.ndarray[Any, Any]]:
    """Run a network once in a process of its own. Raises `TargetError`, also where that process dies."""
    stored = folder / "feeds.npz"
    numbered: dict[str, Any] = {f"value{i:06}": value for i, value in enumerate(feeds.values())}
    np.savez(stored, names=np.array(list(feeds), dtype=np.str_), **numbered)
    command = [
        sys.executable,
        "-P",
        ncnn_program.__file__,
        str(folder),
        str(stored),
        f"{threads}",
        f"{int(half)}",
    ]
    done = _run(command, folder, "ncnn")
    if done.returncode:
        said = done.stderr.splitlines()
        raise TargetError(f"ncnn does not run it: {one_line(said[0]) if said else _died(done.returncode)}")
    with np.load(folder / "results.npz") as results:
        return [results[f"arr_{i}"] for i in range(len(results))]


def _run(command: list[str], folder: Path, name: str) -> subprocess.CompletedProcess[str]:
    try:
        return subprocess.run(
            command,
            cwd=folder,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=PATIENCE,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise TargetError(f"{name} did not finish in {PATIENCE} seconds") from None
    except OSError as error:
        raise TargetError(f"{name} cannot be run ({error.strerror})") from None


def _died(code: int) -> str:
    return f"died of {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"


TARGET = Ncnn
