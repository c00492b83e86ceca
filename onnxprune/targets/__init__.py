"""Where models run: one file per target, one protocol (`Target`).

A file is a target once it stands here; nothing else needs to know it.
"""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from onnxprune.errors import UserError
from onnxprune.targets import (
    arm64,
    coreml,
    cpu,
    cuda,
    directml,
    litert,
    ncnn,
    openvino,
    openvino_ort,
    qnn,
    tensorrt,
    tract,
    webgpu,
    xnnpack,
)
from onnxprune.targets.target import Engine, Reach, Scheme, State, Target, TargetError, Versions

_MODULES = (
    cpu,
    openvino,
    openvino_ort,
    tract,
    ncnn,
    litert,
    tensorrt,
    qnn,
    webgpu,
    cuda,
    directml,
    coreml,
    xnnpack,
    arm64,
)
TARGETS: dict[str, type[Target]] = {module.TARGET.name: module.TARGET for module in _MODULES}


def target(text: str) -> Target:
    """The target called NAME or NAME:PRECISION. Raises `UserError` for names and precisions that are unknown."""
    name, _, precision = text.partition(":")
    if name not in TARGETS:
        raise UserError(f"--target {text}: choose one of {', '.join(TARGETS)}, or see `onnxprune targets`")
    return TARGETS[name](precision)


def described() -> list[dict[str, Any]]:
    """Every target with each of its precisions: what it can do on this machine, what it aligns to, and the newest
    versions of ONNX that it loads."""
    found = []
    for kind in TARGETS.values():
        for precision in kind.precisions:
            one = kind(precision)
            found.append(
                {"target": f"{one}", "title": kind.title, "timed": one.timed}
                | asdict(one.state())
                | {"alignment": asdict(one.alignment())}
                | {"newest": asdict(newest) if (newest := one.newest()) else None}
            )
    return found


__all__ = [
    "TARGETS",
    "Engine",
    "Reach",
    "Scheme",
    "State",
    "Target",
    "TargetError",
    "Versions",
    "described",
    "target",
]
