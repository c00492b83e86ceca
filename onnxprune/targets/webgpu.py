"""WebGPU through onnxruntime's provider: the plug-in onnxruntime-ep-webgpu, on Vulkan, Metal or Direct3D 12."""

from __future__ import annotations

import functools
import importlib.metadata
import math
import os
import platform
from dataclasses import dataclass
from pathlib import Path

import onnxruntime as ort

from onnxprune.allocation import Alignment
from onnxprune.model import Model
from onnxprune.ops.window import MOVED
from onnxprune.runtime import newest
from onnxprune.targets import ort_program
from onnxprune.targets.cache import kept
from onnxprune.targets.messages import one_line
from onnxprune.targets.provider import ProviderEngine, control_flow, library
from onnxprune.targets.remote import RemoteEngine
from onnxprune.targets.target import Engine, State, Target, TargetError, Versions

PROVIDER = "WebGpuExecutionProvider"
PACKAGE = "onnxruntime-ep-webgpu"
SWIFTSHADER = "vk_swiftshader_icd.json"  # how Chromium calls the description of this Vulkan driver
FETCH = "in a clone of onnxprune's repository, python -m models.targets swiftshader"


class WebGpu(Target):
    """On a graphics adapter, where there is one; else on SwiftShader, which computes what a shader says on the CPU.

    Shaders read channels in vectors of 4, one by one where they are no multiple, and a workgroup makes tiles of 32
    by 32 outputs of a convolution or matrix product (onnxruntime, `providers/webgpu/math/matmul.cc`): 16 is half a
    tile. Grouped convolutions have no such tiles. Multiples of 4 are more than fast: others can come out wrong
    (`_miscomputed`).
    """

    name = "webgpu"
    title = "onnxruntime with the WebGPU provider"
    extra = "webgpu"

    def __init__(self, precision: str = "") -> None:
        super().__init__(precision)
        self.timed = bool(_adapter().device)

    def alignment(self) -> Alignment:
        return Alignment(16, 4, 16)

    def state(self) -> State:
        if not _plugin():
            return State("absent", missing=f"{PACKAGE} is not installed: {self.install()}")
        version = f"{PACKAGE} {importlib.metadata.version(PACKAGE)}"
        found = _adapter()
        if found.device:
            return State("runs", version, found.device)
        if _driver() is not None:
            return State("runs", version, f"SwiftShader, {platform.machine()}")
        why = found.error or "no graphics adapter (on Linux it takes Vulkan's loader, libvulkan.so.1)"
        return State("absent", version, missing=f"{why}; in software: {FETCH}")

    def newest(self) -> Versions:
        return Versions(*newest())

    def objections(self, model: Model) -> list[str]:
        return super().objections(model) + _miscomputed(model) + control_flow(model)

    def load(self, path: Path, threads: int = 1) -> Engine:
        state = self.state()
        if state.reach != "runs":
            raise TargetError(f"{self.name} does not run here: {state.missing}")
        if _adapter().device:
            return ProviderEngine(path, PROVIDER, {}, threads, plugin=_plugin(), device=state.device)
        driver = _driver()
        assert driver is not None
        return RemoteEngine(
            path,
            PROVIDER,
            {},
            threads,
            plugin=_plugin(),
            environment=_software(driver),
            device=state.device,
        )


def _miscomputed(model: Model) -> list[str]:
    """Convolutions that version 0.4.0 computes wrong, found by running it.

    In groups of 4 outputs or more, vectors are as wide as divides the outputs of all groups together, and may then
    reach into the next group. Of others, inputs that are a multiple of 3 and none of 4 are read in threes where
    outputs are a multiple of 4; three inputs alone, and windows of one element, come out right.
    """
    found = []
    for node in model.nodes:
        groups = node.attributes.get("group", 1)
        weight = model.constants.get(node.inputs[1]) if node.op in MOVED and len(node.inputs) > 1 else None
        if weight is None or len(weight.dims) < 3 or not isinstance(groups, int) or groups < 1:
            continue
        outputs, inputs, *window = weight.dims
        each, vector = outputs // groups, next(width for width in (4, 2, 1) if outputs % width == 0)
        if groups > 1 and each >= 4 and each % vector:
            found.append(
                f"{node}: {each} outputs in each of {groups} groups come out wrong in {PACKAGE} 0.4.0, "
                f"whose vectors of {vector} reach into the next group: keep multiples of {vector}"
            )
        threes = inputs > 3 and inputs % 3 == 0 and inputs % 4 > 0
        if groups == 1 and threes and outputs % 4 == 0 and math.prod(window) > 1:
            found.append(
                f"{node}: {inputs} inputs come out wrong in {PACKAGE} 0.4.0, which reads multiples of 3 in threes "
                "where outputs are a multiple of 4: keep multiples of 4"
            )
    return found


def _plugin() -> str:
    return library("onnxruntime_ep_webgpu", "onnxruntime_providers_webgpu")


def _driver() -> Path | None:
    """SwiftShader: what VK_DRIVER_FILES names, or a file of the cache."""
    for path in (Path(os.environ.get("VK_DRIVER_FILES", "")), kept("swiftshader") / SWIFTSHADER):
        if path.name == SWIFTSHADER and path.is_file():
            return path
    return None


def _software(driver: Path) -> dict[str, str]:
    """What a process needs to find this driver, and Vulkan's loader beside it."""
    folders = ":".join(filter(None, (str(driver.parent), os.environ.get("LD_LIBRARY_PATH"))))
    allowed = {"ORT_WEBGPU_EP_ALLOW_SOFTWARE_ADAPTER": "1"}
    return allowed | {"VK_DRIVER_FILES": str(driver), "LD_LIBRARY_PATH": folders}


@dataclass(frozen=True)
class _Adapter:
    """What it computes on, or why there is nothing."""

    device: str = ""
    error: str = ""


@functools.cache
def _adapter() -> _Adapter:
    """The graphics adapter; what onnxruntime calls a CPU computes in software."""
    if not _plugin():
        return _Adapter()
    try:
        found = ort_program.devices(ort, PROVIDER, _plugin())
    except Exception as error:  # onnxruntime raises classes of its own, without a common base
        return _Adapter(error=one_line(error))
    real = [one for one in found if one.device.type != ort.OrtHardwareDeviceType.CPU]
    return _Adapter(f"{real[0].device.type.name} {real[0].device.vendor}".strip()) if real else _Adapter()


TARGET = WebGpu
