"""Shapes of inputs with open dimensions, for engines that want to know a range, or one to run at."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping

from onnxprune.model import Model
from onnxprune.shapes import analyse
from onnxprune.sizes import Sizes, dim_key, dynamic_dims, is_dynamic

BATCH = 32  # up to which an open batch may grow

Shape = tuple[int, ...]
Range = tuple[Shape, Shape, Shape]
"""The least, the likeliest and the largest shape of an input."""


def ranges_of(model: Model) -> dict[str, Range]:
    """Of every input with open dimensions: around the sizes of the analysis, a batch from 1 to `BATCH`.

    Raises `UserError` for models that cannot be analysed.
    """
    keys = dynamic_dims(model)
    if not keys:
        return {}
    shapes = analyse(model)
    first = dict(shapes.sizes)
    second = dict(shapes.other.sizes) if shapes.other else first
    low = _spread(keys, first, second, min, 1)
    high = _spread(keys, first, second, max, BATCH)
    found = {}
    for value in model.inputs:
        dims = value.type.tensor_type.shape.dim
        if any(is_dynamic(dim) for dim in dims):
            least, likely, most = (
                tuple(
                    sizes[dim_key(value.name, axis, dim)] if is_dynamic(dim) else dim.dim_value
                    for axis, dim in enumerate(dims)
                )
                for sizes in (low, first, high)
            )
            found[value.name] = (least, likely, most)
    return found


def _spread(
    keys: Mapping[str, str], first: Sizes, second: Sizes, pick: Callable[..., int], batch: int
) -> dict[str, int]:
    """The end of a range of sizes; lengths that are sums of two others in both assignments remain so."""
    found = {
        key: pick(first[key], second[key], batch) if kind == "batch" else pick(first[key], second[key])
        for key, kind in keys.items()
    }
    lengths = [key for key, kind in keys.items() if kind == "length"]
    for total in lengths:
        for a, b in itertools.combinations([key for key in lengths if key != total], 2):
            if all(sizes[total] == sizes[a] + sizes[b] for sizes in (first, second)):
                found[total] = found[a] + found[b]
    return found
