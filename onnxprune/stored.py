"""Tensors that stay in the file they are stored in, and are read from there when they are needed.

Such a tensor is a TensorProto without values whose external data says where it lies, and which positions
of each axis are left after cuts; it is only ever seen inside the package: saving writes its values.
"""

from __future__ import annotations

import functools
import math
import secrets
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx

Array = npt.NDArray[Any]
Positions = npt.NDArray[np.int64]

_SECRET = secrets.token_hex(16)  # so that no file can come with such entries
FILE, OFFSET, TYPE, DIMS, KEPT = (f"{_SECRET}.{name}" for name in ("file", "offset", "type", "dims", "kept."))


def bind(tensor: onnx.TensorProto, path: Path, offset: int) -> None:
    """Make a tensor one that is read from a file at an offset."""
    dims = " ".join(map(str, tensor.dims))
    where = {FILE: str(path.resolve()), OFFSET: str(offset), TYPE: str(tensor.data_type), DIMS: dims}
    for key, value in where.items():
        tensor.external_data.add(key=key, value=value)


def is_stored(tensor: onnx.TensorProto) -> bool:
    """Whether the tensor's values are to be read from a file."""
    return any(entry.key == FILE for entry in tensor.external_data)


def read(tensor: onnx.TensorProto) -> Array:
    """The values: the file itself, mapped, where nothing was cut; never to be written to. A tensor whose type
    was changed since gives its values in the new one.
    """
    entries = {entry.key: entry.value for entry in tensor.external_data}
    dims = [int(size) for size in entries[DIMS].split()]
    dtype = onnx.helper.tensor_dtype_to_np_dtype(int(entries[TYPE]))
    offset = int(entries[OFFSET])
    stop = offset + math.prod(dims) * dtype.itemsize
    array: Array = _mapped(entries[FILE])[offset:stop].view(dtype).reshape(dims)
    for axis in range(len(dims)):
        if (kept := entries.get(f"{KEPT}{axis}")) is not None:
            array = array.take(_positions(kept), axis=axis)
    return array.astype(onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type), copy=False)


def cut(tensor: onnx.TensorProto, name: str, kept: Sequence[Positions | None]) -> onnx.TensorProto:
    """The tensor less some positions, under a new name; None keeps an axis whole."""
    result = onnx.TensorProto()
    result.CopyFrom(tensor)
    result.name = name
    entries = {entry.key: entry for entry in result.external_data}
    for axis, positions in enumerate(kept):
        if positions is None:
            continue
        key = f"{KEPT}{axis}"
        if key in entries:
            positions = _positions(entries[key].value)[positions]
        else:
            entries[key] = result.external_data.add(key=key)
        entries[key].value = " ".join(map(str, positions))
        result.dims[axis] = len(positions)
    return result


def _positions(text: str) -> Positions:
    return np.array(text.split(), dtype=np.int64)


@functools.lru_cache(maxsize=64)
def _mapped(path: str) -> Array:
    return np.memmap(path, np.uint8, "r")
