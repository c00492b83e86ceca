"""NVIDIA's GPUs through onnxruntime's CUDA provider, which the package onnxruntime-gpu brings."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

import onnxruntime as ort

from onnxprune.allocation import Alignment
from onnxprune.model import Model
from onnxprune.targets.cuda_driver import gpu
from onnxprune.targets.provider import ProviderTarget, control_flow
from onnxprune.targets.target import Engine


class Cuda(ProviderTarget):
    """Types are those of the file. By default the provider multiplies float32 in TF32; here it is told to or not.

    Tensor cores take rows of 16 bytes: 8 channels in fp16, 4 in TF32 (NVIDIA, Matrix Multiplication Background
    User's Guide, section 4).
    """

    name = "cuda"
    title = "onnxruntime, CUDA"
    precisions = ("fp32", "tf32")
    provider: ClassVar[str] = "CUDAExecutionProvider"

    def alignment(self) -> Alignment:
        return Alignment(8, 8, 8)

    def install(self) -> str:
        # Both packages are the module onnxruntime: whichever was installed last wins, file by file.
        command = "pip uninstall -y onnxruntime && pip install 'onnxruntime-gpu[cuda,cudnn]'"
        return f"in an environment of its own, {command}"

    def device(self) -> tuple[str, str]:
        found = gpu()
        if found is None:
            return "", "NVIDIA's driver gives no device"
        return f"{found.name}, SM{found.capability}", ""

    def options(self, threads: int) -> dict[str, str]:
        return {"device_id": "0", "use_tf32": "1" if self.precision == "tf32" else "0"}

    def computes(self) -> str:
        return f"as stored, float32 in {self.precision}"

    def objections(self, model: Model) -> list[str]:
        return super().objections(model) + control_flow(model)

    def load(self, path: Path, threads: int = 1) -> Engine:
        if self.state().reach == "runs":
            ort.preload_dlls()  # CUDA and cuDNN of Python packages, which no loader looks for
        return super().load(path, threads)


TARGET = Cuda
