"""Apple's Core ML through onnxruntime's provider, which onnxruntime for macOS brings."""

from __future__ import annotations

from typing import ClassVar

from onnxprune.allocation import Alignment
from onnxprune.model import Model
from onnxprune.targets.provider import ProviderTarget, control_flow, open_shapes


class CoreMl(ProviderTarget):
    """fp32 is a program (MLProgram) on CPU and GPU, which keeps the types of the file; fp16 is a network
    (NeuralNetwork) on any unit, which the neural engine and the GPU compute in fp16 (onnxruntime, CoreML Execution
    Provider). Apple states no block of channels; 16 suits the CPU and the GPU."""

    name = "coreml"
    title = "onnxruntime, Core ML"
    precisions = ("fp32", "fp16")
    provider: ClassVar[str] = "CoreMLExecutionProvider"
    shaped: ClassVar[bool] = True

    def alignment(self) -> Alignment:
        return Alignment(16, 16, 16)

    def install(self) -> str:
        return "on macOS, pip install onnxruntime"

    def options(self, threads: int) -> dict[str, str]:
        if self.precision == "fp32":
            found = {"ModelFormat": "MLProgram", "MLComputeUnits": "CPUAndGPU"}
            return found | {"AllowLowPrecisionAccumulationOnGPU": "0"}
        return {"ModelFormat": "NeuralNetwork", "MLComputeUnits": "ALL"}

    def computes(self) -> str:
        return "as stored" if self.precision == "fp32" else "fp16"

    def objections(self, model: Model) -> list[str]:
        return super().objections(model) + open_shapes(model, "Core ML") + control_flow(model)


TARGET = CoreMl
