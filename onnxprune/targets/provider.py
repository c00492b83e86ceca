"""Providers of onnxruntime in this process: those that an onnxruntime brings itself, and plug-ins."""

from __future__ import annotations

import importlib.util
import platform
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, ClassVar

import onnxruntime as ort

from onnxprune import flow
from onnxprune.model import Model
from onnxprune.runtime import Feeds, newest
from onnxprune.sizes import dynamic_dims
from onnxprune.targets import ort_program
from onnxprune.targets.fixed import fixed, opened
from onnxprune.targets.messages import one_line
from onnxprune.targets.remote import taken
from onnxprune.targets.target import Engine, State, Target, TargetError, Versions

UNTRIED = "untried: the machines of this project's tests do not have it"


class ProviderEngine(Engine):
    """A session on a provider, with what it does not take on the CPU; `nodes` says who took what.

    plugin  library that brings the provider, where onnxruntime does not

    Raises `TargetError`, also where the provider takes no node.
    """

    def __init__(
        self,
        path: Path,
        provider: str,
        options: Mapping[str, str],
        threads: int,
        *,
        plugin: str = "",
        precision: str = "as stored",
        device: str = "",
        on_cpu: bool = False,
    ) -> None:
        try:
            self._session, self.nodes = ort_program.session(
                ort, str(path), provider, options, threads, plugin
            )
        except Exception as error:  # onnxruntime raises classes of its own, without a common base
            raise TargetError(one_line(error)) from None
        taken(self.nodes, provider)
        self._types = ort_program.types_of(self._session)
        self._outputs = [output.name for output in self._session.get_outputs()]
        self.place = provider
        self.settings = {
            "provider": provider,
            "version": f"onnxruntime {ort.__version__}",
            "device": device or platform.machine(),
            "level": "all",
            "precision": precision,
            "threads": threads,
            "spinning": False,
            "options": dict(options),
            "on_cpu": on_cpu,
        }

    def run(self, feeds: Feeds) -> dict[str, Any]:
        try:
            values = self._session.run(self._outputs, ort_program.fitted(self._types, feeds))
        except Exception as error:  # as above
            raise TargetError(one_line(error)) from None
        return dict(zip(self._outputs, values, strict=True))


class FixedEngine(Engine):
    """For providers that compile for exact shapes: the engine of the last set of shapes, loaded anew for others.

    load  an engine for a file in which no dimension of an input is open
    """

    def __init__(self, path: Path, load: Callable[[Path], Engine]) -> None:
        self._path, self._load = path, load
        model, feeds = opened(path)
        self._names = [value.name for value in model.inputs]
        self._open = bool(dynamic_dims(model))
        self._shapes: tuple[tuple[int, ...], ...] | None = None
        self._engine = self._loaded(feeds)

    def _loaded(self, feeds: Feeds) -> Engine:
        if not self._open:
            engine = self._load(self._path)
        else:
            with tempfile.TemporaryDirectory(prefix="onnxprune-") as folder:
                engine = self._load(fixed(self._path, feeds, Path(folder)))
        self.nodes, self.place, self.settings = engine.nodes, engine.place, engine.settings
        self._shapes = self._of(feeds)
        return engine

    def _of(self, feeds: Feeds) -> tuple[tuple[int, ...], ...]:
        return tuple(feeds[name].shape for name in self._names if name in feeds)

    def run(self, feeds: Feeds) -> dict[str, Any]:
        if self._open and self._of(feeds) != self._shapes:
            self._engine.close()
            self._shapes = None  # and so it stays where loading fails
            self._engine = self._loaded(feeds)
        return self._engine.run(feeds)

    def close(self) -> None:
        self._engine.close()


class ProviderTarget(Target):
    """A provider that some builds of onnxruntime bring; it runs where this one does.

    provider  its name
    shaped    whether it is loaded for exact shapes
    on_cpu    whether it computes on the processor of this machine
    """

    provider: ClassVar[str]
    shaped: ClassVar[bool] = False
    on_cpu: ClassVar[bool] = False

    def state(self) -> State:
        version = f"onnxruntime {ort.__version__}"
        if self.provider not in ort.get_available_providers():
            return State(
                "absent", missing=f"no {self.provider} in this onnxruntime: {self.install()} ({UNTRIED})"
            )
        device, missing = self.device()
        return State("absent" if missing else "runs", version, device, missing)

    def device(self) -> tuple[str, str]:
        """What it runs on here; and why it cannot, or nothing."""
        return platform.machine(), ""

    def newest(self) -> Versions:
        return Versions(*newest())

    def options(self, threads: int) -> dict[str, str]:
        """Of the provider; nothing that a result depends on is left to its defaults."""
        return {}

    def computes(self) -> str:
        """In which precision, in words."""
        return "as stored"

    def load(self, path: Path, threads: int = 1) -> Engine:
        state = self.state()
        if state.reach != "runs":
            raise TargetError(f"{self.name} does not run here: {state.missing}")

        def loaded(file: Path) -> Engine:
            return ProviderEngine(
                file,
                self.provider,
                self.options(threads),
                threads,
                precision=self.computes(),
                device=state.device,
                on_cpu=self.on_cpu,
            )

        return FixedEngine(path, loaded) if self.shaped else loaded(path)


def library(package: str, name: str) -> str:
    """The path of a library in a package that is installed, which is not imported; empty where it is not there."""
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        return ""
    folder = Path(spec.origin).resolve().parent
    files = (folder / file for file in (f"lib{name}.so", f"lib{name}.dylib", f"{name}.dll"))
    return next((str(path) for path in files if path.is_file()), "")


def control_flow(model: Model) -> list[str]:
    """One line where a model has bodies of If, Loop or Scan, which accelerators do not run as a whole."""
    nodes = [node for node in model.nodes if node.domain == flow.DOMAIN]
    return (
        [f"{nodes[0]}: the CPU steps through If, Loop and Scan, whoever runs what is in them"]
        if nodes
        else []
    )


def open_shapes(model: Model, name: str) -> list[str]:
    """One line where a provider compiles for one set of shapes and a model leaves some open."""
    dims = list(dynamic_dims(model))
    if not dims:
        return []
    told = ", ".join(f"'{dim}'" for dim in dims[:3]) + (" and more" if len(dims) > 3 else "")
    return [f"dimensions {told} are open: {name} compiles for the sizes of the inputs that it is given"]
