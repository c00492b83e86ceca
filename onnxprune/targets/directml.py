"""Direct3D 12 adapters on Windows through onnxruntime's DirectML provider: the package onnxruntime-directml."""

from __future__ import annotations

from typing import ClassVar

from onnxprune.allocation import Alignment
from onnxprune.model import Model
from onnxprune.targets.provider import ProviderTarget, control_flow
from onnxprune.targets.target import opset_of

OPSET = 20  # of the newest operators that have kernels (onnxruntime, DirectML Execution Provider)


class DirectMl(ProviderTarget):
    """Types are those of the file. It computes best at exact shapes (onnxruntime, DirectML Execution Provider,
    Performance Tuning), and so is given them. Which blocks of channels are filled is the driver's business; 8 is
    what matrix units of any vendor take in fp16."""

    name = "directml"
    title = "onnxruntime, DirectML"
    provider: ClassVar[str] = "DmlExecutionProvider"
    shaped: ClassVar[bool] = True

    def alignment(self) -> Alignment:
        return Alignment(8, 8, 8)

    def install(self) -> str:
        # Both packages are the module onnxruntime: whichever was installed last wins, file by file.
        command = "pip uninstall -y onnxruntime && pip install onnxruntime-directml"
        return f"on Windows, in an environment of its own, {command}"

    def options(self, threads: int) -> dict[str, str]:
        return {"device_id": "0"}

    def objections(self, model: Model) -> list[str]:
        found = super().objections(model) + control_flow(model)
        if (version := opset_of(model.source)) > OPSET:
            found.append(
                f"opset {version}: DirectML has operators up to opset {OPSET}; newer ones run on the CPU"
            )
        return found


TARGET = DirectMl
