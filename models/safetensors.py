"""Reads the tensors of a safetensors file as NumPy arrays."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from models.builder import Array

TYPES = {"F32": "<f4", "F16": "<f2", "F64": "<f8", "I64": "<i8", "I32": "<i4", "U8": "u1", "BOOL": "?"}
"""Element types by their name in the format."""


def read_safetensors(path: Path) -> dict[str, Array]:
    """Every tensor of the file by name: a header of JSON, and the elements behind it."""
    content = path.read_bytes()
    start = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:start])
    header.pop("__metadata__", None)
    tensors = {}
    for name, entry in header.items():
        first, last = entry["data_offsets"]
        elements = np.frombuffer(content[start + first : start + last], TYPES[entry["dtype"]])
        tensors[name] = elements.reshape(entry["shape"])
    return tensors
