"""Loads and runs a converted network in ncnn; also a program of its own, because ncnn may take its process along.

    python -P ncnn_program.py FOLDER FEEDS.npz THREADS HALF(0 or 1)

runs a network once. It stands on numpy and ncnn alone, and is never imported where `import ncnn` could find its
neighbour (hence -P).
"""

from __future__ import annotations

import importlib
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

STEM = "model"
"""Of the files that pnnx makes: `model.ncnn.param` and so on."""

_INPUT = re.compile(r"(\w+) = torch\.\w+\(.*dtype=torch\.(\w+)\)")
_FED = re.compile(r'ex\.input\("(\w+)", ncnn\.Mat\((\w+)\.numpy\(\)(?:, batch_index=(\d+))?\)')
_MADE = re.compile(r'_, (\w+) = ex\.extract\("(\w+)"\)')
_GIVEN = re.compile(r"out\.append\(torch\.from_numpy\((\w+)\.numpy\((?:batch_index=(\d+))?\)\)")
_TYPES = {"float": np.float32, "int": np.int32}
_NONE = 233  # ncnn's word for: no axis is the batch


class Prepared:
    """A network for inputs of exact shapes. Which axis of an input or output is the batch, which ncnn keeps apart,
    stands in the script that pnnx writes beside the network."""

    def __init__(self, folder: str, threads: int, half: bool) -> None:
        ncnn = importlib.import_module("ncnn")
        script = Path(folder, f"{STEM}_ncnn.py").read_text(encoding="utf-8")
        types = dict(_INPUT.findall(script))
        self._inputs = [(blob, types.get(name, ""), _axis(axis)) for blob, name, axis in _FED.findall(script)]
        blobs = dict(_MADE.findall(script))
        self._outputs = [(blobs[name], _axis(axis)) for name, axis in _GIVEN.findall(script)]
        self._ncnn, self._net = ncnn, ncnn.Net()
        options = self._net.opt
        options.num_threads = threads
        options.use_vulkan_compute = False
        if not half:
            options.use_fp16_packed = options.use_fp16_storage = options.use_fp16_arithmetic = False
            options.use_bf16_packed = options.use_bf16_storage = False
        for load, kind in ((self._net.load_param, "param"), (self._net.load_model, "bin")):
            if load(str(Path(folder, f"{STEM}.ncnn.{kind}"))):
                raise ValueError(f"it does not load the .{kind} file that pnnx made")

    def run(self, feeds: Mapping[str, np.ndarray[Any, Any]]) -> list[np.ndarray[Any, Any]]:
        """Outputs in the model's order, from inputs in the model's order."""
        if len(feeds) != len(self._inputs):
            raise ValueError(f"pnnx kept {len(self._inputs)} of {len(feeds)} inputs")
        results: list[np.ndarray[Any, Any]] = []
        with self._net.create_extractor() as extractor:
            for (blob, kind, axis), (name, value) in zip(self._inputs, feeds.items(), strict=True):
                if kind not in _TYPES:
                    raise ValueError(f"input '{name}' is of type {kind or 'unknown'}")
                array = value.astype(_TYPES[kind])
                if array.dtype.kind == "i" and not np.array_equal(array, value):
                    raise ValueError(f"input '{name}' has values beyond 32 bits")
                if extractor.input(blob, self._ncnn.Mat(array, batch_index=axis).clone()):
                    raise ValueError(f"it does not take input '{name}'")
            for blob, axis in self._outputs:
                code, made = extractor.extract(blob)
                if code or made.empty():
                    raise ValueError(f"it does not compute output {len(results)} (code {code})")
                results.append(np.array(made.numpy(batch_index=axis)))
        return results


def _axis(text: str) -> int:
    return int(text) if text else _NONE


def main(folder: str, feeds: str, threads: str, half: str) -> int:
    """One run, its outputs written beside the network; 1, and the reason on stderr, where ncnn refuses."""
    with np.load(feeds) as stored:
        given = {name: stored[f"value{i:06}"] for i, name in enumerate(stored["names"].tolist())}
    try:
        results = Prepared(folder, int(threads), half == "1").run(given)
    except Exception as error:
        print(error, file=sys.stderr)
        return 1
    np.savez(Path(folder, "results.npz"), *results)
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
