"""XNNPACK's kernels through onnxruntime's provider, which onnxruntime for Android and iOS brings."""

from __future__ import annotations

from typing import ClassVar

from onnxprune.allocation import Alignment
from onnxprune.model import Model
from onnxprune.targets.provider import ProviderTarget, control_flow


class Xnnpack(ProviderTarget):
    """It computes in NHWC on a pool of threads of its own; what it does not take stays with onnxruntime's CPU
    kernels. Micro-kernels make 8 channels at a time in most families (XNNPACK, `src/configs/gemm-config.c`)."""

    name = "xnnpack"
    title = "onnxruntime, XNNPACK"
    provider: ClassVar[str] = "XnnpackExecutionProvider"
    on_cpu: ClassVar[bool] = True

    def alignment(self) -> Alignment:
        return Alignment(8, 8, 8)

    def install(self) -> str:
        build = "./build.sh --config Release --use_xnnpack --build_wheel --parallel --skip_tests"
        wheel = "build/*/Release/dist/onnxruntime-*.whl"
        return f"no wheel has it; in a clone of onnxruntime, {build} && pip install --force-reinstall {wheel}"

    def options(self, threads: int) -> dict[str, str]:
        return {"intra_op_num_threads": f"{threads}"}

    def objections(self, model: Model) -> list[str]:
        return super().objections(model) + control_flow(model)


TARGET = Xnnpack
