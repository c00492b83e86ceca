"""Folders of the cache that hold what targets need and pip does not bring into this environment."""

from __future__ import annotations

import os
from pathlib import Path


def kept(name: str) -> Path:
    """The folder of that name: `targets/NAME` in ONNXPRUNE_CACHE, or in ~/.cache/onnxprune; it need not exist."""
    cache = os.environ.get("ONNXPRUNE_CACHE") or Path.home() / ".cache" / "onnxprune"
    return Path(cache, "targets", name)
