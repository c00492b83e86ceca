"""How far a model's outputs are from the original's: in front of functions that flatten differences."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

import numpy as np
import onnx

from onnxprune.data import Data
from onnxprune.model import Array, Model
from onnxprune.runtime import Session, inner

# Far from zero their results say little about their inputs.
SATURATING = {"Sigmoid", "HardSigmoid", "Softmax", "LogSoftmax", "Tanh", "Erf", "Clip", "Identity"}
REARRANGING = {"Reshape", "Squeeze", "Unsqueeze", "Flatten", "Transpose"}


def unsaturated(model: Model, name: str, usable: Callable[[str], bool] = lambda _: True) -> str:
    """The tensor in front of the saturating functions that end in `name`, or in a new layout of it."""
    found = name
    while (node := model.producers.get(name)) is not None and node.op in SATURATING | REARRANGING:
        name = node.inputs[0]
        if not usable(name):
            break
        if node.op in SATURATING:
            found = name
    return found


def telling(model: Model) -> list[str]:
    """For each output the tensor to compare: the output, or what a saturating function makes it from."""

    def usable(name: str) -> bool:
        return name in model.producers and not model.scopes.of(name)

    return list(dict.fromkeys(unsaturated(model, output.name, usable) for output in model.outputs))


class Distance:
    """From an original, on data; its outputs are computed once."""

    def __init__(self, original: Model, data: Data, size: int) -> None:
        self.batches = list(data.batches(size))
        self.names = telling(original)
        run = self._runner(original.proto, self.names)
        self.whole = [run(batch.feeds) for batch in self.batches]
        self.energy = energies(self.whole)

    def of(self, proto: onnx.ModelProto) -> float:
        """Mean over outputs of |y' - y|^2 / |y - mean y|^2; infinite where one is not finite. Raises `RunError`."""
        made = {name for node in proto.graph.node for name in node.output}
        run = self._runner(proto, [name for name in self.energy if name in made])
        return self.between(run(batch.feeds) for batch in self.batches)

    def between(self, batches: Iterable[Mapping[str, Array]]) -> float:
        """The same of outputs that are there already."""
        lost = dict.fromkeys(self.energy, 0.0)
        for values, whole in zip(batches, self.whole, strict=True):
            for name, value in values.items():
                if name in lost and value.shape == whole[name].shape:
                    away = value.astype(np.float64) - whole[name]
                    lost[name] += float(np.square(away).sum())
        shares = [lost[name] / energy for name, energy in self.energy.items()]
        found = float(np.mean(shares)) if shares else 0.0
        return found if np.isfinite(found) else float("inf")

    @staticmethod
    def _runner(
        proto: onnx.ModelProto, names: Sequence[str]
    ) -> Callable[[Mapping[str, Array]], dict[str, Array]]:
        session = Session(proto, optimise="all", expose=inner(proto, names))
        return lambda feeds: session.run(feeds, names)


def energies(batches: Sequence[Mapping[str, Array]]) -> dict[str, float]:
    """Of every float tensor that varies: its squared distance from its mean, summed."""
    found: dict[str, float] = {}
    for name, first in batches[0].items():
        if not isinstance(first, np.ndarray) or first.dtype.kind != "f":
            continue
        count = sum(batch[name].size for batch in batches)
        mean = sum(float(batch[name].sum(dtype=np.float64)) for batch in batches) / max(count, 1)
        energy = sum(float(np.square(batch[name].astype(np.float64) - mean).sum()) for batch in batches)
        if energy > 0 and np.isfinite(energy):
            found[name] = energy
    return found
