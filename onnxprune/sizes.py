"""Sizes for the dynamic dimensions of a model's inputs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import onnx

from onnxprune.model import Model

Sizes = Mapping[str, int]


def dynamic_dims(model: Model) -> dict[str, str]:
    """Names of the inputs' dynamic dimensions -> what they are taken for: batch, space or length."""
    keys: dict[str, str] = {}
    for value in model.inputs:
        dims = value.type.tensor_type.shape.dim
        for axis, dim in enumerate(dims):
            if is_dynamic(dim):
                kind = "batch" if axis == 0 else "space" if len(dims) >= 4 else "length"
                keys.setdefault(dim_key(value.name, axis, dim), kind)
    return keys


def is_dynamic(dim: onnx.TensorShapeProto.Dimension) -> bool:
    """Whether an extent is left open; a stated 0 is an empty axis (some exporters write -1 for open)."""
    return not dim.HasField("dim_value") or dim.dim_value < 0


def dim_key(name: str, axis: int, dim: onnx.TensorShapeProto.Dimension) -> str:
    """The dimension's own name; dimensions of one name have one size."""
    return dim.dim_param or f"{name}.{axis}"


_PROFILES = (
    {"batch": (3,), "space": (224, 160, 96), "length": (7, 11, 13)},
    {"batch": (2,), "space": (160, 224, 128), "length": (9, 10, 14)},
    {"batch": (3,), "space": (224,), "length": (16,)},
    {"batch": (2,), "space": (160,), "length": (24,)},
    {"batch": (1,), "space": (224,), "length": (64,)},
    {"batch": (3,), "space": (48, 320), "length": (32,)},
    {"batch": (2,), "space": (48, 160), "length": (40,)},
    {"batch": (3,), "space": (32, 128), "length": (64,)},
    {"batch": (1,), "space": (320,), "length": (128,)},
    {"batch": (1,), "space": (28,), "length": (1,)},
)


def assignments(keys: Mapping[str, str]) -> Iterator[dict[str, int]]:
    """Sizes to try for the dynamic dimensions, most telling first."""
    for profile in _PROFILES:
        used = dict.fromkeys(profile, 0)
        sizes = {}
        for key, kind in keys.items():
            choices = profile[kind]
            sizes[key] = choices[used[kind] % len(choices)]
            used[kind] += 1
        yield sizes
