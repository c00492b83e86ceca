"""Prepares and runs a model in tract; also a program of its own, because tract may take its process along.

    python -P tract_program.py MODEL FEEDS.npz

runs a model once. It stands on numpy and tract alone, and is never imported where `import tract` could find its
neighbour (hence -P).
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Mapping
from typing import Any

import numpy as np

_TYPES = {
    "bool": "bool",
    "float16": "f16",
    "float32": "f32",
    "float64": "f64",
    **{f"{kind}int{bits}": f"{kind or 'i'}{bits}" for kind in ("", "u") for bits in (8, 16, 32, 64)},
}


class Prepared:
    """A model for inputs of exact shapes and types. Symbolic shapes are not asked of tract: where it has no rule
    for them it aborts."""

    def __init__(self, path: str, feeds: Mapping[str, np.ndarray[Any, Any]]) -> None:
        tract = importlib.import_module("tract")
        model = tract.onnx().load(path)
        self.names = [model.input_name(i) for i in range(model.input_count())]
        for i, name in enumerate(self.names):
            if name not in feeds:
                raise ValueError(f"it takes an input '{name}', for which nothing is given")
            value = feeds[name]
            if value.dtype.name not in _TYPES:
                raise ValueError(f"its Python package takes no {value.dtype.name}, as input '{name}' is")
            model.set_input_fact(i, ",".join([*map(str, value.shape), _TYPES[value.dtype.name]]))
        self._runnable = model.into_model().into_runnable()

    def run(self, feeds: Mapping[str, np.ndarray[Any, Any]]) -> list[np.ndarray[Any, Any]]:
        """Outputs in the model's order."""
        results = self._runnable.run([feeds[name] for name in self.names])
        return [result.to_numpy() for result in results]


def _bound_memory() -> None:
    """Half of the machine's memory at most: some broken models make tract ask for all there is."""
    try:
        resource = importlib.import_module("resource")
    except ImportError:  # Windows
        return
    half = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (half if hard < 0 else min(half, hard), hard))


def main(path: str, feeds: str) -> int:
    """One run; 1, and the reason on stderr, where tract refuses."""
    _bound_memory()
    with np.load(feeds) as stored:
        given = {
            name: stored[key]
            for key, name in zip(sorted(set(stored) - {"names"}), stored["names"], strict=True)
        }
    try:
        Prepared(path, given).run(given)
    except Exception as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
