"""What a target is: where a model is to run, what it takes there, and how it is run, built and timed.

One file per target with one class; `onnxprune.targets.TARGETS` lists them. A target is named NAME or NAME:PRECISION.
"""

from __future__ import annotations

import abc
import importlib.metadata
import itertools
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import onnx

from onnxprune.allocation import Alignment
from onnxprune.errors import UserError
from onnxprune.model import DEFAULT_DOMAINS, Model
from onnxprune.runtime import Feeds

Reach = Literal["runs", "builds", "absent"]


class TargetError(Exception):
    """A target refused to load, build or run a model; the message is its own, on one line."""


@dataclass(frozen=True)
class State:
    """What a target can do on this machine.

    reach    it runs models, it only builds them (checks them with the real compiler), or neither
    version  of the software that does it, where there is any
    device   what it runs on, or builds for
    missing  what is not here and how to get it (a pip command), in one line; why nothing runs
    """

    reach: Reach
    version: str = ""
    device: str = ""
    missing: str = ""


@dataclass(frozen=True)
class Versions:
    """Of ONNX: the opset of the default domain, and the version of the format (IR)."""

    opset: int
    ir: int


@dataclass(frozen=True)
class Scheme:
    """How a target wants a model quantised. Weights are int8 around 0 always.

    activations  their type: int8, uint8 or uint16
    wide         the type where statistics (LayerNorm, softmax of long rows) need more than 8 bits; none: the same
    symmetric    whether zero points are 0
    biases       whether biases are int32, else they stay float
    reach        `inputs`: the operands of matrix products and convolutions; `chains`: also what follows convolutions up
                 to the next one; `whole`: every operator
    why          where that is known from
    """

    activations: str
    wide: str | None
    symmetric: bool
    biases: bool
    reach: Literal["inputs", "chains", "whole"]
    why: str

    def as_dict(self) -> dict[str, Any]:
        return {
            "activations": self.activations,
            "weights": "int8",
            "symmetric": self.symmetric,
            "biases": "int32" if self.biases else "float",
            "reach": self.reach,
        }


class Engine(abc.ABC):
    """A model, loaded and ready to run on a target.

    nodes     how many nodes (after fusion) each provider or device really took; empty where the target does not say
    place     the provider that was asked for, as `nodes` calls it; empty where loading has made sure of it
    settings  provider, version, level, threads, precision: whatever a result depends on
    """

    nodes: Mapping[str, int]
    place: str = ""
    settings: Mapping[str, Any]

    @abc.abstractmethod
    def run(self, feeds: Feeds) -> dict[str, Any]:
        """All outputs by name. Raises `TargetError`."""

    def close(self) -> None:
        """Let go of what it holds outside of this process."""


def version_of(package: str) -> str:
    """The version of an installed package, which is not imported; empty where it is not there."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


def opset_of(proto: onnx.ModelProto) -> int:
    """The newest version of ONNX's own operators in a model and its functions; 0 where it has none of them."""
    imports = itertools.chain(proto.opset_import, *(function.opset_import for function in proto.functions))
    return max((entry.version for entry in imports if entry.domain in DEFAULT_DOMAINS), default=0)


class Target(abc.ABC):
    """One of the places where models run.

    name        as on the command line
    title       in a sentence
    extra       the extra of this package that installs it, or none
    precisions  that it can be asked for; the first is meant where none is named
    scheme      how it wants models quantised; none where nothing is known
    timed       whether times mean anything here (not on simulators and emulators)
    tolerance   how far outputs may be from onnxruntime's on the CPU, of their scale, by precision
    """

    name: ClassVar[str]
    title: ClassVar[str]
    extra: ClassVar[str] = ""
    precisions: ClassVar[tuple[str, ...]] = ("fp32",)
    scheme: ClassVar[Scheme | None] = None
    timed: bool = True

    def __init__(self, precision: str = "") -> None:
        if precision and precision not in self.precisions:
            raise UserError(
                f"--target {self.name}:{precision}: {self.name} knows {', '.join(self.precisions)}"
            )
        self.precision = precision or self.precisions[0]

    def __str__(self) -> str:
        return self.name if self.precision == self.precisions[0] else f"{self.name}:{self.precision}"

    @abc.abstractmethod
    def alignment(self) -> Alignment:
        """Channel counts that its kernels fill, and where that is known from."""

    @abc.abstractmethod
    def state(self) -> State:
        """What it can do here; it must not raise, and must not import what is not needed to tell."""

    def newest(self) -> Versions | None:
        """The newest opset and IR version that it loads; none where it minds neither, or nothing is known."""
        return None

    def objections(self, model: Model) -> list[str]:
        """What it is known not to take: operators, opset, IR version, head sizes; empty where it should load.

        Those of a target come after these, which are of versions.
        """
        newest = self.newest()
        if newest is None:
            return []
        proto, found = model.source, []
        if (opset := opset_of(proto)) > newest.opset:
            found.append(f"opset {opset}: {self.name} takes up to {newest.opset}")
        if proto.ir_version > newest.ir:
            found.append(f"IR version {proto.ir_version}: {self.name} takes up to {newest.ir}")
        return found

    def load(self, path: Path, threads: int = 1) -> Engine:
        """An engine for a model file. Raises `TargetError`, also where nodes would run elsewhere in silence."""
        raise TargetError(f"{self.name} does not run here: {self.state().missing}")

    def build(self, path: Path, output: Path | None = None) -> Mapping[str, Any]:
        """Compile a model file with the target's own compiler, write the engine, and say what came out.

        A target without engine files compiles what it loads: that is done, and thrown away. Raises `TargetError`, there
        also for an `output`.
        """
        if output is not None:
            raise TargetError("no engine files: it loads the .onnx file itself; leave out the output")
        engine = self.load(path)
        try:
            return {**engine.settings, "nodes": dict(engine.nodes)}
        finally:
            engine.close()

    def commands(self, path: Path) -> list[str]:
        """Command lines that do the same with the target's own tools, to copy."""
        return []

    @property
    def tolerance(self) -> float:
        """How far outputs may be from onnxruntime's on the CPU, as a share of their scale."""
        return {"fp32": 1e-4, "tf32": 1e-2, "fp16": 2e-2, "bf16": 1e-1, "int8": 2e-1}[self.precision]

    def install(self) -> str:
        """The pip command that brings it."""
        return f"pip install 'onnxprune[{self.extra}]'"
