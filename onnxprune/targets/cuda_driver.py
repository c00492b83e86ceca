"""What TensorRT needs of CUDA's driver interface: which device there is, memory and a stream.

Through ctypes, because `libcuda` comes with every driver and nothing else has to be installed (CUDA Driver API
reference, sections on devices, primary contexts, memory and streams).
"""

from __future__ import annotations

import ctypes
import functools
import sys
from dataclasses import dataclass
from typing import Any

from onnxprune.model import Array
from onnxprune.targets.target import TargetError

_MAJOR, _MINOR = 75, 76  # attributes of a device: its compute capability


@dataclass(frozen=True)
class Gpu:
    """The first device: its name and compute capability (89 for 8.9)."""

    name: str
    capability: int


@functools.cache
def gpu() -> Gpu | None:
    """The device that CUDA gives to this process first, or none."""
    library = _library()
    if library is None or library.cuInit(0):
        return None
    device, major, minor = ctypes.c_int(), ctypes.c_int(), ctypes.c_int()
    name = ctypes.create_string_buffer(256)
    failed = (
        library.cuDeviceGet(ctypes.byref(device), 0)
        or library.cuDeviceGetName(name, len(name), device)
        or library.cuDeviceGetAttribute(ctypes.byref(major), _MAJOR, device)
        or library.cuDeviceGetAttribute(ctypes.byref(minor), _MINOR, device)
    )
    return None if failed else Gpu(name.value.decode(errors="replace"), 10 * major.value + minor.value)


@functools.cache
def _library() -> Any:
    name = "nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1"
    try:
        return ctypes.CDLL(name)
    except OSError:
        return None


class Stream:
    """A stream of the first device, and memory that grows with what is asked of it. Raises `TargetError`."""

    def __init__(self) -> None:
        self._library = _library()
        self._buffers: dict[str, tuple[int, int]] = {}
        device, self._context, self._stream = ctypes.c_int(), ctypes.c_void_p(), ctypes.c_void_p()
        self._do("cuInit", 0)
        self._do("cuDeviceGet", ctypes.byref(device), 0)
        self._do("cuDevicePrimaryCtxRetain", ctypes.byref(self._context), device)
        self.enter()
        self._do("cuStreamCreate", ctypes.byref(self._stream), 0)

    def enter(self) -> None:
        """Make the device's context that of the calling thread."""
        self._do("cuCtxSetCurrent", self._context)

    @property
    def handle(self) -> int:
        return self._stream.value or 0

    def buffer(self, name: str, size: int) -> int:
        """The address of at least `size` bytes on the device, kept under a name."""
        address, room = self._buffers.get(name, (0, 0))
        if not address or room < size:
            if address:
                self._do("cuMemFree_v2", ctypes.c_uint64(address))
                del self._buffers[name]
            found = ctypes.c_uint64()
            self._do("cuMemAlloc_v2", ctypes.byref(found), ctypes.c_size_t(max(size, 1)))
            address = found.value
            self._buffers[name] = address, max(size, 1)
        return address

    def upload(self, address: int, value: Array) -> None:
        """Copy a contiguous array to the device."""
        source = ctypes.c_void_p(value.ctypes.data)
        size = ctypes.c_size_t(value.nbytes)
        self._do("cuMemcpyHtoDAsync_v2", ctypes.c_uint64(address), source, size, self._stream)

    def download(self, address: int, value: Array) -> None:
        """Copy into a contiguous array; it is there after `wait`."""
        target = ctypes.c_void_p(value.ctypes.data)
        size = ctypes.c_size_t(value.nbytes)
        self._do("cuMemcpyDtoHAsync_v2", target, ctypes.c_uint64(address), size, self._stream)

    def wait(self) -> None:
        self._do("cuStreamSynchronize", self._stream)

    def close(self) -> None:
        """Free the memory."""
        for address, _ in self._buffers.values():
            self._do("cuMemFree_v2", ctypes.c_uint64(address))
        self._buffers.clear()

    def _do(self, function: str, *arguments: object) -> None:
        if self._library is None:
            raise TargetError("CUDA's driver is not installed")
        code = getattr(self._library, function)(*arguments)
        if code:
            text = ctypes.c_char_p()
            self._library.cuGetErrorString(code, ctypes.byref(text))
            raise TargetError(f"{function} failed: {(text.value or b'unknown error').decode()} ({code})")
