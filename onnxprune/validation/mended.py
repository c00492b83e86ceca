"""Is a repaired model what its plan cuts, but for the weights that repair may change?

What repair computes depends on data and cannot be proven right; what it leaves alone can. The plan's cut of the
original is proven like any other (`equivalence`), and the candidate must be that cut: the same nodes, wires,
attributes and constants. Only two things may differ: values (never shapes or types) of weights and biases of
layers that sum over channels, and a bias where such a layer had none.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import onnx

from onnxprune.dependency import DependencyGraph
from onnxprune.errors import printable
from onnxprune.model import FLOATS, Array, Model, Node
from onnxprune.readers import Readers

SHOWN = 4  # differences that are named


@dataclass(frozen=True)
class Mending:
    """How a candidate differs from what its plan cuts.

    repaired   weights and biases of other values
    repairable weights and biases that repair may change
    added      biases that the cut does not have
    broken     anything else that differs, one line each
    """

    repaired: int
    repairable: int
    added: int
    broken: tuple[str, ...]

    @property
    def passed(self) -> bool:
        return not self.broken

    def as_dict(self) -> dict[str, Any]:
        return {**asdict(self), "broken": list(self.broken), "passed": self.passed}


def check(original: DependencyGraph, cut: onnx.ModelProto, candidate: Model) -> Mending:
    """Compare a candidate with what a plan cuts from the original (as `surgery.apply` gives it)."""
    reference = Model(cut)
    weights, slots = _repairable(original, reference)
    broken: list[str] = []
    if (have := _versions(candidate)) != (want := _versions(reference)):
        broken.append(f"it is written for {have}, not {want}")
    added = _nodes(reference, candidate, slots, broken)
    repaired = 0
    for name in reference.constants:
        if name not in candidate.constants:
            broken.append(f"constant '{printable(name)}' is missing")
        elif (why := _difference(reference, candidate, name)) == "values" and name in weights:
            repaired += 1
        elif why is not None:
            broken.append(f"constant '{printable(name)}' has other {why}")
    broken += [
        f"constant '{printable(name)}' is new"
        for name in candidate.constants
        if name not in reference.constants and name not in added
    ]
    more = [f"and {len(broken) - SHOWN} more differences"] if len(broken) > SHOWN else []
    return Mending(repaired, len(weights), len(added), (*broken[:SHOWN], *more))


Slots = set[tuple[str, int]]


def _repairable(original: DependencyGraph, reference: Model) -> tuple[set[str], Slots]:
    """Weights and biases that repair may change, and (output, operand) of nodes that may get a bias. Layers are
    looked for in the original and in its cut, where an axis of one unit is no longer one."""
    names: set[str] = set()
    slots: Slots = set()
    for graph in (original, DependencyGraph(reference)):
        for reader in Readers(graph).all:
            places = [(reader.node, reader.operand)]
            if reader.bias is not None:
                places.append((reader.bias.node, reader.bias.operand))
            for place, operand in places:
                node = reference.producers.get(place.result)
                if node is None:
                    continue  # it left with a removed layer
                name = node.inputs[operand] if operand < len(node.inputs) else ""
                if not name:
                    slots.add((node.result, operand))
                elif name in reference.constants and len(reference.consumers[name]) == 1:
                    names.add(name)
    return names, slots


def _versions(model: Model) -> str:
    sets = sorted((entry.domain or "ai.onnx", entry.version) for entry in model.proto.opset_import)
    return ", ".join(f"{domain} {version}" for domain, version in sets) + f", IR {model.proto.ir_version}"


def _nodes(
    reference: Model, candidate: Model, slots: Collection[tuple[str, int]], broken: list[str]
) -> set[str]:
    """Compare the nodes that compute something; returns the biases that the candidate has on top."""
    added: set[str] = set()
    ours, theirs = (
        {node.outputs: node for node in model.nodes if node.result not in model.constants}
        for model in (reference, candidate)
    )
    broken += [f"{node} is missing" for outputs, node in ours.items() if outputs not in theirs]
    broken += [f"{node} is new" for outputs, node in theirs.items() if outputs not in ours]
    for outputs, node in ours.items():
        other = theirs.get(outputs)
        if other is None:
            continue
        if _bare(node) != _bare(other):
            broken.append(f"{node} has other attributes")
        width = max(len(node.inputs), len(other.inputs))
        wired, wires = ((*n.inputs, *[""] * (width - len(n.inputs))) for n in (node, other))
        for operand, (want, have) in enumerate(zip(wired, wires, strict=True)):
            if want == have:
                continue
            if not want and (node.result, operand) in slots and _is_bias(candidate, have):
                added.add(have)
            else:
                broken.append(f"{node} reads '{printable(have)}', not '{printable(want)}'")
    return added


def _is_bias(model: Model, name: str) -> bool:
    """Whether a tensor is a stored vector of floats that one node reads."""
    tensor = model.constants.get(name)
    return (
        tensor is not None
        and tensor.data_type in FLOATS
        and len(tensor.dims) == 1
        and len(model.consumers[name]) == 1
    )


def _bare(node: Node) -> bytes:
    """The node without what it reads."""
    proto = onnx.NodeProto()
    proto.CopyFrom(node.proto)
    del proto.input[:]
    return proto.SerializeToString(deterministic=True)


def _difference(reference: Model, candidate: Model, name: str) -> str | None:
    """What differs in a constant: its type, its shape or its values."""
    want, have = reference.constants[name], candidate.constants[name]
    if want.data_type != have.data_type:
        return "elements"
    if tuple(want.dims) != tuple(have.dims):
        return "shape"
    return None if _same(reference.array(name), candidate.array(name)) else "values"


def _same(a: Array, b: Array) -> bool:
    """Bit for bit."""
    if a.dtype.hasobject:
        return bool(np.array_equal(a, b))
    left, right = (np.ascontiguousarray(x).reshape(-1).view(np.uint8) for x in (a, b))
    return bool(np.array_equal(left, right))
