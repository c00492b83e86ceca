"""Sizes for the dynamic dimensions of a model's inputs."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence

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
                keys.setdefault(dim_key(value.name, axis, dim), _kind(dims, axis))
    return keys


def _kind(dims: Sequence[onnx.TensorShapeProto.Dimension], axis: int) -> str:
    if axis == 0:
        return "batch"
    cached = axis == len(dims) - 2 and not is_dynamic(
        dims[-1]
    )  # keys and values: [batch, heads, length, width]
    return "space" if len(dims) >= 4 and not cached else "length"


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
    {"batch": (3,), "space": (64,), "length": (4000,)},
    {"batch": (2,), "space": (96,), "length": (5000,)},
    {"batch": (2,), "space": (64,), "length": (256, 2)},  # a batch axis elsewhere counts as a length
    {"batch": (3,), "space": (96,), "length": (320, 3)},
)


def assignments(keys: Mapping[str, str]) -> Iterator[dict[str, int]]:
    """Sizes to try for the dynamic dimensions, most telling first.

    Dimensions named as sums of others (`past + length`) have that size. Where there are three or four
    lengths, one may be the sum of two others without saying so: those come next.
    """
    sums = {key: parts for key in keys if (parts := _parts(key, keys))}
    lengths = [key for key, kind in keys.items() if kind == "length" and key not in sums]
    for profile in _PROFILES:
        used = dict.fromkeys(profile, 0)
        sizes = {}
        for key, kind in keys.items():
            if key not in sums:
                choices = profile[kind]
                sizes[key] = choices[used[kind] % len(choices)]
                used[kind] += 1
        guesses: list[dict[str, list[str]]] = [{}]
        if 3 <= len(lengths) <= 4:
            for total in reversed(lengths):
                rest = [key for key in lengths if key != total]
                guesses += [{total: list(pair)} for pair in itertools.combinations(rest, 2)]
        for guess in guesses:
            trial = dict(sizes)
            for key, parts in (guess | sums).items():
                trial[key] = sum(int(part) if _is_number(part) else trial[part] for part in parts)
            yield trial


def _parts(key: str, keys: Mapping[str, str]) -> list[str]:
    """The terms of a dimension named as a sum of numbers and other dimensions; empty for any other name."""
    parts = [part.strip() for part in key.split("+")]
    known = all(_is_number(part) or (part in keys and "+" not in part) for part in parts)
    return parts if len(parts) > 1 and known else []


def _is_number(part: str) -> bool:
    return part.isdecimal() and len(part) < 10
