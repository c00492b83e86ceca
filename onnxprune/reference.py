"""What the CPU makes of a model: outputs that those of a target are held against, and how far apart two of them are."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from onnxprune.model import Array, Model, load, save_whole
from onnxprune.outputs import unsaturated
from onnxprune.parts import ancestors
from onnxprune.runtime import Feeds, Session, inner
from onnxprune.timing import variation
from onnxprune.validation.difference import difference

TELLING = 10  # times the tolerance that the values of an output differ by, at least, for the output to tell anything


class Reference:
    """A model in a file, and what the CPU makes of it: found out once, for all targets."""

    def __init__(self, path: Path, feeds: Sequence[Feeds]) -> None:
        self.path, self.feeds = path, feeds

    @functools.cached_property
    def model(self) -> Model:
        return load(self.path)

    @functools.cached_property
    def outputs(self) -> list[dict[str, Array]]:
        """Of every run."""
        session = Session(self.path, optimise="basic")
        return [arrays(session.run(feed)) for feed in self.feeds]

    @functools.cached_property
    def noise(self) -> float:
        """The largest difference between the CPU without optimisations and with all: what rounding does to the model."""
        plain, fast = Session(self.path), Session(self.path, optimise="all")
        runs = ((arrays(plain.run(feed)), arrays(fast.run(feed))) for feed in self.feeds)
        return max((error for run in runs for error in self._apart(*run).values()), default=0.0)

    @property
    def bytes(self) -> int:
        """Of the file, and of those that weights lie in."""
        return sum(file.stat().st_size for file in self.model.files)

    def errors(self, results: Sequence[Mapping[str, Array]]) -> dict[str, float]:
        """Of every output the largest difference of a target's results from the CPU's, as a share of its scale."""
        found: dict[str, float] = {}
        for wanted, made in zip(self.outputs, results, strict=True):
            for name, error in self._apart(wanted, made).items():
                found[name] = max(found.get(name, 0.0), error)
        return found

    def _apart(self, wanted: Mapping[str, Array], made: Mapping[str, Array]) -> dict[str, float]:
        """Outputs that are shares are raised by one: near zero they are what is left of large numbers, and say nothing
        in proportion to themselves."""
        found = {}
        for name, value in wanted.items():
            raise_by = 1.0 if name in self._shares else 0.0
            found[name] = apart(value, made[name], raise_by)
        return found

    @functools.cached_property
    def _shares(self) -> dict[str, str]:
        """Outputs that a saturating function makes, and the tensors in front of it."""
        model = self.model

        def usable(name: str) -> bool:
            return name in model.producers and not model.scopes.of(name)

        fronts = {output.name: unsaturated(model, output.name, usable) for output in model.outputs}
        return {name: front for name, front in fronts.items() if front != name}

    def blind(self, tolerance: float) -> list[str]:
        """Outputs of saturating functions that hardly vary: within the tolerance zeros would be as good."""
        return [
            name
            for name in self._shares
            if max(variation(run[name] + 1.0) for run in self.outputs) < TELLING * tolerance
        ]

    def front(self, outputs: Sequence[str], folder: Path) -> Reference:
        """The model as far as the tensors in front of the saturating functions that make these outputs, in a file in
        that folder."""
        names = list(dict.fromkeys(self._shares[name] for name in outputs))
        proto = self.model.proto
        values = Session(proto, expose=inner(proto, names)).run(self.feeds[0], names)
        part = ancestors(proto, names)
        read = {name for node in part.graph.node for name in node.input}
        inputs = [value for value in part.graph.input if value.name in read]
        del part.graph.input[:], part.graph.output[:]
        part.graph.input.extend(inputs)
        for name in names:
            element = onnx.helper.np_dtype_to_tensor_dtype(values[name].dtype)
            part.graph.output.append(onnx.helper.make_tensor_value_info(name, element, None))
        path = folder / f"{self.path.stem}.front.onnx"
        save_whole(part, path)
        given = {value.name for value in inputs}
        return Reference(path, [{n: v for n, v in feed.items() if n in given} for feed in self.feeds])


def arrays(values: Mapping[str, Any]) -> dict[str, Array]:
    """Outputs as arrays by name; of sequences and maps every member by itself."""
    found: dict[str, Array] = {}
    for name, value in values.items():
        if isinstance(value, Mapping):
            found |= arrays({f"{name}[{key}]": part for key, part in value.items()})
        elif isinstance(value, list | tuple):
            found |= arrays({f"{name}[{place}]": part for place, part in enumerate(value)})
        elif value is not None:
            found[name] = np.asarray(value)
    return found


def apart(wanted: Array, made: Array, raise_by: float = 0.0) -> float:
    """How far an output is from what is wanted: the largest difference, as a share of the scale; of what is no
    quantity, as texts, truth values and numbers of classes, the share that is another. Infinite between shapes."""
    if wanted.dtype.kind in "OSUb" or wanted.dtype in (np.int32, np.int64):
        if wanted.shape != made.shape:
            return float("inf")
        return float(np.mean(wanted != made)) if wanted.size else 0.0
    return difference({"": wanted + raise_by}, {"": made + raise_by})
