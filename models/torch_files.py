"""Reads the tensors of a PyTorch state dict file as NumPy arrays, without PyTorch.

Both formats are read: the zip archive and the older sequence of pickles. The unpickler knows
ordered dictionaries, tensors and storages, and refuses every other global, so that a file cannot
run code.
"""

from __future__ import annotations

import io
import math
import pickle
import zipfile
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np

from models.builder import Array

LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
"""The first pickle of the older format."""

STORAGES = {
    "FloatStorage": np.dtype("<f4"),
    "DoubleStorage": np.dtype("<f8"),
    "HalfStorage": np.dtype("<f2"),
    "LongStorage": np.dtype("<i8"),
    "IntStorage": np.dtype("<i4"),
    "ShortStorage": np.dtype("<i2"),
    "CharStorage": np.dtype("<i1"),
    "ByteStorage": np.dtype("<u1"),
    "BoolStorage": np.dtype("?"),
}
"""Element types by the name of the storage class."""


@dataclass(frozen=True)
class _Storage:
    key: str
    dtype: np.dtype[Any]


@dataclass(frozen=True)
class _View:
    """A tensor whose storage is not read yet."""

    storage: _Storage
    offset: int
    size: tuple[int, ...]
    stride: tuple[int, ...]

    def read(self, storage: Array) -> Array:
        """A copy of the elements, all of which must lie inside the storage."""
        steps = zip(self.size, self.stride, strict=True)
        last = self.offset + sum((extent - 1) * step for extent, step in steps)
        if math.prod(self.size) == 0:
            return np.empty(self.size, storage.dtype)
        if min(self.offset, *self.stride, *self.size, 0) < 0 or last >= storage.size:
            raise pickle.UnpicklingError(f"tensor outside its storage {self.storage.key}")
        strides = [step * storage.itemsize for step in self.stride]
        view = np.lib.stride_tricks.as_strided(storage[self.offset :], self.size, strides)
        return view.copy()


def _rebuild(storage: _Storage, offset: int, size: Sequence[int], stride: Sequence[int], *_: object) -> _View:
    return _View(storage, offset, tuple(size), tuple(stride))


class _Unpickler(pickle.Unpickler):
    """Rebuilds state dicts and nothing else."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("collections", "OrderedDict"):
            return OrderedDict
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return _rebuild
        if module == "torch" and name in STORAGES:
            return STORAGES[name]
        raise pickle.UnpicklingError(f"refused to load {module}.{name}")

    def persistent_load(self, pid: Any) -> _Storage:
        kind, dtype, key = pid[:3]
        if kind != "storage" or not isinstance(dtype, np.dtype):
            raise pickle.UnpicklingError(f"refused to load an object of kind {kind!r}")
        return _Storage(str(key), dtype)


def read_state_dict(path: Path) -> dict[str, Array]:
    """Every tensor of the file by name."""
    with path.open("rb") as file:
        if zipfile.is_zipfile(file):
            views, storages = _read_archive(file)
        else:
            file.seek(0)
            views, storages = _read_legacy(file)
    return {name: view.read(storages[view.storage.key]) for name, view in views.items()}


def _views(state: object) -> dict[str, _View]:
    if not isinstance(state, dict):
        raise pickle.UnpicklingError(f"a {type(state).__name__} is not a state dict")
    return {str(name): view for name, view in state.items() if isinstance(view, _View)}


def _read_archive(file: IO[bytes]) -> tuple[dict[str, _View], dict[str, Array]]:
    with zipfile.ZipFile(file) as archive:
        (index,) = (name for name in archive.namelist() if name.endswith("/data.pkl"))
        root = index.removesuffix("data.pkl")
        views = _views(_Unpickler(io.BytesIO(archive.read(index))).load())
        storages: dict[str, Array] = {
            view.storage.key: np.frombuffer(
                archive.read(f"{root}data/{view.storage.key}"), view.storage.dtype
            )
            for view in views.values()
        }
    return views, storages


def _read_legacy(file: IO[bytes]) -> tuple[dict[str, _View], dict[str, Array]]:
    magic, _version, system = (_Unpickler(file).load() for _ in range(3))
    if magic != LEGACY_MAGIC or not system["little_endian"]:
        raise pickle.UnpicklingError("not a state dict file")
    views = _views(_Unpickler(file).load())
    dtypes = {view.storage.key: view.storage.dtype for view in views.values()}
    storages: dict[str, Array] = {}
    for key in _Unpickler(file).load():
        count = int.from_bytes(file.read(8), "little")
        dtype = dtypes[key]
        storages[key] = np.frombuffer(file.read(count * dtype.itemsize), dtype)
    return views, storages
